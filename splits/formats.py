"""Samples from recordings in any format people own, or the reason why not: what is not whole does
not pass.

Used by prepare.py through `blocks(path)`; imports nothing of ours. containers.py finds the streams
of a file and what its container says of their length. libsndfile decodes what it can; the rest
(m4a, aac, wma, webm, ape ...) goes through PyAV, which brings ffmpeg's decoders.
"""

import contextlib
import importlib.util
import io
import os
import re
import stat
from typing import Iterator

import numpy as np
import soundfile

from .containers import find_parts

VALUES = 1 << 20  # of a block, all channels together
SPIKE = 16  # so many samples of a block may be one
SECONDS = 2  # of a block, at most: so exact is the place of an error
UNKNOWN = 1 << 62  # samples: libsndfile's word for a length that no header states


class Window(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file, part):
        self.file = file
        self.part = part
        self.size = len(part.head) + part.end - part.begin
        self.at = 0

    def readable(self):
        """It is."""
        return True

    def seekable(self):
        """It is."""
        return True

    def seek(self, offset, whence=os.SEEK_SET):
        """Go to a byte; returns its number."""
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self):
        """The number of the next byte."""
        return self.at

    def readinto(self, buffer):
        """Fill the buffer as far as there are bytes; returns how many."""
        head = self.part.head
        if self.at < len(head):
            data = head[self.at : self.at + len(buffer)]
        else:
            self.file.seek(self.part.begin + self.at - len(head))
            data = self.file.read(max(0, min(len(buffer), self.size - self.at)))
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def blocks(path, survey: "Survey") -> Iterator[tuple[int, int, np.ndarray]]:
    """Decode a file block by block, in bounded memory.

    Args:
        path: the file.
        survey (Survey): learns about the recording.

    Yields (k, rate, mono): of the k-th stream in the file its rate in Hz, and the mean of its
    channels (n,) float32. Raises ValueError for what is no audio, cut off or damaged; the message
    says which, and where. Some of it comes after the last block: only the end tells whether a file
    is whole.
    """
    kind = os.stat(path).st_mode
    if not stat.S_ISREG(kind):
        names = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise ValueError(f"{names.get(stat.S_IFMT(kind), 'a device')}, not a file")
    # Two handles: the second one's place is libsndfile's to move.
    with open(path, "rb") as file, open(path, "rb", buffering=0) as raw:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise ValueError("the file is empty (0 bytes)")
        for k, part in enumerate(find_parts(file, size, survey.notes)):
            for survey.rate, block in _decode(file, raw, part, size):
                yield k, survey.rate, survey.mix(block)
    if survey.length == 0:
        raise ValueError("no samples in it")
    if survey.wrong:
        raise ValueError(f"{survey.wrong} of {survey.length} samples are NaN or infinite")


class Survey:
    """What is to be known of a recording, gathered block by block as it is decoded."""

    def __init__(self):
        self.rate = 0        # Hz, of the file
        self.length = 0      # samples of the file
        self.peak = 0.0
        self.flat = 0        # samples in the middle of three at the peak
        self.wrong = 0       # NaN or infinite
        self.energy = 0.0    # of the channels, their mean
        self.mono_energy = 0.0
        self.notes = []      # what is odd, in words

    def mix(self, block: np.ndarray) -> np.ndarray:
        """The mean of the channels of a block (n, C) as (n,)."""
        mono = block @ np.full(block.shape[1], 1 / block.shape[1], np.float32)
        self.wrong += int((~np.isfinite(mono)).sum())
        magnitude = np.abs(mono)
        peak = float(magnitude.max())
        if peak > 1 and len(mono) > SPIKE:
            # A lone sample far above all others is a fault of the file, and must not set the level.
            level = np.partition(magnitude, -SPIKE - 1)[-SPIKE - 1]
            if peak > 4 * level:
                second = self.length / self.rate
                self.notes.append(f"spike: {peak:.3g} near {second:.1f} s, clipped")
                mono = mono.clip(-level, level)
                magnitude = np.abs(mono)
                peak = float(level)
        if peak > 0.9:
            self._count_flat(magnitude, peak)
        self.peak = max(self.peak, peak)
        self.length += len(mono)
        if block.shape[1] > 1 and np.abs(block).max() < 1e9:
            self.energy += float(np.vdot(block, block)) / block.shape[1]
            self.mono_energy += float(mono @ mono)
        return mono

    def _count_flat(self, magnitude, peak):
        """Samples at the peak with neighbours at the peak: distortion cuts tops off."""
        if peak > 1.0001 * self.peak:
            self.flat = 0
        top = magnitude >= 0.9999 * max(peak, self.peak)
        self.flat += int((top[:-2] & top[1:-1] & top[2:]).sum())

    def facts(self) -> dict:
        """{rate, peak, clipped: the share of flat-topped samples, notes}."""
        notes = list(self.notes)
        if self.mono_energy < 1e-4 * self.energy:
            notes.append("out of phase: its channels cancel out")
        clipped = self.flat / max(1, self.length) if self.peak > 0.9 else 0.0
        return {"rate": self.rate, "peak": self.peak, "clipped": clipped, "notes": notes}


