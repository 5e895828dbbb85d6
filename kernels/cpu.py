"""SampleCNN's blocks in training on a CPU: the same numbers in less time and memory, by exact sums.

What it computes. A block is a convolution y = W x + b, batch norm with the statistics of the batch,
max-pool 3 (not in the first and the last block) and ReLU. `StemStep` is the first block, whose
windows of three samples do not overlap, `BlockStep` every other; both know forward and backward.

Why it is faster. torch's layers each pass over the whole batch, more than a gigabyte in the first
blocks; its batch norm adds up long channels-last columns one number after the other (gradients off
by up to 3 % against float64, here 2e-5); and its weight gradient of channels-last float32
convolutions is fifteen times slower than a matrix product on processors without AVX-512. Instead:
  - Work goes by groups of a few examples, which stay in the processor's cache from the convolution
    on.
  - Batch norm does not decrease where its weight is positive, so the maximum can be taken before
    it, and a third of the numbers is left to normalise. The sign of a negative weight goes into the
    convolution.
  - Sums go over a group in the input's type, then on in float64, and over all processes where the
    norm's statistics are those of all (section 3.2), which torch's SyncBatchNorm refuses on a CPU.
  - The gradient of y is affine in y, plus the incoming gradient at the maxima: it is made group by
    group, and turned into the gradients of weights and input at once. The bias moves the running
    mean alone: its gradient is zero.
  - The stem never reads its output, the largest tensor of all: see `StemStep`.

The plain way: the layers themselves, nn.Sequential.forward, with which tests/test_kernels_cpu.py
compares in float64; over processes, model.BatchNormOverProcesses among them.
By how much it is faster: kernels/__init__.py.

Images are channels-last (b, C, 1, T); rows are views of them, (b, T, C).
"""
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

POOL = 3


@dataclass
class Statistics:
    """What batch norm knows of a batch, in float64; `count` is of the numbers of a channel."""

    count: Tensor
    mean: Tensor  # (C,), without the convolution's bias, which normalising takes away again
    inverse: Tensor  # (C,), 1 / sqrt(variance + eps)


def over_processes(norm: nn.Module) -> bool:
    """Are a norm's statistics those of all processes?"""
    return isinstance(norm, nn.SyncBatchNorm) or getattr(norm, "over_processes", False)


def summed(sums: Tensor, everywhere: bool) -> Tensor:
    """The sums of all processes, where they count together; `sums` stays this process's."""
    if not everywhere:
        return sums
    total = sums.clone()
    dist.all_reduce(total)
    return total


