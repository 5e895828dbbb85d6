"""What a container says of its own length, and where the streams in it begin and end.

`find_parts` is asked by formats.py before it decodes; imports nothing of ours. A file may consist
of several streams in a row (a recorded radio station, two mp3s joined): each becomes a Part.

    container                   is known to be whole by
    wav RF64 W64 AIFF CAF AU    the size that its header states, against what is there
    mp4 m4a wma                 the sizes of its boxes, or of the file
    Ogg                         checksum and number of every page, and the mark at its end
    mp3 mp2                     frame after frame without a gap, as many as the header counts
    FLAC                        (its decoder counts, and has checksums)

Tags and zeros behind the audio are no damage.
"""

import re
import struct
import zlib
from dataclasses import dataclass
from typing import BinaryIO

SLACK = 256  # bytes: some headers count themselves, or a byte that pads


@dataclass
class Part:
    """One stream of a file: bytes begin to end, read as if `head` stood before them."""
    begin: int
    end: int
    head: bytes = b""
    samples: int = 0  # so many at least must come out, where the container tells


def find_parts(file: BinaryIO, size: int, notes: list[str]) -> list["Part"]:
    """The streams of a file, in order, as a list of Part; ValueError where the container shows
    damage."""
    start = _after_id3(file, 0)
    magic = _bytes(file, start, 16)
    whole = Part(0 if start >= size else start, size)
    if magic[:4] == b"OggS":
        return _ogg_parts(file, size)
    if magic[:4] == b"fLaC":
        return _flac_parts(file, whole)
    if magic[:4] in (b".snd", b"dns."):
        return _au_parts(file, whole)
    if magic == ASF[:16]:
        return _asf_parts(file, whole)
    if magic[4:8] == b"ftyp":
        return _mp4_parts(file, whole)
    layout = next((layout for word, layout in LAYOUTS.items() if magic.startswith(word)), None)
    if layout:
        return _chunked_parts(file, whole, layout)
    parts = _mpeg_parts(file, size, start, notes)
    whole.end = _before_tags(file, size)
    return parts or [whole]


def _bytes(file, at, n):
    file.seek(at)
    return file.read(n)


def _after_id3(file, at):
    """Where the ID3 tags end that begin here; their sizes have seven bits a byte."""
    while (head := _bytes(file, at, 10))[:3] == b"ID3" and len(head) == 10:
        length = sum((byte & 127) << 7 * (3 - i) for i, byte in enumerate(head[6:]))
        at += 10 + length + (10 if head[5] & 16 else 0)
    return at


@dataclass
class Layout:
    """How a container made of chunks writes them down."""
    header: int      # bytes before the first chunk
    name: int        # bytes of a chunk's name
    size: str        # of a chunk, as struct reads it
    audio: bytes     # the name of the chunk with the samples
    known: int = 0x7F000000  # what a pipe promises is larger
    inclusive: bool = False  # a size counts name and size
    align: int = 2


GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")  # the end of every name in a W64
LAYOUTS = {
    b"RIFF": Layout(12, 4, "<I", b"data"),
    b"RF64": Layout(12, 4, "<I", b"data"),
    b"BW64": Layout(12, 4, "<I", b"data"),
    b"RIFX": Layout(12, 4, ">I", b"data"),
    b"FORM": Layout(12, 4, ">I", b"SSND"),
    b"caff": Layout(8, 4, ">q", b"data", known=1 << 62, align=1),
    b"riff": Layout(40, 16, "<q", b"data" + GUID, 1 << 62, True, align=8)}


def _chunked_parts(file, whole, layout):
    """wav, RF64, W64, AIFF, CAF: one file after another, each with the size of its samples."""
    parts = [whole]
    size = whole.end
    first = whole.begin + layout.header
    audio = False
    long_size = None  # RF64 keeps it in a chunk of its own
    width = layout.name + struct.calcsize(layout.size)
    while len(head := _bytes(file, first, width)) == width:
        name = head[: layout.name]
        (length,) = struct.unpack(layout.size, head[layout.name :])
        if name[:4] in LAYOUTS:  # another file begins
            parts[-1].end = first
            parts.append(Part(first, size))
            first += layout.header
            continue
        if name == b"ds64":
            (long_size,) = struct.unpack("<Q", _bytes(file, first + width + 8, 8).ljust(8, b"\0"))
        if length == 0xFFFFFFFF and long_size is not None:
            length = long_size
        elif name == layout.audio and not 0 <= length < layout.known:
            break  # a program that writes into a pipe promises 2 or 4 GiB, or -1
        end = first + length + (0 if layout.inclusive else width)
        if name == layout.audio:
            _is_there(end - first - width, size - first - width)
        if not first < end <= size:
            if audio:
                parts[-1].end = first  # what follows is no chunk
            break
        audio = audio or name == layout.audio
        first = end + -(end - parts[-1].begin) % layout.align
    return parts


