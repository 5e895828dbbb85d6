"""Encoders of CLMR, the projector, and the files they live in (ISMIR 2021, sections 3.3 and 3.5).

    python model.py                      # layers, shapes and parameters of the paper's SampleCNN
    python model.py --encoder cpc
    python model.py --ckpt runs/mtat/encoder.pt --out exported/      # encoder.ts and encoder.pt2

This file needs torch alone; where kernels/ lies beside it, training is faster by the same numbers.
Dimensions: B batch, C channels, T samples or steps, D features, P projection, K tags.

An encoder takes `(B, 1, input_samples)` audio in [-1, 1], gives `(B, out_dim)` features, and has
`name` and `sizes`.

Files:
  encoder.pt    {"format", "state", "encoder", "sizes", "sample_rate", "input_samples", "out_dim",
                "method", "step", ...}: only tensors, numbers, strings, lists and dicts, so
                `torch.load(weights_only=True)` reads it
  encoder.ts    TorchScript: m(audio (B, 1, T)) -> (B, D), m.frames(audio, hop) -> (B, n, D);
                m.sample_rate, m.input_samples
  tagger.ts     the same with (B, K) probabilities, and m.tags
  encoder.pt2   torch.export program of one window: (B, 1, input_samples) -> (B, D)
  *.json        beside each export, and inside it: sample rate, input samples, dimensions, tags in
                order, task, versions, sha256 of the weights (an encoder's own, the same in .ts and
                .pt2); beside it also max_difference, found on reloading
"""
import argparse
import contextlib
import copy
import ctypes
import functools
import hashlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.utils.fusion import fuse_conv_bn_eval

# ------------------------------------------------------------------ SampleCNN 3^9 (section 3.3)

