"""The training pass of SampleCNN's blocks on a GPU: what lies between the convolutions, as Triton kernels.

Optional: model.py uses this file where it lies beside it, on a GPU and with Triton (which comes with torch for Linux); without
it the same numbers come from torch's layers, in about four times the time (results/speed/pretrain-gpu-step.json). The convolutions of
a step of 96 pairs take an H200 3.2 ms, the step by torch's layers 35: bias, batch norm, max-pool and ReLU each read and write
tensors of up to a gigabyte, forward and backward. Here a convolution's output y is read

    forward    once, for the sums that batch norm needs, and for the maxima, a third of the numbers, that are normalised after it
    backward   once, for its own gradient; the sums that this needs come from the maxima

and the stem's output is written once and never read for its own sake (see model.StemStep). Sums are taken in float32 over
about a thousandth of the rows, and then on in float64. Everything is written as rows: (B, C, 1, T) channels-last is (R, C), R = B T.
"""
import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch.nn import functional as F

PROGRAMS = 1024  # at most, that share a sum: a power of two

# ---------------------------------------------------------------------------------------- A block: maxima and statistics


@triton.jit
def _maxima(y, gamma, top, partial, rows, channels, chunk, POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """top (R / POOL, C): of POOL rows of y the one that batch norm makes the largest. partial (3, programs, C) of all rows of a
    program: one of them (sums of squares cancel where y hardly varies), and the sums of the differences to it and of their squares."""
    program, c, r = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    real, begin = c < channels, program * chunk
    end = tl.minimum(begin + chunk, rows)
    sign = tl.load(gamma + c, mask=real, other=0.0)[None, :]
    pivot = tl.load(y + begin * POOL * channels + c, mask=real, other=0.0).to(tl.float32)
    total, squares = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)  # summed up at the end
    while begin < end:
        row = begin + r
        here = (row < end)[:, None] & real[None, :]
        best = tl.load(y + row[:, None] * POOL * channels + c[None, :], mask=here, other=0.0).to(tl.float32)
        away = tl.where(here, best - pivot[None, :], 0.0)
        total, squares = total + away, squares + away * away
        for k in tl.static_range(1, POOL):
            value = tl.load(y + (row[:, None] * POOL + k) * channels + c[None, :], mask=here, other=0.0).to(tl.float32)
            away = tl.where(here, value - pivot[None, :], 0.0)
            total, squares = total + away, squares + away * away
            best = tl.where(((sign > 0) & (value > best)) | ((sign < 0) & (value < best)), value, best)
        tl.store(top + row[:, None] * channels + c[None, :], best.to(top.dtype.element_ty), mask=here)
        begin += ROWS
    partial += program * channels + c
    tl.store(partial, pivot, mask=real)
    tl.store(partial + tl.num_programs(0) * channels, tl.sum(total, 0), mask=real)
    tl.store(partial + 2 * tl.num_programs(0) * channels, tl.sum(squares, 0), mask=real)


