"""Decoding: every format, every rate; what is whole is read whole, what is not is refused."""

import os
import shutil
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import prepare
from conftest import ROOT
import recordings
from recordings import bad_files, encoded, noise, tone, without_count
from splits import containers, formats

RATE = 44100
SECONDS = 6
STATED = (
    "a.wav",
    "a.w64",
    "a.rf64",
    "a.aiff",
    "a.au",
    "a.caf",
    "a.flac",
    "a.ogg",
    "a.opus",
    "a.mp3",
    "a.m4a",
    "a.webm",
    "a.wma",
    "a.tta",
    "a.wv",
)  # whose length the file tells
SILENT = ("piped.wav", "a.aac", "a.mp2", "a.ac3")  # whose length nothing tells
CHECKED = (
    "a.flac",
    "piped.flac",
    "a.ogg",
    "a.opus",
    "a.mp3",
    "a.mp2",
    "a.m4a",
    "a.aac",
    "a.tta",
    "a.wv",
    "a.ac3",
)  # in which overwritten bytes are seen
IN_A_ROW = (
    "a.wav",
    "a.w64",
    "a.rf64",
    "a.aiff",
    "a.au",
    "a.caf",
    "a.flac",
    "piped.flac",
    "a.ogg",
    "a.opus",
    "a.mp3",
    "a.mp2",
    "a.m4a",
    "a.aac",
    "a.ac3",
    "a.wma",
)


@pytest.fixture(scope="module")
def whole():
    """{name: bytes} of six seconds in every format."""
    samples = noise(SECONDS)
    names = {*STATED, *SILENT, *CHECKED, *IN_A_ROW}
    return {name: encoded(name, samples) for name in sorted(names)}


@pytest.fixture
def seconds(tmp_path):
    """seconds(name, bytes): how long a file of these bytes plays."""

    def seconds(name, data):
        (tmp_path / name).write_bytes(data)
        return sum(map(len, prepare.stream(tmp_path / name))) / prepare.SAMPLE_RATE

    return seconds


# --------------------------------------------------------------------------------- rates and levels


@pytest.mark.parametrize(
    "name, rate, channels, subtype",
    [
        ("a.wav", 22050, 1, "PCM_16"),
        ("a.wav", 44100, 2, "PCM_24"),
        ("a.wav", 96000, 2, "FLOAT"),
        ("a.wav", 8000, 1, "PCM_U8"),
        ("a.flac", 48000, 2, "PCM_24"),
        ("a.aiff", 16000, 1, "PCM_16"),
        ("a.wav", 32000, 1, "DOUBLE"),
        ("a.au", 11025, 6, "PCM_16"),
    ],
)
def test_decode_any_rate_depth_and_number_of_channels(tmp_path, name, rate, channels, subtype):
    soundfile.write(tmp_path / name, np.stack([tone(2, rate)] * channels, 1), rate, subtype=subtype)
    x = prepare.decode(tmp_path / name)
    assert x.dtype == torch.float32
    assert abs(len(x) - 44100) <= 1
    error = x[4000:40000].numpy() - tone(2)[4000:40000]
    assert np.abs(error).max() < (0.01 if subtype == "PCM_U8" else 2e-3)


@pytest.mark.parametrize(
    "name", ["a.ogg", "a.mp3", "a.opus", "a.m4a", "a.wma", "a.webm", "a.ac3", "a.mp2"]
)
def test_decode_lossy(tmp_path, name):
    rate = 48000 if name in ("a.opus", "a.webm") else 44100
    (tmp_path / name).write_bytes(encoded(name, tone(2, rate), rate))
    x = prepare.decode(tmp_path / name)[4000:40000].numpy()
    spectrum = np.abs(np.fft.rfft(x * np.hanning(36000)))
    assert abs(spectrum.argmax() * 22050 / 36000 - 440) < 1
    assert np.abs(x).max() == pytest.approx(0.5, abs=0.05)


def test_channels_are_averaged(tmp_path):
    soundfile.write(
        tmp_path / "a.wav", np.stack([tone(), np.zeros(22050)], 1), 22050, subtype="FLOAT"
    )
    half = torch.from_numpy(tone() / 2).float()
    assert torch.allclose(prepare.decode(tmp_path / "a.wav"), half, atol=1e-6)


def test_overshoot_is_turned_down(tmp_path):
    soundfile.write(tmp_path / "b.wav", tone(level=1.9), 22050, subtype="FLOAT")
    x = prepare.decode(tmp_path / "b.wav")
    scaled = tone(level=1.9) / np.abs(tone(level=1.9)).max()
    assert x.abs().max() == 1
    assert torch.allclose(x, torch.from_numpy(scaled).float(), atol=1e-6)


