"""augment.py against independent oracles: sox for the reverb, scipy and torchaudio for the filters, sines, noise and
clicks for the pitch shift; and the promises of the chain: rows do not depend on each other, draws can be sliced, inputs
stay as they are, silence stays finite.

sox must be installed (Debian: apt-get install sox); without it the reverb's tests fail and say so.
"""

import doctest
import math
import re
import shutil
import subprocess
import threading

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import torchaudio

import augment
from augment import TRANSFORMS, Chain, Transform

RATE, SAMPLES = 22050, 59049


def music(batch, samples=SAMPLES, seed=0):
    """(B, 1, T): decaying harmonic notes over a little noise, different in every row."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(samples) / RATE
    base = 80 + 400 * torch.rand(batch, 1, generator=generator)
    sound = sum(torch.sin(2 * math.pi * base * h * t) / h for h in range(1, 12))
    sound = sound * torch.exp(-6 * (t * (1 + torch.rand(batch, 1, generator=generator)) % 0.5))
    return (0.1 * sound + 0.005 * torch.randn(batch, samples, generator=generator))[:, None]


def full(value, batch=1):
    return torch.full((batch,), float(value))


def decibels(x):
    return 20 * math.log10(float(x.double().square().mean().sqrt()) + 1e-30)


def test_docstrings_run():
    assert doctest.testmod(augment).failed == 0


# ------------------------------------------------------------------------------- the simple ones


def test_polarity_gain_delay_are_exact():
    x = music(4)
    assert torch.equal(augment.polarity(x, torch.tensor([True, False, True, False])), x * torch.tensor([-1, 1, -1, 1.])[:, None, None])
    db = torch.tensor([-6.0, -0.5, 0.0, 3.0])
    torch.testing.assert_close(augment.gain(x, db), x * 10 ** (db.double() / 20).float()[:, None, None], rtol=1e-6, atol=0)
    ms = torch.tensor([200.0, 250.0, 500.0, 0.0])
    y = augment.delay(x, ms, RATE)
    for row, shift in enumerate((4410, 5513, 11025, 0)):                # 5512.5 samples are rounded to even: 5512
        shift -= shift == 5513
        expected = x[row, 0].clone()
        expected[shift:] += 0.5 * x[row, 0, :SAMPLES - shift]
        assert torch.equal(y[row, 0], expected), row


def test_delay_longer_than_the_audio_adds_nothing():
    x = music(1, 1000)
    assert torch.equal(augment.delay(x, full(500), RATE), x)


@pytest.mark.parametrize("snr", [0.0, 40.0, 80.0])
def test_noise_has_its_level_and_is_white_and_gaussian(snr):
    x = music(6)
    added = augment.noise(x, full(snr, 6), torch.Generator().manual_seed(1))[:, 0].double() - x[:, 0].double()
    for row in range(6):
        assert abs(decibels(x[row]) - decibels(added[row]) - snr) < 0.2
    z = added / added.square().mean(1, keepdim=True).sqrt()
    assert z.mean(1).abs().max() < 0.02 and (z.pow(4).mean(1) - 3).abs().max() < 0.15          # 4 standard errors
    z = torch.cat([z, z.roll(1, 1), z.roll(29525, 1)])                 # rows, lag 1, and the two halves of Box-Muller
    assert (torch.corrcoef(z) - torch.eye(18)).abs().max() < 0.02


def test_noise_lets_gradients_pass():
    x = music(2).requires_grad_()
    augment.noise(x, torch.tensor([80.0, 20.0]), seed=torch.tensor([1, 2])).sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x), atol=0.1)


def test_noise_follows_the_generator_and_nothing_else():
    x = music(3)
    torch.manual_seed(1)
    a = augment.noise(x, full(20, 3), torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(a, augment.noise(x, full(20, 3), torch.Generator().manual_seed(5)))
    assert not torch.equal(a, augment.noise(x, full(20, 3), torch.Generator().manual_seed(6)))


# ------------------------------------------------------------------------------- filters


@pytest.mark.parametrize("rate", [22050, 44100])
@pytest.mark.parametrize("kind", ["low", "high"])
def test_filters_agree_with_scipy(kind, rate):
    cutoffs = [20.0, 200.0, 517.3, 1200.0, 2200.0, 4000.0, 10000.0]
    x = torch.randn(len(cutoffs), 1, 20000, generator=torch.Generator().manual_seed(0))
    ours = getattr(augment, f"{kind}_pass")(x, torch.tensor(cutoffs), rate)[:, 0]
    for row, cutoff in enumerate(cutoffs):
        scipy_says = scipy.signal.lfilter(*scipy.signal.butter(2, cutoff, kind, fs=rate), x[row, 0].double().numpy())
        assert np.linalg.norm(ours[row].numpy() - scipy_says) < 1e-5 * np.linalg.norm(scipy_says), cutoff


@pytest.mark.parametrize("kind", ["low", "high"])
def test_filters_agree_with_torchaudio_below_full_scale(kind):
    x = 0.05 * torch.randn(1, 1, 20000, generator=torch.Generator().manual_seed(0))
    for cutoff in (300.0, 1200.0, 3000.0):
        ours = getattr(augment, f"{kind}_pass")(x, full(cutoff), RATE)[0, 0].double()
        theirs = getattr(torchaudio.functional, f"{kind}pass_biquad")(x[0, 0].double(), RATE, cutoff, Q=math.sqrt(0.5))
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("kind,cutoff", [("low", 2200.0), ("low", 4000.0), ("high", 200.0), ("high", 1200.0)])
def test_filters_are_3_db_down_at_the_cutoff(kind, cutoff):
    impulse = torch.zeros(1, 1, 2 * RATE)                               # so that bins are half a hertz apart
    impulse[..., 0] = 1
    response = torch.fft.rfft(getattr(augment, f"{kind}_pass")(impulse, full(cutoff), RATE)[0, 0].double()).abs()
    assert abs((response - math.sqrt(0.5)).abs().argmin().item() / 2 / cutoff - 1) < 0.01


# ------------------------------------------------------------------------------- reverb


def sox(x, rate, *effect, folder):
    """x (T,) -> what sox makes of it, (T',) float64."""
    if not shutil.which("sox"):
        pytest.fail("the program sox, which this test compares with, is not installed: apt-get install sox")
    source, target = folder / "in.wav", folder / "out.wav"
    soundfile.write(source, x.numpy(), rate, subtype="FLOAT")
    subprocess.run(["sox", "-D", source, "-e", "floating-point", "-b", "32", target, *map(str, effect)], check=True, capture_output=True)
    return torch.from_numpy(soundfile.read(target)[0])


@pytest.mark.parametrize("rate", [22050, 44100])
def test_reverb_is_that_of_sox(rate, tmp_path):
    generator = torch.Generator().manual_seed(rate)
    rooms = (100 * torch.rand(20, 3, generator=generator)).round(decimals=2)
    corners = torch.tensor([[0, 0, 0], [100, 0, 100], [100, 100, 0], [0, 100, 100], [50, 50, 100.0]])
    rooms = torch.cat([rooms, corners])
    x = 0.02 * torch.randn(len(rooms), 1, SAMPLES, generator=generator)
    ours = augment.reverb(x, *rooms.T, rate)
    for row, room in enumerate(rooms.tolist()):
        theirs = sox(x[row, 0], rate, "reverb", *(f"{v:.2f}" for v in room), 0, 0, 0, folder=tmp_path)[:SAMPLES]
        error = (ours[row, 0] - theirs).norm() / (theirs - x[row, 0]).norm()
        assert error < 1e-3, f"{room}: relative error {error:.1e} of the wet signal"


def test_reverb_of_short_audio(tmp_path):
    x = 0.1 * torch.randn(1, 1, 5000, generator=torch.Generator().manual_seed(0))
    theirs = sox(x[0, 0], RATE, "reverb", 90, 20, 30, 0, 0, 0, folder=tmp_path)[:5000]
    assert (augment.reverb(x, full(90), full(20), full(30), RATE)[0, 0] - theirs).norm() < 1e-3 * (theirs - x[0, 0]).norm()


# ------------------------------------------------------------------------------- pitch shift

SHIFTS = (-5.0, -3.3, -1.0, -0.1, 0.1, 1.0, 3.3, 5.0)


def tones(frequencies, shifts=SHIFTS):
    """Every tone with every shift: input (B, 1, T), frequencies (B,), shifts (B,)."""
    f, s = torch.tensor([(f, s) for f in frequencies for s in shifts]).T
    t = torch.arange(SAMPLES, dtype=torch.float64) / RATE
    return 0.3 * torch.sin(2 * math.pi * f[:, None].double() * t).float()[:, None], f, s


def spectrum(y):
    """Of the middle 80 %, with the frequency of its first bin step in Hz."""
    middle = y[SAMPLES // 10:-SAMPLES // 10].double()
    n = 1 << 19
    window = torch.from_numpy(scipy.signal.windows.blackmanharris(len(middle)))
    return torch.fft.rfft(middle * window, n).abs(), RATE / n


def test_pitch_shift_keeps_pitch_level_and_length():
    x, f, s = tones((110.0, 220.0, 440.0, 1000.0, 2000.0, 3000.0, 4000.0))
    y = augment.pitch_shift(x, s, RATE)
    assert y.shape == x.shape
    for row in range(len(x)):
        bins, step = spectrum(y[row, 0])
        k = bins.argmax().item()
        a, b, c = bins[k - 1:k + 2].log()
        found = (k + ((a - c) / (2 * (a - 2 * b + c))).item()) * step
        cents = 1200 * math.log2(found / (f[row] * 2 ** (s[row] / 12)))
        assert abs(cents) < 1, f"{f[row]} Hz by {s[row]}: {cents:.2f} cents off"
        level = decibels(y[row, 0, SAMPLES // 10:-SAMPLES // 10]) - decibels(x[row])
        assert abs(level) < 0.5, f"{f[row]} Hz by {s[row]}: {level:.2f} dB"


@pytest.mark.parametrize("semitones", [-12.0, -7.0, -5.0, 5.0, 12.0])
def test_pitch_shift_begins_with_the_beginning(semitones):
    """The first 35 ms of a tone are a tone too, whatever else is in the batch."""
    t = torch.arange(SAMPLES, dtype=torch.float64) / RATE
    x = 0.3 * torch.sin(2 * math.pi * 440 * t).float()[None, None]
    y = augment.pitch_shift(x, full(semitones), RATE)
    assert torch.equal(y, augment.pitch_shift(x.repeat(2, 1, 1), torch.tensor([semitones, 3.0]), RATE)[:1])
    n = round(0.035 * RATE)
    turns = 2 * math.pi * 440 * 2 ** (semitones / 12) * t[:n]
    tone = torch.stack([turns.sin(), turns.cos()], 1)
    found = tone @ torch.linalg.lstsq(tone, y[0, 0, :n, None].double()).solution[:, 0]
    assert (y[0, 0, :n] - found).norm() < 0.02 * found.norm()


def test_pitch_shift_is_flat_to_8_khz_and_makes_no_other_tones():
    x, f, s = tones((500.0, 2500.0, 5000.0, 6500.0, 7300.0, 7990.0))
    y = augment.pitch_shift(x, s, RATE)
    for row in range(len(x)):
        level = decibels(y[row, 0, SAMPLES // 10:-SAMPLES // 10]) - decibels(x[row])
        assert abs(level) < 1, f"{f[row]} Hz by {s[row]}: {level:.2f} dB"
        bins, step = spectrum(y[row, 0])
        k = round(f[row].item() * 2 ** (s[row].item() / 12) / step)
        near = round(100 / step)
        rest = torch.cat([bins[:max(0, k - near)], bins[k + near:]]).max() / bins.max()
        assert 20 * math.log10(rest) < -50, f"{f[row]} Hz by {s[row]}: another tone at {20 * math.log10(rest):.0f} dB"


def test_pitch_shift_upwards_does_not_alias():
    x, f, s = tones((8600.0, 9000.0, 9700.0, 10000.0, 10500.0, 10900.0), (2.0, 3.7, 5.0))
    y = augment.pitch_shift(x, s, RATE)
    beyond = f * 2 ** (s / 12) > RATE / 2
    assert beyond.sum() > 10
    for row in beyond.nonzero().flatten():
        level = decibels(y[row, 0, SAMPLES // 10:-SAMPLES // 10]) - decibels(x[row])
        assert level < -50, f"{f[row]} Hz by {s[row]}: {level:.0f} dB"


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
        places.append([])
        while at < SAMPLES - 3000:
            x[row, at:at + 66] += click
            places[-1].append(at)
            at += int((0.08 + 0.22 * torch.rand(1, generator=generator).item()) * RATE)
    return x[:, None], places


@pytest.mark.parametrize("semitones", [-5.0, -2.0, 2.0, 5.0])
def test_pitch_shift_keeps_attacks(semitones):
    """Every click comes out once, whole, and near its place. Its energy goes with its length: as one over the ratio."""
    x, places = clicks(8)
    y = augment.pitch_shift(x, full(semitones, 8), RATE)
    x, y = (augment.high_pass(augment.high_pass(z, full(1500, 8), RATE), full(1500, 8), RATE)[:, 0].square() for z in (x, y))
    around, short = int(0.03 * RATE), int(0.006 * RATE)
    for row, at in ((row, at) for row in range(8) for at in places[row]):
        expected = x[row, at - around:at + around].sum() / 2 ** (semitones / 12)
        energy = y[row, at - around:at + around]
        within = energy.unfold(0, short, 1).sum(1)                      # of every 6 ms: all of it stands in one of them
        assert abs(10 * math.log10(within.max() / expected)) < 1, f"click at {at / RATE:.3f} s"
        assert energy.sum() - within.max() < 0.05 * expected, f"click at {at / RATE:.3f} s comes twice"
        assert abs(within.argmax().item() + short // 2 - around) < 0.025 * RATE


def test_pitch_shift_by_nothing_changes_next_to_nothing():
    x = music(2)
    for _ in range(4):
        x = augment.low_pass(x, full(2000, 2), RATE)                    # nothing above the shift's band limit
    y = augment.pitch_shift(x, torch.zeros(2), RATE)
    assert (y - x)[..., 200:-200].norm() < 1e-3 * x.norm()


# ------------------------------------------------------------------------------- promises for every transform


def alone(name):
    return Chain(RATE, [name], {name: 1.0})


@pytest.mark.parametrize("name", [*TRANSFORMS, None])
def test_rows_do_not_depend_on_each_other_and_the_input_stays(name):
    chain = Chain(RATE) if name is None else alone(name)
    x = music(11)
    kept = x.clone()
    draws = chain.draw(11, torch.Generator().manual_seed(3))
    whole = chain(x, draws)
    assert torch.equal(x, kept)
    assert torch.isfinite(whole).all() and whole.shape == x.shape
    for rows in (slice(4, 5), slice(0, 4), slice(3, 11), torch.tensor([9, 2, 5])):
        part = chain(x[rows], {key: value[rows] for key, value in draws.items()})
        assert torch.equal(part, whole[rows]), f"{name} {rows}: {(part - whole[rows]).abs().max()}"


def test_a_large_batch_is_its_rows():
    """More rows than the chain takes at once on a CPU."""
    chain, x = Chain(RATE), music(70, 4000)
    draws = chain.draw(70, torch.Generator().manual_seed(3))
    whole = chain(x, draws)
    for rows in (slice(0, 3), slice(60, 70)):
        assert torch.equal(whole[rows], chain(x[rows], {key: value[rows] for key, value in draws.items()}))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("samples", [1, 700, 59049])
def test_silence_and_short_audio_stay_finite(name, samples):
    chain = alone(name)
    draws = chain.draw(3, torch.Generator().manual_seed(0))
    y = chain(torch.zeros(3, 1, samples), draws)
    assert y.shape == (3, 1, samples) and y.abs().max() < 1e-6
    assert torch.isfinite(chain(torch.ones(3, 1, samples), draws)).all()


def test_an_empty_batch_comes_back_empty():
    chain = Chain(RATE)
    assert chain(torch.zeros(0, 1, 100), chain.draw(0, torch.Generator())).shape == (0, 1, 100)


def test_the_chain_is_the_transforms_one_by_one():
    """By hand, row by row, from the draws' meaning; not by the chain's own table."""
    chain = Chain(RATE, probability={"noise": 0.5})
    x = music(24)
    draws = chain.draw(24, torch.Generator().manual_seed(8))
    whole = chain(x, draws)
    for row in range(24):
        d = {key: value[row:row + 1] for key, value in draws.items()}
        y = x[row:row + 1]
        if d["polarity"]:
            y = -y
        if d["noise"]:
            y = augment.noise(y, d["noise.snr_db"], seed=d["noise.seed"])
        if d["gain"]:
            y = augment.gain(y, d["gain.db"])
        if d["filter"]:
            y = (augment.high_pass(y, d["filter.high_pass_hz"], RATE) if d["filter.high"]
                 else augment.low_pass(y, d["filter.low_pass_hz"], RATE))
        if d["delay"]:
            y = augment.delay(y, d["delay.ms"], RATE)
        if d["pitch"]:
            y = augment.pitch_shift(y, d["pitch.semitones"], RATE)
        if d["reverb"]:
            y = augment.reverb(y, d["reverb.reverberance"], d["reverb.damping"], d["reverb.room_size"], RATE)
        assert (whole[row:row + 1] - y).norm() < 1e-5 * y.norm(), row


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU; there is none here")
def test_cpu_and_gpu_agree():
    chain = Chain(RATE, probability={"noise": 1.0})
    x = music(24)
    draws = chain.draw(24, torch.Generator().manual_seed(8))
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"       # as a user may have it
    try:
        on_cpu, on_gpu = chain(x, draws), chain(x.cuda(), draws).cpu()
    finally:
        matmul.fp32_precision = before
    assert (on_cpu - on_gpu).norm() < 1e-3 * on_cpu.norm()


def test_the_chain_turns_tf32_off_for_itself_alone():
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        chain = Chain(RATE, ["look"], table={"look": Transform(1.0, lambda x, rate: seen.append(matmul.fp32_precision) or x)})
        chain(music(1, 100), chain.draw(1, torch.Generator()))
        assert seen == ["ieee"] and matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_the_chain_is_float32_whatever_the_network_may_do():
    chain, x = Chain(RATE), music(6, 30000)
    draws, before = chain.draw(6, torch.Generator().manual_seed(3)), torch.get_float32_matmul_precision()
    want = chain(x, draws)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chain(x, draws), want)
        assert torch.is_autocast_enabled("cpu")
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(chain(x, draws), want)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_chain_within_a_chain_leaves_the_settings_of_the_outer_one():
    inner, seen, threads = Chain(RATE, ["gain"], {"gain": 1.0}), [], torch.get_num_threads()

    def both(x, rate):
        y = inner(x, inner.draw(len(x), torch.Generator()))
        seen.append(torch.get_num_threads())
        return y
    try:
        torch.set_num_threads(2)
        chain = Chain(RATE, ["both"], table={"both": Transform(1.0, both)})
        chain(music(2, 100), chain.draw(2, torch.Generator()))
        assert seen == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_chains_in_several_threads_leave_the_settings_of_the_process():
    """The second comes in while the first is at work, and stays longer."""
    first_in, second_in, first_out, seen, failed = threading.Event(), threading.Event(), threading.Event(), [], []
    matmul, threads = torch.backends.cuda.matmul, torch.get_num_threads()
    before = matmul.fp32_precision

    def work(wait, inside, after):
        try:
            wait(10)
            chain = Chain(RATE, ["look"], table={"look": Transform(1.0, lambda x, rate: [step() for step in inside] and x)})
            chain(music(1, 100), chain.draw(1, torch.Generator()))
            [step() for step in after]
        except Exception as error:
            failed.append(error)
    try:
        torch.set_num_threads(2)
        matmul.fp32_precision = "tf32"
        note = lambda: seen.append((matmul.fp32_precision, torch.get_num_threads()))
        workers = [threading.Thread(target=work, args=(lambda _: None, [first_in.set, lambda: second_in.wait(10)], [first_out.set])),
                   threading.Thread(target=work, args=(first_in.wait, [second_in.set, lambda: first_out.wait(10), note], [note]))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not failed and seen == [("ieee", 1), ("tf32", 2)] and (matmul.fp32_precision, torch.get_num_threads()) == ("tf32", 2)
    finally:
        torch.set_num_threads(threads)
        matmul.fp32_precision = before


@pytest.mark.parametrize("rate", [4000, 8000, 96000])
def test_the_chain_works_at_any_sample_rate(rate):
    chain = Chain(rate, probability=dict.fromkeys(TRANSFORMS, 1.0))
    x = music(48, 3000)
    assert torch.isfinite(chain(x, chain.draw(48, torch.Generator().manual_seed(0)))).all()


# ------------------------------------------------------------------------------- draws and the table


def test_draws_have_the_ranges_and_probabilities_of_the_paper():
    n = 20000
    draws = Chain(RATE).draw(n, torch.Generator().manual_seed(0))
    for name, p in {"polarity": 0.8, "noise": 0.01, "gain": 0.3, "filter": 0.8, "delay": 0.4, "pitch": 0.4, "reverb": 0.4}.items():
        assert abs(draws[name].float().mean() - p) < 5 * math.sqrt(p * (1 - p) / n), name
    for key, low, high in (("gain.db", -6, 0), ("filter.low_pass_hz", 2200, 4000), ("filter.high_pass_hz", 200, 1200),
                           ("pitch.semitones", -5, 5), ("reverb.reverberance", 0, 100), ("reverb.damping", 0, 100),
                           ("reverb.room_size", 0, 100)):
        values = draws[key]
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high, key
        assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low), key
    assert draws["delay.ms"].unique().tolist() == [200, 250, 300, 350, 400, 450, 500]
    assert draws["noise.snr_db"].unique().tolist() == [80]
    assert abs(draws["filter.high"].float().mean() - 0.5) < 0.02
    decisions = torch.stack([v.double() for v in draws.values() if len(v.unique()) > 1])
    assert (torch.corrcoef(decisions) - torch.eye(len(decisions), dtype=torch.float64)).abs().max() < 0.04         # all independent


def test_draws_follow_the_generator_alone_and_values_not_the_probabilities():
    torch.manual_seed(1)
    a = Chain(RATE).draw(7, torch.Generator().manual_seed(4))
    torch.manual_seed(2)
    b = Chain(RATE, probability={"pitch": 1.0}).draw(7, torch.Generator().manual_seed(4))
    assert b.pop("pitch").all() and a.pop("pitch") is not None
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_docstring_table_says_what_the_code_has():
    rows = re.findall(r"^\| (\w+) \|.*\| ([\d.]+) \|$", augment.__doc__, re.M)
    assert [(name, float(p)) for name, p in rows] == [(name, t.probability) for name, t in TRANSFORMS.items()]
    for name, numbers in {"noise": "80", "gain": "-6 0", "filter": "2200 4000 200 1200", "delay": "200 500 50",
                          "pitch": "-5 5", "reverb": "0 100"}.items():
        line = re.search(rf"^\| {name} \|.*$", augment.__doc__, re.M).group().split("|")[3]
        assert sorted(re.findall(r"-?\d+", line)) == sorted(numbers.split()), name


def test_a_new_transform_is_one_function_and_one_row():
    def reverse(x, sample_rate):
        return x.flip(-1)
    table = {**TRANSFORMS, "reverse": Transform(0.5, reverse)}
    chain = Chain(RATE, ["reverse"], table=table)
    draws = chain.draw(16, torch.Generator().manual_seed(0))
    x = music(16, 500)
    y = chain(x, draws)
    assert 0 < draws["reverse"].sum() < 16
    assert torch.equal(y, torch.where(draws["reverse"][:, None, None], x.flip(-1), x))


# ------------------------------------------------------------------------------- errors and the command


@pytest.mark.parametrize("call,words", [
    (lambda: Chain(RATE, ["echo"]), "echo"),
    (lambda: Chain(RATE, probability={"pitch": 1.5}), "1.5"),
    (lambda: Chain(RATE, probability={"wobble": 0.5}), "wobble"),
    (lambda: Chain(RATE)(torch.zeros(2, 100), {}), "(B, 1, T)"),
    (lambda: Chain(RATE)(torch.zeros(2, 1, 100), Chain(RATE).draw(3, torch.Generator())), "3"),
    (lambda: Chain(RATE, ["filter"], {"pitch": 1.0}), "pitch"),
    (lambda: augment.gain(torch.zeros(2, 1, 10), torch.zeros(3)), "(3,)"),
    (lambda: augment.pitch_shift(torch.zeros(1, 1, 10).half(), full(1), RATE), "float16"),
    (lambda: augment.high_pass(torch.zeros(1, 1, 0), full(400), RATE), "(1, 1, 0)"),
    (lambda: augment.low_pass(torch.zeros(1, 1, 10), full(20000), RATE), "20000"),
    (lambda: augment.pitch_shift(torch.zeros(1, 1, 10), full(30), RATE), "30"),
    (lambda: augment.reverb(torch.zeros(1, 1, 10), full(-1), full(0), full(0), RATE), "-1"),
    (lambda: augment.delay(torch.zeros(1, 1, 10), full(-200), RATE), "-200"),
])
def test_errors_say_what_came(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


def test_the_command_writes_every_sound_and_one_picture(run, tmp_path):
    song = tmp_path / "a song.flac"
    soundfile.write(song, np.stack([music(1, 3 * RATE)[0, 0].numpy()] * 2, 1), RATE)
    done = run(["augment.py", song, "--out", tmp_path / "listen"])
    assert done.returncode == 0, done.stderr
    names = {"original", *TRANSFORMS, "chain-1", "chain-2", "chain-3"}
    assert {p.name for p in (tmp_path / "listen").iterdir()} == {f"{n}.wav" for n in names} | {"spectrograms.png"}
    for name in names:
        sound, rate = soundfile.read(tmp_path / "listen" / f"{name}.wav")
        assert rate == RATE and sound.shape == (3 * RATE,)
    for words in ("semitones", "dB", "Hz", " ms", "%", "spectrograms.png"):
        assert words in done.stdout


def test_bad_commands_get_one_line(tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no audio")
    for args, code, words in ((["missing.wav"], 2, "missing.wav"), ([tmp_path / "text.wav"], 1, "text.wav"),
                              ([], 2, "FILE"), ([tmp_path / "text.wav", "--seconds", "-1"], 2, "-1"),
                              ([tmp_path / "text.wav", "--sec", "3"], 2, "--sec")):
        try:
            came = augment.main([*map(str, args), "--out", str(tmp_path / "out")])
        except SystemExit as exit:
            came = exit.code
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage:")]
        assert came == code and len(lines) == 1 and words in lines[0], lines
