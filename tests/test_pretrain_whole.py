"""pretrain.py believes no damage and breaks on no stream: checkpoints and audio are verified, and a
run goes on without anybody to listen to it."""

import io
import math
import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import prepare
import pretrain
from pretraining import QUIET, TOY, checkpoint, command, read_log, script
from training import journal, processes


@pytest.fixture
def saved(tmp_path):
    """A checkpoint file, and what it holds."""
    torch.manual_seed(0)
    content = {"step": 7, "config": {"lr": 3e-4}, "learner": {"w": torch.randn(64)}}
    pretrain.save_checkpoint(tmp_path / "checkpoint.pt", content)
    return tmp_path / "checkpoint.pt", content


def same(a, b):
    weights = torch.equal(a["learner"]["w"], b["learner"]["w"])
    return (a["step"], a["config"]) == (b["step"], b["config"]) and weights


def test_no_flipped_bit_of_a_checkpoint_is_believed(saved):
    """It is refused, or stands where it changes nothing, as in the padding between the tensors."""
    path, content = saved
    whole = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        try:
            assert same(pretrain.load_checkpoint(path), content)
        except ValueError as error:
            assert "is damaged" in str(error)
            refused += 1
    assert refused > 100


def test_a_flipped_bit_in_the_weights_gives_way_to_the_checkpoint_before(saved, capsys):
    path, content = saved
    pretrain.save_checkpoint(path, {**content, "step": 8})
    data = bytearray(path.read_bytes())
    data[data.index(content["learner"]["w"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert pretrain.load_checkpoint(path)["step"] == 7
    assert "a checksum does not fit" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_no_good_checkpoint(saved):
    path, content = saved
    content["learner"]["w"][3] = math.nan
    path.unlink()
    pretrain.save_checkpoint(path, content)
    with pytest.raises(ValueError, match="a weight is not finite"):
        pretrain.load_checkpoint(path)


# ------------------------------------------------------------------------------- the audio


@pytest.fixture
def data(tmp_path, tiny_data):
    """A prepared folder to harm."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_whole_audio_passes(data):
    journal.hear_some(prepare.Clips(data, "train"), seed=0)


def test_changed_samples_are_noticed_before_the_first_step(data, command):
    with open(data / "audio.npy", "r+b") as file:
        file.seek(1000)
        file.write(bytes(2 * 22050 * 120))  # silence over most of it
    done = command(["--data", data, *TOY, "--max-steps", 1, "--out", data / "run"])
    assert done.returncode == 1
    assert "have changed since they were prepared" in done.stderr
    assert "prepare.py --check" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_audio_cut_off_is_noticed_before_the_first_step(data, command):
    os.truncate(data / "audio.npy", (data / "audio.npy").stat().st_size // 2)
    done = command(["--data", data, *TOY, "--max-steps", 1, "--out", data / "run"])
    assert done.returncode == 1
    assert "audio.npy" in done.stderr or "cannot be read" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# --------------------------------------------------------------------- streams and signals


def test_a_run_ends_well_with_a_full_stdout_and_without_stderr(tmp_path, tiny_data):
    flags = ["--data", tiny_data, *TOY, "--max-steps", 2, "--out", tmp_path]
    words = ["sh", "-c", 'exec "$@" >/dev/full 2>&-', "sh", *script(flags)]
    assert subprocess.run(words, env={**os.environ, **QUIET}, timeout=300).returncode == 0
    assert read_log(tmp_path)[-1]["done"]
    assert checkpoint(tmp_path)["step"] == 2


def test_a_run_goes_on_when_its_reader_leaves(tmp_path, tiny_data):
    flags = ["--data", tiny_data, *TOY, "--max-steps", 3, "--out", tmp_path]
    process = subprocess.Popen(script(flags), env={**os.environ, **QUIET}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert not errors
    assert read_log(tmp_path)[-1]["done"]


def test_ctrl_c_during_the_imports_is_silent_and_leaves_nothing(tmp_path, tiny_data, interrupt):
    flags = ["--data", tiny_data, *TOY, "--out", tmp_path / "run"]
    assert interrupt(script(flags), "torch") == (-signal.SIGINT, "")
    assert not (tmp_path / "run").exists()


def test_a_rate_that_rounds_to_nothing_is_no_division_by_zero(tmp_path, capsys):
    """As after a laptop has slept for minutes."""
    log = journal.Log.__new__(journal.Log)
    vars(log).update(path=tmp_path / "log.jsonl", total=10, silent=False)
    log.write({"step": 1, "pairs": 4, "loss": 1.0, "pairs_per_s": 0.0})
    assert "pairs_per_s 0.0" in capsys.readouterr().out


def test_what_an_alphabet_lacks_is_written_in_escapes():
    raw = io.BytesIO()
    stream = processes.Unbreakable(io.TextIOWrapper(raw, encoding="ascii"))
    print("Бах é", file=stream)
    assert raw.getvalue() == b"\\u0411\\u0430\\u0445 \\xe9\n"


def test_without_any_stream_nothing_is_said():
    print("nobody hears it", file=processes.Unbreakable(None))


# ------------------------------------------------------------------------------- small sets


def test_by_default_a_small_set_gets_the_largest_batch_that_works(tmp_path, command, tiny_data):
    small = [*TOY[:2], *TOY[4:]]  # without --batch-size
    done = command(["--data", tiny_data, *small, "--max-steps", 1, "--out", tmp_path])
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path)["config"]["batch_size"] == 12
    assert "12 pairs are the most that these songs and processes allow" in done.stdout


def test_the_name_of_a_set_cannot_lead_out_of_runs(data, command, tmp_path, monkeypatch):
    meta = json.loads((data / "meta.json").read_text(encoding="utf-8"))
    del meta["checksum"]  # as a folder of somebody who knows what is verified
    (data / "meta.json").write_text(json.dumps({**meta, "name": "../../tiny"}), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    done = command(["--data", data, *TOY, "--max-steps", 1])
    assert done.returncode == 1 and "is no name" in done.stderr
    assert not (tmp_path / "runs").exists()