@triton.jit
def _combine(partial, sums, programs, rows, channels, chunk, PIVOT: tl.constexpr, POOL: tl.constexpr, PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr):
    """sums (2, C) float64 over all rows, of what the programs left in partial: with PIVOT from `_maxima`, else two plain sums."""
    p, c = tl.arange(0, PROGRAMS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here, plane = (p < programs)[:, None] & (c < channels)[None, :], programs * channels
    at = partial + p[:, None].to(tl.int64) * channels + c[None, :]
    if PIVOT:
        pivot = tl.load(at, mask=here, other=0.0).to(tl.float64)
        at += plane
    first, second = tl.load(at, mask=here, other=0.0).to(tl.float64), tl.load(at + plane, mask=here, other=0.0).to(tl.float64)
    if PIVOT:
        n = tl.maximum(tl.minimum(rows - p * chunk, chunk), 0).to(tl.float64)[:, None] * POOL
        second += pivot * (2 * first + n * pivot)
        first += n * pivot
    tl.store(sums + c, tl.sum(first, 0), mask=c < channels)
    tl.store(sums + channels + c, tl.sum(second, 0), mask=c < channels)


@triton.jit
def _statistics(sums, gamma, beta, bias, running_mean, running_var, values, count, unbiased, channels, momentum, eps, COLUMNS: tl.constexpr):
    """values (4, C): mean, 1 / deviation, and the scale and shift that normalise; and the running statistics moved."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < channels
    mean = tl.load(sums + c, mask=real, other=0.0) / count
    var = tl.load(sums + channels + c, mask=real, other=0.0) / count - mean * mean
    var = tl.where(var < 0, 0.0, var)
    inverse = 1 / tl.sqrt(var + eps)
    scale = tl.load(gamma + c, mask=real, other=0.0).to(tl.float64) * inverse
    shift = tl.load(beta + c, mask=real, other=0.0).to(tl.float64) - mean * scale
    tl.store(values + c, mean.to(tl.float32), mask=real)
    tl.store(values + channels + c, inverse.to(tl.float32), mask=real)
    tl.store(values + 2 * channels + c, scale.to(tl.float32), mask=real)
    tl.store(values + 3 * channels + c, shift.to(tl.float32), mask=real)
    mean, var = mean + tl.load(bias + c, mask=real, other=0.0), var * unbiased
    then = tl.load(running_mean + c, mask=real, other=0.0)
    tl.store(running_mean + c, (then + momentum * (mean - then)).to(tl.float32), mask=real)
    then = tl.load(running_var + c, mask=real, other=0.0)
    tl.store(running_var + c, (then + momentum * (var - then)).to(tl.float32), mask=real)


@triton.jit
def _normalise(top, values, out, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out = ReLU(scale top + shift)."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    scale, shift = (tl.load(values + 2 * channels + c, mask=c < channels, other=0.0), tl.load(values + 3 * channels + c, mask=c < channels, other=0.0))
    here, at = (row < rows)[:, None] & (c < channels)[None, :], row[:, None] * channels + c[None, :]
    high = tl.load(top + at, mask=here, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    tl.store(out + at, tl.where(high < 0, 0.0, high).to(out.dtype.element_ty), mask=here)  # a GPU's maximum would lose NaN


@triton.jit
def _gradient_sums(grad, top, values, partial, rows, channels, chunk, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partial (2, programs, C): sums of g and of g (top - mean), g being the incoming gradient where the ReLU was open."""
    program, c, r = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    real, begin = c < channels, program * chunk
    end = tl.minimum(begin + chunk, rows)
    mean = tl.load(values + c, mask=real, other=0.0)
    scale, shift = tl.load(values + 2 * channels + c, mask=real, other=0.0), tl.load(values + 3 * channels + c, mask=real, other=0.0)
    total, products = tl.zeros([ROWS, COLUMNS], tl.float32), tl.zeros([ROWS, COLUMNS], tl.float32)
    while begin < end:
        row = begin + r
        here, at = (row < end)[:, None] & real[None, :], row[:, None] * channels + c[None, :]
        high = tl.load(top + at, mask=here, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
        g = tl.where(high * scale[None, :] + shift[None, :] > 0, g, 0.0)
        total, products = total + g, products + g * (high - mean[None, :])
        begin += ROWS
    partial += program * channels + c
    tl.store(partial, tl.sum(total, 0), mask=real)
    tl.store(partial + tl.num_programs(0) * channels, tl.sum(products, 0), mask=real)


@triton.jit
def _slopes(own, sums, values, slopes, count, channels, COLUMNS: tl.constexpr):
    """slopes (4, C): the gradients of gamma and beta from this process's own sums, and from all processes' the offset and slope
    of y's gradient, offset + slope y."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < channels
    mean, inverse = tl.load(values + c, mask=real, other=0.0).to(tl.float64), tl.load(values + channels + c, mask=real, other=0.0).to(tl.float64)
    scale = tl.load(values + 2 * channels + c, mask=real, other=0.0).to(tl.float64)
    slope = -scale * inverse * inverse * tl.load(sums + channels + c, mask=real, other=0.0) / count
    offset = -scale * tl.load(sums + c, mask=real, other=0.0) / count - slope * mean
    tl.store(slopes + c, (tl.load(own + channels + c, mask=real, other=0.0) * inverse).to(tl.float32), mask=real)
    tl.store(slopes + channels + c, tl.load(own + c, mask=real, other=0.0).to(tl.float32), mask=real)
    tl.store(slopes + 2 * channels + c, offset.to(tl.float32), mask=real)
    tl.store(slopes + 3 * channels + c, slope.to(tl.float32), mask=real)


@triton.jit
def _spread(y, grad, values, slopes, dy, rows, channels, POOL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dy (R, C) = offset + slope y, and at the maximum of POOL rows (the first of equals) scale g as well."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = c < channels
    scale, shift = tl.load(values + 2 * channels + c, mask=real, other=0.0), tl.load(values + 3 * channels + c, mask=real, other=0.0)
    offset, slope = tl.load(slopes + 2 * channels + c, mask=real, other=0.0), tl.load(slopes + 3 * channels + c, mask=real, other=0.0)
    here, at = (row < rows)[:, None] & real[None, :], row[:, None] * POOL * channels + c[None, :]
    best = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    which = tl.zeros([ROWS, COLUMNS], tl.int32)
    for k in tl.static_range(1, POOL):
        value = tl.load(y + at + k * channels, mask=here, other=0.0).to(tl.float32)
        better = ((scale > 0)[None, :] & (value > best)) | ((scale < 0)[None, :] & (value < best))
        best, which = tl.where(better, value, best), tl.where(better, k, which)
    g = tl.load(grad + row[:, None] * channels + c[None, :], mask=here, other=0.0).to(tl.float32)
    g = tl.where(best * scale[None, :] + shift[None, :] > 0, g * scale[None, :], 0.0)
    for k in tl.static_range(POOL):
        value = tl.load(y + at + k * channels, mask=here, other=0.0).to(tl.float32)
        d = offset[None, :] + slope[None, :] * value + tl.where(which == k, g, 0.0)
        tl.store(dy + at + k * channels, d.to(dy.dtype.element_ty), mask=here)


def _shape(rows, channels):
    """Columns and rows of a tile; and for sums the rows of one program, and how many programs."""
    columns = min(128, triton.next_power_of_2(channels))
    tile = 2048 // columns
    chunk = triton.cdiv(triton.cdiv(rows, PROGRAMS // triton.cdiv(channels, columns)), tile) * tile
    return {"COLUMNS": columns, "ROWS": tile}, triton.cdiv(channels, columns), chunk, triton.cdiv(rows, chunk)


def _sums(partial, rows, chunk, pool, over_processes):
    """The sums (2, C) float64 of this process and of all of them."""
    _, programs, channels = partial.shape
    own = partial.new_empty(2, channels, dtype=torch.float64)
    _combine[(triton.cdiv(channels, 4),)](partial, own, programs, rows, channels, chunk, PIVOT=len(partial) == 3, POOL=pool, PROGRAMS=PROGRAMS, COLUMNS=4, num_warps=8)
    everybody = own.clone() if over_processes else own
    if over_processes:
        dist.all_reduce(everybody)
    return own, everybody


class BlockStep(torch.autograd.Function):
    """Convolution, batch norm in training, max-pool over `pool` (3, or 1: none) and ReLU: (B, C, 1, T) -> (B, C', 1, T / pool).

    With `over_processes` the statistics are those of all processes (section 3.2), which hold as many rows each. The bias moves
    the running mean alone; its gradient is zero. See model.TrainingStep for the formulas."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, norm, pool, dtype, over_processes):
        x, w = x.to(dtype), weight.to(dtype)
        y = F.conv2d(x, w, padding=(0, 1)).permute(0, 2, 3, 1).contiguous()  # (B, 1, T, C'), as it lies in memory
        batch, _, steps, channels = y.shape
        rows = batch * steps // pool
        sizes, across, chunk, programs = _shape(rows, channels)
        top, partial, values = y.new_empty(batch, 1, steps // pool, channels), gamma.new_empty(3, programs, channels), gamma.new_empty(4, channels)
        _maxima[(programs, across)](y, gamma, top, partial, rows, channels, chunk, POOL=pool, **sizes)
        _, everybody = _sums(partial, rows, chunk, pool, over_processes)
        ctx.count = rows * pool * (dist.get_world_size() if over_processes else 1)
        norm.num_batches_tracked += 1
        _statistics[(triton.cdiv(channels, 128),)](everybody, gamma, beta, bias, norm.running_mean, norm.running_var, values, ctx.count,
                                                   ctx.count / max(1, ctx.count - 1), channels, norm.momentum, norm.eps, COLUMNS=128)
        out = torch.empty_like(top)
        _normalise[(triton.cdiv(rows, sizes["ROWS"]), across)](top, values, out, rows, channels, **sizes)
        ctx.save_for_backward(x, w, y, top, values)
        ctx.pool, ctx.over_processes = pool, over_processes
        return out.permute(0, 3, 1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, w, y, top, values = ctx.saved_tensors
        grad, channels = grad.permute(0, 2, 3, 1).contiguous(), y.shape[-1]
        rows = top.numel() // channels
        sizes, across, chunk, programs = _shape(rows, channels)
        partial, slopes, dy = values.new_empty(2, programs, channels), torch.empty_like(values), torch.empty_like(y)
        _gradient_sums[(programs, across)](grad, top, values, partial, rows, channels, chunk, **sizes)
        own, everybody = _sums(partial, rows, chunk, 1, ctx.over_processes)
        _slopes[(triton.cdiv(channels, 128),)](own, everybody, values, slopes, ctx.count, channels, COLUMNS=128)
        _spread[(triton.cdiv(rows, sizes["ROWS"]), across)](y, grad, values, slopes, dy, rows, channels, POOL=ctx.pool, **sizes)
        dx, dw, _ = torch.ops.aten.convolution_backward(dy.permute(0, 3, 1, 2), x, w, None, [1, 1], [0, 1], [1, 1], False, [0, 0], 1,
                                                        [ctx.needs_input_grad[0], True, False])
        return dx, dw.to(values.dtype), torch.zeros_like(slopes[0]), slopes[0], slopes[1], None, None, None, None


# ------------------------------------------------------------------------------------------------------------ The stem


@triton.jit
def _moments(rows, partial, count, chunk, ROWS: tl.constexpr):
    """partial (programs, 9) of rows (N, 4), each 1 and three samples: their sums, and sums of products 00 01 02 11 12 22."""
    program, r = tl.program_id(0).to(tl.int64), tl.arange(0, ROWS)
    begin = program * chunk
    end = tl.minimum(begin + chunk, count)
    a, b, c = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    aa, ab, ac, bb, bc, cc = a, a, a, a, a, a
    while begin < end:
        at, here = rows + (begin + r) * 4, begin + r < end
        x, y, z = tl.load(at + 1, mask=here, other=0.0), tl.load(at + 2, mask=here, other=0.0), tl.load(at + 3, mask=here, other=0.0)
        a, b, c, aa, ab, ac, bb, bc, cc = a + x, b + y, c + z, aa + x * x, ab + x * y, ac + x * z, bb + y * y, bc + y * z, cc + z * z
        begin += ROWS
    partial += program * 9
    tl.store(partial, tl.sum(a, 0))
    tl.store(partial + 1, tl.sum(b, 0))
    tl.store(partial + 2, tl.sum(c, 0))
    tl.store(partial + 3, tl.sum(aa, 0))
    tl.store(partial + 4, tl.sum(ab, 0))
    tl.store(partial + 5, tl.sum(ac, 0))
    tl.store(partial + 6, tl.sum(bb, 0))
    tl.store(partial + 7, tl.sum(bc, 0))
    tl.store(partial + 8, tl.sum(cc, 0))


@triton.jit
def _stem(rows, folded, shift, out, count, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out (N, C) = ReLU(rows folded + shift)."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real, inside = c < channels, row < count
    high = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(shift + c, mask=real, other=0.0)[None, :]
    for k in tl.static_range(3):
        high += tl.load(rows + row * 4 + 1 + k, mask=inside, other=0.0)[:, None] * tl.load(folded + k * channels + c, mask=real, other=0.0)[None, :]
    tl.store(out + row[:, None] * channels + c[None, :], tl.where(high < 0, 0.0, high).to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _stem_sums(rows, grad, folded, shift, partial, count, channels, chunk, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """partial (4, programs, C): sums of g times each column of rows, g being the incoming gradient where the ReLU was open."""
    program, column, r = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, ROWS)
    real, begin = column < channels, program * chunk
    end = tl.minimum(begin + chunk, count)
    move = tl.load(shift + column, mask=real, other=0.0)[None, :]
    u, v, w = (tl.load(folded + column, mask=real, other=0.0)[None, :], tl.load(folded + channels + column, mask=real, other=0.0)[None, :],
               tl.load(folded + 2 * channels + column, mask=real, other=0.0)[None, :])
    ones = tl.zeros([ROWS, COLUMNS], tl.float32)
    a, b, c = ones, ones, ones
    while begin < end:
        row = begin + r
        at, inside = rows + row * 4, row < end
        x, y, z = (tl.load(at + 1, mask=inside, other=0.0)[:, None], tl.load(at + 2, mask=inside, other=0.0)[:, None],
                   tl.load(at + 3, mask=inside, other=0.0)[:, None])
        g = tl.load(grad + row[:, None] * channels + column[None, :], mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
        g = tl.where(x * u + y * v + z * w + move > 0, g, 0.0)
        ones, a, b, c = ones + g, a + g * x, b + g * y, c + g * z
        begin += ROWS
    partial, stride = partial + program * channels + column, tl.num_programs(0) * channels
    tl.store(partial, tl.sum(ones, 0), mask=real)
    tl.store(partial + stride, tl.sum(a, 0), mask=real)
    tl.store(partial + 2 * stride, tl.sum(b, 0), mask=real)
    tl.store(partial + 3 * stride, tl.sum(c, 0), mask=real)


def stem_moments(rows):
    """rows (N, 4) float32, each 1 and three samples -> rows^T rows, (4, 4) float64."""
    chunk = triton.cdiv(len(rows), PROGRAMS)
    partial = rows.new_empty(triton.cdiv(len(rows), chunk), 9)
    _moments[(len(partial),)](rows, partial, len(rows), chunk, ROWS=1024)
    sums = partial.sum(0, dtype=torch.float64)
    count = sums.new_full((1,), len(rows))
    return torch.stack([torch.cat([count, sums[:3]]), torch.cat([sums[:1], sums[3:6]]), torch.cat([sums[1:2], sums[4:5], sums[6:8]]),
                        torch.cat([sums[2:3], sums[5:6], sums[7:9]])])


def stem(rows, folded, shift, out):
    """Write ReLU(rows (N, 4) without its first column @ folded (3, C) + shift (C,)), all float32, to out (N, C)."""
    sizes, across, _, _ = _shape(len(rows), out.shape[1])
    _stem[(triton.cdiv(len(rows), sizes["ROWS"]), across)](rows, folded, shift, out, len(rows), out.shape[1], **sizes)


def stem_sums(rows, grad, folded, shift):
    """Sums over N of g and of g times the three samples, (4, C) float64, g being grad (N, C) where `stem` gave more than zero."""
    sizes, across, chunk, programs = _shape(len(rows), grad.shape[1])
    partial = rows.new_empty(4, programs, grad.shape[1])
    _stem_sums[(programs, across)](rows, grad, folded, shift, partial, len(rows), grad.shape[1], chunk, **sizes)
    return partial.sum(1, dtype=torch.float64)
