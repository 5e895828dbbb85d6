"""evaluate.py as a user runs it: what it writes, what it leaves alone, what it says."""

import contextlib
import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import model
import prepare
from conftest import ROOT
from evaluation import command, store

torch.set_num_threads(1)
FEW = ["--min-steps", "5", "--epochs", "8"]  # a probe need not be good to be tested
LBFGS = ["--probe", "lbfgs"]
WIDTH = 1 / 16  # an encoder that is fast, and whose numbers mean nothing
METRICS = ("roc_auc", "pr_auc", "clip_roc_auc", "clip_pr_auc")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_data):
    torch.manual_seed(99)  # not the control's seed
    path = tmp_path_factory.mktemp("run") / "encoder.pt"
    model.save_encoder(path, model.build_encoder("samplecnn", width=WIDTH), sample_rate=22050,
                       method="clmr", step=7, data=str(tiny_data),
                       fingerprint=prepare.Clips(tiny_data).fingerprint)
    (path.parent / "log.jsonl").touch()  # a run's folder
    return path


@pytest.fixture(scope="module")
def evaluated(run, checkpoint):
    """An evaluation as a user runs it, beside the control, of two fractions and seeds: its JSON,
    what the command printed, the file."""
    done = run(["evaluate.py", "--ckpt", checkpoint, "--random", "--fraction", "0.5", "1",
                "--seeds", "2", *FEW])
    assert done.returncode == 0, done.stderr
    out = next(checkpoint.parent.glob("evaluate-*.json"))
    return json.loads(out.read_text()), done, out


def evaluation(tmp_path, *flags):
    """The JSON of an evaluation in this process."""
    out = tmp_path / "result.json"
    flags = [*map(str, flags), "--out", str(out), "--export", str(tmp_path)]
    assert evaluate.main(flags) == 0
    return json.loads(out.read_text())


# ----------------------------------------------------------------------------- what a result says

