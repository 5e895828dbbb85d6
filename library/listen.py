"""Files to audio: whole or in excerpts, at one loudness if that is wanted, decoded by processes of
their own.

A collection holds files that crash or hang a decoder. Here each decoding process may die: its file
is tried once more, alone, then reported, and all others go on."""

import contextlib
import hashlib
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import prepare
import soundfile
import torch
from torch.nn import functional as F

from library import copies
from library.terminal import Stop

LOUDNESS = 0.1  # root mean square of every window, where level shall not decide
NO_AUDIO = "no audio in it"  # why a folder is left out
SILENCE = 1e-4  # -80 dB: softer windows stay as they are, for they hold nothing but noise
RATES = range(1000, 768_001)  # Hz, of files that are read by seeking; others are prepare's to judge


# --- excerpts: a song in ten windows, without reading the rest


class Unseekable(Exception):
    """The container cannot seek, or not truly: the file has to be read in order."""


def place(length: int, size: int, count: int) -> np.ndarray:
    """Starts (count,) of windows of `size` spread evenly over `length` samples, each in the middle
    of its part.

    >>> place(100, 10, 3)
    array([15, 45, 75])
    """
    return ((length - size) * (np.arange(count) + 0.5) / count).astype(np.int64)


def by_seeking(path, sample_rate: int, size: int, count: int) -> tuple[np.ndarray, float]:
    """`count` windows (count, size) of a file and its seconds; raises Unseekable where it has to be
    read in order."""
    try:
        # As an open file, so that names in any encoding open as well.
        with (
            open(path, "rb", buffering=0) as raw,
            soundfile.SoundFile(raw.fileno(), closefd=False) as file,
        ):
            rate = file.samplerate
            span = math.ceil(size * rate / sample_rate) + 1
            if not file.seekable() or rate not in RATES or file.frames < 2 * count * span:
                raise Unseekable
            windows = np.empty((count, size), np.float32)
            for row, start in zip(windows, place(file.frames, span, count)):
                file.seek(start)
                block = file.read(span, dtype="float32", always_2d=True)
                if len(block) < span:
                    raise Unseekable
                mono = torch.from_numpy(
                    block @ np.full(block.shape[1], 1 / block.shape[1], np.float32)
                )
                row[:] = prepare.resample(mono, rate, sample_rate)[:size]
            return windows, file.frames / rate
    except (soundfile.SoundFileError, RuntimeError, OverflowError):
        raise Unseekable from None


def by_seeking_with_ffmpeg(
    path, sample_rate: int, size: int, count: int
) -> tuple[np.ndarray, float]:
    """As `by_seeking`, of containers that libsndfile does not read (m4a, wma, webm, ...)."""
    try:
        import av

        with open(path, "rb") as raw, av.open(raw) as container:
            sound = container.streams.audio[0]
            seconds = float((sound.duration or 0) * sound.time_base)
            seconds = seconds or (container.duration or 0) / av.time_base
            if seconds * sample_rate < 2 * count * size or sound.rate not in RATES:
                raise Unseekable
            windows = np.empty((count, size), np.float32)
            span = math.ceil(size * sound.rate / sample_rate) + 1
            starts = place(round(seconds * sound.rate), span, count)
            for row, start in zip(windows, starts):
                mono = torch.from_numpy(part_with_ffmpeg(container, sound, int(start), span))
                row[:] = prepare.resample(mono, sound.rate, sample_rate)[:size]
            return windows, seconds
    except Exception:  # ffmpeg's errors are of many types: prepare.py reads it in order and judges
        raise Unseekable from None


def part_with_ffmpeg(container, sound, start: int, span: int) -> np.ndarray:
    """Samples (span,) from `start` on of an open file's stream `sound`, the mean of channels."""
    import av

    # A little earlier, for a codec's first frame after a seek is not yet right.
    early = max(0.0, start / sound.rate - 0.2)
    container.seek(int(early / sound.time_base), stream=sound)
    plain = av.AudioResampler(format="fltp", layout=sound.layout, rate=sound.rate)
    parts: list[np.ndarray] = []
    missing = span
    for frame in container.decode(sound):
        first = round(float(frame.pts * sound.time_base) * sound.rate)
        for converted in plain.resample(frame):
            x = converted.to_ndarray()  # (channels, n)
            if not parts and first > start:
                raise Unseekable
            mono = x.mean(0)[max(0, start - first) :][:missing]
            parts += [mono] if len(mono) else []
            missing -= len(mono)
        if missing <= 0:
            return np.concatenate(parts)
    raise Unseekable


