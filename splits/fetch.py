"""Download and unpack the data sets that are public: `python prepare.py --data mtat --root DIR
--download`.

An interrupted download continues; what arrives is checked before it gets its name, and unpacked
beside its destination before anything of it is moved there.
"""

import hashlib
import http.client
import os
import re
import shlex
import shutil
import sys
import tarfile
import time
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

MTAT = ("https://mirg.city.ac.uk/datasets/magnatagatune/",)
GTZAN = ("http://opihi.cs.uvic.ca/sound/",
         "https://huggingface.co/datasets/marsyas/gtzan/resolve/main/data/")
FMA = ("https://os.unil.cloud.switch.ch/fma/",)
GB = 10 ** 9


@dataclass
class Download:
    """A file of a data set and where it is to be had."""
    name: str
    places: tuple       # addresses without the name, tried in turn
    most: float         # GB: nothing larger is taken
    checksum: str = ""  # as published: "sha256:..." or "sha1:..."


DOWNLOADS = {
    "mtat": [
        Download("annotations_final.csv", MTAT, 0.1,
                 "sha256:99b94e95825d4fa576386a5367b9c96e0ec636e9f9c240aceb492f4728f68c3c"),
        Download("clip_info_final.csv", MTAT, 0.1),
        *(Download(f"mp3.zip.00{k}", MTAT, 3) for k in (1, 2, 3))],
    "gtzan": [
        Download("genres.tar.gz", GTZAN, 3,
                 "sha256:24347e0223d2ba798e0a558c4c172d9d4a19c00bb7963fe055d183dadb4ef2c6")],
    "fma": [
        Download("fma_metadata.zip", FMA, 1, "sha1:f0df49ffe5f2a6008d7dc83c6915b31835dfe733")]}
FMA_AUDIO = {
    "small": Download("fma_small.zip", FMA, 15, "sha1:ade154f733639d52e35e32f5593efe5be76c6d70"),
    "medium": Download("fma_medium.zip", FMA, 40, "sha1:c67b69ea232021025fca9231fc1c7c1a063ab50b"),
    "large": Download("fma_large.zip", FMA, 150, "sha1:497109f4dd721066b5ce5e5f250ec604dc78939e"),
    "full": Download("fma_full.zip", FMA, 1500, "sha1:0f0ace23fbe9ba30ecb7e95f763e435ea802b8ab")}
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, ValueError,
           NotImplementedError)


def fetch(data: str, root, subset: str = "medium", pause: float = 2.0) -> None:
    """Download and unpack what a data set lacks in `root`; interrupted, it continues.

    Raises ValueError when the data set is not public, OSError when an address fails, a checksum
    does not fit or an archive is not what it should be.
    """
    if data not in DOWNLOADS:
        raise ValueError(f"--download: {data} is not public; {', '.join(sorted(DOWNLOADS))} are")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    ready = root / "downloaded.txt"
    finished = ready.read_text(encoding="utf-8").split() if ready.exists() else []
    archives = []
    for item in [*DOWNLOADS[data], *([FMA_AUDIO[subset]] if data == "fma" else [])]:
        if item.name in finished:
            continue
        path = root / item.name
        if not path.exists() or not _fits(path, item.checksum):
            download([place + item.name for place in item.places], path, item.checksum,
                     pause=pause, most=round(item.most * GB))
        if path.suffix != ".csv":
            archives.append(path)
    pieces = [path for path in archives if re.fullmatch(r"\.00\d", path.suffix)]
    for archive in archives:
        if archive not in pieces:
            unpack(archive, root)
    if pieces:  # a zip that was cut
        whole = root / "mp3.zip"
        with open(whole, "wb") as file:
            for piece in pieces:
                with open(piece, "rb") as source:
                    shutil.copyfileobj(source, file, 1 << 24)
        unpack(whole, root, pieces)
        whole.unlink()
    for archive in archives:
        with open(ready, "a", encoding="utf-8") as file:
            file.write(archive.name + "\n")
        archive.unlink()


def _fits(path, checksum):
    """Does a file have the checksum that was published? Yes where none was."""
    kind, _, digest = checksum.partition(":")
    if not checksum:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest() == digest


# ----------------------------------------------------------------------------------------- archives

