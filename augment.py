"""The augmentations of CLMR as one batched, exact and fast chain in plain torch, 2.9 or later (paper, section 3.1).
On a GPU one loop of it is a Triton kernel, where Triton works; without it the chain takes six times as long there.

    python augment.py song.wav --out listen/          # hear each transform alone and three full chains

leaves in listen/: original.wav, one wav per transform, chain-1.wav to chain-3.wav, and spectrograms.png, and prints
every value drawn, with its unit.

What the chain does to each view, in this order; every decision and value is drawn independently for every view:

| transform | what it does | values | probability |
|---|---|---|---|
| polarity | times -1 | | 0.8 |
| noise | adds white Gaussian noise | 80 dB signal-to-noise ratio | 0.01 |
| gain | changes the level | -6 to 0 dB | 0.3 |
| filter | Butterworth low-pass or high-pass, a coin flip | 2200 to 4000 Hz, or 200 to 1200 Hz | 0.8 |
| delay | adds an echo at half the amplitude | 200 to 500 ms in steps of 50 ms | 0.4 |
| pitch | shifts the pitch, keeps the length | -5 to 5 semitones | 0.4 |
| reverb | Freeverb, as sox's `reverb` in mono | reverberance, damping, room size: 0 to 100 % each | 0.4 |

(The random crop comes before the chain and belongs to whoever reads the audio.) `TRANSFORMS` below holds the same
table for the machine. In code:

    chain = Chain(sample_rate)
    draws = chain.draw(len(x), torch.Generator().manual_seed(step))   # a dict of tensors, one row per example
    y = chain(x, draws)                                               # x: (B, 1, T) float32 on any device

Drawing is apart from processing, so that a process may draw for the whole batch and take only its rows of `draws`,
and so that every value can be logged, replayed and tested. Letters: B examples, T samples, n points of an FFT.
"""

import argparse
import contextlib
import math
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 16                  # rows worked on at once on a CPU, so that the temporaries stay in the cache


def _blocks(n: int, device: torch.device, size: int = BLOCK) -> list[slice]:
    size = size if device.type == "cpu" else max(n, 1)
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _check(x: Tensor, **values: tuple[Tensor, float, float]) -> None:
    """Raise ValueError unless x is mono, (B, 1, T), of float32, and each of values, given with its range, is (B,) and
    inside it."""
    if x.dim() != 3 or x.shape[1] != 1 or not x.shape[2]:
        raise ValueError(f"expected audio of shape (B, 1, T), got {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise ValueError(f"expected float32 audio, got {str(x.dtype).removeprefix('torch.')}; augment before autocast")
    for name, (value, low, high) in values.items():
        if value.shape != x.shape[:1]:
            raise ValueError(f"expected one {name} per example, shape ({x.shape[0]},), got {tuple(value.shape)}")
        if not ((value >= low) & (value <= high)).all():
            raise ValueError(f"expected {name} from {low:g} to {high:g}, got {value.min():g} to {value.max():g}")


def _on(x: Tensor, values: Tensor) -> Tensor:
    """values, where x is. A GPU goes on meanwhile: copies that wait would empty its queue some thirty times a batch."""
    return _send(values, x.device)


def _send(values: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)                # on Apple's GPUs the source of a copy might be gone too early
    return values.pin_memory().to(device, non_blocking=True)       # pageable memory over 64 KB would be waited for


def _fft(transform: Callable, x: Tensor, n: int) -> Tensor:
    """MKL transforms a single row by another and slower algorithm, which also rounds differently: it is given two."""
    return transform(x.expand(2, -1), n)[:1] if len(x) == 1 else transform(x, n)


# ------------------------------------------------------------------------------------------------ simple transforms
def polarity(x: Tensor, flip: Tensor) -> Tensor:
    """Invert the examples where flip (B,) is true.

    >>> polarity(torch.ones(2, 1, 3), torch.tensor([True, False]))[:, 0, 0].tolist()
    [-1.0, 1.0]
    """
    _check(x, flip=(flip, 0, 1))
    return x * (1 - 2 * _on(x, flip).to(x.dtype))[:, None, None]


def gain(x: Tensor, db: Tensor) -> Tensor:
    """Change the level by db (B,) decibels.

    >>> gain(torch.ones(1, 1, 3), torch.tensor([-20.0]))[0, 0, 0].item()
    0.10000000149011612
    """
    _check(x, db=(db, -math.inf, math.inf))
    return x * 10 ** (_on(x, db).to(x.dtype) / 20)[:, None, None]


def noise(x: Tensor, snr_db: Tensor, generator: torch.Generator | None = None, seed: Tensor | None = None) -> Tensor:
    """Add white Gaussian noise at a signal-to-noise ratio of snr_db (B,) decibels, measured over the example.

    An example's noise depends on its seed and length alone, not on the batch around it, nor on the device.
    seed (B,) int64; without it, seeds are drawn from the CPU generator.

    >>> noise(torch.ones(2, 1, 4), torch.tensor([80.0, 80.0]), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 4])
    """
    _check(x, snr_db=(snr_db, -math.inf, math.inf))
    seed = _on(x, _seed(len(x), generator) if seed is None else seed)
    scale = x[:, 0].square().mean(1, keepdim=True).sqrt() * 10 ** (-_on(x, snr_db).to(x.dtype)[:, None] / 20)
    y = torch.empty_like(x)
    for rows in _blocks(len(x), x.device, 2):
        y[rows, 0] = torch.addcmul(x[rows, 0], scale[rows], _gaussian(seed[rows], x.shape[2]))
    return y


def delay(x: Tensor, delay_ms: Tensor, sample_rate: int, factor: float = 0.5) -> Tensor:
    """Add to each example itself, delay_ms (B,) milliseconds later, times factor. The length stays.

    >>> delay(torch.eye(1, 5)[None], torch.tensor([2.0]), sample_rate=1000).tolist()
    [[[1.0, 0.0, 0.5, 0.0, 0.0]]]
    """
    _check(x, delay_ms=(delay_ms, 0, math.inf))
    shift = (delay_ms.cpu() * (sample_rate / 1000)).round().long()
    longest = int(shift.max()) if len(shift) else 0
    late = pad(x[:, 0], (longest, 0)).unfold(1, x.shape[-1], 1)    # (B, longest + 1, T), a view
    rows = torch.arange(len(x), device=x.device)
    return torch.add(x, late[rows, _on(x, longest - shift)][:, None], alpha=factor)


def _gaussian(seed: Tensor, n: int) -> Tensor:
    """Normal deviates (B, n) float32 from seeds (B,): splitmix64 of the position, the same on every device, then
    Box-Muller."""
    half = (n + 1) // 2
    z = seed[:, None] + torch.arange(1, half + 1, device=seed.device) * -7046029254386353131      # 2^64 / golden ratio
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor         # masked: >> of int64 copies the sign
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    first = (((z >> 40) & 0xFFFFFF).float() + 0.5) * 2**-24                   # in (0, 1): its logarithm stays finite
    second = ((z & 0xFFFFFF).float() + 0.5) * 2**-24
    radius, angle = first.log_().mul_(-2).sqrt_(), second.mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n]


