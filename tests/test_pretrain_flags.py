"""pretrain.py's methods and flags: each takes a step, learns, or is refused in one line."""

import math

import numpy as np
import pytest
import torch

import model
import prepare
from pretraining import TOY, command, losses, run_to_its_end
from training import journal

METHODS = [
    ["--transforms", "filter", "--probability", "filter=1", "--asymmetric"],
    ["--transforms", "none", "--positives", "clip"],
    ["--loss", "dcl", "--schedule", "cosine", "--warmup", "1"],
    ["--encoder", "samplecnn-large", "--recompute", "2", "--amp", "bf16"],
    ["--method", "cpc"],
]


@pytest.mark.parametrize("extra", METHODS, ids=" ".join)
def test_every_method_takes_steps_and_gives_an_encoder(tmp_path, command, tiny_data, extra):
    done = command(["--data", tiny_data, *TOY, "--max-steps", 2, "--out", tmp_path, *extra])
    assert done.returncode == 0, done.stderr
    _, info = model.load_encoder(tmp_path / "encoder.pt")
    method = "cpc" if "cpc" in extra else "clmr"
    assert (info["step"], info["method"], info["sample_rate"]) == (2, method, 22050)
    assert len(losses(tmp_path)) == 2
    assert all(map(math.isfinite, losses(tmp_path)))


@pytest.fixture(scope="module")
def learned(tmp_path_factory, tiny_data):
    """Forty steps on twelve songs."""
    folder = tmp_path_factory.mktemp("learned")
    flags = [*TOY, "--batch-size", 8, "--max-steps", 40, "--lr", "1e-3", "--probe-every", 20]
    flags += ["--transforms", "polarity", "gain", "--out", folder]
    done = run_to_its_end(["--data", tiny_data, *flags])
    assert done.returncode == 0, done.stderr
    return folder


def test_the_loss_falls_clearly_below_chance(learned):
    last = np.mean(losses(learned)[-5:])
    assert last < 0.8 * math.log(15)  # chance is log(2N - 1)
    assert last < 0.85 * np.mean(losses(learned)[:5])


def test_a_run_is_probed_and_says_when_it_is_done(learned):
    log = journal.read_log(learned)
    assert [record["step"] for record in log if "probe" in record] == [20, 40]
    assert log[-1]["done"]


def test_the_curves_of_a_run_are_drawn(learned):
    assert journal.main([str(learned)]) == 0
    assert (learned / "curves.png").stat().st_size > 5000


def test_there_are_no_curves_without_a_log(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        journal.main([str(tmp_path)])
    assert "no log.jsonl there" in capsys.readouterr().err


@pytest.fixture
def one_tag(tiny_data):
    """The training and validation clips, with the first tag alone."""
    sets = prepare.Clips(tiny_data, "train"), prepare.Clips(tiny_data, "valid")
    for clips in sets:
        clips.tags = clips.tags[:1]
        clips.labels = clips.labels[:, :1]
    return sets


def test_the_quick_probe_of_one_tag_knows_clips_without_it(one_tag):
    torch.manual_seed(0)
    encoder = model.build_encoder("samplecnn", width=1 / 16)
    assert 0 <= journal.quick_probe(encoder, *one_tag, torch.device("cpu")) <= 1


def test_the_quick_probe_says_nothing_of_clips_without_labels(one_tag):
    encoder = model.build_encoder("samplecnn", width=1 / 16)
    one_tag[1].length = one_tag[1].length * 0  # none is long enough
    assert journal.quick_probe(encoder, *one_tag, torch.device("cpu")) is None
    assert encoder.training


BAD = [
    (["--data", "never-prepared"], 2, "never-prepared"),
    (["--data", "TINY", "--batch-size", "13"], 1, "--batch-size 12"),
    (["--data", "TINY", "--batch-size", "1"], 1, "at least 2"),
    (["--data", "TINY", "--encoder", "resnet"], 2, "samplecnn-large"),
    (["--data", "TINY", "--transforms", "echo"], 2, "echo"),
    (["--data", "TINY", "--probability", "filter"], 2, "filter=0.8"),
    (["--data", "TINY", "--probability", "filter=1.5"], 2, "1.5"),
    (["--data", "TINY", "--method", "cpc", "--encoder", "samplecnn"], 2, "cpc"),
    (["--data", "TINY", "--method", "cpc", "--temperature", "0.1"], 2, "--temperature"),
    (["--data", "TINY", "--transforms", "gain", "--probability", "reverb=1"], 2, "reverb"),
    (["--data", "TINY", "--encoder", "melcnn", "--recompute", "3"], 2, "--recompute"),
    (["--data", "TINY", "--lr", "0"], 2, "--lr"),
    (["--data", "TINY", "--temp", "0.1"], 2, "--temp"),
    ([], 2, "--data"),
]


@pytest.mark.parametrize("args, code, says", BAD, ids=lambda value: str(value)[:60])
def test_bad_commands_are_one_line(tmp_path, command, tiny_data, args, code, says):
    args = [tiny_data if arg == "TINY" else arg for arg in args]
    done = command([*args, "--out", tmp_path / "run"])
    lines = done.stderr.strip().splitlines()
    lines = [line for line in lines if not line.startswith("usage:")]
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert says in lines[0]
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_names_the_nearest(command, tiny_data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    done = command(["--data", tiny_data, "--batch-size", 7])
    assert done.returncode == 2
    assert "the nearest that do: 6, 8" in done.stderr
