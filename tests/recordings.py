"""What the tests of prepare.py make: tones, tables, folders of songs, files of every format."""

import csv
import hashlib
import io
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

import prepare


def tone(seconds=1.0, rate=22050, hz=440.0, level=0.5):
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def noise(seconds, rate=44100, level=0.3):
    return np.random.default_rng(0).uniform(-level, level, round(seconds * rate))


def table(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def songs(folder, n, seconds=0.5):
    """n different recordings a.wav, b.wav, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        samples = tone(seconds + 0.1 * i, hz=200 + 50 * i)
        soundfile.write(folder / f"{chr(97 + i)}.wav", samples, 22050)
    return folder


@pytest.fixture
def cli(capsys, monkeypatch):
    """main() without the seconds that a new process takes to import torch -> CompletedProcess."""

    def cli(args, cwd=None):
        if cwd:
            monkeypatch.chdir(cwd)
        try:
            code = prepare.main([str(arg) for arg in args[1:]])
        except SystemExit as error:
            code = error.code
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())

    return cli


def contents(folder):
    paths = sorted(Path(folder).iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def quietly(listing, out, **options):
    return prepare.write(listing, out, prepare.Options(progress=False, **{"workers": 2, **options}))


# ---------------------------------------------------------------------------- files of every format


def encoded(name, samples, rate=44100):
    """The bytes of a file of the format that the name says; `piped.flac` as a pipe leaves it."""
    suffix = Path(name).suffix[1:]
    if suffix in FOREIGN:
        return foreign(suffix, samples, rate)
    known = {"opus": ("OGG", "OPUS"), "oga": ("OGG", None), "aif": ("AIFF", None)}
    file_format, subtype = known.get(suffix, (suffix.upper(), None))
    rate = 48000 if suffix == "opus" else rate
    file = io.BytesIO()
    options = {"compression_level": 0.3, "bitrate_mode": "VARIABLE"} if suffix == "mp3" else {}
    soundfile.write(file, samples, rate, format=file_format, subtype=subtype, **options)
    data = bytearray(file.getvalue())
    if name == "piped.flac":
        data[21:26] = bytes([data[21] & 0xF0]) + bytes(4)  # 36 bits: the number of samples
        data[26:42] = bytes(16)
    if name == "piped.wav":
        data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    return bytes(data)


FOREIGN = {
    "m4a": ("mp4", "aac"),
    "mp4": ("mp4", "aac"),
    "aac": ("adts", "aac"),
    "wma": ("asf", "wmav2"),
    "webm": ("webm", "libopus"),
    "mka": ("matroska", "libopus"),
    "wv": ("wv", "wavpack"),
    "tta": ("tta", "tta"),
    "mp2": ("mp2", "mp2"),
    "ac3": ("ac3", "ac3"),
}


def foreign(suffix, samples, rate):
    """A file of a format that libsndfile does not write."""
    kind, codec = FOREIGN[suffix]
    rate = 48000 if codec == "libopus" else rate
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as box:
        stream = box.add_stream(codec, rate=rate)
        stream.bit_rate = 96_000
        stream.layout = "mono"
        integers = (samples * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(integers, format="s16", layout="mono")
        frame.sample_rate = rate
        formats = stream.codec_context.codec.audio_formats
        resampler = av.AudioResampler(
            formats[0].name, "mono", rate, stream.codec_context.frame_size or 1024
        )
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            box.mux(stream.encode(part))
        box.mux(stream.encode(None))
    return file.getvalue()


def without_count(mp3):
    """An mp3 without the frame that counts the others."""
    at = max(mp3.find(b"Xing"), mp3.find(b"Info"))
    return mp3[mp3.find(mp3[:2], at + 20) :]


def bad_files(folder):
    """One file of every kind that cannot be used -> {name: word of the reason}."""
    folder.mkdir(exist_ok=True)
    (folder / "empty.mp3").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio\n" * 100)
    (folder / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(20000))
    for name in ("half.mp3", "half.wav", "half.flac", "half.ogg", "half.aiff"):
        data = encoded(name, noise(5, 22050), 22050)
        (folder / name).write_bytes(data[: len(data) // 2])
    spoiled = np.where(np.arange(22050) == 99, np.nan, tone())
    soundfile.write(folder / "nan.wav", spoiled, 22050, subtype="FLOAT")
    soundfile.write(folder / "none.wav", np.zeros(0), 22050)
    return {
        "empty.mp3": "0 bytes",
        "text.wav": "cannot be decoded",
        "noise.mp3": "ot recognised",
        "half.mp3": "cut off",
        "half.wav": "cut off",
        "half.aiff": "cut off",
        "half.ogg": "cut off",
        "half.flac": "cannot be decoded",
        "nan.wav": "1 of 22050 samples",
        "none.wav": "no samples",
    }
