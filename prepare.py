"""Turn a collection of recordings into one prepared folder that trains at the speed of memory.

    python prepare.py --data demo                                                 # the music in this repository
    python prepare.py --data folder --root ~/music --name mine                    # any folder of audio, no labels
    python prepare.py --data folder --root ~/music --labels tags.csv --name mine  # with tags and splits, for evaluation
    python prepare.py --data mtat --root ~/magnatagatune --download               # a published data set, its own split
    python prepare.py --data msd --root ~/msd --dry-run                           # hours and bytes, before the work
    python prepare.py --data msd --root ~/msd --shard 2/4                         # a quarter on each of four machines,
    python prepare.py --data msd --root ~/msd --merge 4                           # joined: the same bytes as from one
    python prepare.py --check mine                                                # is data/mine still what was written?

Leaves `data/NAME/`, until it is complete as `data/NAME.partial/`; an interrupted run continues there:
    audio.npy   int16, 1-D: every clip's samples back to back, mono (memory-mapped, never loaded whole)
    clips.npz   start, length (int64, samples), split (uint8: 0 train, 1 valid, 2 test), group (int64: the song), labels
                (uint8, N x K), id (str), sha256 (uint8, N x 32: of the samples), and of the file rate, peak, clipped
    meta.json   format, name, sample_rate, task (multilabel, singlelabel, none), tags in order, clips / songs / hours per split,
                skipped [{file, reason}], report, fingerprint, the command that made it

A file becomes a clip as it is: decoded, averaged to mono, resampled (section 3.3 of the paper). Nothing is lost in
silence: each file that cannot be used is listed with its reason, and too many of them are an error.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import heapq
import json
import math
import mmap
import multiprocessing
import os
import queue
import re
import shlex
import shutil
import signal
import sys
import time
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

try:
    import fcntl  # POSIX only: the lock that keeps two runs out of one folder
except ImportError:
    fcntl = None

SAMPLE_RATE = 22050  # Hz, section 3.3; stands only here, then in the data's meta, then in the checkpoint
SPLITS = ("train", "valid", "test")
FORMAT = "clmr-data-1"  # of the prepared folder
FULL_SCALE = 32768  # int16 sample = waveform x 32768
HEADER = 128  # bytes of audio.npy before its first sample
AUDIO = set(".wav .w64 .rf64 .caf .aif .aiff .aifc .au .snd .flac .ogg .oga .opus .mp3 .mp2 .wave .m4a .m4b .aac .wma .wv .ape .mpc .tta".split())
HERE = Path(__file__).resolve().parent
COLUMNS = {"length": np.int64, "split": np.uint8, "group": np.int64, "labels": np.uint8, "id": str, "sha256": np.uint8,
           "rate": np.int32, "peak": np.float32, "clipped": np.float32}  # of clips.npz, and start


# ---------------------------------------------------------------------------------------------------------- decoding

def decode(path, sample_rate=SAMPLE_RATE):
    """Decode one file, of any format that libsndfile reads, any rate, any number of channels.

    Returns the mean of the channels at `sample_rate` (Hz), (T,) float32 in [-1, 1]: what a lossy codec lets overshoot
    full scale is turned down to a peak of 1, not distorted. Raises FileNotFoundError, and ValueError for no audio, no
    samples, a file cut off, and samples that are NaN or infinite; the message says which.
    """
    return load(path, sample_rate)[0]


def _read(path):
    """Yield (rate in Hz, mono samples (n,)) block by block, at the end an empty one; raise what `decode` raises."""
    path, n, wrong = Path(path), 0, 0
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty (0 bytes)")
    try:
        # As an open file: so names that are not UTF-8 open as well, and it can be asked what was left unread.
        with open(path, "rb", buffering=0) as raw, soundfile.SoundFile(raw.fileno(), closefd=False) as file:
            rate, promised, log = file.samplerate, file.frames, file.extra_info
            # Block by block: a 40-minute stereo track in one piece would take four times the memory. (Not by
            # SoundFile.blocks, which fills up a file that ends early with whatever is in memory.)
            while len(block := file.read(1 << 20, dtype="float32", always_2d=True)):
                block = block @ np.full(block.shape[1], 1 / block.shape[1], np.float32)
                n, wrong = n + len(block), wrong + int((~np.isfinite(block)).sum())
                yield rate, block
            behind, uncounted = (raw.read(), _uncounted_sync(path)) if file.format == "MP3" else (b"", b"")
    except (soundfile.SoundFileError, RuntimeError) as error:
        reason = str(getattr(error, "error_string", error)).strip().rstrip(".")
        raise ValueError(f"{path}: cannot be decoded: {reason}; libsndfile reads wav flac ogg opus mp3 aiff; "
                         "`ffmpeg -i IN OUT.flac` converts others") from None
    if n == 0:
        raise ValueError(f"{path}: no samples in it")
    size = re.search(r"(?:data|SSND) : (\d+) \(should be (\d+)\)", log)  # wav, aiff; a piped wav promises 2 or 4 GiB
    if size and int(size[1]) < 0x7F000000:
        promised *= int(size[1]) / max(1, int(size[2]))
    if uncounted and behind.count(uncounted) > 8:  # frames that libsndfile, which guesses the length, never read
        raise ValueError(f"{path}: the decoder stops after {n / rate:.1f} s, before the end: an mp3 of variable bit rate "
                         "without a count of its frames; `ffmpeg -i IN.mp3 -c copy OUT.mp3` adds one")
    if n < 0.98 * promised and not uncounted or ("lacks an end-of-stream bit" in log and "Junk after" in log):
        raise ValueError(f"{path}: cut off: it ends after {n / rate:.1f} s in the middle of the file")
    if wrong:
        raise ValueError(f"{path}: {wrong} of {n} samples are NaN or infinite")
    yield rate, np.zeros(0, np.float32)


def _uncounted_sync(path):
    """The first two bytes of an mp3's frames, where its first frame does not count them (as Xing, Info, VBRI); else b""."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # tags, often with a picture, stand before it; their size has seven bits a byte
            file.seek(10 + sum(byte << 7 * (3 - i) for i, byte in enumerate(head[6:10])))
            head = b""
        head += file.read(4096)
    sync = re.search(rb"\xff[\xe2-\xff]", head)
    return b"" if not sync or re.search(rb"Xing|Info|VBRI", head) else sync[0]


