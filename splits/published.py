"""The published data sets: who is in which split with which labels, and which file is whose.

Used by prepare.py (`python prepare.py --data mtat --root DIR [--download]`), which hands in the
search for audio files; imports nothing of ours. The label tables are read as published, in the
folder a data set was unpacked into, and are no part of this repository. Only GTZAN's fault-filtered
lists, which were published without a table, stand beside this file. The data sets stand in
README.md.

A reader takes (root, audio_files) and returns (rows, about): a dict per recording with id, file (a
path, or None where it is not there), split, group, tags; and of the whole task, tags (in order),
split_name, published (clips in train, valid, test), broken (ids that are broken wherever they come
from). To add a data set: one function here, one entry in READERS.
"""

import math
import pickle
import re
from pathlib import Path
from typing import Callable

import numpy as np

from .tables import read_table

HERE = Path(__file__).resolve().parent


def read(name: str, root, audio_files: Callable, **options) -> tuple[list[dict], dict]:
    """Read a data set by its name; ValueError when a table lacks what was published in it."""
    try:
        return READERS[name](root, audio_files, **options)
    except (KeyError, IndexError) as error:
        raise ValueError(f"{root}: a table of {name} is not as it was published: "
                         f"no {error} in it") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{root}: a list of {name} is not as it was published: {error}") from None


def _row(name, split="train", tags=(), group=""):
    return {"id": name, "file": None, "split": split, "group": group, "tags": tuple(tags)}


def _with_files(rows, files, key):
    """Give each row its file out of {key: path}."""
    for row in rows:
        row["file"] = files.get(key(row))
    return rows


def read_mtat(root, audio_files: Callable, split: str = "all") -> tuple[list[dict], dict]:
    """MagnaTagATune: annotations_final.csv, clip_info_final.csv, mp3s in folders 0 to f.

    Split by folder: 0-b train, c valid, d-f test. The 50 most frequent tags; `split` "all" keeps
    every clip, "labelled" those with at least one of the 50. Three mp3s are empty in every copy.
    """
    rows, columns = read_table(Path(root, "annotations_final.csv"))
    tags = _most_frequent(rows, set(columns) - {"clip_id", "mp3_path"}, 50)
    songs = {}
    for row in read_table(Path(root, "clip_info_final.csv"))[0]:
        about_song = [row[key] for key in ("artist", "album", "track_number", "title")]
        songs[row["clip_id"]] = "|".join(about_song)
    place = {**dict.fromkeys("0123456789ab", "train"), "c": "valid", **dict.fromkeys("def", "test")}
    clips = []
    for row in rows:
        path = row["mp3_path"]
        active = [tag for tag in tags if row[tag] == "1"]
        if active or split == "all":
            clips.append(_row(path, place[path[0]], active, songs[row["clip_id"]]))
    files = audio_files(root, lambda path: path.parts[-2:])
    empty = [row["mp3_path"] for row in rows if row["clip_id"] in ("35644", "55753", "57881")]
    published = (18706, 1825, 5329) if split == "all" else (15247, 1529, 4332)
    return _with_files(clips, files, lambda row: tuple(row["id"].split("/"))), {
        "task": "multilabel", "tags": tags, "split_name": f"mtat, {split} clips",
        "published": published, "broken": empty}


def _most_frequent(rows, tags, n):
    """The n tags with the most rows, the most frequent first."""
    count = {tag: sum(row[tag] == "1" for row in rows) for tag in tags}
    return sorted(count, key=lambda tag: (-count[tag], tag))[:n]


def read_gtzan(root, audio_files: Callable) -> tuple[list[dict], dict]:
    """GTZAN: a folder per genre, any format; the fault-filtered split of splits/gtzan."""
    clips = []
    for split in ("train", "valid", "test"):
        for line in (HERE / "gtzan" / f"{split}_filtered.txt").read_text(encoding="utf-8").split():
            path = Path(line)
            clips.append(_row(path.stem, split, [path.parent.name]))
    files = audio_files(root, lambda path: path.stem)
    return _with_files(clips, files, lambda row: row["id"]), {
        "task": "singlelabel", "tags": sorted({clip["tags"][0] for clip in clips}),
        "split_name": "gtzan, fault-filtered", "published": (443, 197, 290),
        "broken": ["jazz.00054"]}


