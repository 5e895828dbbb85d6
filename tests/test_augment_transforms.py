"""The transforms of augment.py against independent oracles: sox for the reverb, scipy and
torchaudio for the filters. (The pitch shift: test_augment_pitch.py.)

sox must be installed (Debian: apt-get install sox); without it the reverb's tests fail and say so.
"""

import math
import shutil
import subprocess

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
import torchaudio
from sounds import RATE, SAMPLES, decibels, full, music, white

import augment
from kernels import filters

# --------------------------------------------------------------------------- the simple ones


def test_polarity_is_exact():
    x = music(4)
    y = augment.polarity(x, torch.tensor([True, False, True, False]))
    assert torch.equal(y, x * torch.tensor([-1, 1, -1, 1.0])[:, None, None])


def test_gain_is_exact():
    x = music(4)
    db = torch.tensor([-6.0, -0.5, 0.0, 3.0])
    want = x * 10 ** (db.double() / 20).float()[:, None, None]
    torch.testing.assert_close(augment.gain(x, db), want, rtol=1e-6, atol=0)


def test_delay_is_exact():
    x = music(4)
    y = augment.delay(x, torch.tensor([200.0, 250.0, 500.0, 0.0]), RATE)
    for row, shift in enumerate((4410, 5512, 11025, 0)):        # 5512.5 is rounded to even
        want = x[row, 0].clone()
        want[shift:] += 0.5 * x[row, 0, : SAMPLES - shift]
        assert torch.equal(y[row, 0], want), row


def test_delay_longer_than_the_audio_adds_nothing():
    x = music(1, 1000)
    assert torch.equal(augment.delay(x, full(500), RATE), x)


def noise_added(x, snr):
    y = augment.noise(x, full(snr, len(x)), torch.Generator().manual_seed(1))
    return y[:, 0].double() - x[:, 0].double()


@pytest.mark.parametrize("snr", [0.0, 40.0, 80.0])
def test_noise_has_its_level(snr):
    x = music(6)
    added = noise_added(x, snr)
    for row in range(6):
        assert abs(decibels(x[row]) - decibels(added[row]) - snr) < 0.2


@pytest.mark.parametrize("snr", [0.0, 40.0, 80.0])
def test_noise_is_gaussian(snr):
    added = noise_added(music(6), snr)
    z = added / added.square().mean(1, keepdim=True).sqrt()
    assert z.mean(1).abs().max() < 0.02                         # 4 standard errors, and below
    assert (z.pow(4).mean(1) - 3).abs().max() < 0.15


@pytest.mark.parametrize("snr", [0.0, 40.0, 80.0])
def test_noise_is_white_and_another_in_every_row(snr):
    z = noise_added(music(6), snr)
    z = torch.cat([z, z.roll(1, 1), z.roll(29525, 1)])          # lag 1; the halves of Box-Muller
    assert (torch.corrcoef(z) - torch.eye(18)).abs().max() < 0.02


def test_noise_lets_gradients_pass():
    x = music(2).requires_grad_()
    augment.noise(x, torch.tensor([80.0, 20.0]), seed=torch.tensor([1, 2])).sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x), atol=0.1)


