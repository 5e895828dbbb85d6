"""prepare.py and splits/published.py as a user runs them: every reader, every kind of bad input, interruptions, downloads."""

import contextlib
import csv
import doctest
import fcntl
import hashlib
import http.server
import io
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import tarfile
import textwrap
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import prepare
from conftest import ROOT
from splits import published


def tone(seconds=1.0, rate=22050, hz=440.0, level=0.5):
    return level * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)


def table(path, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def songs(folder, n, seconds=0.5):
    """n different recordings a.wav, b.wav, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        soundfile.write(folder / f"{chr(97 + i)}.wav", tone(seconds + 0.1 * i, hz=200 + 50 * i), 22050)
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
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(folder).iterdir())}


def quietly(listing, out, **options):
    return prepare.write(listing, out, progress=False, **{"workers": 2, **options})


# ---------------------------------------------------------------------------------------------------------- decoding

@pytest.mark.parametrize("name, rate, channels, subtype", [
    ("a.wav", 22050, 1, "PCM_16"), ("a.wav", 44100, 2, "PCM_24"), ("a.wav", 96000, 2, "FLOAT"), ("a.wav", 8000, 1, "PCM_U8"),
    ("a.flac", 48000, 2, "PCM_24"), ("a.aiff", 16000, 1, "PCM_16"), ("a.wav", 32000, 1, "DOUBLE"), ("a.au", 11025, 6, "PCM_16")])
def test_decode_any_rate_depth_and_number_of_channels(tmp_path, name, rate, channels, subtype):
    soundfile.write(tmp_path / name, np.stack([tone(2, rate)] * channels, 1), rate, subtype=subtype)
    x = prepare.decode(tmp_path / name)
    assert x.dtype == torch.float32 and abs(len(x) - 44100) <= 1
    error = x[4000:40000].numpy() - tone(2)[4000:40000]
    assert np.abs(error).max() < (0.01 if subtype == "PCM_U8" else 2e-3)


@pytest.mark.parametrize("name", ["a.ogg", "a.mp3", "a.opus"])
def test_decode_lossy(tmp_path, name):
    rate = 48000 if name == "a.opus" else 44100
    soundfile.write(tmp_path / name, tone(2, rate), rate, **({"format": "OGG", "subtype": "OPUS"} if name == "a.opus" else {}))
    x = prepare.decode(tmp_path / name)
    x = x[4000:40000].numpy()
    spectrum = np.abs(np.fft.rfft(x * np.hanning(36000)))
    assert abs(spectrum.argmax() * 22050 / 36000 - 440) < 1 and np.abs(x).max() == pytest.approx(0.5, abs=0.05)


def test_channels_are_averaged_and_overshoot_is_turned_down(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.stack([tone(), np.zeros(22050)], 1), 22050, subtype="FLOAT")
    assert torch.allclose(prepare.decode(tmp_path / "a.wav"), torch.from_numpy(tone() / 2).float(), atol=1e-6)
    soundfile.write(tmp_path / "b.wav", tone(level=1.9), 22050, subtype="FLOAT")
    x = prepare.decode(tmp_path / "b.wav")
    assert x.abs().max() == 1 and torch.allclose(x, torch.from_numpy(tone(level=1.9) / np.abs(tone(level=1.9)).max()).float(), atol=1e-6)


def test_an_odd_rate_keeps_its_pitch():
    x = prepare.resample(torch.from_numpy(tone(4, 44099)).float(), 44099, 22050)
    spectrum = np.abs(np.fft.rfft(x.numpy() * np.hanning(len(x)), 2 ** 20))
    assert abs(len(x) - 88200) < 20 and abs(1200 * np.log2(spectrum.argmax() * 22050 / 2 ** 20 / 440)) < 0.5  # cents


@pytest.mark.parametrize("rate", [44100, 48000, 16000, 96000, 44099, 12345])
def test_resampling_is_band_limited(rate):
    high = torch.from_numpy(tone(1, rate, min(rate, 22050) * 0.42)).float()
    x = prepare.resample(high, rate, 22050)
    assert len(x) == 22050 and x[3000:19000].square().mean().sqrt() == pytest.approx(0.5 / 2 ** 0.5, rel=0.02)
    if rate in (44100, 48000, 16000):
        assert torch.allclose(x, torchaudio.functional.resample(high, rate, 22050, lowpass_filter_width=32), atol=1e-4)
    if rate > 30000:  # 14 kHz does not fit below 11,025 Hz: it must go, not fold down
        assert prepare.resample(torch.from_numpy(tone(1, rate, 14000)).float(), rate, 22050)[3000:19000].abs().max() < 0.01


def bad_files(folder):
    """One file of every kind that cannot be used -> {name: word of the reason}."""
    folder.mkdir(exist_ok=True)
    (folder / "empty.mp3").write_bytes(b"")
    (folder / "text.wav").write_text("this is no audio\n" * 100)
    (folder / "noise.mp3").write_bytes(np.random.default_rng(0).bytes(20000))
    for name in ("half.mp3", "half.wav", "half.flac", "half.ogg", "half.aiff"):
        whole = folder / f"whole{Path(name).suffix}"
        soundfile.write(whole, np.random.default_rng(0).uniform(-0.3, 0.3, 100000), 22050)
        data = whole.read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])
        whole.unlink()
    soundfile.write(folder / "nan.wav", np.where(np.arange(22050) == 99, np.nan, tone()), 22050, subtype="FLOAT")
    soundfile.write(folder / "none.wav", np.zeros(0), 22050)
    return {"empty.mp3": "0 bytes", "text.wav": "cannot be decoded", "noise.mp3": "ot recognised", "half.mp3": "cut off",
            "half.wav": "cut off", "half.aiff": "cut off", "half.ogg": "cut off", "half.flac": "cannot be decoded", "nan.wav": "1 of 22050 samples",
            "none.wav": "no samples"}


def test_bad_files_are_refused_by_decode(tmp_path):
    for name, word in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=word):
            prepare.decode(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        prepare.decode(tmp_path / "nothing.wav")


def test_a_piped_wav_that_promises_4_gb_is_whole(tmp_path):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(), 22050, format="WAV")
    data = bytearray(buffer.getvalue())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert len(prepare.decode(tmp_path / "a.wav")) == 22050


# ------------------------------------------------------------------------------------------------ the prepared folder

def test_bad_files_are_counted_skips_and_too_many_an_error(run, tmp_path):
    reasons = bad_files(tmp_path / "in")
    songs(tmp_path / "in", 6)
    soundfile.write(tmp_path / "in" / "kurz.wav", tone(0.2), 22050)  # shorter than any window: kept, evaluation pads it
    (tmp_path / "in" / "deep er").mkdir()
    soundfile.write(tmp_path / "in" / "deep er" / "Дорога – 道.flac", np.stack([tone(1, 44100)] * 2, 1), 44100)
    (tmp_path / "in" / "notes.txt").write_text("ignored")
    command = ["prepare.py", "--data", "folder", "--root", tmp_path / "in", "--out", tmp_path / "out", "--workers", 2]
    done = run(command)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert f"{len(reasons)} of 18 files cannot be used" in done.stderr.splitlines()[-1] and "--max-skipped 0.5" in done.stderr
    journal = (tmp_path / "out.partial" / "journal.jsonl").stat()
    done = run([*command, "--max-skipped", 0.6])
    assert done.returncode == 0, done.stderr
    assert "0 bytes" in done.stdout and "next: python pretrain.py" in done.stdout and journal.st_size > 0
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    skipped = {s["file"]: s["reason"] for s in meta["skipped"]}
    assert skipped.keys() == reasons.keys() and all(reasons[name] in skipped[name] for name in reasons)
    clips = prepare.Clips(tmp_path / "out")
    assert len(clips) == 8 and "deep er/Дорога – 道.flac" in clips.id and clips.task == "none" and clips.labels.shape == (8, 0)
    assert clips.length[clips.id.tolist().index("kurz.wav")] == 4410 and "kurz.wav" in meta["report"]["shorter than 3 s"]
    assert meta["clips"] == {"train": 8, "valid": 0, "test": 0} and meta["report"]["rates"] == {"22050": 7, "44100": 1}


@pytest.mark.parametrize("arguments, code, words", [
    ([], 2, ["expected --data", "--check NAME"]),
    (["--data", "folder"], 2, ["--root DIR"]),
    (["--data", "folder", "--root", "nosuch"], 2, ["nosuch: no such file"]),
    (["--data", "folder", "--root", ".", "--labels", "nosuch.csv"], 2, ["nosuch.csv: no such file"]),
    (["--data", "folder", "--root", "."], 1, ["expected audio files", "found none"]),
    (["--data", "nosuch"], 2, ["invalid choice", "folder"]),
    (["--data", "gtzan", "--root", ".", "--labels", "."], 2, ["--labels goes with --data folder"]),
    (["--data", "folder", "--root", ".", "--workers", "0"], 2, ["--workers", "above 0"]),
    (["--data", "folder", "--root", ".", "--shard", "5/4"], 2, ["--shard", "2/4"]),
    (["--data", "folder", "--root", ".", "--shard", "1/4", "--merge", "4"], 2, ["--shard", "--merge"]),
    (["--data", "folder", "--root", ".", "--timeout", "inf"], 2, ["--timeout", "inf"]),
    (["--data", "folder", "--root", ".", "--segment", "1e-9"], 2, ["--segment", "sample"]),
    (["--data", "folder", "--root", ".", "--max-skipped", "nan"], 2, ["--max-skipped", "nan"]),
    (["--data", "mtat", "--root", ".", "--download", "--dry-run"], 2, ["--dry-run", "--download"]),
    (["--data", "mtat", "--root", "."], 1, ["annotations_final.csv", "not there"]),
    (["--data", "folder", "--root", ".", "--download"], 1, ["not public", "mtat"]),
    (["--check", "nosuch"], 2, ["not prepared", "python prepare.py --data folder"]),
    (["--check", "mtat"], 2, ["type: python prepare.py --data mtat --root DIR"])])
def test_wrong_commands_are_told_in_one_line(tmp_path, arguments, code, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        result = prepare.main(arguments)
    except SystemExit as error:
        result = error.code
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage:")]
    assert result == code and len(lines) == 1 and lines[0].startswith("prepare.py: error: "), lines
    assert all(word in lines[0] for word in words)


def test_what_stands_in_the_folder_is_what_was_decoded(tiny_data, tiny_audio):
    clips = prepare.Clips(tiny_data)
    audio = np.load(tiny_data / "audio.npy", mmap_mode="r")
    assert audio.dtype == np.int16 and len(audio) == clips.length.sum() and (np.diff(clips.start) == clips.length[:-1]).all()
    for i in (0, 7, 23):
        x = prepare.decode(tiny_audio / clips.id[i])
        assert torch.allclose(clips.waveform(i), x, atol=0.6 / 32768) and clips.waveform(i).dtype == torch.float32
        assert hashlib.sha256(audio[clips.start[i] : clips.start[i] + clips.length[i]].tobytes()).digest() == clips.sha256[i].tobytes()
    rows = {row["file"]: row for row in csv.DictReader(open(tiny_audio / "tags.csv"))}
    for i, name in enumerate(clips.id):
        assert "; ".join(tag for k, tag in enumerate(clips.tags) if clips.labels[i, k]) == rows[name]["tags"]
        assert prepare.SPLITS[clips.split[i]] == rows[name]["split"]
    kinds = {key: getattr(clips, key).dtype for key in ("start", "length", "group", "split", "labels")}
    assert kinds == {"start": np.int64, "length": np.int64, "group": np.int64, "split": np.uint8, "labels": np.uint8}


def test_crops_from_a_devices_memory_are_those_from_the_disk(tiny_data):
    train = prepare.Clips(tiny_data, "train")
    index, start = np.arange(len(train)), np.arange(len(train)) * 11
    want = train.crops(index, start, 59049)
    assert train.keep_on("cpu") and train.samples.dtype == torch.int16
    assert torch.equal(train.crops(index, start, 59049), want)
    with pytest.raises(ValueError, match="not inside"):
        train.crops([0], [train.length[0] - 59048], 59049)
    assert pickle.loads(pickle.dumps(train)).samples is None


def test_views_and_crops(tiny_data):
    everything, test = prepare.Clips(tiny_data), prepare.Clips(tiny_data, "test")
    own = np.flatnonzero(everything.split == 2)
    assert len(test) == 6 and (test.id == everything.id[own]).all() and (test.labels == everything.labels[own]).all()
    index, start = [5, 0, 5], torch.tensor([10, 0, 20000])
    crops = test.crops(index, start, 30000)
    assert crops.shape == (3, 1, 30000) and crops.dtype == torch.float32
    for b in range(3):
        assert torch.equal(crops[b, 0], test.waveform(index[b])[start[b] : start[b] + 30000])
    last = int(test.length[0])
    assert test.crops([0], [last - 5], 5).shape == (1, 1, 5)
    for index, start, word in (([0], [last - 4], "not inside"), ([0], [-1], "not inside"), ([6], [0], "0 .. 5"), ([0, 1], [0], "one start")):
        with pytest.raises(ValueError, match=word):
            test.crops(index, start, 5)
    again = pickle.loads(pickle.dumps(test))
    assert len(pickle.dumps(test)) < 100_000 and torch.equal(again.waveform(3), test.waveform(3))


def test_find_and_damaged_folders(tiny_data, tmp_path, monkeypatch):
    assert prepare.find(tiny_data) == tiny_data
    (tmp_path / "data").mkdir()
    shutil.copytree(tiny_data, tmp_path / "data" / "mine")
    monkeypatch.chdir(tmp_path)
    assert prepare.find("mine") == Path("data/mine")
    with pytest.raises(ValueError, match="expected split train, valid, test"):
        prepare.Clips("data/mine", "tset")
    (tmp_path / "data/mine/clips.npz").write_bytes(b"PK rubbish")
    with pytest.raises(ValueError, match="prepare it again"):
        prepare.Clips("data/mine")
    os.unlink("data/mine/clips.npz")
    with pytest.raises(FileNotFoundError, match="clips.npz is missing"):
        prepare.Clips("data/mine")


def test_check_finds_every_change(tiny_data, tmp_path, cli):
    def copy():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(tiny_data, tmp_path / "copy"))
    done = cli(["prepare.py", "--check", copy()])
    assert done.returncode == 0 and "as it was written" in done.stdout
    audio = np.load(copy() / "audio.npy", mmap_mode="r+")
    audio[audio.size // 2] ^= 1
    audio.flush()
    done = cli(["prepare.py", "--check", tmp_path / "copy"])
    assert done.returncode == 1 and "samples have changed" in done.stdout and "1 faults" in done.stdout
    with open(copy() / "audio.npy", "r+b") as file:
        file.truncate(200_000)
    assert "audio.npy cannot be read" in prepare.check(tmp_path / "copy")[0]
    arrays = dict(np.load(copy() / "clips.npz"))
    arrays["labels"][3, 0] ^= 1
    np.savez(tmp_path / "copy" / "clips.npz", **arrays)
    assert "fingerprint" in prepare.check(tmp_path / "copy")[0]
    meta = (copy() / "meta.json").read_text()
    (tmp_path / "copy" / "meta.json").write_text(meta.replace('"bright"', '"dark"'))
    assert "fingerprint" in prepare.check(tmp_path / "copy")[0]


def test_report_names_duplicates_silence_clipping_and_loudness(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(4), 22050)
    shutil.copy(tmp_path / "a.wav", tmp_path / "b.wav")
    soundfile.write(tmp_path / "quiet.wav", np.zeros(88200), 22050)
    soundfile.write(tmp_path / "square.wav", np.clip(tone(4, level=5.0), -1, 1), 22050)
    soundfile.write(tmp_path / "loud.wav", tone(4, level=1.5), 22050, subtype="FLOAT")
    report = quietly(prepare.read_folder(tmp_path), tmp_path / "out")["report"]
    assert (report["duplicate"], report["silent"], report["clipped"], report["turned down"]) == (["b.wav"], ["quiet.wav"], ["square.wav"], 1)
    assert report["found"] == 5 and report["missing"] == report["broken"] == 0 and not report["shorter than 3 s"] and report["rates"] == {"22050": 5}


def test_segments_are_clips_of_one_song_and_lose_nothing(tmp_path):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, round(8.6 * 22050))
    soundfile.write(tmp_path / "long.wav", x, 22050)
    soundfile.write(tmp_path / "short.wav", x[:22050], 22050)
    quietly(prepare.read_folder(tmp_path), tmp_path / "out", segment=2.0)
    clips = prepare.Clips(tmp_path / "out")
    assert clips.id.tolist() == ["long.wav@0", "long.wav@2", "long.wav@4", "long.wav@6", "short.wav"] and clips.group.tolist() == [0, 0, 0, 0, 1]
    assert clips.length.tolist() == [44100, 44100, 44100, 57330, 22050]  # the rest of 0.6 s stays with the last
    whole = torch.cat([clips.waveform(i) for i in range(4)])
    assert torch.allclose(whole, torch.from_numpy(x).float(), atol=2 / 32768)


# ---------------------------------------------------------------------------------------------------- tables of labels

def test_three_forms_of_labels(tmp_path):
    songs(tmp_path, 4)
    forms = {
        "tags.csv": [("file", "split", "group", "tags", "artist"), ("a.wav", "train", "x", "old; loud", "A"), ("b.wav", "validation", "x", "", "A"),
                     ("c.wav", "test", "y", "loud", "B")],
        "label.csv": [("file", "label", "year"), ("a.wav", "loud", 1), ("b.wav", "old", 2), ("./c.wav", "loud", 3)],
        "columns.csv": [("file", "old", "loud", "split"), ("a.wav", 1, 1, "train"), ("b.wav", 0, 0, "valid"), ("c.wav", 0, 1, "test")]}
    a, b, c = (prepare.read_folder(tmp_path, table(tmp_path / name, *rows)) for name, rows in forms.items())
    assert a.task == "multilabel" and a.tags == ["loud", "old"] and [clip.tags for clip in a] == [("old", "loud"), (), ("loud",)]
    assert [clip.split for clip in a] == ["train", "valid", "test"] and [clip.group for clip in a] == ["x", "x", "y"]
    assert b.task == "singlelabel" and b.tags == ["loud", "old"] and [clip.id for clip in b] == ["a.wav", "b.wav", "c.wav"]
    assert c.task == "multilabel" and c.tags == ["old", "loud"] and [clip.tags for clip in c] == [("old", "loud"), (), ("loud",)]
    for listing, name in ((a, "tags.csv"), (b, "label.csv"), (c, "columns.csv")):
        assert listing.skipped == [{"file": "d.wav", "reason": f"no row in {name}"}]
    (tmp_path / "semicolon.csv").write_bytes("\ufefffile;label\r\na.wav;größer\r\n".encode())
    assert prepare.read_folder(tmp_path, tmp_path / "semicolon.csv").tags == ["größer"]


def test_a_row_without_a_file_and_a_file_without_a_row(cli, tmp_path):
    songs(tmp_path / "in", 3)
    labels = table(tmp_path / "l.csv", ("file", "label"), ("a.wav", "x"), ("b.wav", "y"), ("gone.wav", "x"))
    command = ["prepare.py", "--data", "folder", "--root", tmp_path / "in", "--labels", labels, "--out", tmp_path / "out"]
    done = cli(command)
    assert done.returncode == 1 and "1 of 3 files cannot be used" in done.stderr and "gone.wav: missing" in done.stderr
    done = cli([*command, "--max-skipped", 0.34])
    assert done.returncode == 0 and "gone.wav: missing" in done.stdout and "c.wav: no row in l.csv" in done.stdout
    assert prepare.Clips(tmp_path / "out").id.tolist() == ["a.wav", "b.wav"]


@pytest.mark.parametrize("rows, word", [
    ([("name", "label"), ("a.wav", "x")], "column `file`"),
    ([("file", "label", "tags"), ("a.wav", "x", "y")], "one of `tags` and `label`"),
    ([("file", "label"), ("a.wav", "x"), ("a.wav", "y")], "line 3: a.wav stands there a second time"),
    ([("file", "label"), ("a.wav", "")], "line 2: a.wav has no label"),
    ([("file", "old", "composer"), ("a.wav", "1", "Bach")], "tag column `composer`, found 'Bach'"),
    ([("file", "split", "label"), ("a.wav", "dev", "x")], "train, valid or test in the column `split`, found 'dev'"),
    ([("file", "label"), ("z.wav", "x")], "none of the 1 recordings listed is there"),
    ([("file", "label")], "found no row")])
def test_bad_tables_are_told(tmp_path, rows, word):
    songs(tmp_path, 2)
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        prepare.read_folder(tmp_path, table(tmp_path / "l.csv", *rows))


def test_a_table_in_another_encoding_is_told(tmp_path):
    songs(tmp_path, 1)
    (tmp_path / "l.csv").write_bytes("file,label\na.wav,größer\n".encode("latin-1"))
    with pytest.raises(ValueError, match="UTF-8"):
        prepare.read_folder(tmp_path, tmp_path / "l.csv")


def test_names_in_either_unicode_spelling_meet(tmp_path):
    soundfile.write(tmp_path / "Cafe\u0301.wav", tone(), 22050)
    listing = prepare.read_folder(tmp_path, table(tmp_path / "l.csv", ("file", "label"), ("Caf\u00e9.wav", "x")))
    assert [clip.id for clip in listing] == ["Caf\u00e9.wav"] and listing[0].file.exists()


def test_names_that_are_no_text_at_all(tmp_path, cli):
    (tmp_path / "in").mkdir()
    for name in (b"\xff\xfe.wav", b"new\nline.wav", b"-dash.wav"):
        soundfile.write(tmp_path / "a.wav", tone(), 22050)
        os.rename(tmp_path / "a.wav", os.path.join(os.fsencode(tmp_path / "in"), name))
    done = cli(["prepare.py", "--data", "folder", "--root", "in", "--name", "odd"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(prepare.Clips("data/odd")) == 3 and prepare.check("data/odd") == [] and "\\udcff" in done.stdout


def test_a_table_may_name_files_in_several_ways(tmp_path, monkeypatch):
    folder = songs(tmp_path / "in" / "sub", 5)
    soundfile.write(folder / "f.wave", tone(0.5), 22050, format="WAV")
    names = ("sub/a.wav", "./sub/b.wav", str(folder / "c.wav"), "sub\\d.wav", "in/sub/e.wav", "sub/f.wave", "/elsewhere/g.wav")
    table(tmp_path / "t.csv", ("file", "label"), *((name, "x") for name in names))
    monkeypatch.chdir(tmp_path)
    listing = prepare.read_folder(Path("in"), tmp_path / "t.csv")
    assert sorted(clip.id for clip in listing) == [f"sub/{name}" for name in ("a.wav", "b.wav", "c.wav", "d.wav", "e.wav", "f.wave")]
    assert [s["file"] for s in listing.skipped] == ["/elsewhere/g.wav"]
    songs(tmp_path / "disc", 1)
    songs(tmp_path / "disc" / "disc", 2)
    table(tmp_path / "t.csv", ("file", "label"), ("disc/a.wav", "x"), ("disc/c.wav", "x"))
    shutil.copy(tmp_path / "disc" / "a.wav", tmp_path / "disc" / "c.wav")
    listing = prepare.read_folder(Path("disc"), tmp_path / "t.csv")
    assert [clip.id for clip in listing] == ["disc/a.wav"] and "disc/c.wav" in [s["file"] for s in listing.skipped]  # not c.wav


def test_a_field_that_was_split_in_two_is_told(tmp_path):
    songs(tmp_path / "in", 1)
    (tmp_path / "t.csv").write_text("file;tags\na.wav;rock; loud\n")
    with pytest.raises(ValueError, match="t.csv, line 2: more fields than the 2 columns"):
        prepare.read_folder(tmp_path / "in", tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text('file;tags;\na.wav;"rock; loud";\n')
    assert prepare.read_folder(tmp_path / "in", tmp_path / "t.csv")[0].tags == ("rock", "loud")


def test_songs_are_dealt_to_splits_by_their_group(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [(f"{i}.wav", f"song {i // 3}", "x") for i in range(600)]
    for name, *_ in rows:
        (folder / name).touch()
    listing = prepare.read_folder(folder, table(tmp_path / "l.csv", ("file", "group", "label"), *rows))
    splits = {}
    for clip in listing:
        splits.setdefault(clip.group, set()).add(clip.split)
    counts = Counter(clip.split for clip in listing)
    assert all(len(own) == 1 for own in splits.values()) and 430 < counts["train"] < 520 and counts["valid"] > 30 and counts["test"] > 30
    assert listing.split_name == "80:10:10 by song"


# -------------------------------------------------------------------------------------------------- published data sets

def test_demo_is_read_without_further_flags(cli, tmp_path):
    done = cli(["prepare.py", "--data", "demo", "--out", tmp_path / "demo"])
    assert done.returncode == 0, done.stderr
    clips = prepare.Clips(tmp_path / "demo")
    assert clips.task == "singlelabel" and (clips.labels.sum(1) == 1).all() and not clips.meta["skipped"]
    assert all(len(prepare.Clips(tmp_path / "demo", split)) for split in prepare.SPLITS)


def mtat(root, clips=60, tags=55):
    """A table of MagnaTagATune's form: clip i lies in folder i mod 16 and carries tags 0 ... (i mod tags)."""
    names = [f"tag {k:02d}" for k in range(tags)]
    rows, info = [["clip_id", *names, "mp3_path"]], [["clip_id", "track_number", "title", "artist", "album", "mp3_path"]]
    for i in range(clips):
        path = f"{i % 16:x}/song-{i}.mp3"
        rows.append([str(i), *("1" if i % tags >= k + 1 else "0" for k in range(tags)), path])
        info.append([str(i), "01", f"song {i // 2}", "artist", "album", path])
    root.mkdir(exist_ok=True)
    for name, lines in (("annotations_final.csv", rows), ("clip_info_final.csv", info)):
        with open(root / name, "w", newline="") as file:
            csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(lines)
    return [row[-1] for row in rows[1:]]


def test_mtat(cli, tmp_path):
    paths = mtat(tmp_path / "in")
    for k, path in enumerate(paths):
        target = tmp_path / "in" / "mp3" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, tone(0.3, 16000, 200 + 10 * k), 16000)
    done = cli(["prepare.py", "--data", "mtat", "--root", tmp_path / "in", "--out", tmp_path / "out", "--workers", 2])
    assert done.returncode == 0, done.stderr
    clips = prepare.Clips(tmp_path / "out")
    assert len(clips) == 60 and clips.tags == [f"tag {k:02d}" for k in range(50)] and clips.task == "multilabel"
    for i, name in enumerate(clips.id):
        n = int(name.split("-")[1].split(".")[0])
        assert prepare.SPLITS[clips.split[i]] == ("train" if n % 16 < 12 else "valid" if n % 16 == 12 else "test")
        assert clips.labels[i].sum() == min(50, n % 55) and clips.group[i] == n // 2
    assert "18,706" in done.stdout or "18706" in done.stdout  # what the published split has, beside what is here
    labelled = published.read_mtat(tmp_path / "in", "labelled")
    assert len(labelled) == 58 and labelled.published == (15247, 1529, 4332)