def test_a_result_names_its_data(evaluated, tiny_data):
    clips = prepare.Clips(tiny_data)
    data = evaluated[0]["data"]
    assert data["fingerprint"] == clips.fingerprint
    assert data["split"] == clips.meta["split_name"]
    assert [data["counts"][split]["clips"] for split in evaluate.SPLITS] == [12, 6, 6]
    windows = int((clips.length[clips.split == 0] // 59049).sum())
    assert data["counts"]["train"]["windows"] == windows


def test_a_result_names_its_command_and_versions(evaluated):
    assert evaluated[0]["argv"][0] == "evaluate.py"
    assert evaluated[0]["versions"]["torch"] == torch.__version__


def test_a_result_names_the_frozen_encoder(evaluated, checkpoint):
    encoder = evaluated[0]["encoder"]
    assert encoder["unchanged"]
    assert encoder["sha256"][0] == model.weights_sha256(model.load_encoder(checkpoint)[0])


def test_a_result_has_a_row_for_each_model_and_fraction(evaluated):
    assert [(row["model"], row["fraction"]) for row in evaluated[0]["results"]] == [
        ("clmr, 7 steps", 0.5), ("clmr, 7 steps", 1), ("untrained", 0.5), ("untrained", 1)]


def test_a_row_has_a_run_for_each_seed(evaluated):
    half, full, *_ = evaluated[0]["results"]
    assert [run["seed"] for run in full["runs"]] == [0, 1]
    assert [run["clips"] for run in half["runs"]] == [6, 6]


@pytest.mark.parametrize("name", METRICS)
def test_a_row_is_the_mean_and_deviation_of_its_runs(evaluated, name):
    full = evaluated[0]["results"][1]
    values = [run[name] for run in full["runs"]]
    assert full["mean"][name] == pytest.approx(np.mean(values), abs=2e-6)
    assert full["std"][name] == pytest.approx(np.std(values, ddof=1), abs=2e-6)


def test_a_row_has_every_tag_and_an_interval(evaluated, tiny_data):
    full = evaluated[0]["results"][1]
    assert list(full["per_tag"]) == prepare.Clips(tiny_data).tags
    assert full["interval"]["roc_auc"][0] < full["interval"]["roc_auc"][1]


def test_a_row_has_its_difference_to_the_control(evaluated):
    half, _, control, _ = evaluated[0]["results"]
    more = half["mean"]["roc_auc"] - control["mean"]["roc_auc"]
    assert half["over_untrained"]["roc_auc"]["mean"] == pytest.approx(more, abs=2e-6)


def test_the_command_prints_its_table(evaluated):
    done = evaluated[1]
    assert "| clmr, 7 steps | linear | 50 % (6 clips) |" in done.stdout
    assert "Traceback" not in done.stderr


def test_features_are_no_part_of_a_file(evaluated):
    assert not {"draws", "scores", "module", "features"} & set(evaluated[0]["results"][0])


# ----------------------------------------------------------------------------------- the features

@pytest.mark.parametrize("damage", [b"no features", b"", "a flipped bit", "the half of it"])
def test_damaged_features_are_noticed_and_computed_again(
        evaluated, checkpoint, tiny_data, tmp_path, capfd, damage):
    files = list((tiny_data / "features").glob("*.npz"))
    assert len(files) >= 2  # the encoder's, the control's, and what else was evaluated on these
    for file in files:
        content = bytearray(file.read_bytes() or b"of the case before")
        content[len(content) // 2] ^= 1
        content = content[: len(content) // 2] if damage == "the half of it" else content
        file.write_bytes(damage if isinstance(damage, bytes) else bytes(content))
    again = evaluation(tmp_path, "--ckpt", checkpoint, "--seeds", 2, *FEW)["results"][0]
    assert again["mean"] == evaluated[0]["results"][1]["mean"]
    assert again["interval"] == evaluated[0]["results"][1]["interval"]
    assert "is damaged" in capfd.readouterr().err


def test_features_that_are_there_are_read_in_silence(
        evaluated, checkpoint, tmp_path, capfd, monkeypatch):
    evaluation(tmp_path, "--ckpt", checkpoint, "--seeds", 2, *FEW)
    capfd.readouterr()
    monkeypatch.setattr(evaluate, "embed", lambda *_: pytest.fail("computed again"))
    again = evaluation(tmp_path, "--ckpt", checkpoint, "--seeds", 2, *FEW)["results"][0]
    assert again["mean"] == evaluated[0]["results"][1]["mean"]
    assert "damaged" not in capfd.readouterr().err


# ------------------------------------------------------------------------------------- what it left

SCRIPT = """
import sys, torch
m = torch.jit.load(sys.argv[1])
x = torch.load(sys.argv[2])
torch.save((m(x), m.frames(x, 59049)), sys.argv[3])
print(m.sample_rate, m.input_samples, list(getattr(m, "tags", [])))
"""


@pytest.fixture(scope="module")
def loaded(evaluated, checkpoint, tiny_data, run, tmp_path_factory):
    """What a program without this repository gets of an export and the longest clip: the mean, the
    frames, what it printed; and the features of that clip's windows."""
    clips = prepare.Clips(tiny_data)
    folder = tmp_path_factory.mktemp("elsewhere")
    i = int(clips.length.argmax())
    torch.save(clips.waveform(i)[None, None], folder / "x.pt")
    n = int(clips.length[i]) // 59049
    x = clips.crops([i] * n, np.arange(n) * 59049, 59049)
    h = evaluate.embed(model.load_encoder(checkpoint)[0], x.split(4))

    def load(name):
        done = run(["-c", SCRIPT, checkpoint.parent / name, folder / "x.pt", folder / "y.pt"],
                   cwd=folder)
        assert done.returncode == 0, done.stderr
        return *torch.load(folder / "y.pt"), done.stdout, h
    return load


def test_encoder_ts_works_without_this_repository(loaded):
    got, frames, _, h = loaded("encoder.ts")
    assert torch.allclose(got[0], h.mean(0), rtol=1e-4, atol=1e-5)
    assert frames.shape == (1, *h.shape)


@pytest.mark.parametrize("name", ["encoder.ts", "tagger.ts"])
def test_an_exported_network_keeps_nothing_for_a_backward_pass(evaluated, checkpoint, name):
    network = torch.jit.load(checkpoint.parent / name)
    assert not network(torch.zeros(1, 1, network.input_samples)).requires_grad


def test_tagger_ts_works_without_this_repository(loaded, tiny_data):
    got, _, printed, _ = loaded("tagger.ts")
    assert got.shape == (1, 4)
    assert 0 < got.min() and got.max() < 1
    assert str(prepare.Clips(tiny_data).tags) in printed


@pytest.mark.parametrize("name", ["encoder.ts", "encoder.pt2", "tagger.ts"])
def test_exports_name_their_data(evaluated, checkpoint, tiny_data, name):
    sidecar = json.loads((checkpoint.parent / f"{name}.json").read_text())
    assert sidecar["data"] == prepare.Clips(tiny_data).name


def test_a_second_evaluation_leaves_what_the_first_left(checkpoint, evaluated):
    folder = checkpoint.parent
    first = evaluated[2].read_bytes()
    tagger = (folder / "tagger.ts").read_bytes()
    flags = ["--ckpt", str(checkpoint), *LBFGS, "--fraction", "0.5", "--seeds", "2"]
    assert evaluate.main(flags) == 0
    name = f"evaluate-{evaluated[0]['data']['name']}-fraction-0.5-probe-lbfgs"
    second = json.loads((folder / f"{name}.json").read_text())
    assert second["results"][0]["std"]["pr_auc"] is not None  # of two halves
    assert evaluate.main([*flags, "--fraction-mode", "v1"]) == 0
    assert json.loads((folder / f"{name}.json").read_text()) == second
    assert (folder / "tagger.ts").read_bytes() == tagger
    assert evaluated[2].read_bytes() == first


def test_other_data_do_not_replace_the_tagger(checkpoint, evaluated, tiny_single, capsys):
    folder = checkpoint.parent
    tagger = (folder / "tagger.ts").read_bytes()
    flags = ["--ckpt", str(checkpoint), "--data", str(tiny_single), *LBFGS, "--seeds", "1"]
    assert evaluate.main(flags) == 0
    own = folder / f"tagger-{prepare.Clips(tiny_single).name}.ts"
    assert str(own) in capsys.readouterr().out
    assert json.loads((folder / f"{own.name}.json").read_text())["task"] == "singlelabel"
    assert (folder / "tagger.ts").read_bytes() == tagger


# ------------------------------------------------------------------------------- data and protocol

@pytest.mark.parametrize("info, wanted", [
    ({"data": "a", "data_folder": "/disk/a", "fingerprint": "1"}, "/disk/a"),
    ({"data": "a", "data_folder": "/gone/a", "fingerprint": "2"}, "a"),
    ({"data": "b", "data_folder": "/disk/a", "fingerprint": "3"}, "b"),  # another set is there now
    ({"data": "a", "data_folder": "/disk/a", "fingerprint": "0"}, "/disk/a"),
    ({"data": "a+b", "data_folder": "a b", "fingerprint": "4"}, "a b"),
])
def test_by_default_the_data_that_the_encoder_was_trained_on(info, wanted):
    fingerprints = {"/disk/a": "1", "a": "2", "b": "3", "a b": "4"}

    def load(names):
        names = [names] if isinstance(names, str) else names
        if not set(names) <= {"/disk/a", "a", "b"}:
            raise FileNotFoundError(f"{names}: not prepared")
        return SimpleNamespace(name=" ".join(names), fingerprint=fingerprints[" ".join(names)])

    assert command.trained_on(info, load).name == wanted


def test_data_that_are_gone_are_named():
    def load(name):
        raise FileNotFoundError(f"{name}: not prepared")
    with pytest.raises(FileNotFoundError, match="gone: not prepared"):
        command.trained_on({"data": "gone"}, load)


def test_several_folders_are_one_set(checkpoint, tiny_audio, run, tmp_path):
    for part in ("1/2", "2/2"):
        done = run(["prepare.py", "--data", "folder", "--root", tiny_audio, "--labels",
                    tiny_audio / "tags.csv", "--out", tmp_path / f"set {part[0]}", "--shard", part])
        assert done.returncode == 0, done.stderr
    parts = sorted(tmp_path.glob("set*"))
    assert len(parts) == 2
    result = evaluation(tmp_path, "--ckpt", checkpoint, "--data", *parts, *LBFGS)
    counts = result["data"]["counts"]
    assert [counts[split]["clips"] for split in evaluate.SPLITS] == [12, 6, 6]


@pytest.mark.parametrize("flags, probe", [(["--hidden", "16"], "hidden 16"), (LBFGS, "lbfgs")])
def test_single_labels(checkpoint, tiny_single, tmp_path, flags, probe):
    result = evaluation(tmp_path, "--ckpt", checkpoint, "--data", tiny_single, "--seeds", 1, *FEW,
                        *flags)["results"][0]
    assert result["probe"] == probe
    assert result["std"]["accuracy"] is None
    confusion = result["runs"][0]["confusion"]
    assert np.sum(confusion) == 6
    assert result["mean"]["accuracy"] == pytest.approx(np.trace(confusion) / 6, abs=1e-6)


def test_the_optimum_has_no_deviation_over_seeds(checkpoint, tmp_path):
    result = evaluation(tmp_path, "--ckpt", checkpoint, *LBFGS, "--seeds", 2)
    assert result["results"][0]["std"]["pr_auc"] is None


def test_the_supervised_baseline_leaves_the_encoder_as_it_is(checkpoint, tmp_path):
    result = evaluation(tmp_path, "--ckpt", checkpoint, "--supervised", "--fraction", 0.5,
                        "--seeds", 1, "--min-steps", 5, "--epochs", 2, "--batch-size", 4)
    rows = result["results"]
    assert [(row["model"], row["probe"]) for row in rows] == [
        ("clmr, 7 steps", "linear"), ("supervised", "end to end")]
    assert all(row["runs"][0]["epochs"] <= 2 for row in rows)
    assert all(0 <= row["mean"]["roc_auc"] <= 1 for row in rows)
    assert result["encoder"]["unchanged"]


def test_a_network_learns_what_can_be_heard(tiny_data):
    clips = prepare.Clips(tiny_data)
    data = evaluate.cut(clips, 59049)

    def build(seed):
        torch.manual_seed(seed)
        return model.build_encoder("samplecnn", width=WIDTH)

    protocol = evaluate.Protocol(batch_size=6, lr=3e-3, epochs=12, patience=12)
    fit = evaluate.network_on(data, clips, protocol, build)
    _, info, scores = fit(np.arange(len(data["train"].clip)), 0)
    assert scores.shape == (6, 4)
    assert info["valid"] > 0.6


# --------------------------------------------------------------------- features of clips, of others

LOGISTIC = ["--probe", "logistic", "--seeds", "1"]


@pytest.fixture
def made_elsewhere(tiny_data, tmp_path):
    """Features that know the labels, in an order of their own, two rows of each clip."""
    clips = prepare.Clips(tiny_data)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(clips)), 2))
    rng = np.random.default_rng(1)
    features = clips.labels[order] + rng.normal(0, 0.05, (len(order), 4))
    path = tmp_path / "oracle.npz"
    np.savez(path, id=clips.id[order].astype(str), features=features, seconds=1.0)
    return path


def test_features_made_elsewhere_are_scored_by_the_same_protocol(
        checkpoint, tiny_data, made_elsewhere, tmp_path):
    result = evaluation(tmp_path, "--ckpt", checkpoint, "--features-from", made_elsewhere,
                        *LOGISTIC)
    ours, theirs = result["results"]
    assert (theirs["model"], theirs["probe"]) == ("oracle", "logistic")
    assert theirs["mean"]["roc_auc"] == 1.0
    difference = ours["over_oracle"]["roc_auc"]
    assert difference["mean"] == pytest.approx(ours["mean"]["roc_auc"] - 1, abs=2e-6)
    assert difference["interval"][0] <= difference["mean"] <= difference["interval"][1]


def test_features_of_one_name_are_refused_before_one_hides_the_other(
        checkpoint, made_elsewhere, tmp_path, capsys):
    twin = tmp_path / "twin" / made_elsewhere.name
    twin.parent.mkdir()
    twin.write_bytes(made_elsewhere.read_bytes())
    for names in ([made_elsewhere, twin], [made_elsewhere.rename(tmp_path / "untrained.npz")]):
        with pytest.raises(SystemExit):
            evaluate.main(["--ckpt", str(checkpoint), "--features-from", *map(str, names)])
        assert "different names" in capsys.readouterr().err


def test_without_an_encoder_file_the_control_is_compared_with(
        tiny_data, made_elsewhere, tmp_path):
    result = evaluation(tmp_path, "--data", tiny_data, "--random", "--width", WIDTH,
                        "--features-from", made_elsewhere, *LOGISTIC)
    control, oracle = result["results"]
    assert control["model"] == "untrained" and "over_oracle" in control
    assert oracle["over_untrained"]["roc_auc"]["mean"] > 0


def test_features_made_elsewhere_need_no_encoder(tiny_data, made_elsewhere, tmp_path):
    result = evaluation(tmp_path, "--data", tiny_data, "--features-from", made_elsewhere, *LBFGS,
                        "--neighbours", 3)
    assert [row["model"] for row in result["results"]] == ["oracle"]
    assert result["results"][0]["mean"]["labels@3"] > 0.5
    assert not (tmp_path / "encoder.ts").exists()


@pytest.mark.parametrize("spoil, says", [
    (lambda columns: columns.pop("id"), "expected a npz file with `id`"),
    (lambda columns: columns.update(id=columns["id"][:-1]), "got (24, 4) and 23"),
    (lambda columns: columns.update(id=np.roll(["x", *columns["id"][1:]], 1)), "1 of 24 clips"),
    (lambda columns: columns["features"].__setitem__(0, np.nan), "finite"),
])
def test_features_that_do_not_fit_are_refused(tiny_data, tmp_path, capsys, spoil, says):
    clips = prepare.Clips(tiny_data)
    columns = {"id": clips.id.astype(str), "features": clips.labels.astype(float)}
    spoil(columns)
    np.savez(tmp_path / "f.npz", **columns)
    flags = ["--data", str(tiny_data), "--features-from", str(tmp_path / "f.npz")]
    assert evaluate.main([*flags, "--out", str(tmp_path / "r.json")]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_logistic_probe_is_of_clips(checkpoint, tiny_data, tmp_path):
    result = evaluation(tmp_path, "--ckpt", checkpoint, *LOGISTIC)
    clips = prepare.Clips(tiny_data)
    h = {split: evaluate.by_clip(evaluate.replace(of, x=evaluate.embed(
            model.load_encoder(checkpoint)[0], evaluate.crops(clips, of, 59049))))
         for split, of in evaluate.cut(clips, 59049).items()}
    probe, _ = evaluate.fit_lbfgs(h["train"], h["valid"])
    wanted = evaluate.score(torch.sigmoid(probe(h["test"].x)), clips.labels[h["test"].clip])
    row = result["results"][0]
    assert row["mean"]["pr_auc"] == pytest.approx(wanted["pr_auc"], abs=1e-3)
    assert row["runs"][0]["windows"] == row["runs"][0]["clips"] == 12


def test_neighbours_stand_beside_the_other_metrics(checkpoint, tmp_path):
    result = evaluation(tmp_path, "--ckpt", checkpoint, "--random", *LOGISTIC, "--neighbours", 5)
    ours, control = result["results"]
    low, high = ours["interval"]["labels@5"]
    assert low < ours["mean"]["labels@5"] < high
    more = ours["mean"]["labels@5"] - control["mean"]["labels@5"]
    assert ours["over_untrained"]["labels@5"]["mean"] == pytest.approx(more, abs=2e-6)
    assert "labels@5" in result["table"][0]


# ----------------------------------------------------------------------------- what may go wrong

@pytest.mark.parametrize("name", ["samplecnn", "melcnn"])
def test_half_precision_is_near_to_full(tiny_data, tmp_path, name):
    torch.manual_seed(0)
    path = tmp_path / "encoder.pt"
    encoder = model.build_encoder(name, width=1 / 8)
    model.save_encoder(path, encoder, sample_rate=22050, method="clmr", step=1)
    clips = prepare.Clips(tiny_data)
    data = evaluate.cut(clips, encoder.input_samples)
    full, half = (evaluate.features_of(model.load_encoder(path)[0], clips, data,
                                       evaluate.Protocol(device="cpu", amp=amp))["test"].x
                  for amp in ("off", "bf16"))
    assert 0 < (half - full).norm() / full.norm() < 0.05


def test_one_training_clip_is_enough_for_the_optimum(checkpoint, tmp_path):
    result = evaluation(tmp_path, "--ckpt", checkpoint, "--fraction", 0.01, *LOGISTIC)
    assert result["results"][0]["runs"][0]["clips"] == 1


def test_features_that_cannot_be_kept_are_computed_all_the_same(tmp_path, monkeypatch):
    """A read-only disk refuses to write, and to remove what is not there."""
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(np, "savez", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    store.Kept(tmp_path, ["a key"]).write({"x": torch.zeros(1)})


def test_a_place_that_cannot_be_is_said_before_the_work(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(evaluate, "run", lambda *_: pytest.fail("it worked"))
    (tmp_path / "a file").touch()
    flags = ["--ckpt", str(checkpoint), "--out", str(tmp_path / "a file/below.json")]
    assert evaluate.main(flags) == 1
    assert "a file" in capsys.readouterr().err


def test_numbers_are_seen_where_they_cannot_be_written(checkpoint, monkeypatch, capsys, tmp_path):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(model, "write_atomically", refuse)
    assert evaluate.main(["--ckpt", str(checkpoint), *LOGISTIC,
                          "--out", str(tmp_path / "result.json")]) == 1
    told = capsys.readouterr()
    assert "PR-AUC" in told.out and "No space left" in told.err


def test_a_path_that_is_not_utf8_is_written_as_escapes(checkpoint, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    odd.mkdir()
    shutil.copy(checkpoint, odd / "encoder.pt")
    result = evaluation(tmp_path, "--ckpt", odd / "encoder.pt", *LOGISTIC)
    assert "caf\udce9" in result["protocol"]["ckpt"]


# ------------------------------------------------------------------------------------ what it says

@pytest.mark.parametrize("flags, code, says", [
    (["--ckpt", "nowhere/encoder.pt"], 2, "nowhere/encoder.pt: no such file"),
    ([], 2, "type --ckpt"),
    (["--random"], 2, "--data NAME"),
    (["--random", "--data", "never-prepared"], 2, "prepare.py"),
    (["--random", "--data", "x", "--fraction", "0"], 2, "--fraction is in (0, 1]"),
    (["--random", "--data", "x", "--hidden", "8", "--probe", "lbfgs"], 2, "--hidden"),
    (["--random", "--data", "x", "--seeds", "0"], 2, "at least 1"),
    (["--random", "--data", "x", "--min-steps", "0"], 2, "at least 1"),
    (["--random", "--data", "x", "--encoder", "resnet"], 2, "samplecnn-large"),
    (["--random", "--data", "x", "--width", "inf"], 2, "--width"),
    (["--ckpt", __file__, "--data", "x", "--width", "0.5"], 2, "--width"),
    (["--ckpt", __file__, "--data", "x"], 1, "cannot be read"),
])
def test_bad_commands_get_one_line(flags, code, says, capsys):
    try:
        got = evaluate.main(flags)
    except SystemExit as stop:
        got = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("usage:")]
    assert got == code
    assert len(lines) == 1
    assert says in lines[0]


def test_data_without_labels_are_refused(run, checkpoint, tiny_audio, tmp_path, capsys):
    plain = tmp_path / "plain"
    done = run(["prepare.py", "--data", "folder", "--root", tiny_audio, "--out", plain])
    assert done.returncode == 0, done.stderr
    assert evaluate.main(["--ckpt", str(checkpoint), "--data", str(plain)]) == 1
    assert "has no labels" in capsys.readouterr().err


def test_an_encoder_of_another_sample_rate_is_refused(tiny_data, tmp_path, capsys):
    other = tmp_path / "44k.pt"
    model.save_encoder(other, model.build_encoder("samplecnn", width=WIDTH), sample_rate=44100,
                       method="clmr", step=1)
    assert evaluate.main(["--ckpt", str(other), "--data", str(tiny_data)]) == 1
    assert "works at 44100 Hz" in capsys.readouterr().err


@pytest.mark.parametrize("split, says", [(1, "to validate on"), (2, "to test on")])
def test_data_without_a_split_say_what_to_do(tiny_data, split, says):
    clips = prepare.Clips(tiny_data)
    clips.split = np.where(clips.split == split, 0, clips.split)
    with pytest.raises(ValueError, match=f"no usable clip {says}.*a column `split`"):
        evaluate.cut(clips, 59049)


def test_a_reader_that_has_read_enough_is_no_error(checkpoint, evaluated, run, tmp_path):
    read, write = os.pipe()
    os.close(read)
    done = run(["evaluate.py", "--ckpt", checkpoint, *LBFGS, "--seeds", "1", "--out",
                tmp_path / "r.json", "--export", tmp_path], capture_output=False, stdout=write,
               stderr=-1)
    os.close(write)
    assert done.stderr == ""
    assert (tmp_path / "tagger.ts").exists()  # all files are written before the table is printed


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line(run):
    code = ("from evaluation.command import one_line; "
            "one_line('evaluate.py', lambda: print('a') or 0)")
    with open("/dev/full", "w") as full:
        done = run(["-c", code], capture_output=False, stdout=full, stderr=-1)
    assert done.stderr == "evaluate.py: error: [Errno 28] No space left on device\n"


def test_no_terminal_at_all_is_no_error(run):
    code = ("import sys; sys.stdout = sys.stderr = None; from evaluation.command import one_line; "
            "sys.exit(one_line('evaluate.py', lambda: print('a') or 0))")
    assert run(["-c", code]).returncode == 0


def test_a_bug_is_not_turned_into_one_line(checkpoint, monkeypatch):
    def run(*_):
        raise RuntimeError("an assumption does not hold")
    monkeypatch.setattr(evaluate, "run", run)
    with pytest.raises(RuntimeError, match="an assumption"):
        evaluate.main(["--ckpt", str(checkpoint)])


def test_memory_that_does_not_suffice_is_said_in_one_line(checkpoint, monkeypatch, capsys):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    monkeypatch.setattr(evaluate, "run", run)
    with contextlib.suppress(SystemExit):
        assert evaluate.main(["--ckpt", str(checkpoint)]) == 1
    assert capsys.readouterr().err == (
        "evaluate.py: error: CUDA out of memory. Tried to allocate 2 GiB.\n")


def test_what_ships_can_be_evaluated(tmp_path, run):
    done = run(["evaluate.py", "--ckpt", ROOT / "demo/encoder.pt", "--data", "never-prepared"],
               cwd=tmp_path)
    assert done.returncode == 2
    assert "prepare.py" in done.stderr


@pytest.mark.parametrize("script", ["evaluate.py", "transfer.py"])
def test_ctrl_c_during_the_imports_is_silent(checkpoint, tiny_data, script, interrupt):
    command = [sys.executable, str(ROOT / script), "--ckpt", str(checkpoint), "--data", tiny_data]
    assert interrupt(command, "numpy") == (-signal.SIGINT, "")