def he_init(module: nn.Module):
    """He initialisation of every convolution (section 3.7), biases at zero:
    `encoder.apply(he_init)`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)

class Block(nn.Sequential):
    """conv, batch norm, in the nine blocks max-pool 3, ReLU: (B, C, 1, T) -> (B, C', 1, T').

    In training kernels/ may know a faster pass of the same numbers."""

    recompute = False  # kernels/ keeps this block's input and output alone for the backward pass

    def forward(self, x: Tensor) -> Tensor:
        kernels = load_kernels() if self.training else None
        faster = kernels.training_pass(self, x) if kernels else None
        return super().forward(x) if faster is None else faster(x)

@functools.cache
def load_kernels():
    """The folder kernels/ beside this file; None, which is said once, where it is not."""
    try:
        import kernels
        kernels.training_pass  # and no package of that name
        return kernels
    except (ImportError, AttributeError):
        warnings.warn("there is no kernels/ beside model.py: training goes through torch's own "
                      "layers, by the same numbers, slower", stacklevel=3)
        return None

class SampleCNN(nn.Module):
    """SampleCNN on raw audio: a stem conv(k3, s3), nine blocks [conv k3, BN, ReLU, max-pool 3], a
    top conv.

    `forward(x (B, 1, 3**10)) -> (B, D)`. Autograd, AMP, torch.export and, by `export_torchscript`,
    TorchScript are supported; statistics of the batch are taken in training mode, so only there a
    row depends on the others. The convolutions are written as 1 x 3 kernels over (B, C, 1, T) and
    kept channels-last: the same arithmetic, faster.

    Args:
        width: a factor on all channels; 1.0 is the paper's, 0.125 trains in minutes on a CPU.

    >>> SampleCNN(width=0.125).eval()(torch.zeros(2, 1, 59049)).shape
    torch.Size([2, 64])
    """

    name = "samplecnn"
    channels = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)  # stem, nine blocks, top

    def __init__(self, width: float = 1.0):
        super().__init__()
        channels = [_scaled(c, width) for c in self.channels]
        middle = [self._block(*c, pool=True) for c in zip(channels[:-2], channels[1:-1])]
        self.sizes = {"width": width}
        self.out_dim = channels[-1]
        # one stride of 3, and a max-pool of 3 in every block: 3^10 = 59,049
        self.input_samples = 3 ** (len(channels) - 1)
        stem = self._block(1, channels[0], stride=3)
        self.blocks = nn.Sequential(stem, *middle, self._block(channels[-2], channels[-1]))
        self.apply(he_init)
        # the weights decide the layout: an input of one channel is ambiguous
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _block(c_in, c_out, stride=1, pool=False):
        padding = 1 if stride == 1 else 0
        conv = nn.Conv2d(c_in, c_out, (1, 3), stride=(1, stride), padding=(0, padding))
        layers = [conv, nn.BatchNorm2d(c_out)]
        if pool:  # before ReLU: the two commute, and a third of the numbers is left to rectify
            layers.append(nn.MaxPool2d((1, 3)))
        return Block(*layers, nn.ReLU(inplace=True))

    def recompute(self, blocks: int):
        """Keep less of the first `blocks` blocks for the backward pass, so that larger batches
        fit."""
        for i, block in enumerate(self.blocks):
            block.recompute = i < blocks

    def forward(self, x: Tensor) -> Tensor:
        _check_windows(x, self.input_samples)
        return self.blocks(x.unsqueeze(2)).flatten(1)  # (B, 1, 1, T) -> (B, D, 1, 1) -> (B, D)

class SampleCNNLarge(SampleCNN):
    """The larger SampleCNN (7,289,088 parameters): more channels in the upper blocks, D = 1024."""

    name = "samplecnn-large"
    channels = (128, 128, 128, 256, 256, 256, 512, 512, 512, 1024, 1024)

def _scaled(channels: int, width: float) -> int:
    if not width > 0:
        raise ValueError(f"width must be a positive factor (1.0 is the paper's), not {width}")
    return max(8, 8 * round(channels * width / 8))

def _check_windows(x: Tensor, samples: int):
    if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != samples:
        raise ValueError(f"expected mono audio of shape (B, 1, {samples}), got {list(x.shape)}")

# ---------------------------- Contrastive Predictive Coding (section 3.5), the paper's comparison

class CPC(nn.Module):
    """CPC's encoder: seven strided convolutions (480 samples a frame) and a GRU, whose state is
    the context.

    `context(x (B, 1, T)) -> z (B, n, 512), c (B, n, 256)`: frames and contexts; `forward(x) ->
    (B, D)` pools the contexts: `mean` (D = 256, the default) or `mean+last` (D = 512, the only
    reading that gives the paper's "512 dimensions").

    >>> z, c = CPC(width=0.125).context(torch.zeros(2, 1, 59049))
    >>> z.shape, c.shape
    (torch.Size([2, 124, 64]), torch.Size([2, 124, 32]))
    """

    name = "cpc"
    layers = ((10, 5, 2), (6, 3, 2), (4, 2, 2), (4, 2, 2), (4, 2, 1), (2, 2, 1), (2, 2, 1))

    def __init__(self, width: float = 1.0, pool: str = "mean"):
        super().__init__()
        if pool not in ("mean", "mean+last"):
            raise ValueError(f"pool must be mean or mean+last, not {pool!r}")
        self.frame_dim = _scaled(512, width)
        self.context_dim = _scaled(256, width)
        self.sizes = {"width": width, "pool": pool}
        self.pool = pool
        self.out_dim = self.context_dim * (2 if pool == "mean+last" else 1)
        self.input_samples = SampleCNN(width=1 / 64).input_samples  # both see the same windows
        self.frames_per_window = self.input_samples  # in the end 124
        layers = []
        for kernel, stride, padding in self.layers:
            c_in = self.frame_dim if layers else 1
            layers.append(nn.Conv1d(c_in, self.frame_dim, kernel, stride, padding))
            layers.append(nn.ReLU(inplace=True))
            self.frames_per_window = (self.frames_per_window + 2 * padding - kernel) // stride + 1
        self.frames = nn.Sequential(*layers)
        self.gru = nn.GRU(self.frame_dim, self.context_dim, batch_first=True)
        self.apply(he_init)

    @torch.jit.export
    def context(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.frames(x).transpose(1, 2)  # (B, n, 512)
        if not torch.jit.is_scripting():
            if z.is_cuda and torch.is_autocast_enabled("cuda"):
                # there autocast runs a GRU in float16, whatever type it was given
                with torch.autocast("cuda", enabled=False):
                    return z, self.gru(z.float())[0]
        return z, self.gru(z)[0]  # (B, n, 256)

    def forward(self, x: Tensor) -> Tensor:
        _check_windows(x, self.input_samples)
        _, c = self.context(x)
        mean = c.mean(1)
        return torch.cat([mean, c[:, -1]], 1) if self.pool == "mean+last" else mean

# ------------------------------------------------------------------------ what all encoders share

class Projector(nn.Module):
    """z = W2 ReLU(W1 h), no biases (section 3.3): 512-512-128. The loss sees z, all that follows
    uses h.

    >>> Projector(512)(torch.zeros(2, 512)).shape
    torch.Size([2, 128])"""

    def __init__(self, in_dim: int = 512, out_dim: int = 128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, in_dim, bias=False), nn.ReLU(),
                                    nn.Linear(in_dim, out_dim, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)

ENCODERS = {c.name: c for c in (SampleCNN, SampleCNNLarge, CPC)}

def build_encoder(name: str, **sizes) -> nn.Module:
    """A new encoder by name, with He initialisation from torch's current generator.

    >>> sum(p.numel() for p in build_encoder("samplecnn").parameters())
    2368512
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; there are: {', '.join(ENCODERS)}")
    return ENCODERS[name](**sizes)

class BatchNormOverProcesses(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes (section 3.2), in training, on any device.

    Sums are taken in float64. The gradient is exact: it passes through mean and variance, to the
    inputs of all processes, which hold as many rows each."""

    over_processes = True  # which kernels/ asks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes = (0, 2, 3)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        high = x.to(self.weight.dtype)  # under autocast x comes in half precision
        mean = all_reduce(high.sum(axes, dtype=torch.float64)) / count  # (C,)
        away = high - mean.to(high)[:, None, None]
        var = all_reduce(away.square().sum(axes, dtype=torch.float64)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            unbiased = var * count / max(1, count - 1)
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (away * scale.to(high)[:, None, None] + self.bias[:, None, None]).to(x.dtype)

def synchronise(module: nn.Module, device) -> nn.Module:
    """Every batch norm of `module` takes its statistics over all processes from now on (section
    3.2)."""
    if not dist.is_initialized():
        return module
    kernels = load_kernels()
    if torch.device(device).type == "cuda" and not (kernels and kernels.gpu_passes()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # which refuses a CPU
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = BatchNormOverProcesses  # the same parameters, another forward pass
    return module

def fold_batch_norm(encoder: nn.Module) -> nn.Module:
    """A copy for inference with the batch norm of every Block folded into the convolution before
    it.

    Float64 arithmetic keeps the outputs within 1e-6 of the unfolded encoder's."""
    dtype = next(encoder.parameters()).dtype
    folded = copy.deepcopy(encoder).double().eval()
    for parent in list(folded.modules()):
        for name, block in parent.named_children():
            if isinstance(block, Block):
                conv, norm, *rest = block
                setattr(parent, name, nn.Sequential(fuse_conv_bn_eval(conv, norm), *rest))
    return folded.to(dtype).to(memory_format=torch.channels_last)

# ------------------------------------------------------------------------------- the encoder file

FORMAT = "clmr-encoder-1"

def weights_sha256(module: nn.Module) -> str:
    """sha256 over names, shapes and values of all parameters and buffers: an encoder's identity."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype};".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

class _Inert(dict):
    """Stands in for any class that a foreign checkpoint names: takes what it is given and does
    nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    __setstate__ = __init__

class _TensorsOnly:
    """A pickle module for foreign checkpoints: tensors are rebuilt, every other name is inert."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if module == "torch._utils":
                known = name in ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor")
            elif module in ("torch", "torch.storage"):
                known = name.endswith("Storage")
            else:
                known = (module, name) == ("collections", "OrderedDict")
            return super().find_class(module, name) if known else _Inert

    @classmethod
    def load(cls, file, **kwargs):
        return cls.Unpickler(file, **kwargs).load()

def read_checkpoint(path) -> dict:
    """`torch.load(weights_only=True)` on the CPU, with errors a user can act on."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of an encoder.pt, "
                                "e.g. runs/NAME/encoder.pt")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # Lightning stores its own classes beside the weights
            content = torch.load(path, map_location="cpu", weights_only=False,
                                 pickle_module=_TensorsOnly)
    except Exception as error:  # torch raises half a dozen types for one fact: no file of ours
        raise ValueError(f"{path} cannot be read as a checkpoint ({first_line(error)[:120]}); "
                         "expected an encoder.pt of pretrain.py, or one of the authors'") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{path} holds a {kind}, expected the dict of an encoder.pt")
    return content

def save_encoder(path, encoder: nn.Module, **info):
    """Write the encoder file (see the head of this file).

    Args:
        info: at least sample_rate, method and step; plain values only."""
    plain = encoder.module if hasattr(encoder, "module") else encoder
    state = {key: value.detach().cpu().clone() for key, value in plain.state_dict().items()}
    content = {"format": FORMAT, **_identity(plain), **info, "state": state}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())

