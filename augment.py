"""The augmentations of CLMR as one batched, exact and fast chain (paper, section 3.1).

    python augment.py song.wav --out listen/          # hear each transform and three full chains

leaves in listen/: original.wav, one wav per transform, and chain-1.wav to chain-3.wav, and prints
every value drawn, with its unit.

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

The random crop before it belongs to whoever reads the audio. Drawing is apart from processing, so
that a process may draw for the whole batch and take only its rows, and every value can be replayed.

Needs torch alone, 2.9 or later. With kernels/ beside it the chain is 6 times as fast on a CPU, and
12 times where there is a C compiler. Letters: B examples, T samples, n points of an FFT.
"""

import argparse
import contextlib
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType

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
        0.8, lambda x, sample_rate, high, low_pass_hz, high_pass_hz: _butterworth(
            x, torch.where(high, high_pass_hz, low_pass_hz).clamp(max=0.499 * sample_rate),
            high, sample_rate),
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
        {name: (_uniform(0, 100), "%") for name in ("reverberance", "damping", "room_size")}),
}

class Chain:
    """The transforms one after the other, each on the examples it was drawn for.

    Args:
        sample_rate: of the audio, in Hz.
        transforms: names from the table (always applied in its order); all by default.
        probability: {name: probability} that replaces the table's. ValueError for a wrong one.
        table: {name: Transform}; TRANSFORMS by default.

    >>> chain = Chain(22050, probability={"noise": 1})
    >>> draws = chain.draw(4, torch.Generator().manual_seed(0))
    >>> draws["noise"].tolist(), draws["pitch.semitones"].shape
    ([True, True, True, True], torch.Size([4]))
    >>> chain(torch.zeros(4, 1, 1000), draws).shape
    torch.Size([4, 1, 1000])
    """
    def __init__(self, sample_rate: int, transforms: Iterable[str] | None = None,
                 probability: dict[str, float] | None = None, table: dict | None = None):
        table = TRANSFORMS if table is None else table
        names = list(table if transforms is None else transforms)
        probability = probability or {}
        for name in [*names, *probability]:
            p = probability.get(name, 0)
            if name not in table:
                raise ValueError(f"expected transforms among {', '.join(table)}, got {name!r}")
            if name not in names:
                raise ValueError(f"expected probabilities of {', '.join(names)}, got {name}")
            if not 0 <= p <= 1:
                raise ValueError(f"expected a probability from 0 to 1 for {name}, got {p}")
        self.sample_rate = sample_rate
        self.transforms = {name: table[name] for name in table if name in names}
        defaults = {name: transform.probability for name, transform in self.transforms.items()}
        self.probability = defaults | probability

    def draw(self, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """{"pitch": (B,) bool, "pitch.semitones": (B,) float32, ...} from a CPU generator. Values
        are drawn for every example, so they do not depend on the probabilities."""
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
            for name, transform in self.transforms.items():
                rows = draws[name].nonzero().flatten()
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
    """Add white Gaussian noise at snr_db (B,) decibels below the example's level. It depends on the
    seed (B,) int64 and the length alone, not on the batch around it nor on the device; seeds that
    are not given are drawn from the CPU generator.

    >>> snr_db = torch.tensor([80.0, 80.0])
    >>> noise(torch.ones(2, 1, 4), snr_db, torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 4])
    """
    _check(x, snr_db=(snr_db, -math.inf, math.inf))
    seed = _on(x, _seed(len(x), generator) if seed is None else seed)
    level = x[:, 0].square().mean(1, keepdim=True).sqrt()
    scale = level * 10 ** (-_on(x, snr_db).to(x.dtype)[:, None] / 20)           # (B, 1)
    return torch.addcmul(x, scale[:, None], _gaussian(seed, x.shape[2])[:, None])

def _gaussian(seed: Tensor, n: int) -> Tensor:
    """Normal deviates (B, n) float32 from seeds (B,): splitmix64 of the position, the same on every
    device, then Box-Muller."""
    half = (n + 1) // 2
    position = torch.arange(1, half + 1, device=seed.device)
    z = seed[:, None] + position * -7046029254386353131             # 2^64 / golden ratio
    # shifts of 64 bits without a sign: torch's >> copies it
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * -4658895280553007687
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * -7723592293110705685
    z = z ^ (z >> 31 & (1 << 33) - 1)
    # in (0, 1): the logarithm stays finite
    first = ((z >> 40 & 0xFFFFFF).float() + 0.5) * 2**-24
    second = ((z & 0xFFFFFF).float() + 0.5) * 2**-24
    radius = first.log_().mul_(-2).sqrt_()
    angle = second.mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :n]

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