def load(path, sample_rate):
    """`decode`, and of the source: (waveform (T,), {rate in Hz, peak, clipped: the share of flat-topped samples})."""
    (rate, *_), blocks = zip(*_read(path))
    x = np.concatenate(blocks)
    peak = float(np.abs(x).max())
    flat = np.abs(x) >= 0.9999 * peak
    clipped = float((flat[:-2] & flat[1:-1] & flat[2:]).mean()) if peak > 0.9 and len(x) > 2 else 0.0
    x = resample(torch.from_numpy(x), rate, sample_rate)
    loudest = float(x.abs().max())
    return x / max(1, loudest), {"rate": rate, "peak": max(peak, loudest), "clipped": clipped}


def _ratio(rate, new_rate):
    """new_rate / rate in lowest terms; of an odd rate (44,099 Hz) the nearest ratio of smaller numbers, less than half a cent
    off: the exact one's filters take gigabytes. The usual rates, up to 384 kHz, are exact."""
    return Fraction(new_rate, rate).limit_denominator(3000).as_integer_ratio()


def resample(x, rate, new_rate):
    """Band-limited resampling of x (T,) from `rate` to `new_rate` (Hz) -> (ceil(T new_rate / rate),), by `_ratio`.

    >>> resample(torch.zeros(44100), 44100, 22050).shape
    torch.Size([22050])
    """
    if rate == new_rate:
        return x
    up, down = _ratio(rate, new_rate)
    filters, width, hop = _filters(up, down)
    n = math.ceil(len(x) * up / down)
    frames = torch.nn.functional.pad(x, (width, width + 2 * hop)).unfold(0, len(filters), hop)
    return (frames @ filters).reshape(-1)[:n]


def stream(path, sample_rate=SAMPLE_RATE):
    """`decode` in bounded memory: yields pieces (n,) that in a row are what it returns. A file of more than some minutes
    is read twice: only its end tells whether it is whole, and its peak."""
    def pieces():
        x = None
        for rate, block in _read(path):
            up, down = _ratio(rate, sample_rate)
            margin = 40 * down  # more than the filters' width
            x = torch.zeros(margin) if x is None else x
            x = torch.cat([x, torch.from_numpy(block), torch.zeros(0 if len(block) else margin)])
            n = len(x) - 2 * margin  # so many have their neighbours on both sides
            n = max(0, n - n % down) if len(block) else n
            yield resample(x, down, up)[40 * up :][: math.ceil(n * up / down)]
            x = x[n:]
    kept, peak = [], 1.0
    for piece in pieces():
        kept, peak = [*kept[:16], piece], np.abs(piece.numpy()).max(initial=peak)
    for piece in kept if len(kept) <= 16 else pieces():
        yield piece / float(peak)


@functools.lru_cache(maxsize=8)
def _filters(up, down, zeros=32):
    """Windowed sinc, flat to 0.9 Nyquist, a column per output phase: (k, phases), its margin and hop in samples.

    At least 64 phases: one large matrix product, where a convolution with one filter takes eight times as long.
    """
    blocks, cutoff = math.ceil(64 / up), 0.99 * min(1.0, up / down)
    width = math.ceil(zeros / cutoff)
    t = torch.arange(-width, width + down * blocks).double()[:, None] - torch.arange(up * blocks).double() * down / up
    t = (cutoff * t).clamp(-zeros, zeros)  # (k, phases)
    return (cutoff * torch.sinc(t) * torch.cos(t * math.pi / (2 * zeros)) ** 2).float(), width, down * blocks


# ----------------------------------------------------------------------------------------------------------- readers
# A reader turns a folder into a Listing. To add a data set: one function here, one entry in DATASETS.

@dataclass(slots=True)
class Clip:
    """One recording: what to decode, and what is known about it."""
    id: str               # its name in clips.npz
    file: Path = None
    split: str = "train"  # train, valid, test
    group: str = ""       # the song; by default each clip is a song of its own
    tags: tuple = ()      # names
    artist: str = ""


class Listing(list):
    """A list of Clip, and what holds for the whole: task (multilabel, singlelabel, none), tags (names, in order),
    split_name (where the split comes from), published (clips in train, valid, test as published, or None), skipped
    ([{file, reason}], known before decoding), broken (ids that are known to be broken wherever they come from)."""

    def __init__(self, clips, task="none", tags=(), split_name="all train", published=None, skipped=(), broken=()):
        super().__init__(clips)
        self.task, self.tags, self.split_name, self.published = task, list(tags), split_name, published
        self.skipped, self.broken = list(skipped), set(broken)

    @classmethod
    def match(cls, clips, files, key=lambda clip: clip.id, unlisted=None, **about):
        """Give each clip of a table its file out of `files` {key: path}; one without the other is skipped."""
        clips = list(clips)
        for clip in clips:
            clip.file = files.pop(key(clip), None)
        skipped = [{"file": clip.id, "reason": "missing: listed, but not there"} for clip in clips if not clip.file]
        if len(skipped) == len(clips):
            raise FileNotFoundError(f"none of the {len(clips)} recordings listed is there: {skipped[0]['file']}, ..."
                                    if clips else "expected a table that lists recordings, found no row in it")
        skipped += [{"file": str(name), "reason": unlisted} for name in sorted(files) if unlisted]
        return cls([clip for clip in clips if clip.file], skipped=skipped, **about)


