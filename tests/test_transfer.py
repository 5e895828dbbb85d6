"""transfer.py: the grid equals evaluate.py's numbers, marks what was heard in pre-training, and
draws every picture."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import model
import prepare
import transfer
from results import tables

torch.set_num_threads(1)
FEW = ["--min-steps", "5", "--seeds", "1"]
WIDTH = 1 / 16


class Data(SimpleNamespace):
    """Prepared data of which only the samples' digests, the splits and the fingerprint matter."""

    def __init__(self, digests, split, fingerprint="f"):
        sha256 = np.repeat(np.array(digests, np.uint8)[:, None], 32, 1)
        super().__init__(sha256=sha256, split=np.array(split), fingerprint=fingerprint)

    def __len__(self):
        return len(self.split)


def save_encoder(path, seed=1, **how):
    torch.manual_seed(seed)
    encoder = model.build_encoder(how.pop("encoder", "samplecnn"), width=how.pop("width", WIDTH))
    model.save_encoder(path, encoder, **{"sample_rate": 22050, "method": "clmr", "step": 1, **how})
    return path


# -------------------------------------------------------------------------------------- overlap

def test_overlap_counts_heard_test_clips():
    source = Data([1, 2, 3, 4], [0, 0, 1, 2])
    target = Data([2, 3, 4, 9, 1], [2, 2, 2, 2, 0])
    # 2 was heard, 1 is a training clip of both; 3 and 4 are shared, but were not trained on
    assert transfer.overlap(source, target) == (1, 1, 4)


@pytest.fixture
def target():
    return Data([2, 3, 4, 9, 1], [2, 2, 2, 2, 0], "target")


def load(name):
    source = Data([1, 2, 3, 4], [0, 0, 1, 2], "source")
    return {"s": source, ("s", "s"): source}[name]


def test_a_source_of_the_same_data_is_marked(target):
    info = {"fingerprint": "target", "data": "t"}
    assert transfer.mark(info, target, load)["status"] == "same data"


def test_test_clips_that_were_heard_are_counted(target):
    info = {"fingerprint": "source", "data": "s"}
    assert transfer.mark(info, target, load) == {
        "status": "1 test clips heard", "heard": 1, "trained": 1, "shared": 4}


@pytest.mark.parametrize("where", [
    {"data": "s"}, {"data": "gone", "data_folder": "s"}, {"data": "gone", "data_folder": "s s"}],
    ids=["by its name", "in its folder", "in its folders"])
def test_training_clips_that_were_heard_are_counted(target, where):
    target.split[:2] = 0
    info = {"fingerprint": "source", **where}
    assert transfer.mark(info, target, load)["status"] == "2 training clips heard"


@pytest.mark.parametrize("info", [
    {"fingerprint": "source", "data": "gone"},
    {"fingerprint": "older", "data": "s"},  # prepared again since
    {"data": None},
])
def test_a_source_whose_data_are_not_there_is_unknown(target, info):
    assert transfer.mark(info, target, load)["status"] == "?"


# ----------------------------------------------------------------------------------------- the grid

@pytest.fixture(scope="module")
def grid(tmp_path_factory, tiny_data, tiny_single):
    """Two encoders and the control on two data sets: the folder, the JSON, the data's names."""
    folder = tmp_path_factory.mktemp("grid")
    save_encoder(folder / "a.pt", data=str(tiny_data),
                 fingerprint=prepare.Clips(tiny_data).fingerprint)
    save_encoder(folder / "b.pt", seed=2, step=2)
    argv = ["--ckpt", f"A={folder / 'a.pt'}", f"B={folder / 'b.pt'}", "--data", str(tiny_data),
            str(tiny_single), "--random", "--hidden", "0", "8", *FEW,
            "--out", str(folder / "t.json"), "--plots", str(folder / "pictures")]
    assert transfer.main(argv) == 0
    names = [prepare.Clips(data).name for data in (tiny_data, tiny_single)]
    return folder, json.loads((folder / "t.json").read_text()), names


def test_the_grid_has_every_cell(grid):
    _, result, names = grid
    found = {(c["source"], c["target"], c["probe"]) for c in result["cells"]}
    assert found == {(source, target, probe) for source in ("A", "B", "untrained")
                     for target in names for probe in ("linear", "hidden 8")}


def test_the_grid_marks_its_cells(grid, tiny_single):
    _, result, (multi, single) = grid
    marks = {(c["source"], c["target"]): c["mark"]["status"] for c in result["cells"]}
    assert marks["A", multi] == "same data"
    assert marks["B", multi] == "?"
    assert marks["untrained", multi] == ""
    # the same recordings and split, other labels
    n = int((prepare.Clips(tiny_single).split == 0).sum())
    assert marks["A", single] == f"{n} training clips heard"


