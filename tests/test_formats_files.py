"""formats/files.py: damaged files are found byte by byte, and what strangers send runs nothing,
changes nothing and takes no memory."""

import json
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import model
from formats import files

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An encoder file, as small as one can be."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("whole") / "encoder.pt"
    encoder = model.SampleCNN(width=0.0625)
    model.save_encoder(path, encoder, sample_rate=22050, method="clmr", step=3, data="demo")
    return path


def rewritten(source, target, change, compression=zipfile.ZIP_STORED):
    """A zip file whose parts went through change(name, bytes) -> bytes; its sums are right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def with_pickle(source, target, data):
    return rewritten(source, target, lambda name, old: data if name.endswith("/data.pkl") else old)


# ---------------------------------------------------------------------------------------- damage


def flipped(data, path, position):
    """Write the file with one bit changed."""
    data = bytearray(data)
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)
    return path


def same(one, other):
    """Are two contents of files equal, tensors bit by bit?"""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_any_flipped_bit_is_refused_or_changes_nothing(whole, tmp_path):
    """Of the zip's headers and tables, the pickle, the weights: one bit of every 50 bytes."""
    want = files.read(whole)
    data = whole.read_bytes()
    positions = range(0, 8 * len(data), 401)
    refused = 0
    for position in positions:
        try:
            content = files.read(flipped(data, tmp_path / "encoder.pt", position))
        except Exception:
            refused += 1
        else:
            assert same(content, want), position
    assert refused > len(positions) / 2


@pytest.mark.parametrize("part", [0.0, 0.002, 0.1, 0.5, 0.9, 0.998])
def test_a_flipped_bit_is_said_in_one_line(whole, tmp_path, capsys, part):
    data = whole.read_bytes()
    path = flipped(data, tmp_path / "encoder.pt", 8 * int(part * len(data)))
    code = model.main(["--ckpt", str(path)])
    error = capsys.readouterr().err
    assert code == 0 or (error.count("\n") == 1 and str(path) in error)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_refused(whole, tmp_path, part):
    data = whole.read_bytes()
    (tmp_path / "encoder.pt").write_bytes(data[: int(part * len(data))])
    with pytest.raises(ValueError, match="encoder.pt cannot be read"):
        model.load_encoder(tmp_path / "encoder.pt")


def test_one_bit_of_a_weight_is_found_by_the_sum_of_the_weights_too(whole, tmp_path):
    """Where the zip's own sums were made anew, as by a program that copies the archive."""

    def change(name, data):
        return bytes([data[0] ^ 1]) + data[1:] if name.endswith("/data/7") else data

    rewritten(whole, tmp_path / "encoder.pt", change)
    with pytest.raises(ValueError, match="damaged"):
        model.load_encoder(tmp_path / "encoder.pt")


