"""Turn a collection of recordings into one prepared folder that trains at the speed of memory.

    python prepare.py --data demo                                     # the music that ships
    python prepare.py --data folder --root ~/music --name mine        # any folder, no labels
    python prepare.py --data folder --root ~/music --labels tags.csv  # with tags and splits
    python prepare.py --data mtat --root ~/magnatagatune --download   # a published data set
    python prepare.py --data msd --root ~/msd --dry-run               # hours and bytes, before
    python prepare.py --data msd --root ~/msd --shard 2/4             # a quarter of the songs
    python prepare.py --check mine                                    # still what was written?

Leaves `data/NAME/`, until it is complete as `data/NAME.partial/`; an interrupted run goes on there:
    audio.npy   int16, 1-D: every clip's samples back to back, mono (mapped, never loaded whole)
    clips.npz   start, length (int64, samples), split (uint8: 0 train, 1 valid, 2 test), group
                (int64: the song), labels (uint8, N x K), id and artist (text), sha256 (uint8,
                N x 32: of the samples), and of the file rate, peak, clipped
    meta.json   format, name, sample_rate, task (multilabel, singlelabel, none), tags in order,
                clips, songs, hours per split, skipped [{file, reason}], report, fingerprint

A file becomes a clip as it is: decoded, averaged to mono, resampled (section 3.3 of the paper).
Nothing is lost in silence: each file that cannot be used is listed with its reason, and too many of
them are an error. A shard is a prepared folder of its own, cut at songs; --data takes several
folders as one set.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C is silent

import argparse
import copy
import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import shlex
import sys
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator

import numpy as np
import soundfile
import torch
from tqdm import tqdm

SAMPLE_RATE = 22050  # Hz, section 3.3; here, then in the data's meta, then in the checkpoint
SPLITS = ("train", "valid", "test")
FULL_SCALE = 32768  # int16 sample = waveform x 32768
HEADER = 128  # bytes of audio.npy before its first sample


@functools.cache
def engine(name: str, plain: bool = False) -> ModuleType | None:
    """A module of splits/ beside this file. Where it is missing: None, which is said once, if there
    is a plain way, else FileNotFoundError."""
    try:
        return import_module(f"splits.{name}")
    except ModuleNotFoundError:
        if not plain:
            raise FileNotFoundError(f"expected splits/{name}.py beside prepare.py") from None
        print(f"prepare.py: splits/{name}.py is not beside it: fewer formats and checks",
              file=sys.stderr)


# ------------------------------------------------------------------------------ the prepared folder

def find(data: str | os.PathLike) -> Path:
    """The prepared folder that a name under data/ or a path means.

    Raises FileNotFoundError, which says what to type.

    >>> find("nosuch")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileNotFoundError: nosuch: not prepared ... --data folder --root MUSIC --name nosuch
    """
    expected = Path("data", str(data))
    for folder in (expected, Path(data)):
        if (folder / "meta.json").is_file():
            return folder
    name = Path(data).name
    flags = f"folder --root MUSIC --name {shlex.quote(name)}"
    if name in DATASETS:
        flags = "demo" if name == "demo" else f"{name} --root DIR"
    raise FileNotFoundError(f"{data}: not prepared (expected {expected / 'meta.json'}, or the path "
                            f"of a prepared folder); type: python prepare.py --data {flags}")


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

    samples = None  # all of them, (M,) int16 in a device's memory, after `keep_on`

    def __init__(self, folder, split: str | None = None):
        if split not in (None, *SPLITS):
            raise ValueError(f"expected split {', '.join(SPLITS)} or None, got {split!r}")
        one = isinstance(folder, (str, os.PathLike))
        self.folders = [Path(path) for path in ([folder] if one else folder)]
        self.folder = self.folders[0]
        tables, metas = zip(*map(_read_prepared, self.folders))
        self.meta = metas[0] if len(metas) == 1 else engine("prepared").join(self.folders, metas)
        for key in ("tags", "task", "sample_rate", "fingerprint", "name"):
            setattr(self, key, self.meta[key])
        lengths = [int(table["length"].sum()) for table in tables]
        songs = [int(table["group"].max(initial=-1)) + 1 for table in tables]
        self._first = np.cumsum([0, *lengths])  # the first sample of each folder, among all
        for table, sample, song in zip(tables, self._first, np.cumsum([0, *songs])):
            table["start"] = table["start"] + sample
            table["group"] = table["group"] + song
            table["labels"] = table["labels"][:, : len(self.tags)]
        chosen = slice(None)
        if split is not None:
            chosen = np.concatenate([table["split"] for table in tables]) == SPLITS.index(split)
        for key in tables[0]:
            setattr(self, key, np.concatenate([table[key] for table in tables])[chosen])

    def __len__(self):
        return len(self.length)

    def __getstate__(self):  # each process maps the samples for itself
        return {key: value for key, value in vars(self).items() if key not in ("maps", "samples")}

    @functools.cached_property
    def maps(self) -> list[np.memmap]:
        """Of each folder all samples, int16, memory-mapped: one clip's stand after another's."""
        counts = np.diff(self._first).tolist()
        return [_map(folder, count) for folder, count in zip(self.folders, counts)]

    def keep_on(self, device: str | torch.device) -> bool:
        """Copy all samples to `device`, from where `crops` then cuts.

        Returns False, and copies nothing, where half of a GPU's free memory is too small.
        """
        total = int(self._first[-1])
        gpu = torch.device(device).type == "cuda"
        if gpu and 2 * total > torch.cuda.mem_get_info(device)[0] / 2:
            return False
        self.samples = torch.empty(total, dtype=torch.int16, device=device)
        for audio, first in zip(self.maps, self._first.tolist()):
            for i in range(0, len(audio), 1 << 26):  # the whole need not fit into memory
                part = torch.from_numpy(np.array(audio[i : i + (1 << 26)]))
                self.samples[first + i : first + i + len(part)] = part
        return True

    def waveform(self, i: int) -> torch.Tensor:
        """Clip i as (T,) float32 in [-1, 1)."""
        return self.crops([i], [0], int(self.length[i]))[0, 0]

    def crops(self, index, start, n_samples: int) -> torch.Tensor:
        """Cut B crops, the b-th from sample start[b] of clip index[b] on.

        Returns (B, 1, n_samples) float32 in [-1, 1), on the CPU, or where `keep_on` put the
        samples.
        Raises ValueError for a crop that is not wholly inside its clip: it would be filled from the
        neighbour.
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
        if self.samples is None:
            return self._from_disk(firsts, n_samples)
        at = torch.from_numpy(firsts).to(self.samples.device, non_blocking=True)[:, None, None]
        return self.samples[at + torch.arange(n_samples, device=at.device)] / FULL_SCALE

    def _from_disk(self, firsts, n_samples):
        """The crops that begin at these samples (B,), counted over all folders."""
        crops = torch.empty(len(firsts), 1, n_samples)
        folder = np.searchsorted(self._first, firsts, side="right") - 1
        inside = (firsts - self._first[folder]).tolist()
        for k, first in zip(folder, inside) if hasattr(mmap, "MADV_WILLNEED") else ():
            # All pages of all crops are asked for at once: from a cold disk ten times as fast as
            # page fault after page fault.
            page = (HEADER + 2 * first) // mmap.PAGESIZE * mmap.PAGESIZE
            length = HEADER + 2 * (first + n_samples) - page
            self.maps[k].base.madvise(mmap.MADV_WILLNEED, page, length)
        plain = [np.asarray(audio) for audio in self.maps]  # is sliced three times as fast
        for row, k, first in zip(crops.numpy()[:, 0], folder, inside):
            row[:] = plain[k][first : first + n_samples]
            row *= 1 / FULL_SCALE  # row by row, while it is in the cache
        return crops

    def changed(self, i: int) -> bool:
        """Are the samples of clip i other ones than were written, by their sha256?"""
        k = int(np.searchsorted(self._first, self.start[i], side="right")) - 1
        first = int(self.start[i] - self._first[k])
        samples = np.ascontiguousarray(self.maps[k][first : first + int(self.length[i])])
        return hashlib.sha256(samples).digest() != self.sha256[i].tobytes()

    def verify(self, seed: int = 0, n_clips: int = 16) -> None:
        """A quick check of `n_clips` clips, drawn by the seed; ValueError names a changed one."""
        for i in np.random.default_rng(seed).permutation(len(self))[:n_clips]:
            if self.changed(i):
                folders = " ".join(shlex.quote(str(folder)) for folder in self.folders)
                raise ValueError(f"{self.id[i]}: its samples are not what was written; python "
                                 f"prepare.py --check {folders} names all that are damaged")