def stated_length(path) -> float:
    """The seconds that a file claims to have; 0 where it does not say."""
    import mutagen

    with contextlib.suppress(Exception):  # what a broken header raises has many types
        return float(mutagen.File(path).info.length)
    return 0.0


def by_reading(path, sample_rate: int, size: int, count: int) -> tuple[np.ndarray, float]:
    """As `by_seeking`, of any file that prepare decodes, in the memory of `count` windows.

    Where the windows lie depends on the length, which is true only at the end: a file that does not
    state it, or wrongly, is read twice. A song shorter than a window is padded with silence, one of
    few windows gives overlapping ones."""
    planned = round(stated_length(path) * sample_rate)
    windows, total = pick(prepare.stream(path, sample_rate), planned, size, count)
    if abs(total - planned) > 0.005 * total:
        windows, total = pick(prepare.stream(path, sample_rate), total, size, count)
    return windows, total / sample_rate


def pick(
    pieces: Iterable[torch.Tensor], length: int, size: int, count: int
) -> tuple[np.ndarray, int]:
    """The windows (n, size) of audio in pieces that `place` puts into `length` samples, and how
    long it truly is."""
    starts = place(length, size, count) if length > size else np.zeros(1, np.int64)
    windows = np.zeros((len(starts), size), np.float32)
    total = 0
    for piece in pieces:
        for row, start in zip(windows, starts):
            first = max(0, start - total)
            part = piece[first : max(0, start + size - total)]
            at = max(0, total - start)
            row[at : at + len(part)] = part
        total += len(piece)
    return windows, total


def excerpts(path, sample_rate: int, size: int, count: int) -> tuple[np.ndarray, float]:
    """`count` windows (n, size) spread over a song, decoded without the rest where its container
    can seek, and its seconds. Raises what `prepare.decode` raises."""
    for way in (by_seeking, by_seeking_with_ffmpeg, by_reading):
        with contextlib.suppress(Unseekable):
            windows, seconds = way(path, sample_rate, size, count)
            break
    if not np.isfinite(windows).all():
        raise ValueError(f"{path}: samples that are NaN or infinite")
    return windows, seconds


def every_window(path, sample_rate: int, size: int) -> Iterator[np.ndarray]:
    """All non-overlapping windows of a song in pieces (n, size); one shorter than a window is
    padded with silence."""
    rest = torch.zeros(0)
    whole = False
    for piece in prepare.stream(path, sample_rate):
        rest = torch.cat([rest, piece])
        full = len(rest) // size
        if full:
            whole = True
            for part in rest[: full * size].view(full, size).split(64):
                yield part.numpy().copy()
            rest = rest[full * size :]
    if not whole:
        yield F.pad(rest, (0, size - len(rest)))[None].numpy()


def equal_loudness(windows: np.ndarray) -> np.ndarray:
    """Windows (n, size) scaled to one root mean square each, so that level decides over nothing.

    >>> equal_loudness(np.full((1, 4), 0.5, np.float32))
    array([[0.1, 0.1, 0.1, 0.1]], dtype=float32)
    """
    level = np.sqrt(np.square(windows, dtype=np.float32).mean(1, keepdims=True))
    return np.where(level < SILENCE, windows, windows * (LOUDNESS / np.maximum(level, SILENCE)))


def audio_below(folder: Path) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """Every audio file below a folder, {its name there: its path}, and [(file, why)] of what was
    left out, which a folder without any is itself."""
    try:
        found = prepare.audio_files(folder)
        left_out = getattr(found, "left_out", [])
    except FileNotFoundError as error:
        found = {}
        left_out = getattr(error, "left_out", [])
    named = [(folder / one["file"], one["reason"].removeprefix("left out: ")) for one in left_out]
    if not found and folder not in dict(named):
        named.append((folder, NO_AUDIO))
    return found, named