def load_encoder(path) -> tuple[nn.Module, dict]:
    """Read an encoder file, ours or the authors' (Lightning `model.encoder.*`, older `encoder.*`).

    Returns: the encoder in eval mode on the CPU, and the info it was saved with.
    Raises: FileNotFoundError; ValueError when the file is of another format or does not fit."""
    content = read_checkpoint(path)
    if content.get("format") == FORMAT:
        encoder = build_encoder(content["encoder"], **content["sizes"])
        _fill(encoder, content.pop("state"), path)
        return encoder.eval(), content
    state = _authors_state(content.get("state_dict", content))
    if state is None:
        found = ", ".join(map(str, list(content)[:4]))
        raise ValueError(f"{path} is no encoder file: expected format {FORMAT!r} or the authors' "
                         f"encoder.* keys, found {found}; give runs/NAME/encoder.pt (checkpoint.pt "
                         "is for continuing a run)")
    encoder = SampleCNN()
    _fill(encoder, state, path)
    # no sample rate is in the authors' checkpoints: all released ones were trained at the paper's
    step = int(content.get("global_step", 0))
    return encoder.eval(), {"format": "authors", **_identity(encoder), "sample_rate": None,
                            "method": "clmr", "step": step, "data": None, "fingerprint": None}

def _identity(encoder):
    return {"encoder": encoder.name, "sizes": dict(encoder.sizes), "out_dim": encoder.out_dim,
            "input_samples": encoder.input_samples}