def check(folder: str | os.PathLike, progress: bool = False) -> list[str]:
    """Read every sample of a prepared folder again: a list of what is not as it was written."""
    try:
        clips = Clips(folder)
        clips.maps
    except ValueError as error:
        return [str(error)]
    rows = tqdm(range(len(clips)), desc="checking", unit="clip", disable=not progress)
    return [f"{clips.id[i]}: its samples have changed" for i in rows if clips.changed(i)]


def _map(folder, count):
    """The samples of a folder, memory-mapped; ValueError where they are not `count`."""
    try:
        audio = np.load(folder / "audio.npy", mmap_mode="r")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: audio.npy cannot be read: {error}") from None
    if (audio.dtype, audio.shape) != (np.int16, (count,)):
        raise ValueError(f"{folder}: audio.npy: expected {count} samples, found {audio.size}")
    return audio


def _read_prepared(folder):
    """(tables {column: array}, meta) of one prepared folder, which must be as they were written."""
    prepared = engine("prepared", plain=True)
    if prepared:
        return prepared.read(folder)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    with np.load(folder / "clips.npz") as file:
        tables = {key: file[key] for key in file}
    for key in ("id", "artist"):
        if key in tables and tables[key].dtype == np.uint8:
            text = tables[key].tobytes().decode("utf-8", "surrogateescape")
            tables[key] = np.array(text.split("\0"), object)
    return tables, meta