def _is_there(promised, found):
    """ValueError where fewer bytes are there than a header promises."""
    if promised > found + SLACK:
        raise ValueError(f"cut off: its header promises {promised:,} bytes of audio, "
                         f"{found:,} are there")


def _au_parts(file, whole):
    """AU: a header with offset and size of the samples; one file after another."""
    magic = _bytes(file, whole.begin, 12)
    words = struct.unpack(">4sII" if magic[:4] == b".snd" else "<4sII", magic.ljust(12, b"\0"))
    first = whole.begin + words[1]
    if words[2] >= 0x7F000000:  # written into a pipe
        return [whole]
    _is_there(words[2], whole.end - first)
    following = first + words[2]
    if _bytes(file, following, 4) != magic[:4]:
        return [whole]
    return [Part(whole.begin, following), *_au_parts(file, Part(following, whole.end))]


ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # begins a wma
ASF_ABOUT = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")  # begins its properties


def _asf_parts(file, whole):
    """wma: the size of the file stands among its properties; one file after another."""
    at = _find(file, ASF_ABOUT, whole.begin, min(whole.end, whole.begin + SEARCHED))
    if at is None:
        return [whole]
    (length,) = struct.unpack("<Q", _bytes(file, at + 40, 8).ljust(8, b"\0"))
    (flags,) = struct.unpack("<I", _bytes(file, at + 88, 4).ljust(4, b"\0"))
    if flags & 1 or length < 100:  # written into a pipe
        return [whole]
    _is_there(length, whole.end - whole.begin)
    following = whole.begin + length
    if _bytes(file, following, 16) != ASF:
        return [whole]
    return [Part(whole.begin, following), *_asf_parts(file, Part(following, whole.end))]


def _mp4_parts(file, whole):
    """mp4, m4a: boxes, each with its size; a second `ftyp` begins another file."""
    parts = [whole]
    size = whole.end
    at = whole.begin
    while len(head := _bytes(file, at, 16)) >= 8:
        length, name, long_length = struct.unpack(">I4sQ", head.ljust(16, b"\0"))
        if name == b"ftyp" and at > parts[-1].begin:
            parts[-1].end = at
            parts.append(Part(at, size))
        length = long_length if length == 1 else length
        if name in (b"mdat", b"moov"):
            _is_there(length, size - at)
        if length < 8 or not name.isalnum():
            break
        at += length
    return parts


def _before_tags(file, size):
    """Where the audio ends before tags and zeros at the end of a file."""
    while True:
        tail = _bytes(file, max(0, size - 4096), min(size, 4096))
        zeros = len(tail) - len(tail.rstrip(b"\0"))
        if tail[-128:-125] == b"TAG":
            size -= 128
        elif tail[-32:-24] == b"APETAGEX":
            length, _, flags = struct.unpack("<III", tail[-20:-8])
            size -= length + (32 if flags >> 31 else 0)
        elif 16 <= zeros < size:  # fewer may well be audio
            size -= zeros
        else:
            return max(0, size)


def _find(file, word, at, size):
    """Where the bytes `word` stand next, from `at` on; None where they do not."""
    while at < size:
        data = _bytes(file, at, 1 << 20)
        found = data.find(word)
        if found >= 0:
            return at + found
        at += max(1, len(data) - len(word) + 1) if len(data) == 1 << 20 else size
    return None


def _flac_parts(file, whole):
    """FLAC: one stream after another; each begins with a header of 34 bytes."""
    begins = []
    at = whole.begin
    while at is not None:
        if _bytes(file, at, 8)[4:] in (b"\x00\x00\x00\x22", b"\x80\x00\x00\x22"):
            begins.append(at)
        at = _find(file, b"fLaC", at + 4, whole.end)
    parts = [Part(begin, end) for begin, end in zip(begins, [*begins[1:], whole.end])]
    for part in parts:
        # 36 bits count the samples; a stream from a pipe has none there, and its decoder reads on.
        if int.from_bytes(_bytes(file, part.begin + 21, 5).ljust(5, b"\0")) & (1 << 36) - 1 == 0:
            part.end = _before_tags(file, part.end)
    return parts or [whole]


REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _ogg_checksum(page):
    """Ogg's CRC-32 is zlib's with the bits of every byte, and of the result, the other way
    round."""
    page = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{crc:032b}"[::-1], 2)


def _ogg_parts(file, size):
    """Ogg: pages, each with a checksum and a number; a chain of streams, each from its first page
    to the one that is marked as its last."""
    parts = []
    numbers = {}  # of the streams that have not ended: the number of the next page
    rate = 48000
    seconds = 0.0
    at = 0
    while at < size:
        head = _bytes(file, at, 27)
        table = file.read(head[26]) if len(head) == 27 else b""
        if head[:4] != b"OggS":
            following = _find(file, b"OggS", at, size)
            if numbers and (following or not _empty(file, at, size)):
                raise ValueError(f"damaged after {seconds:.1f} s: bytes that are no Ogg")
            if following is None:
                break
            at = following
            continue
        page = head + table + file.read(sum(table))
        if len(page) < 27 + len(table) + sum(table) or len(table) < head[26]:
            raise ValueError(f"cut off after {seconds:.1f} s, in the middle of a page")
        flags, granule, serial, number, checksum = struct.unpack("<BqIII", head[5:26])
        if _ogg_checksum(page) != checksum:
            raise ValueError(f"damaged after {seconds:.1f} s: a page's checksum does not fit")
        if flags & 2:  # a stream begins
            if not numbers:
                parts.append(Part(at, size))
            rate = _ogg_rate(page[27 + len(table) :]) or rate
        elif numbers.get(serial) != number:
            raise ValueError(f"damaged after {seconds:.1f} s: a page is missing")
        numbers[serial] = number + 1
        seconds = granule / rate if granule > 0 else seconds
        at += len(page)
        if flags & 4:
            del numbers[serial]
            parts[-1].end = at
    if numbers:
        raise ValueError(f"cut off after {seconds:.1f} s: the stream's end is missing")
    return parts


def _ogg_rate(packet):
    """Hz that the first packet of a Vorbis stream states; None for others."""
    return struct.unpack("<I", packet[12:16])[0] if packet[:7] == b"\x01vorbis" else None


def _empty(file, at, size):
    """Is what follows nothing but zeros and tags?"""
    data = _bytes(file, at, 1 << 20)
    return not data.strip(b"\0") or data[:3] in (b"TAG", b"ID3") or data[:8] == b"APETAGEX"


# --------------------------------------------------------------------------------------------- MPEG