def test_a_published_table_that_was_changed_is_told(tmp_path, cli):
    mtat(tmp_path / "in", clips=4)
    text = (tmp_path / "in" / "annotations_final.csv").read_text()
    (tmp_path / "in" / "annotations_final.csv").write_text(text.replace("mp3_path", "path"))
    done = cli(["prepare.py", "--data", "mtat", "--root", tmp_path / "in"], cwd=tmp_path)
    assert done.returncode == 1 and "a table of mtat is not as it was published: no 'mp3_path' in it" in done.stderr


def test_mtat_expects_the_three_empty_files(tmp_path):
    mtat(tmp_path / "in", clips=4)
    for name in ("annotations_final.csv", "clip_info_final.csv"):
        text = (tmp_path / "in" / name).read_text().replace('"3"', '"35644"', 1)
        (tmp_path / "in" / name).write_text(text)
    for i in range(4):
        (tmp_path / "in" / str(i)).mkdir()
        soundfile.write(tmp_path / "in" / str(i) / f"song-{i}.mp3", tone(0.3), 22050)
    (tmp_path / "in/3/song-3.mp3").write_bytes(b"")
    meta = quietly(published.read_mtat(tmp_path / "in"), tmp_path / "out", max_skipped=0)  # known to be broken: no loss
    assert [s["file"] for s in meta["skipped"]] == ["3/song-3.mp3"] and meta["clips"]["train"] == 3


