"""The augmentations of CLMR as one batched, exact and fast chain (paper, section 3.1).

    python augment.py song.wav --out listen/          # hear each transform and three full chains

leaves in listen/: original.wav, one wav per transform, chain-1.wav to chain-3.wav, and
spectrograms.png, and prints every value drawn, with its unit.

What the chain does to each view, in this order; every decision and value is drawn independently:

| transform | what it does | values | probability |
|---|---|---|---|
| polarity | times -1 | | 0.8 |
| noise | adds white Gaussian noise | 80 dB signal-to-noise ratio | 0.01 |
| gain | changes the level | -6 to 0 dB | 0.3 |
| filter | Butterworth low- or high-pass, a coin flip | 2200 to 4000 Hz, or 200 to 1200 Hz | 0.8 |
| delay | adds an echo at half the amplitude | 200 to 500 ms in steps of 50 ms | 0.4 |
| pitch | shifts the pitch, keeps the length | -5 to 5 semitones | 0.4 |
| reverb | sox's `reverb`, in mono | reverberance, damping, room size: 0 to 100 % each | 0.4 |

(The random crop comes before the chain and belongs to whoever reads the audio.) `TRANSFORMS` holds
the same table for the machine. In code:

    chain = Chain(sample_rate)
    draws = chain.draw(len(x), torch.Generator().manual_seed(step))   # {name: (B,) tensor}
    y = chain(x, draws)                                # x: (B, 1, T) float32 on any device

Drawing is apart from processing, so that a process may draw for the whole batch and take only its
rows of `draws`, and so that every value can be logged, replayed and tested.

Needs torch alone, 2.9 or later. On a GPU one loop of the pitch shift is a kernel of
kernels/splice.py, where that lies beside this file and Triton works; without it the chain takes six
times as long there. Letters: B examples, T samples, n points of an FFT.
"""

import argparse
import contextlib
import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# ------------------------------------------------------------------------------- the chain


@dataclass(frozen=True)
class Transform:
    """A row of the table: the default probability; apply(x, sample_rate, **values) -> x, which is
    given the examples it was drawn for; and {value: (how it is drawn, its unit)}."""

    probability: float
    apply: Callable[..., Tensor]
    values: dict[str, tuple[Callable, str]] = field(default_factory=dict)


def _uniform(low: float, high: float) -> Callable:
    return lambda n, generator: low + (high - low) * torch.rand(n, generator=generator)


def _one_of(*values: float) -> Callable:
    choices = torch.tensor(values)
    return lambda n, generator: choices[torch.randint(len(values), (n,), generator=generator)]


