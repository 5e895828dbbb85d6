"""Encoders of CLMR, the projector, and the files they live in (ISMIR 2021, sections 3.3 and 3.5).

    python model.py --encoder cpc        # its layers, shapes and parameters
    python model.py --ckpt runs/mtat/encoder.pt --out exported/ --onnx    # encoder.ts .pt2 .onnx

This file needs torch alone. With kernels/ beside it training is faster, by the same numbers; with
formats/ files are verified byte by byte, and `export_torchscript`, `choose_device` and so on work.
Dimensions: B batch, C channels, T samples or steps, D features, P projection, K tags.

An encoder takes `(B, 1, input_samples)` audio in [-1, 1], gives `(B, out_dim)` features, and has
`name` and `sizes`; `front` and `blocks`, if every block's levels can be taken.

Files, with a sidecar .json beside and inside the exports:
  encoder.pt    {"format", "state", "weights_sha256", "encoder", "sizes", "sample_rate", "out_dim",
                "input_samples", "method", "step", ...}: only tensors, numbers, strings, lists and
                dicts, so `torch.load(weights_only=True)` reads it
  tagger.pt     the same, with "head", "levels", "tags", "task"
  encoder.ts    TorchScript: m(audio (B, 1, T)) -> (B, D), m.frames(audio, hop) -> (B, n, D);
                m.sample_rate, m.input_samples; tagger.ts: (B, K) probabilities, and m.tags
  encoder.pt2   torch.export program of one window, (B, 1, input_samples) -> (B, D); and .onnx
"""
import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import math
import os
import re
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

# ------------------------------------------------------------------ SampleCNN 3^9 (section 3.3)

