"""Turn any collection of recordings into one prepared folder that trains at the speed of memory.

    python prepare.py --data demo                                             # the music in this repository, seconds
    python prepare.py --data folder --root ~/music --name mine                # any folder of audio, for pre-training
    python prepare.py --data folder --root ~/music --labels tags.csv --name mine        # ... with tags and splits
    python prepare.py --data mtat --root ~/magnatagatune                      # a published data set, its published split
    python prepare.py --check mine                                            # is data/mine still what was written?

Leaves behind `data/NAME/`:
    audio.npy   int16, 1-D: every clip's samples back to back, mono (memory-mapped, never loaded whole)
    clips.npz   start, length (int64, samples), split (uint8: 0 train, 1 valid, 2 test), group (int64: the song),
                labels (uint8, N x K), id (str), sha256 (uint8, N x 32: of the clip's samples)
    meta.json   name, sample_rate, task (multilabel, singlelabel, none), tags in order, clips / songs / hours per split,
                skipped [{file, reason}], report, fingerprint, the command that made it
Until all is done it stands in `data/NAME.partial/`; an interrupted run continues there, and ends with the same bytes.

A file becomes a clip as it is: decoded, averaged to mono, resampled to 22,050 Hz (section 3.3 of the paper). Nothing is
skipped in silence: each file that cannot be used is listed with its reason, and too many of them are an error.
"""

import argparse
import csv
import hashlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import time
import unicodedata
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

try:
    import fcntl  # POSIX: the lock that keeps two runs out of one folder
except ImportError:
    fcntl = None

SAMPLE_RATE = 22050  # Hz, section 3.3; stands only here, then in the data's meta, then in the checkpoint
SPLITS = ("train", "valid", "test")
FULL_SCALE = 32768  # int16 sample = waveform x 32768
FORMAT = 1
AUDIO = {f".{name.lower()}" for name in soundfile.available_formats()} | {
    ".mp3", ".mp2", ".ogg", ".oga", ".opus", ".aif", ".aifc", ".snd", ".m4a", ".aac", ".wma", ".mp4", ".ape", ".wv"}
AUDIO -= {".raw", ".mat4", ".mat5"}
HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------- decoding

def decode(path, sample_rate=SAMPLE_RATE):
    """Decode one file to mono.

    Args:
        path: any format that libsndfile reads (wav, flac, ogg, opus, mp3, aiff, ...), any rate, any number of channels.
        sample_rate (int): the rate to return, in Hz.

    Returns:
        torch.Tensor: (T,) float32 in [-1, 1], the mean of the channels. A file that overshoots is scaled to a peak of 1.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not audio, no samples, cut off, or NaN or infinite samples; the message says which.
    """
    return load(path, sample_rate)[0]


