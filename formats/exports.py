"""Files for other programs, TorchScript, torch.export, ONNX: written, loaded again, compared.

Machinery that a reader of model.py does not need: how torch's exporters are called, and how one
finds out that what they wrote is right. model.export_torchscript, export_program and export_onnx
hand in what is exported, and how a file is written.
"""
import copy
import functools
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .machine import versions


class Exported(nn.Module):
    """What encoder.ts and tagger.ts hold: windows, encoder, perhaps a head, and their mean.

        audio  |-- window 0 --|-- window 1 --|-- window 2 --| rest (less than a window: left out)
    """

    tags: list[str]
    sample_rate: int
    input_samples: int

    def __init__(self, encoder: nn.Module, sample_rate: int, head: nn.Module = None, tags=(),
                 task: str = "none"):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Identity() if head is None else head
        self.tags = list(tags)
        self.task = "none" if head is None else task
        self.sample_rate = int(sample_rate)
        self.input_samples = int(encoder.input_samples)
        if head is not None:
            layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
            if not layers:
                raise ValueError("the head has no layer")
            outputs = layers[-1].out_features
            if task not in ("multilabel", "singlelabel") or len(self.tags) != outputs:
                raise ValueError(f"a head of {outputs} outputs needs as many tags, and the task "
                                 f"multilabel or singlelabel; got {len(self.tags)} and {task!r}")

    @torch.jit.unused
    def describe(self) -> dict:
        """What the sidecar says of it."""
        dimensions = self.encoder.out_dim if self.task == "none" else len(self.tags)
        return {"sample_rate": self.sample_rate, "input_samples": self.input_samples,
                "out_dim": dimensions, "tags": self.tags, "task": self.task,
                "encoder": self.encoder.name, "sizes": self.encoder.sizes}

    def rows(self, x: Tensor) -> Tensor:
        """Windows (B, 1, input_samples) -> features (B, D) or probabilities (B, K)."""
        y = self.head(self.encoder(x))
        if self.task == "multilabel":
            return torch.sigmoid(y)
        return torch.softmax(y, 1) if self.task == "singlelabel" else y

    @torch.jit.export
    def frames(self, audio: Tensor, hop: int) -> Tensor:
        """(B, 1, T) -> (B, n, D): one row per window of `input_samples`, every `hop` samples."""
        if audio.dim() != 3 or audio.shape[1] != 1 or audio.shape[2] < self.input_samples:
            raise ValueError(f"expected mono audio (B, 1, T) with T >= {self.input_samples}, "
                             f"got {list(audio.shape)}")
        if hop < 1:
            raise ValueError("hop must be at least one sample")
        windows = audio[:, 0].unfold(1, self.input_samples, hop)  # (B, n, window), a view
        n = windows.shape[1]
        rows: list[Tensor] = []
        for i in range(windows.shape[0]):
            for j in range(0, n, 32):  # bounded memory for any length
                rows.append(self.rows(windows[i, j : j + 32].unsqueeze(1)))
        return torch.cat(rows).reshape(audio.shape[0], n, -1)

    def forward(self, audio: Tensor) -> Tensor:
        return self.frames(audio, self.input_samples).mean(1)  # (B, n, D) -> (B, D)


def fold_batch_norm(encoder: nn.Module) -> nn.Module:
    """A copy for inference, every Block's batch norm folded into the convolution before it.

    Float64 arithmetic keeps the outputs within 1e-6 of the unfolded encoder's."""
    dtype = next(encoder.parameters()).dtype
    folded = copy.deepcopy(encoder).double().eval()
    for parent in list(folded.modules()):
        for name, block in parent.named_children():
            if _folds(block):
                conv, norm, *rest = block
                setattr(parent, name, nn.Sequential(fuse_conv_bn_eval(conv, norm), *rest))
    return folded.to(dtype).to(memory_format=torch.channels_last)


def _folds(block) -> bool:
    """Is it a convolution with the batch norm of its outputs?"""
    pair = tuple(map(type, block[:2])) if isinstance(block, nn.Sequential) else ()
    return len(pair) == 2 and pair[0] is nn.Conv2d and issubclass(pair[1], nn.BatchNorm2d)


def head_of(weights: list, dimensions: int, check: Callable) -> nn.Sequential:
    """Linear layers with ReLU between them, of a file's weights.

    Args: weights: {"weight", "bias"} a layer. dimensions: of what the first is given.
        check(weights, wanted, what) raises where they are not whole."""
    layers = []
    for layer in weights:
        outputs, inputs = layer["weight"].shape
        if inputs != dimensions:
            raise ValueError(f"the head takes {inputs} numbers, its encoder gives {dimensions}")
        linear = nn.Linear(inputs, outputs, device="meta")
        check(layer, linear.state_dict(), "the head")
        linear.load_state_dict(layer, assign=True)
        layers += [linear, nn.ReLU()]
        dimensions = outputs
    return nn.Sequential(*layers[:-1])


class ExportError(ValueError):
    """A file that was written does not give what the module gives, or cannot be written here."""


