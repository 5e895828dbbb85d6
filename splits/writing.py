"""Write a prepared folder: decode a listing, keep what is done whatever ends the run, judge the
losses.

prepare.py calls `write` and hands in how a recording is decoded; imports nothing of ours. Until it
is complete the folder is NAME.partial with

    audio.npy      room for a header, then the samples of the recordings that are done
    journal.jsonl  a line for each of them: id, size of the file, lengths and sha256 of its clips
    plan           what the samples depend on; another one begins anew
    lock           one run at a time

A line vouches for samples that stand before it. An interrupted run compares them with its hashes,
so that a power cut costs the last files, not the truth.
"""

import contextlib
import errno
import functools
import hashlib
import heapq
import json
import math
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from tqdm import tqdm

from .formats import Survey
from .prepared import SPLITS, seal
from .workers import Lost, in_processes

try:
    import fcntl  # POSIX only: the lock that keeps two runs out of one folder
except ImportError:
    fcntl = None

HEADER = 128  # bytes of audio.npy before its first sample
FULL_SCALE = 32768  # int16 sample = waveform x 32768
SYNC = 10.0  # seconds between writes that are sure to have reached the disk
TELLING = {"test": 100, "valid": 30}  # songs from which on a split begins to mean something


def write(listing, target: Path, options) -> dict:
    """See prepare.write."""
    out = target.resolve() if target.is_symlink() else target  # beside what the link points to
    recipe = (f"{options.sample_rate} Hz, segments of {options.segment} s, "
              f"recordings {_sample(listing)}")
    plan = _plan(listing, recipe)
    if (out / "meta.json").exists():
        return _finished(out, plan)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a prepared folder or nothing, found something "
                              "else; give another --name")
    folder = Path(f"{out}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder, out):
        journal = Journal(folder, recipe, listing)
        todo = [clip for clip in listing if clip.id not in journal.entries]
        _check_space(out, folder, todo, options)
        _decode_all(todo, len(listing), journal, options)
        tables = _tables(listing, journal.entries, options.sample_rate)
        skipped = _skipped(listing, journal.entries)
        _judge(listing, skipped, options.max_skipped)
        meta = {"name": target.name, "sample_rate": options.sample_rate, "plan": plan,
                "command": options.command, **_about(listing, tables, options.sample_rate),
                "skipped": skipped,
                "report": _report(listing, tables, skipped, options.sample_rate)}
        for clip in listing:
            for note in journal.entries[clip.id][1].get("notes", ()):
                meta["report"].setdefault(note.partition(":")[0], []).append(clip.id)
        meta = seal(folder, tables, meta)
        _install(folder, out)
    return meta


def _finished(out, plan):
    """The meta of a folder that is there, if it is the one that was asked for."""
    meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
    if meta.get("plan") != plan:
        raise FileExistsError(f"{out}: is there already, made from other files or flags "
                              f"({meta.get('command')}); give another --name, or remove it: "
                              f"rm -r {shlex.quote(str(out))}")
    return meta


def _plan(listing, recipe):
    """A hash of all that a prepared folder depends on."""
    whole = [recipe, listing.task, listing.tags, listing.skipped]
    digest = hashlib.sha256(json.dumps(whole).encode())
    for clip in listing:
        about = [clip.id, clip.split, clip.group, clip.tags, _size(clip)]
        digest.update(json.dumps([*about, clip.artist] if clip.artist else about).encode())
    return digest.hexdigest()


def _size(clip):
    return clip.file.stat().st_size if clip.file and clip.file.exists() else 0


def _bytes(name):
    return name.encode("utf-8", "surrogateescape")


def _sample(clips):
    """A hash of some bytes of up to 16 files, so that a second folder of the same names and sizes
    is not taken for the first. They are chosen by their names: a file that comes in hardly changes
    the choice."""
    digest = hashlib.sha256()
    chosen = heapq.nsmallest(16, clips, lambda clip: hashlib.sha256(_bytes(clip.id)).digest())
    for clip in chosen:
        # One that cannot be read is listed later, with its reason.
        with contextlib.suppress(OSError), open(clip.file, "rb") as raw:
            raw.seek(_size(clip) // 2)
            digest.update(raw.read(1 << 12))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _locked(folder, out):
    """Hold the folder's lock; FileExistsError where another run holds it."""
    with open(folder / "lock", "a") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"{out}: another run is preparing it; wait, or give another "
                                  "--name") from None
        yield


class Journal:
    """Samples and journal of a folder that is being prepared.

    entries: {id: (first sample, entry)} of the recordings that are done. Those that crashed or held
    the decoder in an earlier run are not among them: they are tried again.
    """

    def __init__(self, folder, recipe, clips):
        self.folder = folder
        self.audio = folder / "audio.npy"
        self.lines = folder / "journal.jsonl"
        self.entries = {}
        self.samples = 0
        self.synced = time.monotonic()
        for stray in folder.glob("decoded-*"):
            stray.unlink()
        plan = folder / "plan"
        fits = plan.exists() and plan.read_text(encoding="utf-8") == recipe
        if fits and self.audio.exists() and self.lines.exists():
            self._resume({clip.id: _size(clip) for clip in clips})
        else:
            self.audio.write_bytes(bytes(HEADER))  # room: the header needs the final length
            self.lines.write_bytes(b"")
            plan.write_text(recipe, encoding="utf-8")

    def _resume(self, sizes):
        """Cut both files back to what is whole, of the files that are there now."""
        kept = 0
        with open(self.audio, "rb") as audio, open(self.lines, "rb") as lines:
            audio.seek(HEADER)
            for line in lines:
                entry = _entry(line)
                if not entry or sizes.get(entry["id"]) != entry["size"] or not _fits(audio, entry):
                    break
                if not entry.get("again"):
                    self._note(entry)
                kept += len(line)
        os.truncate(self.audio, HEADER + 2 * self.samples)
        os.truncate(self.lines, kept)

    def _note(self, entry):
        self.entries[entry["id"]] = (self.samples, entry)
        self.samples += sum(entry["lengths"])

    def append(self, entry, samples):
        """Add a recording: its entry, and the file with its samples, which goes."""
        with open(self.audio, "ab") as audio, open(self.lines, "ab") as lines:
            if entry["lengths"]:
                with open(samples, "rb") as source:
                    shutil.copyfileobj(source, audio, 1 << 20)
            audio.flush()
            lines.write(json.dumps(entry).encode() + b"\n")
            lines.flush()
            if time.monotonic() > self.synced + SYNC:
                os.fsync(audio.fileno())
                os.fsync(lines.fileno())
                self.synced = time.monotonic()
        Path(samples).unlink(missing_ok=True)
        self._note(entry)


def _entry(line):
    """A line of the journal, or None where it is not whole."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
        return entry if {"id", "size", "lengths"} <= set(entry or ()) else None
    except ValueError:
        return None


def _fits(audio, entry):
    """Are the next samples of an open file those that an entry vouches for?"""
    for length, digest in zip(entry["lengths"], entry.get("sha256", [])):
        if _sha256(audio, 2 * length) != digest:
            return False
    return True


def _sha256(file, n):
    """Of the next n bytes of an open file."""
    digest = hashlib.sha256()
    while n > 0 and (data := file.read(min(n, 1 << 20))):
        digest.update(data)
        n -= len(data)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------- decoding

def _decode_all(clips, total, journal, options):
    """Decode recordings into the journal, in several processes."""
    segment = round(options.segment * options.sample_rate) if options.segment else None
    targets = [str(journal.folder / f"decoded-{k}") for k in range(len(clips))]
    jobs = [Job(str(clip.file), options.sample_rate, segment, target)
            for clip, target in zip(clips, targets)]
    results = in_processes(functools.partial(convert, stream=options.stream), jobs,
                           options.workers or os.cpu_count() or 1, options.timeout)
    quiet = sys.stderr is None or not options.progress
    often = 0.5 if not quiet and sys.stderr.isatty() else 15
    with tqdm(total=total, initial=total - len(clips), unit="file", desc="decoding", disable=quiet,
              mininterval=often, file=None if quiet else Stderr()) as bar:
        for clip, target, entry in zip(clips, targets, results):
            if isinstance(entry, Lost):
                entry = {"lengths": [], "reason": f"broken: {entry.reason}", "again": True}
            try:
                if "unwritten" in entry:
                    raise OSError(errno.ENOSPC, entry["unwritten"])
                journal.append({**entry, "id": clip.id, "size": _size(clip)}, target)
            except OSError as error:
                need = 2 * journal.samples / max(1, bar.n) * (total - bar.n) / 1e9
                free = shutil.disk_usage(journal.folder).free / 1e9
                raise OSError(f"{journal.folder}: cannot be written: {error.strerror}; needs "
                              f"{need:.2f} GB more, has {free:.2f}; what is done is kept, the same "
                              "command continues") from None
            bar.update()


class Stderr:
    """sys.stderr, whose reader may have gone, or whose disk may be full: no reason to stop."""

    def write(self, text):
        """Write text, or let it be."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self):
        """Flush, or let it be."""
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


@dataclass
class Job:
    """What a decoding process is asked for."""
    path: str
    sample_rate: int  # Hz
    segment: int      # samples, or None
    target: str       # the file to write


def convert(job: Job, stream: Callable) -> dict:
    """Decode one recording into a file of int16 samples; its journal entry, without id and size."""
    survey = Survey()
    length = 0
    try:
        with open(job.target, "wb") as file:
            for piece in stream(job.path, job.sample_rate, survey):
                samples = (piece * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1)
                samples = samples.to(torch.int16)
                length += len(samples)
                try:
                    file.write(samples.numpy().tobytes())
                    file.flush()
                except OSError as error:
                    return {"unwritten": error.strerror}
    except Exception as error:  # whatever a decoder throws costs this file alone
        reason = str(error).replace(f"{job.path}: ", "") or repr(error)
        kind = "missing" if isinstance(error, FileNotFoundError) else "broken"
        return {"lengths": [], "reason": f"{kind}: {reason}"}
    # Of segments the last one takes a rest below half of one.
    size = job.segment
    borders = range(size, length - size // 2, size) if size else ()
    lengths = np.diff([0, *borders, length]).tolist()
    with open(job.target, "rb") as file:
        digests = [_sha256(file, 2 * n) for n in lengths]
    return {"lengths": lengths, "sha256": digests, **survey.facts()}


def estimate(clips: list, options) -> tuple[int, float]:
    """Bytes that a list of Clip will take, and seconds of one core, from decoding up to eight of
    them."""
    some = clips[:: max(1, len(clips) // 8)][:8]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job(str(clip.file), options.sample_rate, None, str(Path(folder, str(k))))
                for k, clip in enumerate(some)]
        decode = functools.partial(convert, stream=options.stream)
        entries = in_processes(decode, jobs, 1, min(options.timeout, 60))
        samples = sum(sum(entry["lengths"]) for entry in entries if not isinstance(entry, Lost))
    scale = sum(map(_size, clips)) / max(1, sum(map(_size, some)))
    return round(2 * samples * scale), (time.monotonic() - start) * scale


def _check_space(out, folder, todo, options):
    """OSError where the disk is too small; only where it may be, some files are decoded to find
    out."""
    free = shutil.disk_usage(folder).free
    if free < 60 * sum(map(_size, todo)):
        need, _ = estimate(todo, options)
        if free < need:
            raise OSError(f"{out}: about {need / 1e9:.2f} GB are needed there, "
                          f"{free / 1e9:.2f} GB are free")


# ---------------------------------------------------------------------------- tables, and judgement

KINDS = {"start": np.int64, "length": np.int64, "split": np.uint8, "group": np.int64, "id": object,
         "artist": object, "rate": np.int32, "peak": np.float32, "clipped": np.float32}


def _tables(listing, entries, sample_rate):
    """{column: array} of the clips that were decoded, in the order of the listing."""
    columns = {key: [] for key in KINDS}
    labels = bytearray()  # a list of rows would take ten times as much
    digests = bytearray()
    songs = {}
    for clip in listing:
        first, entry = entries.get(clip.id, (0, {"lengths": ()}))
        n = len(entry["lengths"])
        if not n:
            continue
        begins = np.cumsum([0, *entry["lengths"][:-1]]).tolist()
        columns["start"] += [first + begin for begin in begins]
        columns["length"] += entry["lengths"]
        columns["split"] += [SPLITS.index(clip.split)] * n
        columns["group"] += [songs.setdefault(clip.group or clip.id, len(songs))] * n
        names = [f"{clip.id}@{begin / sample_rate:.6g}" for begin in begins]
        columns["id"] += names if n > 1 else [clip.id]
        columns["artist"] += [clip.artist] * n
        labels += bytes(tag in clip.tags for tag in listing.tags) * n
        digests += bytes.fromhex("".join(entry["sha256"]))
        for key in ("rate", "peak", "clipped"):
            columns[key] += [entry[key]] * n
    tables = {key: np.array(column, KINDS[key]) for key, column in columns.items()}
    n = len(tables["id"])
    tables["labels"] = np.frombuffer(bytes(labels), np.uint8).reshape(n, len(listing.tags))
    tables["sha256"] = np.frombuffer(bytes(digests), np.uint8).reshape(n, 32)
    return tables


def _skipped(listing, entries):
    """[{file, reason}] of all that is listed and not in the tables."""
    skipped = listing.skipped
    for clip in listing:
        entry = entries[clip.id][1]
        if not entry["lengths"]:
            skipped.append({"file": clip.id, "reason": entry["reason"]})
    return skipped


def _judge(listing, skipped, max_skipped):
    """ValueError where nothing, or not enough, can be used."""
    harmless = ("no row", "left out")
    lost = [one for one in skipped
            if not one["reason"].startswith(harmless) and one["file"] not in listing.broken]
    total = len(listing) + len(listing.missing)
    first = f"; the first: {lost[0]['file']}: {lost[0]['reason']}" if lost else ""
    gone = {one["file"] for one in skipped}
    if all(clip.id in gone for clip in listing):
        raise ValueError(f"none of {total} files can be used{first}")
    if len(lost) > max_skipped * total:
        enough = math.ceil(1000 * len(lost) / total) / 1000
        raise ValueError(f"{len(lost)} of {total} files cannot be used, --max-skipped is "
                         f"{max_skipped:g}{first} (repair them, or type --max-skipped {enough:g}, "
                         "for which nothing is decoded twice)")


def _about(listing, tables, sample_rate):
    """What meta.json says of the data as a whole."""
    chosen = {split: tables["split"] == k for k, split in enumerate(SPLITS)}
    hour = 3600 * sample_rate
    hours = {split: tables["length"][rows].sum() / hour for split, rows in chosen.items()}
    songs = {split: len(np.unique(tables["group"][rows])) for split, rows in chosen.items()}
    return {"task": listing.task, "tags": listing.tags, "split_name": listing.split_name,
            "published": listing.published,
            "clips": {split: int(rows.sum()) for split, rows in chosen.items()},
            "songs": songs,
            "hours": {split: round(float(value), 4) for split, value in hours.items()}}


def _named(tables, chosen):
    return tables["id"][chosen].tolist()


def _report(listing, tables, skipped, sample_rate):
    """What is worth knowing about the recordings, {kind: count or names}."""
    reasons = Counter(one["reason"].split(":")[0] for one in skipped)
    report = {"found": len(listing), "missing": reasons["missing"], "broken": reasons["broken"],
              "no row": sum(n for reason, n in reasons.items() if reason.startswith("no row")),
              "left out": reasons["left out"]}
    repeated = np.unique(tables["sha256"], axis=0, return_index=True)[1]
    rates, counts = np.unique(tables["rate"], return_counts=True)
    report |= {"shorter than 3 s": _named(tables, tables["length"] < 3 * sample_rate),
               "silent": _named(tables, tables["peak"] < 1e-4),
               "clipped": _named(tables, tables["clipped"] > 1e-3),
               "turned down": _named(tables, tables["peak"] > 1),
               "duplicate": np.delete(tables["id"], repeated).tolist(),
               "rates": {str(hz): int(n) for hz, n in zip(rates, counts)}}
    report["hints"] = listing.hints + _small_splits(listing, tables)
    return report


def _small_splits(listing, tables):
    """Warnings about splits that are too small to tell anything."""
    hints = []
    for split, enough in TELLING.items() if listing.task != "none" else ():
        rows = tables["split"] == SPLITS.index(split)
        n = len(np.unique(tables["group"][rows]))
        if n < enough:
            doubt = f", chance moves a figure by {98 / math.sqrt(n):.0f} points" if n else ""
            hints.append(f"{split} has {n} songs{doubt}: it begins to tell something from {enough}")
    return hints


def forecast(listing, out: Path, options) -> str:
    """What a dry run says: files, hours, bytes, minutes."""
    size, seconds = estimate(listing, options)
    disk = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
    counts = Counter(clip.split for clip in listing)
    clips = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    skipped = len(listing.skipped)
    workers = options.workers or os.cpu_count()
    return (f"{len(listing):,} files ({clips}); {skipped:,} skipped before decoding\n"
            f"{out}: about {size / 2 / options.sample_rate / 3600:.1f} h, {size / 1e9:.2f} GB "
            f"({shutil.disk_usage(disk).free / 1e9:.2f} GB free)\n"
            f"about {seconds / 60:.1f} min of one core, {seconds / 60 / workers:.1f} min of "
            f"{workers}")


def describe(meta: dict) -> str:
    """The closing table of a prepared folder, as text."""
    lines = [f"{'':6}{'clips':>9}{'published':>11}{'songs':>9}{'hours':>9}"]
    for split, count in zip(SPLITS, meta["published"] or ("",) * 3):
        clips, songs, hours = (meta[key][split] for key in ("clips", "songs", "hours"))
        lines.append(f"{split:6}{clips:>9,}{count:>11}{songs:>9,}{hours:>9.2f}")
    for kind, files in meta["report"].items():
        if files and isinstance(files, list) and kind != "hints":
            files = f"{len(files)}: {', '.join(files[:3])}{', ...' * (len(files) > 3)}"
        if files and kind != "hints":
            lines.append(f"{kind}: {files}")
    lines += [f"  {one['file']}: {one['reason']}" for one in meta["skipped"][:20]]
    if len(meta["skipped"]) > 20:
        lines.append(f"  ... and {len(meta['skipped']) - 20} more, see meta.json")
    lines.append(f"{meta['task']}, {len(meta['tags'])} tags; split: {meta['split_name']}; "
                 f"{meta['sample_rate']} Hz")
    lines += [f"note: {hint}" for hint in meta["report"].get("hints", ())]
    lines.append(f"fingerprint {meta['fingerprint']}")
    return "\n".join(line.replace("\n", "\\n") for line in lines)  # a file may be named so


def _install(folder, out):
    """Move a folder that is complete into place."""
    _sync(folder)
    os.replace(folder, out)  # first: until it is in place, nothing that was decoded may get lost
    _sync(out.parent)
    for name in ("journal.jsonl", "plan", "lock"):
        (out / name).unlink(missing_ok=True)


def _sync(folder):
    """Make sure that the names in a folder have reached the disk."""
    with contextlib.suppress(OSError):  # Windows knows no such thing
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