def load(path, sample_rate):
    """`decode`, and the rate the file had: returns (waveform (T,) float32, source rate in Hz)."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    try:
        with soundfile.SoundFile(os.fspath(path)) as file:
            rate, promised = file.samplerate, file.frames
            # Block by block: a 40-minute stereo track in one piece would need four times the memory.
            blocks = [block.mean(1) for block in file.blocks(1 << 20, dtype="float32", always_2d=True)]
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise ValueError(f"{path}: cannot be decoded: {reason}") from None
    x = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    if len(x) == 0:
        raise ValueError(f"{path}: no samples in it")
    if len(x) < 0.98 * promised:
        raise ValueError(f"{path}: cut off: its header promises {promised / rate:.1f} s, {len(x) / rate:.1f} s are there")
    bad = int((~np.isfinite(x)).sum())
    if bad:
        raise ValueError(f"{path}: {bad} of {len(x)} samples are NaN or infinite")
    x = resample(torch.from_numpy(x), rate, sample_rate)
    # Lossy codecs overshoot, some collections to twice full scale: turn such a file down, rather than distort it.
    return x / x.abs().max().clamp(min=1), rate


def resample(x, rate, new_rate):
    """Band-limited resampling of x (T,) from `rate` to `new_rate` (Hz) -> (ceil(T new_rate / rate),).

    >>> resample(torch.zeros(44100), 44100, 22050).shape
    torch.Size([22050])
    """
    if rate == new_rate:
        return x
    common = math.gcd(rate, new_rate)
    if rate // common <= 2000:
        return torchaudio.functional.resample(x, rate, new_rate)
    # An odd rate (44,099 Hz) would need a filter bank of gigabytes: there, cut the spectrum instead. The transform must
    # span a whole number of periods of both rates, and a little silence keeps the end from ringing into the start.
    step = rate // common
    n = (len(x) // step + 2) * step
    m = n // step * (new_rate // common)
    spectrum = torch.fft.rfft(x, n)
    return torch.fft.irfft(spectrum[: m // 2 + 1], m)[: math.ceil(len(x) * new_rate / rate)] * (m / n)


# ----------------------------------------------------------------------------------------------------------- readers

@dataclass
class Clip:
    """One recording of a data set: what to decode and what is known about it."""
    file: Path
    id: str               # its name in clips.npz
    split: str = "train"  # train, valid, test
    group: str = ""       # the song; by default the clip is a song of its own
    tags: tuple = ()      # names


class Listing(list):
    """A list of `Clip`, with what holds for the data set as a whole.

    Attributes: task (multilabel, singlelabel, none), tags (list of str, in order), split_name (str, where the split
    comes from), skipped (list of {file, reason}: known before decoding), expected (set of ids known to be broken).
    """

    def __init__(self, clips, task="none", tags=(), split_name="all train", skipped=(), expected=()):
        super().__init__(clips)
        self.task, self.tags, self.split_name = task, list(tags), split_name
        self.skipped, self.expected = list(skipped), set(expected)


def read_folder(root, labels=None):
    """Any directory of audio, searched recursively, with or without a table of labels.

    Args:
        root: the directory.
        labels: a CSV with a column `file` (relative to root), optionally `split` (train, valid, test) and `group` (clips
            of one song share it), and either `tags` ("a; b; c"), or `label`, or one column of 0/1 per tag. Beside `tags`
            or `label` further columns are ignored. Without `split`, labelled songs are dealt 80 : 10 : 10 by a hash of
            their group, so the same song always lands in the same split.

    Returns:
        Listing: one Clip per audio file; without labels all of them train.
    """
    root = Path(root)
    files = {}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix.lower() in AUDIO and not name.startswith("."):
                files[unicodedata.normalize("NFC", path.relative_to(root).as_posix())] = path
    if not files:
        raise FileNotFoundError(f"{root}: expected audio files, found none (looked for {' '.join(sorted(AUDIO))})")
    if labels is None:
        return Listing([Clip(path, name, group=name) for name, path in sorted(files.items())])

    labels = Path(labels)
    try:
        with open(labels, newline="", encoding="utf-8-sig") as file:
            header = file.readline()
            file.seek(0)
            table = csv.DictReader(file, delimiter=max(",;\t", key=header.count))
            columns, rows = list(table.fieldnames or []), list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{labels}: expected a CSV in UTF-8: {error}") from None
    if "file" not in columns:
        raise ValueError(f"{labels}: expected a column `file`, found {', '.join(columns) or 'nothing'}")
    if "tags" in columns and "label" in columns:
        raise ValueError(f"{labels}: has a column `tags` and a column `label`: keep one, and rename the other")
    if "tags" in columns:
        task, names = "multilabel", None
    elif "label" in columns:
        task, names = "singlelabel", None
    else:
        names = [column for column in columns if column and column not in ("file", "split", "group")]
        task = "multilabel" if names else "none"

    clips, skipped, seen = [], [], {}
    for line, row in enumerate(rows, 2):
        where = f"{labels}, line {line}"
        name = unicodedata.normalize("NFC", (row["file"] or "").strip().removeprefix("./"))
        if name in seen:
            raise ValueError(f"{where}: {name} stands there twice, first in line {seen[name]}")
        seen[name] = line
        if "tags" in columns:
            tags = tuple(tag.strip() for tag in (row["tags"] or "").split(";") if tag.strip())
        elif "label" in columns:
            tags = ((row["label"] or "").strip(),)
            if not tags[0]:
                raise ValueError(f"{where}: {name} has no label")
        else:
            for column in names:
                if (row[column] or "").strip() not in ("0", "1"):
                    raise ValueError(f"{where}: expected 0 or 1 in the tag column `{column}`, found {row[column]!r}; "
                                     "for other columns to be ignored, give the tags in a column `tags` or `label`")
            tags = tuple(column for column in names if row[column].strip() == "1")
        group = (row.get("group") or "").strip() or name
        split = {"validation": "valid", "val": "valid"}.get((row.get("split") or "").strip(), (row.get("split") or "").strip())
        if "split" not in columns:
            bucket = hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()[0] if task != "none" else 0
            split = "train" if bucket < 205 else "valid" if bucket < 230 else "test"
        if split not in SPLITS:
            raise ValueError(f"{where}: expected train, valid or test in the column `split`, found {split!r}")
        if name in files:
            clips.append(Clip(files.pop(name), name, split, group, tags))
        else:
            skipped.append({"file": name, "reason": "missing: in the labels, not in the folder"})
    skipped += [{"file": name, "reason": f"no row in {labels.name}"} for name in sorted(files)]
    if not clips:
        raise FileNotFoundError(f"{labels}: none of its {len(rows)} files is in {root}; the column `file` is relative to --root")
    if names is None:
        names = sorted({tag for clip in clips for tag in clip.tags})
    split_name = f"split column of {labels.name}" if "split" in columns else "80:10:10 by song" if task != "none" else "all train"
    return Listing(sorted(clips, key=lambda clip: clip.id), task, names, split_name, skipped)


def read_demo(root=None):
    """The freely licensed music shipped with this repository: who composed it?"""
    root = Path(root or HERE / "demo")
    return read_folder(root, root / "labels.csv")


DATASETS = {"folder": read_folder, "demo": read_demo}


# ------------------------------------------------------------------------------------------------ the prepared folder

def write(listing, out, sample_rate=SAMPLE_RATE, segment=None, workers=None, max_skipped=0.01, timeout=300.0,
          command="", progress=True, load=load):
    """Decode a listing into a prepared folder.

    Args:
        listing (Listing): from a reader of `DATASETS`.
        out: the folder to make. The work stands in `out.partial` and is moved into place when complete; what an
            interrupted run has decoded there is not decoded again.
        sample_rate (int): Hz.
        segment (float, optional): cut longer files into clips of so many seconds of the same song. A rest shorter than
            half of it stays with the clip before.
        workers (int, optional): decoding processes; by default one per core.
        max_skipped (float): the largest share of files that may be unusable, in [0, 1]; more is an error, and nothing is
            put in place.
        timeout (float): seconds after which a decoder is given up and its file skipped.
        command (str): kept in the meta.
        progress (bool): show a bar on stderr.
        load: `load` or a function like it.

    Returns:
        dict: the meta, as in meta.json.

    Raises:
        FileExistsError: out holds something else, or another run is working on it.
        ValueError: too many files skipped, or no usable file.
        OSError: the disk is full.
    """
    out = Path(out)
    part = out.with_name(out.name + ".partial")
    plan = {"format": FORMAT, "sample_rate": sample_rate, "segment": segment, "task": listing.task, "tags": listing.tags,
            "clips": [[c.id, c.split, c.group, c.tags, *_stamp(c.file)] for c in listing]}
    plan = hashlib.sha256(json.dumps(plan).encode()).hexdigest()
    part.mkdir(parents=True, exist_ok=True)
    lock = open(part / "lock", "a")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise FileExistsError(f"{out}: another run is preparing it; wait for it, or give another --name") from None
    with lock:
        if (out / "meta.json").exists():
            meta = json.loads((out / "meta.json").read_text())
            if meta["plan"] == plan:
                shutil.rmtree(part)
                return meta
            shutil.rmtree(part)
            raise FileExistsError(f"{out}: is already there, made from other files or flags ({meta['command']}); "
                                  f"give another --name, or remove it: rm -r {shlex.quote(str(out))}")
        done = _resume(part, plan)
        _decode_all(listing, part, done, sample_rate, segment, workers, timeout, progress, load)
        meta = _finish(listing, part, out, done, plan, sample_rate, max_skipped, command)
        (part / "lock").unlink()
        os.replace(part, out)
    return meta


def _stamp(path):
    """Size and time of change: a file that was exchanged between two runs must not pass for the one decoded before."""
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except OSError:
        return None, None


def _resume(part, plan):
    """What a run before this one has finished: journal lines whose samples are all in audio.npy. The rest is cut off."""
    done, size = [], 128
    if (part / "plan").exists() and (part / "plan").read_text() == plan and (part / "audio.npy").exists():
        there, lines, keep = os.path.getsize(part / "audio.npy"), (part / "journal.jsonl").read_bytes().splitlines(True), 0
        for line in lines:
            try:
                entry = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                entry = None
            if entry is None or size + 2 * sum(entry["lengths"]) > there:
                break
            done.append(entry)
            size += 2 * sum(entry["lengths"])
            keep += len(line)
        os.truncate(part / "journal.jsonl", keep)
        os.truncate(part / "audio.npy", size)
    else:
        (part / "audio.npy").write_bytes(bytes(128))  # room for the header, which needs the final length
        (part / "journal.jsonl").write_bytes(b"")
        (part / "plan").write_text(plan)
    return done


def _decode_all(listing, part, done, sample_rate, segment, workers, timeout, progress, load):
    """Decode what is not done by a pool of processes; append samples and journal in the order of the listing."""
    segment = round(segment * sample_rate) if segment else None
    jobs = [(str(clip.file), sample_rate, segment) for clip in listing]
    bar = tqdm(total=len(jobs), initial=len(done), unit="file", desc="decoding", disable=not progress,
               mininterval=0.5 if sys.stderr.isatty() else 15)
    with bar, open(part / "audio.npy", "ab") as audio, open(part / "journal.jsonl", "ab") as journal:
        for entry, samples in _pool(jobs, len(done), workers or os.cpu_count() or 1, timeout, load):
            # Samples first, then the journal line that vouches for them.
            audio.write(samples)
            audio.flush()
            journal.write(json.dumps(entry).encode() + b"\n")
            journal.flush()
            done.append(entry)
            bar.update()
        os.fsync(audio.fileno())


def _pool(jobs, first, workers, timeout, load):
    """Yield (entry, samples) for jobs[first:], in order.

    Not multiprocessing.Pool: there, a decoder that crashes or hangs takes the whole run with it. Here every worker has a
    pipe of its own; one that dies or oversleeps is replaced, and the file it had is the only one lost.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    workers = max(1, min(workers, len(jobs) - first))
    running, ready, held = {}, {}, 0  # pipe -> [process, job, deadline]; job -> result; bytes in ready
    following, turn = first, first

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, load), daemon=True)
        process.start()
        theirs.close()
        running[ours] = [process, None, math.inf]

    def stop(pipe):
        process = running.pop(pipe)[0]
        process.kill()
        process.join()
        pipe.close()
        return process.exitcode

    try:
        for _ in range(workers):
            start()
        while turn < len(jobs):
            for pipe, slot in running.items():
                # One slow file holds up the others' results: let them run ahead, but not out of memory.
                if slot[1] is None and following < len(jobs) and held < 1 << 29:
                    pipe.send(jobs[following])
                    slot[1:] = following, time.monotonic() + timeout
                    following += 1
            deadline = min(slot[2] for slot in running.values())
            for pipe in wait(list(running), max(0.0, min(deadline - time.monotonic(), 3600))):
                job = running[pipe][1]
                try:
                    entry, samples = pipe.recv(), pipe.recv_bytes()
                    running[pipe][1:] = None, math.inf
                except (EOFError, OSError):
                    code = stop(pipe)
                    entry, samples = {"lengths": [], "reason": f"broken: it crashes the decoder (exit {code})"}, b""
                    start()
                ready[job] = entry, samples
                held += len(samples)
            for pipe in [pipe for pipe, slot in running.items() if slot[2] < time.monotonic()]:
                ready[running[pipe][1]] = {"lengths": [], "reason": f"broken: not decoded after {timeout:g} s"}, b""
                stop(pipe)
                start()
            while turn in ready:
                entry, samples = ready.pop(turn)
                held -= len(samples)
                yield entry, samples
                turn += 1
    finally:
        for pipe in list(running):
            stop(pipe)


