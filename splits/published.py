"""The published data sets: who is in which split with which labels, and where the files are to be had.

Used by prepare.py (`python prepare.py --data mtat --root DIR [--download]`). A reader takes the folder a data set was
unpacked into and returns a Listing; the label tables are read there as published, and are no part of this repository.
Only GTZAN's fault-filtered lists, which were published without a table, stand beside this file.

    name        the folder holds                                            clips (train / valid / test)
    mtat        annotations_final.csv, clip_info_final.csv, mp3 folders     18,706 / 1,825 / 5,329
    gtzan       a folder per genre                                          443 / 197 / 290
    fma         fma_metadata/, fma_SUBSET/                                  medium: 19,922 / 2,505 / 2,573
    msd         the five index files named below, 30 s previews             201,680 / 11,774 / 28,435
    billboard   billboard-2.0-index.csv, the songs one owns                 all train
"""

import hashlib
import http.client
import os
import pickle
import re
import shlex
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from prepare import SPLITS, Clip, Listing, audio_files, read_table

HERE = Path(__file__).resolve().parent


def read_mtat(root, split="all"):
    """MagnaTagATune: annotations_final.csv, clip_info_final.csv, mp3s in folders 0 to f (in root or in one below it).

    Split by folder: 0-b train, c valid, d-f test. The 50 most frequent tags; `split` "all" keeps every clip, "labelled"
    those with at least one of the 50. Three mp3s are empty in every copy; they are expected and named.
    """
    rows, columns = read_table(Path(root, "annotations_final.csv"))
    count = {tag: sum(row[tag] == "1" for row in rows) for tag in columns if tag not in ("clip_id", "mp3_path")}
    tags = sorted(count, key=lambda tag: (-count[tag], tag))[:50]
    songs = {row["clip_id"]: "|".join(row[key] for key in ("artist", "album", "track_number", "title"))
             for row in read_table(Path(root, "clip_info_final.csv"))[0]}
    place = {**dict.fromkeys("0123456789ab", "train"), "c": "valid", **dict.fromkeys("def", "test")}
    clips = [Clip(row["mp3_path"], None, place[row["mp3_path"][0]], songs[row["clip_id"]],
                  tuple(tag for tag in tags if row[tag] == "1")) for row in rows]
    empty = [row["mp3_path"] for row in rows if row["clip_id"] in ("35644", "55753", "57881")]
    return Listing.match([clip for clip in clips if split == "all" or clip.tags],
                         audio_files(root, lambda path: path.parts[-2:]), lambda clip: tuple(clip.id.split("/")),
                         task="multilabel", tags=tags, split_name=f"mtat, {split} clips", broken=empty,
                         published=(18706, 1825, 5329) if split == "all" else (15247, 1529, 4332))


def read_gtzan(root):
    """GTZAN: a folder per genre, any format; the fault-filtered split, whose lists stand in splits/gtzan."""
    lines = [(split, Path(line)) for split in SPLITS
             for line in (HERE / "gtzan" / f"{split}_filtered.txt").read_text().split()]
    clips = [Clip(path.stem, None, split, tags=(path.parent.name,)) for split, path in lines]
    return Listing.match(clips, audio_files(root, lambda path: path.stem), task="singlelabel",
                         tags=sorted({clip.tags[0] for clip in clips}), split_name="gtzan, fault-filtered",
                         published=(443, 197, 290), broken=["jazz.00054"])


def read_fma(root, subset="medium"):
    """FMA: fma_metadata/tracks.csv and genres.csv, audio in fma_SUBSET/000/000002.mp3; the official split.

    small and medium have one top-level genre per track (single label), large and full any number (multi-label).
    """
    sizes = ("small", "medium", "large", "full")
    wanted, single = sizes[: sizes.index(subset) + 1], subset in ("small", "medium")
    tables = Path(root) if Path(root, "tracks.csv").exists() else Path(root, "fma_metadata")
    genres = {row["genre_id"]: row for row in read_table(tables / "genres.csv")[0]}
    place = {"training": "train", "validation": "valid", "test": "test"}
    clips = []
    for row in read_table(tables / "tracks.csv", headers=2)[0]:
        if row["set.subset"] in wanted:  # the third header line has no subset
            ids = re.findall(r"\d+", row["track.genres_all"])
            top = {genres[genres[g]["top_level"]]["title"] for g in ids if g in genres}
            tags = (row["track.genre_top"],) if single else tuple(sorted(top))
            clips.append(Clip(f"{int(row['.']):06d}", None, place[row["set.split"]], tags=tags))
    audio = Path(root, f"fma_{subset}")
    return Listing.match(clips, audio_files(audio if audio.exists() else root, lambda path: path.stem),
                         task="singlelabel" if single else "multilabel", split_name=f"fma {subset}, official",
                         published={"small": (6400, 800, 800), "medium": (19922, 2505, 2573)}.get(subset),
                         tags=sorted({tag for clip in clips for tag in clip.tags}),
                         broken=["099134", "108925", "133297"])


