"""augment.pitch_shift: sines, noise and clicks go in, and come out in tune, at their level, whole
and once; and its faster ways, kernels/splice.py and splice_gpu.py, against the plain one.

A Triton kernel runs on a CPU by Triton's interpreter, in a process that runs this file: Triton
looks at TRITON_INTERPRET when it is imported."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.signal
import torch
from sounds import RATE, SAMPLES, decibels, full, music

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import augment
from kernels import splice

SHIFTS = (-5.0, -3.3, -1.0, -0.1, 0.1, 1.0, 3.3, 5.0)


def tones(frequencies, shifts=SHIFTS):
    """Every tone with every shift: input (B, 1, T), frequencies (B,), shifts (B,)."""
    f, s = torch.tensor([(f, s) for f in frequencies for s in shifts]).T
    t = torch.arange(SAMPLES, dtype=torch.float64) / RATE
    return 0.3 * torch.sin(2 * math.pi * f[:, None].double() * t).float()[:, None], f, s


def middle(y):
    """80 % of a sound (T,)."""
    return y[SAMPLES // 10 : -SAMPLES // 10]


def gained(y, x):
    """dB, of the middle of y against all of x."""
    return decibels(middle(y[0])) - decibels(x)


def spectrum(y):
    """Of the middle, with the frequency of its first bin step in Hz."""
    n = 1 << 19
    y = middle(y).double()
    window = torch.from_numpy(scipy.signal.windows.blackmanharris(len(y)))
    return torch.fft.rfft(y * window, n).abs(), RATE / n


def frequency_of(y):
    """Hz, of the loudest tone, by a parabola through its three bins."""
    bins, step = spectrum(y)
    k = bins.argmax().item()
    a, b, c = bins[k - 1 : k + 2].log()
    return (k + ((a - c) / (2 * (a - 2 * b + c))).item()) * step


@pytest.fixture(scope="module")
def shifted_tones():
    x, f, s = tones((110.0, 220.0, 440.0, 1000.0, 2000.0, 3000.0, 4000.0))
    return x, augment.pitch_shift(x, s, RATE), f, s


def test_pitch_shift_hits_the_pitch(shifted_tones):
    _, y, f, s = shifted_tones
    for row in range(len(y)):
        cents = 1200 * math.log2(frequency_of(y[row, 0]) / (f[row] * 2 ** (s[row] / 12)))
        assert abs(cents) < 1, f"{f[row]} Hz by {s[row]}: {cents:.2f} cents off"


def test_pitch_shift_keeps_the_level(shifted_tones):
    x, y, f, s = shifted_tones
    for row in range(len(y)):
        level = gained(y[row], x[row])
        assert abs(level) < 0.5, f"{f[row]} Hz by {s[row]}: {level:.2f} dB"


def test_pitch_shift_keeps_the_length(shifted_tones):
    x, y, _, _ = shifted_tones
    assert y.shape == x.shape


def tone_of_440_hz():
    t = torch.arange(SAMPLES, dtype=torch.float64) / RATE
    return 0.3 * torch.sin(2 * math.pi * 440 * t).float()[None, None]


@pytest.mark.parametrize("semitones", [-12.0, -7.0, -5.0, 5.0, 12.0])
def test_pitch_shift_begins_with_the_beginning(semitones):
    """The first 35 ms of a tone are a tone too."""
    y = augment.pitch_shift(tone_of_440_hz(), full(semitones), RATE)
    n = round(0.035 * RATE)
    t = torch.arange(n, dtype=torch.float64) / RATE
    turns = 2 * math.pi * 440 * 2 ** (semitones / 12) * t
    tone = torch.stack([turns.sin(), turns.cos()], 1)
    found = tone @ torch.linalg.lstsq(tone, y[0, 0, :n, None].double()).solution[:, 0]
    assert (y[0, 0, :n] - found).norm() < 0.02 * found.norm()


@pytest.mark.parametrize("semitones", [-12.0, -7.0, -5.0, 5.0, 12.0])
def test_pitch_shift_is_the_same_whatever_else_is_in_the_batch(semitones):
    x = tone_of_440_hz()
    alone = augment.pitch_shift(x, full(semitones), RATE)
    both = augment.pitch_shift(x.repeat(2, 1, 1), torch.tensor([semitones, 3.0]), RATE)
    assert torch.equal(alone, both[:1])


@pytest.fixture(scope="module")
def shifted_high_tones():
    x, f, s = tones((500.0, 2500.0, 5000.0, 6500.0, 7300.0, 7990.0))
    return x, augment.pitch_shift(x, s, RATE), f, s


def test_pitch_shift_is_flat_to_8_khz(shifted_high_tones):
    x, y, f, s = shifted_high_tones
    for row in range(len(x)):
        level = gained(y[row], x[row])
        assert abs(level) < 1, f"{f[row]} Hz by {s[row]}: {level:.2f} dB"


def test_pitch_shift_makes_no_other_tones(shifted_high_tones):
    x, y, f, s = shifted_high_tones
    for row in range(len(x)):
        bins, step = spectrum(y[row, 0])
        k = round(f[row].item() * 2 ** (s[row].item() / 12) / step)
        near = round(100 / step)
        rest = torch.cat([bins[: max(0, k - near)], bins[k + near :]]).max() / bins.max()
        level = 20 * math.log10(rest)
        assert level < -50, f"{f[row]} Hz by {s[row]}: another tone at {level:.0f} dB"


def test_pitch_shift_upwards_does_not_alias():
    x, f, s = tones((8600.0, 9000.0, 9700.0, 10000.0, 10500.0, 10900.0), (2.0, 3.7, 5.0))
    y = augment.pitch_shift(x, s, RATE)
    beyond = (f * 2 ** (s / 12) > RATE / 2).nonzero().flatten()
    assert len(beyond) > 10
    for row in beyond:
        level = gained(y[row], x[row])
        assert level < -50, f"{f[row]} Hz by {s[row]}: {level:.0f} dB"


# ---------------------------------------------------------------------------------- attacks


def clicks(batch, seed=0):
    """Decaying clicks 80 to 300 ms apart over a low tone: (B, 1, T) and where they are."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.arange(66)
    click = 0.5 * torch.exp(-k / 11) * torch.cos(1.3 * k)
    t = torch.arange(SAMPLES) / RATE
    x = torch.stack([0.1 * torch.sin(2 * math.pi * (150 + 20 * row) * t) for row in range(batch)])
    places = []
    for row in range(batch):
        at = 2000
        while at < SAMPLES - 3000:
            x[row, at : at + 66] += click
            places.append((row, at))
            at += int((0.08 + 0.22 * torch.rand(1, generator=generator).item()) * RATE)
    return x[:, None], places