def test_gtzan_has_the_published_counts(tmp_path):
    for genre in "blues classical country disco hiphop jazz metal pop reggae rock".split():
        (tmp_path / "genres" / genre).mkdir(parents=True)
        for i in range(100):
            (tmp_path / "genres" / genre / f"{genre}.{i:05d}.au").touch()
    listing = prepare.DATASETS["gtzan"](tmp_path)
    counts = Counter(clip.split for clip in listing)
    assert (counts["train"], counts["valid"], counts["test"]) == (443, 197, 290) == listing.published
    assert listing.task == "singlelabel" and len(listing.tags) == 10 and all(clip.id.startswith(clip.tags[0]) for clip in listing)


def test_fma(tmp_path):
    meta = tmp_path / "fma_metadata"
    meta.mkdir()
    table(meta / "genres.csv", ("genre_id", "title", "top_level"), (1, "Rock", 1), (2, "Punk", 1), (3, "Jazz", 3))
    table(meta / "tracks.csv", ("", "set", "set", "track", "track", "artist"), ("", "split", "subset", "genre_top", "genres_all", "bio"),
          ("track_id", "", "", "", "", ""), (2, "training", "small", "Rock", "[1, 2]", "x" * 200_000), (5, "validation", "medium", "Jazz", "[3]", "a\nb"),
          (10, "test", "small", "Rock", "[2]", ""), (20, "training", "large", "", "[2, 3]", ""), (99134, "training", "small", "Rock", "[1]", ""))
    for track in (2, 5, 10, 20):
        (tmp_path / "fma_medium" / f"{track // 1000:03d}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fma_medium" / f"{track // 1000:03d}" / f"{track:06d}.mp3").touch()
    medium = prepare.DATASETS["fma"](tmp_path)
    assert [(clip.id, clip.split, clip.tags) for clip in medium] == [("000002", "train", ("Rock",)), ("000005", "valid", ("Jazz",)), ("000010", "test", ("Rock",))]
    assert medium.task == "singlelabel" and medium.published == (19922, 2505, 2573) and medium.tags == ["Jazz", "Rock"]
    assert [s["file"] for s in medium.skipped] == ["099134"] and "099134" in medium.broken
    os.rename(tmp_path / "fma_medium", tmp_path / "fma_large")
    large = prepare.DATASETS["fma"](tmp_path, subset="large")
    assert large.task == "multilabel" and [clip.tags for clip in large] == [("Rock",), ("Jazz",), ("Rock",), ("Jazz", "Rock")]