def test_a_mark_counts_the_clips_that_are_shared(grid):
    _, result, (_, single) = grid
    cell = next(c for c in result["cells"] if (c["source"], c["target"]) == ("A", single))
    assert cell["mark"]["shared"] == 24
    assert set(cell["mark"]) == {"status", "heard", "trained", "shared"}


def test_the_table_has_a_row_for_each_source_and_probe(grid):
    _, result, (_, single) = grid
    text = tables.table(result)
    assert text.count("\n| ") == 1 + 1 + 6
    assert f"{single} accuracy" in text
    assert "(same data)" in text
    assert "(?)" in text


def test_a_cell_equals_evaluate(grid, tiny_single, tmp_path):
    folder, result, (_, single) = grid
    argv = ["--ckpt", str(folder / "b.pt"), "--data", str(tiny_single), *FEW,
            "--out", str(tmp_path / "e.json"), "--export", str(tmp_path)]
    assert evaluate.main(argv) == 0
    alone = json.loads((tmp_path / "e.json").read_text())["results"][0]
    cell = next(c for c in result["cells"]
                if (c["source"], c["target"], c["probe"]) == ("B", single, "linear"))
    for key in ("mean", "interval", "per_tag"):
        assert cell[key] == alone[key]


def test_every_kind_of_encoder_has_its_own_control(tiny_data, tiny_single, tmp_path):
    save_encoder(tmp_path / "a.pt")
    save_encoder(tmp_path / "b.pt", encoder="cpc", width=1 / 64)
    argv = ["--ckpt", f"A={tmp_path / 'a.pt'}", f"B={tmp_path / 'b.pt'}", "--data",
            str(tiny_data), str(tiny_single), "--random", *FEW, "--out", str(tmp_path / "t.json")]
    assert transfer.main(argv) == 0
    cells = json.loads((tmp_path / "t.json").read_text())["cells"]
    assert len(cells) == 8
    assert {(c["source"], c["encoder"]["encoder"]) for c in cells} == {
        ("A", "samplecnn"), ("B", "cpc"), ("untrained samplecnn, width 0.0625", "samplecnn"),
        ("untrained cpc, width 0.015625", "cpc")}


def test_controls_of_one_width_but_other_sizes_have_rows_of_their_own(tmp_path):
    for branches in (1, 2):
        path = tmp_path / f"{branches}.pt"
        encoder = model.MelCNN(1 / 8, branches=branches)
        model.save_encoder(path, encoder, sample_rate=22050, method="clmr", step=1)
    named = {str(n): tmp_path / f"{n}.pt" for n in (1, 2)}
    names = [name for name, *_ in transfer.read_sources(named, random=True)]
    assert len(set(names)) == 4 and "branches 2" in names[3]


def test_a_network_without_blocks_is_refused_before_the_first_cell(tiny_data, tmp_path, capsys):
    save_encoder(tmp_path / "a.pt")
    save_encoder(tmp_path / "b.pt", encoder="cpc", width=1 / 64)
    argv = ["--ckpt", f"A={tmp_path / 'a.pt'}", f"B={tmp_path / 'b.pt'}", "--features", "levels",
            "--data", str(tiny_data), *FEW, "--out", str(tmp_path / "t.json")]
    assert transfer.main(argv) == 1
    told = capsys.readouterr().err
    assert "no blocks" in told and "hidden units" not in told


def test_levels_a_probe_of_clips_and_neighbours_in_the_grid(tiny_data, tmp_path):
    save_encoder(tmp_path / "a.pt")
    argv = ["--ckpt", f"A={tmp_path / 'a.pt'}", "--data", str(tiny_data), "--random", "--probe",
            "logistic", "--features", "levels", "--neighbours", "3", *FEW,
            "--out", str(tmp_path / "t.json")]
    assert transfer.main(argv) == 0
    rows = json.loads((tmp_path / "t.json").read_text())["table"]
    assert [row["probe"] for row in rows] == ["logistic on levels"] * 2
    assert f"{prepare.Clips(tiny_data).name} labels@3" in rows[0]


# ----------------------------------------------------------------------------------------- pictures

def test_every_cell_of_an_encoder_has_its_pictures(grid):
    folder, _, (multi, single) = grid
    names = {"tags.png", "curves.png", "tsne.png", "filters.png"}
    pictures = folder / "pictures"
    assert {path.name for path in (pictures / f"A-{multi}").iterdir()} == names
    names |= {"confusion.png"}
    assert {path.name for path in (pictures / f"B-{single}").iterdir()} == names
    assert all(path.stat().st_size > 3000 for path in pictures.rglob("*.png"))


