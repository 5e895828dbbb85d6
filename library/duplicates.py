"""`duplicates`: one recording in several files; other masters of it are told apart by a score (see
copies.py)."""

import contextlib
import csv
import os
from collections.abc import Iterator

import numpy as np

from library.search import ALIKE, Collection, as_entry, recording_score, same_length
from library.store import Song
from library.targets import check_table
from library.terminal import WrongCommand, clock, named, print_json, printable, table

COLUMNS = ["group", "score", "seconds", "bytes", "artist", "title", "file"]  # of a --csv
BLOCK = 1024  # songs of a block in the product of all with all


class Groups:
    """Things that are joined, two at a time; `root` tells the group of one."""

    def __init__(self, count: int):
        self.above = list(range(count))

    def root(self, k: int) -> int:
        """The one that stands for the group of k."""
        while self.above[k] != k:
            self.above[k] = self.above[self.above[k]]
            k = self.above[k]
        return k

    def join(self, a: int, b: int):
        """Their groups become one."""
        self.above[self.root(b)] = self.root(a)


def alike(collection: Collection) -> Iterator[tuple[int, int]]:
    """Pairs of songs of about one length that sound alike: of n songs a small part of n^2 / 2."""
    songs = collection.songs
    order = sorted(range(len(songs)), key=lambda k: songs[k].seconds or 0)
    seconds = np.array([songs[k].seconds or 0 for k in order])
    unit = collection.unit[order]
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        end = int(np.searchsorted(seconds, 1.03 * seconds[stop - 1] + 2, "right"))
        scores = (unit[start:stop].float() @ unit[start:end].float().T).numpy()
        for i, j in zip(*np.nonzero(np.triu(scores >= ALIKE, 1))):
            yield order[start + i], order[start + j]


def groups_of_copies(collection: Collection, least: float) -> list[list[tuple[int, float]]]:
    """Songs that are one recording: groups of (song, score to the first of its group), the largest
    file first."""
    songs = collection.songs
    groups = Groups(len(songs))
    first: dict = {}
    for k, song in enumerate(songs):
        groups.join(first.setdefault(song.audio or k, k), k)
    for a, b in alike(collection):
        if groups.root(a) != groups.root(b) and same_length(songs[a], songs[b]):
            if recording_score(collection, songs[a], songs[b]) >= least:
                groups.join(a, b)
    members: dict[int, list[int]] = {}
    for k in range(len(songs)):
        members.setdefault(groups.root(k), []).append(k)
    several = [one_name_each(songs, ks) for ks in members.values() if len(ks) > 1]
    return sorted(scored(collection, ks) for ks in several if len(ks) > 1)


def one_name_each(songs: list[Song], group: list[int]) -> list[int]:
    """A group in which no two names, by links or mounts, are of one file."""
    files: dict = {}
    for k in group:
        place: tuple = (k,)  # a file that is not to be seen now is one of its own
        with contextlib.suppress(OSError):
            state = os.stat(songs[k].path)
            place = (state.st_dev, state.st_ino)
        files.setdefault(place, k)
    return list(files.values())


def scored(collection: Collection, group: list[int]) -> list[tuple[int, float]]:
    """A group, its largest file first, with scores to that."""
    songs = collection.songs
    group = sorted(group, key=lambda k: (-songs[k].size, songs[k].path))
    return [(k, recording_score(collection, songs[group[0]], songs[k])) for k in group]


def write_csv(path, rows: list[tuple[int, Song, float]]):
    """Rows (group, song, score) as a table; of names that are not UTF-8 the bytes as escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        for i, song, score in rows:
            lines.writerow(
                [i, f"{score:.4f}", song.seconds, song.size, song.artist, song.title, song.name]
            )


def as_text(rows: list[tuple[int, Song, float]]) -> str:
    """Rows (group, song, score) as a table for the screen."""
    lines = [["group", "score", "time", "MB", "path"]]
    for i, song, score in rows:
        size = f"{song.size / 1e6:.1f}"
        time = clock(song.seconds or 0)
        lines.append([str(i), f"{score:.3f}", time, size, printable(song.name)])
    return table(lines, right=(0, 1, 2, 3))


def run(args) -> int:
    """The verb."""
    if not 0 < args.least <= 1:
        raise WrongCommand(f"--least is a score above 0, up to 1, not {args.least}")
    if args.csv:
        check_table(args.csv, COLUMNS, "duplicates")
    collection = Collection(args.library)
    songs = collection.songs
    groups = groups_of_copies(collection, args.least)
    rows = [(i, songs[k], score) for i, group in enumerate(groups, 1) for k, score in group]
    if args.csv:
        write_csv(args.csv, rows)
    if args.json:
        found = [[as_entry(songs[k], score=round(score, 4)) for k, score in g] for g in groups]
        print_json({"groups": found})
        return 0
    if rows and not args.csv:
        print(as_text(rows))
    more = len(rows) - len(groups)
    print(f"{len(groups)} recordings in several files, {more} more than needed, of {len(songs):,}")
    if rows:
        print("score: 1 the same audio; from 0.75 the same master in another codec or level; below")
        print("that another master")
    if args.csv:
        print(f"next: look through {printable(args.csv)}; of each group the first is the largest")
    else:
        print(f"next: python -m library duplicates{named(args.library)} --csv duplicates.csv")
    return 0