def test_older_files_without_a_sum_of_the_weights_load(tmp_path):
    encoder = model.SampleCNN(width=0.0625)
    content = {"format": "clmr-encoder-1", "encoder": "samplecnn", "sizes": {"width": 0.0625}}
    torch.save({**content, "state": encoder.state_dict()}, tmp_path / "encoder.pt")
    again, _ = model.load_encoder(tmp_path / "encoder.pt")
    assert model.weights_sha256(again) == model.weights_sha256(encoder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    encoder = model.SampleCNN(width=0.0625)
    with torch.no_grad():
        encoder.blocks[3][0].weight[0, 0, 0, 1] = value
    model.save_encoder(tmp_path / "encoder.pt", encoder, sample_rate=22050, method="clmr", step=0)
    with pytest.raises(ValueError, match="blocks.3.0.weight is not all numbers"):
        model.load_encoder(tmp_path / "encoder.pt")


def test_a_torchscript_archive_is_verified_too(tmp_path):
    path = tmp_path / "x.ts"
    torch.jit.save(torch.jit.script(nn.Linear(50, 50)), path)
    files.check_archive(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        files.check_archive(path)


# -------------------------------------------------------------------------- what strangers send


def opcodes(*parts):
    """A pickle of protocol 2, by hand."""
    return b"\x80\x02" + b"".join(parts) + b"."


def found(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


ATTRIBUTE = b"}" + text("crafted") + b"K\x01s"  # {"crafted": 1}
PICKLES = {
    "attributes of a class of torch": opcodes(found("torch", "Tensor"), b"N", ATTRIBUTE, b"\x86b"),
    "attributes of a module": opcodes(found("torch.nn", "Module"), b"N", ATTRIBUTE, b"\x86b"),
    "attributes of a storage": opcodes(found("torch", "FloatStorage"), b"N", ATTRIBUTE, b"\x86b"),
    "attributes of a function": opcodes(
        found("torch._utils", "_rebuild_tensor_v2"), ATTRIBUTE, b"b"
    ),
    "a program": opcodes(found("os", "system"), text("touch owned"), b"\x85R"),
    "setattr": opcodes(
        found("builtins", "setattr"), found("torch", "Tensor"), text("crafted"), b"K\x01\x87R"
    ),
    "ten gigabytes of bytes": opcodes(
        found("builtins", "bytearray"), b"\x8a\x05" + (10**10).to_bytes(5, "little"), b"\x85R"
    ),
    "a memo of two billion": opcodes(b"}", b"r" + struct.pack("<I", 2**31 - 1)),
    "a text of four gigabytes": opcodes(b"X" + struct.pack("<I", 2**32 - 1) + b"short"),
    "a text of an exabyte": opcodes(b"\x8d" + struct.pack("<Q", 2**60) + b"short"),
    "a list in a list in a list": opcodes(b"]" * 100_000 + b"a" * 99_999),
    "a tensor of nothing": opcodes(found("torch._utils", "_rebuild_tensor_v2"), b")R"),
    "nothing": b"",
    "half an opcode": b"\x80\x02c",
    "no dict": opcodes(b"K\x01"),
}


def content_of(whole, **changes):
    with zipfile.ZipFile(whole):
        content = torch.load(whole, weights_only=True)
    content.update(changes)
    return {key: value for key, value in content.items() if value is not ...}


def crafted(whole, folder):
    """{what: its file}."""
    made = {}
    for what, data in PICKLES.items():
        made[what] = with_pickle(whole, folder / f"{len(made)}.pt", data)
    state = torch.load(whole, weights_only=True)["state"]
    first = next(iter(state))
    changes = {
        "a network of a billion channels": {"sizes": {"width": 1e9}},
        "a network of half a million channels": {"sizes": {"width": 1e4}},
        "an infinite network": {"sizes": {"width": float("inf")}},
        "a network of no number": {"sizes": {"width": float("nan")}},
        "a width of text": {"sizes": {"width": "x" * 100}},
        "sizes of another network": {"sizes": {"depth": 3}},
        "sizes that are a list": {"sizes": [1, 2]},
        "an unknown encoder": {"encoder": "resnet"},
        "an encoder that is a list": {"encoder": ["samplecnn"]},
        "no weights": {"state": ...},
        "weights that are a list": {"state": [1, 2, 3]},
        "weights that are numbers": {"state": dict.fromkeys(state, 1)},
        "a rate of text": {"sample_rate": "fast"},
        "control characters": {"method": "\x1b[2Jclmr"},
        "a weight that claims what it does not hold": {
            "state": {**state, first: torch.zeros(1).expand(state[first].shape)}
        },
        "a weight of a terabyte": {"state": {**state, first: torch.zeros(1).expand(10**12)}},
        "whole numbers for weights": {"state": {**state, first: state[first].long()}},
        "a checkpoint to continue a run": {"format": "clmr-checkpoint-1", "state": ...},
    }
    for what, change in changes.items():
        made[what] = folder / f"{len(made)}.pt"
        torch.save(content_of(whole, **change), made[what])
    made["a weight larger than its part of the file"] = rewritten(
        whole,
        folder / "short.pt",
        lambda name, data: data[:4] if name.endswith("/data/0") else data,
    )
    made["an archive that unpacks to a gigabyte"] = rewritten(
        whole,
        folder / "bomb.pt",
        lambda name, data: bytes(10**8) if name.endswith("/data/0") else data,
        zipfile.ZIP_DEFLATED,
    )
    made["two parts of one name"] = shutil.copy(whole, folder / "twice.pt")
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(folder / "twice.pt", "a") as archive,
    ):
        archive.writestr(archive.namelist()[0], b"another")
    made["TorchScript"] = folder / "script.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), made["TorchScript"])
    made["the format of an old torch"] = folder / "old.pt"
    torch.save(
        content_of(whole), made["the format of an old torch"], _use_new_zipfile_serialization=False
    )
    made["a plain pickle"] = folder / "plain.pt"
    made["a plain pickle"].write_bytes(pickle.dumps({"format": model.FORMAT}))
    return made


# Reads each file as `python model.py --ckpt FILE` does, with little more memory than at first.
READER = """
import contextlib, io, json, resource, sys
import torch
import model
from formats import exports, files

def process():
    rebuild = torch._utils._rebuild_tensor_v2
    known = (torch, torch.Tensor, torch.nn.Module, torch.FloatStorage, torch._utils, rebuild, files)
    return [sorted(vars(thing)) for thing in known]

model.load_encoder(sys.argv[1])
before = process()
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (400 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
results = []
for path in sys.argv[2:]:
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        code = model.main(["--ckpt", path])
    results.append((code, error.getvalue(), process() == before))
print(json.dumps(results))
"""


def test_crafted_files_give_one_line_and_change_nothing(whole, tmp_path):
    made = crafted(whole, tmp_path)
    command = [sys.executable, "-W", "ignore", "-c", READER, whole, *made.values()]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for what, (code, error, unchanged) in zip(made, json.loads(done.stdout.splitlines()[-1])):
        assert code == 1, what
        assert error.count("\n") == 1 and "Traceback" not in error and len(error) < 700, (
            what,
            error,
        )
        assert unchanged, what
    assert not (tmp_path / "owned").exists()


def test_a_class_that_a_checkpoint_names_beside_its_weights_does_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"state_dict": {}, "x": Attack()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="no encoder file"):
        model.load_encoder(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()
