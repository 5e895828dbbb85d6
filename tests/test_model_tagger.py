"""model.py's Levels, tagger.pt, and what the command makes of them; ONNX, where installed."""

import importlib.util
import json
import sys

import pytest
import torch
from torch import nn

import model
from formats import exports
from test_model import trained

TAGS = ["choral", "häßlich", "guitar"]
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="ONNX's packages are optional",
)


def noise(batch, samples=59049):
    return torch.rand(batch, 1, samples, generator=torch.Generator().manual_seed(1)) * 2 - 1


def small(name="samplecnn"):
    torch.manual_seed(0)
    return trained(model.build_encoder(name, width=0.0625))


def head_of(encoder, hidden=0):
    if not hidden:
        return nn.Sequential(nn.Linear(encoder.out_dim, 3))
    return nn.Sequential(nn.Linear(encoder.out_dim, hidden), nn.ReLU(), nn.Linear(hidden, 3))


@torch.no_grad()
def test_levels_are_every_blocks_mean_and_maximum():
    encoder = small()
    levels = model.Levels(encoder).eval()
    x = noise(2)
    want = []
    y = x.unsqueeze(2)
    for block in encoder.blocks:
        y = block(y)
        want += [y.mean((2, 3)), y.amax((2, 3))]
    assert torch.equal(levels(x), torch.cat(want, 1))
    assert levels(x).shape == (2, levels.out_dim)


@torch.no_grad()
def test_levels_of_a_folded_encoder_are_the_same():
    encoder = small()
    x = noise(2)
    want = model.Levels(encoder).eval()(x)
    of_folded = model.Levels(model.fold_batch_norm(encoder))(x)
    folded_levels = model.fold_batch_norm(model.Levels(encoder))(x)
    assert torch.allclose(of_folded, want, rtol=1e-4, atol=1e-5)
    assert torch.allclose(folded_levels, want, rtol=1e-4, atol=1e-5)


def test_an_encoder_without_blocks_has_no_levels():
    with pytest.raises(ValueError, match="cpc has no blocks"):
        model.Levels(model.CPC(width=0.0625))


@torch.no_grad()
@pytest.mark.parametrize(
    "levels, hidden, task", [(False, 0, "multilabel"), (True, 8, "singlelabel")]
)
def test_the_tagger_file_gives_the_same_probabilities(tmp_path, levels, hidden, task):
    encoder = model.Levels(small()).eval() if levels else small()
    head = head_of(encoder, hidden)
    path = tmp_path / "tagger.pt"
    model.save_tagger(path, encoder, head, TAGS, task, 22050, data="demo", calibrated=True)
    tagger, info = model.load_tagger(path)
    x = noise(2, 2 * 59049 + 1)
    logits = torch.stack([head(encoder(x[:, :, i : i + 59049])) for i in (0, 59049)])
    want = logits.sigmoid() if task == "multilabel" else logits.softmax(-1)
    assert torch.allclose(tagger(x), want.mean(0), rtol=1e-5, atol=1e-6)
    assert (tagger.tags, tagger.sample_rate, tagger.input_samples) == (TAGS, 22050, 59049)
    assert (info["data"], info["calibrated"], info["task"]) == ("demo", True, task)


def test_the_tagger_file_holds_weights_alone(tmp_path):
    encoder = small()
    model.save_tagger(tmp_path / "tagger.pt", encoder, head_of(encoder), TAGS, "multilabel", 22050)
    content = torch.load(tmp_path / "tagger.pt", weights_only=True)
    assert {"format", "encoder", "sizes", "state", "head", "tags", "task"} <= set(content)


def test_a_tagger_that_is_none_is_named(tmp_path):
    encoder = small()
    model.save_encoder(tmp_path / "encoder.pt", encoder, sample_rate=22050, method="clmr", step=0)
    with pytest.raises(ValueError, match="encoder.pt: no tagger.*give a tagger.pt"):
        model.load_tagger(tmp_path / "encoder.pt")


NOT_A_NUMBER = torch.full((3, 32), float("nan"))
HELD_ONCE = torch.zeros(1).expand(3)


