"""The search of splice.py as one Triton kernel: a program for each example.

What it computes: splice._search_in_steps, to the sample. Why it is faster: in steps the search is
some 1,300 launches one after the other, and a GPU waits for its host. By how much: the chain on 192
views takes an H200 6.1 ms (3.3 ms of them kernels; the rest is the host's launches) in place of
39.7 (results/speed/pretrain-gpu-step.json). The plain way: augment._overlap_add.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Signals(NamedTuple):
    """Tensors, to the kernel their addresses: those of splice.Tables, and where they lead."""

    audio: Tensor
    weights: Tensor
    step: Tensor
    scale: Tensor
    candidates: Tensor
    onward: Tensor
    far: Tensor
    starts: Tensor          # (B, S), of which the first of each example is given


class Lengths(NamedTuple):
    """Numbers, as in augment.Splicing."""

    size: int               # of the audio
    blocks: int             # of onward
    segments: int
    hop: int
    first: int
    search: int
    drift: float


class Sizes(NamedTuple):
    """Numbers that the kernel is compiled for."""

    FADE: int
    LAGS: int
    BLOCK: int
    TAPS: int
    FRACTIONS: int
    WIDTH: int              # FADE as a power of two
    PART: int               # candidates at once


@triton.jit
def _what_comes_next(audio, weights, SIZES: tl.constexpr):
    """(WIDTH,) of norm 1, from this place in the audio on."""
    WIDTH: tl.constexpr = SIZES.WIDTH
    TAPS: tl.constexpr = SIZES.TAPS
    i = tl.arange(0, WIDTH)
    template = tl.zeros([WIDTH], tl.float32)
    for tap in tl.static_range(TAPS):
        read = tl.load(audio - (TAPS // 2 - 1) + tap + i, mask=i < SIZES.FADE, other=0.0)
        template += tl.load(weights + tap) * read
    return template / tl.maximum(tl.sqrt(tl.sum(template * template, 0)), 1e-4)


@triton.jit
def _attacks_cut(candidates, onward, lag, SIZES: tl.constexpr):
    """By a splice at these lags."""
    real = lag < SIZES.LAGS
    candidates += lag // SIZES.BLOCK
    end = tl.maximum(tl.load(candidates, mask=real, other=0.0), tl.load(onward))
    candidates += SIZES.LAGS // SIZES.BLOCK
    return end + tl.maximum(tl.load(candidates, mask=real, other=0.0), tl.load(onward + 1))


@triton.jit
def _match(audio, template, scale, lag, SIZES: tl.constexpr):
    """The normalised products of the template with the candidates at these lags."""
    i = tl.arange(0, SIZES.WIDTH)
    real = lag < SIZES.LAGS
    here = real[:, None] & (i < SIZES.FADE)[None, :]
    sound = tl.load(audio + lag[:, None] + i[None, :], mask=here, other=0.0)
    return tl.sum(sound * template[None, :], 1) * tl.load(scale + lag, mask=real, other=0.0)


@triton.jit
def _best_lag(audio, template, scale, candidates, onward, far, SIZES: tl.constexpr):
    """Of all candidates, a part of them at once."""
    best = float("inf")
    best_lag = 0
    for part in range(0, SIZES.LAGS, SIZES.PART):
        lag = part + tl.arange(0, SIZES.PART)
        real = lag < SIZES.LAGS
        cost = _attacks_cut(candidates, onward, lag, SIZES)
        cost += tl.load(far + lag, mask=real, other=0.0)
        cost -= _match(audio, template, scale, lag, SIZES)
        cost = tl.where(real, cost, float("inf"))
        lowest = tl.min(cost, 0)
        if lowest < best:
            best = lowest
            best_lag = part + tl.argmin(cost, 0)
    return best_lag


@triton.jit
def _next_start(signals, lengths, row, s, start, SIZES: tl.constexpr):
    """Where segment s of this row starts, the one before having started at start."""
    audio = signals.audio + row * lengths.size
    begin = lengths.first + s * lengths.hop                 # of the candidates
    ahead = tl.load(signals.step + row) + start * SIZES.FRACTIONS
    whole = ahead // SIZES.FRACTIONS
    weights = signals.weights + ahead % SIZES.FRACTIONS * SIZES.TAPS
    template = _what_comes_next(audio + whole, weights, SIZES)
    place = row * (lengths.segments - 1) + s - 1            # of this segment in the tables
    scale = signals.scale + place * SIZES.LAGS
    candidates = signals.candidates + place * 2 * (SIZES.LAGS // SIZES.BLOCK)
    onward = signals.onward + (row * lengths.blocks + whole // SIZES.BLOCK) * 2
    lag = _best_lag(audio + begin, template, scale, candidates, onward, signals.far, SIZES)
    drift = tl.abs(whole - (begin + lengths.search))
    hold = (_attacks_cut(candidates, onward, lag, SIZES) > 0.2) & (drift < lengths.drift)
    straight_on = (ahead + SIZES.FRACTIONS // 2) // SIZES.FRACTIONS
    return tl.where(hold, straight_on, begin + lag)


@triton.jit
def search_program(signals, lengths, SIZES: tl.constexpr):
    """One example, one segment after the other."""
    row = tl.program_id(0).to(tl.int64)
    starts = signals.starts + row * lengths.segments
    start = tl.load(starts)
    s = 1
    while s < lengths.segments:
        start = _next_start(signals, lengths, row, s, start, SIZES)
        tl.store(starts + s, start)
        s += 1


def arguments(plan, tables) -> tuple[Signals, Lengths, Sizes]:
    """Of the kernel, from augment.Splicing and splice.Tables."""
    audio = plan.audio
    weights = plan.short_weights
    signals = Signals(
        audio=audio.contiguous(), weights=weights, step=tables.step, scale=tables.scale,
        candidates=tables.candidates, onward=tables.onward.contiguous(), far=tables.far,
        starts=plan.start[:, None].repeat(1, plan.segments))
    lengths = Lengths(
        size=audio.shape[1], blocks=tables.onward.shape[1], segments=plan.segments,
        hop=plan.hop, first=plan.first, search=plan.search, drift=plan.drift)
    sizes = Sizes(
        FADE=plan.fade, LAGS=plan.lags, BLOCK=plan.block,
        TAPS=weights.shape[1], FRACTIONS=len(weights) - 1,
        WIDTH=1 << (plan.fade - 1).bit_length(), PART=64)
    return signals, lengths, sizes


def search_in_one_kernel(plan, tables) -> Tensor:
    """Where each segment starts in the audio, (B, S)."""
    signals, lengths, sizes = arguments(plan, tables)
    device = plan.audio.device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        search_program[(len(plan.audio),)](signals, lengths, sizes)
    return signals.starts


@triton.jit
def _store_one(x):
    tl.store(x, 1.0)


def trial(device: torch.device) -> None:
    """Raises where Triton does not work on this GPU."""
    with torch.cuda.device(device):
        _store_one[(1,)](torch.empty(1, device=device))