def _decode(file, raw, part, size):
    """(rate, samples (n, C)) of one part, by the decoder that takes it."""
    whole = (part.begin, part.end, part.head) == (0, size, b"")
    # By its descriptor where that will do: so names that are not UTF-8 open as well.
    try:
        sound = InOrder(raw.fileno() if whole else Window(file, part), closefd=False)
    except soundfile.SoundFileError as error:
        yield from _by_av(Window(file, part), error)
        return
    with sound:
        # libsndfile 1.2 calls whatever opus ffmpeg wrote malformed after its first ten seconds.
        if sound.subtype == "OPUS" and importlib.util.find_spec("av"):
            yield from _by_av(Window(file, part), "")
        else:
            yield from _by_libsndfile(sound, part)


# ----------------------------------------------------------------------------------------- decoders

class InOrder(soundfile.SoundFile):
    """Reads from front to back: soundfile seeks after each block, which repairs what is damaged by
    hearing its end twice, and which a piped FLAC refuses."""

    def seekable(self):
        """Say no, so that nobody seeks."""
        return False


def _usual(rate):
    """The rate, if it is one that audio has: a header may claim anything."""
    if not 1000 <= rate <= 768_000:
        raise ValueError(f"its header claims {rate:,} Hz; expected 1 to 768 kHz")
    return rate


