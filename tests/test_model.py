"""model.py: the paper's networks by an independent implementation, its files, and the exports in
a process of their own."""

import argparse
import copy
import json
import math
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import model


def trained(encoder, seed=0):
    """Batch statistics, scales and biases as after some training, so that nothing passes for
    being at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in encoder.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.weight.copy_(torch.rand(m.weight.shape, generator=generator) + 0.5)
                m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * 0.1)
                m.running_mean.copy_(torch.randn(m.bias.shape, generator=generator) * 0.1)
                m.running_var.copy_(torch.rand(m.bias.shape, generator=generator) + 0.5)
            elif isinstance(m, (nn.Conv1d, nn.Conv2d)):
                m.bias.copy_(torch.randn(m.bias.shape, generator=generator) * 0.1)
    return encoder.eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_the_papers():
    encoder = model.build_encoder("samplecnn")
    assert count(encoder) == 2_368_512
    assert count(encoder) + count(nn.Linear(512, 50)) == 2_394_162
    assert count(encoder) + count(model.Projector()) == 2_696_192
    assert count(model.build_encoder("samplecnn-large")) == 7_289_088
    cpc = model.build_encoder("cpc")
    assert count(cpc) + count(nn.Linear(256, 20 * 512, bias=False)) == 8_988_672
    assert encoder.input_samples == cpc.input_samples == 3**10
    assert (encoder.out_dim, cpc.out_dim, model.build_encoder("cpc", pool="mean+last").out_dim) == (
        512,
        256,
        512,
    )


def test_convolutions_start_with_he_initialisation():
    torch.manual_seed(0)
    for conv in (m for m in model.SampleCNN().modules() if isinstance(m, nn.Conv2d)):
        want = math.sqrt(2 / (conv.in_channels * 3))
        assert conv.weight.std().item() == pytest.approx(want, rel=0.15)
        assert not conv.bias.any()


class Released(nn.Module):
    """The released network written plainly, one dimension, one window in and one row out."""

    def __init__(self, names="sequential"):
        super().__init__()
        sizes = [1, 128, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512]
        blocks = [
            nn.Sequential(
                nn.Conv1d(i, o, 3, stride=3 if n == 0 else 1, padding=0 if n == 0 else 1),
                nn.BatchNorm1d(o),
                nn.ReLU(),
                *([nn.MaxPool1d(3, 3)] if 0 < n < 10 else []),
            )
            for n, (i, o) in enumerate(zip(sizes, sizes[1:]))
        ]
        self.names = names
        if names == "sequential":
            self.sequential = nn.Sequential(*blocks)
        else:
            for n, block in enumerate(blocks):
                setattr(self, f"conv{n + 1}", block)
        self.fc = nn.Linear(512, 50)

    def forward(self, x):
        for block in (
            self.sequential
            if self.names == "sequential"
            else [getattr(self, f"conv{n}") for n in range(1, 12)]
        ):
            x = block(x)
        return x.flatten(1)


class Callback:  # a class that a reader of the file does not have
    pass


@pytest.mark.parametrize("form", ["lightning", "flat", "oldest"])
def test_checkpoints_of_the_authors_load_and_give_their_outputs(tmp_path, form):
    torch.manual_seed(1)
    theirs = trained(Released("conv" if form == "oldest" else "sequential"))
    state = OrderedDict(("encoder." + k, v) for k, v in theirs.state_dict().items())
    state["projector.0.weight"], state["projector.2.weight"] = (
        torch.zeros(512, 512),
        torch.zeros(64, 512),
    )
    path = tmp_path / "clmr_checkpoint_10000.pt"
    if form == "lightning":
        torch.save(
            {
                "pytorch-lightning_version": "1.0",
                "global_step": 7,
                "state_dict": OrderedDict(("model." + k, v) for k, v in state.items()),
                "hyper_parameters": argparse.Namespace(batch_size=48),
                "callbacks": {"x": Callback()},
            },
            path,
        )
    else:
        torch.save(state, path)
    encoder, info = model.load_encoder(path)
    audio = torch.rand(2, 1, 59049) * 2 - 1
    with torch.no_grad():
        want, got = theirs(audio), encoder(audio)
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * want.abs().max())
    assert want.abs().max() > 0.1 and info["step"] == (7 if form == "lightning" else 0)


def test_folding_the_batch_norm_changes_nothing():
    torch.manual_seed(0)
    encoder = trained(model.SampleCNN(width=0.25))
    before = model.weights_sha256(encoder)
    folded = model.fold_batch_norm(encoder)
    audio = torch.rand(3, 1, 59049) * 2 - 1
    with torch.no_grad():
        want, got = encoder(audio), folded(audio)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6 * want.abs().max())
    assert model.weights_sha256(encoder) == before != model.weights_sha256(folded)


@pytest.mark.parametrize("name", ["samplecnn", "samplecnn-large", "cpc"])
def test_the_encoder_file_gives_the_same_encoder(tmp_path, name):
    encoder = trained(model.build_encoder(name, width=0.125))
    model.save_encoder(tmp_path / "encoder.pt", encoder, sample_rate=16000, method="clmr", step=3)
    again, info = model.load_encoder(tmp_path / "encoder.pt")
    assert model.weights_sha256(again) == model.weights_sha256(encoder)
    assert (info["sample_rate"], info["step"], info["encoder"], info["sizes"]) == (
        16000,
        3,
        name,
        encoder.sizes,
    )
    assert set(torch.load(tmp_path / "encoder.pt", weights_only=True)) >= {
        "format",
        "state",
        "encoder",
        "sizes",
        "input_samples",
    }


def test_an_encoder_saved_in_half_precision_is_read_in_full(tmp_path):
    torch.manual_seed(0)
    encoder = model.MelCNN(width=0.5).eval()
    x = torch.randn(2, 1, 59049)
    want = encoder(x)
    sizes = {}
    for name, saved in {"full": encoder, "half": copy.deepcopy(encoder).half()}.items():
        model.save_encoder(tmp_path / name, saved, sample_rate=22050, method="clmr", step=0)
        sizes[name] = (tmp_path / name).stat().st_size
    loaded, _ = model.load_encoder(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.allclose(loaded(x), want, rtol=1e-2, atol=0.01 * float(want.abs().max()))
    assert sizes["half"] < 0.6 * sizes["full"]


@pytest.mark.parametrize("changed", [
    lambda encoder: encoder.bfloat16(), lambda encoder: encoder.double(), torch.compile,
    torch.nn.DataParallel], ids=["bfloat16", "float64", "compiled", "wrapped"])
def test_an_encoder_in_any_precision_or_wrapping_is_read_again(tmp_path, changed):
    model.save_encoder(tmp_path / "encoder.pt", changed(model.SampleCNN(width=1 / 16)),
                       sample_rate=22050, method="clmr", step=0)
    loaded, _ = model.load_encoder(tmp_path / "encoder.pt")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["Musik\u00a0Sammlung", "\u3000", "a\u200db", "caf\udce9"])
def test_a_name_in_any_letters_is_no_damage(tmp_path, name):
    path = tmp_path / "encoder.pt"
    model.save_encoder(path, model.SampleCNN(width=1 / 16), sample_rate=22050, method="clmr",
                       step=0, data=name)
    assert model.load_encoder(path)[1]["data"] == name


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\u202eb", "a\nb", "a\u2066b"])
def test_a_name_that_would_steer_the_terminal_is_refused(tmp_path, name):
    path = tmp_path / "encoder.pt"
    model.save_encoder(path, model.SampleCNN(width=1 / 16), sample_rate=22050, method="clmr",
                       step=0, data=name)
    with pytest.raises(ValueError, match="control characters"):
        model.load_encoder(path)


def test_the_encoder_refuses_what_it_would_misread():
    encoder = model.SampleCNN(width=0.0625).eval()
    for shape in [(1, 1, 59048), (1, 2, 59049), (1, 59049)]:
        with pytest.raises(ValueError, match="59049"):
            encoder(torch.zeros(shape))
    with pytest.raises(ValueError, match="samplecnn"):
        model.build_encoder("resnet")


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a zip"])
def test_bad_files_are_named(tmp_path, run, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="x.pt"):
        model.load_encoder(path)
    done = run(["model.py", "--ckpt", path])
    assert (
        done.returncode == 1
        and "Traceback" not in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
    )


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.pt"):
        model.load_encoder(tmp_path / "nothing.pt")
    torch.save({"format": "clmr-checkpoint-1", "step": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="encoder.pt"):
        model.load_encoder(tmp_path / "checkpoint.pt")
    state = model.SampleCNN(width=0.0625).state_dict()
    state.pop("blocks.3.0.weight")
    torch.save(
        {
            "format": model.FORMAT,
            "encoder": "samplecnn",
            "sizes": {"width": 0.0625},
            "state": state,
        },
        tmp_path / "short.pt",
    )
    with pytest.raises(ValueError, match="blocks.3.0.weight"):
        model.load_encoder(tmp_path / "short.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    model.write_atomically(path, b"old")
    monkeypatch.setattr(model.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError):
        model.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


ALONE = """
import json, sys, torch
assert not any(p in sys.modules for p in ("model", "numpy.f2py"))
m = torch.jit.load("tagger.ts")
e = torch.jit.load("encoder.ts")
extra = {"sidecar.json": ""}
torch.jit.load("tagger.ts", _extra_files=extra)
audio = torch.load("audio.pt")
inside = json.loads(extra["sidecar.json"])["tags"]
print(json.dumps({"tags": m.tags, "rate": e.sample_rate, "n": e.input_samples, "inside": inside}))
window = torch.export.load("encoder.pt2").module()(audio[:, :, :59049])
torch.save([e(audio), m(audio), e.frames(audio, 20000), window], "out.pt")
try:
    e(audio[:, :, :100])