KBPS = {  # of MPEG 1, and of MPEG 2 and 2.5, by layer
    (1, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (1, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (1, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (2, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (2, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
    (2, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
SEARCHED = 1 << 16  # bytes: a frame must begin within so many
LONGEST = 2881  # bytes of a frame


@dataclass(frozen=True)
class Frame:
    """What the four bytes before a frame of an mp3 say."""
    layer: int
    rate: int     # Hz
    samples: int
    size: int     # bytes
    counts_at: int  # where a frame that counts the others says so


def _frame(head):
    """The Frame that four bytes announce, or None."""
    if len(head) < 4 or head[0] != 0xFF or head[1] < 0xE2:
        return None
    (word,) = struct.unpack(">I", head[:4])
    version = word >> 19 & 3  # 3: MPEG 1, 2: MPEG 2, 0: MPEG 2.5
    layer = 4 - (word >> 17 & 3)
    kbps = word >> 12 & 15
    rate = word >> 10 & 3
    if version == 1 or layer == 4 or kbps in (0, 15) or rate == 3:
        return None
    kbps = KBPS[1 if version == 3 else 2, layer][kbps - 1]
    rate = (44100, 48000, 32000)[rate] // (4 if version == 0 else 2 if version == 2 else 1)
    padding = word >> 9 & 1
    if layer == 1:
        return Frame(layer, rate, 384, (12000 * kbps // rate + padding) * 4, 0)
    samples = 576 if layer == 3 and version != 3 else 1152
    mono = word >> 6 & 3 == 3
    side = (17 if mono else 32) if version == 3 else (9 if mono else 17)
    return Frame(layer, rate, samples, samples // 8 * 1000 * kbps // rate + padding, 4 + side)


def _counted(data, frame):
    """How many frames the first frame of an mp3 says there are; None for a frame that says
    nothing."""
    word = data[frame.counts_at : frame.counts_at + 4]
    if word in (b"Xing", b"Info"):
        flags, count = struct.unpack(">II", data[frame.counts_at + 4 :][:8].ljust(8, b"\0"))
        return count if flags & 1 else 0
    if data[36:40] == b"VBRI":
        return struct.unpack(">I", data[50:54].ljust(4, b"\0"))[0]
    return None


def _first_frame(file, at, size):
    """Where the first of three frames in a row begins, at `at` or soon after; None where none
    does."""
    for found in re.finditer(rb"\xff(?=[\xe2-\xff])", _bytes(file, at, SEARCHED)):
        position = at + found.start()
        first = _frame(_bytes(file, position, 4))
        following = position
        for _ in range(3):
            frame = _frame(_bytes(file, following, 4))
            same = frame and (frame.layer, frame.rate) == (first.layer, first.rate)
            if not same and following < size:
                break
            following += frame.size if frame else 0
        else:
            return position
    return None


def _after_tag(file, at):
    """Where a tag ends, or a run of zeros, that begins here; `at` itself where neither does."""
    data = _bytes(file, at, 4096)
    if data[:3] == b"TAG":
        return at + 128
    if data[:3] == b"ID3":
        return _after_id3(file, at)
    if data[:8] == b"APETAGEX" and len(data) >= 32:
        length, _, flags = struct.unpack("<III", data[12:24])
        return at + length + (32 if flags >> 29 & 1 else 0)
    if data[:11] == b"LYRICSBEGIN":
        end = _find(file, b"LYRICS", at + 11, at + (1 << 20))
        return at if end is None else end + 9
    return at + len(data) - len(data.lstrip(b"\0"))


def _mpeg_parts(file, size, start, notes):
    """mp3 and mp2: frame after frame. None where no frames are found."""
    at = _first_frame(file, start, size)
    parts = []
    seconds = 0.0
    while at is not None:
        part, length, at = _mpeg_stream(file, at, size, seconds, notes)
        parts.append(part)
        seconds += length
    if parts and not parts[0].head:
        parts[0].begin = 0  # tags before it do no harm, and a whole file is read as such
    return parts or None


def _mpeg_stream(file, begin, size, before, notes):
    """Walk along the frames of one stream, which `before` seconds of others precede.

    A frame that counts the others begins a stream, and so do frames of another rate. Returns the
    Part, its seconds, and where the next one begins, or None.
    """
    head = _bytes(file, begin, 64)
    first = _frame(head)
    counted = _counted(head, first)
    at = begin if counted is None else begin + first.size
    end = at
    frames = 0
    following = None
    while at < size:
        data = _bytes(file, at, 64)
        frame = _frame(data)
        if frame and (frame.layer, frame.rate) == (first.layer, first.rate):
            if at + frame.size > size:
                notes.append("ends within a frame")  # whether one is missing a count tells
                break
            if frames and _counted(data, frame) is not None:
                following = at
                break
            frames += 1
            at += frame.size
            end = at
        elif _after_tag(file, at) > at:
            at = _after_tag(file, at)
        elif frame and _first_frame(file, at, size) == at:
            following = at
            break
        elif counted and counted <= frames or size - at < LONGEST:
            break
        else:
            seconds = before + frames * first.samples / first.rate
            raise ValueError(f"damaged after {seconds:.1f} s: bytes that are no mp3")
    end = size if at >= size and end == at else end
    part = _mpeg_part(file, begin, end, frames, counted)
    return part, frames * first.samples / first.rate, following


def _mpeg_part(file, begin, end, frames, counted):
    """The part that so many frames make. Where a count is missing or wrong libsndfile would guess
    the length, so a right one is put before the frames."""
    head = _bytes(file, begin, 64)
    frame = _frame(head)
    seconds = frame.samples / frame.rate
    if counted and frames < counted - 1:
        raise ValueError(f"cut off: {frames * seconds:.1f} of {counted * seconds:.1f} s are there")
    # What an encoder adds at both ends is taken off again: some thousand samples.
    samples = max(1, frames * frame.samples - 12_000)
    if frame.layer != 3 or counted in (frames, frames + 1):
        return Part(begin, end, samples=samples)
    if counted is not None:
        begin += frame.size
        head = _bytes(file, begin, 64)
        frame = _frame(head)
    words = head[:4] + bytes(frame.counts_at - 4) + b"Xing" + struct.pack(">II", 1, frames)
    return Part(begin, end, words.ljust(frame.size, b"\0"), samples)