@pytest.mark.parametrize("probe", ["linear", "hidden-8"])
def test_every_probe_has_a_heat_map(grid, probe):
    assert (grid[0] / f"t-{probe}.png").is_file()


@pytest.fixture(scope="module")
def result(run, tmp_path_factory, tiny_data):
    """The metrics JSON of an evaluation at two fractions."""
    path = tmp_path_factory.mktemp("result") / "r.json"
    done = run(["evaluate.py", "--random", "--data", tiny_data, "--width", "0.0625",
                "--fraction", "0.5", "1", *FEW, "--out", path])
    assert done.returncode == 0, done.stderr
    return path


def test_pictures_of_a_result(run, result, tmp_path):
    done = run(["transfer.py", "--results", result, "--plots", tmp_path])
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "r").iterdir()} == {"tags.png", "fractions.png"}


def test_results_of_one_name_have_folders_of_their_own(result, tmp_path):
    content = json.loads(result.read_text())
    for row in content["results"]:  # as of one test clip
        row["mean"] = row["std"] = dict.fromkeys(row["mean"])
    files = [tmp_path / folder / "r.json" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps(content))
    argv = ["--results", *map(str, files), "--plots", str(tmp_path / "q")]
    assert transfer.main(argv) == 0
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["a-r", "b-r"]


def test_first_layer_filters_are_sorted_by_centre_frequency():
    class Axes:
        def imshow(self, image, **_):
            self.image = image

        def set(self, **_):
            pass
    t = np.arange(64)
    axes = Axes()
    weights = np.stack([np.sin(2 * np.pi * f * t) for f in (0.3, 0.05, 0.15)])[:, None]
    transfer.filters(axes, weights, 22050)
    assert axes.image.argmax(0) / 512 == pytest.approx([0.05, 0.15, 0.3], abs=0.005)


# ------------------------------------------------------------------------------------- what it says

@pytest.mark.parametrize("flags, code, says", [
    ([], 2, "type --ckpt NAME=FILE"),
    (["--ckpt", "A=nowhere.pt", "--data", "x"], 2, "nowhere.pt: no such file"),
    (["--random", "--data", "never-prepared"], 2, "prepare.py"),
    (["--results", __file__], 2, "--plots"),
    (["--ckpt", f"A={__file__}", f"A={__file__}", "--data", "x"], 2, "one name"),
    (["--random", "--data", "x", "--fraction", "2"], 2, "(0, 1]"),
    (["--random", "--data", "x", "--hidden", "4", "--probe", "lbfgs"], 2, "--hidden"),
    (["--random", "--data", "x", "--out", "."], 2, "folder"),
    (["--random", "--data", "x", "--neighbours", "-1"], 2, "--neighbours"),
    (["--results", __file__, "--plots", "p"], 1, "transfer.py: error"),
])
def test_bad_commands_get_one_line(flags, code, says, capsys):
    try:
        got = transfer.main(flags)
    except SystemExit as stop:
        got = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if not line.startswith("usage:")]
    assert got == code
    assert len(lines) == 1
    assert says in lines[0]


def test_a_checkpoint_of_another_format_is_refused(capsys, tiny_data):
    assert transfer.main(["--ckpt", f"A={__file__}", "--data", str(tiny_data)]) == 1
    assert "cannot be read" in capsys.readouterr().err


@pytest.fixture
def no_cell(monkeypatch):
    monkeypatch.setattr(evaluate, "run", lambda *_: pytest.fail("the first cell was begun"))


def test_an_encoder_of_another_rate_is_refused_before_the_first_cell(
        tiny_data, tmp_path, no_cell):
    save_encoder(tmp_path / "a.pt")
    save_encoder(tmp_path / "c.pt", sample_rate=44100)
    argv = ["--ckpt", f"A={tmp_path / 'a.pt'}", f"C={tmp_path / 'c.pt'}", "--data",
            str(tiny_data), *FEW, "--out", str(tmp_path / "never.json")]
    assert transfer.main(argv) == 1
    assert not (tmp_path / "never.json").exists()


def test_data_without_test_clips_are_refused_before_the_first_cell(
        tiny_data, tmp_path, capsys, monkeypatch, no_cell):
    other = prepare.Clips(tiny_data)
    other.name = "no test clips"
    other.split = np.zeros_like(other.split)
    data = {str(tiny_data): prepare.Clips(tiny_data), "other": other}
    monkeypatch.setattr(transfer, "load_data", data.get)
    argv = ["--random", "--data", str(tiny_data), "other", *FEW, "--out", str(tmp_path / "t.json")]
    assert transfer.main(argv) == 1
    assert "no usable clip to validate on" in capsys.readouterr().err