def msd(root, train=201690, test=3):
    """The index files of the field, as Python 2 left them: byte strings, protocol 2, vectors of numpy."""
    root.mkdir(exist_ok=True)
    ids = [f"TR{i:016d}".encode() for i in range(train + test)]
    vectors = {name: np.eye(1, 50, k % 50)[0] for k, name in enumerate(ids[:60] + ids[-20:])}
    vectors = {**dict.fromkeys(ids, np.zeros(50)), **vectors}
    for name, what in (("filtered_list_train.cP", ids[:train]), ("filtered_list_test.cP", ids[train:]), ("msd_id_to_tag_vector.cP", vectors),
                       ("MSD_id_to_7D_id.pkl", {ids[1]: b"777"})):
        (root / name).write_bytes(pickle.dumps(what, 2))
    (root / "50tagList.txt").write_text("".join(f"Tag{k}\n" for k in range(50)))
    return [name.decode() for name in ids]


def test_msd(tmp_path):
    ids = msd(tmp_path)
    (tmp_path / "7" / "77").mkdir(parents=True)
    for name in (f"{ids[0]}.mp3", "7/77/777.clip.mp3", f"{ids[201680]}.mp3", f"{ids[-1]}.mp3"):
        (tmp_path / name).touch()
    listing = prepare.DATASETS["msd"](tmp_path)
    assert [(clip.id, clip.split, clip.tags) for clip in listing] == [
        (ids[0], "train", ("tag0",)), (ids[1], "train", ("tag1",)), (ids[201680], "valid", ("tag17",)), (ids[-1], "test", ("tag29",))]
    assert len(listing.skipped) == len(ids) - 4 and listing.published == (201680, 11774, 28435)