# ----------------------------------------------------------------------------------------- decoding

def decode(path: str | os.PathLike, sample_rate: int = SAMPLE_RATE) -> torch.Tensor:
    """Decode one file of any format, any rate from 1 to 768 kHz, any number of channels.

    Returns the mean of the channels at `sample_rate` (Hz), (T,) float32 in [-1, 1]: what a lossy
    codec lets overshoot full scale is turned down to a peak of 1, not distorted. Raises
    FileNotFoundError, OSError, and ValueError for no audio, no samples, a file cut off or damaged,
    and samples that are NaN or infinite; the message says which.
    """
    return torch.cat(list(stream(path, sample_rate)))


def stream(path, sample_rate: int = SAMPLE_RATE, survey=None) -> Iterator[torch.Tensor]:
    """`decode` in bounded memory: yields pieces (n,) that in a row are what it returns.

    A file of more than some minutes is read twice: only its end tells whether it is whole, and its
    peak. `survey`, a Survey of splits/formats.py, learns about the recording.
    """
    held = []
    length = 0
    loudest = 1.0
    for piece in _resampled(path, sample_rate, survey):
        length += len(piece)
        loudest = max(loudest, float(piece.abs().max()) if len(piece) else 0.0)
        held = [*held, piece] if length <= HELD else []
    if survey and loudest > 1:
        survey.peak = max(survey.peak, loudest)
    for piece in held if length <= HELD else _resampled(path, sample_rate, None):
        yield piece / loudest


HELD = 1 << 23  # samples that `stream` keeps in memory: six minutes at 22,050 Hz


def _resampled(path, sample_rate, survey):
    """Yield mono pieces (n,) at `sample_rate`; raise what `decode` raises, perhaps at the end."""
    for (_, rate), blocks in itertools.groupby(_blocks(path, survey), key=lambda block: block[:2]):
        up, down = _ratio(rate, sample_rate)
        margin = 40 * down  # more than the filters' width
        x = torch.zeros(margin)
        for *_, block in itertools.chain(blocks, [(None,)]):
            last = block is None
            x = torch.cat([x, torch.zeros(margin) if last else torch.from_numpy(block)])
            n = max(0, len(x) - 2 * margin)  # so many have their neighbours on both sides
            n = n if last else n - n % down
            yield resample(x, down, up)[40 * up :][: math.ceil(n * up / down)]
            x = x[n:]