def noise(batch: int, samples: int) -> Tensor:
    """Audio to compare with, (batch, 1, samples), the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, samples, generator=generator) * 2 - 1


def torchscript(module: nn.Module, path: Path, sidecar: str, save: Callable) -> list:
    """Write `module(audio (B, 1, T)) -> (B, D)` -> [(audio, what the file gives)], two lengths."""
    samples = module.input_samples
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # scripting is kept for the users who load it; encoder.pt2 is beside it
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(module), buffer, _extra_files={"sidecar.json": sidecar})
        save(path, buffer.getvalue())
        loaded = torch.jit.load(path)
    trials = [noise(1, samples), noise(3, 2 * samples + 1234)]
    return [(audio, loaded(audio)) for audio in trials]


def program(module: nn.Module, path: Path, sidecar: str, save: Callable) -> list:
    """Write one window's rows, `(B, 1, input_samples) -> (B, D)`, as a torch.export program."""
    audio = noise(4, module.input_samples)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's own writer about its own buffers
        any_batch = ({0: torch.export.Dim("batch")},)
        exported = torch.export.export(Window(module), (audio[:2],), dynamic_shapes=any_batch)
        torch.export.save(exported, buffer, extra_files={"sidecar.json": sidecar})
        save(path, buffer.getvalue())
        loaded = torch.export.load(path).module()
    return [(audio, loaded(audio))]


def onnx(module: nn.Module, path: Path, sidecar: str, save: Callable) -> list:
    """Write one window's rows, `audio (B, 1, input_samples) -> features (B, D)`, as ONNX, with the
    sidecar as metadata; compared at two batch sizes, where onnxruntime is installed."""
    library = needed("onnx", "to write ONNX")
    audio = noise(3, module.input_samples)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporters about their own ways
        if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
            # torch.export takes minutes over each step of it; the older exporter a second
            buffer = io.BytesIO()
            names = {"audio": {0: "batch"}, "features": {0: "batch"}}
            torch.onnx.export(Window(module), (audio[:2],), buffer, dynamo=False,
                              input_names=["audio"], output_names=["features"], dynamic_axes=names)
            proto = library.load_from_string(buffer.getvalue())
        else:
            needed("onnxscript", "to write ONNX")
            logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # of packages not needed
            any_batch = ({0: torch.export.Dim("batch")},)
            written = torch.onnx.export(Window(module), (audio[:2],), dynamo=True, verbose=False,
                                        input_names=["audio"], output_names=["features"],
                                        dynamic_shapes=any_batch)
            proto = written.model_proto
    proto.metadata_props.add(key="sidecar", value=sidecar)
    save(path, proto.SerializeToString())
    try:
        runtime = needed("onnxruntime", "to compare ONNX with eager")
    except ExportError as error:
        warnings.warn(f"{path} is not checked: {error}", stacklevel=4)
        return []
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    trials = [audio[:1], audio]
    return [(x, torch.from_numpy(session.run(None, {"audio": x.numpy()})[0])) for x in trials]


def needed(package: str, why: str):
    """An optional package; ExportError says how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ExportError(f"{package} is not installed, which is needed {why}: type "
                          f"pip install {package}") from None


class Window(nn.Module):
    """One window's rows of a module that takes audio of any length."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, audio: Tensor) -> Tensor:
        return self.module.rows(audio)


def write(kind: str, module: Exported, path: Path, info: dict, save: Callable) -> dict:
    """Write a module, its batch norms folded, as torchscript, program or onnx, and compare the file
    with the module as it is.

    Args: info: what the sidecar says beside what the module tells. save(path, bytes).
    Returns: the sidecar, with `max_difference` to eager relative to the output's scale (None where
        nothing could be compared); it is written beside the file, too.
    Raises: ExportError if that is above 1e-4."""
    module = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    folded = fold_batch_norm(module)
    sidecar = {**module.describe(), "versions": versions(), **info}
    writer = {"torchscript": torchscript, "program": program, "onnx": onnx}[kind]
    worst = None
    with torch.no_grad():
        for audio, found in writer(folded, path, json.dumps(sidecar), save):
            want = module(audio)
            difference = (found - want).abs().max() / want.abs().max().clamp_min(1e-12)
            worst = max(worst or 0.0, difference.item())
    if worst is not None and not worst < 1e-4:
        raise ExportError(f"{path} differs from the eager encoder by {worst:.1e} (relative): do "
                          "not use it, and report this")
    sidecar = {**sidecar, "max_difference": worst}
    text = json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n"
    save(f"{path}.json", text.encode())
    return sidecar


def table(encoder: nn.Module) -> str:
    """One line per layer with its output shape and parameters, for one window."""
    encoder = copy.deepcopy(encoder).eval()
    lines = []

    def note(name, layer, _, out):
        shape = tuple((out[0] if isinstance(out, tuple) else out).shape)
        parameters = sum(p.numel() for p in layer.parameters())
        lines.append(f"{name:14s} {type(layer).__name__:12s} {str(shape):24s} {parameters:>12,d}")

    for name, layer in encoder.named_modules():
        if not list(layer.children()):
            layer.register_forward_hook(functools.partial(note, name))
    with torch.no_grad():
        encoder(torch.zeros(1, 1, encoder.input_samples))
    total = sum(p.numel() for p in encoder.parameters())
    lines.append(f"{encoder.name}: (B, 1, {encoder.input_samples}) -> (B, {encoder.out_dim}), "
                 f"{total:,d} parameters")
    return "\n".join(lines)