class _Plain(pickle.Unpickler):
    """Reads numbers, strings, containers and numpy arrays, and nothing that could run code."""

    def find_class(self, module, name):
        if (module.split(".")[0], name) in {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
                                            ("_codecs", "encode")}:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of songs")


def read_msd(root):
    """Million Song Dataset: 30 s previews named by track id (TRAAAAW128F429D538.mp3) or 7digital id, anywhere in root.

    The index is the one the field shares: filtered_list_train.cP (its first 201,680 are train, the rest valid),
    filtered_list_test.cP, msd_id_to_tag_vector.cP, 50tagList.txt (Last.FM), and for 7digital names MSD_id_to_7D_id.pkl.
    """
    def plain(name):
        try:
            with open(Path(root, name), "rb") as file:
                return _Plain(file, encoding="bytes").load()
        except FileNotFoundError:
            raise FileNotFoundError(f"{Path(root, name)}: expected this list, but it is not there") from None
        except (pickle.UnpicklingError, EOFError, IndexError, KeyError, ValueError) as error:
            raise ValueError(f"{Path(root, name)}: expected a pickled list or dict: {error}") from None

    def text(value):
        return value.decode() if isinstance(value, bytes) else str(value)

    train, test, vectors = map(plain, ("filtered_list_train.cP", "filtered_list_test.cP", "msd_id_to_tag_vector.cP"))
    seven = plain("MSD_id_to_7D_id.pkl") if Path(root, "MSD_id_to_7D_id.pkl").exists() else {}
    seven = {text(song): text(number) for song, number in seven.items()}
    tags = [line.strip().lower() for line in Path(root, "50tagList.txt").read_text().splitlines() if line.strip()]
    clips = []
    for n, song in enumerate([*train, *test]):
        split = "train" if n < 201680 else "valid" if n < len(train) else "test"
        on = np.flatnonzero(np.asarray(vectors[song]).reshape(-1))
        clips.append(Clip(text(song), None, split, tags=tuple(tags[k] for k in on)))
    files = audio_files(root, lambda path: path.name.split(".")[0])
    return Listing.match(clips, files, lambda clip: clip.id if clip.id in files else seven.get(clip.id),
                         task="multilabel", tags=tags, split_name="msd, Last.FM top 50",
                         published=(201680, 11774, 28435))


def read_billboard(root):
    """McGill Billboard: billboard-2.0-index.csv and the songs one owns, named by number (0003.mp3, 0003/song.flac) or
    "Artist - Title"; a song not owned is no loss. For pre-training: no labels, all train."""
    def letters(text):
        return re.sub(r"[\W_]", "", text.lower())

    rows = read_table(Path(root, "billboard-2.0-index.csv"))[0]
    songs = {key for row in rows for key in (int(row["id"]), letters(row["artist"] + row["title"])) if key != ""}

    def key(path):  # of what is not in the index its path: other albums may well hold two tracks of one name
        number = re.match(r"\d{4}(?=\.|$)", path.parts[0])
        names = [*([int(number[0])] if number else []), letters(path.stem)]
        return next((name for name in names if name in songs), path.as_posix())

    files, clips = audio_files(root, key), {}
    for row in rows:
        name = letters(row["artist"] + row["title"])
        found = next((key for key in (int(row["id"]), name) if key in files), None)
        if name and found is not None and name not in clips:  # a song may have been in the charts of several weeks
            clips[name] = Clip(f"{int(row['id']):04d}", files.pop(found), group=name)
    if not clips:
        raise FileNotFoundError(f"{root}: no file is named by a number of the index, or as `Artist - Title`")
    reason = "no row in billboard-2.0-index.csv, or its song a second time"
    return Listing(clips.values(), split_name="billboard, all train",
                   skipped=[{"file": str(path.relative_to(root)), "reason": reason} for path in files.values()])


READERS = {"billboard": read_billboard, "fma": read_fma, "gtzan": read_gtzan, "msd": read_msd, "mtat": read_mtat}


def read(name, root, **options):
    """Read a data set by its name; ValueError when a table lacks what was published in it."""
    try:
        return READERS[name](root, **options)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{root}: a table of {name} is not as it was published: no {error} in it") from None


# ---------------------------------------------------------------------------------------------------------- download

