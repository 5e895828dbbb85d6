"""SampleCNN's blocks in training on a GPU: what lies between the convolutions, as Triton kernels.

What it computes: as kernels/cpu.py, a block's forward and backward pass (`StemStep`, `BlockStep`).

Why it is faster. The convolutions of a step of 96 pairs take an H200 3.2 ms, the step by torch's
layers 35: bias, batch norm, max-pool and ReLU each read and write tensors of up to a gigabyte,
forward and backward. Here a convolution's output y is read
    forward    once, for the sums that batch norm needs, and for the maxima, a third of the numbers,
               which are normalised after it
    backward   once, for its own gradient; the sums that this needs come from the maxima
and the stem's output is written once and never read for its own sake. Sums are taken in float32
over about a thousandth of the rows, and then on in float64.

The plain way: torch's layers. It needs Triton, which comes with torch for Linux, a C compiler, and
T a multiple of the pool. By how much it is faster: kernels/__init__.py.

Everything is written as rows: (B, C, 1, T) channels-last is (R, C), R = B T. `shape` is the (R, C)
that a kernel walks over. Tiles are of TILE numbers, COLUMNS of them side by side.
"""
from typing import NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch.nn import functional as F

from .cpu import POOL, over_processes, product_type, stem_affine, stem_gradients, stem_rows, summed

PROGRAMS = tl.constexpr(1024)  # at most, that share a sum: a power of two
TILE = tl.constexpr(2048)
CHANNELS = tl.constexpr(128)  # at once, in kernels over channels alone


class Shape(NamedTuple):
    """Of what a kernel walks over."""

    rows: int
    channels: int


# ------------------------------------------------------------------------- what the kernels share

@triton.jit
def _of_channel(table, row, c, channels):
    """Row `row` of a table (., C), at the channels c."""
    return tl.load(table + row * channels + c, mask=c < channels, other=0.0)


@triton.jit
def _share(rows, ROWS: tl.constexpr):
    """Where programs share all rows: the first of this one, and the first of the next."""
    chunk = tl.cdiv(tl.cdiv(rows, tl.num_programs(0)), ROWS) * ROWS
    begin = tl.program_id(0).to(tl.int64) * chunk
    return begin, tl.minimum(begin + chunk, rows)


@triton.jit
def _store_sum(partial, which, values, c, channels):
    """Sum values (ROWS, COLUMNS) over rows into partial[which] (programs, C), of this program."""
    at = (which * tl.num_programs(0) + tl.program_id(0).to(tl.int64)) * channels + c
    tl.store(partial + at, tl.sum(values, 0), mask=c < channels)


# ----------------------------------------------------------------- a block: maxima and statistics

@triton.jit
def _higher(value, best, sign):
    """Where batch norm with a weight of that sign makes `value` larger than `best`."""
    return ((sign > 0) & (value > best)) | ((sign < 0) & (value < best))


@triton.jit
def _maxima(y, gamma, top, partial, shape, POOL: tl.constexpr, COLUMNS: tl.constexpr):
    """top (R, C): of POOL rows of y (R POOL, C) the one that batch norm makes the largest.
    partial (3, programs, C) of all rows of a program: the first of them (sums of squares cancel
    where y hardly varies), and the sums of the differences to it and of their squares."""
    ROWS: tl.constexpr = TILE // COLUMNS
    channels = shape[1]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = _share(shape[0], ROWS)
    sign = _of_channel(gamma, 0, c, channels)[None, :]
    pivot = _of_channel(y, begin * POOL, c, channels).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    while begin < end:
        row = (begin + tl.arange(0, ROWS))[:, None]
        inside = (row < end) & (c < channels)[None, :]
        at = row * POOL * channels + c[None, :]
        best = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(POOL):
            value = tl.load(y + at + k * channels, mask=inside, other=0.0).to(tl.float32)
            best = tl.where(_higher(value, best, sign), value, best)
            value = tl.where(inside, value - pivot, 0.0)
            total += value
            squares += value * value
        tl.store(top + row * channels + c[None, :], best.to(top.dtype.element_ty), mask=inside)
        begin += ROWS
    _store_sum(partial, 0, tl.where(tl.arange(0, ROWS)[:, None] == 0, pivot, 0.0), c, channels)
    _store_sum(partial, 1, total, c, channels)
    _store_sum(partial, 2, squares, c, channels)