def _by_libsndfile(sound, part):
    """The blocks of one stream that libsndfile has opened."""
    rate = _usual(sound.samplerate)
    frames = max(1024, min(SECONDS * rate, VALUES // sound.channels))
    mpeg = sound.format == "MP3"
    promised = part.samples or (0 if mpeg else sound.frames)
    n = 0
    try:
        # No more than what is promised: a FLAC's decoder would stumble over a tag behind it.
        while wanted := min(frames, frames if mpeg else sound.frames - n):
            block = sound.read(wanted, dtype="float32", always_2d=True)
            if not len(block):
                break
            n += len(block)
            yield rate, block
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise ValueError(f"damaged: it cannot be decoded after {n / rate:.1f} s: "
                         f"{_reason(error)}") from None
    # Every page of an Ogg has been checked, and some encoders leave gaps between its time stamps.
    missing = rate // 4 if sound.format == "OGG" else 0
    if promised < UNKNOWN and n < promised - missing:
        raise ValueError(f"cut off or damaged: {n / rate:.1f} of {promised / rate:.1f} s come out")
    said = re.search(r"hole|[Cc]orrupted|LOST_SYNC|BAD_HEADER|CRC_MISMATCH", sound.extra_info)
    if said:
        raise ValueError(f"damaged: the decoder reports `{said[0]}` in its {n / rate:.1f} s")


# No playlists: they would make ffmpeg open other files, and addresses.
AV_OPTIONS = {"format_whitelist": ",".join("""
    aac ac3 aiff amr ape asf au avi caf dsf dts dtshd eac3 flac flv iff m4a matroska mov mp3 mp4 mpc
    mpc8 mpeg mpegts ogg oma rm shn tak tta voc w64 wav webm wv xwma""".split())}
COUNTED = {"tta", "ape", "tak", "wavpack", "shorten", "mpc7", "mpc8"}  # stop when all is decoded
GUESSED = {"aac", "ac3", "amr", "dts", "dtshd", "eac3", "mp3", "mpeg", "mpegts"}  # lengths


def _by_av(file, refusal):
    """The blocks of one stream by PyAV; `refusal` is what libsndfile said of it."""
    try:
        import av
    except ImportError:
        raise ValueError(f"cannot be decoded: {_reason(refusal)}; other formats than wav flac ogg "
                         "opus mp3 aiff need PyAV: pip install av") from None
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    n = 0
    rate = 0
    try:
        with av.logging.Capture() as said, contextlib.ExitStack() as stack:
            box = stack.enter_context(av.open(file, options=AV_OPTIONS, metadata_errors="replace"))
            stream = box.streams.best("audio")
            if stream is None or stream.codec_context is None:
                raise ValueError("there is no audio in it that can be decoded")
            rate = stream.codec_context.sample_rate or 1
            stream.codec_context.options = {"err_detect": "crccheck"}
            stream.codec_context.thread_count = 1  # what other threads say would not be heard
            for rate, block in _frames(box.decode(stream)):
                n += len(block)
                yield _usual(rate), block
            stated = _stated_seconds(box, stream)
    except av.FFmpegError as error:
        reason = said[-1][2].strip() if said else error.strerror
        if not rate:
            raise ValueError(f"cannot be decoded: {_reason(refusal)}; {reason}") from None
        raise ValueError(f"damaged after {n / rate:.1f} s: {reason}") from None
    if n < (stated - 0.25) * rate:
        raise ValueError(f"cut off or damaged: {n / rate:.1f} of {stated:.1f} s come out")
    if said:
        raise ValueError(f"damaged: the decoder reports `{said[0][2].strip()}` in its "
                         f"{n / rate:.1f} s")
    if file.at < 0.9 * file.size and stream.codec_context.name in COUNTED:
        raise ValueError(f"damaged: the decoder stops after {n / rate:.1f} s, before the end")


def _frames(frames):
    """(rate, (n, C) float32) in blocks out of PyAV's frames of some thousand samples."""
    waiting = []
    kind = (0, 0)
    for frame in frames:
        samples = _floats(frame)
        values = sum(part.size for part in waiting)
        most = min(VALUES, SECONDS * kind[0] * kind[1])
        if waiting and (kind != (frame.sample_rate, samples.shape[1]) or values > most):
            yield kind[0], np.concatenate(waiting)
            waiting = []
        kind = (frame.sample_rate, samples.shape[1])
        waiting.append(samples)
    if waiting:
        yield kind[0], np.concatenate(waiting)


def _floats(frame):
    """The samples of PyAV's frame as (n, C) float32 in [-1, 1]."""
    samples = frame.to_ndarray()
    if frame.format.is_planar:
        samples = samples.T
    else:
        samples = samples.reshape(-1, frame.layout.nb_channels)
    if samples.dtype.kind == "u":
        return (samples.astype(np.float32) - 128) / 128
    scale = 2.0 ** (8 * samples.dtype.itemsize - 1) if samples.dtype.kind == "i" else 1.0
    return samples.astype(np.float32) / np.float32(scale)


def _stated_seconds(box, stream):
    """The duration that the container states, in seconds; 0 where it would be a guess."""
    if set(box.format.name.split(",")) & GUESSED:
        return 0.0
    if stream.duration:
        return float(stream.duration * stream.time_base)
    alone = len(box.streams) == 1
    return box.duration / 1e6 if alone and box.duration else 0.0


def _reason(error):
    """What libsndfile says, in few words."""
    return str(getattr(error, "error_string", error)).strip().rstrip(".") or "format not recognised"