def _blocks(path, survey):
    """Yield (stream, rate in Hz, mono samples (n,)), and survey them."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such file")
    formats = engine("formats", plain=True)
    try:
        if formats:
            yield from formats.blocks(path, survey or formats.Survey())
        else:
            yield from _plain_blocks(path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:
        raise OSError(f"{path}: cannot be read: {error.strerror or error}") from None


def _plain_blocks(path):
    """The blocks of what libsndfile reads, without the checks of splits/formats.py."""
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:
            while len(block := file.read(1 << 16, dtype="float32", always_2d=True)):
                yield 0, file.samplerate, block.mean(1)
    except soundfile.SoundFileError as error:
        raise ValueError(f"cannot be decoded: {error}") from None


def _ratio(rate, new_rate):
    """new_rate / rate in lowest terms; of an odd rate (44,099 Hz) the nearest ratio of smaller
    numbers, less than half a cent off: the exact one's filters take gigabytes. The usual rates are
    exact."""
    return Fraction(new_rate, rate).limit_denominator(3000).as_integer_ratio()


def resample(x: torch.Tensor, rate: int, new_rate: int) -> torch.Tensor:
    """Band-limited resampling of x (T,) from `rate` to `new_rate` (Hz) -> (ceil(T new_rate /
    rate),).

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


@functools.lru_cache(maxsize=8)
def _filters(up, down, zeros=32):
    """Windowed sinc, flat to 0.9 Nyquist, a column per output phase: (k, phases), its margin and
    hop.

    At least 64 phases: one large matrix product, where a convolution with one filter takes eight
    times as long.
    """
    blocks = math.ceil(64 / up)
    cutoff = 0.99 * min(1.0, up / down)
    width = math.ceil(zeros / cutoff)
    inputs = torch.arange(-width, width + down * blocks).double()[:, None]
    outputs = torch.arange(up * blocks).double() * down / up
    t = (cutoff * (inputs - outputs)).clamp(-zeros, zeros)  # (k, phases)
    window = torch.cos(t * math.pi / (2 * zeros)) ** 2
    return (cutoff * torch.sinc(t) * window).float(), width, down * blocks


# ------------------------------------------------------------------------------------------ readers
# A data set more: one function here, or in splits/published.py, and one entry of DATASETS.

@dataclass(slots=True)
class Clip:
    """One recording: what to decode, and what is known about it."""
    id: str               # its name in clips.npz
    file: Path = None     # None: listed, but not there
    split: str = "train"  # train, valid, test
    group: str = ""       # the song; by default each clip is a song of its own
    tags: tuple = ()      # names
    artist: str = ""


class Listing(list):
    """The clips that are there, and what holds for the whole.

    task (multilabel, singlelabel, none), tags (names, in order), split_name (where the split comes
    from), published (clips in train, valid, test as published, or None), others ([{file, reason}]
    of files that are no clips), broken (ids that are broken wherever they come from), hints (what
    looks like a slip); and missing: the clips that are listed without a file.
    """

    def __init__(self, clips, **about):
        clips = list(clips)
        super().__init__(clip for clip in clips if clip.file)
        self.missing = [clip for clip in clips if not clip.file]
        vars(self).update({"task": "none", "tags": [], "split_name": "all train", "published": None,
                           "others": [], "broken": [], "hints": [], **about})
        if not clips:
            raise FileNotFoundError("expected a table that lists recordings, found no row in it")
        if not self:
            raise FileNotFoundError(f"none of the {len(clips)} recordings listed is there: "
                                    f"{clips[0].id}, ...")

    @property
    def skipped(self) -> list[dict]:
        """[{file, reason}] of all that is known before decoding."""
        reason = "missing: listed, but not there"
        return [{"file": clip.id, "reason": reason} for clip in self.missing] + self.others

    def shard(self, i: int, n: int) -> "Listing":
        """The i-th of n parts (1 to n): whole songs, chosen by a hash of their names alone."""
        def inside(clip):
            name = (clip.group or clip.id).encode("utf-8", "surrogateescape")
            return int.from_bytes(hashlib.sha256(name).digest()[-4:], "big") % n == i - 1
        part = copy.copy(self)
        part[:] = filter(inside, self)
        part.missing = list(filter(inside, self.missing))
        return part


PLAIN = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".au")  # what it finds, copied alone


def audio_files(root, key: Callable = lambda relative: relative.as_posix()) -> dict:
    """Every audio file below root: {key of its relative path: path}, in order of the paths.

    Raises ValueError where two files have one key, FileNotFoundError where there are none. What was
    left out is in its attribute `left_out`; a file that links reach twice stands there once.
    """
    folders = engine("folders", plain=True)
    if folders:
        return folders.audio_files(root, key)
    paths = [path for path in sorted(Path(root).rglob("*")) if path.suffix.lower() in PLAIN]
    return {key(path.relative_to(root)): path for path in paths}