@triton.jit
def _combine(partial, sums, shape, programs, ROWS, PIVOT: tl.constexpr, POOL: tl.constexpr):
    """sums (2, C) float64 over all rows, of what the programs left in partial: with PIVOT from
    `_maxima`, else two plain sums. ROWS: of a tile of theirs."""
    COLUMNS: tl.constexpr = 4
    rows, channels = shape
    p = tl.arange(0, PROGRAMS)[:, None]
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (p < programs) & (c < channels)[None, :]
    at = partial + p.to(tl.int64) * channels + c[None, :]
    plane = programs * channels
    if PIVOT:
        pivot = tl.load(at, mask=inside, other=0.0).to(tl.float64)
        at += plane
    first = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    second = tl.load(at + plane, mask=inside, other=0.0).to(tl.float64)
    if PIVOT:
        chunk = tl.cdiv(tl.cdiv(rows, programs), ROWS) * ROWS
        n = tl.maximum(tl.minimum(rows - p * chunk, chunk), 0).to(tl.float64) * POOL
        second += pivot * (2 * first + n * pivot)
        first += n * pivot
    tl.store(sums + c, tl.sum(first, 0), mask=c < channels)
    tl.store(sums + channels + c, tl.sum(second, 0), mask=c < channels)


@triton.jit
def _move(running, value, momentum, c, channels):
    """A running statistic towards this batch's."""
    old = _of_channel(running, 0, c, channels)
    tl.store(running + c, (old + momentum * (value - old)).to(tl.float32), mask=c < channels)


@triton.jit
def _statistics(sums, parameters, running, values, count, settings, channels):
    """values (4, C): mean, 1 / deviation, and the scale and shift that normalise; and the running
    statistics moved.

    parameters: gamma, beta and the convolution's bias; running: mean and variance; settings:
        momentum, eps, n / (n - 1)."""
    gamma, beta, bias = parameters
    momentum, eps, unbiased = settings
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mean = _of_channel(sums, 0, c, channels) / count
    var = _of_channel(sums, 1, c, channels) / count - mean * mean
    var = tl.where(var < 0, 0.0, var)
    inverse = 1 / tl.sqrt(var + eps)
    scale = _of_channel(gamma, 0, c, channels).to(tl.float64) * inverse
    shift = _of_channel(beta, 0, c, channels).to(tl.float64) - mean * scale
    tl.store(values + c, mean.to(tl.float32), mask=c < channels)
    tl.store(values + channels + c, inverse.to(tl.float32), mask=c < channels)
    tl.store(values + 2 * channels + c, scale.to(tl.float32), mask=c < channels)
    tl.store(values + 3 * channels + c, shift.to(tl.float32), mask=c < channels)
    _move(running[0], mean + _of_channel(bias, 0, c, channels), momentum, c, channels)
    _move(running[1], var * unbiased, momentum, c, channels)