def unpack(archive, root, pieces=(), growth: int = 20, spare: int = GB) -> None:
    """Unpack a .zip or .tar.gz beside its destination, then move what came out into `root`.

    File by file: what else lies in a folder of the same name stays. Nothing but plain files is
    taken, none of them outside `root`, and no more bytes than `growth` times the archive's and
    `spare` more. `pieces` are the files to remove where the archive, which was joined from them, is
    damaged.
    """
    archive = Path(archive)
    half = Path(root) / f"{archive.name}.unpacking"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    print(f"unpacking {archive.name}", file=sys.stderr)
    try:
        left = growth * archive.stat().st_size + spare
        for name, source in _members(archive):
            target = half / name
            # By the real path: a filter of names alone has been escaped before.
            inside = os.path.realpath(target).startswith(os.path.realpath(half) + os.sep)
            if not inside or "\\" in name or ":" in name.split("/")[0]:
                raise ValueError(f"{name!r} would lie outside of the folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            left = _write(source, target, left)
    except DAMAGED as error:
        shutil.rmtree(half, ignore_errors=True)
        remove = shlex.join(map(str, pieces or [archive]))
        raise OSError(f"{archive}: cannot be unpacked ({error}); rm {remove} and type the same "
                      "command again") from None
    for path in [path for path in half.rglob("*") if path.is_file()]:
        target = Path(root) / path.relative_to(half)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(half)


def _members(archive):
    """(name, open file) of each plain file in an archive of the type that its name says."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                kind = member.external_attr >> 28  # of Unix: 8 a plain file, 4 a folder, 0 not said
                if member.is_dir():
                    continue
                if kind not in (0, 8):
                    raise ValueError(f"{member.filename!r} is no plain file")
                with file.open(member) as source:
                    yield member.filename, source
        return
    with tarfile.open(archive, "r:gz") as file:
        for member in file:
            if member.isdir():
                continue
            if not member.isreg():
                raise ValueError(f"{member.name!r} is no plain file")
            yield member.name, file.extractfile(member)


def _write(source, target, left):
    """Copy at most `left` bytes; returns how many are left then."""
    with open(target, "wb") as file:
        while data := source.read(1 << 20):
            left -= len(data)
            if left < 0:
                raise ValueError("it unpacks to far more than its own size")
            file.write(data)
    return left


# ----------------------------------------------------------------------------------------- download

def download(addresses: list[str], path, checksum: str = "", tries: int = 5, pause: float = 2.0,
             most: int = GB) -> None:
    """Fetch one file: continue what is there of it, try the addresses in turn, check, then name it.

    Args:
        addresses (list of str): where it is; tried in turn.
        path: the file to make; the part that has arrived stands in `path.part`.
        checksum (str): "sha256:..." (or md5, sha1), or "" where none is published.
        tries (int): in all.
        pause (float): seconds between them.
        most (int): bytes; a longer file is not taken. At 20 kB/s it must arrive.
    """
    path = Path(path)
    part = Path(f"{path}.part")
    tries = max(tries, len(addresses))
    latest = time.monotonic() + 600 + most / 20_000
    wrong = ""
    for n in range(tries):
        address = addresses[n % len(addresses)]
        try:
            _continue(address, part, most, latest)
            if not _fits(part, checksum):
                kind = checksum.partition(":")[0]
                with open(part, "rb") as file:
                    found = hashlib.file_digest(file, kind).hexdigest()
                part.unlink()
                raise OSError(f"{kind} is {found}, expected {checksum.partition(':')[2]}")
            os.replace(part, path)
            return
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are among the first
            if getattr(error, "code", None) == 416:  # what is there is longer than the file
                part.unlink(missing_ok=True)
            wrong = f"{address}: {error}"
        if time.monotonic() > latest:
            break
        if n + 1 < tries:
            time.sleep(pause * min(n + 1, 10))
    raise OSError(f"{path.name} was not downloaded; the last of {tries} tries: {wrong}; what has "
                  "arrived is kept, the same command continues")


def _continue(address, part, most, latest):
    """Append to `part` what an address has more of it; OSError where not all of it comes."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        have = have if answer.status == 206 else 0
        size = have + int(answer.headers["Content-Length"] or 0)
        with open(part, "ab" if have else "wb") as file, tqdm(
                initial=have, total=size, unit="B", unit_scale=True, desc=part.stem) as bar:
            while data := answer.read1(1 << 20):
                if file.tell() + len(data) > most:
                    raise OSError(f"more than the {most:,} bytes that are expected at most")
                if time.monotonic() > latest:
                    raise OSError("too slow: the time for it is over")
                file.write(data)
                bar.update(len(data))
    if part.stat().st_size < size:
        raise OSError(f"the connection was lost after {part.stat().st_size:,} of {size:,} bytes")