@pytest.mark.parametrize("spike", [5.0, 2e38, -1e6])
def test_a_lone_spike_does_not_set_the_level(tmp_path, spike):
    samples = tone(4, level=0.3)
    samples[50000] = spike
    soundfile.write(tmp_path / "a.wav", samples, 22050, subtype="FLOAT")
    survey = formats.Survey()
    x = torch.cat(list(prepare.stream(tmp_path / "a.wav", survey=survey)))
    assert x.abs().max() == pytest.approx(0.3, abs=0.01)
    assert survey.notes[0].startswith("spike: ")
    assert "near 2" in survey.notes[0]


def test_a_stereo_file_whose_sum_is_silent_is_named(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(), -tone()], 1), 22050)
    survey = formats.Survey()
    list(prepare.stream(tmp_path / "a.wav", survey=survey))
    assert survey.facts()["notes"] == ["out of phase: its channels cancel out"]


def test_an_odd_rate_keeps_its_pitch():
    x = prepare.resample(torch.from_numpy(tone(4, 44099)).float(), 44099, 22050)
    spectrum = np.abs(np.fft.rfft(x.numpy() * np.hanning(len(x)), 2**20))
    assert abs(len(x) - 88200) < 20
    assert abs(1200 * np.log2(spectrum.argmax() * 22050 / 2**20 / 440)) < 0.5  # cents


@pytest.mark.parametrize("rate", [44100, 48000, 16000, 96000, 44099, 12345])
def test_resampling_keeps_what_fits(rate):
    high = torch.from_numpy(tone(1, rate, min(rate, 22050) * 0.42)).float()
    x = prepare.resample(high, rate, 22050)
    assert len(x) == 22050
    assert x[3000:19000].square().mean().sqrt() == pytest.approx(0.5 / 2**0.5, rel=0.02)
    if rate in (44100, 48000, 16000):
        theirs = torchaudio.functional.resample(high, rate, 22050, lowpass_filter_width=32)
        assert torch.allclose(x, theirs, atol=1e-4)


@pytest.mark.parametrize("rate", [44100, 48000, 96000, 44099])
def test_resampling_folds_nothing_down(rate):
    """14 kHz does not fit below 11,025 Hz: it must go."""
    high = torch.from_numpy(tone(1, rate, 14000)).float()
    assert prepare.resample(high, rate, 22050)[3000:19000].abs().max() < 0.01


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_absurd_rates_are_refused(tmp_path, rate):
    data = bytearray(encoded("a.wav", tone(0.1), 22050))
    data[24:28] = struct.pack("<I", rate)
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(ValueError, match="expected 1 to 768 kHz"):
        prepare.decode(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [1000, 768_000])
def test_unusual_rates_are_read(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", np.zeros(rate), rate)
    assert len(prepare.decode(tmp_path / "a.wav")) == pytest.approx(22050, abs=1)


# -------------------------------------------------------------------------------- whole, or refused


def test_bad_files_are_refused_by_decode(tmp_path):
    for name, word in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=word):
            prepare.decode(tmp_path / name)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare.decode(tmp_path / "nothing.wav")


@pytest.mark.parametrize("name", [*STATED, *SILENT, "piped.flac"])
def test_whole_files_are_read_whole(whole, seconds, name):
    played = SECONDS * 44100 / 48000 if name in ("a.opus", "a.webm") else SECONDS
    assert seconds(name, whole[name]) == pytest.approx(played, abs=0.1)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("name", STATED)
def test_what_is_cut_off_is_refused(whole, seconds, name, share):
    data = whole[name]
    with pytest.raises(ValueError, match="cut off|damaged|cannot be decoded"):
        seconds(name, data[: int(share * len(data))])


@pytest.mark.parametrize("tail", ["zeros", "id3v1", "ape"])
@pytest.mark.parametrize("name", sorted({*STATED, *CHECKED}))
def test_zeros_and_tags_behind_the_audio_are_no_damage(whole, seconds, name, tail):
    footer = struct.pack("<8sIIII8s", b"APETAGEX", 2000, 232, 1, 1 << 31, bytes(8))
    tails = {
        "zeros": bytes(4096),
        "id3v1": b"TAG" + bytes(range(125)),
        "ape": footer.replace(b"\x00\x00\x00\x80", b"\x00\x00\x00\xa0") + b"x" * 200 + footer,
    }
    assert seconds(name, whole[name] + tails[tail]) == pytest.approx(
        seconds(name, whole[name]), abs=0.01
    )