except Exception as error:
    print("refused" if "59049" in str(error) else error)
"""


def test_the_exports_work_without_this_project(tmp_path):
    torch.manual_seed(0)
    encoder, head, tags = (
        trained(model.SampleCNN(width=0.125)),
        nn.Linear(64, 3),
        ["choral", "häßlich", "guitar"],
    )
    model.export_torchscript(encoder, tmp_path / "encoder.ts", 22050)
    sidecar = model.export_torchscript(
        encoder, tmp_path / "tagger.ts", 22050, head, tags, "multilabel"
    )
    model.export_program(encoder, tmp_path / "encoder.pt2", 22050)
    own = [
        json.loads((tmp_path / f"encoder.{kind}.json").read_text())["sha256"]
        for kind in ("ts", "pt2")
    ]
    assert own == 2 * [model.weights_sha256(encoder)] != 2 * [sidecar["sha256"]]
    for wrong in ((), (tags, "none"), (tags[:2], "multilabel")):
        with pytest.raises(ValueError, match="a head of 3 outputs needs as many tags"):
            model.export_torchscript(encoder, tmp_path / "never.ts", 22050, head, *wrong)
    assert (
        sidecar["max_difference"] < 1e-4
        and json.loads((tmp_path / "tagger.ts.json").read_text())["tags"] == tags
    )
    audio = torch.rand(2, 1, 2 * 59049 + 5000) * 2 - 1
    torch.save(audio, tmp_path / "audio.pt")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()[0], done.stdout.strip().splitlines()[-1]
    assert (
        json.loads(first) == {"tags": tags, "rate": 22050, "n": 59049, "inside": tags}
        and last == "refused"
    )
    h, p, frames, one = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        rows = torch.stack([encoder(audio[:, :, i * 59049 : (i + 1) * 59049]) for i in range(2)], 1)
        hops = torch.stack(
            [encoder(audio[:, :, i * 20000 : i * 20000 + 59049]) for i in range(frames.shape[1])], 1
        )
        close = lambda a, b: torch.allclose(a, b, rtol=1e-4, atol=1e-5 * b.abs().max())
        assert frames.shape[1] == (audio.shape[2] - 59049) // 20000 + 1
        assert (
            close(h, rows.mean(1))
            and close(p, torch.sigmoid(head(rows)).mean(1))
            and close(frames, hops)
            and close(one, rows[:, 0])
        )


def test_cpc_frames_see_only_their_past():
    """A context must not depend on later audio, or predicting it would be no task."""
    torch.manual_seed(0)
    encoder = model.CPC(width=0.125).eval()
    audio = torch.rand(1, 1, 59049)
    changed = audio.clone()
    changed[..., 30000:] = 0
    with torch.no_grad():
        (z, c), (_, c2) = encoder.context(audio), encoder.context(changed)
    assert z.shape == (1, 124, 64)
    first = int((c != c2).any(2)[0].nonzero()[0])
    assert 58 <= first <= 64 and torch.equal(c[:, :first], c2[:, :first])
    assert torch.allclose(encoder(audio), c.mean(1))


def test_the_command_prints_the_table(run):
    done = run(["model.py", "--encoder", "samplecnn"])
    assert (
        done.returncode == 0
        and "2,368,512 parameters" in done.stdout
        and len(done.stdout.splitlines()) == 44 - 1
    )
    assert run(["model.py", "--out", "x"]).returncode == 2
    missing = run(["model.py", "--ckpt", "nowhere/encoder.pt"])
    assert (
        missing.returncode == 2
        and "nowhere/encoder.pt: no such file" in missing.stderr
        and "Traceback" not in missing.stderr
    )


ALONE_TRAINS = """
import torch, warnings
import model
torch.manual_seed(0)
encoder = model.build_encoder("samplecnn", width=0.0625).train()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        encoder(torch.rand(2, 1, 59049)).square().sum().backward()
    model.save_encoder("encoder.pt", encoder, sample_rate=22050, method="clmr", step=2)
    again, info = model.load_encoder("encoder.pt")
assert model.weights_sha256(again) == model.weights_sha256(encoder) and info["step"] == 2
assert encoder.blocks[0][1].num_batches_tracked == 2
print(*[warning.message for warning in said], sep="; ")
try:
    model.choose_device("cpu")
except ImportError as error:
    print(error)
"""


def test_model_copied_alone_trains_saves_and_loads_and_says_once_what_it_misses(tmp_path):
    (tmp_path / "model.py").write_bytes(Path(model.__file__).read_bytes())
    command = [sys.executable, "-c", ALONE_TRAINS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, needs = done.stdout.splitlines()
    kernels, formats = said.split("; ")
    assert kernels.startswith("there is no kernels/ beside model.py")
    assert formats.startswith("there is no formats/ beside model.py")
    assert needs == "this needs formats/machine.py: put formats/ beside model.py"