def nothing_found(folders: list[Path], left_out: list[tuple[Path, str]]) -> Stop:
    """The end of a command that has nothing to hear; it says what lay there instead."""
    places = ", ".join(map(os.fspath, folders))
    others = [f"{path}: {why}" for path, why in left_out if why != NO_AUDIO]
    left = f" ({len(others)} left out, the first {others[0]})" if others else ""
    return Stop(f"{places}: expected audio files, found none{left}; name a folder with music")


def files_of(paths: list[Path]) -> tuple[dict[str, Path], list[tuple[Path, str]]]:
    """Every file that is named, and every audio file of every folder: {its name: its path}, and
    [(file, why)] of what was left out; Stop where two share a name, or there is none."""
    files: dict[str, Path] = {}
    left_out: dict[Path, str] = {}
    for path in paths:
        found, others = audio_below(path) if path.is_dir() else ({path.name: path}, [])
        left_out.update(others)
        for name, file in found.items():
            if files.setdefault(name, file) != file:
                raise Stop(
                    f"{files[name]} and {file} would both become {name}: name them one by one, "
                    "each with an --out of its own"
                )
    if not files:
        raise nothing_found(paths, list(left_out.items()))
    return files, list(left_out.items())


# --- what else a file says of itself


def tags_of(path) -> dict:
    """artist, title, album, year and genre as the file's own tags have them; None where they say
    nothing."""
    import mutagen

    names = {
        "artist": ("artist",),
        "title": ("title",),
        "album": ("album",),
        "year": ("originaldate", "date", "year"),
        "genre": ("genre",),
    }
    found = dict.fromkeys(names)
    with contextlib.suppress(Exception):  # a broken tag costs the tag, not the song
        tags = mutagen.File(path, easy=True).tags or {}
        for name, keys in names.items():
            values = next((tags[key] for key in keys if tags.get(key)), [])
            text = "; ".join(map(str, values)) if isinstance(values, list) else str(values)
            found[name] = text.strip()[:1000] or None
    return found