@pytest.mark.parametrize("change, message", [
    ({"tags": TAGS[:2]}, "needs as many tags"),
    ({"tags": ["a", "\x1b[2J", "c"]}, "control characters"),
    ({"task": "regression"}, "the task multilabel or singlelabel"),
    ({"head": [{"weight": NOT_A_NUMBER, "bias": torch.zeros(3)}]}, "not all numbers"),
    ({"head": [{"weight": torch.zeros(3, 7), "bias": torch.zeros(3)}]}, "gives 32"),
    ({"head": [{"weight": torch.zeros(3, 32), "bias": HELD_ONCE}]}, "not all numbers"),
    ({"head": []}, "no layer"),
    ({"head": 5}, "head is no list"),
    ({"sample_rate": None}, "no sample rate"),
])  # fmt: skip
def test_a_tagger_that_does_not_fit_is_refused(tmp_path, change, message):
    encoder = small()
    model.save_tagger(tmp_path / "whole.pt", encoder, head_of(encoder), TAGS, "multilabel", 22050)
    content = torch.load(tmp_path / "whole.pt", weights_only=True)
    torch.save({**content, **change}, tmp_path / "tagger.pt")
    with pytest.raises(ValueError, match=message):
        model.load_tagger(tmp_path / "tagger.pt")


def test_the_command_exports_a_tagger(tmp_path, capsys):
    encoder = model.Levels(small())
    path = tmp_path / "tagger.pt"
    model.save_tagger(path, encoder, head_of(encoder), TAGS, "multilabel", 22050)
    assert model.main(["--ckpt", str(path), "--out", str(tmp_path)]) == 0
    assert "tagger.ts: largest difference to eager" in capsys.readouterr().out
    tagger = torch.jit.load(tmp_path / "tagger.ts")
    assert tagger.tags == TAGS
    assert (
        json.loads((tmp_path / "tagger.ts.json").read_text(encoding="utf-8"))["encoder"]
        == "samplecnn levels"
    )
    x = noise(1)
    assert torch.allclose(tagger(x), model.load_tagger(path)[0](x), rtol=1e-4, atol=1e-5)


def test_the_command_asks_for_a_folder_with_onnx(run):
    done = run(["model.py", "--onnx"])
    assert done.returncode == 2 and "--out" in done.stderr


@needs_onnx
@pytest.mark.parametrize("levels", [False, True])
def test_onnx_is_compared_with_eager_at_two_batch_sizes(tmp_path, levels):
    import onnxruntime

    encoder = model.Levels(small()).eval() if levels else small()
    head = head_of(encoder) if levels else None
    parts = (head, TAGS, "multilabel") if levels else ()
    sidecar = model.export_onnx(encoder, tmp_path / "x.onnx", 22050, *parts)
    assert sidecar["max_difference"] < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    inside = session.get_modelmeta().custom_metadata_map["sidecar"]
    assert json.loads(inside)["sha256"] == sidecar["sha256"]
    for batch in (1, 5):
        got = torch.from_numpy(session.run(None, {"audio": noise(batch).numpy()})[0])
        with torch.no_grad():
            want = encoder(noise(batch))
            want = head(want).sigmoid() if levels else want
        assert torch.allclose(got, want, rtol=1e-3, atol=1e-4 * want.abs().max())


@needs_onnx
def test_onnx_of_cpc(tmp_path):
    assert model.export_onnx(small("cpc"), tmp_path / "x.onnx", 22050)["max_difference"] < 1e-4


def test_without_the_packages_onnx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(exports.ExportError, match="pip install onnxscript"):
        model.export_onnx(small(), tmp_path / "x.onnx", 22050)


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch):
    fold = exports.fold_batch_norm

    def broken(module):
        folded = fold(module)
        with torch.no_grad():
            folded.encoder.blocks[0][0].weight.mul_(2)
        return folded

    monkeypatch.setattr(exports, "fold_batch_norm", broken)
    with pytest.raises(ValueError, match="differs from the eager encoder"):
        model.export_torchscript(small(), tmp_path / "x.ts", 22050)