def test_msd_runs_no_code_from_its_index(tmp_path):
    msd(tmp_path, 3, 1)
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)
    (tmp_path / "filtered_list_train.cP").write_bytes(pickle.dumps([Evil()], 2))
    with pytest.raises(ValueError, match="has no place in a list of songs"):
        prepare.DATASETS["msd"](tmp_path)
    assert not (tmp_path / "owned").exists()


def test_billboard(tmp_path):
    table(tmp_path / "billboard-2.0-index.csv", ("id", "chart_date", "title", "artist"), (3, "1961-07-03", "I Don't Mind", "James Brown"),
          (4, "1970-01-01", "You've Got a Friend", "Roberta Flack"), (5, "1970-01-08", "", ""), (7, "1971-01-01", "I Don't Mind", "James Brown"),
          (9, "1980-01-01", "Bésame", "Él"))
    (tmp_path / "0004").mkdir()
    for name in ("0003.mp3", "0004/song.flac", "Él - Bésame.ogg", "0007.mp3", "other.wav"):
        (tmp_path / name).touch()
    listing = prepare.DATASETS["billboard"](tmp_path)
    assert [clip.id for clip in listing] == ["0003", "0004", "0009"] and {clip.split for clip in listing} == {"train"} and listing.task == "none"
    assert sorted(Path(s["file"]).name for s in listing.skipped) == ["0007.mp3", "other.wav"]
    for name in ("an album/01 Intro.mp3", "another/01 Intro.mp3", "1999/a.mp3", "1999/b.mp3", "3/a.mp3", "3/b.mp3"):  # not the index's business
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    again = prepare.DATASETS["billboard"](tmp_path)
    assert [clip.id for clip in again] == [clip.id for clip in listing] and len(again.skipped) == 8
    os.rename(tmp_path / "Él - Bésame.ogg", tmp_path / "1999" / "Él - Bésame.ogg")  # a folder that is a year, not a number of the index
    assert [clip.id for clip in prepare.DATASETS["billboard"](tmp_path)] == [clip.id for clip in listing]


# --------------------------------------------------------------------------------------------------------- robustness

SLOW = textwrap.dedent("""
    import os, sys, time
    sys.path.insert(0, {root!r})
    import prepare
    def slow(path, rate):
        with open({log!r}, "a") as file:
            file.write(os.path.basename(path) + "\\n")
        time.sleep({pause})
        return prepare.load(path, rate)
    if __name__ == "__main__":
        prepare.write(prepare.read_folder({folder!r}), {out!r}, workers=2, load=slow, progress=False)
    """)


def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path, python):
    folder = songs(tmp_path / "in", 24)
    quietly(prepare.read_folder(folder), tmp_path / "straight" / "out")
    def start(pause):
        script = SLOW.format(root=str(ROOT), log=str(tmp_path / "log"), folder=str(folder), out=str(tmp_path / "out"), pause=pause)
        (tmp_path / "slow.py").write_text(script)
        return subprocess.Popen([python, tmp_path / "slow.py"], env={**os.environ, "OMP_NUM_THREADS": "1"})
    journal = tmp_path / "out.partial" / "journal.jsonl"
    for finished in (3, 9):
        process = start(0.15)
        while not journal.exists() or journal.read_bytes().count(b"\n") < finished:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(tmp_path / "out.partial" / "audio.npy", "ab") as file:
        file.write(b"half a clip")  # killed between the samples and the line that vouches for them
    with open(journal, "ab") as file:
        file.write(b'{"lengths": [11')
    sure = journal.read_bytes().count(b"\n")
    decoded = len((tmp_path / "log").read_text().split())
    assert start(0).wait() == 0
    assert len((tmp_path / "log").read_text().split()) - decoded == 24 - sure  # nothing is decoded again
    assert contents(tmp_path / "out") == contents(tmp_path / "straight" / "out") and not journal.parent.exists()


def test_a_run_that_is_complete_is_not_repeated_and_not_overwritten(tmp_path, cli):
    folder = songs(tmp_path / "in", 3)
    command = ["prepare.py", "--data", "folder", "--root", folder, "--out", tmp_path / "out"]
    assert cli(command).returncode == 0
    before = (tmp_path / "out" / "audio.npy").stat().st_mtime_ns
    assert cli(command).returncode == 0 and (tmp_path / "out" / "audio.npy").stat().st_mtime_ns == before
    soundfile.write(folder / "z.wav", tone(), 22050)
    done = cli(command)
    assert done.returncode == 1 and "is there already" in done.stderr and "rm -r" in done.stderr
    assert not (tmp_path / "out.partial").exists() and len(prepare.Clips(tmp_path / "out")) == 3


def test_an_exchanged_file_is_decoded_again(tmp_path):
    folder = songs(tmp_path / "in", 4)
    listing = prepare.read_folder(folder)
    (folder / "d.wav").write_bytes(b"broken")
    with pytest.raises(ValueError, match="d.wav"):
        quietly(listing, tmp_path / "out")
    soundfile.write(folder / "d.wav", tone(2), 22050)
    assert quietly(listing, tmp_path / "out")["clips"]["train"] == 4