@pytest.mark.parametrize("name", IN_A_ROW)
def test_two_files_in_a_row_are_both_read(whole, seconds, name):
    once = seconds(name, whole[name])
    assert seconds(name, 2 * whole[name]) == pytest.approx(2 * once, abs=0.1)


def test_streams_in_a_row_may_differ_in_rate_and_channels(tmp_path):
    stereo = np.stack([tone(2, 48000)] * 2, 1)
    data = encoded("a.ogg", tone(2, 22050), 22050) + encoded("a.ogg", stereo, 48000)
    (tmp_path / "a.ogg").write_bytes(data)
    x = prepare.decode(tmp_path / "a.ogg")[46000:86000].numpy()
    spectrum = np.abs(np.fft.rfft(x * np.hanning(40000)))
    assert abs(spectrum.argmax() * 22050 / 40000 - 440) < 1


@pytest.mark.parametrize("name", CHECKED)
def test_overwritten_bytes_in_the_middle_are_refused(whole, seconds, name):
    data = bytearray(whole[name])
    data[len(data) // 2 : len(data) // 2 + 3000] = np.random.default_rng(1).bytes(3000)
    with pytest.raises(ValueError, match="damaged"):
        seconds(name, bytes(data))


@pytest.mark.parametrize("name", ["a.ogg", "a.opus", "a.flac", "piped.flac", "a.tta", "a.wv"])
def test_one_bit_of_what_has_checksums_is_seen(whole, seconds, name):
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 4
    with pytest.raises(ValueError, match="damaged"):
        seconds(name, bytes(data))


def test_an_ogg_without_its_last_page_is_refused(whole, seconds):
    data = whole["a.ogg"]
    with pytest.raises(ValueError, match=r"cut off after \d"):
        seconds("a.ogg", data[: data.rfind(b"OggS")])


def test_an_ogg_without_a_page_in_the_middle_is_refused(whole, seconds):
    data = whole["a.ogg"]
    first = data.find(b"OggS", len(data) // 2)
    second = data.find(b"OggS", first + 4)
    with pytest.raises(ValueError, match="damaged after .* a page is missing"):
        seconds("a.ogg", data[:first] + data[second:])


def test_an_ogg_whose_time_stamps_have_gaps_is_whole(whole, seconds):
    """As some encoders leave them: the end is said to be 200 samples later than it comes."""
    data = whole["a.ogg"]
    at = data.rfind(b"OggS")
    page = bytearray(data[at:])
    (granule,) = struct.unpack("<q", page[6:14])
    page[6:14] = struct.pack("<q", granule + 200)
    page[22:26] = struct.pack("<I", containers._ogg_checksum(bytes(page)))
    assert seconds("a.ogg", data[:at] + page) == pytest.approx(seconds("a.ogg", data), abs=0.02)


def test_mp3s_of_several_rates_in_a_row_are_all_read(seconds):
    parts = [encoded("a.mp3", tone(2, rate), rate) for rate in (44100, 22050, 48000)]
    assert seconds("a.mp3", b"".join(parts)) == pytest.approx(6, abs=0.1)
    bare = [without_count(part) for part in parts]
    assert seconds("a.mp3", b"".join(bare)) == pytest.approx(6, abs=0.3)


def test_an_oggs_checksum_is_that_of_a_plain_implementation(whole):
    page = whole["a.ogg"][: whole["a.ogg"].find(b"OggS", 4)]
    crc = 0
    for byte in page[:22] + bytes(4) + page[26:]:
        crc ^= byte << 24
        for _ in range(8):
            crc = crc << 1 ^ (0x104C11DB7 if crc >> 31 else 0)
    assert containers._ogg_checksum(page) == crc == struct.unpack("<I", page[22:26])[0]


def test_a_count_of_zero_frames_is_no_count(seconds):
    data = bytearray(encoded("a.mp3", noise(SECONDS)))
    at = max(data.find(b"Xing"), data.find(b"Info"))
    data[at + 8 : at + 12] = bytes(4)
    assert seconds("a.mp3", bytes(data)) == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("first", ["loud", "quiet"])
def test_an_mp3_that_does_not_count_its_frames_is_read_whole(seconds, first):
    """libsndfile guesses its length from its first frames, wrong where the bit rate varies."""
    loud = np.r_[np.ones(220500), np.zeros(220500)] * noise(10, level=0.5)
    data = encoded("a.mp3", loud if first == "loud" else loud[::-1])
    assert seconds("a.mp3", data) == pytest.approx(10, abs=0.15)
    assert seconds("a.mp3", without_count(data)) == pytest.approx(10, abs=0.15)


def test_an_mp3_that_ends_within_a_frame_is_named(tmp_path):
    data = without_count(encoded("a.mp3", noise(SECONDS)))
    (tmp_path / "a.mp3").write_bytes(data[:-50])
    survey = formats.Survey()
    list(prepare.stream(tmp_path / "a.mp3", survey=survey))
    assert survey.notes == ["ends within a frame"]


@pytest.mark.parametrize("name", ["piped.wav", "piped.flac"])
def test_what_a_pipe_leaves_is_read_whole(whole, tmp_path, name):
    (tmp_path / name).write_bytes(whole[name])
    assert len(prepare.decode(tmp_path / name)) == SECONDS * 22050


def test_a_flac_behind_tags_is_read(whole, seconds):
    tag = b"ID3\x04\0\0" + bytes([0, 0, 16, 0]) + b"x" * 2048
    assert seconds("a.flac", tag + whole["a.flac"]) == SECONDS


def test_a_pipe_a_socket_and_a_folder_are_called_what_they_are(tmp_path):
    os.mkfifo(tmp_path / "a.wav")
    (tmp_path / "b.wav").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "c.wav"))
        for name, kind in (("a.wav", "a FIFO"), ("b.wav", "a folder"), ("c.wav", "a socket")):
            with pytest.raises(ValueError, match=f"{kind}, not a file"):
                prepare.decode(tmp_path / name)