def note_statistics(norm, mean: Tensor, var: Tensor, count: Tensor):
    """Move the running mean and (unbiased) variance as nn.BatchNorm2d does."""
    norm.num_batches_tracked += 1
    unbiased = var * count / (count - 1).clamp_min(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
    norm.running_var.lerp_(unbiased.to(norm.running_var), norm.momentum)


def as_rows(image: Tensor) -> Tensor:
    """(b, C, 1, T) -> (b, T, C); of a channels-last image, a view."""
    return image.squeeze(2).transpose(1, 2)


def as_image(rows: Tensor) -> Tensor:
    """(b, T, C) -> (b, C, 1, T), a view that is channels-last."""
    return rows.transpose(1, 2).unsqueeze(2)


def channels_last(gradient: Tensor) -> Tensor:
    """A copy of a weight's gradient in the weights' layout, as DDP's buckets have it."""
    return torch.empty_like(gradient, memory_format=torch.channels_last).copy_(gradient)


def product_type(x: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which a convolution of x would compute."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def group_size(x: Tensor, numbers: int) -> int:
    """How many examples of so many numbers to work on together: they fill a cache, or a GPU."""
    together = 1 << (20 if x.device.type == "cpu" else 26)
    return max(1, together // numbers)


def where_open(grad: Tensor, out: Tensor) -> Tensor:
    """The gradient before a ReLU whose output was `out`."""
    return torch.ops.aten.threshold_backward(grad, out, 0)


# -------------------------------------------------------------------------------- the first block

def stem_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Audio (B, 1, 1, T) -> rows (N, 4), N = B T / 3: a one and the samples r of a window."""
    return F.pad(x.reshape(-1, 3).to(dtype), (1, 0), value=1.0)


def stem_affine(moments: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, norm):
    """Convolution and batch norm of the stem as one product, and move the running statistics.

    Args: moments (4, 4) float64, rows^T rows of this process: count, sums, sums of products.
    Returns: affine (4, C) in gamma's type, so that normalised y = rows @ affine; the Statistics."""
    moments = summed(moments, over_processes(norm))
    count = moments[0, 0]
    centre = moments[0, 1:] / count
    covariance = moments[1:, 1:] / count - centre.outer(centre)
    w = weight.detach().double().flatten(1)  # (C, 3)
    mean = w @ centre
    var = ((w @ covariance) * w).sum(1).clamp_min(0)
    note_statistics(norm, mean + bias, var, count)
    inverse = (var + norm.eps).rsqrt()
    scale = gamma * inverse
    affine = torch.cat([(beta - mean * scale)[None], (w * scale[:, None]).T]).to(gamma.dtype)
    return affine, Statistics(count, mean, inverse)


def stem_gradients(sums: Tensor, moments: Tensor, weight: Tensor, gamma: Tensor,
                   found: Statistics, norm: nn.Module):
    """Gradients of the stem's parameters.

    Args: sums (4, C) float64 of g times each column of the rows, g being the gradient where the
        ReLU was open.
    Returns: those of weight, bias, gamma and beta; and (2, C), the means of g and of g times
        normalised y over all rows, with which the gradient of y is scale (g - first - normalised
        y second)."""
    w = weight.detach().double().flatten(1)  # (C, 3)
    of_beta = sums[0]
    products = sums[1:].T  # (C, 3), of g r^T
    of_gamma = found.inverse * ((w * products).sum(1) - found.mean * of_beta)
    means = summed(torch.stack([of_beta, of_gamma]), over_processes(norm)) / found.count
    total = moments[0, 1:]  # (3,), of all r
    normal = w @ moments[1:, 1:] - found.mean.outer(total)
    normal = found.inverse[:, None] * normal  # (C, 3), of normalised y r^T
    spread = products - means[0].outer(total) - means[1][:, None] * normal
    of_weight = ((gamma * found.inverse)[:, None] * spread).to(gamma)[:, None, None]  # (C, 1, 1, 3)
    nothing = torch.zeros_like(gamma)
    return (channels_last(of_weight), nothing, of_gamma.to(gamma), of_beta.to(gamma)), means


class StemStep(torch.autograd.Function):
    """The stem's two passes in training; nothing large is written down but its output.

    Its windows r of three samples do not overlap, so the convolution is y = W r, and a channel's
    mean and variance follow from the mean and the 3 x 3 covariance of the windows: W E[r] and W
    Cov[r] W^T (summed up in float64). Normalising is then part of the one product. Backward, all
    gradients follow from sums over g and g r^T."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, block):
        """(B, 1, 1, T) -> (B, C, 1, T / 3). `block`: see kernels.training_pass."""
        rows = stem_rows(x, gamma.dtype)
        moments = rows.double().T @ rows.double()
        affine, found = stem_affine(moments, weight, bias, gamma, beta, block[1])
        dtype = product_type(x, weight)
        shift, folded = affine.to(dtype).split([1, 3])
        out = x.new_empty(len(rows), len(weight), dtype=dtype)
        ctx.group = group_size(x, len(weight))
        for part, y in zip(rows.split(ctx.group), out.split(ctx.group)):
            torch.addmm(shift[0], part[:, 1:].to(dtype), folded, out=y).relu_()
        ctx.save_for_backward(rows, weight, gamma, moments, affine, out)
        ctx.found = found
        ctx.norm = block[1]
        ctx.shape = x.shape
        return as_image(out.view(len(x), -1, len(weight)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight, gamma, moments, affine, out = ctx.saved_tensors
        sums = moments.new_zeros(4, len(weight))
        of_rows = []
        groups = zip(rows.split(ctx.group), as_rows(grad).flatten(0, 1).split(ctx.group),  # (N, C)
                     out.split(ctx.group))
        for part, g, y in groups:
            g = where_open(g, y).to(rows.dtype)
            sums += part.T @ g
            if ctx.needs_input_grad[0]:
                of_rows.append(g @ affine[1:].T)
        gradients, means = stem_gradients(sums, moments, weight, gamma, ctx.found, ctx.norm)
        of_audio = None
        if of_rows:
            of_audio = StemStep.through_statistics(rows, weight, gamma, ctx.found, means)
            of_audio = (torch.cat(of_rows) - of_audio).view(ctx.shape)
        return of_audio, *gradients, None

    @staticmethod
    def through_statistics(rows, weight, gamma, found, means):
        """What comes through mean and variance to the audio's gradient: (N, 3), affine in it."""
        w = weight.detach().double().flatten(1)
        scale = gamma * found.inverse
        slope = scale * means[1] * found.inverse
        constant = (scale * means[0] - slope * found.mean) @ w
        linear = (w.T * slope) @ w
        return torch.addmm(constant, rows[:, 1:].to(linear), linear).to(rows)


# ------------------------------------------------------------------------------ every other block

def convolve(rows: Tensor, weight: Tensor) -> Tensor:
    """A convolution of three steps, padded: (b, T, C) -> (b, T, C')."""
    return as_rows(F.conv2d(as_image(rows), weight, padding=(0, 1)))


def maxima(x: Tensor, weight: Tensor, pool: int, keep: bool, high: torch.dtype):
    """Convolve group by group.

    Returns: the maxima of every `pool` steps (B, T / pool, C'); sums (2, C') float64 of the
        outputs and of their squares; with `keep` also the outputs, a list of groups (else
        empty)."""
    group = group_size(x, x.shape[1] * len(weight))
    top = x.new_empty(len(x), x.shape[1] // pool, len(weight))
    sums = x.new_zeros(2, len(weight), dtype=torch.float64)
    pivot = None
    outputs = []
    for rows, highest in zip(x.split(group), top.split(group)):
        y = convolve(rows, weight)
        away = y.to(high)
        if pivot is None:  # sums of squares cancel where y hardly varies, as early in training
            pivot = away.mean((0, 1))
        away = away - pivot
        sums += torch.stack([away.sum((0, 1)), away.square_().sum((0, 1))])
        torch.amax(y.unflatten(1, (-1, pool)), 2, out=highest)
        if keep:
            outputs.append(y)
    count = sums.new_full((), x.shape[0] * x.shape[1])
    pivot = pivot.double()
    sums[1] += 2 * pivot * sums[0] + count * pivot.square()
    sums[0] += count * pivot
    return top, sums, outputs


def block_statistics(sums: Tensor, count: int, sign: Tensor, bias: Tensor, norm) -> Statistics:
    """Mean and deviation from this process's sums over `count` numbers, the running ones moved.

    Args: sign (C',): that of the norm's weight, which the convolution has taken in."""
    everywhere = over_processes(norm)
    sums = summed(sums, everywhere)
    count = sums.new_full((), count * (dist.get_world_size() if everywhere else 1))
    mean = sums[0] / count
    var = (sums[1] / count - mean.square()).clamp_min(0)
    note_statistics(norm, mean * sign + bias, var, count)
    return Statistics(count, mean, (var + norm.eps).rsqrt())


def to_maxima(g: Tensor, y: Tensor) -> Tensor:
    """Gradients (b, T / 3, C), each at the largest of its three steps of y (b, T, C)."""
    g = as_image(g)
    y = as_image(y)
    at = F.max_pool2d(y, (1, POOL), return_indices=True)[1]
    size = (1, POOL)
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    return as_rows(backward(g, y, size, size, (0, 0), (1, 1), False, at))


def add_weight_gradient(of_weight: Tensor, d: Tensor, rows: Tensor):
    """Add to (3, C', C), a matrix a tap, what a group's gradient d (b, T, C') of y and input (b,
    T, C) give."""
    steps = d.shape[1]
    for tap, shift in enumerate((-1, 0, 1)):  # y at step t took its input from step t + shift
        of_d = d[:, max(0, -shift) : steps - max(0, shift)]
        of_x = rows[:, max(0, shift) : steps - max(0, -shift)]
        if d.dtype == of_weight.dtype:
            of_weight[tap].addbmm_(of_d.transpose(1, 2), of_x)
        else:  # one product, which adds up in float32
            of_weight[tap] += of_d.flatten(0, 1).T @ of_x.flatten(0, 1)


class BlockStep(torch.autograd.Function):
    """Convolution, batch norm, max-pool (if the block has one) and ReLU: see this file's head."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, block):
        """(B, C, 1, T) -> (B, C', 1, T / pool). `block`: see kernels.training_pass."""
        dtype = product_type(x, weight)
        ctx.pool = POOL if len(block) == 4 else 1
        ctx.everywhere = over_processes(block[1])
        sign = torch.where(gamma < 0, -1.0, 1.0).to(weight)
        weight = (weight * sign.view(-1, 1, 1, 1)).to(dtype)
        x = as_rows(x.to(dtype))
        keep = ctx.pool > 1 and not block.recompute
        top, sums, outputs = maxima(x, weight, ctx.pool, keep, gamma.dtype)
        ctx.found = block_statistics(sums, x.shape[0] * x.shape[1], sign, bias, block[1])
        scale = gamma.abs() * ctx.found.inverse
        shift = beta - ctx.found.mean * scale
        out = torch.addcmul(shift.to(gamma.dtype), top, scale.to(gamma.dtype)).relu_().to(dtype)
        top = top if ctx.pool > 1 else None  # without a pool they are the outputs
        ctx.save_for_backward(x, weight, sign, gamma, out, top, *outputs)
        return as_image(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, sign, gamma, out, top, *outputs = ctx.saved_tensors
        parts = x.split(group_size(x, x.shape[1] * len(weight)))
        gradients, sums = BlockStep.open_gradients(ctx, grad, parts)
        coefficients = BlockStep.coefficients(ctx, sums, gamma)
        of_weight, of_x = BlockStep.through_groups(ctx, gradients, parts, outputs, coefficients)
        of_weight = (of_weight * sign.view(1, -1, 1)).permute(1, 2, 0).unsqueeze(2)  # (C', C, 1, 3)
        of_x = None if of_x is None else as_image(of_x)
        of_bias = torch.zeros_like(gamma)
        of_gamma = (sums[1] * sign).to(gamma)
        return of_x, channels_last(of_weight), of_bias, of_gamma, sums[0].to(gamma), None

    @staticmethod
    def through_groups(ctx, gradients, parts, outputs, coefficients):
        """The gradients of the weights, a matrix a tap (3, C', C), and of the input's rows (or
        None), group by group."""
        x, weight = ctx.saved_tensors[:2]
        scale, slope, offset = coefficients
        of_weight = x.new_zeros(3, *weight.shape[:2], dtype=scale.dtype)
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        back = weight.flip(3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        begin = 0
        for rows, g, y in zip(parts, gradients, outputs or [None] * len(parts)):
            y = (convolve(rows, weight) if y is None else y).to(scale.dtype)
            d = torch.addcmul(offset, y, slope)  # (b, T, C')
            g = g.mul_(scale)
            d = d.add_(to_maxima(g, y) if ctx.pool > 1 else g).to(weight.dtype)
            add_weight_gradient(of_weight, d, rows)
            if of_x is not None:
                of_x[begin : begin + len(rows)] = convolve(d, back)
                begin += len(rows)
        return of_weight, of_x

    @staticmethod
    def open_gradients(ctx, grad, parts):
        """The gradients where the ReLU was open, a list of groups (b, T / pool, C'); and their
        sums (2, C') float64: of g, which is beta's gradient, and of g times normalised y, which
        is gamma's up to its sign."""
        _, weight, _, gamma, out, top = ctx.saved_tensors[:6]
        sums = out.new_zeros(2, len(weight), dtype=torch.float64)
        mean = ctx.found.mean.to(gamma.dtype)
        group = len(parts[0])
        tops = (convolve(rows, weight) for rows in parts) if top is None else top.split(group)
        gradients = []
        for g, y, high in zip(as_rows(grad).split(group), out.split(group), tops):
            g = where_open(g, y).to(gamma.dtype)
            sums += torch.stack([g.sum((0, 1)), (g * (high - mean)).sum((0, 1))])
            gradients.append(g)
        sums[1] *= ctx.found.inverse
        return gradients, sums

    @staticmethod
    def coefficients(ctx, sums, gamma):
        """scale, slope, offset (C',): the gradient of y is scale g at the maxima, plus offset +
        slope y everywhere."""
        found = ctx.found
        total = summed(sums, ctx.everywhere)
        scale = gamma.abs() * found.inverse
        slope = -scale * found.inverse * total[1] / found.count
        offset = -scale * total[0] / found.count - slope * found.mean
        return scale.to(gamma.dtype), slope.to(gamma.dtype), offset.to(gamma.dtype)