def test_two_runs_at_once(tmp_path, cli):
    folder = songs(tmp_path / "in", 2)
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cli(["prepare.py", "--data", "folder", "--root", folder, "--out", tmp_path / "out"])
    assert done.returncode == 1 and "another run is preparing it" in done.stderr and not (tmp_path / "out").exists()


def test_disk_full(tmp_path, run, monkeypatch):
    folder = songs(tmp_path / "in", 12)
    quietly(prepare.read_folder(folder), tmp_path / "straight" / "out")
    command = ["prepare.py", "--data", "folder", "--root", folder, "--out", tmp_path / "out", "--workers", 2]
    done = run(command, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    assert done.returncode == 1 and "cannot be written" in done.stderr and "GB more" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert run(command).returncode == 0
    for name in ("audio.npy", "clips.npz"):
        assert contents(tmp_path / "out")[name] == contents(tmp_path / "straight" / "out")[name]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 ** 6, 10 ** 6, 50_000))
    with pytest.raises(OSError, match="0.00 GB are needed there, 0.00 GB are free"):
        quietly(prepare.read_folder(folder), tmp_path / "second" / "out")


@contextlib.contextmanager
def interrupted(monkeypatch, files=2):
    """Ctrl-C after so many files."""
    class Bar(prepare.tqdm):
        done = 0

        def update(self, n=1):
            Bar.done += 1
            if Bar.done == files:
                raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "tqdm", Bar)
        yield


def poisonous(path, rate):
    if path.endswith("b.wav"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if path.endswith("d.wav"):
        time.sleep(60)
    return prepare.load(path, rate)


def test_a_file_that_crashes_or_hangs_a_decoder_costs_that_file_alone(tmp_path):
    meta = quietly(prepare.read_folder(songs(tmp_path / "in", 8)), tmp_path / "out", max_skipped=0.3, timeout=1.5, load=poisonous)
    assert {s["file"]: s["reason"] for s in meta["skipped"]} == {"b.wav": "broken: it crashes the decoder (exit code -11)", "d.wav": "broken: not decoded after 1.5 s"}
    assert prepare.Clips(tmp_path / "out").id.tolist() == ["a.wav", "c.wav", "e.wav", "f.wav", "g.wav", "h.wav"] and not prepare.check(tmp_path / "out")


def test_shards_join_to_the_same_bytes(tmp_path, cli):
    folder = songs(tmp_path / "in", 11)
    (folder / "k.wav").write_bytes(b"")
    rows = [("file", "group", "tags"), *((f"{chr(97 + i)}.wav", i // 3, "x; y" if i % 2 else "y") for i in range(11)), ("zz.wav", 9, "x")]
    table(tmp_path / "l.csv", *rows)
    command = ["prepare.py", "--data", "folder", "--root", "in", "--labels", "l.csv", "--name", "whole", "--max-skipped", 0.2, "--segment", 0.5]
    assert cli(command, cwd=tmp_path).returncode == 0
    os.rename(tmp_path / "data", tmp_path / "straight")
    early = cli([*command, "--merge", 3], cwd=tmp_path)
    assert early.returncode == 1 and "expected a finished shard" in early.stderr
    shutil.rmtree(tmp_path / "data")
    for i in (3, 1, 2):
        done = cli([*command, "--shard", f"{i}/3"], cwd=tmp_path)
        assert done.returncode == 0 and "--merge 3" in done.stdout, done.stderr
    done = cli([*command, "--merge", 3], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "data" / "whole") == contents(tmp_path / "straight" / "whole")


def test_an_unfinished_shard_is_not_joined(tmp_path):
    """Of files of one length nothing but the names tells that the next shard's samples stand in the wrong place."""
    for i in range(6):
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{i}.wav", np.full(2000, 0.1 * (i + 1)), 22050)
    listing = prepare.read_folder(tmp_path / "in")
    for i in (1, 2):
        quietly(listing, tmp_path / "out", shard=(i, 2))
    first = tmp_path / "out.shard-1-of-2.partial"
    whole = (first / "journal.jsonl").read_bytes()
    (first / "journal.jsonl").write_bytes(whole.splitlines(keepends=True)[0])  # as a kill leaves it
    with pytest.raises(ValueError, match="shard-1-of-2.*expected a finished shard"):
        quietly(listing, tmp_path / "out", merge=2)
    quietly(listing, tmp_path / "out", shard=(1, 2))
    quietly(listing, tmp_path / "out", merge=2)
    clips = prepare.Clips(tmp_path / "out")
    assert [round(float(clips.waveform(i)[0]), 2) for i in range(6)] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]


def test_what_stands_in_the_way_is_said_before_the_work(tmp_path):
    listing, started = prepare.read_folder(songs(tmp_path / "in", 3)), []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="found something else"):
        quietly(listing, tmp_path / "out", load=lambda *a: started.append(a))
    assert not started and (tmp_path / "out" / "notes.txt").read_text() == "mine" and not (tmp_path / "out.partial").exists()


def test_other_recordings_of_the_same_names_are_not_the_same_data(tmp_path, monkeypatch):
    quietly(prepare.read_folder(songs(tmp_path / "one", 3)), tmp_path / "out")
    other = prepare.read_folder(songs(tmp_path / "two", 3, 0.7))
    with pytest.raises(FileExistsError, match="made from other files"):
        quietly(other, tmp_path / "out")
    for name, hz in (("clean", 300), ("noisy", 500)):  # not even their sizes differ
        for i in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            soundfile.write(tmp_path / name / f"{i}.wav", tone(0.5, hz=hz + i), 22050)
    with interrupted(monkeypatch):
        quietly(prepare.read_folder(tmp_path / "clean"), tmp_path / "second")
    assert (tmp_path / "second.partial" / "audio.npy").stat().st_size > 128
    quietly(prepare.read_folder(tmp_path / "noisy"), tmp_path / "second")
    clips = prepare.Clips(tmp_path / "second")
    for i in range(4):
        assert np.allclose(clips.waveform(i), prepare.decode(tmp_path / "noisy" / clips.id[i]), atol=1e-4)
    with pytest.raises(FileExistsError, match="made from other files"):
        quietly(prepare.read_folder(tmp_path / "clean"), tmp_path / "second")


def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path):
    (tmp_path / "big disk" / "songs").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "big disk" / "songs", tmp_path / "data" / "mine")
    os.symlink(tmp_path / "big disk" / "later", tmp_path / "data" / "dangling")
    listing = prepare.read_folder(songs(tmp_path / "in", 3))
    for name in ("mine", "dangling"):
        meta = quietly(listing, tmp_path / "data" / name)
        assert meta["name"] == name and meta["format"] == prepare.FORMAT and prepare.check(tmp_path / "data" / name) == []
    assert sorted(os.listdir(tmp_path / "big disk")) == ["later", "songs"] and len(os.listdir(tmp_path / "data")) == 2


def test_joining_shards_too_early_costs_nothing(tmp_path, monkeypatch):
    listing = prepare.read_folder(songs(tmp_path / "in", 6))
    with interrupted(monkeypatch):
        quietly(listing, tmp_path / "out")
    before = contents(tmp_path / "out.partial")
    quietly(listing, tmp_path / "out", shard=(1, 2))
    with pytest.raises(ValueError, match="shard-2-of-2.*expected a finished shard"):
        quietly(listing, tmp_path / "out", merge=2)
    assert contents(tmp_path / "out.partial") == before
    quietly(listing, tmp_path / "out", shard=(2, 2))
    need = sum(file.stat().st_size for file in tmp_path.glob("out.shard-*/audio.npy"))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="0.00 GB are needed there"):
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
        quietly(listing, tmp_path / "out", merge=2)
    assert contents(tmp_path / "out.partial") == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_seal", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        quietly(listing, tmp_path / "out", merge=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, need // 2))  # what is there is written over
    assert quietly(listing, tmp_path / "out", merge=2)["clips"]["train"] == 6 and prepare.check(tmp_path / "out") == []