def read_fma(root, audio_files: Callable, subset: str = "medium") -> tuple[list[dict], dict]:
    """FMA: fma_metadata/tracks.csv and genres.csv, audio in fma_SUBSET/000/000002.mp3; official
    split.

    small and medium have one top-level genre per track (single label), large and full any number.
    """
    sizes = ("small", "medium", "large", "full")
    wanted = sizes[: sizes.index(subset) + 1]
    single = subset in ("small", "medium")
    tables = Path(root) if Path(root, "tracks.csv").exists() else Path(root, "fma_metadata")
    genres = {row["genre_id"]: row for row in read_table(tables / "genres.csv")[0]}
    place = {"training": "train", "validation": "valid", "test": "test"}
    clips = []
    for row in read_table(tables / "tracks.csv", headers=2)[0]:
        if row["set.subset"] in wanted:  # the third line of the header has none
            tags = [row["track.genre_top"]] if single else _top_genres(row, genres)
            clips.append(_row(f"{int(row['.']):06d}", place[row["set.split"]], tags))
    audio = Path(root, f"fma_{subset}")
    files = audio_files(audio if audio.exists() else root, lambda path: path.stem)
    return _with_files(clips, files, lambda row: row["id"]), {
        "task": "singlelabel" if single else "multilabel",
        "tags": sorted({tag for clip in clips for tag in clip["tags"]}),
        "split_name": f"fma {subset}, official",
        "published": {"small": (6400, 800, 800), "medium": (19922, 2505, 2573)}.get(subset),
        "broken": ["099134", "108925", "133297"]}


def _top_genres(row, genres):
    """The titles of the top-level genres of a track's genres, in order."""
    numbers = re.findall(r"\d+", row["track.genres_all"])
    tops = [genres[number]["top_level"] for number in numbers if number in genres]
    return sorted({genres[top]["title"] for top in tops})


def read_msd(root, audio_files: Callable) -> tuple[list[dict], dict]:
    """Million Song Dataset: 30 s previews named by track id (TRAAAAW128F429D538.mp3) or 7digital
    id.

    The index is the one the field shares: filtered_list_train.cP (its first 201,680 are train, the
    rest valid), filtered_list_test.cP, msd_id_to_tag_vector.cP, 50tagList.txt (Last.FM), and for
    7digital names MSD_id_to_7D_id.pkl.
    """
    train = read_pickle(Path(root, "filtered_list_train.cP"))
    test = read_pickle(Path(root, "filtered_list_test.cP"))
    vectors = read_pickle(Path(root, "msd_id_to_tag_vector.cP"))
    numbers = _seven_digital(Path(root, "MSD_id_to_7D_id.pkl"))
    tags = Path(root, "50tagList.txt").read_text(encoding="utf-8").lower().split("\n")
    tags = [tag.strip() for tag in tags if tag.strip()]
    splits = ["train"] * 201680 + ["valid"] * (len(train) - 201680)
    splits = splits[: len(train)] + ["test"] * len(test)
    clips = []
    for song, split in zip([*train, *test], splits):
        active = np.flatnonzero(np.asarray(vectors[song]).reshape(-1))
        clips.append(_row(_text(song), split, [tags[k] for k in active]))
    files = audio_files(root, lambda path: path.name.split(".")[0])

    def key(row):
        return row["id"] if row["id"] in files else numbers.get(row["id"])
    return _with_files(clips, files, key), {
        "task": "multilabel", "tags": tags, "split_name": "msd, Last.FM top 50",
        "published": (201680, 11774, 28435)}


def _seven_digital(path):
    """{track id: 7digital id}, empty where that list is not there."""
    numbers = read_pickle(path) if path.exists() else {}
    return {_text(song): _text(number) for song, number in numbers.items()}


def _text(value):
    return value.decode() if isinstance(value, bytes) else str(value)