def read_folder(root, labels=None) -> Listing:
    """Any directory of audio, searched recursively, with or without a table of labels.

    `labels` is a CSV as splits/tables.py reads it: columns file, optionally split, group and
    artist, and tags ("a; b; c"), or label, or one column of 0 and 1 per tag.
    """
    files = audio_files(root)
    if labels is None:
        clips = [Clip(name, path) for name, path in files.items()]
        return Listing(clips, others=getattr(files, "left_out", []))
    rows, about = engine("tables").read_labels(labels, root, files, files.aliases)
    about["others"] += files.left_out
    return Listing([Clip(**row) for row in rows], **about)


def read_demo(root=None) -> Listing:
    """The freely licensed music in this repository, labelled by composer."""
    root = root or Path(__file__).resolve().parent / "demo"
    return read_folder(root, root / "labels.csv")


def _read_published(name, root, **options):
    """A published data set: splits/published.py reads its tables."""
    left_out = []

    def search(*arguments):
        files = audio_files(*arguments)
        left_out.extend(files.left_out)
        return files
    rows, about = engine("published").read(name, root, search, **options)
    about["others"] = about.get("others", []) + left_out
    return Listing([Clip(**row) for row in rows], **about)


PUBLISHED = ("billboard", "fma", "gtzan", "msd", "mtat")
DATASETS = {"folder": read_folder, "demo": read_demo,
            **{name: functools.partial(_read_published, name) for name in PUBLISHED}}


# ------------------------------------------------------------------------------------------ writing

@dataclass
class Options:
    """How a listing becomes a prepared folder."""
    sample_rate: int = SAMPLE_RATE  # Hz
    segment: float = None           # seconds: cut longer files into clips of the same song
    workers: int = None             # decoding processes; by default one per core
    max_skipped: float = 0.01       # share of the files, in [0, 1], that may be unusable
    timeout: float = 300.0          # seconds after which a file is given up
    progress: bool = True           # a bar on stderr
    command: str = ""               # for meta.json
    stream: Callable = stream       # decodes; tests hand in another one


def write(listing: Listing, target, options: Options | None = None) -> dict:
    """Decode a listing into the prepared folder `target`; what an interrupted run left in
    `target.partial` is not done again.

    Returns the meta, as in meta.json. Raises FileExistsError when target holds something else or
    another run is working on it, ValueError when too many files cannot be used, or none can, and
    OSError when the disk is too small or full, with the bytes needed and free.
    """
    return engine("writing").write(listing, Path(target), options or Options())


# --- program: what one types ----------------------------------------------------------------------

def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="prepare.py", description="Turn recordings into one folder under data/.",
        usage="python prepare.py --data NAME [--root DIR] [options]; all of them: --help",
        allow_abbrev=False)
    data = parser.add_argument_group("data").add_argument
    data("--data", choices=sorted(DATASETS), help="which reader")
    data("--root", type=Path, help="where the recordings are")
    data("--labels", type=Path, metavar="FILE.csv",
         help="folder: columns file, [split], [group], [artist], and tags (a; b), or label, or "
              "0/1 per tag")
    data("--split", choices=("all", "labelled"), help="mtat: which clips; by default all")
    data("--subset", choices=("small", "medium", "large", "full"), help="fma: by default medium")
    data("--download", action="store_true", help="fetch the published archives into --root, once")
    data("--name", help="of the folder under data/; by default that of the data set, or of --root")
    data("--out", type=Path, help="the prepared folder, instead of data/NAME")
    data("--segment", type=number(0.001, 1e6), metavar="SECONDS",
         help="cut longer files into clips of one song")
    data("--sample-rate", type=number(1000, 768_000, int), default=SAMPLE_RATE,
         help="Hz (default: %(default)s)")
    run = parser.add_argument_group("run").add_argument
    run("--workers", type=number(1, 10_000, int), default=os.cpu_count(),
        help="decoding processes (default: the processor's cores, %(default)s)")
    run("--max-skipped", type=number(0, 1), default=0.01, help="share of bad files (default: 0.01)")
    run("--timeout", type=number(0.001, 1e6), default=300.0, help="s for a file (default: 300)")
    run("--dry-run", action="store_true", help="say how long it would take, how large it would be")
    run("--shard", metavar="I/N", help="only part I of N, into a folder of its own")
    run("--check", metavar="NAME", help="verify a prepared folder and stop")
    return parser


