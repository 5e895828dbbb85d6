"""Encoders of CLMR, the projector, and the files they live in (Spijkervet & Burgoyne, ISMIR 2021, sections 3.3 and 3.5).

    python model.py                                  # the layer / shape / parameter table of the paper's SampleCNN
    python model.py --encoder cpc
    python model.py --ckpt runs/mtat/encoder.pt --out exported/      # encoder.ts and encoder.pt2 with their sidecars

This file needs torch alone; for training on a GPU it uses model_gpu.py, if that lies beside it.
Dimensions: B batch, C channels, T samples or steps, D features, P projection, K tags.

An encoder takes `(B, 1, input_samples)` audio in [-1, 1], gives `(B, out_dim)` features, and has `name` and `sizes`.

Files:
  encoder.pt    {"format", "state", "encoder", "sizes", "sample_rate", "input_samples", "out_dim", "method", "step", ...}:
                only tensors, numbers, strings, lists and dicts, so `torch.load(weights_only=True)` reads it
  encoder.ts    TorchScript: m(audio (B, 1, T)) -> (B, D), m.frames(audio, hop) -> (B, n, D); m.sample_rate, m.input_samples
  tagger.ts     the same with (B, K) probabilities, and m.tags
  encoder.pt2   torch.export program of one window: (B, 1, input_samples) -> (B, D)
  *.json        beside each export, and inside it: sample rate, input samples, dimensions, tags in order, task, versions, sha256
                of the weights (an encoder's own, the same in .ts and .pt2); beside it also max_difference, found on reloading
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
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

# -------------------------------------------------- The machine: three choices that every script makes in the same way

def tune_allocator():
    """Keep freed memory in the process (glibc only; elsewhere it does nothing). Call it before the first large tensor.

    glibc returns every large block to the system at each free, and half of a training step on the CPU is then spent on
    page faults. Both calls are needed; the heap grows by fragments, which jemalloc without decay avoids."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large request
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back


def choose_device(name="auto") -> torch.device:
    """`auto`, `cpu` or `cuda` -> device; in a torchrun process, `cuda` is the GPU of that process.

    >>> choose_device("cpu")
    device(type='cpu')"""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; type --device cpu, or leave it at auto")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # it is on by default: float32 convolutions with errors of 1e-3
    return device


def choose_amp(device, amp="auto") -> str:
    """`auto` -> `bf16` where the processor multiplies bfloat16 natively (AVX-512 BF16, AMX, Ampere GPUs or later), else `off`."""
    device = torch.device(device)
    if amp == "auto":
        if device.type == "cuda":
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return "bf16" if able.get("avx512_bf16") or able.get("amx_bf16") else "off"
    if amp not in ("off", "bf16", "fp16"):
        raise ValueError(f"--amp must be auto, off, bf16 or fp16, not {amp!r}")
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 is for GPUs; on the CPU type --amp bf16 or --amp off")
    return amp


def autocast(device, amp="auto"):
    """The context of mixed precision: `with autocast(device, "auto"): h = encoder(x)`; see `choose_amp`."""
    amp = choose_amp(device, amp)
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=amp != "off")


# ----------------------------------------------------------------------------------------- SampleCNN 3^9 (section 3.3)

def he_init(module):
    """He initialisation of every convolution (section 3.7), biases at zero. Use with `encoder.apply(he_init)`."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


class Block(nn.Sequential):
    """conv, batch norm, in the nine blocks max-pool 3, ReLU: (B, C, 1, T) -> (B, C', 1, T').

    Training on a CPU in float32 or float64 goes through `StemStep` and `TrainingStep`: the same numbers, exact statistics,
    less time and memory. So does, anywhere, a block with `recompute`: it keeps its input and output alone for the backward pass.
    On a GPU training goes through `StemStep` and model_gpu.BlockStep, in about a quarter of the time."""

    recompute = False
    over_processes = False  # statistics over all processes; set by `synchronise`

    def forward(self, x):
        conv, norm, pool = self[0], self[1], 3 if len(self) == 4 else 1
        frozen = not (self.training and norm.training)  # as when fine-tuning with the batch norms in eval mode
        plain = type(norm) is nn.BatchNorm2d  # or torch's SyncBatchNorm: then its statistics are torch's affair, or `synchronise`'s
        on_cpu = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        own_way = plain and (self.over_processes or self.recompute or on_cpu) or self.over_processes and self.recompute
        in_kernels = x.is_cuda and plain and norm.weight.dtype == torch.float32 and not (frozen or self.recompute or x.shape[3] % pool)
        parameters = conv.weight, conv.bias, norm.weight, norm.bias, norm
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():  # Triton launches on the current one
            kernels = gpu_kernels() if in_kernels else None
            if not kernels and (frozen or not own_way):
                return super().forward(x)
            if x.shape[1] == 1:
                return StemStep.apply(x, *parameters, self.over_processes)
            if kernels:
                return kernels.BlockStep.apply(x, *parameters, pool, half_or_full(x, conv.weight), self.over_processes)
            return TrainingStep.apply(x, *parameters, len(self) == 4, self.recompute, self.over_processes)


@functools.lru_cache(maxsize=1)
def gpu_kernels():
    """model_gpu.py, a GPU's faster way through the blocks; None, and a warning, where it cannot be used."""
    try:
        import model_gpu
        model_gpu.stem_moments(torch.ones(2, 4, device="cuda"))
        return model_gpu
    except Exception as error:  # no Triton; no C compiler or headers of Python, which it needs; an unknown GPU: all of types of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"training on this GPU goes through torch's own layers, at about a quarter of the speed: model_gpu.py cannot be used ({reason})", stacklevel=2)