def read_billboard(root, audio_files: Callable) -> tuple[list[dict], dict]:
    """McGill Billboard: billboard-2.0-index.csv and the songs one owns, named by number (0003.mp3,
    0003/song.flac) or "Artist - Title"; a song not owned is no loss. No labels, all train."""
    def letters(text):
        return re.sub(r"[\W_]", "", text.lower())

    rows = read_table(Path(root, "billboard-2.0-index.csv"))[0]
    songs = {key for row in rows for key in (int(row["id"]), letters(row["artist"] + row["title"]))}
    songs.discard("")

    def key(path):
        # Of what is not in the index its path: other albums may hold two tracks of one name.
        number = re.match(r"\d{4}(?=\.|$)", path.parts[0])
        names = [*([int(number[0])] if number else []), letters(path.stem)]
        return next((name for name in names if name in songs), path.as_posix())

    files = dict(audio_files(root, key))
    clips = {}
    for row in rows:
        name = letters(row["artist"] + row["title"])
        found = next((key for key in (int(row["id"]), name) if key in files), None)
        if name and found is not None and name not in clips:  # a song may be in charts twice
            clips[name] = {**_row(f"{int(row['id']):04d}", group=name), "file": files.pop(found)}
    if not clips:
        raise FileNotFoundError(f"{root}: no file is named by a number of the index, or as "
                                "`Artist - Title`")
    reason = "no row in billboard-2.0-index.csv, or its song a second time"
    others = [{"file": str(path.relative_to(root)), "reason": reason} for path in files.values()]
    return list(clips.values()), {"split_name": "billboard, all train", "others": others}


READERS = {"billboard": read_billboard, "fma": read_fma, "gtzan": read_gtzan, "msd": read_msd,
           "mtat": read_mtat}


# ------------------------------------------------------------------------------------------ pickles

class _Numbers:
    """Stands for a numpy array in a pickle, until its bytes are there."""
    values = ()

    def __setstate__(self, state):
        _, shape, kind, _, data = state
        if not isinstance(data, bytes) or len(data) != kind.dtype.itemsize * math.prod(shape):
            raise pickle.UnpicklingError("an array whose bytes do not fit its shape")
        self.values = np.frombuffer(data, kind.dtype)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)


class _Kind:
    """Stands for a numpy dtype in a pickle: plain numbers alone."""

    def __init__(self, code, *_):
        code = _text(code)
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise pickle.UnpicklingError(f"an array of {code!r}, which are no numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        if state[1] in (b">", ">"):
            self.dtype = self.dtype.newbyteorder(">")


class _Plain(pickle.Unpickler):
    """Reads lists, dicts, numbers, bytes and strings. Of arrays it takes the bytes, by classes of
    its
    own: numpy's, which a crafted pickle can crash or change, are never called."""

    def __init__(self, file, size):
        super().__init__(file, encoding="bytes")
        self.left = 4 * size  # bytes that texts may be turned into

    def find_class(self, module, name):
        """Stand-ins for the few names that a pickled array holds; no other name is looked up."""
        what = (_text(module).split(".")[0], _text(name))
        if what == ("_codecs", "encode"):
            return lambda text, *_: self._encode(text)
        if what == ("numpy", "_reconstruct"):
            return lambda *_: _Numbers()
        if what == ("numpy", "dtype"):
            return lambda *arguments: _Kind(*arguments)
        if what == ("numpy", "ndarray"):
            return "ndarray"
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a list of songs")

    def _encode(self, text):
        self.left -= len(text)
        if self.left < 0:
            raise pickle.UnpicklingError("more bytes than the file has")
        return text.encode("latin-1")


def read_pickle(path: Path) -> list | dict:
    """A pickled list or dict of numbers, bytes, strings and arrays of numbers; runs none of its
    code."""
    try:
        with open(path, "rb") as file:
            found = _Plain(file, path.stat().st_size).load()
        if not isinstance(found, (list, dict)):
            raise ValueError(f"found {type(found).__name__}")
        return found
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: expected this list, but it is not there") from None
    except Exception as error:  # whatever a foreign file makes the reader stumble over
        raise ValueError(f"{path}: expected a pickled list or dict: {error}") from None