def _fill(encoder, state, path):
    wanted = encoder.state_dict()
    misfit = f"{path} does not fit {encoder.name} {encoder.sizes}"
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    if missing or unexpected:
        raise ValueError(f"{misfit}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for key, value in wanted.items():
        if state[key].shape != value.shape:
            found = tuple(state[key].shape)
            raise ValueError(f"{misfit}: {key} is {found}, expected {tuple(value.shape)}")
    encoder.load_state_dict(state)

def _authors_state(state):
    """The authors' names -> ours, or None. Blocks are `sequential.I` (0..10) or, in the oldest
    files, `convI` (1..11)."""
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix("model.")
        if not name.startswith("encoder.") or name.startswith("encoder.fc."):
            continue
        found = re.fullmatch(r"encoder\.(?:sequential\.(\d+)|conv(\d+))\.(\w+\.\w+)", name)
        if not found:
            return None
        block = int(found[1] or int(found[2]) - 1)
        if value.dim() == 3:
            value = value.unsqueeze(2)  # k -> 1 x k
        renamed[f"blocks.{block}.{found[3]}"] = value
    return renamed or None

# ------------------------------------------------------------ exports that work without this file

class Exported(nn.Module):
    """What encoder.ts and tagger.ts hold: windows, the encoder, an optional head, the mean over
    windows.

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

    def _rows(self, x: Tensor) -> Tensor:
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
            for j in range(0, n, 32):  # bounded memory for any length of audio
                rows.append(self._rows(windows[i, j : j + 32].unsqueeze(1)))
        return torch.cat(rows).reshape(audio.shape[0], n, -1)

    def forward(self, audio: Tensor) -> Tensor:
        return self.frames(audio, self.input_samples).mean(1)  # (B, n, D) -> (B, D)

class ExportError(RuntimeError):
    """An exported file, loaded again, does not give what the encoder gives."""

def export_torchscript(encoder: nn.Module, path, sample_rate: int, head: nn.Module = None, tags=(),
                       task: str = "none", info: dict = None) -> dict:
    """Write a TorchScript file and its sidecar, load it from the disk, and compare it with eager.

    Args:
        encoder: as built or loaded here; batch norms are folded in a copy.
        sample_rate: of the audio it expects, in Hz.
        head: optional module (B, D) -> (B, K) of logits; then also tags, the names of the K outputs
            in order, and task: multilabel or singlelabel.
        info: further entries of the sidecar.
    Returns: the sidecar. `max_difference` is the largest absolute difference to eager (unfolded) at
        two lengths and two batch sizes, relative to the output's scale.
    Raises: ExportError if that is above 1e-4: do not use the file; ValueError for a head without
        its task, or with another number of outputs than tags."""
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    if head is not None:
        head = copy.deepcopy(head).cpu().float().eval()
        _check_head(head, encoder.out_dim, tags, task)
    eager = Exported(encoder, sample_rate, head, tags, task).eval()
    folded = Exported(fold_batch_norm(encoder), sample_rate, head, tags, task).eval()
    sidecar = _sidecar(eager, info)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # scripting is kept for the users who load it; encoder.pt2 is beside it
        warnings.simplefilter("ignore", DeprecationWarning)
        inside = {"sidecar.json": json.dumps(sidecar)}
        torch.jit.save(torch.jit.script(folded), buffer, _extra_files=inside)
        write_atomically(path, buffer.getvalue())
        loaded = torch.jit.load(path)
    audio = [_noise(1, encoder.input_samples), _noise(3, 2 * encoder.input_samples + 1234)]
    return _compare(path, sidecar, [(eager, loaded, x) for x in audio])

def export_program(encoder: nn.Module, path, sample_rate: int, info: dict = None) -> dict:
    """Write encoder.pt2, a torch.export program `(B, 1, input_samples) -> (B, D)` for any B, and
    its sidecar; checked as `export_torchscript` does."""
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    sidecar = _sidecar(Exported(encoder, sample_rate), info)
    audio = _noise(4, encoder.input_samples)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's own writer about its own buffers
        any_batch = ({0: torch.export.Dim("batch")},)
        folded = fold_batch_norm(encoder)
        program = torch.export.export(folded, (audio[:2],), dynamic_shapes=any_batch)
        torch.export.save(program, buffer, extra_files={"sidecar.json": json.dumps(sidecar)})
        write_atomically(path, buffer.getvalue())
        loaded = torch.export.load(path).module()
    return _compare(path, sidecar, [(encoder, loaded, audio)])

def _check_head(head, in_dim, tags, task):
    with torch.no_grad():
        outputs = head(torch.zeros(1, in_dim)).shape[1]
    if task not in ("multilabel", "singlelabel") or len(tags) != outputs:
        raise ValueError(f"a head of {outputs} outputs needs as many tags, and the task "
                         f"multilabel or singlelabel; got {len(tags)} and {task!r}")

def _sidecar(eager: Exported, info):
    encoder = eager.encoder
    plain = eager.task == "none"
    return {"sample_rate": eager.sample_rate, "input_samples": encoder.input_samples,
            "out_dim": encoder.out_dim if plain else len(eager.tags), "tags": eager.tags,
            "task": eager.task, "encoder": encoder.name, "sizes": encoder.sizes,
            "versions": versions(), "sha256": weights_sha256(encoder if plain else eager),
            **(info or {})}

def _noise(batch, samples):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 1, samples, generator=generator) * 2 - 1

def _compare(path, sidecar, trials):
    """Note the largest difference over (eager, loaded, audio), and write the sidecar."""
    worst = 0.0
    with torch.no_grad():
        for eager, loaded, audio in trials:
            want = eager(audio)
            difference = (loaded(audio) - want).abs().max() / want.abs().max().clamp_min(1e-12)
            worst = max(worst, difference.item())
    if not worst < 1e-4:
        raise ExportError(f"{path} differs from the eager encoder by {worst:.1e} (relative): do "
                          "not use it, and report this")
    sidecar = {**sidecar, "max_difference": worst}
    text = json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n"
    write_atomically(f"{path}.json", text.encode())
    return sidecar

# -------------------------------------------- the machine: what every script does in the same way

def tune_allocator():
    """Keep freed memory in the process (glibc only; elsewhere nothing). Call it before the first
    large tensor.

    glibc returns every large block to the system at each free, and half of a training step on the
    CPU is then spent on page faults. Both calls are needed; the heap grows by fragments, which
    jemalloc without decay avoids."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large request
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back

def choose_device(name: str = "auto") -> torch.device:
    """`auto`, `cpu` or `cuda` -> device; in a torchrun process, `cuda` is the GPU of that process.

    >>> choose_device("cpu")
    device(type='cpu')"""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; type --device cpu")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions with errors of 1e-3
    return device

def choose_amp(device, amp: str = "auto") -> str:
    """`auto` -> `bf16` where the hardware multiplies it (AVX-512 BF16, AMX, Ampere or later),
    else `off` (on an older GPU `fp16`)."""
    device = torch.device(device)
    if amp == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "auto":
        asked = getattr(torch.cpu, "get_capabilities", dict)  # of torch 2.9 or later
        return "bf16" if asked().get("avx512_bf16") or asked().get("amx_bf16") else "off"
    if amp not in ("off", "bf16", "fp16"):
        raise ValueError(f"--amp must be auto, off, bf16 or fp16, not {amp!r}")
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 is for GPUs; on the CPU type --amp bf16 or --amp off")
    return amp

def autocast(device, amp: str = "auto"):
    """The context of mixed precision: `with autocast(device, "auto"): h = encoder(x)`; see
    `choose_amp`."""
    amp = choose_amp(device, amp)
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=amp != "off")