def sample_of(path) -> str:
    """A hash of a file's size, and of its beginning, middle and end: does it lie elsewhere now,
    unchanged?"""
    size = os.stat(path).st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in (0, size // 2, max(0, size - (1 << 16))):
            file.seek(start)
            digest.update(file.read(1 << 16))
    return digest.hexdigest()


@dataclass
class Heard:
    """What a decoding process says of a song when it has sent its windows."""

    seconds: float
    audio: str
    sample: str
    imprint: bytes = b""
    tags: dict = field(default_factory=dict)


def why_silent(path, sample_rate: int) -> str:
    """Of a recording that is silent as the mean of its channels: are they silent themselves?"""
    formats = prepare.engine("formats", plain=True)
    if formats:
        survey = formats.Survey()
        for _ in prepare.stream(path, sample_rate, survey):
            pass
        if survey.energy >= SILENCE**2 * survey.length:
            return "its channels cancel each other in mono: nothing to hear in their mean"
    return "silent: nothing to hear in it"


@dataclass(frozen=True)
class Hearing:
    """How songs are heard for the store: `hearing(path)` yields windows (n, size), and at the end a
    Heard."""

    sample_rate: int
    size: int
    count: int = 10
    every: bool = False

    def __call__(self, path) -> Iterator[np.ndarray | Heard]:
        if self.every:
            pieces = every_window(path, self.sample_rate, self.size)
        else:
            windows, seconds = excerpts(path, self.sample_rate, self.size, self.count)
            pieces = [windows]
        digest = hashlib.sha256()
        imprints: list[bytes] = []
        silent = True
        for windows in pieces:
            digest.update((windows * 32768).round().clip(-32768, 32767).astype("<i2").tobytes())
            silent = silent and bool(np.abs(windows).max() < SILENCE)
            chosen = windows if self.every else windows[place(len(windows), 1, copies.WINDOWS)]
            imprints += [copies.imprint(window[None], self.sample_rate) for window in chosen]
            yield equal_loudness(windows)
        if silent:
            raise ValueError(f"{path}: {why_silent(path, self.sample_rate)}")
        if self.every:
            seconds = max(stated_length(path), len(imprints) * self.size / self.sample_rate)
        chosen = [imprints[k] for k in place(len(imprints), 1, copies.WINDOWS)]
        yield Heard(seconds, digest.hexdigest(), sample_of(path), b"".join(chosen), tags_of(path))


@dataclass(frozen=True)
class Whole:
    """How files are heard for embeddings and tags: `whole(path)` yields all of a file, in pieces
    (n,)."""

    sample_rate: int

    def __call__(self, path) -> Iterator[np.ndarray]:
        for piece in prepare.stream(path, self.sample_rate):
            yield np.asarray(piece)


# --- processes

PIECE = "piece"  # a part of what was asked for
END = "end"  # the file is done
FAILED = "failed"  # it cannot be heard; the content is the reason
AGAIN = (
    "again"  # its process died or hung: what came of it so far is void, it will be tried once more
)


class Decoder:
    """A process that hears files; it may crash or hang without harm to others."""

    def __init__(self, hear: Callable):
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, hear), daemon=True)
        self.process.start()
        theirs.close()
        self.path = None
        self.since = 0.0

    def take(self, path):
        """Begin with a file."""
        self.path = path
        self.since = time.monotonic()
        self.pipe.send(path)

    def receive(self) -> tuple[str, object]:
        """What it has to say; (AGAIN, why) where it has died."""
        try:
            self.since = time.monotonic()
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            return AGAIN, f"it crashes the decoder (exit code {self.process.exitcode})"

    def close(self):
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _serve(pipe, hear):
    """A decoding process: paths in, (kind, content) out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Decoders talk on stderr, into the progress bar.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if sys.platform == "linux":
        # A fork holds the parent's locks and its ends of the other pipes: with them it would
        # outlive a killed parent.
        os.closerange(3, pipe.fileno())
        os.closerange(pipe.fileno() + 1, 1 << 16)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            path = pipe.recv()
            try:
                for piece in hear(path):
                    pipe.send((PIECE, piece))
                answer = (END, None)
            except Exception as error:  # whatever a decoder throws costs this file alone
                reason = str(error).strip().splitlines() or [type(error).__name__]
                answer = (FAILED, reason[0].removeprefix(f"{path}: "))
            pipe.send(answer)


def hear_all(
    paths: Iterable[Path], hear: Callable, workers: int = 1, timeout: float = 300.0
) -> Iterator[tuple[Path, str, object]]:
    """Decode files in processes: yields (path, kind, content), the pieces of each file in their
    order.

    Args:
        paths: files; each is asked for when a process is free for it.
        hear: hear(path) yields the pieces; it runs in the processes.
        workers: how many processes. timeout: seconds without a word after which a file is given up.

    kind: PIECE (content: the piece), END, FAILED (content: the reason), or AGAIN: what came of this
    file so far is void."""
    lost: list[Path] = []
    for path, kind, content in _hear(paths, hear, workers, timeout):
        lost += [path] if kind == AGAIN else []
        yield path, kind, content
    for path in lost:
        for _, kind, content in _hear([path], hear, 1, timeout):
            yield path, FAILED if kind == AGAIN else kind, content


def _hear(paths, hear, workers, timeout):
    """One round of `hear_all`, in which a file that crashes or hangs its process ends with
    AGAIN."""
    paths = iter(paths)
    idle: list[Decoder] = []
    busy: dict = {}  # pipe -> Decoder
    more = True
    try:
        while more or busy:
            while more and len(busy) < workers:
                path = next(paths, None)
                more = path is not None
                if more:
                    decoder = idle.pop() if idle else Decoder(hear)
                    decoder.take(path)
                    busy[decoder.pipe] = decoder
            ready = wait(list(busy), timeout=min(1.0, timeout))
            for pipe in ready:
                decoder = busy[pipe]
                kind, content = decoder.receive()
                if kind == AGAIN:
                    busy.pop(pipe).close()
                elif kind != PIECE:
                    idle.append(busy.pop(pipe))
                yield decoder.path, kind, content
                decoder.since = time.monotonic()
            for decoder in list(busy.values()):
                if time.monotonic() - decoder.since > timeout and not decoder.pipe.poll():
                    busy.pop(decoder.pipe).close()
                    yield decoder.path, AGAIN, f"not decoded after {timeout:g} s"
    finally:
        for decoder in [*idle, *busy.values()]:
            decoder.close()