def test_noise_follows_the_generator_and_nothing_else():
    x = music(3)
    torch.manual_seed(1)
    first = augment.noise(x, full(20, 3), torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(first, augment.noise(x, full(20, 3), torch.Generator().manual_seed(5)))
    assert not torch.equal(first, augment.noise(x, full(20, 3), torch.Generator().manual_seed(6)))


# ---------------------------------------------------------------------------------- filters

FILTERS = {"low": augment.low_pass, "high": augment.high_pass}


@pytest.mark.parametrize("rate", [22050, 44100])
@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("cutoff", [20.0, 200.0, 517.3, 1200.0, 2200.0, 4000.0, 10000.0])
def test_filters_agree_with_scipy(kind, rate, cutoff):
    x = white(1, 20000)
    ours = FILTERS[kind](x, full(cutoff), rate)[0, 0].numpy()
    coefficients = scipy.signal.butter(2, cutoff, kind, fs=rate)
    theirs = scipy.signal.lfilter(*coefficients, x[0, 0].double().numpy())
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("cutoff", [300.0, 1200.0, 3000.0])
def test_filters_agree_with_torchaudio_below_full_scale(kind, cutoff):
    x = 0.05 * white(1, 20000)
    ours = FILTERS[kind](x, full(cutoff), RATE)[0, 0].double()
    biquad = getattr(torchaudio.functional, f"{kind}pass_biquad")
    theirs = biquad(x[0, 0].double(), RATE, cutoff, Q=math.sqrt(0.5))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("kind, cutoff", [
    ("low", 2200), ("low", 4000), ("high", 200), ("high", 1200)])
def test_filters_are_3_db_down_at_the_cutoff(kind, cutoff):
    impulse = torch.zeros(1, 1, 2 * RATE)                       # bins are half a hertz apart
    impulse[..., 0] = 1
    response = torch.fft.rfft(FILTERS[kind](impulse, full(cutoff), RATE)[0, 0].double()).abs()
    found = (response - math.sqrt(0.5)).abs().argmin().item() / 2
    assert abs(found / cutoff - 1) < 0.01


# ----------------------------------------------------------------------------------- reverb


def sox(x, rate, *effect, folder):
    """x (T,) -> what sox makes of it, (T',) float64."""
    if not shutil.which("sox"):
        pytest.fail("sox, which this test compares with, is not installed: apt-get install sox")
    source = folder / "in.wav"
    target = folder / "out.wav"
    soundfile.write(source, x.numpy(), rate, subtype="FLOAT")
    coding = ["-e", "floating-point", "-b", "32"]
    command = ["sox", "-D", source, *coding, target, *map(str, effect)]
    subprocess.run(command, check=True, capture_output=True)
    return torch.from_numpy(soundfile.read(target)[0])


@pytest.mark.parametrize("rate", [22050, 44100])
def test_reverb_is_that_of_sox(rate, tmp_path):
    generator = torch.Generator().manual_seed(rate)
    rooms = (100 * torch.rand(20, 3, generator=generator)).round(decimals=2)
    corners = [[0, 0, 0], [100, 0, 100], [100, 100, 0], [0, 100, 100], [50, 50, 100.0]]
    rooms = torch.cat([rooms, torch.tensor(corners)])
    x = 0.02 * torch.randn(len(rooms), 1, SAMPLES, generator=generator)
    ours = augment.reverb(x, *rooms.T, rate)
    for row, room in enumerate(rooms.tolist()):
        words = [f"{value:.2f}" for value in room]
        theirs = sox(x[row, 0], rate, "reverb", *words, 0, 0, 0, folder=tmp_path)[:SAMPLES]
        error = (ours[row, 0] - theirs).norm() / (theirs - x[row, 0]).norm()
        assert error < 1e-3, f"{room}: relative error {error:.1e} of the wet signal"


def test_reverb_of_short_audio(tmp_path):
    x = 0.1 * white(1, 5000)
    theirs = sox(x[0, 0], RATE, "reverb", 90, 20, 30, 0, 0, 0, folder=tmp_path)[:5000]
    ours = augment.reverb(x, full(90), full(20), full(30), RATE)[0, 0]
    assert (ours - theirs).norm() < 1e-3 * (theirs - x[0, 0]).norm()


# ------------------------------------------------------------------------------ faster ways


@pytest.mark.parametrize("samples", [1, 700, 59049])
@pytest.mark.parametrize("cutoff", [30.0, 200.0, 1200.0, 4000.0, 11000.0])
@pytest.mark.parametrize("kind", FILTERS)
def test_a_filter_by_blocks_is_the_plain_one(monkeypatch, kind, cutoff, samples):
    x = white(3, samples)
    fast = FILTERS[kind](x, full(cutoff, 3), RATE)
    monkeypatch.setattr(augment, "_kernels", lambda: None)
    plain = FILTERS[kind](x, full(cutoff, 3), RATE)
    assert (fast - plain).norm() < 1e-5 * plain.norm() + 1e-7 * x.norm()


@pytest.mark.parametrize("samples", [1, 5000, 59049])
def test_reverb_by_tables_is_the_plain_one(samples):
    x = 0.1 * white(3, samples)[:, 0]
    rooms = augment.Rooms(*torch.tensor([[90.0, 0, 50], [20, 100, 0], [30, 100, 0]]), RATE)
    plain = augment._freeverb(x, rooms)
    assert (filters.freeverb(x, rooms) - plain).norm() < 5e-5 * plain.norm()


def test_a_product_of_several_spectra_is_one_after_the_other():
    x = white(5, 3000)[:, 0]
    response = torch.rand(5, 2049, generator=torch.Generator().manual_seed(0))
    plain = augment._by_fft(x, response, 4096)
    assert (filters.by_fft(x, response, 4096) - plain).norm() < 1e-6 * plain.norm()