MTAT, FMA = "https://mirg.city.ac.uk/datasets/magnatagatune/", "https://os.unil.cloud.switch.ch/fma/"
# data set -> [(file, checksum as published or "", addresses to try)]; {subset} is fma's
DOWNLOADS = {
    "mtat": [("annotations_final.csv",
              "sha256:99b94e95825d4fa576386a5367b9c96e0ec636e9f9c240aceb492f4728f68c3c", [MTAT]),
             ("clip_info_final.csv", "", [MTAT]), *((f"mp3.zip.00{k}", "", [MTAT]) for k in (1, 2, 3))],
    "gtzan": [("genres.tar.gz", "sha256:24347e0223d2ba798e0a558c4c172d9d4a19c00bb7963fe055d183dadb4ef2c6",
               ["http://opihi.cs.uvic.ca/sound/", "https://huggingface.co/datasets/marsyas/gtzan/resolve/main/data/"])],
    "fma": [("fma_metadata.zip", "sha1:f0df49ffe5f2a6008d7dc83c6915b31835dfe733", [FMA]),
            ("fma_{subset}.zip", "{subset}", [FMA])],
}
FMA_SHA1 = {"small": "ade154f733639d52e35e32f5593efe5be76c6d70", "medium": "c67b69ea232021025fca9231fc1c7c1a063ab50b",
            "large": "497109f4dd721066b5ce5e5f250ec604dc78939e", "full": "0f0ace23fbe9ba30ecb7e95f763e435ea802b8ab"}


def fetch(data, root, subset="medium", pause=2.0):
    """Download and unpack what a data set lacks in `root`; interrupted, it continues, and leaves nothing half-written.

    Raises ValueError when the data set is not public, OSError when an address fails or a checksum does not fit.
    """
    if data not in DOWNLOADS:
        raise ValueError(f"--download: {data} is not public; {', '.join(sorted(DOWNLOADS))} are")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    ready, archives = root / "downloaded.txt", []
    had = ready.read_text().split() if ready.exists() else []
    for name, checksum, places in DOWNLOADS[data]:
        name, checksum = name.format(subset=subset), checksum.replace("{subset}", "sha1:" + FMA_SHA1[subset])
        if name not in had:
            if not (root / name).exists():
                download([place + name for place in places], root / name, checksum, pause=pause)
            if ".csv" not in name:
                archives.append(root / name)
    for archive in archives:
        if archive.suffix == ".001":  # a zip that was cut in pieces
            whole = root / "mp3.zip.part"
            with open(whole, "wb") as file:
                for piece in archives:
                    with open(piece, "rb") as source:
                        shutil.copyfileobj(source, file, 1 << 24)
            unpack(whole, root, archives)
            whole.unlink()
        elif not re.fullmatch(r"\.00\d", archive.suffix):
            unpack(archive, root)
    for archive in archives:
        with open(ready, "a") as file:
            file.write(archive.name + "\n")
        archive.unlink()


def unpack(archive, root, pieces=()):
    """Unpack a zip or tar, which was joined from pieces or not, beside its destination, then move what came out into `root`,
    file by file: what else lies in a folder of the same name stays."""
    half = Path(root) / f"{Path(archive).name}.unpacking"
    shutil.rmtree(half, ignore_errors=True)
    print(f"unpacking {Path(archive).name}", file=sys.stderr)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(half)
        else:
            with tarfile.open(archive) as file:
                file.extractall(half, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        remove = shlex.join(map(str, pieces or [archive]))
        raise OSError(f"{archive}: cannot be unpacked ({error}); rm {remove} and type the same command again") from None
    for path in [path for path in half.rglob("*") if not path.is_dir()]:
        target = Path(root) / path.relative_to(half)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    shutil.rmtree(half)


def download(addresses, path, checksum="", tries=5, pause=2.0):
    """Fetch one file: continue what is there of it, try the addresses in turn, check, and only then give it its name.

    Args:
        addresses (list of str): where it is; tried in turn.
        path: the file to make; the part that has arrived stands in `path.part`.
        checksum (str): "sha256:..." (or md5, sha1), or "" where none is published.
        tries (int): in all.
        pause (float): seconds between them.
    """
    path, part, wrong = Path(path), Path(f"{path}.part"), ""
    for n in range(max(tries, len(addresses))):
        address = addresses[n % len(addresses)]
        have = part.stat().st_size if part.exists() else 0
        try:
            request = urllib.request.Request(address, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=60) as answer:
                with open(part, "ab" if answer.status == 206 else "wb") as file:
                    size = file.tell() + int(answer.headers["Content-Length"] or 0)
                    with tqdm.wrapattr(file, "write", initial=file.tell(), total=size, desc=path.name) as sink:
                        shutil.copyfileobj(answer, sink, 1 << 20)
            if part.stat().st_size < size:
                raise OSError(f"the connection was lost after {part.stat().st_size:,} of {size:,} bytes")
            kind, _, digest = checksum.partition(":")
            if checksum:
                with open(part, "rb") as file:
                    found = hashlib.file_digest(file, kind).hexdigest()
                if found != digest:
                    part.unlink()
                    raise OSError(f"{kind} is {found}, expected {digest}")
            os.replace(part, path)
            return
        except (OSError, http.client.HTTPException) as error:  # urllib's errors are among the first
            if getattr(error, "code", None) == 416:  # what is there is longer than the file: start over
                part.unlink(missing_ok=True)
            wrong = f"{address}: {error}"
        if n + 1 < max(tries, len(addresses)):
            time.sleep(pause * min(n + 1, 10))
    raise OSError(f"{path.name} was not downloaded; the last of {max(tries, len(addresses))} tries: {wrong}; what has "
                  "arrived is kept, the same command continues")