def _seed(n: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(2**62, (n,), generator=generator)


PERCENT = (_uniform(0, 100), "%")

# order and ranges: section 3.1; probabilities: the best of Figure 3, else the released code's
TRANSFORMS = {
    "polarity": Transform(0.8, lambda x, sample_rate: -x),
    "noise": Transform(
        0.01, lambda x, sample_rate, snr_db, seed: noise(x, snr_db, seed=seed),
        {"snr_db": (_one_of(80.0), "dB"), "seed": (_seed, "")}),
    "gain": Transform(
        0.3, lambda x, sample_rate, db: gain(x, db),
        {"db": (_uniform(-6, 0), "dB")}),
    "filter": Transform(
        0.8, lambda x, sample_rate, **values: _low_or_high_pass(x, sample_rate, **values),
        {"high": (_one_of(False, True), ""),
         "low_pass_hz": (_uniform(2200, 4000), "Hz"),
         "high_pass_hz": (_uniform(200, 1200), "Hz")}),
    "delay": Transform(
        0.4, lambda x, sample_rate, ms: delay(x, ms, sample_rate),
        {"ms": (_one_of(*map(float, range(200, 501, 50))), "ms")}),
    "pitch": Transform(
        0.4, lambda x, sample_rate, semitones: pitch_shift(x, semitones, sample_rate),
        {"semitones": (_uniform(-5, 5), "semitones")}),
    "reverb": Transform(
        0.4, lambda x, sample_rate, **values: reverb(x, sample_rate=sample_rate, **values),
        {"reverberance": PERCENT, "damping": PERCENT, "room_size": PERCENT}),
}


class Chain:
    """The transforms one after the other, each on the examples it was drawn for.

    Args:
        sample_rate: of the audio, in Hz.
        transforms: names from the table (always applied in its order); all by default.
        probability: {name: probability} that replaces the table's.
        table: {name: Transform}; TRANSFORMS by default.

    Raises ValueError for a name that the table lacks and a probability outside 0 to 1.

    >>> chain = Chain(22050, probability={"noise": 1})
    >>> draws = chain.draw(4, torch.Generator().manual_seed(0))
    >>> draws["noise"].tolist(), draws["pitch.semitones"].shape
    ([True, True, True, True], torch.Size([4]))
    >>> chain(torch.zeros(4, 1, 1000), draws).shape
    torch.Size([4, 1, 1000])
    """

    def __init__(self, sample_rate: int, transforms: Iterable[str] | None = None,
                 probability: dict[str, float] | None = None,
                 table: dict[str, Transform] | None = None):
        table = TRANSFORMS if table is None else table
        names = list(table if transforms is None else transforms)
        probability = probability or {}
        for name in [*names, *probability]:
            p = probability.get(name, 0)
            if name not in table:
                raise ValueError(f"expected transforms among {', '.join(table)}, got {name!r}")
            if not 0 <= p <= 1:
                raise ValueError(f"expected a probability from 0 to 1 for {name}, got {p}")
            if name not in names:
                chosen = ", ".join(names)
                raise ValueError(f"expected probabilities of those chosen, {chosen}; got {name}")
        self.sample_rate = sample_rate
        self.transforms = {name: table[name] for name in table if name in names}
        defaults = {name: transform.probability for name, transform in self.transforms.items()}
        self.probability = defaults | probability

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Decisions and values for `batch` examples from a CPU generator: {"pitch": (B,) bool,
        "pitch.semitones": (B,) float32, ...}. Values are drawn for every example, so they do not
        depend on the probabilities."""
        draws = {}
        for name, transform in self.transforms.items():
            draws[name] = torch.rand(batch, generator=generator) < self.probability[name]
            for key, (draw, _) in transform.values.items():
                draws[f"{name}.{key}"] = draw(batch, generator)
        return draws

    @torch.no_grad()
    def __call__(self, x: Tensor, draws: dict[str, Tensor]) -> Tensor:
        """x (B, 1, T) float32 -> the same shape, on any device; x itself is not changed. Rows do
        not depend on each other. Raises ValueError for draws of another number of examples."""
        _check(x)
        for name in self.transforms:
            drawn = len(draws.get(name, ()))
            if drawn != len(x):
                raise ValueError(f"expected draws of {name} for {len(x)} examples, got {drawn}")
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


# ------------------------------------------------------------------------------- simple transforms


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


def noise(x: Tensor, snr_db: Tensor, generator: torch.Generator | None = None,
          seed: Tensor | None = None) -> Tensor:
    """Add white Gaussian noise at a signal-to-noise ratio of snr_db (B,) decibels, measured over
    the example.

    An example's noise depends on its seed and length alone, not on the batch around it, nor on the
    device. seed (B,) int64; without it, seeds are drawn from the CPU generator.

    >>> snr_db = torch.tensor([80.0, 80.0])
    >>> noise(torch.ones(2, 1, 4), snr_db, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 4])
    """
    _check(x, snr_db=(snr_db, -math.inf, math.inf))
    seed = _on(x, _seed(len(x), generator) if seed is None else seed)
    level = x[:, 0].square().mean(1, keepdim=True).sqrt()
    scale = level * 10 ** (-_on(x, snr_db).to(x.dtype)[:, None] / 20)           # (B, 1)
    y = torch.empty_like(x)
    for rows in _blocks(len(x), x.device, 2):
        y[rows, 0] = torch.addcmul(x[rows, 0], scale[rows], _gaussian(seed[rows], x.shape[2]))
    return y


def _gaussian(seed: Tensor, n: int) -> Tensor:
    """Normal deviates (B, n) float32 from seeds (B,): splitmix64 of the position, the same on every
    device, then Box-Muller."""
    half = (n + 1) // 2
    position = torch.arange(1, half + 1, device=seed.device)
    z = seed[:, None] + position * -7046029254386353131             # 2^64 / golden ratio
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ _shift_right(z, shift)) * factor
    z = z ^ _shift_right(z, 31)
    # in (0, 1): the logarithm stays finite
    first = ((_shift_right(z, 40) & 0xFFFFFF).float() + 0.5) * 2**-24
    second = ((z & 0xFFFFFF).float() + 0.5) * 2**-24
    radius = first.log_().mul_(-2).sqrt_()
    angle = second.mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n]


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Of 64 bits without a sign: torch's >> copies the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def delay(x: Tensor, delay_ms: Tensor, sample_rate: int, factor: float = 0.5) -> Tensor:
    """Add to each example itself, delay_ms (B,) milliseconds later, times factor. The length stays.

    >>> delay(torch.eye(1, 5)[None], torch.tensor([2.0]), sample_rate=1000).tolist()
    [[[1.0, 0.0, 0.5, 0.0, 0.0]]]
    """
    _check(x, delay_ms=(delay_ms, 0, math.inf))
    shift = (delay_ms.cpu() * (sample_rate / 1000)).round().long()
    longest = int(shift.max()) if len(shift) else 0
    late = pad(x[:, 0], (longest, 0)).unfold(1, x.shape[-1], 1)     # (B, longest + 1, T), a view
    rows = torch.arange(len(x), device=x.device)
    return torch.add(x, late[rows, _on(x, longest - shift)][:, None], alpha=factor)


# ------------------------------------------------------------------------------- filters

FILTER_BLOCK = 32           # samples


def low_pass(x: Tensor, cutoff_hz: Tensor, sample_rate: int) -> Tensor:
    """Second-order Butterworth low-pass at cutoff_hz (B,): -3 dB there, 12 dB per octave above.

    The same filter as sox's `lowpass`, torchaudio's `lowpass_biquad` and scipy's `butter`.

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