# ------------------------------------------------------------------------------------------------ filters
FILTER_BLOCK = 32           # samples


def low_pass(x: Tensor, cutoff_hz: Tensor, sample_rate: int) -> Tensor:
    """Second-order Butterworth low-pass at cutoff_hz (B,): -3 dB there, 12 dB per octave above.

    The same filter as sox's `lowpass`, torchaudio's `lowpass_biquad` and scipy's `butter(2, cutoff)`.

    >>> low_pass(torch.zeros(2, 1, 100), torch.tensor([2200.0, 4000.0]), 22050).shape
    torch.Size([2, 1, 100])
    """
    return _butterworth(x, cutoff_hz, torch.zeros_like(cutoff_hz, dtype=torch.bool), sample_rate)


def high_pass(x: Tensor, cutoff_hz: Tensor, sample_rate: int) -> Tensor:
    """Second-order Butterworth high-pass at cutoff_hz (B,): -3 dB there, 12 dB per octave below.

    >>> high_pass(torch.zeros(2, 1, 100), torch.tensor([200.0, 1200.0]), 22050).shape
    torch.Size([2, 1, 100])
    """
    return _butterworth(x, cutoff_hz, torch.ones_like(cutoff_hz, dtype=torch.bool), sample_rate)


def _butterworth(x: Tensor, cutoff_hz: Tensor, high: Tensor, sample_rate: int) -> Tensor:
    """The recursion in blocks: inside a block of P samples it is a product with a triangular matrix of the impulse
    response; from block to block only one complex number per example is handed on."""
    _check(x, cutoff_hz=(cutoff_hz, 1, 0.499 * sample_rate))
    cutoff_hz, high = cutoff_hz.double().cpu(), high.cpu()
    # bilinear transform of 1 / (s^2 + sqrt(2) s + 1), times s^2 for the high-pass, as
    # H(z) = lead / |pole|^2 + residue / (1 - pole / z) + the conjugate
    corner = torch.tan(cutoff_hz * (math.pi / sample_rate))
    prototype = corner * complex(-1, 1) / math.sqrt(2)                                 # s of the pole
    pole = (1 + prototype) / (1 - prototype)
    lead = torch.where(high, 1.0, corner.square()) / (1 + math.sqrt(2) * corner + corner.square())
    zero = torch.where(high, 1.0, -1.0)                                                # twice, at z = 1 or z = -1
    residue = lead * (pole - zero).square() / (pole * (pole - pole.conj()))
    powers = pole[:, None] ** torch.arange(FILTER_BLOCK + 1)                           # (B, P + 1)
    impulse = 2 * (residue[:, None] * powers).real                                     # (B, P + 1)
    impulse[:, 0] += lead / pole.abs().square()
    owed = 2 * residue[:, None] * powers[:, 1:]                                        # owed to the state before
    inside = pad(_on(x, impulse[:, :-1].to(x.dtype)), (FILTER_BLOCK - 1, 0))
    inside = inside.unfold(1, FILTER_BLOCK, 1).flip(1)                                 # (B, P, P): [j, i] = h[i - j]
    owed = _on(x, torch.stack([owed.real, -owed.imag], 1).to(x.dtype))                 # (B, 2, P)
    left = _on(x, torch.view_as_real(powers[:, :-1].flip(1)).to(x.dtype))              # (B, P, 2): what a block leaves
    inside = torch.cat([inside, left], 2)                                              # (B, P, P + 2)
    total, count = x.shape[-1], -(-x.shape[-1] // FILTER_BLOCK)
    factors = powers[:, -1:] ** (1 << torch.arange((count - 1).bit_length()))          # of blocks 1, 2, 4, ... before
    # below 1e-30 a factor is nothing to the sum, but numbers like that are slow to compute with
    factors = _on(x, torch.where(factors.abs() > 1e-30, factors, 0).to(torch.complex64))
    y = torch.empty_like(x)
    for rows in _blocks(len(x), x.device):
        blocks = pad(x[rows, 0], (0, count * FILTER_BLOCK - total)).view(-1, count, FILTER_BLOCK)
        out = torch.bmm(blocks, inside[rows])                                          # (B, M, P + 2)
        state = torch.view_as_complex(out[:, :, FILTER_BLOCK:].contiguous())           # (B, M)
        for k in range(factors.shape[1]):                                              # an inclusive scan by doubling
            step = 1 << k
            state = torch.cat([state[:, :step], torch.addcmul(state[:, step:], factors[rows, k, None], state[:, :-step])], 1)
        before = torch.view_as_real(pad(state[:, :-1], (1, 0)))                        # (B, M, 2)
        out = torch.baddbmm(out[:, :, :FILTER_BLOCK], before, owed[rows])
        y[rows, 0] = out.flatten(1)[:, :total]
    return y


# ------------------------------------------------------------------------------------------------ pitch shift
SEGMENT = 0.050             # s from one splice to the next
FADE = 0.010                # s of cross-fade at a splice
SEARCH = 0.0075             # s either way that a segment may move to match the one before it: a period down to 67 Hz
DRIFT = 0.035               # s off its own time at most that a segment may run on without a splice, to spare an attack
TAPS, SHORT_TAPS = 32, 12   # of the interpolator: how near to half the sample rate it can read; while searching
BAND_UP, BAND_DOWN = 0.91, 0.97     # of half the sample rate is kept; images of what is below 0.91 are 50 dB down
GROUP = 32                  # outputs that the interpolator computes in one matrix product
ATTACK_BLOCK = 16           # samples, the resolution of the attacks
FRACTIONS = 2048            # places between two samples that the interpolator knows


def pitch_shift(x: Tensor, semitones: Tensor, sample_rate: int) -> Tensor:
    """Shift the pitch by semitones (B,), from -12 to 12, keeping the length and the tempo.

    Synchronised overlap-add: the output is laid together from segments of the input, each read at 2^(semitones / 12)
    times the speed by band-limited interpolation, each placed where it continues the one before it best (normalised
    cross-correlation), with a short cross-fade. Splices keep away from attacks, so that none is lost or heard twice.
    What would alias is removed beforehand.

    >>> pitch_shift(torch.zeros(2, 1, 4000), torch.tensor([-5.0, 5.0]), 22050).shape
    torch.Size([2, 1, 4000])
    """
    _check(x, semitones=(semitones, -12, 12))
    ratio = 2 ** (semitones.double().cpu() / 12)
    n = 1 << max(15, (x.shape[-1] + sample_rate // 50 - 1).bit_length())      # the band limit rings for under 20 ms
    y = torch.empty_like(x)
    bins = torch.arange(n // 2 + 1, device=x.device) * (2 / n)
    edges = _on(x, torch.where(ratio > 1, (1 / ratio).clamp(max=BAND_UP), BAND_DOWN).float())[:, None]
    for rows in _blocks(len(x), x.device, 4 * BLOCK):
        kept = ((edges[rows] - bins) * (1 / (0.03 * edges[rows]))).clamp_(0, 1)       # a ramp over the last 3 %
        kept = _fft(torch.fft.rfft, x[rows, 0], n).mul_(kept)
        y[rows, 0] = _overlap_add(_fft(torch.fft.irfft, kept, n)[:, :x.shape[-1]], ratio[rows], sample_rate)
    return y


def _overlap_add(x: Tensor, ratio: Tensor, sample_rate: int) -> Tensor:
    """x (B, T), ratio (B,) float64 on the CPU -> (B, T), from S segments."""
    total, hop = x.shape[1], round(SEGMENT * sample_rate)
    fade = round(FADE * sample_rate)
    segments, length = max(1, math.ceil(total / hop)), hop + fade      # the length is in output samples
    # room to look back from the first segment, which an octave down begins a quarter of its length early
    front = round(SEARCH * sample_rate) + TAPS + ATTACK_BLOCK * math.ceil(length / 4 / ATTACK_BLOCK)
    # every example is moved, so that the middle of a segment (not its beginning) is read at its own time
    late = ((ratio - 1) * (length / 2)).round().long()                 # (B,) samples
    most = int(late.abs().max())
    size = segments * hop + math.ceil((length + GROUP) * float(ratio.max()) + DRIFT * sample_rate) + 2 * (front + TAPS)
    padded = pad(x, (front + most, max(0, size + most - front - total))).unfold(1, size, 1)
    padded = padded[torch.arange(len(x), device=x.device), _on(x, most - late)]                 # (B, size)
    highest, ratio, start = float(ratio.max()), _on(x, ratio), _on(x, late) + front
    starts = _starts(padded, front, start, ratio, segments, sample_rate)
    pieces = x.new_empty(len(x), segments, length)
    for rows in _blocks(len(x), x.device, BLOCK // 4):
        pieces[rows] = _read_segments(padded[rows], starts[rows], ratio[rows], length, highest)
    fade_in = torch.linspace(0, math.pi / 2, fade, device=x.device).sin().square()
    pieces[:, 1:, :fade] = torch.lerp(pieces[:, :-1, hop:], pieces[:, 1:, :fade], fade_in)
    return pieces[:, :, :hop].flatten(1)[:, :total]


def _starts(padded: Tensor, front: int, start: Tensor, ratio: Tensor, segments: int, sample_rate: int) -> Tensor:
    """Where each segment starts in the input, (B, S), the first one at start (B,): each at most SEARCH from its own
    time (front + s hop), where it is most like what would have come next. One after the other, all examples at once."""
    if segments == 1:
        return start[:, None]
    batch, device = len(padded), padded.device
    hop, fade, search = (round(seconds * sample_rate) for seconds in (SEGMENT, FADE, SEARCH))
    phases = 16                                                        # lag = phases q + p with q < count, p < phases
    count = -(-(2 * search + 1) // phases)
    lags, width, first = count * phases, fade + phases - 1, front - search
    row = torch.arange(batch, device=device)
    # of all candidates of all segments: 1 / sqrt(energy), from running sums, and the attacks before and up to their end
    around = padded.as_strided((batch, segments - 1, lags + fade), (padded.stride(0), hop, 1), first + hop)
    power = pad(around.square().cumsum(2), (1, 0))
    scale = (power[:, :, fade:fade + lags] - power[:, :, :lags]).clamp_min_(1e-8).rsqrt_()
    scale = scale.view(batch, segments - 1, count, phases)
    attacks, reach = _attacks(padded, sample_rate), fade // ATTACK_BLOCK + 3
    blocks = (torch.arange(first, first + lags, phases, device=device)
              + torch.arange(hop, segments * hop, hop, device=device)[:, None]) // ATTACK_BLOCK
    candidates = torch.stack([attacks[:, blocks + (fade + phases) // ATTACK_BLOCK + 1], -attacks[:, blocks]], 2)
    # and around what comes next, by its block; a block of margin, so that going straight on is cheapest
    onward = torch.stack([attacks[:, reach:], -pad(attacks, (1, 0))[:, :-reach - 1]], 2)           # (B, blocks, 2)
    far = 1e-5 * (torch.arange(lags, device=device).view(count, phases) / search - 1).square()     # settles ties
    table = _kernel_table(SHORT_TAPS, device)
    step = (ratio * (hop * FRACTIONS)).round().long()                  # times are fixed-point: few and small calls
    if _in_one_kernel(device):
        starts = start[:, None].repeat(1, segments)
        sizes = {"FADE": fade, "LAGS": lags, "PHASES": phases, "TAPS": SHORT_TAPS, "FRACTIONS": FRACTIONS, "ATTACK_BLOCK": ATTACK_BLOCK,
                 "WIDTH": 1 << (fade - 1).bit_length(), "PART": 64}
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            _search_kernel()[(batch,)](padded.contiguous(), step, table, scale, candidates, onward.contiguous(), far, starts, padded.shape[1],
                                       onward.shape[1], hop, first, search, DRIFT * sample_rate, segments, **sizes)
        return starts
    continued = padded.unfold(1, fade + SHORT_TAPS - 1, 1)
    template = padded.new_zeros(batch, fade + 2 * (phases - 1))
    starts = [start]
    for s in range(1, segments):
        own = first + s * hop                                                                  # of the first lag
        # the template is what would come next, read between the samples: rounded, it would be heard as jitter
        ahead = torch.add(step, start, alpha=FRACTIONS)
        whole, kernel = ahead // FRACTIONS, table[ahead % FRACTIONS]                           # (B,), (B, SHORT_TAPS)
        near = continued[row, whole - (SHORT_TAPS // 2 - 1)].unfold(1, fade, 1).contiguous()   # (B, SHORT_TAPS, fade)
        next_up = torch.bmm(kernel[:, None], near)[:, 0]                                       # (B, fade)
        norm = torch.linalg.vector_norm(next_up, dim=1, keepdim=True).clamp_min(1e-4)
        template[:, phases - 1:1 - phases] = next_up / norm
        # the product with the input at lag phases q + p is one small matrix product: the input from phases q on, times
        # the template moved by p; a view can only move it the other way, so p runs backwards
        room = padded.as_strided((batch, count, width), (padded.stride(0), phases, 1), own).contiguous()
        moved = template.unfold(1, width, 1).contiguous().transpose(1, 2)                      # (B, width, phases)
        match = torch.bmm(room, moved).flip(2)                                                 # (B, count, phases)
        # attacks between here and the candidate, both cross-faded stretches included, are lost or heard twice: up to
        # the later end of the two stretches, less those before the earlier beginning
        here = onward[row, whole // ATTACK_BLOCK]                                              # (B, 2)
        cut = torch.maximum(candidates[:, s - 1], here[:, :, None]).sum(1)                     # (B, count)
        lag = torch.addcmul(cut[:, :, None] + far, match, scale[:, s - 1], value=-1).flatten(1).argmin(1)
        hold = (cut[row, lag // phases] > 0.2) & ((whole - (own + search)).abs() < DRIFT * sample_rate)
        start = torch.where(hold, (ahead + FRACTIONS // 2) // FRACTIONS, lag + own)            # hold: no splice here
        starts.append(start)
    return torch.stack(starts, 1)


@lru_cache(maxsize=8)
def _in_one_kernel(device: torch.device) -> bool:
    """Whether the loop of `_starts` is one kernel on device: on a GPU, if Triton works there (it comes with torch for Linux,
    and needs a C compiler and Python's headers). As torch's own it is 1,300 launches one after the other, and the whole chain takes six times as long."""
    if device.type != "cuda":
        return False
    try:
        import triton
        import triton.language as tl

        @triton.jit
        def trial(x):
            tl.store(x, 1.0)

        with torch.cuda.device(device):
            trial[(1,)](torch.empty(1, device=device))
        return True
    except Exception as error:  # of types of Triton's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn(f"pitch_shift takes its slower way on this GPU: Triton cannot be used ({reason})", stacklevel=2)
        return False


@lru_cache(maxsize=1)
def _search_kernel():
    """The loop of `_starts` for Triton: a program per example."""
    import triton
    import triton.language as tl

    @triton.jit
    def search(padded, step, table, scale, candidates, onward, far, starts, size, blocks, hop, first, middle, drift, segments,
               FADE: tl.constexpr, LAGS: tl.constexpr, PHASES: tl.constexpr, TAPS: tl.constexpr, FRACTIONS: tl.constexpr,
               ATTACK_BLOCK: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
        row, i, part = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH), tl.arange(0, PART)
        padded, onward, starts, step = padded + row * size, onward + row * blocks * 2, starts + row * segments, tl.load(step + row)
        scale, candidates = scale + row * (segments - 1) * LAGS, candidates + row * (segments - 1) * 2 * (LAGS // PHASES)
        start, s = tl.load(starts), 1
        while s < segments:
            own, ahead = first + s * hop, step + start * FRACTIONS
            whole, weights = ahead // FRACTIONS, table + ahead % FRACTIONS * TAPS
            next_up = tl.zeros([WIDTH], tl.float32)
            for tap in tl.static_range(TAPS):
                read = tl.load(padded + whole - (TAPS // 2 - 1) + tap + i, mask=i < FADE, other=0.0)
                next_up += tl.load(weights + tap) * read
            next_up /= tl.maximum(tl.sqrt(tl.sum(next_up * next_up, 0)), 1e-4)
            lost, twice = tl.load(onward + whole // ATTACK_BLOCK * 2), tl.load(onward + whole // ATTACK_BLOCK * 2 + 1)
            best, best_lag = float("inf"), 0
            for begin in range(0, LAGS, PART):
                lag = begin + part
                sound = padded + own + lag[:, None] + i[None, :]
                sound = tl.load(sound, mask=(lag < LAGS)[:, None] & (i < FADE)[None, :], other=0.0)
                match = tl.sum(sound * next_up[None, :], 1) * tl.load(scale + lag, mask=lag < LAGS, other=0.0)
                candidate = candidates + lag // PHASES
                cut = tl.maximum(tl.load(candidate, mask=lag < LAGS, other=0.0), lost)
                cut += tl.maximum(tl.load(candidate + LAGS // PHASES, mask=lag < LAGS, other=0.0), twice)
                score = tl.where(lag < LAGS, cut + tl.load(far + lag, mask=lag < LAGS, other=0.0) - match, float("inf"))
                lowest, at = tl.min(score, 0), begin + tl.argmin(score, 0)
                if lowest < best:
                    best, best_lag = lowest, at
            candidate = candidates + best_lag // PHASES
            cut = tl.maximum(tl.load(candidate), lost) + tl.maximum(tl.load(candidate + LAGS // PHASES), twice)
            hold = (cut > 0.2) & (tl.abs(whole - (own + middle)) < drift)
            start = tl.where(hold, (ahead + FRACTIONS // 2) // FRACTIONS, own + best_lag)
            tl.store(starts + s, start)
            s, scale, candidates = s + 1, scale + LAGS, candidates + 2 * (LAGS // PHASES)

    return search


def _attacks(padded: Tensor, sample_rate: int) -> Tensor:
    """How many attacks there are before each block, (B, size / ATTACK_BLOCK + 8): a running sum of the energy of the
    differenced signal where it is over four times its mean within 50 ms; a click adds nearly 1, a steady sound 0."""
    energy = padded.diff().unfold(1, ATTACK_BLOCK, ATTACK_BLOCK).square().sum(2)
    near = round(0.05 * sample_rate / ATTACK_BLOCK)
    sums = pad(energy.double(), (near + 1, near)).cumsum(1)
    mean = (sums[:, 2 * near + 1:] - sums[:, :-2 * near - 1]).float().div_(2 * near + 1)
    over = (energy / mean.add_(1e-12)).sub_(4).clamp_min_(0).div_(2 * near + 1)
    return pad(over, (1, 8)).cumsum(1)


def _read_segments(padded: Tensor, starts: Tensor, ratio: Tensor, length: int, highest: float) -> Tensor:
    """(B, S, length): from each start on, every ratio-th sample, ratio being at most `highest`. All segments of an
    example share the fractions between the samples, so GROUP neighbouring outputs of all its segments are one product
    with one small banded matrix."""
    batch, segments = starts.shape
    groups = -(-length // GROUP)
    span = math.ceil(GROUP * max(1.34, highest)) + TAPS
    position = torch.arange(groups * GROUP, device=padded.device) * ratio[:, None]             # (B, K G) float64
    whole = position.floor().long()
    kernel = _kernel((position - whole).float(), TAPS)                                         # (B, K G, TAPS)
    whole = whole.view(batch, groups, GROUP)
    base = whole[:, :, :1]                                                                     # (B, K, 1)
    column = (whole - base)[..., None] + torch.arange(TAPS, device=padded.device)              # (B, K, G, TAPS)
    band = kernel.new_zeros(batch, groups, span, GROUP).transpose(2, 3).scatter_(3, column, kernel.view(column.shape))
    index = starts[:, None, :] + (base - (TAPS // 2 - 1))                                      # (B, K, S)
    row = torch.arange(batch, device=padded.device)[:, None, None]
    windows = padded.unfold(1, span, 1)[row, index]                                            # (B, K, S, span)
    pieces = torch.bmm(windows.flatten(0, 1), band.flatten(0, 1).transpose(1, 2))              # (B K, S, G)
    return pieces.view(batch, groups, segments, GROUP).transpose(1, 2).flatten(2)[:, :, :length]


def _kernel(fraction: Tensor, taps: int) -> Tensor:
    """Weights (..., taps) that read a signal `fraction` after a sample: sinc under a Kaiser window."""
    return _kernel_table(taps, fraction.device)[(fraction * FRACTIONS).round().long()]


@lru_cache(maxsize=8)
def _kernel_table(taps: int, device: torch.device) -> Tensor:
    t = torch.arange(taps) - (taps // 2 - 1) - torch.arange(FRACTIONS + 1, dtype=torch.float64)[:, None] / FRACTIONS
    weights = torch.sinc(t) * torch.special.i0(4.5 * (1 - (t / (taps / 2)).square()).clamp_min(0).sqrt())
    return (weights / weights.sum(1, keepdim=True)).float().to(device)         # waits, once: other streams will read it


# ------------------------------------------------------------------------------------------------ reverb
COMBS = (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617)        # delays in samples at 44,100 Hz (Freeverb)
ALL_PASSES = (225, 341, 441, 556)
DECAY_DB = 70               # of the weight over the points of one FFT
COLUMNS = 256               # the bins of an FFT are a table with that many columns: delays are outer products there


def reverb(x: Tensor, reverberance: Tensor, damping: Tensor, room_size: Tensor, sample_rate: int) -> Tensor:
    """Add the sound of a room: Freeverb with the parameters of sox's `reverb`, each (B,) from 0 to 100 %.

    Freeverb is linear and time-invariant: eight damped combs in parallel, four all-passes in series. Its transfer
    function is evaluated at the points of one FFT. Its tail is longer than the signal, so both are weighted by
    rho^-t with rho slightly above 1, which is to evaluate on the circle of radius rho: what wraps around is then
    70 dB down. Equal to `sox in out reverb REVERBERANCE DAMPING ROOM 0 0 0` to about 1e-4 of the wet signal.

    >>> reverb(torch.zeros(1, 1, 100), *torch.tensor([[50.0], [50.0], [100.0]]), 22050).shape
    torch.Size([1, 1, 100])
    """
    _check(x, reverberance=(reverberance, 0, 100), damping=(damping, 0, 100), room_size=(room_size, 0, 100))
    reverberance, damping, room_size = (value.double().cpu() for value in (reverberance, damping, room_size))
    total = x.shape[-1]
    n = 1 << max(15, (total - 1).bit_length())                                # points of an FFT; short audio, long tail
    weight, phases, one_sample, all_passes = _circle(sample_rate, n, x.device)
    y = torch.empty_like(x)
    for rows in _blocks(len(x), x.device):
        spectrum = _fft(torch.fft.rfft, x[rows, 0] * weight[:total], n)
        loop, coarse, fine = _room(reverberance[rows], damping[rows], room_size[rows], sample_rate, phases, one_sample)
        for row in _blocks(len(spectrum), x.device, 1):
            # with f the reciprocal gain around its loop, a comb is z^-D / (1 - z^-D / f) = (f / (f - z^-D) - 1) f: so
            # the eight combs share all but a sum of eight reciprocals
            combs = torch.addcmul(loop[row, None], coarse[row], fine[row], value=-1).reciprocal_().sum(1)
            wet = combs.mul_(loop[row]).sub_(len(COMBS)).mul_(loop[row]).mul_(all_passes)
            spectrum[row] *= wet.flatten(1)[:, :n // 2 + 1]
        y[rows, 0] = torch.addcdiv(x[rows, 0], _fft(torch.fft.irfft, spectrum, n)[:, :total], weight[:total])
    return y


def _room(reverberance: Tensor, damping: Tensor, room_size: Tensor, sample_rate: int, phases: Tensor,
          one_sample: Tensor) -> tuple[Tensor, ...]:
    """What the transfer function of a room is made of, at bin COLUMNS a + b of an n-point FFT: the reciprocal of the
    gain around the loop of a comb, (1 - d / z) / (feedback (1 - d)), (B, A, COLUMNS); and the delay of each comb as an
    outer product, (B, 8, A, 1) times (B, 8, 1, COLUMNS)."""
    n, device = len(phases), phases.device
    a = -1 / math.log(1 - 0.3)
    b = 100 / (math.log(1 - 0.98) * a + 1)
    feedback = 1 - torch.exp((reverberance - b) / (a * b))                          # (B,)
    d = damping / 100 * 0.3 + 0.2
    scale = (room_size / 100 * 0.9 + 0.1) * (sample_rate / 44100)
    samples = torch.floor(scale[:, None] * torch.tensor(COMBS) + 0.5)[:, :, None]            # (B, 8, 1)
    decay = torch.exp(samples * (-DECAY_DB / 20 * math.log(10) / n))                         # rho^-D
    samples = _on(phases, samples.long())
    fine = phases[(samples * torch.arange(COLUMNS, device=device)) % n] * _on(phases, decay.float())
    coarse = phases[(samples * torch.arange(0, n // 2 + 1, COLUMNS, device=device)) % n]     # (B, 8, A)
    gain, damp = (_on(phases, (value / (feedback * (1 - d))).float())[:, None, None] for value in (1, d))
    return gain - damp * one_sample, coarse[..., None], fine[:, :, None]


@lru_cache(maxsize=4)
def _circle(sample_rate: int, n: int, device: torch.device) -> tuple[Tensor, ...]:
    """What all rooms share on the circle of radius rho, rho^n = DECAY_DB: the weights rho^-t and e^(-2 pi i k / n),
    (n,); and at bin COLUMNS a + b of an n-point FFT z^-1 and the four all-passes with the wet gain, (A, COLUMNS)."""
    turns = torch.arange(n, dtype=torch.float64) / n
    log_rho = DECAY_DB / 20 * math.log(10) / n
    phases = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
    bins = torch.arange((n // 2 // COLUMNS + 1) * COLUMNS, dtype=torch.float64).view(-1, COLUMNS)
    log_z = torch.complex(torch.full_like(bins, log_rho), bins * (2 * math.pi / n))
    all_passes = torch.full_like(log_z, 0.015)
    for delay_44100 in ALL_PASSES:
        z = torch.exp(log_z * -math.floor(delay_44100 * sample_rate / 44100 + 0.5))
        all_passes *= (1.5 * z - 1) / (1 - 0.5 * z)
    weight = torch.exp(turns * (-n * log_rho)).float()
    tables = weight, *(t.to(torch.complex64) for t in (phases, torch.exp(-log_z), all_passes))
    return tuple(t.to(device) for t in tables)                                  # waits, once: other streams will read it


# ------------------------------------------------------------------------------------------------ the chain
def _uniform(low: float, high: float) -> Callable:
    return lambda n, generator: low + (high - low) * torch.rand(n, generator=generator)


def _one_of(*values: float) -> Callable:
    return lambda n, generator: torch.tensor(values)[torch.randint(len(values), (n,), generator=generator)]


def _seed(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(2**62, (n,), generator=generator)


@dataclass(frozen=True)
class Transform:
    """A row of the table: the default probability; apply(x, sample_rate, **values), given the rows it was drawn for;
    and for each value how it is drawn, (n, generator) -> (n,), and its unit."""
    probability: float
    apply: Callable
    values: dict[str, tuple[Callable, str]] = field(default_factory=dict)


# order and ranges: section 3.1; probabilities: the best of Figure 3, else those of the released code
TRANSFORMS = {
    "polarity": Transform(0.8, lambda x, sample_rate: -x),
    "noise": Transform(0.01, lambda x, sample_rate, snr_db, seed: noise(x, snr_db, seed=seed),
                       {"snr_db": (_one_of(80.0), "dB"), "seed": (_seed, "")}),
    "gain": Transform(0.3, lambda x, sample_rate, db: gain(x, db), {"db": (_uniform(-6, 0), "dB")}),
    "filter": Transform(0.8, lambda x, sample_rate, high, low_pass_hz, high_pass_hz:
                        _butterworth(x, torch.where(high, high_pass_hz, low_pass_hz).clamp(max=0.499 * sample_rate),
                                     high, sample_rate),
                        {"high": (_one_of(False, True), ""), "low_pass_hz": (_uniform(2200, 4000), "Hz"),
                         "high_pass_hz": (_uniform(200, 1200), "Hz")}),
    "delay": Transform(0.4, lambda x, sample_rate, ms: delay(x, ms, sample_rate),
                       {"ms": (_one_of(*map(float, range(200, 501, 50))), "ms")}),
    "pitch": Transform(0.4, lambda x, sample_rate, semitones: pitch_shift(x, semitones, sample_rate),
                       {"semitones": (_uniform(-5, 5), "semitones")}),
    "reverb": Transform(0.4, lambda x, sample_rate, **values: reverb(x, sample_rate=sample_rate, **values),
                        {key: (_uniform(0, 100), "%") for key in ("reverberance", "damping", "room_size")}),
}


_LOCK, _BEFORE, _HERE = threading.Lock(), {}, threading.local()


@contextlib.contextmanager
def _exact(device: torch.device):
    """Products in full float32, whatever is allowed for the network outside (TF32, bfloat16 and autocast err by more than
    the noise added here), and one thread: work this small gains little from more, and on busy cores they cost tenfold.

    These are settings of the process. Where several threads are in here at once, the first one in has saved them and the
    last one out restores them."""
    if getattr(_HERE, "inside", False):  # a chain as a transform of another
        yield
        return
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    with _LOCK:
        threads = torch.get_num_threads()
        if not _BEFORE:
            _BEFORE.update(inside=0, threads=threads, precision=[backend.fp32_precision for backend in backends])
            for backend in backends:
                backend.fp32_precision = "ieee"
        elif threads == 1:  # a new thread begins with what is set in here
            threads = _BEFORE["threads"]
        _BEFORE["inside"] += 1
    torch.set_num_threads(1)
    _HERE.inside = True
    try:
        with torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else contextlib.nullcontext():
            yield
    finally:
        _HERE.inside = False
        with _LOCK:
            torch.set_num_threads(threads)
            _BEFORE["inside"] -= 1
            if not _BEFORE["inside"]:
                for backend, precision in zip(backends, _BEFORE["precision"]):
                    backend.fp32_precision = "none"  # as it is more generally set, where that is what it was
                    if backend.fp32_precision != precision:
                        backend.fp32_precision = precision
                _BEFORE.clear()


class Chain:
    """The transforms one after the other, each on the examples it was drawn for.

    Args:
        sample_rate: of the audio, in Hz.
        transforms: names from the table (always applied in its order); all by default.
        probability: {name: probability} that replaces the table's; ValueError for a wrong name or value.
        table: {name: Transform}; TRANSFORMS by default.

    >>> chain = Chain(22050, probability={"noise": 1})
    >>> draws = chain.draw(4, torch.Generator().manual_seed(0))
    >>> draws["noise"].tolist(), draws["pitch.semitones"].shape
    ([True, True, True, True], torch.Size([4]))
    >>> chain(torch.zeros(4, 1, 1000), draws).shape
    torch.Size([4, 1, 1000])
    """

    def __init__(self, sample_rate: int, transforms=None, probability: dict[str, float] | None = None, table=None):
        table = TRANSFORMS if table is None else table
        names, probability = list(table if transforms is None else transforms), probability or {}
        for name in [*names, *probability]:
            if name not in table:
                raise ValueError(f"expected transforms among {', '.join(table)}, got {name!r}")
            if not 0 <= probability.get(name, 0) <= 1:
                raise ValueError(f"expected a probability from 0 to 1 for {name}, got {probability[name]}")
            if name not in names:
                raise ValueError(f"expected probabilities of the transforms chosen, {', '.join(names)}; got {name}")
        self.sample_rate = sample_rate
        self.transforms = {name: table[name] for name in table if name in names}
        self.probability = {name: probability.get(name, t.probability) for name, t in self.transforms.items()}

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Decisions and values for `batch` examples from a CPU generator: {"pitch": (B,) bool, "pitch.semitones":
        (B,) float32, ...}. Values are drawn for every example, so they do not depend on the probabilities."""
        draws = {}
        for name, transform in self.transforms.items():
            draws[name] = torch.rand(batch, generator=generator) < self.probability[name]
            for key, (draw, _) in transform.values.items():
                draws[f"{name}.{key}"] = draw(batch, generator)
        return draws

    @torch.no_grad()
    def __call__(self, x: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """x (B, 1, T) float32 -> the same shape; x itself is not changed. Rows do not depend on each other."""
        _check(x)
        for name in self.transforms:
            if len(draws.get(name, ())) != len(x):
                raise ValueError(f"expected draws of {name} for {len(x)} examples, got {len(draws.get(name, ()))}")
        y = x.clone()
        with _exact(x.device):
            for block in _blocks(len(x), x.device, 4 * BLOCK):
                for name, transform in self.transforms.items():
                    rows = draws[name][block].nonzero().flatten() + block.start
                    if len(rows):
                        values = {key: draws[f"{name}.{key}"][rows] for key in transform.values}
                        rows = _on(y, rows)
                        y[rows] = transform.apply(y[rows], self.sample_rate, **values)
        return y


# ------------------------------------------------------------------------------------------------ listening
def describe(chain: Chain, draws: dict[str, Tensor], row: int = 0) -> list[str]:
    """One line per transform that was drawn for this row, with its values and units."""
    lines = []
    for name in (name for name in chain.transforms if draws[name][row]):
        units = {key: unit for key, (_, unit) in chain.transforms[name].values.items()}
        values = [(key, draws[f"{name}.{key}"][row].item(), unit) for key, unit in units.items()]
        words = [f"{key} {value:.4g} {unit}" if unit else f"{key} {value}" for key, value, unit in values]
        lines.append(f"  {name}: {', '.join(words) or 'on'}")
    return lines


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="augment.py", usage="augment.py FILE [--out DIR] [--seconds S] [--seed N]",
                                     description="Hear each augmentation alone and three full chains.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    data = parser.add_argument_group("data")
    data.add_argument("file", metavar="FILE", type=Path, help="a recording, in any format that libsndfile reads")
    data.add_argument("--seconds", type=float, default=30.0, help="of the recording's beginning to use")
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("listen"), help="folder for the wav files and the picture")
    run.add_argument("--seed", type=int, default=0, help="of the values drawn")
    return parser


def _spectrograms(path: Path, sounds: dict[str, Tensor], sample_rate: int) -> None:
    from matplotlib.figure import Figure
    size, rows = 1 << round(math.log2(sample_rate * 0.046)), math.ceil(len(sounds) / 3)      # windows of about 46 ms
    figure = Figure((15, 2.7 * rows), layout="constrained")
    for axis, (name, sound) in zip(figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False).flat, sounds.items()):
        window = torch.hann_window(size)
        bins = torch.stft(sound, size, size // 4, window=window, pad_mode="constant", return_complex=True)
        level = 20 * torch.log10(bins.abs() / size + 1e-6)
        axis.imshow(level, origin="lower", aspect="auto", vmin=-100, vmax=-20, cmap="magma",
                    extent=(0, len(sound) / sample_rate, 0, sample_rate / 2000))
        axis.set_title(name, fontsize=10)
    figure.supxlabel("s"), figure.supylabel("kHz")
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> int:
    import soundfile
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.file.is_file():
        parser.error(f"expected a recording, got {args.file}, which is not a file")
    if not 0 < args.seconds < math.inf:
        parser.error(f"expected --seconds above 0, got {args.seconds:g}")
    try:
        with soundfile.SoundFile(args.file) as f:
            sample_rate = f.samplerate
            length = min(f.frames, math.ceil(args.seconds * sample_rate))
            audio = torch.from_numpy(f.read(length, dtype="float32", always_2d=True))
        x = audio.mean(1)[None, None]                                                    # (1, 1, T)
        if not x.numel() or not x.isfinite().all():
            raise ValueError(f"expected audio in {args.file}, got {'NaN or infinity' if x.numel() else 'no samples'}")
        args.out.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(args.seed)
        sounds = {"original": x[0, 0]}
        chains = {name: Chain(sample_rate, [name], {name: 1.0}) for name in TRANSFORMS}
        chains |= {f"chain-{i}": Chain(sample_rate) for i in (1, 2, 3)}
        for name, chain in chains.items():
            draws = chain.draw(1, generator)
            sounds[name] = chain(x, draws)[0, 0]
            print(f"{args.out / name}.wav", *describe(chain, draws) or ["  nothing drawn"], sep="\n")
        # one factor for all, so that levels can be compared and nothing clips
        peak = max(1.0, max(sound.abs().max().item() for sound in sounds.values()))
        for name, sound in sounds.items():
            soundfile.write(args.out / f"{name}.wav", (sound / peak).numpy(), sample_rate)
        _spectrograms(args.out / "spectrograms.png", sounds, sample_rate)
        print(args.out / "spectrograms.png")
    except (ValueError, OSError, soundfile.LibsndfileError) as error:
        print(f"augment.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