def write_atomically(path, data: bytes):
    """Write `data` under a temporary name in the same folder, flush it to the disk, then move it
    into
    place: a reader sees the old file or the new one, whatever happens in between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")  # always the same: the next write removes it
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

def first_line(error: BaseException) -> str:
    """What an error says, in one line.

    >>> first_line(ValueError("no such file\\nand more")), first_line(MemoryError())
    ('no such file', 'MemoryError')"""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__

def versions() -> dict:
    """Versions that explain a number."""
    return {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}

def code_version() -> str:
    """The git commit of this file's folder, `+` when it has changes; else `unknown`."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    folder = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return "unknown"

# --- program: it needs no sibling

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

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="model.py", description="Print an encoder layer by layer, or export one.",
        usage="python model.py [--encoder NAME | --ckpt FILE [--out DIR]]   (--help lists all)",
        allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=list(ENCODERS), default="samplecnn", help="which encoder to print")
    add("--width", type=float, default=1.0, help="factor on all channels")
    add("--ckpt", metavar="FILE", help="an encoder.pt instead of a new encoder")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="write encoder.ts and encoder.pt2 here (with --ckpt)")
    return parser

def export_all(encoder: nn.Module, out: Path, sample_rate: int):
    """Write every export of an encoder, a line each."""
    for name, export in (("encoder.ts", export_torchscript), ("encoder.pt2", export_program)):
        difference = export(encoder, out / name, sample_rate)["max_difference"]
        print(f"{out / name}: largest difference to eager {difference:.1e}")

def main(argv=None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.out and not args.ckpt:
        parser.error("--out exports a trained encoder: name it with --ckpt runs/NAME/encoder.pt")
    if args.ckpt and not Path(args.ckpt).exists():
        parser.error(f"{args.ckpt}: no such file")
    try:
        if not args.ckpt:
            print(table(build_encoder(args.encoder, width=args.width)))
            return 0
        encoder, info = load_encoder(args.ckpt)
        print(table(encoder))
        if args.out and info["sample_rate"] is None:
            raise ValueError(f"{args.ckpt} does not say its sample rate (an authors' checkpoint): "
                             f"export it by evaluate.py --ckpt {args.ckpt} --data NAME")
        if args.out:
            export_all(encoder, Path(args.out), info["sample_rate"])
        return 0
    except (ValueError, OSError, ExportError) as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.exit(main())