def _low_or_high_pass(x: Tensor, sample_rate: int, high: Tensor, low_pass_hz: Tensor,
                      high_pass_hz: Tensor) -> Tensor:
    cutoff_hz = torch.where(high, high_pass_hz, low_pass_hz).clamp(max=0.499 * sample_rate)
    return _butterworth(x, cutoff_hz, high, sample_rate)


def _butterworth(x: Tensor, cutoff_hz: Tensor, high: Tensor, sample_rate: int) -> Tensor:
    """x (B, 1, T) through H(z) = direct + residue / (1 - pole / z) + the latter's conjugate.

    In M blocks of P samples. Inside a block the recursion is a product with a triangular matrix of
    the impulse response; a block hands one complex number on to the next, its state."""
    _check(x, cutoff_hz=(cutoff_hz, 1, 0.499 * sample_rate))
    pole, residue, direct = _partial_fractions(cutoff_hz.double().cpu(), high.cpu(), sample_rate)
    powers = pole[:, None] ** torch.arange(FILTER_BLOCK + 1)                    # (B, P + 1)
    inside, after = _block_matrices(powers, residue, direct, x)
    count = -(-x.shape[-1] // FILTER_BLOCK)                                     # M
    # of a state after 1, 2, 4, ... blocks; below 1e-30 it is nothing to a sum, but slow to add
    decay = powers[:, -1:] ** (1 << torch.arange((count - 1).bit_length()))
    decay = _on(x, torch.where(decay.abs() > 1e-30, decay, 0).to(torch.complex64))
    y = torch.empty_like(x)
    for rows in _blocks(len(x), x.device):
        blocks = pad(x[rows, 0], (0, count * FILTER_BLOCK - x.shape[-1]))
        out = torch.bmm(blocks.view(-1, count, FILTER_BLOCK), inside[rows])     # (B, M, P + 2)
        state = torch.view_as_complex(out[:, :, FILTER_BLOCK:].contiguous())    # (B, M)
        state = _decaying_sum(state, decay[rows])
        before = torch.view_as_real(pad(state[:, :-1], (1, 0)))                 # (B, M, 2)
        out = torch.baddbmm(out[:, :, :FILTER_BLOCK], before, after[rows])
        y[rows, 0] = out.flatten(1)[:, : x.shape[-1]]
    return y


def _decaying_sum(state: Tensor, decay: Tensor) -> Tensor:
    """y[m] = state[m] + decay y[m - 1] of (B, M) by doubling, given the decay after 2^k blocks."""
    for k in range(decay.shape[1]):
        step = 1 << k
        later = torch.addcmul(state[:, step:], decay[:, k, None], state[:, :-step])
        state = torch.cat([state[:, :step], later], 1)
    return state


def _partial_fractions(cutoff_hz: Tensor, high: Tensor, sample_rate: int) -> tuple[Tensor, ...]:
    """pole, residue (complex) and direct (B,) of `_butterworth`: the bilinear transform of
    1 / (s^2 + sqrt(2) s + 1), times s^2 where high."""
    corner = torch.tan(cutoff_hz * (math.pi / sample_rate))
    analogue = corner * complex(-1, 1) / math.sqrt(2)                           # s of the pole
    pole = (1 + analogue) / (1 - analogue)
    lead = torch.where(high, 1.0, corner.square())
    lead = lead / (1 + math.sqrt(2) * corner + corner.square())
    zero = torch.where(high, 1.0, -1.0)                                         # z of both zeros
    residue = lead * (pole - zero).square() / (pole * (pole - pole.conj()))
    return pole, residue, lead / pole.abs().square()


def _block_matrices(powers: Tensor, residue: Tensor, direct: Tensor, x: Tensor
                    ) -> tuple[Tensor, Tensor]:
    """From pole ** (0, ..., P): what a block of P samples makes of its input, (B, P, P + 2), the
    state it leaves in the last two columns; and of the state before it, (B, 2, P)."""
    impulse = 2 * (residue[:, None] * powers).real                              # (B, P + 1)
    impulse[:, 0] += direct
    response = pad(_on(x, impulse[:, :-1].to(x.dtype)), (FILTER_BLOCK - 1, 0))
    response = response.unfold(1, FILTER_BLOCK, 1).flip(1)                      # [j, i] = h[i - j]
    state = _on(x, torch.view_as_real(powers[:, :-1].flip(1)).to(x.dtype))
    after = 2 * residue[:, None] * powers[:, 1:]
    after = _on(x, torch.stack([after.real, -after.imag], 1).to(x.dtype))
    return torch.cat([response, state], 2), after


# ------------------------------------------------------------------------------- pitch shift

SEGMENT = 0.050             # s from one splice to the next
FADE = 0.010                # s of cross-fade at a splice
SEARCH = 0.0075             # s either way to match the segment before: a period down to 67 Hz
DRIFT = 0.035               # s off its own time at most that a segment runs on to spare an attack
TAPS = 32                   # of the interpolator: how near to half the sample rate it can read
SHORT_TAPS = 12             # of the one that the search uses
BAND_UP = 0.91              # of half the sample rate is kept: images of what is below are -50 dB
BAND_DOWN = 0.97
ATTACK_BLOCK = 16           # samples, the resolution of the attacks
FRACTIONS = 2048            # places between two samples that the interpolator knows
SPARE = 32                  # outputs that may be read beyond the end of a segment


def pitch_shift(x: Tensor, semitones: Tensor, sample_rate: int) -> Tensor:
    """Shift the pitch by semitones (B,), from -12 to 12, keeping the length and the tempo.

    Synchronised overlap-add: the output is laid together from segments of the input, each read at
    2^(semitones / 12) times the speed by band-limited interpolation, each placed where it continues
    the one before it best (normalised cross-correlation), with a short cross-fade. Splices keep
    away from attacks, so that none is lost or heard twice. What would alias is removed beforehand.

    >>> pitch_shift(torch.zeros(2, 1, 4000), torch.tensor([-5.0, 5.0]), 22050).shape
    torch.Size([2, 1, 4000])
    """
    _check(x, semitones=(semitones, -12, 12))
    total = x.shape[-1]
    ratio = 2 ** (semitones.double().cpu() / 12)
    n = 1 << max(15, (total + sample_rate // 50 - 1).bit_length())  # the limit rings under 20 ms
    bins = torch.arange(n // 2 + 1, device=x.device) * (2 / n)
    edges = torch.where(ratio > 1, (1 / ratio).clamp(max=BAND_UP), BAND_DOWN)
    edges = _on(x, edges.float())[:, None]
    y = torch.empty_like(x)
    for rows in _blocks(len(x), x.device, 4 * BLOCK):
        ramp = ((edges[rows] - bins) * (1 / (0.03 * edges[rows]))).clamp_(0, 1)     # the last 3 %
        spectrum = _fft(torch.fft.rfft, x[rows, 0], n).mul_(ramp)
        limited = _fft(torch.fft.irfft, spectrum, n)[:, :total]
        plan = _splicing(limited, ratio[rows], sample_rate)
        y[rows, 0] = _fastest_overlap_add()(plan)[:, :total]
    return y


class Splicing(NamedTuple):
    """What S segments of each example are to be laid together from, and how. Lengths in samples."""

    audio: Tensor           # (B, size), with silence around
    ratio: Tensor           # (B,) float64: samples of the audio to one of the output
    highest: float          # ratio, at most
    start: Tensor           # (B,) int64: of the first segment in the audio
    first: int              # the candidates for segment s start at first + s hop and later,
    search: int             # its own time is that much later still
    drift: float
    hop: int                # from one segment to the next; each is hop + fade long
    fade: int
    segments: int           # S
    attacks: Tensor         # (B, blocks): how many there are before each block of the audio
    block: int              # samples in such a block
    weights: Tensor         # (FRACTIONS + 1, TAPS) of the interpolator
    short_weights: Tensor   # (FRACTIONS + 1, SHORT_TAPS)

    @property
    def lags(self) -> int:
        """Candidates for a segment: whole blocks, for which attacks are counted alike."""
        return -(-(2 * self.search + 1) // self.block) * self.block


def _splicing(x: Tensor, ratio: Tensor, sample_rate: int) -> Splicing:
    """Of x (B, T) and ratio (B,) float64 on the CPU."""
    hop, fade, search = (round(seconds * sample_rate) for seconds in (SEGMENT, FADE, SEARCH))
    segments = max(1, math.ceil(x.shape[1] / hop))
    length = hop + fade
    highest = float(ratio.max())
    # every example is moved, so that the middle of a segment (not its beginning) is read at its
    # own time; an octave down, the first one begins a quarter of its length early
    late = ((ratio - 1) * (length / 2)).round().long()
    latest = int(late.abs().max())
    front = search + TAPS + ATTACK_BLOCK * math.ceil(length / 4 / ATTACK_BLOCK)
    longest = math.ceil((length + SPARE) * highest + DRIFT * sample_rate)
    size = segments * hop + longest + 2 * (front + TAPS)
    audio = pad(x, (front + latest, max(0, size + latest - front - x.shape[1])))
    rows = torch.arange(len(x), device=x.device)
    audio = audio.unfold(1, size, 1)[rows, _on(x, latest - late)]
    return Splicing(
        audio=audio, ratio=_on(x, ratio), highest=highest,
        start=_on(x, late) + front, first=front - search, search=search, drift=DRIFT * sample_rate,
        hop=hop, fade=fade, segments=segments,
        attacks=_attacks(audio, sample_rate), block=ATTACK_BLOCK,
        weights=_weights(TAPS, x.device), short_weights=_weights(SHORT_TAPS, x.device))


def _attacks(audio: Tensor, sample_rate: int) -> Tensor:
    """How many attacks there are before each block, (B, size / ATTACK_BLOCK + 8): a running sum of
    the energy of the differenced signal where it is over four times its mean within 50 ms; a click
    adds nearly 1, a steady sound 0."""
    energy = audio.diff().unfold(1, ATTACK_BLOCK, ATTACK_BLOCK).square().sum(2)
    near = round(0.05 * sample_rate / ATTACK_BLOCK)
    width = 2 * near + 1
    sums = pad(energy.double(), (near + 1, near)).cumsum(1)
    mean = (sums[:, width:] - sums[:, :-width]).float().div_(width)
    over = (energy / mean.add_(1e-12)).sub_(4).clamp_min_(0).div_(width)
    return pad(over, (1, 8)).cumsum(1)


@lru_cache(maxsize=8)
def _weights(taps: int, device: torch.device) -> Tensor:
    """(FRACTIONS + 1, taps) that read a signal 0, ..., FRACTIONS / FRACTIONS after a sample: sinc
    under a Kaiser window."""
    fraction = torch.arange(FRACTIONS + 1, dtype=torch.float64)[:, None] / FRACTIONS
    t = torch.arange(taps) - (taps // 2 - 1) - fraction                         # in samples
    window = torch.special.i0(4.5 * (1 - (t / (taps / 2)).square()).clamp_min(0).sqrt())
    weights = torch.sinc(t) * window
    weights = (weights / weights.sum(1, keepdim=True)).float()
    return weights.to(device)                   # waits, once: other streams will read it


@lru_cache(maxsize=1)
def _fastest_overlap_add() -> Callable[[Splicing], Tensor]:
    """The one of kernels/splice.py; without it `_overlap_add`, which is said once."""
    try:
        from kernels.splice import overlap_add
    except ImportError as error:
        warnings.warn(f"pitch_shift takes its plain and slower way: {error}", stacklevel=2)
        return _overlap_add
    return overlap_add


def _overlap_add(plan: Splicing) -> Tensor:
    """The segments laid together, (B, S hop), one after the other, all examples at once."""
    length = plan.hop + plan.fade                                               # L
    position = torch.arange(length, device=plan.audio.device) * plan.ratio[:, None]     # (B, L)
    whole = position.floor().long()
    fraction = (position - whole).float()
    weights = plan.weights[(fraction * FRACTIONS).round().long()]               # (B, L, TAPS)
    fade_in = torch.linspace(0, math.pi / 2, plan.fade, device=whole.device).sin().square()
    laid = plan.audio.new_zeros(len(whole), plan.segments * plan.hop + plan.fade)
    start = plan.start
    for s in range(plan.segments):
        if s > 0:
            start = _next_start(plan, start, s)
        piece = _interpolate(plan.audio, start[:, None] + whole, weights)
        place = laid[:, s * plan.hop : s * plan.hop + length]
        if s > 0:
            faded = piece[:, : plan.fade]
            faded.copy_(torch.lerp(place[:, : plan.fade], faded, fade_in))
        place.copy_(piece)
    return laid[:, : -plan.fade]


def _next_start(plan: Splicing, start: Tensor, s: int) -> Tensor:
    """Where segment s starts in the audio, (B,), the one before having started at start (B,)."""
    # in fixed point, in 1 / FRACTIONS samples: where the segment before would go on
    ahead = start * FRACTIONS + (plan.ratio * (plan.hop * FRACTIONS)).round().long()
    begin = plan.first + s * plan.hop
    lag = torch.arange(plan.lags, device=start.device)
    cut = _attacks_cut(plan, ahead // FRACTIONS, begin + lag)
    far = 1e-5 * (lag / plan.search - 1).square()                               # settles ties
    best = (cut + far - _likeness(plan, ahead, begin)).argmin(1)
    drift = (ahead // FRACTIONS - (begin + plan.search)).abs()
    hold = (cut.gather(1, best[:, None])[:, 0] > 0.2) & (drift < plan.drift)    # no splice here
    return torch.where(hold, (ahead + FRACTIONS // 2) // FRACTIONS, begin + best)


def _likeness(plan: Splicing, ahead: Tensor, begin: int) -> Tensor:
    """(B, lags) from -1 to 1, of what would come next and the candidates from begin on."""
    # read between the samples: rounded, it would be heard as jitter
    weights = plan.short_weights[ahead % FRACTIONS][:, None]
    onward = ahead[:, None] // FRACTIONS + torch.arange(plan.fade, device=ahead.device)
    template = _interpolate(plan.audio, onward, weights)                        # (B, fade)
    template = template / template.norm(dim=1, keepdim=True).clamp_min(1e-4)
    candidates = plan.audio[:, begin : begin + plan.lags + plan.fade - 1].unfold(1, plan.fade, 1)
    return (candidates @ template[:, :, None])[:, :, 0] / candidates.norm(dim=2).clamp_min(1e-4)


def _attacks_cut(plan: Splicing, here: Tensor, there: Tensor) -> Tensor:
    """Attacks that a splice from here (B,) to there (lags,) loses or repeats, (B, lags): those
    between the two, both cross-faded stretches included. The stretch here has a block of margin, so
    that going straight on is cheapest."""
    here = here[:, None] // plan.block
    there = ((there - there[0]) // plan.block * plan.block + there[0])[None] // plan.block
    begin = torch.minimum(here - 1, there)
    end = torch.maximum(here + 3, there + 2) + plan.fade // plan.block
    return plan.attacks.gather(1, end) - plan.attacks.gather(1, begin)


def _interpolate(audio: Tensor, whole: Tensor, weights: Tensor) -> Tensor:
    """The audio (B, size) at whole (B, L) and a fraction, by weights (B, L or 1, taps)."""
    taps = weights.shape[-1]
    rows = torch.arange(len(audio), device=audio.device)[:, None]
    return (audio.unfold(1, taps, 1)[rows, whole - (taps // 2 - 1)] * weights).sum(2)


# ------------------------------------------------------------------------------- reverb

COMBS = (1116, 1188, 1277, 1356, 1422, 1491, 1557, 1617)    # delays in samples at 44,100 Hz
ALL_PASSES = (225, 341, 441, 556)
DECAY_DB = 70               # of the weight over the points of one FFT
COLUMNS = 256               # bins in a row of a table of them: delays are outer products there


def reverb(x: Tensor, reverberance: Tensor, damping: Tensor, room_size: Tensor,
           sample_rate: int) -> Tensor:
    """Add the sound of a room: Freeverb with the parameters of sox's `reverb`, each (B,) from 0 to
    100 %.

    Freeverb is linear and time-invariant: eight damped combs in parallel, four all-passes in
    series. Its transfer function is evaluated at the points of one FFT. Its tail is longer than the
    signal, so both are weighted by rho^-t with rho slightly above 1, which is to evaluate on the
    circle of radius rho: what wraps around is then 70 dB down. Equal to
    `sox in out reverb REVERBERANCE DAMPING ROOM 0 0 0` to about 1e-4 of the wet signal.

    >>> reverb(torch.zeros(1, 1, 100), *torch.tensor([[50.0], [50.0], [100.0]]), 22050).shape
    torch.Size([1, 1, 100])
    """
    values = {"reverberance": reverberance, "damping": damping, "room_size": room_size}
    _check(x, **{name: (value, 0, 100) for name, value in values.items()})
    room = torch.stack([value.double().cpu() for value in values.values()])     # (3, B)
    n = 1 << max(15, (x.shape[-1] - 1).bit_length())            # short audio may have a long tail
    circle = _circle(sample_rate, n, x.device)
    weight = circle.weight[: x.shape[-1]]
    y = torch.empty_like(x)
    for rows in _blocks(len(x), x.device):
        spectrum = _fft(torch.fft.rfft, x[rows, 0] * weight, n)
        loop, coarse, fine = _combs(*room[:, rows], sample_rate, circle)
        for row in _blocks(len(spectrum), x.device, 1):
            # with f the reciprocal gain around its loop, a comb is z^-D / (1 - z^-D / f) =
            # (f / (f - z^-D) - 1) f: so the combs share all but a sum of eight reciprocals
            combs = torch.addcmul(loop[row, None], coarse[row], fine[row], value=-1)
            combs = combs.reciprocal_().sum(1)                                  # (1, A, COLUMNS)
            wet = combs.mul_(loop[row]).sub_(len(COMBS)).mul_(loop[row]).mul_(circle.all_passes)
            spectrum[row] *= wet.flatten(1)[:, : n // 2 + 1]
        tail = _fft(torch.fft.irfft, spectrum, n)[:, : len(weight)]
        y[rows, 0] = torch.addcdiv(x[rows, 0], tail, weight)
    return y


class _Circle(NamedTuple):
    """What all rooms share on the circle of radius rho, rho^n = DECAY_DB. Bin A COLUMNS + b of an
    n-point FFT stands at [A, b]."""

    weight: Tensor          # (n,): rho^-t
    phases: Tensor          # (n,): e^(-2 pi i k / n)
    one_sample: Tensor      # (A, COLUMNS): z^-1
    all_passes: Tensor      # (A, COLUMNS): the four of them, and the wet gain


@lru_cache(maxsize=4)
def _circle(sample_rate: int, n: int, device: torch.device) -> _Circle:
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
    tables = (table.to(torch.complex64) for table in (phases, torch.exp(-log_z), all_passes))
    # waits, once: other streams will read them
    return _Circle(*(table.to(device) for table in (weight, *tables)))


def _combs(reverberance: Tensor, damping: Tensor, room_size: Tensor, sample_rate: int,
           circle: _Circle) -> tuple[Tensor, Tensor, Tensor]:
    """The eight combs of each room on the circle: the reciprocal of the gain around their loop,
    (1 - d / z) / (feedback (1 - d)), (B, A, COLUMNS); and their delays z^-D as outer products of
    (B, 8, A, 1) and (B, 8, 1, COLUMNS)."""
    device = circle.phases.device
    n = len(circle.phases)
    a = -1 / math.log(1 - 0.3)
    b = 100 / (math.log(1 - 0.98) * a + 1)
    feedback = 1 - torch.exp((reverberance - b) / (a * b))                      # (B,)
    d = damping / 100 * 0.3 + 0.2
    scale = (room_size / 100 * 0.9 + 0.1) * (sample_rate / 44100)
    samples = torch.floor(scale[:, None] * torch.tensor(COMBS) + 0.5)[:, :, None]       # (B, 8, 1)
    decay = _on(circle.phases, torch.exp(samples * (-DECAY_DB / 20 * math.log(10) / n)).float())
    samples = _on(circle.phases, samples.long())
    fine = circle.phases[(samples * torch.arange(COLUMNS, device=device)) % n] * decay
    coarse = circle.phases[(samples * torch.arange(0, n // 2 + 1, COLUMNS, device=device)) % n]
    direct = _on(circle.phases, (1 / (feedback * (1 - d))).float())[:, None, None]
    damped = _on(circle.phases, (d / (feedback * (1 - d))).float())[:, None, None]
    return direct - damped * circle.one_sample, coarse[..., None], fine[:, :, None]


# ------------------------------------------------------------------------------- machinery

BLOCK = 16                  # rows worked on at once on a CPU: the temporaries stay in the cache


def _blocks(count: int, device: torch.device, size: int = BLOCK) -> list[slice]:
    size = size if device.type == "cpu" else max(count, 1)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


def _check(x: Tensor, **values: tuple[Tensor, float, float]) -> None:
    """Raise ValueError unless x is mono, (B, 1, T), of float32, and each of values, given with its
    range, is (B,) and inside it."""
    if x.dim() != 3 or x.shape[1] != 1 or not x.shape[2]:
        raise ValueError(f"expected audio of shape (B, 1, T), got {tuple(x.shape)}")
    if x.dtype != torch.float32:
        dtype = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"expected float32 audio, got {dtype}; augment before autocast")
    for name, (value, low, high) in values.items():
        if value.shape != x.shape[:1]:
            expected = f"expected one {name} per example, shape ({x.shape[0]},)"
            raise ValueError(f"{expected}, got {tuple(value.shape)}")
        if not ((value >= low) & (value <= high)).all():
            got = f"{value.min():g} to {value.max():g}"
            raise ValueError(f"expected {name} from {low:g} to {high:g}, got {got}")


def _on(x: Tensor, values: Tensor) -> Tensor:
    """values, where x is. A GPU goes on meanwhile: copies that wait would empty its queue some
    thirty times a batch."""
    if x.device.type != "cuda" or values.is_cuda:
        return values.to(x.device)              # Apple's GPUs might read after the source is gone
    # pageable memory over 64 KB would be waited for
    return values.pin_memory().to(x.device, non_blocking=True)


def _fft(transform: Callable, x: Tensor, n: int) -> Tensor:
    """transform(x, n) of (B, ...). MKL transforms a single row by another and slower algorithm,
    which also rounds differently: it is given two."""
    return transform(x.expand(2, -1), n)[:1] if len(x) == 1 else transform(x, n)


_LOCK = threading.Lock()
_OUTSIDE = {}                   # the settings of the process, while any thread is inside `_exact`
_THREAD = threading.local()     # inside: whether this one is


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Products in full float32, whatever is allowed for the network outside (TF32, bfloat16 and
    autocast err by more than the noise added here), and one thread: work this small gains little
    from more, and on busy cores they cost tenfold."""
    if getattr(_THREAD, "inside", False):       # a chain as a transform of another
        yield
        return
    autocast = contextlib.nullcontext()
    if torch.is_autocast_enabled(device.type):
        autocast = torch.autocast(device.type, enabled=False)
    threads = _go_inside()
    _THREAD.inside = True
    try:
        with autocast:
            yield
    finally:
        _THREAD.inside = False
        _go_outside(threads)


def _products() -> tuple:
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def _go_inside() -> int:
    """Set what is of the whole process, and return how many threads this one had. Where several
    threads are inside at once, the first one has saved the settings and the last restores them."""
    with _LOCK:
        threads = torch.get_num_threads()
        if not _OUTSIDE:
            precision = [product.fp32_precision for product in _products()]
            _OUTSIDE.update(visitors=0, threads=threads, precision=precision)
            for product in _products():
                product.fp32_precision = "ieee"
        elif threads == 1:                      # a new thread begins with what is set in here
            threads = _OUTSIDE["threads"]
        _OUTSIDE["visitors"] += 1
    torch.set_num_threads(1)
    return threads


def _go_outside(threads: int) -> None:
    with _LOCK:
        torch.set_num_threads(threads)
        _OUTSIDE["visitors"] -= 1
        if _OUTSIDE["visitors"]:
            return
        for product, precision in zip(_products(), _OUTSIDE["precision"]):
            product.fp32_precision = "none"     # as it is more generally set, where that was it
            if product.fp32_precision != precision:
                product.fp32_precision = precision
        _OUTSIDE.clear()


# --- program -------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="augment.py", usage="augment.py FILE [--out DIR] [--seconds S] [--seed N]",
        description="Hear each augmentation alone and three full chains.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("file", metavar="FILE", type=Path, help="a recording libsndfile can read")
    data.add_argument("--seconds", type=float, default=30.0, help="of the beginning to use")
    run = parser.add_argument_group("run")
    run.add_argument("--out", type=Path, default=Path("listen"), help="folder for what is written")
    run.add_argument("--seed", type=int, default=0, help="of the values drawn")
    return parser


def read(file: Path, seconds: float) -> tuple[Tensor, int]:
    """The first seconds of a recording in mono, (1, 1, T), and its sample rate in Hz."""
    import soundfile

    with soundfile.SoundFile(file) as f:
        sample_rate = f.samplerate
        length = min(f.frames, math.ceil(seconds * sample_rate))
        x = torch.from_numpy(f.read(length, dtype="float32", always_2d=True)).mean(1)
    if not x.numel() or not x.isfinite().all():
        got = "NaN or infinity" if x.numel() else "no samples"
        raise ValueError(f"expected audio in {file}, got {got}")
    return x[None, None], sample_rate


def describe(chain: Chain, draws: dict[str, Tensor], row: int = 0) -> list[str]:
    """One line for each transform that was drawn for this row, with its values and their units."""
    lines = []
    for name, transform in chain.transforms.items():
        if draws[name][row]:
            drawn = {key: draws[f"{name}.{key}"][row].item() for key in transform.values}
            units = {key: unit for key, (_, unit) in transform.values.items()}
            words = [f"{key} {value:.4g} {units[key]}" if units[key] else f"{key} {value}"
                     for key, value in drawn.items()]
            lines.append(f"  {name}: {', '.join(words) or 'on'}")
    return lines


def listen(x: Tensor, sample_rate: int, out: Path, seed: int) -> None:
    """Write each transform alone and three chains of x (1, 1, T), and say what was drawn."""
    import soundfile

    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    chains = {name: Chain(sample_rate, [name], {name: 1.0}) for name in TRANSFORMS}
    chains |= {f"chain-{i}": Chain(sample_rate) for i in (1, 2, 3)}
    sounds = {"original": x[0, 0]}
    for name, chain in chains.items():
        draws = chain.draw(1, generator)
        sounds[name] = chain(x, draws)[0, 0]
        print(f"{out / name}.wav", *describe(chain, draws) or ["  nothing drawn"], sep="\n")
    # one factor for all, so that levels can be compared and nothing clips
    peak = max(1.0, max(sound.abs().max().item() for sound in sounds.values()))
    for name, sound in sounds.items():
        soundfile.write(out / f"{name}.wav", (sound / peak).numpy(), sample_rate)
    draw_spectrograms(out / "spectrograms.png", sounds, sample_rate)
    print(out / "spectrograms.png")


def draw_spectrograms(path: Path, sounds: dict[str, Tensor], sample_rate: int) -> None:
    """A picture of all sounds, {name: (T,)}."""
    from matplotlib.figure import Figure

    size = 1 << round(math.log2(sample_rate * 0.046))                           # about 46 ms
    window = torch.hann_window(size)
    rows = math.ceil(len(sounds) / 3)
    figure = Figure((15, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, sharex=True, sharey=True, squeeze=False)
    for axis, (name, sound) in zip(axes.flat, sounds.items()):
        bins = torch.stft(sound, size, size // 4, window=window, pad_mode="constant",
                          return_complex=True)
        level = 20 * torch.log10(bins.abs() / size + 1e-6)
        axis.imshow(level, origin="lower", aspect="auto", vmin=-100, vmax=-20, cmap="magma",
                    extent=(0, len(sound) / sample_rate, 0, sample_rate / 2000))
        axis.set_title(name, fontsize=10)
    figure.supxlabel("s")
    figure.supylabel("kHz")
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
        x, sample_rate = read(args.file, args.seconds)
        listen(x, sample_rate, args.out, args.seed)
    except (ValueError, OSError, soundfile.LibsndfileError) as error:
        print(f"augment.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