def _butterworth(x: Tensor, cutoff_hz: Tensor, high: Tensor, sample_rate: int) -> Tensor:
    """x (B, 1, T) through the bilinear transform of 1 / (s^2 + sqrt(2) s + 1), times s^2 where
    high: gain (1 - zero / z)^2 / ((1 - pole / z) (1 - pole* / z))."""
    _check(x, cutoff_hz=(cutoff_hz, 1, 0.499 * sample_rate))
    high = high.cpu()
    corner = torch.tan(cutoff_hz.double().cpu() * (math.pi / sample_rate))
    analogue = corner * complex(-1, 1) / math.sqrt(2)                           # s of the pole
    pole = (1 + analogue) / (1 - analogue)
    zero = torch.where(high, 1.0, -1.0).double()
    gain = torch.where(high, 1.0, corner.square())
    gain = gain / (1 + math.sqrt(2) * corner + corner.square())                 # (B,) float64
    recurse = _kernels().filters.recurse if _kernels() else _recurse
    return recurse(x[:, 0], pole, zero, gain)[:, None]

def _recurse(x: Tensor, pole: Tensor, zero: Tensor, gain: Tensor) -> Tensor:
    """x (B, T) through the filters with a double zero and a pair of poles, (B,) each. The FFT is
    longer than x by what rings on."""
    tail = math.ceil(16 / (1 - float(pole.abs().max())))
    n = 1 << (x.shape[1] + tail).bit_length()
    later = torch.exp(torch.arange(n // 2 + 1).double() * (-2j * math.pi / n))  # 1 / z
    response = [g * (1 - b * later).square() / ((1 - a * later) * (1 - a.conj() * later))
                for a, b, g in zip(pole, zero, gain)]
    return _by_fft(x, torch.stack(response).to(torch.complex64), n)

def _by_fft(x: Tensor, response: Tensor, n: int) -> Tensor:
    """x (B, T) times the response (B, n / 2 + 1) at the points of an FFT. One by one: MKL's way and
    rounding of one row is not that of several."""
    y = torch.empty_like(x)
    for row in range(len(x)):
        spectrum = torch.fft.rfft(x[row], n) * _on(x, response[row])
        y[row] = torch.fft.irfft(spectrum, n)[: x.shape[1]]
    return y

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
    2^(semitones / 12) times the speed by band-limited interpolation and begun where it continues
    the one before it best (normalised cross-correlation). Splices keep away from attacks, so that
    none is lost or heard twice. What would alias is removed beforehand.

    >>> pitch_shift(torch.zeros(2, 1, 4000), torch.tensor([-5.0, 5.0]), 22050).shape
    torch.Size([2, 1, 4000])
    """
    _check(x, semitones=(semitones, -12, 12))
    x = x[:, 0]
    ratio = 2 ** (semitones.double().cpu() / 12)
    n = 1 << max(15, (x.shape[1] + sample_rate // 50 - 1).bit_length())     # it rings under 20 ms
    edge = torch.where(ratio > 1, (1 / ratio).clamp(max=BAND_UP), BAND_DOWN)
    edge = _on(x, edge.float())[:, None]
    bins = torch.arange(n // 2 + 1, device=x.device) * (2 / n)
    ramp = ((edge - bins) * (1 / (0.03 * edge))).clamp_(0, 1)               # over the last 3 %
    limited = (_kernels().filters.by_fft if _kernels() else _by_fft)(x, ramp, n)
    plan = Splicing(limited, ratio, sample_rate)
    laid = (_kernels().splice.overlap_add if _kernels() else _overlap_add)(plan)
    return laid[:, None, : x.shape[1]]

class Splicing:
    """What S segments of each example are laid together from, and how. Lengths are in samples.

    Args: x (B, T), and ratio (B,) float64 on the CPU: samples of x to one of the output."""
    def __init__(self, x: Tensor, ratio: Tensor, sample_rate: int):
        self.hop = round(SEGMENT * sample_rate)             # from one segment to the next
        self.fade = round(FADE * sample_rate)               # each is hop + fade long
        self.segments = max(1, math.ceil(x.shape[1] / self.hop))
        self.search = round(SEARCH * sample_rate)
        self.drift = DRIFT * sample_rate
        self.block = ATTACK_BLOCK
        # candidates for a segment: whole blocks, for which attacks are counted alike
        self.lags = -(-(2 * self.search + 1) // self.block) * self.block
        self.highest = float(ratio.max())
        self.ratio = _on(x, ratio)
        # every example is moved, so that the middle of a segment (not its beginning) is read at
        # its own time; an octave down, the first one begins a quarter of its length early
        length = self.hop + self.fade
        late = ((ratio - 1) * (length / 2)).round().long()
        latest = int(late.abs().max())
        front = self.search + TAPS + self.block * math.ceil(length / 4 / self.block)
        longest = math.ceil((length + SPARE) * self.highest + self.drift)
        size = self.segments * self.hop + longest + 2 * (front + TAPS)
        audio = pad(x, (front + latest, max(0, size + latest - front - x.shape[1])))
        rows = torch.arange(len(x), device=x.device)
        self.audio = audio.unfold(1, size, 1)[rows, _on(x, latest - late)]      # (B, size)
        self.start = _on(x, late) + front                   # (B,): of the first segment
        self.first = front - self.search                    # + s hop: the first candidate for s
        self.attacks = _attacks(self.audio, sample_rate)    # (B, blocks)
        self.weights = _weights(TAPS, x.device)             # (FRACTIONS + 1, TAPS)
        self.short_weights = _weights(SHORT_TAPS, x.device)

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
    # this waits, once: other streams will read it
    return (weights / weights.sum(1, keepdim=True)).float().to(device)

def _overlap_add(plan: Splicing) -> Tensor:
    """The segments laid together, (B, S hop), one after the other, all examples at once."""
    length = plan.hop + plan.fade                                               # L
    position = torch.arange(length, device=plan.audio.device) * plan.ratio[:, None]     # (B, L)
    whole = position.floor().long()
    fraction = (position - whole).float()
    weights = plan.weights[(fraction * FRACTIONS).round().long()]               # (B, L, TAPS)
    fade_in = torch.linspace(0, math.pi / 2, plan.fade, device=whole.device).sin().square()
    start = plan.start
    laid = [_interpolate(plan.audio, start[:, None] + whole, weights)]
    for s in range(1, plan.segments):
        start = _next_start(plan, start, s)
        piece = _interpolate(plan.audio, start[:, None] + whole, weights)       # (B, L)
        faded = torch.lerp(laid[-1][:, plan.hop :], piece[:, : plan.fade], fade_in)
        laid.append(torch.cat([faded, piece[:, plan.fade :]], 1))
    return torch.cat([piece[:, : plan.hop] for piece in laid], 1)

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
WET = 0.015
DECAY_DB = 70               # of the weight over the points of one FFT

class Rooms:
    """Freeverb: eight damped combs in parallel, Y = z^-D X / (1 - g z^-D) with
    g = feedback (1 - damping) / (1 - damping / z), and in series with their sum four all-passes,
    (1.5 z^-D - 1) / (1 - 0.5 z^-D). Its parameters are sox's, (B,) each, from 0 to 100 %."""
    def __init__(self, reverberance: Tensor, damping: Tensor, room_size: Tensor, sample_rate: int):
        a = -1 / math.log(1 - 0.3)
        b = 100 / (math.log(1 - 0.98) * a + 1)
        self.feedback = 1 - torch.exp((reverberance.double().cpu() - b) / (a * b))      # (B,)
        self.damping = damping.double().cpu() / 100 * 0.3 + 0.2                         # (B,)
        scale = (room_size.double().cpu() / 100 * 0.9 + 0.1) * (sample_rate / 44100)
        self.combs = torch.floor(scale[:, None] * torch.tensor(COMBS) + 0.5)    # (B, 8) delays D
        self.all_passes = tuple(math.floor(d * sample_rate / 44100 + 0.5) for d in ALL_PASSES)
        self.wet = WET
        self.decay_db = DECAY_DB

def reverb(x: Tensor, reverberance: Tensor, damping: Tensor, room_size: Tensor,
           sample_rate: int) -> Tensor:
    """Add the sound of a room: Freeverb with the parameters of sox's `reverb`, each (B,) from 0 to
    100 %.

    Freeverb is linear and time-invariant, and is applied at the points of one FFT. Its tail is
    longer, so signal and tail are weighted by rho^-t with rho slightly above 1, which is to
    evaluate its transfer function on the circle of radius rho: what wraps around is 70 dB down.
    Equal to `sox in out reverb REVERBERANCE DAMPING ROOM 0 0 0` to about 1e-4 of the wet signal.

    >>> reverb(torch.zeros(1, 1, 100), *torch.tensor([[50.0], [50.0], [100.0]]), 22050).shape
    torch.Size([1, 1, 100])
    """
    _check(x, reverberance=(reverberance, 0, 100), damping=(damping, 0, 100),
           room_size=(room_size, 0, 100))
    rooms = Rooms(reverberance, damping, room_size, sample_rate)
    freeverb = _kernels().filters.freeverb if _kernels() else _freeverb
    return freeverb(x[:, 0], rooms)[:, None]

def _freeverb(x: Tensor, rooms: Rooms) -> Tensor:
    """x (B, T), the dry signal, and what each of the rooms adds to it."""
    n = 1 << max(15, (x.shape[1] - 1).bit_length())             # short audio may have a long tail
    log_rho = rooms.decay_db / 20 * math.log(10) / n
    log_z = log_rho + 2j * math.pi / n * torch.arange(n // 2 + 1, dtype=torch.float64)
    weight = torch.exp(torch.arange(x.shape[1], device=x.device) * -log_rho)
    wet = rooms.wet
    for samples in rooms.all_passes:
        z_d = torch.exp(-log_z * samples)
        wet = wet * (1.5 * z_d - 1) / (1 - 0.5 * z_d)
    response = []
    for feedback, damping, delays in zip(rooms.feedback, rooms.damping, rooms.combs):
        loop = feedback * (1 - damping) / (1 - damping * torch.exp(-log_z))
        later = (torch.exp(-log_z * samples) for samples in delays)
        response.append(wet * sum(z_d / (1 - loop * z_d) for z_d in later))
    return x + _by_fft(x * weight, torch.stack(response).to(torch.complex64), n) / weight

# ------------------------------------------------------------------------------- machinery
def _check(x: Tensor, **values: tuple[Tensor, float, float]) -> None:
    """Raise ValueError unless x is mono, (B, 1, T), of float32, and each of values, given with its
    range, is (B,) and inside it."""
    if x.dim() != 3 or x.shape[1] != 1 or not x.shape[2]:
        raise ValueError(f"expected audio of shape (B, 1, T), got {tuple(x.shape)}")
    if x.dtype != torch.float32:
        raise ValueError(f"expected float32 audio, got {x.dtype}; augment before autocast")
    for name, (value, low, high) in values.items():
        got = tuple(value.shape)
        if got != x.shape[:1]:
            raise ValueError(f"expected one {name} per example, ({len(x)},), got {got}")
        if not ((value >= low) & (value <= high)).all():
            got = f"{value.min():g} to {value.max():g}"
            raise ValueError(f"expected {name} from {low:g} to {high:g}, got {got}")

def _on(x: Tensor, values: Tensor) -> Tensor:
    """values, where x is, without waiting: a GPU's queue would run empty thirty times a batch."""
    if x.device.type != "cuda" or values.is_cuda:
        return values.to(x.device)              # Apple's GPUs might read after the source is gone
    # pageable memory over 64 KB would be waited for
    return values.pin_memory().to(x.device, non_blocking=True)

@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    """The folder kernels/ beside this file; None, which is said once, where it is not."""
    try:
        import kernels.filters
        import kernels.splice
        return kernels
    except ImportError as error:
        warnings.warn("there is no kernels/ beside augment.py: the chain takes its plain ways, by "
                      f"the same numbers, some 10 times slower ({error})", stacklevel=3)
        return None

_ALONE = threading.RLock()      # one thread at a time: `_exact` changes settings of the process

@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """Products in full float32, whatever is allowed for the network outside (TF32, bfloat16 and
    autocast err by more than the noise added here), and one thread: work this small gains little
    from more, and on busy cores they cost tenfold."""
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    is_on = torch.is_autocast_enabled(device.type)
    with _ALONE, torch.autocast(device.type, enabled=False) if is_on else contextlib.nullcontext():
        threads = torch.get_num_threads()
        precisions = [setting.fp32_precision for setting in products]
        try:
            for setting in products:
                setting.fp32_precision = "ieee"
            if threads > 1:
                torch.set_num_threads(1)
            yield
        finally:
            for setting, precision in zip(products, precisions):
                setting.fp32_precision = "none"     # as it is more generally set, where that was it
                if setting.fp32_precision != precision:
                    setting.fp32_precision = precision
            if threads > 1:
                torch.set_num_threads(threads)

# --- program: it needs no sibling

def read(file: Path, seconds: float) -> tuple[Tensor, int]:
    """The first seconds of a recording in mono, (1, 1, T), and its sample rate in Hz: by libsndfile
    or else, as m4a, wma or webm, by ffmpeg through PyAV. ValueError where there is no audio."""
    import soundfile
    try:
        with open(file, "rb") as f, soundfile.SoundFile(f) as sound:    # names in any encoding
            sample_rate = sound.samplerate
            length = min(sound.frames, math.ceil(seconds * sample_rate))
            audio = torch.from_numpy(sound.read(length, dtype="float32", always_2d=True).T)
    except soundfile.LibsndfileError as error:
        audio, sample_rate = read_by_ffmpeg(file, seconds, f"{file}: {error.error_string}")
    if not audio.numel() or not audio.isfinite().all():
        raise ValueError(f"{file}: expected audio, got no samples, or NaN or infinity")
    if not 1000 <= sample_rate <= 768_000:
        raise ValueError(f"{file}: expected a rate from 1 to 768 kHz, got {sample_rate} Hz")
    return audio.mean(0)[None, None], sample_rate

def read_by_ffmpeg(file: Path, seconds: float, reason: str) -> tuple[Tensor, int]:
    """(C, T) and the sample rate in Hz; reason: why libsndfile does not read it."""
    try:
        import av
    except ImportError:
        raise ValueError(f"{reason} For other formats: pip install 'av>=18,<19'") from None
    pieces = []
    sample_rate = 0
    try:
        with open(file, "rb") as f, av.open(f) as container:
            planar = av.AudioResampler(format="fltp")           # float32, a row for each channel
            for frame in container.decode(container.streams.audio[0]):
                sample_rate = frame.sample_rate
                pieces += [torch.from_numpy(f.to_ndarray()) for f in planar.resample(frame)]
                if sum(piece.shape[1] for piece in pieces) >= seconds * sample_rate:
                    break
    except (av.FFmpegError, IndexError) as error:               # IndexError: a file without sound
        raise ValueError(f"{reason} ffmpeg: {error}") from None
    audio = torch.cat(pieces or [torch.zeros(1, 0)], 1)
    return audio[:, : math.ceil(seconds * sample_rate)], sample_rate

def describe(chain: Chain, draws: dict[str, Tensor]) -> list[str]:
    """One line for each transform that was drawn for the first example, with values and units."""
    lines = []
    for name in (name for name in chain.transforms if draws[name][0]):
        words = []
        for key, (_, unit) in chain.transforms[name].values.items():
            value = draws[f"{name}.{key}"][0].item()
            words.append(f"{key} {value:.4g} {unit}" if unit else f"{key} {value}")
        lines.append(f"  {name}: {', '.join(words) or 'on'}")
    return lines or ["  nothing drawn"]

def listen(x: Tensor, sample_rate: int, out: Path, seed: int) -> list[str]:
    """Write each transform alone and three chains of x (1, 1, T); what was written and drawn."""
    import soundfile
    out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    chains = {name: Chain(sample_rate, [name], {name: 1.0}) for name in TRANSFORMS}
    chains |= {f"chain-{i}": Chain(sample_rate) for i in (1, 2, 3)}
    sounds = {"original": x[0, 0]}
    lines = []
    for name, chain in chains.items():
        draws = chain.draw(1, generator)
        sounds[name] = chain(x, draws)[0, 0]
        lines += [f"{out / name}.wav", *describe(chain, draws)]
    # one factor for all, so that levels can be compared and nothing clips
    peak = max(1.0, max(sound.abs().max().item() for sound in sounds.values()))
    for name, sound in sounds.items():
        with open(out / f"{name}.wav", "wb") as f:
            soundfile.write(f, (sound / peak).numpy(), sample_rate, format="WAV")
    return lines

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="augment.py", usage="augment.py FILE [--out DIR] [--seconds S] [--seed N]",
        description="Hear each augmentation alone and three full chains.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("file", metavar="FILE", type=Path, help="a recording in any format")
    add("--seconds", type=float, default=30.0, help="of the recording's beginning to use")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, default=Path("listen"), help="folder for the sounds")
    add("--seed", type=int, default=0, help="of the values drawn")
    return parser

def say(lines: list[str]) -> None:
    """Print, wherever that goes: to nowhere, or to a reader who has read enough, as `head` has."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError as error:                                    # Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise

def main(argv: list[str] | None = None) -> int:
    import soundfile
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")       # file names in any encoding
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.file.is_file():
        parser.error(f"expected a recording, got {args.file}, which is not a file")
    if not 0 < args.seconds < math.inf:
        parser.error(f"expected --seconds above 0, got {args.seconds:g}")
    try:
        x, sample_rate = read(args.file, args.seconds)
        say(listen(x, sample_rate, args.out, args.seed))
    except (ValueError, OSError, soundfile.LibsndfileError) as error:
        if sys.stderr:
            print(f"augment.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