def as_rows(image):
    """(b, C, 1, T) -> (b, T, C); of a channels-last image, a view."""
    return image.squeeze(2).transpose(1, 2)


def as_image(rows):
    """(b, T, C) -> (b, C, 1, T), a view that is channels-last."""
    return rows.transpose(1, 2).unsqueeze(2)


def half_or_full(x, weight):
    """The type that a convolution of x would compute in."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype


def at_once(x, size):
    """How many examples of `size` numbers to work on together: a CPU's cache holds them, on a GPU they fill it."""
    return max(1, (1 << (20 if x.device.type == "cpu" else 26)) // size)


def note_statistics(norm, mean, var, count):
    """Move the running mean and (unbiased) variance as nn.BatchNorm2d does."""
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
    norm.running_var.lerp_((var * count / (count - 1).clamp_min(1)).to(norm.running_var), norm.momentum)


class StemStep(torch.autograd.Function):
    """The stem's forward and backward pass in training, without writing down anything large but its output.

    Its windows r of 3 samples do not overlap, so the convolution is y = W r, and a channel's mean and variance over the batch
    follow from the mean and the 3 x 3 covariance of the windows: W E[r] and W Cov[r] W^T (summed up in float64, and over all
    processes). Normalising is then part of the one product. Backward, all gradients follow from sums over g and g r^T, where
    g is the incoming gradient where the ReLU was open. Rows: N = B T of (1, r), (N, 4)."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, norm, over_processes):
        rows = F.pad(x.reshape(-1, 3).to(gamma.dtype), (1, 0), value=1.0)  # (N, 4)
        kernels = gpu_kernels() if rows.is_cuda and rows.dtype == torch.float32 else None
        own = kernels.stem_moments(rows) if kernels else rows.double().T @ rows.double()  # (4, 4): count, sums, sums of products
        everybody = own.clone()
        if over_processes:
            dist.all_reduce(everybody)
        count, centre = everybody[0, 0], everybody[0, 1:] / everybody[0, 0]
        w = weight.detach().double().flatten(1)  # (C, 3)
        mean, var = w @ centre, ((w @ (everybody[1:, 1:] / count - centre.outer(centre))) * w).sum(1).clamp_min(0)
        note_statistics(norm, mean + bias, var, count)
        inverse = (var + norm.eps).rsqrt()
        scale, dtype = gamma * inverse, half_or_full(x, weight)
        shift, folded = (beta - mean * scale).to(rows.dtype), (w * scale[:, None]).T.to(rows.dtype).contiguous()  # (C,), (3, C)
        out = x.new_empty(len(rows), len(w), dtype=dtype)
        ctx.size = at_once(x, len(w))
        if kernels:
            kernels.stem(rows, folded, shift, out)
        else:
            for part, y in zip(rows.split(ctx.size), out.split(ctx.size)):
                torch.addmm(shift.to(dtype), part[:, 1:].to(dtype), folded.to(dtype), out=y).relu_()
        ctx.save_for_backward(rows, w, gamma, mean, inverse, own, count, folded, shift, out)
        ctx.over_processes, ctx.shape, ctx.kernels = over_processes, x.shape, kernels
        return as_image(out.view(len(x), -1, len(w)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, w, gamma, mean, inverse, own, count, folded, shift, out = ctx.saved_tensors
        sums, dx, scale, grad = own.new_zeros(4, len(w)), [], gamma * inverse, as_rows(grad).flatten(0, 1)  # (N, C)
        total, in_kernel = own[0, 1:], ctx.kernels and not ctx.needs_input_grad[0]  # (3,), the sum of all r
        if in_kernel:
            sums = ctx.kernels.stem_sums(rows, grad.contiguous(), folded, shift)
        for part, g, y in () if in_kernel else zip(*(t.split(ctx.size) for t in (rows, grad, out))):
            g = torch.ops.aten.threshold_backward(g, y, 0).to(rows.dtype)
            sums += part.T @ g
            if ctx.needs_input_grad[0]:
                dx.append(g @ folded.T)
        dbeta, products = sums[0], sums[1:].T  # (C,), (C, 3): sums of g and of g r^T
        dgamma = inverse * ((w * products).sum(1) - mean * dbeta)  # of g times the normalised y
        everybody = torch.stack([dbeta, dgamma])
        if ctx.over_processes:
            dist.all_reduce(everybody)
        of_g, of_gy = everybody / count  # dy = scale (g - of_g - (y - mean) inverse of_gy)
        normal = inverse[:, None] * (w @ own[1:, 1:] - mean.outer(total))  # sum of normalised y times r^T
        dw = (scale[:, None] * (products - of_g.outer(total) - of_gy[:, None] * normal)).to(gamma)[:, None, None]  # (C, 1, 1, 3)
        if dx:
            y_part = scale * of_gy * inverse
            constant, linear = (y_part * mean - scale * of_g) @ w, -(w.T * y_part) @ w
            dx = (torch.cat(dx) + torch.addmm(constant, rows[:, 1:].to(linear), linear).to(rows)).view(ctx.shape)
        return dx if ctx.needs_input_grad[0] else None, channels_last(dw), torch.zeros_like(gamma), dgamma.to(gamma), dbeta.to(gamma), None, None


def channels_last(dw):
    """A copy of a weight's gradient in the weights' layout, as DDP's buckets have it."""
    return torch.empty_like(dw, memory_format=torch.channels_last).copy_(dw)


class TrainingStep(torch.autograd.Function):
    """A block's forward and backward pass in training; on a CPU a few examples at a time, so that they stay in its cache.

    torch's layers each pass over the whole batch; its batch norm adds up long channels-last columns one number after the
    other (gradients off by up to 3 % against float64; here 2e-5), and its weight gradient of channels-last float32
    convolutions is fifteen times slower than a matrix product on processors without AVX-512. What is done instead:
      - Batch norm does not decrease where its weight is positive, so max-pool can take the convolution's output, and a third
        of the numbers is left to normalise. The sign of a negative weight goes into the convolution.
      - Sums go over a group of examples in the input's type, then on in float64, and, with `over_processes`, over all
        processes (section 3.2), which torch's SyncBatchNorm refuses to do on a CPU.
      - The gradient of the convolution's output y is affine in y, plus the incoming gradient at the maxima; per group it is
        made and turned into the gradients of weights and input. The bias moves the running mean alone: its gradient is zero.
    Rows are (b, T, C), views of channels-last (b, C, 1, T)."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, norm, pool, recompute, over_processes):
        dtype = half_or_full(x, weight)
        sign = torch.where(gamma < 0, -1.0, 1.0).to(weight)
        w, x = (weight * sign.view(-1, 1, 1, 1)).to(dtype), as_rows(x.to(dtype))
        ctx.size = at_once(x, x.shape[1] * len(w))  # examples of a group
        kept, pivot, sums = [], None, x.new_zeros(2, len(w), dtype=torch.float64)
        top = x.new_empty(len(x), x.shape[1] // (3 if pool else 1), len(w))  # (B, T', C')
        for rows, highest in zip(x.split(ctx.size), top.split(ctx.size)):
            y = TrainingStep.convolve(rows, w)  # (b, T, C')
            high = y.to(gamma.dtype)
            pivot = high.mean((0, 1)) if pivot is None else pivot  # sums of squares cancel where y hardly varies, as early on
            high = high - pivot
            sums += torch.stack([high.sum((0, 1)), high.square_().sum((0, 1))])
            kept += [y] if pool and not recompute else []
            torch.amax(y.unflatten(1, (-1, 3 if pool else 1)), 2, out=highest)
        pivot, count = pivot.double(), sums.new_full((), x.shape[0] * x.shape[1])
        sums[1] += 2 * pivot * sums[0] + count * pivot.square()
        sums[0] += count * pivot
        if over_processes:
            count *= dist.get_world_size()
            dist.all_reduce(sums)
        mean = sums[0] / count
        var = (sums[1] / count - mean.square()).clamp_min(0)
        note_statistics(norm, mean * sign + bias, var, count)
        inverse = (var + norm.eps).rsqrt()
        scale = gamma.abs() * inverse
        out = torch.addcmul((beta - mean * scale).to(gamma.dtype), top, scale.to(gamma.dtype)).relu_().to(dtype)
        ctx.save_for_backward(x, w, sign, gamma, mean, inverse, count, out, top if pool else None, *kept)
        ctx.pool, ctx.over_processes = pool, over_processes
        return as_image(out)  # (B, C', 1, T')

    @staticmethod
    def convolve(rows, w):
        return as_rows(F.conv2d(as_image(rows), w, padding=(0, 1)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w, sign, gamma, mean, inverse, count, out, top, *kept = ctx.saved_tensors
        high, parts, masked = gamma.dtype, x.split(ctx.size), []
        sums, dw = x.new_zeros(2, len(w), dtype=torch.float64), x.new_zeros(3, *w.shape[:2], dtype=high)
        centre, dx = mean.to(high), torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for i, (g, o) in enumerate(zip(as_rows(grad).split(ctx.size), out.split(ctx.size))):
            t = top[i * ctx.size : (i + 1) * ctx.size] if ctx.pool else TrainingStep.convolve(parts[i], w)
            masked.append(torch.ops.aten.threshold_backward(g, o, 0).to(high))  # (b, T', C')
            sums += torch.stack([masked[i].sum((0, 1)), (masked[i] * (t - centre)).sum((0, 1))])
        sums[1] *= inverse
        own = sums.clone()
        if ctx.over_processes:
            dist.all_reduce(sums)
        scale = gamma.abs() * inverse
        slope = -scale * inverse * sums[1] / count
        offset, slope, scale = (-scale * sums[0] / count - slope * mean).to(high), slope.to(high), scale.to(high)
        back = w.flip(3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        for i, rows in enumerate(parts):
            y = (kept[i] if kept else TrainingStep.convolve(rows, w)).to(high)
            d, g = torch.addcmul(offset, y, slope), masked[i].mul_(scale)  # (b, T, C')
            if ctx.pool:
                g, y = as_image(g), as_image(y)
                at = F.max_pool2d(y, (1, 3), return_indices=True)[1]
                g = as_rows(torch.ops.aten.max_pool2d_with_indices_backward(g, y, (1, 3), (1, 3), (0, 0), (1, 1), False, at))
            d = d.add_(g).to(w.dtype)
            for tap, (late, early) in enumerate(((1, 0), (0, 0), (0, 1))):  # rows left out at the start of d, of x: t - 1, t, t + 1
                of_d, of_x = d[:, late : d.shape[1] - early], rows[:, early : d.shape[1] - late]
                if d.dtype == high:
                    dw[tap].addbmm_(of_d.transpose(1, 2), of_x)
                else:  # one product, which adds up in float32
                    dw[tap] += of_d.flatten(0, 1).T @ of_x.flatten(0, 1)
            if dx is not None:
                dx[i * ctx.size : (i + 1) * ctx.size] = TrainingStep.convolve(d, back)
        dw = (dw * sign.view(1, -1, 1)).permute(1, 2, 0).unsqueeze(2)  # (C', C, 1, 3)
        return None if dx is None else as_image(dx), channels_last(dw), torch.zeros_like(gamma), own[1] * sign, own[0], None, None, None, None


class SampleCNN(nn.Module):
    """SampleCNN on raw audio: a stem conv(k3, s3), nine blocks [conv k3, BN, ReLU, max-pool 3], a top conv.

    Args:
        channels: of the stem, the nine blocks and the top; the paper's by default.
        width: a factor on all of them (1.0 is the paper); 0.125 makes a network that trains in minutes on a CPU.

    `forward(x (B, 1, 3**10)) -> (B, D)`. Autograd, AMP, torch.export and, by `export_torchscript`, TorchScript are supported; statistics of the
    batch are taken in training mode, so only there a row depends on the others.

    The convolutions are written as 1 x 3 kernels over (B, C, 1, T) and kept channels-last: the same arithmetic, faster.

    >>> SampleCNN(width=0.125).eval()(torch.zeros(2, 1, 59049)).shape
    torch.Size([2, 64])
    """

    name = "samplecnn"
    channels = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512)

    def __init__(self, width: float = 1.0):
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be a positive factor (1.0 is the paper's network), not {width}")
        sizes = [max(8, 8 * round(c * width / 8)) for c in self.channels]
        self.sizes = {"width": width}
        self.out_dim = sizes[-1]
        self.input_samples = 3 ** (len(sizes) - 1)  # one stride of 3 and a max-pool of 3 in every block: 3^10 = 59,049
        self.blocks = nn.Sequential(self._block(1, sizes[0], stride=3),
                                    *[self._block(i, o, pool=True) for i, o in zip(sizes[:-2], sizes[1:-1])],
                                    self._block(sizes[-2], sizes[-1]))
        self.apply(he_init)
        self.to(memory_format=torch.channels_last)  # the weights decide the layout: an input of one channel is ambiguous

    @staticmethod
    def _block(c_in, c_out, stride=1, pool=False):
        conv = nn.Conv2d(c_in, c_out, (1, 3), stride=(1, stride), padding=(0, 1 if stride == 1 else 0))
        # max-pool before ReLU: the two commute, and a third of the numbers has to be rectified and kept
        return Block(conv, nn.BatchNorm2d(c_out), *([nn.MaxPool2d((1, 3))] if pool else []), nn.ReLU(inplace=True))

    def recompute(self, blocks: int):
        """Keep less of the first `blocks` blocks for the backward pass, so that larger batches fit (see `Block`)."""
        for i, block in enumerate(self.blocks):
            block.recompute = i < blocks

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self.input_samples:
            raise ValueError(f"expected mono audio of shape (B, 1, {self.input_samples}), got {list(x.shape)}")
        return self.blocks(x.unsqueeze(2)).flatten(1)  # (B, 1, 1, T) -> (B, D, 1, 1) -> (B, D)


class SampleCNNLarge(SampleCNN):
    """The larger SampleCNN (section 3.3's variant, 7,289,088 parameters): more channels in the upper blocks, D = 1024."""

    name = "samplecnn-large"
    channels = (128, 128, 128, 256, 256, 256, 512, 512, 512, 1024, 1024)


# ------------------------------------------------- Contrastive Predictive Coding (section 3.5), the paper's comparison

class CPC(nn.Module):
    """CPC's encoder: seven strided convolutions (480 samples a frame) and a GRU whose state is the context.

    `context(x (B, 1, T)) -> z (B, n, 512), c (B, n, 256)`: frames and contexts; `forward(x) -> (B, D)` pools the contexts:
    `mean` (D = 256, the default) or `mean+last` (D = 512, the only reading that gives the paper's "512 dimensions").

    >>> z, c = CPC(width=0.125).context(torch.zeros(2, 1, 59049))
    >>> z.shape, c.shape
    (torch.Size([2, 124, 64]), torch.Size([2, 124, 32]))
    """

    name = "cpc"
    kernels = (10, 6, 4, 4, 4, 2, 2)
    strides = (5, 3, 2, 2, 2, 2, 2)
    paddings = (2, 2, 2, 2, 1, 1, 1)

    def __init__(self, width: float = 1.0, pool: str = "mean"):
        super().__init__()
        if not width > 0:
            raise ValueError(f"width must be a positive factor (1.0 is the paper's network), not {width}")
        if pool not in ("mean", "mean+last"):
            raise ValueError(f"pool must be mean or mean+last, not {pool!r}")
        frame_dim, context_dim = self.frame_dim, self.context_dim = [max(8, 8 * round(c * width / 8)) for c in (512, 256)]
        self.sizes, self.pool = {"width": width, "pool": pool}, pool
        self.out_dim = context_dim * (2 if pool == "mean+last" else 1)
        self.input_samples = SampleCNN(width=1 / 64).input_samples  # the two methods see the same windows
        layers, frames = [], self.input_samples
        for i, (k, s, p) in enumerate(zip(self.kernels, self.strides, self.paddings)):
            layers += [nn.Conv1d(1 if i == 0 else frame_dim, frame_dim, k, s, p), nn.ReLU(inplace=True)]
            frames = (frames + 2 * p - k) // s + 1
        self.frames_per_window = frames  # 124
        self.frames = nn.Sequential(*layers)
        self.gru = nn.GRU(frame_dim, context_dim, batch_first=True)
        self.apply(he_init)

    @torch.jit.export
    def context(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.frames(x).transpose(1, 2)  # (B, n, 512)
        if not torch.jit.is_scripting():
            if z.is_cuda and torch.is_autocast_enabled("cuda"):  # there autocast runs a GRU in float16, whatever type it was given
                with torch.autocast("cuda", enabled=False):
                    return z, self.gru(z.float())[0]
        return z, self.gru(z)[0]  # (B, n, 256)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] != self.input_samples:
            raise ValueError(f"expected mono audio of shape (B, 1, {self.input_samples}), got {list(x.shape)}")
        _, c = self.context(x)
        mean = c.mean(1)
        return torch.cat([mean, c[:, -1]], 1) if self.pool == "mean+last" else mean


class Projector(nn.Module):
    """z = W2 ReLU(W1 h), without biases (section 3.3): 512-512-128. The loss sees z, everything afterwards uses h.

    >>> Projector(512)(torch.zeros(2, 512)).shape
    torch.Size([2, 128])"""

    def __init__(self, in_dim: int = 512, out_dim: int = 128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_dim, in_dim, bias=False), nn.ReLU(), nn.Linear(in_dim, out_dim, bias=False))

    def forward(self, h: Tensor) -> Tensor:
        return self.layers(h)


ENCODERS = {c.name: c for c in (SampleCNN, SampleCNNLarge, CPC)}


def build_encoder(name, **sizes) -> nn.Module:
    """A new encoder by name, with He initialisation from torch's current generator.

    >>> sum(p.numel() for p in build_encoder("samplecnn").parameters())
    2368512
    """
    if name not in ENCODERS:
        raise ValueError(f"unknown encoder {name!r}; there are: {', '.join(ENCODERS)}")
    return ENCODERS[name](**sizes)


def synchronise(module: nn.Module, device) -> nn.Module:
    """Every batch norm of `module` takes its statistics over all processes from now on (section 3.2)."""
    for child in module.modules():
        if isinstance(child, Block):
            child.over_processes = dist.is_initialized()
    own_way = torch.device(device).type == "cpu" or gpu_kernels()  # the blocks' own passes
    return module if own_way else nn.SyncBatchNorm.convert_sync_batchnorm(module)


def fold_batch_norm(encoder: nn.Module) -> nn.Module:
    """A copy for inference with every batch norm folded into the convolution before it (float64 arithmetic, so that the
    outputs stay within 1e-6 of the unfolded encoder's). No parameter of `encoder` is changed."""
    dtype, encoder = next(encoder.parameters()).dtype, copy.deepcopy(encoder).double().eval()
    for parent in list(encoder.modules()):
        for name, block in parent.named_children():
            if isinstance(block, Block):
                setattr(parent, name, nn.Sequential(fuse_conv_bn_eval(block[0], block[1]), *block[2:]))
    return encoder.to(dtype).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------------------------------------------- The encoder file

FORMAT = "clmr-encoder-1"


def weights_sha256(module: nn.Module) -> str:
    """sha256 over names, shapes and values of all parameters and buffers: an encoder's identity."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path, data: bytes):
    """Write `data` under a temporary name in the same folder, flush it to the disk, then move it into place: a reader
    sees the old file or the new one, whatever happens in between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")  # the same each time: what a kill leaves, the next write takes away
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class _Inert(dict):
    """Stands in for any class that a foreign checkpoint names: takes whatever it is given and does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    __setstate__ = __init__


class _TensorsOnly:
    """A pickle module for foreign checkpoints, as safe as weights_only: tensors are rebuilt, every other name is inert."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            tensors = module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_tensor")
            if tensors or (module, name) == ("collections", "OrderedDict") or (module in ("torch", "torch.storage") and name.endswith("Storage")):
                return super().find_class(module, name)
            return _Inert

    @classmethod
    def load(cls, file, **kwargs):
        return cls.Unpickler(file, **kwargs).load()


def read_checkpoint(path) -> dict:
    """`torch.load(weights_only=True)` on the CPU, with errors a user can act on."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of an encoder.pt, e.g. runs/NAME/encoder.pt")
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # Lightning stores its own classes beside the weights
            content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_TensorsOnly)
    except Exception as error:  # torch raises half a dozen types for one fact: this is no file of ours
        raise ValueError(f"{path} cannot be read as a checkpoint ({(str(error).splitlines() or [type(error).__name__])[0][:120]}); "
                         "expected an encoder.pt that pretrain.py wrote, or a checkpoint of the authors") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected the dict of an encoder.pt")
    return content


def save_encoder(path, encoder: nn.Module, **info):
    """Write the encoder file (see the head of this file). `info`: at least sample_rate, method, step; plain values only."""
    plain = encoder.module if hasattr(encoder, "module") else encoder
    state = {k: v.detach().cpu().clone() for k, v in plain.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "encoder": plain.name, "sizes": dict(plain.sizes), "out_dim": plain.out_dim,
                "input_samples": plain.input_samples, **info, "state": state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_encoder(path) -> tuple[nn.Module, dict]:
    """Read an encoder file, ours or the authors' (Lightning `model.encoder.*`, older `encoder.*`).

    Returns: the encoder in eval mode on the CPU, and the info it was saved with. Raises: FileNotFoundError; ValueError when
    the file is of another format or does not fit its encoder."""
    content = read_checkpoint(path)
    if content.get("format") == FORMAT:
        info = {k: v for k, v in content.items() if k != "state"}
        encoder = build_encoder(content["encoder"], **content["sizes"])
        _fill(encoder, content["state"], path)
        return encoder.eval(), info
    theirs = _authors_keys(content.get("state_dict", content))
    if theirs is None:
        raise ValueError(f"{path} is no encoder file: expected format {FORMAT!r} or the authors' encoder.* keys, found {', '.join(map(str, list(content)[:4]))}; "
                         "give runs/NAME/encoder.pt (checkpoint.pt is for continuing a run)")
    encoder = SampleCNN()
    _fill(encoder, theirs, path)
    # the authors' checkpoints carry no sample rate: all of their released ones were trained at the paper's
    return encoder.eval(), {"format": "authors", "encoder": encoder.name, "sizes": encoder.sizes, "out_dim": encoder.out_dim,
                            "input_samples": encoder.input_samples, "sample_rate": None, "method": "clmr",
                            "step": int(content.get("global_step", 0)), "data": None, "fingerprint": None}


def _fill(encoder, state, path):
    missing, unexpected = set(encoder.state_dict()) - set(state), set(state) - set(encoder.state_dict())
    if missing or unexpected:
        raise ValueError(f"{path} does not fit {encoder.name} {encoder.sizes}: missing {sorted(missing)[:3]}, unexpected {sorted(unexpected)[:3]}")
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {encoder.name} {encoder.sizes}: {str(error).splitlines()[-1].strip()}") from None


def _authors_keys(state):
    """The authors' names -> ours, or None. Blocks are `sequential.I` (0..10) or, in the oldest files, `convI` (1..11)."""
    renamed = {}
    for key, value in state.items():
        name = key.removeprefix("module.").removeprefix("model.")
        if not name.startswith("encoder.") or name.startswith("encoder.fc."):
            continue
        found = re.fullmatch(r"encoder\.(?:sequential\.(\d+)|conv(\d+))\.(\w+\.\w+)", name)
        if not found:
            return None
        block = int(found[1] or int(found[2]) - 1)
        renamed[f"blocks.{block}.{found[3]}"] = value.unsqueeze(2) if value.dim() == 3 else value  # k -> 1 x k
    return renamed or None


# --------------------------------------------------------------------------------- Exports that work without this file

class Exported(nn.Module):
    """What encoder.ts and tagger.ts hold: windows, the encoder, an optional head, and the mean over windows.

        audio  |-- window 0 --|-- window 1 --|-- window 2 --| rest (less than a window: left out)
    """

    tags: list[str]
    sample_rate: int
    input_samples: int

    def __init__(self, encoder: nn.Module, sample_rate: int, head=None, tags=(), task: str = "none"):
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
            raise ValueError(f"expected mono audio (B, 1, T) with T >= {self.input_samples}, got {list(audio.shape)}")
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


def _finish_export(path, sidecar, pairs):
    """Compare (want, got) pairs of eager and reloaded outputs, note the largest difference, write the sidecar."""
    worst = max(((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item() for want, got in pairs)
    if not worst < 1e-4:
        raise RuntimeError(f"{path} differs from the eager encoder by {worst:.1e} (relative): do not use it, and report this")
    sidecar = {**sidecar, "max_difference": worst}
    write_atomically(f"{path}.json", (json.dumps(sidecar, indent=1, ensure_ascii=False) + "\n").encode())
    return sidecar


def versions() -> dict:
    """Versions that explain a number."""
    return {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}


def code_version() -> str:
    """The git commit of this file's folder, `+` when it has changes; `unknown` outside a repository or without git."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _sidecar(encoder, module, sample_rate, out_dim, tags, task, info):
    return {"sample_rate": int(sample_rate), "input_samples": encoder.input_samples, "out_dim": out_dim, "tags": list(tags), "task": task,
            "encoder": encoder.name, "sizes": encoder.sizes, "versions": versions(), "sha256": weights_sha256(module), **(info or {})}


def export_torchscript(encoder: nn.Module, path, sample_rate: int, head=None, tags=(), task="none", info=None) -> dict:
    """Write a TorchScript file and its .json sidecar, load it again from the disk, and compare it with eager at two
    lengths and two batch sizes.

    Args:
        encoder: as built or loaded here; batch norms are folded in a copy. head: optional module (B, D) -> (B, K) of logits.
        sample_rate: of the audio it expects, in Hz. tags: names of the K outputs, in order. task: multilabel or singlelabel.
    Returns: the sidecar. `max_difference` is the largest absolute difference to eager (unfolded), relative to the output's scale.
    Raises: RuntimeError if that is above 1e-4, which means that the file must not be used; ValueError for a head without its
    task, or with another number of outputs than tags."""
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    if head is not None:
        head = copy.deepcopy(head).cpu().float().eval()
        with torch.no_grad():
            width = head(torch.zeros(1, encoder.out_dim)).shape[1]
        if task not in ("multilabel", "singlelabel") or len(tags) != width:
            raise ValueError(f"a head of {width} outputs needs as many tags, and the task multilabel or singlelabel; got {len(tags)} and {task!r}")
    eager = Exported(encoder, sample_rate, head, tags, task).eval()
    plain = Exported(fold_batch_norm(encoder), sample_rate, head, tags, task).eval()
    sidecar = _sidecar(encoder, encoder if head is None else eager, sample_rate, encoder.out_dim if head is None else len(tags), tags, plain.task, info)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scripting is kept for the users who load it; encoder.pt2 is beside it
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(plain), buffer, _extra_files={"sidecar.json": json.dumps(sidecar)})
        write_atomically(path, buffer.getvalue())
        loaded = torch.jit.load(path)
    generator = torch.Generator().manual_seed(0)
    audio = [torch.rand(batch, 1, length, generator=generator) * 2 - 1
             for batch, length in ((1, encoder.input_samples), (3, 2 * encoder.input_samples + 1234))]
    with torch.no_grad():
        return _finish_export(path, sidecar, [(eager(x), loaded(x)) for x in audio])


def export_program(encoder: nn.Module, path, sample_rate: int, info=None) -> dict:
    """Write encoder.pt2, a torch.export program `(B, 1, input_samples) -> (B, D)` for any B, and its sidecar; checked the same way."""
    encoder = copy.deepcopy(encoder).cpu().float().eval()
    sidecar = _sidecar(encoder, encoder, sample_rate, encoder.out_dim, (), "none", info)
    audio = torch.rand(4, 1, encoder.input_samples, generator=torch.Generator().manual_seed(0)) * 2 - 1
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's own writer about its own buffers
        program = torch.export.export(fold_batch_norm(encoder), (audio[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, buffer, extra_files={"sidecar.json": json.dumps(sidecar)})
        write_atomically(path, buffer.getvalue())
        loaded = torch.export.load(path).module()
    with torch.no_grad():
        return _finish_export(path, sidecar, [(encoder(audio), loaded(audio))])


# --------------------------------------------------------------------------------------------------------- The command

def table(encoder: nn.Module) -> str:
    """One line per layer with its output shape and parameters, for one window."""
    lines, encoder = [], copy.deepcopy(encoder).eval()

    def note(name, m, _, out):
        shape = tuple((out[0] if isinstance(out, tuple) else out).shape)
        lines.append(f"{name:14s} {type(m).__name__:12s} {str(shape):24s} {sum(p.numel() for p in m.parameters()):>12,d}")

    for name, module in encoder.named_modules():
        if not list(module.children()):
            module.register_forward_hook(functools.partial(note, name))
    with torch.no_grad():
        encoder(torch.zeros(1, 1, encoder.input_samples))
    total = sum(p.numel() for p in encoder.parameters())
    return "\n".join([*lines, f"{encoder.name}: (B, 1, {encoder.input_samples}) -> (B, {encoder.out_dim}), {total:,d} parameters"])


def build_parser():
    parser = argparse.ArgumentParser(prog="model.py", description="Print an encoder layer by layer, or export one.", allow_abbrev=False,
                                     usage="python model.py [--encoder NAME | --ckpt FILE [--out DIR]]   (--help lists all)",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("model").add_argument
    add("--encoder", choices=list(ENCODERS), default="samplecnn", help="which encoder to print")
    add("--width", type=float, default=1.0, help="factor on all channels")
    add("--ckpt", metavar="FILE", help="an encoder.pt instead of a new encoder")
    parser.add_argument_group("run").add_argument("--out", metavar="DIR", help="write encoder.ts and encoder.pt2 here (with --ckpt)")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.out and not args.ckpt:
        parser.error("--out exports a trained encoder: name it with --ckpt runs/NAME/encoder.pt")
    if args.ckpt and not Path(args.ckpt).exists():
        parser.error(f"{args.ckpt}: no such file")
    try:
        encoder, info = load_encoder(args.ckpt) if args.ckpt else (build_encoder(args.encoder, width=args.width), {})
        print(table(encoder))
        if args.out:
            if info["sample_rate"] is None:
                raise ValueError(f"{args.ckpt} does not say its sample rate (an authors' checkpoint); export it with evaluate.py --ckpt {args.ckpt} --data NAME")
            for name, export in (("encoder.ts", export_torchscript), ("encoder.pt2", export_program)):
                sidecar = export(encoder, Path(args.out) / name, info["sample_rate"])
                print(f"{Path(args.out) / name}: largest difference to eager {sidecar['max_difference']:.1e}")
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"model.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