def test_a_kill_as_the_folder_moves_into_place_costs_nothing(tmp_path, monkeypatch):
    listing, decoded = prepare.read_folder(songs(tmp_path / "in", 4)), tmp_path / "decoded"

    def load(path, rate):
        with open(decoded, "a") as file:
            file.write(Path(path).name + "\n")
        return prepare.load(path, rate)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt()))
        quietly(listing, tmp_path / "out", load=load)
    quietly(listing, tmp_path / "out", load=load)
    assert sorted(decoded.read_text().split()) == ["a.wav", "b.wav", "c.wav", "d.wav"] and not prepare.check(tmp_path / "out")


def test_links_are_followed_once_and_two_files_of_one_name_are_an_error(tmp_path):
    songs(tmp_path / "elsewhere", 2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "album").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert list(prepare.audio_files(tmp_path / "in")) == ["album/a.wav", "album/b.wav"]
    for name in ("\u00e9.wav", "e\u0301.wav"):  # two spellings of one letter
        soundfile.write(tmp_path / "in" / name, tone(), 22050)
    with pytest.raises(ValueError, match="are both"):
        prepare.audio_files(tmp_path / "in")


def test_dry_run_writes_nothing(tmp_path, cli):
    songs(tmp_path / "in", 20, 1.0)
    done = cli(["prepare.py", "--data", "folder", "--root", "in", "--dry-run"], cwd=tmp_path)
    assert done.returncode == 0 and "20 files (20 train" in done.stdout and "GB free" in done.stdout and os.listdir(tmp_path) == ["in"]
    size, seconds = prepare.estimate(prepare.read_folder(tmp_path / "in"), 22050)
    true = sum(2 * len(prepare.decode(path)) for path in (tmp_path / "in").iterdir())
    assert size == pytest.approx(true, rel=0.02) and seconds > 0


def test_an_mp3_that_does_not_count_its_frames_is_whole_or_refused(tmp_path):
    """Without a count libsndfile guesses an mp3's length from its first frames, wrong where the bit rate varies."""
    loud = np.r_[np.ones(220500), np.zeros(220500)] * np.random.default_rng(0).uniform(-0.5, 0.5, 441000)
    for name, x in {"loud first": loud, "quiet first": loud[::-1]}.items():
        path = tmp_path / f"{name}.mp3"
        soundfile.write(path, x, 44100, bitrate_mode="VARIABLE", compression_level=0.3)
        assert len(prepare.decode(path)) == pytest.approx(220500, abs=3000)
        data = path.read_bytes()
        at = max(data.find(b"Xing"), data.find(b"Info"))
        path.write_bytes(data[data.find(data[:2], at + 20):])
    with pytest.raises(ValueError, match="loud first.mp3: the decoder stops after 2.3 s, before the end.*ffmpeg"):
        prepare.decode(tmp_path / "loud first.mp3")
    assert len(prepare.decode(tmp_path / "quiet first.mp3")) == pytest.approx(220500, abs=3000)
    steady = tmp_path / "steady.mp3"
    soundfile.write(steady, loud, 44100, bitrate_mode="CONSTANT", compression_level=0.7)
    data = steady.read_bytes()
    steady.write_bytes(data[data.find(data[:2], max(data.find(b"Xing"), data.find(b"Info")) + 20):] + b"TAG" + bytes(125))
    assert len(prepare.decode(steady)) == pytest.approx(220500, abs=3000)


# ---------------------------------------------------------------------------------------------------------- download