def energy_above_1500_hz(x):
    for _ in range(2):
        x = augment.high_pass(x, full(1500, len(x)), RATE)
    return x[:, 0].square()


AROUND = int(0.03 * RATE)
SHORT = int(0.006 * RATE)


@pytest.fixture(scope="module", params=[-5.0, -2.0, 2.0, 5.0])
def shifted_clicks(request):
    """For every click: the energy that should come out (it goes with the click's length: as one
    over the ratio), the energy around its place, and of every 6 ms there; all of a click stands in
    one of those."""
    x, places = clicks(8)
    y = energy_above_1500_hz(augment.pitch_shift(x, full(request.param, 8), RATE))
    x = energy_above_1500_hz(x)
    found = []
    for row, at in places:
        expected = x[row, at - AROUND : at + AROUND].sum() / 2 ** (request.param / 12)
        energy = y[row, at - AROUND : at + AROUND]
        found.append((at / RATE, expected, energy, energy.unfold(0, SHORT, 1).sum(1)))
    return found


def test_pitch_shift_keeps_attacks_whole(shifted_clicks):
    for second, expected, _, within in shifted_clicks:
        assert abs(10 * math.log10(within.max() / expected)) < 1, f"click at {second:.3f} s"


def test_pitch_shift_repeats_no_attack(shifted_clicks):
    for second, expected, energy, within in shifted_clicks:
        rest = energy.sum() - within.max()
        assert rest < 0.05 * expected, f"click at {second:.3f} s comes twice"


def test_pitch_shift_keeps_attacks_near_their_place(shifted_clicks):
    for second, _, _, within in shifted_clicks:
        away = within.argmax().item() + SHORT // 2 - AROUND
        assert abs(away) < 0.025 * RATE, f"click at {second:.3f} s"


def test_pitch_shift_by_nothing_changes_next_to_nothing():
    x = music(2)
    for _ in range(4):
        x = augment.low_pass(x, full(2000, 2), RATE)            # nothing above the band limit
    y = augment.pitch_shift(x, torch.zeros(2), RATE)
    assert (y - x)[..., 200:-200].norm() < 1e-3 * x.norm()


# ------------------------------------------------------------------------------ faster ways


def plan_of(samples, semitones):
    x = music(len(semitones), samples)[:, 0]
    return augment.Splicing(x, 2 ** (torch.tensor(semitones).double() / 12), RATE)


@pytest.mark.parametrize("samples", [1, 1103, 14000, 59049])
def test_the_fast_way_is_the_plain_one(samples):
    plan = plan_of(samples, [-12.0, -5.0, -0.7, 0.0, 2.3, 5.0, 12.0])
    plain = augment._overlap_add(plan)
    assert (splice.overlap_add(plan) - plain).norm() < 1e-6 * plain.norm()


def test_without_triton_a_gpu_takes_the_steps_and_it_is_said(monkeypatch):
    splice.in_one_kernel.cache_clear()
    monkeypatch.setitem(sys.modules, "kernels.splice_gpu", None)
    with pytest.warns(UserWarning, match="slower.*Triton"):
        assert not splice.in_one_kernel(torch.device("cuda"))
    splice.in_one_kernel.cache_clear()


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch for Linux alone")


def search_by_the_interpreter():
    """The very same samples."""
    plan = plan_of(14000, [-5.0, 5.0, 2.3, -12.0])
    in_steps = splice.search(plan)
    splice.in_one_kernel = lambda device: True
    assert torch.equal(splice.search(plan), in_steps)
    assert in_steps.shape[1] > 10


@needs_triton
def test_the_search_in_one_kernel_is_the_search_in_steps():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_the_kernel_compiles_for_a_gpu():
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from kernels import splice_gpu

    plan = plan_of(14000, [2.0])
    *_, sizes = splice_gpu.arguments(plan, splice.tables_of(plan))
    whole = {"step": "*i64", "starts": "*i64"}
    signals = splice_gpu.Signals(*(whole.get(n, "*fp32") for n in splice_gpu.Signals._fields))
    lengths = splice_gpu.Lengths(*["i32"] * 6, "fp32")
    types = {"signals": signals, "lengths": lengths, "SIZES": "constexpr"}
    source = ASTSource(splice_gpu.search_program, types, {(2,): sizes})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


if __name__ == "__main__":
    search_by_the_interpreter()
