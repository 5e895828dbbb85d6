"""Batch norm, max-pool 2 x 2 and ReLU of model.MelCNN's blocks on a CPU: the same numbers.

What it computes. All of a block in training but its convolution, forward and backward, with the
batch's statistics or those of all processes (section 3.2), by block.c.

Why it is faster. A first block of few channels is 45 MB in bfloat16 for 96 pairs, four times what
is left after its pool. torch's layers pass over it a dozen times, and are slow where the channels,
innermost, fill no vector. Here it is read twice going forward: for the statistics; then for each
window's maximum, taken before the norm (where its weight is negative, the minimum), so that a
quarter is left to normalise. Going backward it is read and written once: the gradient is affine in
x, and at each maximum there is the incoming gradient more. Of the layers' outputs, x, the maxima
and their places are kept.

The plain way: the layers themselves, with which tests/test_kernels_cpu.py compares. Two choices
differ: of numbers that bfloat16 rounds to one, the norm's weight being 0 among the causes, torch's
pool takes the first, and this one the largest before the norm.
By how much it is faster: kernels/__init__.py.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import compiled, cpu

POOL = {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False}
SUMS = ("moments", "gradient_sums")  # functions that give sums
KINDS = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class Size(ctypes.Structure):
    """As in block.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "height", "width", "channels")]


def fits(block: nn.Sequential, x: Tensor) -> bool:
    """Can block.c go on from x (B, C, H, T), what the convolution of such a block gives?"""
    if len(block) != 4 or type(x) is not Tensor or x.device.type != "cpu":
        return False
    if torch.compiler.is_compiling():
        return False  # torch.compile makes passes of its own from the layers
    norm, pool = block[1:3]
    usual = isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats
    if not usual or norm.momentum is None or norm.weight.dtype != torch.float32:
        return False
    form = [getattr(pool, name, None) for name in POOL]
    whole = type(pool) is nn.MaxPool2d and form == list(POOL.values()) and min(x.shape[2:]) > 1
    known = x.dtype in KINDS and x.shape[1] % 8 == 0 and len(x) > 0
    return whole and known and library(x) is not None


def library(x: Tensor):
    """block.c by the widest vectors that x's channels fill."""
    return compiled.library("block.c", 16 if x.shape[1] % 16 == 0 else 8)


def pivot_of(norm: nn.Module) -> Tensor:
    """What sums are taken about, (C,), the same in all processes: near the mean nothing cancels."""
    return norm.running_mean.nan_to_num(0, 0, 0)


def statistics(sums: Tensor, norm: nn.Module) -> cpu.Statistics:
    """Of the batch, this process's or all processes'; the running ones are moved.

    Args: sums (3, C) float64 of this process's ones, x - pivot_of(norm) and its square."""
    count, first, second = cpu.summed(sums, cpu.over_processes(norm))
    apart = first / count
    mean = pivot_of(norm) + apart
    var = (second / count - apart.square()).clamp_min(0)
    cpu.note_statistics(norm, mean, var, count)
    return cpu.Statistics(count, mean, (var + norm.eps).rsqrt())


class PoolStep(torch.autograd.Function):
    """x (B, C, H, T) of a convolution, weight and bias (C,), the norm -> (B, C, H / 2, T / 2)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, norm) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        sums = call("moments", (x,), x, (pivot_of(norm).float(),))
        ones = torch.full_like(sums[:1], x.numel() / x.shape[1])
        found = statistics(torch.cat([ones, sums]), norm)
        scale = weight * found.inverse.to(weight)
        shift = bias - (found.mean * found.inverse * weight).to(bias)
        rows, channels, height, width = x.shape
        out = torch.empty(rows, channels, height // 2, width // 2, dtype=x.dtype,
                          device=x.device, memory_format=torch.channels_last)
        best = torch.empty_like(out)
        which = torch.empty_like(out, dtype=torch.uint8)
        call("pool", (x,), x, (scale, shift, out, best, which))
        ctx.save_for_backward(x, best, which, scale)
        ctx.found = found
        ctx.everywhere = cpu.over_processes(norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, best, which, scale = ctx.saved_tensors
        found = ctx.found
        grad = grad.contiguous(memory_format=torch.channels_last)
        total, product = call("gradient_sums", (grad, best, which), x)
        # the sum of the gradient times normalised x
        along = (product - found.mean * total) * found.inverse
        means = cpu.summed(torch.stack([total, along]), ctx.everywhere) / found.count
        slope = -scale * found.inverse * means[1]
        offset = -scale * means[0] - slope * found.mean
        of_x = torch.empty_like(x)
        call("spread", (grad, x, which), x, (scale, slope.float(), offset.float(), of_x))
        return of_x, along.float(), total.float(), None


def call(name: str, ahead, x: Tensor, after=()) -> Tensor:
    """block.c's function on all rows, some of them on each of torch's threads.

    Args: ahead, after: its tensors before and after the size, which is x's; those of more than one
        axis are cut by rows. Returns: sums (2, C) float64, of the functions of SUMS."""
    function = getattr(library(x), f"{name}_{KINDS[x.dtype]}")
    parts = min(torch.get_num_threads(), len(x))
    edges = [len(x) * k // parts for k in range(parts + 1)]
    sums = torch.empty(parts, 2, x.shape[1], dtype=torch.float64, device=x.device)

    def run(k):
        rows = slice(edges[k], edges[k + 1])
        size = Size(edges[k + 1] - edges[k], *x.shape[2:], x.shape[1])
        before, behind = (
            [pointer(t[rows] if t.dim() > 1 else t) for t in tensors] for tensors in (ahead, after)
        )
        last = [pointer(sums[k])] if name in SUMS else []
        function(*before, ctypes.byref(size), *behind, *last)

    if parts == 1:
        run(0)
    else:
        list(threads(parts).map(run, range(parts)))
    return sums.sum(0)


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Of an image, which is channels-last, or of what has fewer axes."""
    return compiled.address(tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor)


@lru_cache(maxsize=1)
def threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count)