@pytest.fixture
def server(monkeypatch):
    """A server on loopback: .files {path: bytes}, .drop {path: how often the connection breaks in the middle}, .asked."""
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.asked.append((self.path, self.headers.get("Range")))
            data = server.files.get(self.path)
            if data is None:
                return self.send_error(404)
            first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            if first >= len(data):
                return self.send_error(416)
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            if server.drop.get(self.path, 0) > 0:
                server.drop[self.path] -= 1
                self.wfile.write(data[first : first + (len(data) - first) // 2])
                self.wfile.flush()
                self.close_connection = True
                return self.connection.shutdown(2)
            self.wfile.write(data[first:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.drop, server.asked = {}, {}, []
        server.address = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_download_continues_after_a_lost_connection(server, tmp_path):
    data = np.random.default_rng(0).bytes(300_000)
    server.files["/a"], server.drop["/a"] = data, 2
    published.download([server.address + "a"], tmp_path / "a", sha256(data), pause=0)
    assert (tmp_path / "a").read_bytes() == data and [asked[1] for asked in server.asked] == [None, "bytes=150000-", "bytes=225000-"]
    assert os.listdir(tmp_path) == ["a"]


def test_download_refuses_a_wrong_checksum_and_tries_the_next_address(server, tmp_path):
    server.files.update({"/bad": b"x" * 1000, "/good": b"y" * 1000})
    with pytest.raises(OSError, match="sha256 is .*, expected"):
        published.download([server.address + "bad"], tmp_path / "a", sha256(b"y" * 1000), tries=2, pause=0)
    assert os.listdir(tmp_path) == []
    published.download([server.address + name for name in ("gone", "bad", "good")], tmp_path / "a", sha256(b"y" * 1000), pause=0)
    assert (tmp_path / "a").read_bytes() == b"y" * 1000 and os.listdir(tmp_path) == ["a"]


def test_download_tells_a_404_and_keeps_what_has_arrived(server, tmp_path):
    with pytest.raises(OSError, match="404"):
        published.download([server.address + "gone"], tmp_path / "a", pause=0)
    server.files["/a"], server.drop["/a"] = b"z" * 1000, 99
    with pytest.raises(OSError, match="connection was lost after .* of 1,000 bytes"):
        published.download([server.address + "a"], tmp_path / "a", tries=2, pause=0)
    assert os.listdir(tmp_path) == ["a.part"] and (tmp_path / "a.part").stat().st_size == 750
    server.drop["/a"] = 0
    published.download([server.address + "a"], tmp_path / "a", pause=0)
    assert (tmp_path / "a").read_bytes() == b"z" * 1000
    (tmp_path / "b.part").write_bytes(b"z" * 2000)  # longer than the file: of something else
    server.files["/b"] = b"b" * 100
    published.download([server.address + "b"], tmp_path / "b", pause=0)
    assert (tmp_path / "b").read_bytes() == b"b" * 100


def test_mtat_is_downloaded_joined_unpacked_and_prepared(server, tmp_path, monkeypatch, capsys):
    paths = mtat(tmp_path / "source", clips=20)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for k, path in enumerate(paths):
            sound = io.BytesIO()
            soundfile.write(sound, tone(0.3, 16000, 200 + 20 * k), 16000, format="MP3")
            archive.writestr(path, sound.getvalue())
    whole = whole.getvalue()
    for k in range(3):
        server.files[f"/mp3.zip.00{k + 1}"] = whole[len(whole) * k // 3 : len(whole) * (k + 1) // 3]
    for name in ("annotations_final.csv", "clip_info_final.csv"):
        server.files[f"/{name}"] = (tmp_path / "source" / name).read_bytes()
    server.drop["/mp3.zip.002"] = 1
    checksums = {"annotations_final.csv": sha256(server.files["/annotations_final.csv"])}
    monkeypatch.setitem(published.DOWNLOADS, "mtat", [(name, checksums.get(name, ""), [server.address]) for name, *_ in published.DOWNLOADS["mtat"]])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    command = ["--data", "mtat", "--root", str(tmp_path / "root"), "--out", str(tmp_path / "out"), "--download"]
    assert prepare.main(command) == 0
    assert len(prepare.Clips(tmp_path / "out")) == 20
    assert not [name for name in os.listdir(tmp_path / "root") if "part" in name or "zip" in name or "unpacking" in name]
    server.asked.clear()
    assert prepare.main(command) == 0 and server.asked == []  # nothing is fetched twice


def test_gtzan_archive_from_the_second_mirror(server, tmp_path, monkeypatch):
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        sound = io.BytesIO()
        soundfile.write(sound, tone(), 22050, format="AU")
        info = tarfile.TarInfo("genres/blues/blues.00029.au")
        info.size = len(sound.getvalue())
        archive.addfile(info, io.BytesIO(sound.getvalue()))
    server.files["/two/genres.tar.gz"] = data.getvalue()
    monkeypatch.setitem(published.DOWNLOADS, "gtzan", [("genres.tar.gz", sha256(data.getvalue()), [server.address + "one/", server.address + "two/"])])
    (tmp_path / "genres.tar.gz.unpacking").mkdir()  # left by an interruption
    published.fetch("gtzan", tmp_path, pause=0)
    assert sorted(os.listdir(tmp_path)) == ["downloaded.txt", "genres"] and len(published.read_gtzan(tmp_path)) == 1


# --------------------------------------------------------------------------------------------------------- the file

@pytest.mark.parametrize("module", [prepare, published])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_copied_alone_it_prepares_a_folder(tmp_path, python):
    shutil.copy(ROOT / "prepare.py", tmp_path)
    songs(tmp_path / "in", 3)
    command = [python, "prepare.py", "--data", "folder", "--root", "in", "--name", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "next: python pretrain.py --data mine" in done.stdout and prepare.check(tmp_path / "data" / "mine") == []


def test_unpacking_leaves_what_else_is_there(tmp_path):
    (tmp_path / "genres" / "blues").mkdir(parents=True)
    (tmp_path / "genres" / "notes.csv").write_text("mine")
    (tmp_path / "genres" / "blues" / "a.wav").write_text("half of it, from an unpacking that was interrupted")
    with zipfile.ZipFile(tmp_path / "g.zip", "w") as file:
        file.writestr("genres/blues/a.wav", "whole")
    published.unpack(tmp_path / "g.zip", tmp_path)
    assert (tmp_path / "genres" / "notes.csv").read_text() == "mine" and (tmp_path / "genres" / "blues" / "a.wav").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["g.zip", "genres"]


def test_a_broken_archive_names_the_files_to_remove(tmp_path):
    with zipfile.ZipFile(tmp_path / "g.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.csv", "1,2,3\n" * 1000)
    data = bytearray((tmp_path / "g.zip").read_bytes())
    data[36:44] = b"\xff" * 8  # inside the compressed member: zlib's own error
    (tmp_path / "g.zip").write_bytes(data)
    with pytest.raises(OSError, match="g.zip: cannot be unpacked .*; rm .*g.zip and"):
        published.unpack(tmp_path / "g.zip", tmp_path)
    with pytest.raises(OSError, match="rm one.001 'two 2.002' and type the same command again"):
        published.unpack(tmp_path / "g.zip", tmp_path, ["one.001", "two 2.002"])


# ------------------------------------------------------------------------------------ several folders as one set

@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """Two prepared folders with the same two tags, 4 and 3 songs, of which some have two clips."""
    root = tmp_path_factory.mktemp("two")
    for name, n in (("one", 4), ("two", 3)):
        songs(root / f"{name}-in", n, 0.5 if name == "one" else 0.7)
        rows = [(f"{chr(97 + i)}.wav", ("train", "test")[i % 2], f"song {i // 2}", "x" if i else "y") for i in range(n)]
        labels = table(root / f"{name}.csv", ("file", "split", "group", "tags"), *rows)
        quietly(prepare.read_folder(root / f"{name}-in", labels), root / name)
    return root / "one", root / "two"


def test_several_folders_are_one_set_in_their_order(two_folders):
    one, two = map(prepare.Clips, two_folders)
    both = prepare.Clips(two_folders)
    assert len(both) == 7
    assert both.id.tolist() == one.id.tolist() + two.id.tolist()
    assert (both.labels == np.concatenate([one.labels, two.labels])).all()
    assert (both.tags, both.task, both.sample_rate, both.name) == (["x", "y"], "multilabel", 22050, "one+two")
    assert both.meta["clips"] == {"train": 4, "valid": 0, "test": 3}
    for i in range(7):
        assert torch.equal(both.waveform(i), one.waveform(i) if i < 4 else two.waveform(i - 4))


def test_songs_of_several_folders_are_kept_apart(two_folders):
    assert prepare.Clips(two_folders).group.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert prepare.Clips(two_folders, "train").group.tolist() == [0, 1, 2, 3]


def test_crops_come_from_every_folder_and_from_a_devices_memory_the_same(two_folders):
    test = prepare.Clips(two_folders, "test")
    index = np.array([2, 0, 1, 2])
    start = np.array([5, 0, 700, 0])
    crops = test.crops(index, start, 8000)
    for b in range(4):
        assert torch.equal(crops[b, 0], test.waveform(index[b])[start[b] : start[b] + 8000])
    assert test.keep_on("cpu")
    assert torch.equal(test.crops(index, start, 8000), crops)
    assert torch.equal(pickle.loads(pickle.dumps(test)).crops(index, start, 8000), crops)


def test_the_fingerprint_of_several_folders_is_made_of_theirs(two_folders):
    one, two = two_folders
    assert prepare.Clips([one]).fingerprint == prepare.Clips(one).fingerprint
    assert len({prepare.Clips(folders).fingerprint for folders in (one, two, [one, two], [two, one])}) == 4


def test_folders_of_other_tags_count_without_labels(two_folders, tmp_path):
    quietly(prepare.read_folder(songs(tmp_path / "in", 2)), tmp_path / "out")
    mixed = prepare.Clips([two_folders[0], tmp_path / "out"])
    assert (mixed.task, mixed.tags, mixed.labels.shape) == ("none", [], (6, 0))


def test_folders_of_other_sample_rates_are_refused(two_folders, tmp_path):
    quietly(prepare.read_folder(songs(tmp_path / "in", 2)), tmp_path / "out", sample_rate=16000)
    with pytest.raises(ValueError, match="one sample rate, found .*22050 Hz, .*16000 Hz"):
        prepare.Clips([two_folders[0], tmp_path / "out"])


def test_artists_are_kept_and_change_no_fingerprint(tmp_path):
    songs(tmp_path / "in", 2)
    with_artist = table(tmp_path / "a.csv", ("file", "artist", "tags"), ("a.wav", "Ada", "x"), ("b.wav", "", "y"))
    without = table(tmp_path / "b.csv", ("file", "tags"), ("a.wav", "x"), ("b.wav", "y"))
    quietly(prepare.read_folder(tmp_path / "in", with_artist), tmp_path / "with")
    quietly(prepare.read_folder(tmp_path / "in", without), tmp_path / "without")
    known, unknown = prepare.Clips(tmp_path / "with"), prepare.Clips(tmp_path / "without")
    assert known.artist.tolist() == ["Ada", ""]
    assert unknown.artist.tolist() == ["", ""]
    assert known.fingerprint == unknown.fingerprint
