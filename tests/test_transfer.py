"""transfer.py: the grid equals evaluate.py's numbers, marks what was heard in pre-training, and draws every picture."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import model
import prepare
import transfer

torch.set_num_threads(1)
FEW = ["--min-steps", "5", "--seeds", "1", "--bootstrap", "50"]


def clips(digests, split, fingerprint="f"):
    return SimpleNamespace(sha256=np.repeat(np.array(digests, np.uint8)[:, None], 32, 1), split=np.array(split), fingerprint=fingerprint,
                           __len__=lambda: len(digests))


def test_overlap_counts_heard_test_clips():
    source, target = clips([1, 2, 3, 4], [0, 0, 1, 2]), clips([2, 3, 4, 9, 1], [2, 2, 2, 2, 0])
    assert transfer.overlap(source, target) == (1, 1, 4)  # 2 was heard, 1 is a training clip of both; 3 and 4 are shared, but were not trained on


def test_marks():
    class Data(SimpleNamespace):
        def __len__(self):
            return 5
    target = Data(**vars(clips([2, 3, 4, 9, 1], [2, 2, 2, 2, 0], "target")))
    source = clips([1, 2, 3, 4], [0, 0, 1, 2], "source")
    load = {"s": source}.__getitem__
    assert transfer.mark({"fingerprint": "target", "data": "t"}, target, load)["status"] == "same data"
    assert transfer.mark({"fingerprint": "source", "data": "s"}, target, load) == {"status": "1 test clips heard", "heard": 1, "trained": 1, "shared": 4}
    target.split[:2] = 0  # the clip that was heard is for training now
    assert transfer.mark({"fingerprint": "source", "data": "s"}, target, load)["status"] == "2 training clips heard"
    assert transfer.mark({"fingerprint": "source", "data": "gone"}, target, load)["status"] == "?"
    assert transfer.mark({"fingerprint": "older", "data": "s"}, target, load)["status"] == "?"  # prepared again since
    assert transfer.mark({"data": None}, target, load)["status"] == "?"
    where = {"fingerprint": "source", "data": "gone", "data_folder": "s"}
    assert transfer.mark(where, target, load)["status"] == "2 training clips heard"


@pytest.fixture(scope="module")
def grid(tmp_path_factory, tiny_data, tiny_single):
    """Two encoders and the control on two data sets, in this process."""
    folder = tmp_path_factory.mktemp("grid")
    for name, seed, data in (("a", 1, tiny_data), ("b", 2, None)):
        torch.manual_seed(seed)
        model.save_encoder(folder / f"{name}.pt", model.build_encoder("samplecnn", width=1 / 16), sample_rate=22050, method="clmr", step=seed,
                           data=str(data) if data else None, fingerprint=prepare.Clips(data).fingerprint if data else None)
    argv = ["--ckpt", f"A={folder / 'a.pt'}", f"B={folder / 'b.pt'}", "--data", str(tiny_data), str(tiny_single), "--random",
            "--hidden", "0", "8", *FEW, "--out", str(folder / "t.json"), "--plots", str(folder / "pictures")]
    assert transfer.main(argv) == 0
    return folder, json.loads((folder / "t.json").read_text())


def test_grid_has_every_cell_and_its_marks(grid, tiny_data, tiny_single):
    _, result = grid
    names = [prepare.Clips(d).name for d in (tiny_data, tiny_single)]
    found = {(c["source"], c["target"], c["probe"]) for c in result["cells"]}
    assert found == {(s, t, p) for s in ("A", "B", "untrained") for t in names for p in ("linear", "hidden 8")}
    marks = {(c["source"], c["target"]): c["mark"]["status"] for c in result["cells"]}
    assert marks["A", names[0]] == "same data" and marks["B", names[0]] == "?" and marks["untrained", names[0]] == ""
    n = int((prepare.Clips(tiny_single).split == 0).sum())
    assert marks["A", names[1]] == f"{n} training clips heard"  # the same recordings and split, other labels
    assert {frozenset(c["mark"]) for c in result["cells"]} == {frozenset(("status", "heard", "trained", "shared"))}
    shared = next(c["mark"]["shared"] for c in result["cells"] if (c["source"], c["target"]) == ("A", names[1]))
    assert shared == 24
    text = evaluate.table(result)
    assert "(same data)" in text and "(?)" in text and text.count("\n| ") == 1 + 1 + 6 and f"{names[1]} accuracy" in text


def test_cell_equals_evaluate(grid, tiny_single, tmp_path):
    folder, result = grid
    assert evaluate.main(["--ckpt", str(folder / "b.pt"), "--data", str(tiny_single), "--min-steps", "5", "--seeds", "1", "--bootstrap", "50",
                          "--out", str(tmp_path / "e.json"), "--export", str(tmp_path)]) == 0
    alone = json.loads((tmp_path / "e.json").read_text())["results"][0]
    cell = next(c for c in result["cells"] if (c["source"], c["target"], c["probe"]) == ("B", prepare.Clips(tiny_single).name, "linear"))
    assert cell["mean"] == alone["mean"] and cell["interval"] == alone["interval"] and cell["per_tag"] == alone["per_tag"]


def test_pictures(grid, tiny_data, tiny_single):
    folder, _ = grid
    multi, single = (prepare.Clips(d).name for d in (tiny_data, tiny_single))
    names = {"tags.png", "curves.png", "tsne.png", "filters.png"}
    assert {p.name for p in (folder / "pictures" / f"A-{multi}").iterdir()} == names
    assert {p.name for p in (folder / "pictures" / f"B-{single}").iterdir()} == names | {"confusion.png"}
    assert (folder / "t-linear.png").is_file() and (folder / "t-hidden-8.png").is_file()
    assert all(p.stat().st_size > 3000 for p in (folder / "pictures").rglob("*.png"))


def test_pictures_of_results(run, tmp_path, tiny_data):
    done = run(["evaluate.py", "--random", "--data", tiny_data, "--width", "0.0625", "--fraction", "0.5", "1", *FEW, "--out", tmp_path / "r.json"])
    assert done.returncode == 0, done.stderr
    done = run(["transfer.py", "--results", tmp_path / "r.json", "--plots", tmp_path / "p"])
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "p" / "r").iterdir()} == {"tags.png", "fractions.png"}
    result = json.loads((tmp_path / "r.json").read_text())
    for row in result["results"]:  # as of one test clip
        row["mean"] = row["std"] = dict.fromkeys(row["mean"])
    for run_of in ("a", "b"):
        (tmp_path / run_of).mkdir()
        (tmp_path / run_of / "r.json").write_text(json.dumps(result))
    files = [str(tmp_path / run_of / "r.json") for run_of in ("a", "b")]
    assert transfer.main(["--results", *files, "--plots", str(tmp_path / "q")]) == 0
    assert sorted(p.name for p in (tmp_path / "q").iterdir()) == ["a-r", "b-r"]


def test_first_layer_filters_are_sorted_by_centre_frequency():
    class Axes:
        def imshow(self, image, **_):
            self.image = image

        def set(self, **_):
            pass
    t, axes = np.arange(64), Axes()
    transfer.filters(axes, np.stack([np.sin(2 * np.pi * f * t) for f in (0.3, 0.05, 0.15)])[:, None], 22050)
    assert axes.image.argmax(0) / 512 == pytest.approx([0.05, 0.15, 0.3], abs=0.005)


@pytest.mark.parametrize("flags,code,says", [
    ([], 2, "type --ckpt NAME=FILE"), (["--ckpt", "A=nowhere.pt", "--data", "x"], 2, "nowhere.pt: no such file"),
    (["--random", "--data", "never-prepared"], 2, "prepare.py"), (["--results", __file__], 2, "--plots"),
    (["--ckpt", f"A={__file__}", f"A={__file__}", "--data", "x"], 2, "one name"), (["--random", "--data", "x", "--fraction", "2"], 2, "(0, 1]"),
    (["--random", "--data", "x", "--hidden", "4", "--probe", "lbfgs"], 2, "linear probe"), (["--random", "--data", "x", "--out", "."], 2, "folder"),
    (["--results", __file__, "--plots", "p"], 1, "transfer.py: error")])
def test_bad_commands_get_one_line(flags, code, says, capsys):
    try:
        got = transfer.main(flags)
    except SystemExit as stop:
        got = stop.code
    lines = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith("usage:")]
    assert got == code and len(lines) == 1 and says in lines[0], lines


def test_checkpoint_of_another_format(capsys, tiny_data):
    assert transfer.main(["--ckpt", f"A={__file__}", "--data", str(tiny_data)]) == 1
    assert "cannot be read as a checkpoint" in capsys.readouterr().err


def test_every_kind_of_encoder_has_its_own_control(tiny_data, tiny_single, tmp_path):
    for name, width in (("samplecnn", 1 / 16), ("cpc", 1 / 64)):
        model.save_encoder(tmp_path / f"{name}.pt", model.build_encoder(name, width=width), sample_rate=22050, method="clmr", step=1)
    argv = ["--ckpt", f"A={tmp_path / 'samplecnn.pt'}", f"B={tmp_path / 'cpc.pt'}", "--data", str(tiny_data), str(tiny_single), "--random", *FEW]
    assert transfer.main([*argv, "--out", str(tmp_path / "t.json")]) == 0
    cells = json.loads((tmp_path / "t.json").read_text())["cells"]
    assert len(cells) == 8 and {(c["source"], c["encoder"]["encoder"]) for c in cells} == {
        ("A", "samplecnn"), ("B", "cpc"), ("untrained samplecnn, width 0.0625", "samplecnn"), ("untrained cpc, width 0.015625", "cpc")}
    model.save_encoder(tmp_path / "other.pt", model.build_encoder("samplecnn", width=1 / 16), sample_rate=44100, method="clmr", step=1)
    assert transfer.main(["--ckpt", f"A={tmp_path / 'samplecnn.pt'}", f"C={tmp_path / 'other.pt'}", "--data", str(tiny_data), *FEW,
                          "--out", str(tmp_path / "never.json")]) == 1 and not (tmp_path / "never.json").exists()


def test_data_that_cannot_be_tested_on_is_refused_before_the_first_cell(tiny_data, tmp_path, capsys, monkeypatch):
    Clips, find = prepare.Clips, prepare.find
    other = Clips(tiny_data)
    other.name, other.split = "no test clips", np.zeros_like(other.split)
    monkeypatch.setattr(prepare, "Clips", lambda folder: other if folder == "other" else Clips(folder))
    monkeypatch.setattr(prepare, "find", lambda name: name if name == "other" else find(name))
    monkeypatch.setattr(evaluate, "run", lambda *args: pytest.fail("the first cell was begun"))
    assert transfer.main(["--random", "--data", str(tiny_data), "other", *FEW, "--out", str(tmp_path / "t.json")]) == 1
    assert "no usable clip in valid" in capsys.readouterr().err