def _worker(pipe, load):
    """A decoding process: (file, rate, segment) in, (journal entry, int16 bytes) out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders talk on stderr, into the progress bar
    torch.set_num_threads(1)
    while True:
        try:
            file, sample_rate, segment = pipe.recv()
        except EOFError:
            return
        try:
            waveform, rate = load(file, sample_rate)
            peak = float(waveform.abs().max())
            samples = (waveform * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16).numpy()
        except Exception as error:  # whatever a decoder throws costs this file alone
            reason = str(error).replace(f"{file}: ", "") or type(error).__name__
            pipe.send({"lengths": [], "reason": f"missing: {reason}" if isinstance(error, FileNotFoundError) else f"broken: {reason}"})
            pipe.send_bytes(b"")
            continue
        parts = np.split(samples, range(segment, len(samples) - segment // 2, segment)) if segment else [samples]
        pipe.send({"lengths": [len(p) for p in parts], "sha256": [hashlib.sha256(p).hexdigest() for p in parts], "rate": rate,
                   "peak": peak, "clipped": float((np.abs(samples.astype(np.int32)) >= FULL_SCALE - 1).mean())})
        pipe.send_bytes(samples.tobytes())


def _finish(listing, part, out, done, plan, sample_rate, max_skipped, command):
    """Write the header of audio.npy, clips.npz and meta.json into the partial folder; refuse when too much was skipped."""
    skipped = list(listing.skipped) + [{"file": clip.id, "reason": entry["reason"]}
                                       for clip, entry in zip(listing, done) if "reason" in entry]
    lost = [s for s in skipped if not s["reason"].startswith("no row") and s["file"] not in listing.expected]
    total = len(listing) + len([s for s in listing.skipped if s in lost])
    if not any(entry["lengths"] for entry in done):
        raise ValueError(f"no usable file among {total}; the first: {skipped[0]['file']}: {skipped[0]['reason']}")
    if len(lost) > max_skipped * total:
        raise ValueError(f"{len(lost)} of {total} files cannot be used, more than --max-skipped {max_skipped:.3g} allows; the first: "
                         f"{lost[0]['file']}: {lost[0]['reason']} (repair them, or type --max-skipped {math.ceil(1e4 * len(lost) / total) / 1e4:g}; "
                         "nothing will be decoded twice)")
    song, tag = {}, {name: k for k, name in enumerate(listing.tags)}
    rows, labels, ids, digests = [], [], [], []
    start = 0
    for clip, entry in zip(listing, done):
        group = song.setdefault(clip.group or clip.id, len(song))
        offset = 0
        for length, digest in zip(entry["lengths"], entry.get("sha256", [])):
            rows.append((start, length, SPLITS.index(clip.split), group))
            labels.append([name in clip.tags for name in tag])
            ids.append(clip.id if len(entry["lengths"]) == 1 else f"{clip.id}@{offset / sample_rate:.6g}")
            digests.append(list(bytes.fromhex(digest)))
            start, offset = start + length, offset + length
    rows = np.array(rows, np.int64)
    arrays = {"start": rows[:, 0], "length": rows[:, 1], "split": rows[:, 2].astype(np.uint8), "group": rows[:, 3],
              "labels": np.array(labels, np.uint8).reshape(len(rows), len(tag)), "id": np.array(ids),
              "sha256": np.array(digests, np.uint8)}
    count = lambda what: {name: what(rows[rows[:, 2] == i]) for i, name in enumerate(SPLITS)}
    meta = {"format": FORMAT, "name": out.name, "sample_rate": sample_rate, "task": listing.task, "tags": listing.tags,
            "split_name": listing.split_name, "clips": count(len), "songs": count(lambda r: len(set(r[:, 3].tolist()))),
            "hours": count(lambda r: round(float(r[:, 1].sum()) / sample_rate / 3600, 4)),
            "skipped": skipped, "fingerprint": fingerprint(arrays, sample_rate, listing.tags), "plan": plan, "command": command}
    with open(part / "audio.npy", "r+b") as audio:
        np.lib.format.write_array_header_1_0(audio, {"descr": "<i2", "fortran_order": False, "shape": (start,)})
        assert audio.tell() == 128
    np.savez(part / "clips.npz", **arrays)
    (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    (part / "journal.jsonl").unlink()
    (part / "plan").unlink()
    return meta


def fingerprint(arrays, sample_rate, tags):
    """sha256 over everything that training and evaluation can see: samples, splits, songs, labels, rate, tags in order."""
    digest = hashlib.sha256(json.dumps([sample_rate, list(tags), arrays["id"].tolist()]).encode())
    for key in ("length", "split", "group", "labels", "sha256"):
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return digest.hexdigest()


def find(data):
    """The prepared folder that a name under data/ or a path means, as a Path; FileNotFoundError says what to type.

    >>> find("never-prepared")
    Traceback (most recent call last):
    FileNotFoundError: never-prepared: expected a folder made by prepare.py at data/never-prepared or never-prepared, found none; type: python prepare.py --data folder --root MUSIC --name never-prepared
    """
    for folder in (Path("data") / str(data), Path(data)):
        if (folder / "meta.json").is_file():
            return folder
    name = Path(data).name
    hint = f"--data {name}" + (" --root FOLDER" if name != "demo" else "") if name in DATASETS else f"--data folder --root MUSIC --name {name}"
    raise FileNotFoundError(f"{data}: expected a folder made by prepare.py at {Path('data') / str(data)} or {data}, found none; "
                            f"type: python prepare.py {hint}")


class Clips:
    """The clips of a prepared folder, or of one of its splits.

    Args:
        folder: as `find` returns it.
        split: train, valid, test, or None for all.

    Attributes: labels (N, K) uint8, group (N,) int64, length (N,) int64 samples, id (N,) str, split (N,) uint8 0 train
    1 valid 2 test, sha256 (N, 32) uint8 of the samples, tags, task, sample_rate, fingerprint, name, meta, folder. Tables are
    numpy arrays, audio is torch. Indices count inside this view. Waveforms stay on disk and are mapped, so an object is
    small, and may be given to other processes.
    """

    def __init__(self, folder, split=None):
        self.folder = Path(folder)
        if split is not None and split not in SPLITS:
            raise ValueError(f"expected split {', '.join(SPLITS)} or None, got {split!r}")
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text())
            with np.load(self.folder / "clips.npz") as file:
                arrays = {key: file[key] for key in file.files}
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder}: expected a folder made by prepare.py, but {Path(error.filename).name} is missing") from None
        except Exception as error:
            raise ValueError(f"{folder}: expected a folder made by prepare.py, but it cannot be read: {error}") from None
        if self.meta.get("format") != FORMAT:
            raise ValueError(f"{folder}: expected format {FORMAT}, found {self.meta.get('format')}; prepare it again")
        chosen = slice(None) if split is None else arrays["split"] == SPLITS.index(split)
        for key in ("start", "length", "split", "group", "labels", "id", "sha256"):
            setattr(self, key, arrays[key][chosen])
        for key in ("tags", "task", "sample_rate", "fingerprint", "name"):
            setattr(self, key, self.meta[key])
        self._audio = None

    def __len__(self):
        return len(self.length)

    def __getstate__(self):
        return {**self.__dict__, "_audio": None}  # each process maps the file for itself

    @property
    def audio(self):
        """All samples, int16, memory-mapped: clip i is audio[start[i] : start[i] + length[i]]."""
        if self._audio is None:
            self._audio = np.load(self.folder / "audio.npy", mmap_mode="r")
        return self._audio

    def waveform(self, i):
        """Clip i as (T,) float32 in [-1, 1)."""
        i = int(i)
        if not 0 <= i < len(self):
            raise ValueError(f"expected a clip in 0 .. {len(self) - 1}, got {i}")
        return torch.from_numpy(self.audio[self.start[i] : self.start[i] + self.length[i]].astype(np.float32)).div_(FULL_SCALE)

    def crops(self, index, start, n_samples):
        """Cut one crop out of each of several clips.

        Args:
            index: B integers, which clip (array, tensor or list; a clip may stand there several times).
            start: B integers, the crop's first sample within its clip.
            n_samples (int): the length of every crop.

        Returns:
            torch.Tensor: (B, 1, n_samples) float32 in [-1, 1).

        Raises:
            ValueError: a crop that is not wholly inside its clip: it would be filled from the neighbour.
        """
        index, start = np.asarray(index, np.int64).reshape(-1), np.asarray(start, np.int64).reshape(-1)
        if len(index) != len(start):
            raise ValueError(f"expected one start per clip, got {len(start)} for {len(index)}")
        if len(index) and not (0 <= index.min() and index.max() < len(self)):
            raise ValueError(f"expected clips in 0 .. {len(self) - 1}, got {index.min()} .. {index.max()}")
        outside = np.flatnonzero((start < 0) | (start + n_samples > self.length[index]))
        if len(outside):
            b = outside[0]
            raise ValueError(f"crop {start[b]} .. {start[b] + n_samples} is not inside clip {self.id[index[b]]} of {self.length[index[b]]} samples")
        rows = np.empty((len(index), n_samples), np.int16)
        for row, first in zip(rows, (self.start[index] + start).tolist()):
            row[:] = self.audio[first : first + n_samples]
        return torch.from_numpy(rows).to(torch.float32).div_(FULL_SCALE).unsqueeze(1)  # (B, 1, n)


def check(folder, progress=False):
    """Read a prepared folder again, every sample of it, and compare with what was written.

    Returns:
        list of str: what is wrong, one line each; empty when all is as it was written.
    """
    clips = Clips(folder)
    try:
        audio = clips.audio
    except (OSError, ValueError) as error:
        return [f"audio.npy cannot be read: {error}"]
    if len(audio) != clips.length.sum():
        return [f"audio.npy: expected {clips.length.sum()} samples, found {len(audio)}"]
    wrong = []
    for i in tqdm(range(len(clips)), desc="checking", unit="clip", disable=not progress):
        samples = audio[clips.start[i] : clips.start[i] + clips.length[i]]
        if hashlib.sha256(np.ascontiguousarray(samples)).digest() != clips.sha256[i].tobytes():
            wrong.append(f"{clips.id[i]}: its samples have changed")
    if fingerprint(vars(clips), clips.sample_rate, clips.tags) != clips.fingerprint:
        wrong.append("clips.npz or the tags in meta.json have changed: the fingerprint does not fit")
    return wrong


# ----------------------------------------------------------------------------------------------------------- program

def summary(meta):
    """The closing table of a prepared folder, as text."""
    lines = [f"{'':8}{'clips':>9}{'songs':>9}{'hours':>9}"]
    for split in SPLITS:
        lines.append(f"{split:8}{meta['clips'][split]:>9,}{meta['songs'][split]:>9,}{meta['hours'][split]:>9.2f}")
    if meta["skipped"]:
        lines.append(f"skipped {len(meta['skipped'])}:")
        lines += [f"  {s['file']}: {s['reason']}" for s in meta["skipped"][:20]]
        lines += [f"  ... and {len(meta['skipped']) - 20} more, all in meta.json"] if len(meta["skipped"]) > 20 else []
    lines.append(f"{meta['task']}, {len(meta['tags'])} tags, split: {meta['split_name']}, {meta['sample_rate']} Hz")
    return "\n".join(lines + [f"fingerprint {meta['fingerprint']}"])


def build_parser():
    parser = argparse.ArgumentParser(
        description="Turn a collection of recordings into a prepared folder under data/.", allow_abbrev=False,
        usage="python prepare.py --data NAME [--root DIR] [options]   (all of them: --help)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=sorted(DATASETS), help="which reader")
    data.add_argument("--root", type=Path, help="where the recordings are")
    data.add_argument("--labels", type=Path, metavar="FILE.csv", help="folder: columns file, [split], [group], and tags, or label, or a 0/1 column per tag")
    data.add_argument("--name", help="name of the prepared folder under data/ (default: the data set's, or that of --root)")
    data.add_argument("--out", type=Path, help="the prepared folder itself, instead of data/NAME")
    data.add_argument("--segment", type=float, metavar="SECONDS", help="cut longer files into clips of the same song")
    data.add_argument("--sample-rate", type=int, default=SAMPLE_RATE, help="Hz")
    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding processes")
    run.add_argument("--max-skipped", type=float, default=0.01, help="share of files that may be unusable; more is an error")
    run.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="give a file up after so long")
    run.add_argument("--check", metavar="NAME", help="verify a prepared folder and stop")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # file names in any encoding
    try:
        if args.check:
            try:
                folder = find(args.check)
            except FileNotFoundError as error:
                parser.error(str(error))
            wrong = check(folder, progress=True)
            print("\n".join(wrong[:20]) if wrong else summary(Clips(folder).meta))
            print(f"{folder}: " + (f"{len(wrong)} faults" if wrong else "as it was written"))
            return 1 if wrong else 0
        if not args.data:
            parser.error("expected --data " + "|".join(sorted(DATASETS)) + ", or --check NAME")
        if not args.root and args.data != "demo":
            parser.error(f"--data {args.data} needs --root DIR, the folder with the recordings")
        for path in (args.root, args.labels):
            if path and not path.exists():
                parser.error(f"{path}: no such file or folder")
        if args.labels and args.data != "folder":
            parser.error(f"--labels goes with --data folder; {args.data} brings its own")
        for flag, value in (("--workers", args.workers), ("--timeout", args.timeout), ("--sample-rate", args.sample_rate),
                            ("--segment", args.segment)):
            if value is not None and not value > 0:
                parser.error(f"{flag}: expected a number above 0, got {value}")
        name = args.name or (args.data if args.data != "folder" else args.root.resolve().name)
        out = args.out or Path("data") / name
        options = {"labels": args.labels} if args.data == "folder" else {}
        listing = DATASETS[args.data](args.root, **options)
        command = shlex.join(["python", "prepare.py", *(sys.argv[1:] if argv is None else argv)])
        meta = write(listing, out, args.sample_rate, args.segment, args.workers, args.max_skipped, args.timeout, command)
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{out}\n{summary(meta)}")
    print(f"next: python pretrain.py --data {name if out == Path('data') / name else out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
