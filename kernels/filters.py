"""The chain's filters: a recursion as a few matrix products, and the rooms of Freeverb by tables.

What it computes: augment._recurse, _freeverb and _by_fft, to rounding. Why it is faster:
- `recurse`, a second-order filter, goes in blocks of samples. Inside a block it is a product with a
  triangular matrix of the impulse response, and a block hands one complex number on to the next.
  The plain way takes two FFTs and evaluates the transfer function at every bin.
- `freeverb` evaluates 8 combs and 4 all-passes at 32,769 bins for each example. Here z^-D is an
  outer product of two short tables, no complex exponential; the all-passes, the same for all rooms,
  are one table; and the combs share all but a sum of eight reciprocals.
- `by_fft`, a product in the domain of frequencies, works on several examples at once.

By how much: on one core of an AMD EPYC a filter takes 1/9 of its plain time, the reverb 1/11; with
chain.c (compiled.py), which these functions hand their loops to where it is there, 1/22 and 1/20
(results/speed/chain.json).
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import compiled

SAMPLES = 32                # in a block of the recursion (P)
COLUMNS = 256               # bins in a row of a table of them: delays are outer products there
ROWS = 16                   # examples at once on a CPU: the temporaries stay in the cache


def blocks(x: Tensor) -> list[slice]:
    """The examples in blocks on a CPU, else all at once."""
    size = ROWS if x.device.type == "cpu" else max(len(x), 1)
    return [slice(i, min(i + size, len(x))) for i in range(0, len(x), size)]


def on(x: Tensor, values: Tensor) -> Tensor:
    """values, where x is, without waiting for a GPU."""
    if x.device.type != "cuda" or values.is_cuda:
        return values.to(x.device)
    return values.pin_memory().to(x.device, non_blocking=True)


def fft(transform, x: Tensor, n: int) -> Tensor:
    """transform(x, n) of (B, ...). MKL transforms a single row by another and slower algorithm,
    which also rounds differently: it is given two."""
    return transform(x.expand(2, -1), n)[:1] if len(x) == 1 else transform(x, n)


def by_fft(x: Tensor, response: Tensor, n: int) -> Tensor:
    """x (B, T) times the response (B, n / 2 + 1) at the points of an FFT."""
    response = on(x, response)
    y = torch.empty_like(x)
    for rows in blocks(x):
        spectrum = fft(torch.fft.rfft, x[rows], n).mul_(response[rows])
        y[rows] = fft(torch.fft.irfft, spectrum, n)[:, : x.shape[1]]
    return y


# ------------------------------------------------------------------------------- the recursion


def recurse(x: Tensor, pole: Tensor, zero: Tensor, gain: Tensor) -> Tensor:
    """x (B, T) through gain (1 - zero / z)^2 / ((1 - pole / z) (1 - pole* / z)), (B,) each, in
    float64 and complex128 on the CPU. M blocks of P samples."""
    if compiled.usable(x):
        parts = (gain, -2 * zero * gain, zero.square() * gain, -2 * pole.real, pole.abs().square())
        return compiled.recurse(x, torch.stack(parts, 1))
    # as direct + residue / (1 - pole / z) + the latter's conjugate
    residue = gain * (pole - zero).square() / (pole * (pole - pole.conj()))
    direct = gain / pole.abs().square()
    powers = pole[:, None] ** torch.arange(SAMPLES + 1)                         # (B, P + 1)
    inside, after = _block_matrices(powers, residue, direct, x)
    count = -(-x.shape[1] // SAMPLES)                                           # M
    # of a state after 1, 2, 4, ... blocks; below 1e-30 it is nothing to a sum, but slow to add
    decay = powers[:, -1:] ** (1 << torch.arange((count - 1).bit_length()))
    decay = on(x, torch.where(decay.abs() > 1e-30, decay, 0).to(torch.complex64))
    y = torch.empty_like(x)
    for rows in blocks(x):
        padded = pad(x[rows], (0, count * SAMPLES - x.shape[1])).view(-1, count, SAMPLES)
        out = torch.bmm(padded, inside[rows])                                   # (B, M, P + 2)
        state = torch.view_as_complex(out[:, :, SAMPLES:].contiguous())         # (B, M)
        state = _decaying_sum(state, decay[rows])
        before = torch.view_as_real(pad(state[:, :-1], (1, 0)))                 # (B, M, 2)
        out = torch.baddbmm(out[:, :, :SAMPLES], before, after[rows])
        y[rows] = out.flatten(1)[:, : x.shape[1]]
    return y


def _block_matrices(powers: Tensor, residue: Tensor, direct: Tensor, x: Tensor
                    ) -> tuple[Tensor, Tensor]:
    """From pole ** (0, ..., P): what a block makes of its input, (B, P, P + 2), the state it leaves
    in the last two columns; and what it makes of the state before it, (B, 2, P)."""
    impulse = 2 * (residue[:, None] * powers).real                              # (B, P + 1)
    impulse[:, 0] += direct
    response = pad(on(x, impulse[:, :-1].to(x.dtype)), (SAMPLES - 1, 0))
    response = response.unfold(1, SAMPLES, 1).flip(1)                           # [j, i] = h[i - j]
    state = on(x, torch.view_as_real(powers[:, :-1].flip(1)).to(x.dtype))
    after = 2 * residue[:, None] * powers[:, 1:]
    after = on(x, torch.stack([after.real, -after.imag], 1).to(x.dtype))
    return torch.cat([response, state], 2), after


def _decaying_sum(state: Tensor, decay: Tensor) -> Tensor:
    """y[m] = state[m] + decay y[m - 1] of (B, M) by doubling, given the decay after 2^k blocks."""
    for k in range(decay.shape[1]):
        step = 1 << k
        later = torch.addcmul(state[:, step:], decay[:, k, None], state[:, :-step])
        state = torch.cat([state[:, :step], later], 1)
    return state


# ------------------------------------------------------------------------------- rooms


def freeverb(x: Tensor, rooms) -> Tensor:
    """x (B, T), the dry signal, and what each of the rooms (augment.Rooms) adds to it."""
    total = x.shape[1]
    n = 1 << max(15, (total - 1).bit_length())
    circle = _circle(n, rooms.decay_db, rooms.all_passes, rooms.wet, x.device)
    y = torch.empty_like(x)
    for rows in blocks(x):
        spectrum = fft(torch.fft.rfft, x[rows] * circle.weight[:total], n)
        combs = _combs(rooms, rows, circle)
        if compiled.usable(x):
            compiled.apply_rooms(spectrum, combs, circle.planes)
        else:
            _apply_rooms(spectrum, combs, circle)
        tail = fft(torch.fft.irfft, spectrum, n)[:, :total]
        y[rows] = torch.addcdiv(x[rows], tail, circle.weight[:total])
    return y


def _apply_rooms(spectrum: Tensor, combs: tuple, circle) -> None:
    """Multiply the spectrum (B, n / 2 + 1) in place.

    With f the reciprocal gain around its loop, a comb is z^-D / (1 - z^-D / f) =
    (f / (f - z^-D) - 1) f: so the combs share all but a sum of eight reciprocals."""
    coarse, fine, direct, damped = combs
    loop = direct[:, None, None] - damped[:, None, None] * circle.one_sample    # (B, A, COLUMNS)
    coarse = coarse[..., None]
    fine = fine[:, :, None]
    # one by one on a CPU: the temporaries stay in the cache
    for row in range(len(spectrum)) if spectrum.device.type == "cpu" else [slice(None)]:
        f = loop[row]
        total = torch.addcmul(f.unsqueeze(-3), coarse[row], fine[row], value=-1)
        total = total.reciprocal_().sum(-3)
        wet = total.mul_(f).sub_(fine.shape[1]).mul_(f) * circle.all_passes
        spectrum[row] *= wet.flatten(-2)[..., : spectrum.shape[1]]


class _Circle(NamedTuple):
    """What all rooms share on the circle of radius rho. Bin A COLUMNS + b of an n-point FFT stands
    at [A, b]."""

    weight: Tensor          # (n,): rho^-t
    phases: Tensor          # (n,): e^(-2 pi i k / n)
    one_sample: Tensor      # (A, COLUMNS): z^-1
    all_passes: Tensor      # (A, COLUMNS): all of them, and the wet gain
    planes: tuple           # these two with real and imaginary parts apart, (2, A, COLUMNS)


@lru_cache(maxsize=4)
def _circle(n: int, decay_db: float, all_passes: tuple, wet: float, device: torch.device
            ) -> _Circle:
    turns = torch.arange(n, dtype=torch.float64) / n
    log_rho = decay_db / 20 * math.log(10) / n
    phases = torch.polar(torch.ones_like(turns), -2 * math.pi * turns)
    bins = torch.arange((n // 2 // COLUMNS + 1) * COLUMNS, dtype=torch.float64).view(-1, COLUMNS)
    log_z = torch.complex(torch.full_like(bins, log_rho), bins * (2 * math.pi / n))
    product = torch.full_like(log_z, wet)
    for samples in all_passes:
        later = torch.exp(log_z * -samples)
        product *= (1.5 * later - 1) / (1 - 0.5 * later)
    weight = torch.exp(turns * (-n * log_rho)).float()
    tables = [table.to(torch.complex64) for table in (phases, torch.exp(-log_z), product)]
    planes = tuple(torch.stack([table.real, table.imag]) for table in tables[1:])
    # waits, once: other streams will read them
    return _Circle(*(table.to(device) for table in (weight, *tables)), planes)


def _combs(rooms, rows: slice, circle: _Circle) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The combs of these rooms on the circle. Their delays z^-D are outer products of (B, 8, A) and
    (B, 8, COLUMNS); the reciprocal of the gain around their loop, (1 - d / z) / (feedback (1 - d)),
    is the one (B,) less the other (B,) times 1 / z."""
    device = circle.phases.device
    n = len(circle.phases)
    d = rooms.damping[rows]
    feedback = rooms.feedback[rows] * (1 - d)
    samples = rooms.combs[rows][:, :, None]                                     # (B, 8, 1)
    decay = torch.exp(samples * (-rooms.decay_db / 20 * math.log(10) / n))      # rho^-D
    samples = on(circle.phases, samples.long())
    fine = circle.phases[(samples * torch.arange(COLUMNS, device=device)) % n]
    fine = fine * on(circle.phases, decay.float())
    coarse = circle.phases[(samples * torch.arange(0, n // 2 + 1, COLUMNS, device=device)) % n]
    damped = on(circle.phases, (d / feedback).float())
    return coarse, fine, on(circle.phases, (1 / feedback).float()), damped
