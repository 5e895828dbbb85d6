"""Every audio file below a folder, and what was left out; nothing is left out unsaid. Used by
prepare.py."""

import os
import stat
import unicodedata
from pathlib import Path
from typing import Callable

AUDIO = set("""
    .wav .wave .w64 .rf64 .caf .aif .aiff .aifc .au .snd .flac .ogg .oga .opus .spx .mp3 .mp2 .mpga
    .m4a .m4b .m4r .mp4 .aac .ac3 .wma .wv .ape .mpc .tta .tak .mka .webm .weba
    .dsf .dff""".split())
OTHER = set("""
    .jpg .jpeg .png .gif .bmp .webp .pdf .txt .nfo .log .cue .m3u .m3u8 .pls .csv .tsv .json .xml
    .html .htm .md .lrc .ini .db .sfv .md5 .url .py .zip .gz .npz .npy .pt .ts .pkl .cp
    .doc .rtf .torrent .part
    """.split())  # by custom they lie beside recordings: not worth a word
HIDDEN = set("""
    .DS_Store .AppleDouble .Spotlight-V100 .Trashes .fseventsd .TemporaryItems .git""".split())


class Found(dict):
    """{name: path} of audio files.

    aliases: {name by another link: name}; left_out: [{file, reason}].
    """

    def __init__(self):
        super().__init__()
        self.aliases = {}
        self.left_out = []


def audio_files(root, key: Callable[[Path], object]) -> Found:
    """Every audio file below root: {key of its relative path: path}, in order of the paths, as a
    Found.

    A file that links reach several times stands there once. Raises ValueError where two files have
    one key, FileNotFoundError, which has `left_out` as well, where there are none.
    """
    found = Found()
    names = {}  # (device, inode) of a file -> its name
    for path in _walk(Path(root), (), found.left_out, root):
        # One name has several spellings in Unicode, and file systems disagree on which; a locale
        # without UTF-8 makes others of its letters.
        text = os.fsencode(path.relative_to(root)).decode("utf-8", "surrogateescape")
        name = key(Path(unicodedata.normalize("NFC", text)))
        status = path.stat()
        first = names.setdefault((status.st_dev, status.st_ino), name)
        if first != name:
            found.aliases[name] = first
        elif found.setdefault(name, path) != path and not os.path.samefile(found[name], path):
            raise ValueError(f"{found[name]} and {path} are both {name}: remove or rename one")
    if not found:
        error = FileNotFoundError(f"{root}: expected audio files ({' '.join(sorted(AUDIO))}), "
                                  "found none")
        error.left_out = found.left_out
        raise error
    return found


def _walk(folder, above, left_out, root):
    """Yield the audio files below a folder, in order; `above` are the real paths of those around
    it."""
    def leave(path, reason):
        name = os.fsencode(path.relative_to(root)).decode("utf-8", "surrogateescape")
        left_out.append({"file": name, "reason": f"left out: {reason}"})

    real = os.path.realpath(folder)
    if real in above:
        leave(folder, "a link in a circle")
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        leave(folder, f"it cannot be read: {error.strerror}")
        return
    folders = []
    store = any(entry.name == "songs.sqlite" for entry in entries)  # of library/, amid the music
    for entry in entries:
        path = folder / entry.name
        if entry.name in HIDDEN or entry.name.startswith("._"):
            continue
        if entry.is_dir():
            folders.append(path)
        elif path.suffix.lower() in AUDIO:
            if entry.is_file():
                yield path
            else:
                leave(path, _what(path))
        elif path.suffix.lower() not in OTHER and not store:
            leave(path, "no audio by its name")
    for path in folders:
        yield from _walk(path, (*above, real), left_out, root)


def _what(path):
    """What a path is that is no file."""
    try:
        kind = path.stat().st_mode
    except OSError:
        return "a link to nothing"
    names = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return f"{names.get(stat.S_IFMT(kind), 'a device')}, not a file"