@triton.jit
def _normalise(top, values, out, shape, COLUMNS: tl.constexpr):
    """out = ReLU(scale top + shift)."""
    ROWS: tl.constexpr = TILE // COLUMNS
    rows, channels = shape
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scale = _of_channel(values, 2, c, channels)[None, :]
    shift = _of_channel(values, 3, c, channels)[None, :]
    inside = (row < rows) & (c < channels)[None, :]
    at = row * channels + c[None, :]
    high = tl.load(top + at, mask=inside, other=0.0).to(tl.float32) * scale + shift
    high = tl.where(high < 0, 0.0, high)  # a GPU's maximum would lose NaN
    tl.store(out + at, high.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_sums(grad, top, values, partial, shape, COLUMNS: tl.constexpr):
    """partial (2, programs, C): sums of g and of g (top - mean), g being the incoming gradient
    where the ReLU was open."""
    ROWS: tl.constexpr = TILE // COLUMNS
    channels = shape[1]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = _share(shape[0], ROWS)
    mean = _of_channel(values, 0, c, channels)[None, :]
    scale = _of_channel(values, 2, c, channels)[None, :]
    shift = _of_channel(values, 3, c, channels)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    while begin < end:
        row = (begin + tl.arange(0, ROWS))[:, None]
        inside = (row < end) & (c < channels)[None, :]
        at = row * channels + c[None, :]
        high = tl.load(top + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(high * scale + shift > 0, g, 0.0)
        total += g
        products += g * (high - mean)
        begin += ROWS
    _store_sum(partial, 0, total, c, channels)
    _store_sum(partial, 1, products, c, channels)


@triton.jit
def _slopes(sums, everywhere, values, gradients, coefficients, count, channels):
    """gradients (2, C) of gamma and beta, from this process's sums; coefficients (4, C): scale
    and shift again, and from all processes' sums the offset and slope of y's gradient, offset +
    slope y."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    real = c < channels
    mean = _of_channel(values, 0, c, channels).to(tl.float64)
    inverse = _of_channel(values, 1, c, channels).to(tl.float64)
    scale = _of_channel(values, 2, c, channels)
    minus = -scale.to(tl.float64) / count
    slope = minus * inverse * inverse * _of_channel(everywhere, 1, c, channels)
    offset = minus * _of_channel(everywhere, 0, c, channels) - slope * mean
    tl.store(gradients + c, (_of_channel(sums, 1, c, channels) * inverse).to(tl.float32), mask=real)
    tl.store(gradients + channels + c, _of_channel(sums, 0, c, channels).to(tl.float32), mask=real)
    tl.store(coefficients + c, scale, mask=real)
    tl.store(coefficients + channels + c, _of_channel(values, 3, c, channels), mask=real)
    tl.store(coefficients + 2 * channels + c, offset.to(tl.float32), mask=real)
    tl.store(coefficients + 3 * channels + c, slope.to(tl.float32), mask=real)


@triton.jit
def _first_maximum(y, at, inside, scale, channels, POOL: tl.constexpr):
    """Of the POOL rows of y from `at` on: which is the largest after scaling (the first of
    equals), and its value."""
    best = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    which = tl.zeros(best.shape, tl.int32)
    for k in tl.static_range(1, POOL):
        value = tl.load(y + at + k * channels, mask=inside, other=0.0).to(tl.float32)
        better = _higher(value, best, scale)
        best = tl.where(better, value, best)
        which = tl.where(better, k, which)
    return which, best


@triton.jit
def _spread(y, grad, coefficients, dy, shape, POOL: tl.constexpr, COLUMNS: tl.constexpr):
    """dy (R POOL, C) = offset + slope y, plus scale g at the (first) maximum of POOL rows."""
    ROWS: tl.constexpr = TILE // COLUMNS
    channels = shape[1]
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scale = _of_channel(coefficients, 0, c, channels)[None, :]
    shift = _of_channel(coefficients, 1, c, channels)[None, :]
    offset = _of_channel(coefficients, 2, c, channels)[None, :]
    slope = _of_channel(coefficients, 3, c, channels)[None, :]
    inside = (row < shape[0]) & (c < channels)[None, :]
    at = row * POOL * channels + c[None, :]
    which, best = _first_maximum(y, at, inside, scale, channels, POOL)
    g = tl.load(grad + row * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    g = tl.where(best * scale + shift > 0, g * scale, 0.0)
    for k in tl.static_range(POOL):
        value = tl.load(y + at + k * channels, mask=inside, other=0.0).to(tl.float32)
        value = offset + slope * value + tl.where(which == k, g, 0.0)
        tl.store(dy + at + k * channels, value.to(dy.dtype.element_ty), mask=inside)


def tiles(rows: int, channels: int):
    """How (R, C) is cut: columns and rows of a tile, tiles across, programs that share a sum."""
    columns = min(128, triton.next_power_of_2(channels))
    height = TILE.value // columns
    across = triton.cdiv(channels, columns)
    chunk = triton.cdiv(triton.cdiv(rows, PROGRAMS.value // across), height) * height
    return columns, height, across, triton.cdiv(rows, chunk)


def combine(partial, shape, pool):
    """The sums (2, C) float64 of what programs left in partial (2 or 3, programs, C)."""
    _, programs, channels = partial.shape
    sums = partial.new_empty(2, channels, dtype=torch.float64)
    _, height, _, _ = tiles(*shape)
    grid = (triton.cdiv(channels, 4),)
    _combine[grid](partial, sums, shape, programs, height, len(partial) == 3, pool, num_warps=8)
    return sums


def by_rows(image):
    """(B, C, 1, T) -> (B, 1, T, C), as it lies in memory."""
    return image.permute(0, 2, 3, 1).contiguous()


class BlockStep(torch.autograd.Function):
    """Convolution, batch norm in training, max-pool (if the block has one) and ReLU; see
    kernels/cpu.py for the formulas.

    Processes that take their statistics together hold as many rows each."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, block):
        """(B, C, 1, T) -> (B, C', 1, T / pool). `block`: see kernels.training_pass."""
        norm = block[1]
        ctx.pool = POOL if len(block) == 4 else 1
        ctx.everywhere = over_processes(norm)
        dtype = product_type(x, weight)
        x = x.to(dtype)
        weight = weight.to(dtype)
        y = by_rows(F.conv2d(x, weight, padding=(0, 1)))
        top = y.new_empty(len(y), 1, y.shape[2] // ctx.pool, y.shape[3])
        ctx.tall = Shape(top.numel() // y.shape[3], y.shape[3])
        sums = BlockStep.maxima(y, gamma, top, ctx)
        ctx.count = ctx.tall.rows * ctx.pool * (dist.get_world_size() if ctx.everywhere else 1)
        values = BlockStep.normalising(sums, (gamma, beta, bias), norm, ctx.count)
        out = torch.empty_like(top)
        columns, height, across, _ = tiles(*ctx.tall)
        grid = (triton.cdiv(ctx.tall.rows, height), across)
        _normalise[grid](top, values, out, ctx.tall, columns)
        ctx.save_for_backward(x, weight, y, top, values)
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def maxima(y, gamma, top, ctx):
        """Write top, and give the sums (2, C') of y and of its square over all who take their
        statistics together."""
        columns, _, across, programs = tiles(*ctx.tall)
        partial = gamma.new_empty(3, programs, ctx.tall.channels)
        _maxima[(programs, across)](y, gamma, top, partial, ctx.tall, ctx.pool, columns)
        return summed(combine(partial, ctx.tall, ctx.pool), ctx.everywhere)

    @staticmethod
    def normalising(sums, parameters, norm, count):
        """The values (4, C') that normalise, and the running statistics moved."""
        channels = sums.shape[1]
        values = parameters[0].new_empty(4, channels)
        norm.num_batches_tracked += 1
        running = (norm.running_mean, norm.running_var)
        settings = (norm.momentum, norm.eps, count / max(1, count - 1))
        grid = (triton.cdiv(channels, CHANNELS.value),)
        _statistics[grid](sums, parameters, running, values, count, settings, channels)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, y, top, values = ctx.saved_tensors
        grad = by_rows(grad)
        gradients, coefficients = BlockStep.coefficients(ctx, grad, top, values)
        columns, height, across = tiles(*ctx.tall)[:3]
        dy = torch.empty_like(y)
        _spread[triton.cdiv(ctx.tall.rows, height), across](
            y, grad, coefficients, dy, ctx.tall, ctx.pool, columns)
        of_x, of_weight = torch.ops.aten.convolution_backward(
            dy.permute(0, 3, 1, 2), x, weight, None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1,
            [ctx.needs_input_grad[0], True, False])[:2]
        of_bias = torch.zeros_like(gradients[0])  # which normalising takes away
        return of_x, of_weight.to(values.dtype), of_bias, gradients[0], gradients[1], None

    @staticmethod
    def coefficients(ctx, grad, top, values):
        """The gradients (2, C') of gamma and beta, and the coefficients (4, C') of y's gradient."""
        columns, _, across, programs = tiles(*ctx.tall)
        channels = ctx.tall.channels
        partial = values.new_empty(2, programs, channels)
        _gradient_sums[(programs, across)](grad, top, values, partial, ctx.tall, columns)
        sums = combine(partial, ctx.tall, 1)
        everywhere = summed(sums, ctx.everywhere)
        gradients = values.new_empty(2, channels)
        coefficients = torch.empty_like(values)
        grid = (triton.cdiv(channels, CHANNELS.value),)
        _slopes[grid](sums, everywhere, values, gradients, coefficients, ctx.count, channels)
        return gradients, coefficients


# --------------------------------------------------------------------------------------- the stem

@triton.jit
def _moments(rows, partial, count):
    """partial (programs, 16): of this program's rows (N, 4), each a one and three samples, the
    sums of all products."""
    ROWS: tl.constexpr = TILE // 16
    k = tl.arange(0, 16)[None, :]
    begin, end = _share(count, ROWS)
    total = tl.zeros([ROWS, 16], tl.float32)
    while begin < end:
        row = (begin + tl.arange(0, ROWS))[:, None]
        left = tl.load(rows + row * 4 + k // 4, mask=row < end, other=0.0)
        total += left * tl.load(rows + row * 4 + k % 4, mask=row < end, other=0.0)
        begin += ROWS
    tl.store(partial + tl.program_id(0) * 16 + tl.arange(0, 16), tl.sum(total, 0))


@triton.jit
def _product(rows, affine, row, count, c, channels):
    """rows (N, 4) @ affine (4, C), of the rows `row` (ROWS, 1) below `count`, the channels c."""
    high = tl.zeros([row.shape[0], c.shape[0]], tl.float32)
    for k in tl.static_range(4):
        factor = _of_channel(affine, k, c, channels)[None, :]
        high += tl.load(rows + row * 4 + k, mask=row < count, other=0.0) * factor
    return high


@triton.jit
def _stem(rows, affine, out, shape, COLUMNS: tl.constexpr):
    """out (N, C) = ReLU(rows affine)."""
    ROWS: tl.constexpr = TILE // COLUMNS
    count, channels = shape
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    high = _product(rows, affine, row, count, c, channels)
    high = tl.where(high < 0, 0.0, high).to(out.dtype.element_ty)
    tl.store(out + row * channels + c[None, :], high, mask=(row < count) & (c < channels)[None, :])


@triton.jit
def _stem_sums(rows, grad, affine, partial, shape, COLUMNS: tl.constexpr):
    """partial (4, programs, C): sums of g times each column of rows, g being the incoming
    gradient where the ReLU was open."""
    ROWS: tl.constexpr = TILE // COLUMNS
    count, channels = shape
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = _share(count, ROWS)
    ones = tl.zeros([ROWS, COLUMNS], tl.float32)
    by_first = tl.zeros([ROWS, COLUMNS], tl.float32)
    by_second = tl.zeros([ROWS, COLUMNS], tl.float32)
    by_third = tl.zeros([ROWS, COLUMNS], tl.float32)
    while begin < end:
        row = (begin + tl.arange(0, ROWS))[:, None]
        inside = (row < end) & (c < channels)[None, :]
        g = tl.load(grad + row * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.where(_product(rows, affine, row, end, c, channels) > 0, g, 0.0)
        ones += g
        by_first += g * tl.load(rows + row * 4 + 1, mask=row < end, other=0.0)
        by_second += g * tl.load(rows + row * 4 + 2, mask=row < end, other=0.0)
        by_third += g * tl.load(rows + row * 4 + 3, mask=row < end, other=0.0)
        begin += ROWS
    _store_sum(partial, 0, ones, c, channels)
    _store_sum(partial, 1, by_first, c, channels)
    _store_sum(partial, 2, by_second, c, channels)
    _store_sum(partial, 3, by_third, c, channels)


def stem_moments(rows: torch.Tensor) -> torch.Tensor:
    """rows (N, 4) float32, each a one and three samples -> rows^T rows, (4, 4) float64."""
    height = TILE.value // 16
    chunk = triton.cdiv(triton.cdiv(len(rows), PROGRAMS.value), height) * height
    partial = rows.new_empty(triton.cdiv(len(rows), chunk), 16)
    _moments[(len(partial),)](rows, partial, len(rows))
    return partial.sum(0, dtype=torch.float64).view(4, 4)


def stem(rows: torch.Tensor, affine: torch.Tensor, out: torch.Tensor):
    """Write ReLU(rows (N, 4) @ affine (4, C)), both float32, to out (N, C)."""
    shape = Shape(*out.shape)
    columns, height, across, _ = tiles(*shape)
    _stem[(triton.cdiv(shape.rows, height), across)](rows, affine, out, shape, columns)


def stem_sums(rows: torch.Tensor, grad: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Sums over N of g times each column of rows, (4, C) float64, g being grad (N, C) where
    `stem` gave more than zero."""
    shape = Shape(*grad.shape)
    columns, _, across, programs = tiles(*shape)
    partial = rows.new_empty(4, programs, shape.channels)
    _stem_sums[(programs, across)](rows, grad, affine, partial, shape, columns)
    return partial.sum(1, dtype=torch.float64)


class StemStep(torch.autograd.Function):
    """The stem's two passes in training, of audio that asks for no gradient; see cpu.py."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, block):
        """(B, 1, 1, T) -> (B, C, 1, T / 3). `block`: see kernels.training_pass."""
        rows = stem_rows(x, gamma.dtype)
        moments = stem_moments(rows)
        affine, ctx.found = stem_affine(moments, weight, bias, gamma, beta, block[1])
        out = x.new_empty(len(rows), len(weight), dtype=product_type(x, weight))
        stem(rows, affine, out)
        ctx.norm = block[1]
        ctx.save_for_backward(rows, weight, gamma, moments, affine)
        return out.view(len(x), 1, -1, len(weight)).permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, weight, gamma, moments, affine = ctx.saved_tensors
        sums = stem_sums(rows, by_rows(grad).flatten(0, 2), affine)
        gradients, _ = stem_gradients(sums, moments, weight, gamma, ctx.found, ctx.norm)
        return None, *gradients, None