def number(least: float, most: float, kind: Callable = float) -> Callable:
    """The type of a flag that takes a number from `least` to `most`."""
    def read(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(
                f"expected a number from {least:g} to {most:g}, got {text}")
        return kind(text)
    return read


def parse(argv: list[str]) -> argparse.Namespace:
    """Arguments that fit together; the parser's error (exit code 2) says what does not."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.check:
        try:
            args.check = find(args.check)
        except FileNotFoundError as error:
            parser.error(str(error))
        return args
    if not args.data:
        parser.error(f"expected --data {'|'.join(sorted(DATASETS))}, or --check NAME")
    if not args.root and args.data != "demo":
        parser.error(f"--data {args.data} needs --root DIR, the folder with the recordings")
    for path in filter(None, (args.root, args.labels)):
        if not path.exists() and not (args.download and path == args.root):
            parser.error(f"{path}: no such file or folder")
    for flag, owner in (("labels", "folder"), ("split", "mtat"), ("subset", "fma")):
        if getattr(args, flag) and args.data != owner:
            parser.error(f"--{flag} goes with --data {owner}")
    if args.dry_run and args.download:
        parser.error("--dry-run does nothing: type it without --download")
    shard = re.fullmatch(r"([1-9]\d{0,4})/(\d{1,5})", args.shard or "1/1")
    if not shard or int(shard[1]) > int(shard[2]):
        parser.error(f"--shard: expected I/N with 1 <= I <= N, as in 2/4, got {args.shard}")
    args.shard = (int(shard[1]), int(shard[2])) if args.shard else None
    return args


def say(text: str, stream) -> None:
    """Print text whose control characters, in file names and tags, do nothing to a terminal."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(text))
    try:
        print(shown, file=stream, flush=True)
    except (OSError, ValueError):  # its reader has gone, or the disk behind it is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(args: argparse.Namespace, argv: list[str]) -> str:
    """Read a data set and write its folder, or say what that would be; the text to be told."""
    if args.download:
        engine("fetch").fetch(args.data, args.root, args.subset or "medium")
    name = args.name or (args.root.resolve().name if args.data == "folder" else args.data)
    given = {flag: getattr(args, flag) for flag in ("labels", "split", "subset")}
    listing = DATASETS[args.data](args.root, **{flag: x for flag, x in given.items() if x})
    if args.shard:
        i, n = args.shard
        listing = listing.shard(i, n)
        name = f"{name}.shard-{i:0{len(str(n))}}-of-{n}"
    out = args.out or Path("data", name)
    options = Options(args.sample_rate, args.segment, args.workers, args.max_skipped, args.timeout,
                      command=shlex.join(["python", "prepare.py", *argv]))
    if args.dry_run:
        return engine("writing").forecast(listing, out, options)
    meta = write(listing, out, options)
    return f"{out}\n{engine('writing').describe(meta)}\n{following(meta, out, args)}"


def following(meta: dict, out: Path, args: argparse.Namespace) -> str:
    """What one types next, quoted so that it can be pasted, for what was prepared."""
    name = shlex.quote(out.name if out.parent == Path("data") else str(out))
    run = shlex.quote(f"runs/{meta['name']}/encoder.pt")
    after = f"python evaluate.py --ckpt {run}"
    if meta["task"] == "none":
        after = f"python -m library index {shlex.quote(str(args.root))} --ckpt {run}"
    if args.shard:
        every = out.with_name(re.sub(r"shard-\d+-of", "shard-*-of", out.name))
        name = f"{every}   # when all parts are there"
    return f"next: python pretrain.py --data {name}\nthen: {after}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # no file shall take the place of a closed stderr, where decoders talk
    os.close(spare)
    args = parse(argv)
    try:
        if not args.check:
            say(run(args, argv), sys.stdout)
            return 0
        faults = check(args.check, progress=sys.stderr is not None)
        outcome = f"{len(faults)} faults" if faults else "as it was written"
        say("\n".join([*faults[:20], f"{args.check}: {outcome}"]), sys.stdout)
        return 1 if faults else 0
    except KeyboardInterrupt:
        say("prepare.py: interrupted; the same command continues where it stopped", sys.stderr)
    except (ValueError, OSError) as error:
        say(f"prepare.py: error: {error}", sys.stderr)
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