def test_a_playlist_opens_nothing(tmp_path):
    soundfile.write(tmp_path / "secret.wav", tone(), 22050)
    (tmp_path / "a.m4a").write_text("#EXTM3U\n#EXTINF:1,\nsecret.wav\n")
    (tmp_path / "b.m4a").write_text("ffconcat version 1.0\nfile secret.wav\n")
    for name in ("a.m4a", "b.m4a"):
        with pytest.raises(ValueError, match="cannot be decoded"):
            prepare.decode(tmp_path / name)


# ----------------------------------------------------------------------- other decoders, and memory


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is what this compares with")
@pytest.mark.parametrize("name", ["a.m4a", "a.aac", "a.wma", "a.webm", "a.wv", "a.tta", "a.ac3"])
def test_other_formats_are_decoded_as_ffmpeg_decodes_them(whole, tmp_path, name):
    (tmp_path / name).write_bytes(whole[name])
    command = ["ffmpeg", "-v", "error", "-i", tmp_path / name, "-f", "f32le", "-"]
    theirs = np.frombuffer(
        subprocess.run(command, capture_output=True, check=True).stdout, np.float32
    )
    ours = np.concatenate(
        [block for *_, block in formats.blocks(tmp_path / name, formats.Survey())]
    )
    assert len(ours) == len(theirs)
    assert np.abs(ours - theirs).max() < 2e-4


def test_without_pyav_its_formats_say_what_to_install(whole, seconds, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install av"):
        seconds("a.m4a", whole["a.m4a"])


def test_a_stream_is_what_decode_returns(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", noise(30, level=1.4), RATE, subtype="FLOAT")
    once = prepare.decode(tmp_path / "a.wav")
    monkeypatch.setattr(prepare, "HELD", 100_000)  # now it is read twice
    assert torch.equal(torch.cat(list(prepare.stream(tmp_path / "a.wav"))), once)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_hours_of_audio_take_little_memory(tmp_path, python):
    """An hour in FLAC: 635 MB as floats."""
    with soundfile.SoundFile(tmp_path / "a.flac", "w", 44100, 1) as file:
        for _ in range(60):
            file.write(np.zeros(60 * 44100, np.int16))
    script = (
        "import prepare, resource\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"n = sum(map(len, prepare.stream({str(tmp_path / 'a.flac')!r})))\n"
        "print(n, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run(
        [python, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    length, mebibytes = map(int, done.stdout.split())
    assert length == 3600 * 22050
    assert mebibytes < 150


def test_opus_by_ffmpeg_is_read_beyond_its_first_ten_seconds(tmp_path, monkeypatch):
    monkeypatch.setitem(recordings.FOREIGN, "opus", ("ogg", "libopus"))
    file = tmp_path / "a.opus"
    file.write_bytes(recordings.foreign("opus", noise(25, 48000), 48000))
    assert abs(len(prepare.decode(file, 22050)) - 25 * 22050) < 22050 * 0.05