def he_init(module: nn.Module):
    """`encoder.apply(he_init)`: He initialisation of convolutions (section 3.7), biases at zero."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)

class Block(nn.Sequential):
    """conv, batch norm, in the nine blocks max-pool 3, ReLU: (B, C, 1, T) -> (B, C', 1, T'). In
    training kernels/ may know a faster pass of the same numbers."""

    recompute = False  # kernels/ keeps this block's input and output alone for the backward pass

    def forward(self, x: Tensor) -> Tensor:
        kernels = load_beside("kernels") if self.training else None
        faster = kernels.training_pass(self, x) if kernels else None
        return super().forward(x) if faster is None else faster(x)

@functools.cache
def load_beside(module: str):
    """A module of a folder beside this file; where that is not, None, said once."""
    try:
        found = importlib.import_module(module)
        return found if module != "kernels" or found.training_pass else None  # or another kernels
    except (ImportError, AttributeError):
        what = ("training is slower, by the same numbers" if module == "kernels"
                else "files are read with torch's own checks alone")
        folder = module.partition(".")[0]
        warnings.warn(f"there is no {folder}/ beside model.py: {what}", stacklevel=3)
        return None

class SampleCNN(nn.Module):
    """SampleCNN on raw audio: conv(k3, s3), nine blocks [conv k3, BN, ReLU, max-pool 3], conv k3.

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
        """Keep less of the first `blocks` blocks for the backward pass: larger batches fit."""
        for i, block in enumerate(self.blocks):
            block.recompute = i < blocks

    def front(self, x: Tensor) -> Tensor:
        """What the blocks are given: (B, 1, T) -> (B, 1, 1, T)."""
        _check_windows(x, self.input_samples)
        return x.unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.front(x)).flatten(1)  # (B, D, 1, 1) -> (B, D)

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
    """CPC's encoder: seven strided convolutions, 480 samples a frame, and a GRU over the frames.

    `context(x (B, 1, T)) -> z (B, n, 512), c (B, n, 256)`: frames, and contexts, the GRU's states.
    `forward(x) -> (B, D)` pools the contexts: `mean` (D = 256, the default) or `mean+last` (512,
    the only reading that gives the paper's "512 dimensions").

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

# --------------------------- A log-mel network: an addition, for runs of hours on a few CPU cores

def mel_filters(bands: int, window: int, top_hz: float, low_hz: float = 30.0) -> Tensor:
    """Triangular filters (window // 2 + 1, bands) over the bins of a Fourier transform of `window`
    samples, evenly spaced in mel from low_hz to top_hz, half the sample rate; each of area 1 Hz.

    Mel as in Slaney's Auditory Toolbox: 200 / 3 Hz each up to 1 kHz, then a factor of 6.4 in 27.

    >>> mel_filters(96, 1024, 11_025.0).shape
    torch.Size([513, 96])
    """
    def to_mel(hz):
        return 15 + 27 * math.log(hz / 1000, 6.4) if hz >= 1000 else hz * (3 / 200)

    mel = torch.linspace(to_mel(low_hz), to_mel(top_hz), bands + 2, dtype=torch.float64)
    corners = torch.where(mel < 15, mel * (200 / 3), 1000 * 6.4 ** ((mel - 15) / 27))  # in Hz
    low, middle, high = corners.unfold(0, 3, 1).T  # of each triangle
    hz = torch.linspace(0, top_hz, window // 2 + 1, dtype=torch.float64)[:, None]
    triangles = torch.minimum((hz - low) / (middle - low), (high - hz) / (high - middle))
    return (triangles.clamp_min(0) * 2 / (high - low)).float()

class MelCNN(nn.Module):
    """A convolutional network on a log-mel spectrogram of 96 bands and 152 frames.

    `forward(x (B, 1, 3**10)) -> (B, 2 C)`: the mean and the maximum over time and bands of the last
    block's C channels, by a thirty-fifth of SampleCNN's arithmetic. All is supported that SampleCNN
    supports; under AMP the spectrogram stays in full precision.

    The bands are log(1 + 10^4 p), p the power of a Hann window's Fourier transform in a band; a
    batch norm over each band takes the place of scales set by hand. A block is a 3 x 3 convolution,
    batch norm, max-pool 2 and ReLU; the first one strides over every other band.

    Args:
        width: a factor on all channels.
        bands, window, hop: of the spectrogram; the last two in samples (46 and 17 ms).
        branches: so many networks side by side (convolutions in groups), their features together.

    >>> MelCNN(width=0.5).eval()(torch.zeros(2, 1, 59049)).shape
    torch.Size([2, 384])
    """

    name = "melcnn"
    channels = (16, 32, 64, 192, 384)
    top_hz = 11_025.0  # half of the sample rate that prepare.py writes

    def __init__(self, width: float = 1.0, bands: int = 96, window: int = 1024, hop: int = 384,
                 branches: int = 1):
        super().__init__()
        channels = [_scaled(c, width) * branches for c in self.channels]
        self.sizes = dict(width=width, bands=bands, window=window, hop=hop, branches=branches)
        self.window = window
        self.hop = hop
        self.branches = branches
        self.out_dim = 2 * channels[-1]
        self.input_samples = SampleCNN(width=1 / 64).input_samples  # all see the same windows
        filters = mel_filters(bands, window, self.top_hz)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("taper", torch.hann_window(window), persistent=False)
        self.scales = nn.BatchNorm2d(branches * bands)
        self.blocks = nn.Sequential()
        for c_in, c_out in zip([branches, *channels], channels):
            stride = 1 if len(self.blocks) else (2, 1)
            layers = [nn.Conv2d(c_in, c_out, 3, stride, 1, groups=branches), nn.BatchNorm2d(c_out)]
            if len(self.blocks) < len(channels) - 1:
                layers.append(nn.MaxPool2d(2))
            self.blocks.append(Block(*layers, nn.ReLU(inplace=True)))
        self.apply(he_init)
        self.to(memory_format=torch.channels_last)

    def spectrogram(self, x: Tensor) -> Tensor:
        """(B, 1, T) -> (B, bands, frames); of the samples that fill no whole frame, nothing."""
        if not torch.jit.is_scripting():
            if not torch.compiler.is_exporting() and x.is_cpu and len(x) > 4:
                return torch.cat([self.spectrogram(rows) for rows in x.split(4)])  # in the cache
        frames = x[:, 0].unfold(1, self.window, self.hop) * self.taper  # (B, frames, window)
        spectrum = torch.view_as_real(torch.fft.rfft(frames))  # (B, frames, bins, 2)
        power = spectrum[..., 0].square() + spectrum[..., 1].square()
        return torch.log1p(1e4 * (power @ self.filters)).transpose(1, 2)

    def front(self, x: Tensor) -> Tensor:
        """What the blocks are given: (B, 1, T) -> (B, branches, bands, frames)."""
        _check_windows(x, self.input_samples)
        if not torch.jit.is_scripting():
            if torch.is_autocast_enabled(x.device.type):
                # half precision would round the product with the filters
                with torch.autocast(x.device.type, enabled=False):
                    return self.normalise(self.spectrogram(x))
        return self.normalise(self.spectrogram(x))

    def normalise(self, spectrogram: Tensor) -> Tensor:
        """(B, bands, frames) -> (B, branches, bands, frames)."""
        x = self.scales(spectrogram.repeat(1, self.branches, 1).unsqueeze(3))
        return x.unflatten(1, (self.branches, -1)).squeeze(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.front(x))  # (B, C, bands', frames')
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

# ------------------------------------------------------------------------ what all encoders share

class Projector(nn.Module):
    """z = W2 ReLU(W1 h), 512-512-128, no biases (section 3.3): for the loss; all else uses h.

    >>> Projector(512)(torch.zeros(2, 512)).shape
    torch.Size([2, 128])"""

    def __init__(self, in_dim: int = 512, out_dim: int = 128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, in_dim, bias=False), nn.ReLU(),
                                    nn.Linear(in_dim, out_dim, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)

ENCODERS = {c.name: c for c in (SampleCNN, SampleCNNLarge, CPC, MelCNN)}

def build_encoder(name: str, **sizes) -> nn.Module:
    """A new encoder by name, with He initialisation from torch's current generator."""
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; there are: {', '.join(ENCODERS)}")
    return ENCODERS[name](**sizes)

class Levels(nn.Module):
    """Every block's mean and maximum over time, in place of the last block's output alone.

    It takes an encoder that has `front` and `blocks`, folded or not, and is an encoder itself.

    >>> Levels(SampleCNN(width=0.125)).eval()(torch.zeros(2, 1, 59049)).shape
    torch.Size([2, 736])
    """

    def __init__(self, encoder: nn.Module):
        super().__init__()
        if not hasattr(encoder, "blocks"):
            raise ValueError(f"{encoder.name} has no blocks whose levels could be taken")
        self.encoder = encoder
        self.name = f"{encoder.name} levels"
        self.sizes = encoder.sizes
        self.input_samples = encoder.input_samples
        self.out_dim = sum(2 * block[0].out_channels for block in encoder.blocks)

    def forward(self, x: Tensor) -> Tensor:
        levels: list[Tensor] = []
        x = self.encoder.front(x)
        for block in self.encoder.blocks:
            x = block(x)
            levels.append(x.mean((2, 3)))
            levels.append(x.amax((2, 3)))
        return torch.cat(levels, 1)  # (B, D)

class BatchNormOverProcesses(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes (section 3.2), in training, on any device.

    Sums are taken in float64. The gradient is exact: through mean and variance, to the inputs of
    all processes, which hold as many rows each."""

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
    """Every batch norm takes its statistics over all processes from now on (section 3.2)."""
    if not dist.is_initialized():
        return module
    kernels = load_beside("kernels")
    if torch.device(device).type == "cuda" and not (kernels and kernels.gpu_passes()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # which refuses a CPU
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = BatchNormOverProcesses  # the same parameters, another forward pass
    return module

# ------------------------------------------------------------------------------- the encoder file

FORMAT = "clmr-encoder-1"
TAGGER = "clmr-tagger-1"

def weights_sha256(module: nn.Module) -> str:
    """sha256 over names, shapes and values of all parameters and buffers: an encoder's identity."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        value = value.float() if value.is_floating_point() else value  # saved in any, loaded so
        digest.update(f"{key} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

def read_checkpoint(path) -> dict:
    """The dict that a file of torch.save holds, ours or a stranger's; every byte is verified.

    Raises: FileNotFoundError; ValueError with one line, whatever the file holds."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of an encoder.pt, "
                                "e.g. runs/NAME/encoder.pt")
    try:
        files = load_beside("formats.files")
        content = files.read(path) if files else torch.load(path, "cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dict")
        return dict(content)
    except Exception as error:  # of a dozen types, for one fact: this is no file of ours
        raise ValueError(f"{path} cannot be read: {first_line(error)[:150]}; expected an "
                         "encoder.pt, or a checkpoint of the authors") from None

def _save(path, encoder, content):
    state = {key: value.detach().cpu().clone() for key, value in encoder.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({**content, "state": state, "weights_sha256": weights_sha256(encoder)}, buffer)
    write_atomically(path, buffer.getvalue())

def save_encoder(path, encoder: nn.Module, **info):
    """Write the encoder file; `info`: at least sample_rate, method, step; plain values only."""
    encoder = getattr(encoder, "_orig_mod", getattr(encoder, "module", encoder))  # compiled; DDP
    _save(path, encoder, {"format": FORMAT, **_identity(encoder), **info})

def load_encoder(path) -> tuple[nn.Module, dict]:
    """Read an encoder file, ours or the authors' (Lightning `model.encoder.*`, older `encoder.*`).

    Returns: the encoder in eval mode on the CPU, and the info it was saved with.
    Raises: FileNotFoundError; ValueError when the file is damaged, of another format, does not
        fit its encoder, or holds weights that are no numbers."""
    content = read_checkpoint(path)
    with _one_line(path):
        if content.get("format") == FORMAT:
            return _built(content)
        state = _authors_state(content.get("state_dict", content))
        if state is None:
            found = ", ".join(repr(key)[:40] for key in list(content)[:4])
            raise ValueError(f"no encoder file: expected format {FORMAT!r} or the authors' "
                             f"encoder.* keys, found {found}; give runs/NAME/encoder.pt "
                             "(checkpoint.pt is for continuing a run)")
        # they hold no sample rate: all that were released were trained at the paper's
        return _built({"format": "authors", "encoder": SampleCNN.name, "sizes": {"width": 1.0},
                       "state": state, "sample_rate": None, "method": "clmr", "data": None,
                       "step": content.get("global_step", 0), "fingerprint": None})

def save_tagger(path, encoder: nn.Module, head: nn.Module, tags, task: str, sample_rate: int,
                **info):
    """Write a tagger's weights, tagger.pt.

    Args:
        encoder: as built here, or its Levels.
        head: linear layers (B, D) -> (B, K) of logits, ReLU between them. What calibrates them,
            a scale and an offset a tag, belongs into the last one.
        tags, task, sample_rate: as in `export_torchscript`. info: further plain values."""
    levels = isinstance(encoder, Levels)
    encoder = encoder.encoder if levels else encoder
    weights = [{key: value.detach().cpu() for key, value in layer.state_dict().items()}
               for layer in head.modules() if isinstance(layer, nn.Linear)]
    _save(path, encoder, {"format": TAGGER, **_identity(encoder), "levels": levels, "head": weights,
                          "tags": list(tags), "task": task, "sample_rate": sample_rate, **info})

def load_tagger(path) -> tuple[nn.Module, dict]:
    """Read tagger.pt -> Exported, which gives probabilities, in eval mode, and the file's info.

    Raises: FileNotFoundError; ValueError as `load_encoder`."""
    content = read_checkpoint(path)
    with _one_line(path):
        if content.get("format") != TAGGER:
            raise ValueError(f"no tagger: expected format {TAGGER!r}; give a tagger.pt")
        weights = content.pop("head")
        encoder, info = _built(content)
        if not info["sample_rate"]:
            raise ValueError("damaged, or made by hand: it has no sample rate")
        encoder = Levels(encoder) if info["levels"] else encoder
        exports = _engine("exports")
        head = exports.head_of(weights, encoder.out_dim, _check_weights)
        parts = info["sample_rate"], head, info["tags"], info["task"]
        return exports.Exported(encoder, *parts).eval(), info

@contextlib.contextmanager
def _one_line(path):
    """What a damaged or crafted file makes our code raise, as one line that names it."""
    try:
        yield
    except Exception as error:
        lacks = "it lacks " if isinstance(error, KeyError) else ""
        raise ValueError(f"{path}: {lacks}{first_line(error)[:300]}") from None

def _built(content):
    """The encoder of a file's content, and the rest of it; nothing large before all fits."""
    state = content.pop("state")
    sha256 = content.pop("weights_sha256", None)  # older files have none
    with torch.device("meta"):
        wanted = build_encoder(content["encoder"], **content["sizes"]).state_dict()
    _check_weights(state, wanted, f"{content['encoder']} {content['sizes']}")
    encoder = build_encoder(content["encoder"], **content["sizes"])
    encoder.load_state_dict(state)
    if sha256 not in (None, weights_sha256(encoder)):
        raise ValueError("damaged: its weights are not those that were saved")
    return encoder.eval(), {**content, **_identity(encoder)}

def _check_weights(state, wanted, what):
    if files := load_beside("formats.files"):
        files.check_weights(state, wanted, what)

def _identity(encoder):
    return {"encoder": encoder.name, "sizes": dict(encoder.sizes), "out_dim": encoder.out_dim,
            "input_samples": encoder.input_samples}

def _authors_state(state):
    """The authors' names -> ours, or None: `sequential.I` (0..10), in old files `convI` (1..11)."""
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix("model.")
        if not name.startswith("encoder.") or name.startswith("encoder.fc."):
            continue
        found = re.fullmatch(r"encoder\.(?:sequential\.(\d+)|conv(\d+))\.(\w+\.\w+)", name)
        if not found:
            return None
        block = int(found[1] or int(found[2]) - 1)
        renamed[f"blocks.{block}.{found[3]}"] = value.unsqueeze(2) if value.dim() == 3 else value
    return renamed or None

# ------------------------------------------------ what formats/exports.py and formats/machine.py do

def export_torchscript(encoder: nn.Module, path, sample_rate: int, head: nn.Module = None, tags=(),
                       task: str = "none", info: dict = None) -> dict:
    """Write a TorchScript file and its sidecar, load it from the disk, and compare it with eager.

    Args:
        encoder: as built or loaded here, or its Levels; batch norms are folded in a copy.
        sample_rate: of the audio it expects, in Hz.
        head: optional module (B, D) -> (B, K) of logits; with it tags, the names of its outputs in
            order, and task: multilabel or singlelabel. info: further entries of the sidecar.
    Returns: the sidecar. `max_difference` is the largest absolute difference to eager (unfolded)
        at two lengths and two batch sizes, relative to the output's scale.
    Raises: ValueError if that is above 1e-4 (do not use the file), or tags or task do not fit."""
    return _export("torchscript", path, info, encoder, sample_rate, head, tags, task)

def export_program(encoder: nn.Module, path, sample_rate: int, info: dict = None) -> dict:
    """The same as a torch.export program, `(B, 1, input_samples) -> (B, D)` for any B."""
    return _export("program", path, info, encoder, sample_rate)

def export_onnx(encoder: nn.Module, path, sample_rate: int, head: nn.Module = None, tags=(),
                task: str = "none", info: dict = None) -> dict:
    """The same as ONNX, for any B; it needs onnx and onnxscript, and onnxruntime to compare."""
    return _export("onnx", path, info, encoder, sample_rate, head, tags, task)

def _export(kind, path, info, *parts):
    module = _engine("exports").Exported(*parts)
    sha256 = weights_sha256(module.encoder if module.task == "none" else module)
    return _engine("exports").write(kind, module, Path(path), {"sha256": sha256, **(info or {})},
                                    write_atomically)

def _engine(part):
    found = load_beside(f"formats.{part}")
    if found is None:
        raise ImportError(f"this needs formats/{part}.py: put formats/ beside model.py")
    return found

ENGINE = {"Exported": "exports", "fold_batch_norm": "exports", "tune_allocator": "machine",
          "choose_device": "machine", "choose_amp": "machine", "autocast": "machine",
          "versions": "machine", "code_version": "machine", "Help": "help"}

def __getattr__(name):
    """Names of this file that stand in formats/: model.choose_device, model.autocast, ..."""
    if name not in ENGINE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_engine(ENGINE[name]), name)

def write_atomically(path, data: bytes):
    """Write `data` under a temporary name in the same folder, flush it to the disk, then move it
    into place: a reader sees the old file or the new one, whatever happens in between."""
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
    """What an error says, in one line: `first_line(MemoryError())` is 'MemoryError'."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

# --- program: it needs no sibling

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="model.py", description="Print an encoder layer by layer, or export one.",
        usage="python model.py [--encoder NAME | --ckpt FILE [--out DIR]]   (--help lists all)",
        allow_abbrev=False)
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=list(ENCODERS), default="samplecnn", help="shown (default: samplecnn)")
    add("--width", type=float, default=1.0, help="factor on all channels (default: 1)")
    add("--ckpt", metavar="FILE", help="an encoder.pt or tagger.pt instead of a new encoder")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="write encoder.ts and .pt2, or tagger.ts, here (with --ckpt)")
    add("--onnx", action="store_true", help="and encoder.onnx or tagger.onnx (with --out)")
    return parser

def load_any(path):
    """What encoder.pt or tagger.pt holds, as Exported."""
    if read_checkpoint(path).get("format") == TAGGER:
        return load_tagger(path)[0]
    encoder, info = load_encoder(path)
    return _engine("exports").Exported(encoder, info["sample_rate"] or 0)

def export_all(module, out: Path, with_onnx: bool):
    """Write the exports of an encoder or a tagger, a line each."""
    parts = [module.encoder, module.sample_rate]
    kinds = {"encoder.ts": "torchscript", "encoder.pt2": "program", "encoder.onnx": "onnx"}
    if module.task != "none":
        parts += [module.head, module.tags, module.task]
        kinds = {"tagger.ts": "torchscript", "tagger.onnx": "onnx"}
    for name, kind in kinds.items():
        if kind != "onnx" or with_onnx:
            difference = _export(kind, out / name, None, *parts)["max_difference"]
            print(f"{out / name}: largest difference to eager {difference}")

def main(argv=None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.out and not args.ckpt:
        parser.error("--out exports a trained encoder: name it with --ckpt runs/NAME/encoder.pt")
    if args.onnx and not args.out:
        parser.error("--onnx says what to export: name the folder with --out DIR")
    if args.ckpt and not Path(args.ckpt).exists():
        parser.error(f"{args.ckpt}: no such file")
    try:
        module = load_any(args.ckpt) if args.ckpt else None
        encoder = module.encoder if module else build_encoder(args.encoder, width=args.width)
        print(_engine("exports").table(encoder))
        if args.out and not module.sample_rate:
            raise ValueError(f"{args.ckpt} does not say its sample rate (an authors' checkpoint): "
                             f"export it by evaluate.py --ckpt {args.ckpt} --data NAME")
        if args.out:
            export_all(module, Path(args.out), args.onnx)
        return 0
    except (ValueError, OSError, ImportError) as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.exit(main())