def audio_files(root, key=lambda relative: relative.as_posix()):
    """Every audio file below root: {key of its relative path: path}, in order of the paths."""
    files, seen = {}, set()

    def unreadable(error):
        raise OSError(f"{error.filename}: cannot be read: {error.strerror}") from None
    for folder, folders, names in os.walk(root, onerror=unreadable, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # again, by a link in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(folder, name) for name in sorted(names) if not name.startswith(".")):
            if path.suffix.lower() in AUDIO:
                # One name has several spellings in Unicode, and file systems disagree on which.
                name = key(Path(unicodedata.normalize("NFC", str(path.relative_to(root)))))
                if files.setdefault(name, path) != path:
                    raise ValueError(f"{files[name]} and {path} are both {name}: remove or rename one")
    if not files:
        raise FileNotFoundError(f"{root}: expected audio files ({' '.join(sorted(AUDIO))}), found none")
    return files


def read_table(path, headers=1):
    """(rows as dicts, columns) of a CSV: comma, semicolon or tab; plain or .gz; header rows are joined by dots."""
    path = Path(path) if Path(path).exists() else Path(f"{path}.gz")
    if not path.exists():
        raise FileNotFoundError(f"{path.with_suffix('')}: expected this table, but it is not there")
    csv.field_size_limit(1 << 24)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            file.seek(0)
            lines = csv.reader(file, delimiter=max(",;\t", key=first.count))
            columns = [".".join(parts).strip() for parts in zip(*(next(lines, []) for _ in range(headers)))]
            rows = []
            for line in filter(any, lines):
                if any(line[len(columns) :]):
                    raise ValueError(f"{path}, line {lines.line_num}: more fields than the {len(columns)} columns; put a field "
                                     "that holds the separator in quotes")
                rows.append({**dict.fromkeys(columns, ""), **dict(zip(columns, line))})
            return rows, columns
    except (UnicodeDecodeError, csv.Error, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a CSV in UTF-8: {error}") from None


def read_folder(root, labels=None):
    """Any directory of audio, searched recursively, with or without a table of labels.

    Args:
        root: the directory.
        labels: a CSV with a column `file` (relative to root, or absolute), optionally `split` (train, valid, test) and `group`
            (clips of one song share it), and either `tags` ("a; b; c"), or `label`, or one column of 0/1 per tag.
            Beside `tags` or `label` further columns are ignored. Without `split`, labelled songs are dealt
            80 : 10 : 10 by a hash of their group, so that a song always lands in the same split.
    """
    files = audio_files(root)
    if labels is None:
        return Listing([Clip(name, path) for name, path in files.items()])
    (rows, columns), source = read_table(labels), Path(labels).name
    form = {"tags", "label"} & set(columns)
    if "file" not in columns or len(form) > 1:
        raise ValueError(f"{labels}: expected a column `file`, and one of `tags` and `label` at most; "
                         f"found {', '.join(columns)}")
    names = [] if form else [column for column in columns if column not in ("", "file", "split", "group", "artist")]
    task = "singlelabel" if "label" in form else "multilabel" if form or names else "none"
    starts = [unicodedata.normalize("NFC", f"{Path(path(root)).as_posix()}/") for path in (os.path.normpath, os.path.abspath, os.path.realpath)]
    starts = ["", "./", *(start for start in starts if not any(name.startswith(start) for name in files))]

    def own(text):
        """The name among `files` of what stands in the table: relative to root or absolute, perhaps with Windows' separators."""
        spellings = [text.removeprefix(start) for text in (text, text.replace("\\", "/")) for start in starts]
        return next((name for name in spellings if name in files), spellings[1])
    clips = {}
    for line, row in enumerate(rows, 2):
        row = {column: value.strip() for column, value in row.items()}
        name = own(unicodedata.normalize("NFC", row["file"]))
        group = row.get("group") or name
        byte = hashlib.sha256(group.encode("utf-8", "surrogateescape")).digest()[0] if task != "none" else 0
        split = row.get("split", "train" if byte < 205 else "valid" if byte < 230 else "test")
        split = {"validation": "valid", "val": "valid"}.get(split, split)
        strange = next((f"`{tag}`, found {row[tag]!r}" for tag in names if row[tag] not in ("0", "1")), None)
        for wrong, reason in (
                (name in clips, f"{name} stands there a second time"),
                (row.get("label") == "", f"{name} has no label"),
                (strange, f"expected 0 or 1 in the tag column {strange}; for other columns to be ignored, give the "
                          "tags in one column `tags` or `label`"),
                (split not in SPLITS, f"expected train, valid or test in the column `split`, found {split!r}")):
            if wrong:
                raise ValueError(f"{labels}, line {line}: {reason}")
        tags = [row["label"]] if "label" in form else row.get("tags", "").split(";")
        tags += [tag for tag in names if row[tag] == "1"]
        clips[name] = Clip(name, None, split, group, tuple(tag.strip() for tag in tags if tag.strip()),
                           row.get("artist", ""))
    dealt = "80:10:10 by song" if task != "none" else "all train"
    return Listing.match(sorted(clips.values(), key=lambda clip: clip.id), files, unlisted=f"no row in {source}",
                         task=task, tags=names or sorted({tag for clip in clips.values() for tag in clip.tags}),
                         split_name=f"column split of {source}" if "split" in columns else dealt)


def read_demo(root=None):
    """The freely licensed music in this repository, labelled by composer."""
    root = Path(root or HERE / "demo")
    return read_folder(root, root / "labels.csv")


def _published(function, name, root, **options):
    """Published data sets are read and fetched in splits/published.py, beside the split lists they need."""
    try:
        from splits import published
    except ImportError:
        raise FileNotFoundError(f"--data {name} needs the repository's folder splits/ beside prepare.py") from None
    return getattr(published, function)(name, root, **options)


DATASETS = {"folder": read_folder, "demo": read_demo,
            **{name: functools.partial(_published, "read", name) for name in "billboard fma gtzan msd mtat".split()}}


# ------------------------------------------------------------------------------------------------ the prepared folder

def write(listing, out, sample_rate=SAMPLE_RATE, segment=None, workers=None, max_skipped=0.01, timeout=300.0,
          shard=None, merge=None, command="", progress=True, load=load):
    """Decode a listing into the prepared folder `out`; what an interrupted run left in `out.partial` is not done again.

    Args:
        listing (Listing): from a reader of `DATASETS`.
        sample_rate (int): Hz.
        segment (float, optional): cut files into clips of so many seconds; a rest below half of it stays with the last.
        workers (int, optional): decoding processes; by default one per core.
        max_skipped (float): share of the files, in [0, 1], that may be unusable; with more, nothing is put in place.
        timeout (float): seconds after which a file is given up.
        shard (tuple, optional): (i, n): decode only the i-th of n parts (1 to n), into `out.shard-i-of-n.partial`.
        merge (int, optional): n: take what n shards have decoded. The result has the same bytes as without shards.

    Returns the meta, as in meta.json; for a shard None. Raises FileExistsError when out holds something else or another
    run is working on it, ValueError when too many files cannot be used, or none can, and OSError when the disk is too
    small or full, with the bytes needed and free.
    """
    name, out, (i, n) = Path(out).name, Path(out), shard or (1, 1)
    out = out.resolve() if out.is_symlink() else out  # beside what the link points to: on the disk that was meant
    how = f"{sample_rate} Hz, segments of {segment} s, recordings {_sample(listing)}"
    digest = hashlib.sha256(json.dumps([how, listing.task, listing.tags, listing.skipped]).encode())
    for clip in listing:
        digest.update(json.dumps([clip.id, clip.split, clip.group, clip.tags, _size(clip)]).encode())
    plan = digest.hexdigest()
    shards = [Path(f"{out}.shard-{k + 1}-of-{merge or n}.partial") for k in range(merge or n)]
    clips = listing[len(listing) * (i - 1) // n : len(listing) * i // n]
    if (out / "meta.json").exists():
        meta = json.loads((out / "meta.json").read_text())
        if meta.get("plan") != plan:
            raise FileExistsError(f"{out}: is there already, made from other files or flags ({meta.get('command')}); "
                                  f"give another --name, or remove it: rm -r {shlex.quote(str(out))}")
        return meta
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"{out}: expected a prepared folder or nothing, found something else; give another --name")
    folder = shards[i - 1] if shard else Path(f"{out}.partial")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileExistsError(f"{out}: another run is preparing it; wait, or give another --name") from None
        done = _resume(folder, how, clips, shards if merge else ())
        todo, free = clips[done:], shutil.disk_usage(folder).free
        # Nothing grows more than sixtyfold, so only where space may be short a few files are decoded to find out.
        if free < 60 * sum(map(_size, todo)) and free < (need := estimate(todo, sample_rate, timeout, load)[0]):
            raise OSError(f"{out}: about {need / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free")
        jobs = ((str(clip.file), sample_rate, round(segment * sample_rate) if segment else None) for clip in todo)
        with (open(folder / "audio.npy", "ab") as audio, open(folder / "journal.jsonl", "ab") as journal,
              tqdm(total=len(clips), initial=done, unit="file", desc="decoding", disable=not progress,
                   mininterval=0.5 if sys.stderr.isatty() else 15) as bar):
            for clip, (entry, samples) in zip(todo, _pool(jobs, workers or os.cpu_count() or 1, timeout, load)):
                line = json.dumps({**entry, "id": clip.id, "size": _size(clip)}).encode() + b"\n"
                try:
                    for file, data in ((audio, samples), (journal, line)):  # the line vouches for the samples
                        file.write(data)
                        file.flush()
                except OSError as error:
                    need = audio.tell() / max(1, bar.n) * (len(clips) - bar.n) / 1e9
                    free = shutil.disk_usage(folder).free / 1e9
                    raise OSError(f"{folder}: cannot be written: {error.strerror}; needs {need:.2f} GB more, "
                                  f"has {free:.2f}; what is done is kept, the same command continues") from None
                bar.update()
        head = {"format": FORMAT, "name": name, "sample_rate": sample_rate, "plan": plan, "command": command}
        return None if shard else _seal(folder, out, listing, max_skipped, head)


def estimate(clips, sample_rate, timeout=60.0, load=load):
    """Bytes a list of Clip will take, and seconds of one core, from decoding up to eight of them."""
    some, start = clips[:: max(1, len(clips) // 8)][:8], time.monotonic()
    jobs = [(str(clip.file), sample_rate, None) for clip in some]
    size = sum(len(samples) for _, samples in _pool(jobs, 1, min(timeout, 60), load))
    scale = sum(map(_size, clips)) / max(1, sum(map(_size, some)))
    return int(size * scale), (time.monotonic() - start) * scale


def _size(clip):
    return clip.file.stat().st_size if clip.file.exists() else 0


def _sample(clips):
    """A hash of some bytes of up to 16 files, so that a second folder of the same names and sizes is not taken for the first.
    They are chosen by their names, so that a file that comes in between hardly ever changes the choice."""
    digest, chosen = hashlib.sha256(), heapq.nsmallest(16, clips, lambda clip: hashlib.sha256(os.fsencode(clip.id)).digest())
    for file in (clip.file for clip in chosen if clip.file.is_file()):
        with contextlib.suppress(OSError), open(file, "rb") as raw:  # one that cannot be read is listed later, with its reason
            raw.seek(file.stat().st_size // 2)
            digest.update(raw.read(1 << 12))
    return digest.hexdigest()[:16]


def _resume(folder, how, clips, shards=()):
    """Cut the files back to what a run before has finished, samples and journal line; return how many clips that is."""
    audio, journal, fits = folder / "audio.npy", folder / "journal.jsonl", lambda path: path.exists() and path.read_text() == how
    if shards or not (fits(folder / "plan") and audio.exists() and journal.exists()):
        need, free = 0, shutil.disk_usage(folder).free + sum(file.stat().st_size for file in (audio, journal) if file.exists())
        for k, shard in enumerate(shards):  # all of them, before anything is written over
            part = clips[len(clips) * k // len(shards) : len(clips) * (k + 1) // len(shards)]
            own = [shard / name for name in ("audio.npy", "journal.jsonl")]
            if not fits(shard / "plan") or _finished(shard, part) != (len(part), *(file.stat().st_size for file in own)):
                raise ValueError(f"{shard}: expected a finished shard of the same files and flags; run it first")
            need += sum(file.stat().st_size for file in own)
        if free < need:
            raise OSError(f"{folder}: {need / 1e9:.2f} GB are needed there, {free / 1e9:.2f} GB are free")
        with open(audio, "wb") as samples, open(journal, "wb") as lines:
            samples.write(bytes(128))  # room for the header, which needs the final length
            for shard in shards:
                with open(shard / "audio.npy", "rb") as file:
                    file.seek(128)
                    shutil.copyfileobj(file, samples, 1 << 24)
                lines.write((shard / "journal.jsonl").read_bytes())
        (folder / "plan").write_text(how)
    done, size, keep = _finished(folder, clips)
    os.truncate(audio, size)
    os.truncate(journal, keep)
    return done


def _finished(folder, clips):
    """How many of the clips a folder has, in order, sample and journal line; the bytes of audio.npy and of the journal then."""
    done, size, keep, there = 0, 128, 0, (folder / "audio.npy").stat().st_size
    with open(folder / "journal.jsonl", "rb") as journal:
        for line, clip in zip(journal, clips):
            entry = json.loads(line) if line.endswith(b"\n") else {"lengths": [1 << 62]}
            end = size + 2 * sum(entry["lengths"])
            if end > there or (entry["id"], entry["size"]) != (clip.id, _size(clip)):  # cut off, or another file now
                break
            done, size, keep = done + 1, end, keep + len(line)
    return done, size, keep


def _seal(folder, out, listing, max_skipped, head):
    """Judge the losses, write the tables and move the folder into place. Returns the meta."""
    columns, songs, rate, skipped = {key: [] for key in COLUMNS}, {}, head["sample_rate"], list(listing.skipped)
    artists = []
    columns["labels"], columns["sha256"] = bytearray(), bytearray()  # a list of rows would take ten times as much
    with open(folder / "journal.jsonl", "rb") as journal:
        for clip, entry in zip(listing, map(json.loads, journal)):
            begins, n = np.cumsum([0, *entry["lengths"]]), len(entry["lengths"])
            columns["length"] += entry["lengths"]
            columns["split"] += [SPLITS.index(clip.split)] * n
            columns["group"] += [songs.setdefault(clip.group or clip.id, len(songs))] * n
            artists += [clip.artist] * n
            columns["labels"] += bytes(tag in clip.tags for tag in listing.tags) * n
            columns["id"] += [clip.id] if n == 1 else [f"{clip.id}@{begin / rate:.6g}" for begin in begins[:n]]
            columns["sha256"] += bytes.fromhex("".join(entry.get("sha256", ())))
            for key in ("rate", "peak", "clipped"):
                columns[key] += [entry.get(key)] * n
            if not n:
                skipped.append({"file": clip.id, "reason": entry["reason"]})
    lost = [s for s in skipped if not s["reason"].startswith("no row") and s["file"] not in listing.broken]
    total = len(listing) + sum(s["reason"].startswith("missing") for s in listing.skipped)
    first = f"; the first: {lost[0]['file']}: {lost[0]['reason']}" if lost else ""
    if not columns["id"]:
        raise ValueError(f"none of {total} files can be used{first}")
    if len(lost) > max_skipped * total:
        enough = math.ceil(1000 * len(lost) / total) / 1000
        raise ValueError(f"{len(lost)} of {total} files cannot be used, --max-skipped is {max_skipped:g}{first} "
                         f"(repair them, or type --max-skipped {enough:g}, for which nothing is decoded twice; "
                         f"what timed out is tried again without {folder}, and without its part's folder after --merge)")
    arrays = {key: np.array(column, COLUMNS[key]) for key, column in columns.items()}
    for key, width in (("labels", len(listing.tags)), ("sha256", 32)):
        arrays[key] = arrays[key].reshape(-1 if width else len(arrays["id"]), width)
    arrays["start"] = np.cumsum(arrays["length"]) - arrays["length"]
    if any(artists):
        arrays["artist"] = np.array(artists, str)
    count = lambda what: {split: what(arrays["split"] == k) for k, split in enumerate(SPLITS)}
    named = lambda chosen: arrays["id"][chosen].tolist()
    kinds = {kind: sum(s["reason"].startswith(kind) for s in skipped) for kind in ("missing", "broken", "no row")}
    report = {"found": total - kinds["missing"], **kinds, "shorter than 3 s": named(arrays["length"] < 3 * rate),
              "silent": named(arrays["peak"] < 1e-4), "clipped": named(arrays["clipped"] > 1e-3),
              "turned down": int((arrays["peak"] > 1).sum()),
              "duplicate": np.delete(arrays["id"], np.unique(arrays["sha256"], axis=0, return_index=True)[1]).tolist(),
              "rates": {str(hz): int(n) for hz, n in zip(*np.unique(arrays["rate"], return_counts=True))}}
    meta = {**head, "task": listing.task, "tags": listing.tags, "split_name": listing.split_name,
            "published": listing.published, "clips": count(lambda own: int(own.sum())),
            "songs": count(lambda own: len(np.unique(arrays["group"][own]))),
            "hours": count(lambda own: round(float(arrays["length"][own].sum()) / rate / 3600, 4)),
            "skipped": skipped, "report": report, "fingerprint": fingerprint(arrays, rate, listing.tags)}
    with open(folder / "audio.npy", "r+b") as audio:
        shape = (int(arrays["length"].sum()),)
        np.lib.format.write_array_header_1_0(audio, {"descr": "<i2", "fortran_order": False, "shape": shape})
        os.fsync(audio.fileno())
    np.savez(folder / "clips.npz", **arrays)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    os.replace(folder, out)  # first: until it is in place, nothing that was decoded may get lost
    for name in ("journal.jsonl", "plan", "lock"):
        (out / name).unlink(missing_ok=True)
    return meta


def _pool(jobs, workers, timeout, load):
    """Yield (entry, int16 bytes) of each job (file, rate, segment), in order.

    Not multiprocessing.Pool: there, a decoder that crashes or hangs takes the whole run with it. Here a thread looks
    after each decoding process and replaces it; the file it had is the only one lost.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    free, processes = queue.SimpleQueue(), []

    def start():
        ours, theirs = context.Pipe()
        process = context.Process(target=_worker, args=(theirs, load), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        return ours, process

    def decode_one(job):
        pipe, process = worker = free.get() or start()
        try:
            pipe.send(job)
            if pipe.poll(timeout):
                answer = pipe.recv()
                free.put(worker)
                return answer
            reason = f"not decoded after {timeout:g} s"
        except (EOFError, OSError):
            process.join(1)
            reason = f"it crashes the decoder (exit code {process.exitcode})"
        process.kill()
        free.put(None)
        return {"lengths": [], "reason": f"broken: {reason}"}, b""

    for _ in range(workers):
        free.put(start())
    threads, waiting = ThreadPoolExecutor(workers), deque()
    try:
        for job in jobs:
            waiting.append(threads.submit(decode_one, job))
            # a slow file holds up the others: let them run ahead, not out of memory
            while len(waiting) > 8 * workers or len(waiting) > 2 * workers and 1 << 29 < sum(
                    len(job.result()[1]) for job in waiting if job.done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()


def _worker(pipe, load):
    """A decoding process: (file, rate, segment) in, (journal entry, int16 bytes) out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders talk on stderr, into the progress bar
    if sys.platform == "linux":
        # A fork holds the parent's lock and its ends of the other pipes: with them it would outlive a killed parent.
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, 1 << 16)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            pipe.send(_decode_into_parts(load, *pipe.recv()))


def _decode_into_parts(load, file, sample_rate, segment):
    """The journal entry of one file and its samples, int16 as bytes."""
    try:
        waveform, facts = load(file, sample_rate)
        samples = (waveform * FULL_SCALE).round().clamp(-FULL_SCALE, FULL_SCALE - 1).to(torch.int16).numpy()
    except Exception as error:  # whatever a decoder throws costs this file alone
        reason = str(error).replace(f"{file}: ", "") or repr(error)
        kind = "missing" if isinstance(error, FileNotFoundError) else "broken"
        return {"lengths": [], "reason": f"{kind}: {reason}"}, b""
    parts = np.split(samples, range(segment, len(samples) - segment // 2, segment)) if segment else [samples]
    digests = [hashlib.sha256(part).hexdigest() for part in parts]
    return {"lengths": [len(part) for part in parts], "sha256": digests, **facts}, samples.tobytes()


def fingerprint(arrays, sample_rate, tags):
    """sha256 over all that training and evaluation can see: samples, splits, songs, labels, rate, tags in order."""
    digest = hashlib.sha256(json.dumps([sample_rate, list(tags), arrays["id"].tolist()]).encode())
    for key in ("length", "split", "group", "labels", "sha256"):
        digest.update(np.ascontiguousarray(arrays[key]).tobytes())
    return digest.hexdigest()


def find(data):
    """The prepared folder that a name under data/ or a path means; FileNotFoundError says what to type.

    >>> find("nosuch")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: nosuch: not prepared ...; type: python prepare.py --data folder --root MUSIC --name nosuch
    """
    for folder in (Path("data", str(data)), Path(data)):
        if (folder / "meta.json").is_file():
            return folder
    name = Path(data).name
    flags = f"{name} --root DIR" if name in DATASETS else f"folder --root MUSIC --name {name}"
    raise FileNotFoundError(f"{data}: not prepared (expected {Path('data', str(data), 'meta.json')}, or the path of a "
                            f"prepared folder); type: python prepare.py --data {'demo' if name == 'demo' else flags}")


class Clips:
    """The clips of a prepared folder (as `find` returns it), or of several that count as one set.

    Args:
        folder: a path, or a list of paths, which count in that order. They must share the sample
            rate. Where their tags or tasks differ, the set has no labels (task "none").
        split: "train", "valid" or "test"; by default all clips.

    Attributes, tables in numpy: labels (N, K) uint8, group (N,) int64 (clips of one song share it,
    songs of several folders are kept apart), length (N,) int64 samples, start (N,) int64, id (N,)
    str, artist (N,) str ("" where it is not known), split (N,) uint8 0 train 1 valid 2 test, sha256
    (N, 32) uint8 of the samples; tags, task, sample_rate, fingerprint (of several folders made of
    theirs), name, meta, folder (the first), folders. Indices count inside this view. Waveforms stay
    on disk and are mapped, so an object is small and may be handed to other processes.
    """

    def __init__(self, folder, split=None):
        if split not in (None, *SPLITS):
            raise ValueError(f"expected split {', '.join(SPLITS)} or None, got {split!r}")
        one = isinstance(folder, (str, os.PathLike))
        self.folders = [Path(path) for path in ([folder] if one else folder)]
        if not self.folders:
            raise ValueError("expected a prepared folder, got an empty list")
        self.folder = self.folders[0]
        tables, metas = zip(*map(_read_prepared, self.folders))
        self.meta = metas[0] if len(metas) == 1 else _joined_meta(self.folders, metas)
        for key in ("tags", "task", "sample_rate", "fingerprint", "name"):
            setattr(self, key, self.meta[key])
        samples = [int(table["length"].sum()) for table in tables]
        songs = [int(table["group"].max(initial=-1)) + 1 for table in tables]
        self._first = np.cumsum([0, *samples])  # the first sample of each folder, among all
        for table, sample, song in zip(tables, self._first, np.cumsum([0, *songs])):
            table["start"] = table["start"] + sample
            table["group"] = table["group"] + song
            if self.task == "none":
                table["labels"] = table["labels"][:, :0]
        for key in tables[0]:
            column = np.concatenate([table[key] for table in tables])
            setattr(self, key, column)
        if split is not None:
            chosen = self.split == SPLITS.index(split)
            vars(self).update({key: getattr(self, key)[chosen] for key in tables[0]})

    def __len__(self):
        return len(self.length)

    def __getstate__(self):  # each process maps the samples for itself
        return {key: value for key, value in vars(self).items() if key not in ("maps", "samples")}

    @functools.cached_property
    def maps(self):
        """Of each folder all samples, int16, memory-mapped: one clip's stand after another's."""
        return [np.load(folder / "audio.npy", mmap_mode="r") for folder in self.folders]

    samples = None  # all of them, (M,) int16 in a device's memory, after `keep_on`

    def keep_on(self, device):
        """Copy all samples to `device`, from where `crops` then cuts.

        Returns False, and copies nothing, where half of a GPU's free memory is too small.
        """
        total = int(self._first[-1])
        if torch.device(device).type == "cuda":
            if 2 * total > torch.cuda.mem_get_info(device)[0] / 2:
                return False
        self.samples = torch.empty(total, dtype=torch.int16, device=device)
        piece = 1 << 26  # the whole need not fit into this machine's memory
        for audio, first in zip(self.maps, self._first.tolist()):
            for i in range(0, len(audio), piece):
                part = torch.from_numpy(np.array(audio[i : i + piece]))
                self.samples[first + i : first + i + len(part)] = part
        return True

    def waveform(self, i):
        """Clip i as (T,) float32 in [-1, 1)."""
        return self.crops([i], [0], int(self.length[i]))[0, 0]

    def crops(self, index, start, n_samples):
        """Cut B crops, the b-th from sample start[b] of clip index[b] on.

        Returns (B, 1, n_samples) float32 in [-1, 1), on the CPU, or where `keep_on` put the samples.
        Raises ValueError for a crop that is not wholly inside its clip: it would be filled from
        the neighbour.
        """
        index = np.asarray(index, np.int64).reshape(-1)
        start = np.asarray(start, np.int64).reshape(-1)
        if len(index) != len(start) or not ((0 <= index) & (index < len(self))).all():
            raise ValueError(f"expected one start per clip, in 0 .. {len(self) - 1}; "
                             f"got {len(start)} for {index}")
        for b in np.flatnonzero((start < 0) | (start + n_samples > self.length[index])):
            raise ValueError(f"crop {start[b]} .. {start[b] + n_samples} is not inside "
                             f"{self.id[index[b]]}, {self.length[index[b]]} samples long")
        firsts = self.start[index] + start
        if self.samples is not None:
            at = torch.from_numpy(firsts).to(self.samples.device, non_blocking=True)
            offsets = torch.arange(n_samples, device=at.device)
            return self.samples[at[:, None, None] + offsets] / FULL_SCALE
        return self._from_disk(firsts, n_samples)

    def _from_disk(self, firsts, n_samples):
        """The crops that begin at these samples (B,), counted over all folders."""
        crops = torch.empty(len(firsts), 1, n_samples)
        folder = np.searchsorted(self._first, firsts, side="right") - 1
        inside = (firsts - self._first[folder]).tolist()
        if hasattr(mmap, "MADV_WILLNEED"):
            # All pages of all crops are asked for at once: from a cold disk ten times as fast as
            # page fault after page fault.
            for k, first in zip(folder, inside):
                page = (HEADER + 2 * first) // mmap.PAGESIZE * mmap.PAGESIZE
                end = HEADER + 2 * (first + n_samples)
                self.maps[k].base.madvise(mmap.MADV_WILLNEED, page, end - page)
        plain = [np.asarray(audio) for audio in self.maps]  # is sliced three times as fast
        for row, k, first in zip(crops.numpy()[:, 0], folder, inside):
            row[:] = plain[k][first : first + n_samples]
            row *= 1 / FULL_SCALE  # row by row, while it is in the cache
        return crops


def _read_prepared(folder):
    """(tables {column: array}, meta) of one prepared folder."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        with np.load(folder / "clips.npz") as file:
            tables = {key: file[key] for key in ("start", *COLUMNS)}
            n = len(tables["length"])
            tables["artist"] = file["artist"] if "artist" in file else np.full(n, "")
        missing = {"tags", "task", "sample_rate", "fingerprint", "name"} - set(meta)
        if missing:
            raise KeyError(*sorted(missing))
        return tables, meta
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise FileNotFoundError(f"{folder}: expected a folder made by prepare.py; "
                                f"{missing} is missing") from None
    except Exception as error:  # a damaged zip or JSON file has many ways to say so
        raise ValueError(f"{folder}: expected a folder made by prepare.py; it cannot be read "
                         f"({error}), prepare it again") from None


def _joined_meta(folders, metas):
    """One meta for several folders that count as one set."""
    rates = [meta["sample_rate"] for meta in metas]
    if len(set(rates)) > 1:
        found = ", ".join(f"{folder}: {rate} Hz" for folder, rate in zip(folders, rates))
        raise ValueError(f"expected folders of one sample rate, found {found}; prepare them again "
                         f"with one --sample-rate")
    digest = hashlib.sha256(json.dumps([meta["fingerprint"] for meta in metas]).encode())
    labelled = all((meta["task"], meta["tags"]) == (metas[0]["task"], metas[0]["tags"])
                   for meta in metas)
    joined = {
        "name": "+".join(meta["name"] for meta in metas),
        "sample_rate": rates[0],
        "task": metas[0]["task"] if labelled else "none",
        "tags": metas[0]["tags"] if labelled else [],
        "fingerprint": digest.hexdigest(),
        "split_name": " + ".join(dict.fromkeys(meta["split_name"] for meta in metas)),
        "skipped": [skipped for meta in metas for skipped in meta["skipped"]],
        "folders": [str(folder) for folder in folders]}
    for key in ("clips", "songs", "hours"):
        joined[key] = {split: sum(meta[key][split] for meta in metas) for split in SPLITS}
    return joined


def check(folder, progress=False):
    """Read every sample of a prepared folder again: a list of what is not as it was written, one line each."""
    clips, wrong = Clips(folder), []
    if fingerprint(vars(clips), clips.sample_rate, clips.tags) != clips.fingerprint:
        wrong.append("clips.npz, or rate or tags in meta.json, have changed: the fingerprint does not fit")
    try:
        audio = clips.maps[0]
        if len(audio) != clips.length.sum():
            return [*wrong, f"audio.npy: expected {clips.length.sum()} samples, found {len(audio)}"]
    except (OSError, ValueError) as error:
        return [*wrong, f"audio.npy cannot be read: {error}"]
    for i in tqdm(range(len(clips)), desc="checking", unit="clip", disable=not progress):
        samples = np.ascontiguousarray(audio[clips.start[i] : clips.start[i] + clips.length[i]])
        if hashlib.sha256(samples).digest() != clips.sha256[i].tobytes():
            wrong.append(f"{clips.id[i]}: its samples have changed")
    return wrong


# ----------------------------------------------------------------------------------------------------------- program

def summary(meta):
    """The closing table of a prepared folder, as text."""
    lines = [f"{'':6}{'clips':>9}{'published':>11}{'songs':>9}{'hours':>9}"]
    for split, count in zip(SPLITS, meta["published"] or ("",) * 3):
        clips, songs, hours = (meta[key][split] for key in ("clips", "songs", "hours"))
        lines.append(f"{split:6}{clips:>9,}{count:>11}{songs:>9,}{hours:>9.2f}")
    for kind, files in meta["report"].items():
        if files and isinstance(files, list):
            files = f"{len(files)}: {', '.join(files[:3])}{', ...' * (len(files) > 3)}"
        lines += [f"{kind}: {files}"] if files else []
    lines += [f"  {s['file']}: {s['reason']}" for s in meta["skipped"][:20]]
    lines += [f"  ... and {len(meta['skipped']) - 20} more, see meta.json"] * (len(meta["skipped"]) > 20)
    about = f"{meta['task']}, {len(meta['tags'])} tags; split: {meta['split_name']}; {meta['sample_rate']} Hz"
    return "\n".join([*lines, about, f"fingerprint {meta['fingerprint']}"])


def build_parser():
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Turn a collection of recordings into one prepared folder under data/.", allow_abbrev=False,
        usage="python prepare.py --data NAME [--root DIR] [options]; all of them: --help",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--data", choices=sorted(DATASETS), help="which reader")
    data.add_argument("--root", type=Path, help="where the recordings are")
    data.add_argument("--labels", type=Path, metavar="FILE.csv",
                      help="folder: columns file, [split], [group], and tags (a; b), or label, or 0/1 per tag")
    data.add_argument("--split", choices=("all", "labelled"), help="mtat: which clips; by default all")
    data.add_argument("--subset", choices=("small", "medium", "large", "full"), help="fma: by default medium")
    data.add_argument("--download", action="store_true", help="fetch the published archives into --root, once (mtat, gtzan, fma)")
    data.add_argument("--name", help="of the folder under data/; by default that of the data set, or of --root")
    data.add_argument("--out", type=Path, help="the prepared folder, instead of data/NAME")
    data.add_argument("--segment", type=float, metavar="SECONDS", help="cut longer files into clips of the same song")
    data.add_argument("--sample-rate", type=int, default=SAMPLE_RATE, help="Hz")
    run = parser.add_argument_group("run")
    run.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding processes")
    run.add_argument("--max-skipped", type=float, default=0.01, help="share of the files that may be unusable")
    run.add_argument("--timeout", type=float, default=300.0, metavar="SECONDS", help="give a file up after so long")
    run.add_argument("--dry-run", action="store_true", help="say what it would do, how long and how large, and stop")
    run.add_argument("--shard", metavar="I/N", help="decode only part I of N, to be joined with --merge N")
    run.add_argument("--merge", type=int, metavar="N", help="join N finished shards; otherwise the same command")
    run.add_argument("--check", metavar="NAME", help="verify a prepared folder and stop")
    return parser


def _read_arguments(argv):
    """Arguments that fit together; the parser's error (exit code 2) says what does not."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.check:
        try:
            args.check = find(args.check)
        except FileNotFoundError as error:
            parser.error(str(error))
        return args
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard or "1/1")
    i, n = map(int, shard.groups()) if shard else (0, 0)
    given = {name: value for name, value in vars(args).items() if value is not None}
    for wrong, message in (
            (not args.data, f"expected --data {'|'.join(sorted(DATASETS))}, or --check NAME"),
            (not args.root and args.data != "demo",
             f"--data {args.data} needs --root DIR, the folder with the recordings"),
            *((not path.exists() and not (args.download and path == args.root), f"{path}: no such file or folder")
              for path in (args.root, args.labels) if path),
            *((name in given and args.data != owner, f"--{name} goes with --data {owner}")
              for name, owner in (("labels", "folder"), ("split", "mtat"), ("subset", "fma"))),
            *((not 0 < given.get(name, 1) < 1e6,
               f"--{name.replace('_', '-')}: expected a number above 0 (and below a million), got {given.get(name)}")
              for name in ("workers", "timeout", "sample_rate", "segment", "merge")),
            (args.segment and args.segment * args.sample_rate < 1, f"--segment {args.segment}: shorter than a sample"),
            (not 0 <= args.max_skipped <= 1, f"--max-skipped is a share of the files, 0 to 1, not {args.max_skipped}"),
            (args.shard and args.merge, "--shard decodes one part, --merge joins all: type one of them"),
            (args.dry_run and args.download, "--dry-run does nothing: type it without --download"),
            (not 1 <= i <= n, f"--shard: expected I/N with 1 <= I <= N, as in 2/4, got {args.shard}")):
        if wrong:
            parser.error(message)
    args.shard = (i, n) if args.shard else None
    return args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = _read_arguments(argv)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's stream
            stream.reconfigure(errors="backslashreplace")  # file names in any encoding
    try:
        if args.check:
            faults = check(args.check, progress=True)
            print("\n".join(faults[:20]) or summary(Clips(args.check).meta))
            print(f"{args.check}: {f'{len(faults)} faults' if faults else 'as it was written'}")
            return 1 if faults else 0
        if args.download:
            _published("fetch", args.data, args.root, subset=args.subset or "medium")
        out = args.out or Path("data", args.name or (args.data if args.data != "folder" else args.root.resolve().name))
        options = {name: getattr(args, name) for name in ("labels", "split", "subset") if getattr(args, name)}
        listing = DATASETS[args.data](args.root, **options)
        if args.dry_run:
            size, seconds = estimate(listing, args.sample_rate, args.timeout)
            disk = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.is_dir())
            clips = ", ".join(f"{sum(clip.split == split for clip in listing):,} {split}" for split in SPLITS)
            print(f"{args.data}: {len(listing):,} files ({clips}); {len(listing.skipped):,} skipped before decoding\n"
                  f"{out}: about {size / 2 / args.sample_rate / 3600:.1f} h, {size / 1e9:.2f} GB "
                  f"({shutil.disk_usage(disk).free / 1e9:.2f} GB free)\n"
                  f"about {seconds / 60:.1f} min of one core, {seconds / 60 / args.workers:.1f} min of {args.workers}")
            return 0
        base = shlex.join(["python", "prepare.py", *argv])  # the same whether in one piece, in shards or joined
        base = re.sub(r" --(shard|merge)[ =]\S+", "", base)
        meta = write(listing, out, args.sample_rate, args.segment, args.workers, args.max_skipped, args.timeout,
                     args.shard, args.merge, base)
    except KeyboardInterrupt:
        print("prepare.py: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"prepare.py: error: {error}", file=sys.stderr)
        return 1
    if meta is None:
        print(f"part {args.shard[0]} of {args.shard[1]} is done; when all are: {base} --merge {args.shard[1]}")
    else:
        name = out.name if out.parent == Path("data") else out
        print(f"{out}\n{summary(meta)}\nnext: python pretrain.py --data {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
