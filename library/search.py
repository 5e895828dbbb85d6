"""`similar` and `path`: exact search by one matrix product over all vectors of a store, or of
several.

What decides is the collection's own: features are standardised over its songs, and weighed by how
little they change within a song (the inverse of the covariance of a song's windows about their
mean, which costs no label). Of large collections the 256 directions are kept in which songs differ
most. A song is then a unit vector, and a score a cosine."""

import contextlib
import hashlib
import json
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import eigh, solve_triangular

from library import copies, listen
from library.index import encoder_of, same_file, storable
from library.network import load_network
from library.store import Song, Store
from library.targets import check_target
from library.terminal import Stop, WrongCommand, clock, print_json, printable, table, typed

DIRECTIONS = 256
SHRINKAGE = 0.02  # of the covariance within songs towards a multiple of the identity, at least
MANY = 20_000  # songs from which statistics take a sample, and unit vectors are kept on disk
ROWS = 512  # of a block in the matrix product: it stays in the cache
ALIKE = 0.4  # cosine below which two songs are not compared for being copies


@dataclass
class Weighing:
    """From features to unit vectors: (x - centre) @ directions, scaled to length 1."""

    centre: np.ndarray  # (D,)
    directions: np.ndarray  # (D, d)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """x (n, D) -> (n, d) float32 of length 1."""
        z = (np.asarray(x, np.float32) - self.centre) @ self.directions
        return z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)


def weigh(x: np.ndarray, products: np.ndarray, count: int) -> Weighing:
    """The weighing that a collection gives itself.

    Args:
        x: features of its songs (n, D), or of a sample of them.
        products, count: summed products (D, D) of `count` windows about their songs' means.
    """
    centre = x.mean(0, dtype=np.float64)
    spread = x.std(0, dtype=np.float64)
    alive = spread > 1e-6
    scale = np.where(alive, 1 / np.where(alive, spread, 1), 0)
    size = len(scale)
    within = products * scale * scale[:, None] / max(count, 1)
    level = max(np.trace(within) / size, 1e-9)
    share = np.clip(0.1 * size / max(count, 1), SHRINKAGE, 0.5) if count else 1.0
    # Any square root of the inverse gives the same cosines; this one costs less than eigenvectors.
    root = np.linalg.cholesky((1 - share) * within + share * level * np.eye(size))
    directions = scale[:, None] * solve_triangular(root, np.eye(size), lower=True).T
    if len(x) > 4 * DIRECTIONS and size > DIRECTIONS:
        z = (x - centre) @ directions
        top = (size - DIRECTIONS, size - 1)  # the directions in which songs differ most
        directions = directions @ eigh(z.T @ z, subset_by_index=top)[1]
    return Weighing(centre.astype(np.float32), directions.astype(np.float32))


def products_of(query: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """Scores (q, N) float32 of unit vectors (N, d) float16 for queries (q, d): exact, in blocks
    that stay in the cache."""
    scores = torch.empty(len(query), len(unit))
    full = torch.empty(ROWS, unit.shape[1])
    threads = torch.get_num_threads()
    # Thousands of small products: more threads gain a fourth, and on busy cores only wait.
    torch.set_num_threads(1)
    try:
        for start in range(0, len(unit), ROWS):
            part = unit[start : start + ROWS]
            block = full[: len(part)].copy_(part)
            for row, one in zip(scores, query):
                torch.mv(block, one, out=row[start : start + ROWS])
    finally:
        torch.set_num_threads(threads)
    return scores


class Collection:
    """The songs of one store or several, with their unit vectors."""

    def __init__(self, folders: list[Path]):
        places = {os.path.realpath(folder): folder for folder in reversed(folders)}
        self.stores = [Store.read(folder) for folder in reversed(places.values())]
        self.about = self.stores[0].about
        for store in self.stores[1:]:
            if not store.about.fits(self.about):
                raise Stop(
                    f"{store.folder} and {self.stores[0].folder} were made with different encoders "
                    f"({store.about.ckpt}, {self.about.ckpt}): index one of them again, with --ckpt"
                )
        self.songs: list[Song] = []
        parts = []
        for store in self.stores:
            songs = without(store.songs("row IS NOT NULL AND gone = 0"), self.songs)
            self.songs += songs
            parts.append((store.vectors(), np.array([song.row for song in songs], np.int64)))
        if not self.songs:
            raise Stop(
                f"{folders[0]}: no song in it; type: python -m library index FOLDER --library "
                f"{typed(folders[0])}"
            )
        self.parts = parts
        self.weighing = self.make_weighing()
        self.unit = self.make_unit()
        self.place = {song.path: k for k, song in enumerate(self.songs)}
        self.by_audio = {song.audio: k for k, song in enumerate(self.songs)}
        self.imprints: dict[str, bytes] = {}  # by audio, those that were asked for

    def make_weighing(self) -> Weighing:
        """From all songs, or from a sample spread evenly over them; equal for equal contents."""
        step = max(1, len(self.songs) // MANY)
        x = np.concatenate([vectors[rows[::step]] for vectors, rows in self.parts]).astype(
            np.float32
        )
        scatters = [store.scatter() for store in self.stores]
        return weigh(
            x,
            sum(products.astype(np.float64) for products, _ in scatters),
            sum(n for _, n in scatters),
        )

    def make_unit(self) -> torch.Tensor:
        """Unit vectors (N, d) float16; those of a large store are kept beside it."""
        kept = self.stores[0].folder / "unit.npy"
        key = self.key() if len(self.stores) == 1 and len(self.songs) > MANY else None
        if key and kept.exists():
            try:
                if json.loads(kept.with_suffix(".json").read_text())["key"] == key:
                    return torch.from_numpy(np.load(kept, mmap_mode="c"))
            except (OSError, ValueError, KeyError):
                pass  # made again
        blocks = [
            self.weighing(vectors[rows[i : i + 8192]]).astype(np.float16)
            for vectors, rows in self.parts
            for i in range(0, len(rows), 8192)
        ]
        unit = np.concatenate(blocks)
        if key:
            with contextlib.suppress(
                OSError
            ):  # on a disk that is full or read-only it goes without
                np.save(kept.with_name("unit.partial.npy"), unit)
                os.replace(kept.with_name("unit.partial.npy"), kept)
                kept.with_suffix(".json").write_text(json.dumps({"key": key}))
        return torch.from_numpy(unit)

    def key(self) -> str:
        """What the unit vectors depend on, as a hash."""
        digest = hashlib.sha256(self.weighing.directions.tobytes())
        digest.update(np.array([song.crc for song in self.songs], np.int64).tobytes())
        return digest.hexdigest()

    def imprint(self, song: Song) -> bytes:
        """What copies of a song are known by."""
        if song.audio not in self.imprints:
            self.imprints[song.audio] = next(
                filter(None, (store.imprint(song.audio) for store in self.stores)), b""
            )
        return self.imprints[song.audio]

    def find(self, path: Path, args) -> tuple[np.ndarray, Song]:
        """A song's unit vector (d,) and what is known of it; one that is not in the store is heard
        now."""
        absolute = os.path.abspath(path)
        k = self.place.get(os.fsencode(absolute))
        if k is None:
            k = self.place.get(os.fsencode(os.path.realpath(path)))
        if k is not None:
            return self.unit[k].float().numpy(), self.songs[k]
        if not os.path.exists(path):
            raise WrongCommand(f"{path}: no such file, nor a song of the store")
        vector, song = self.hear(Path(absolute), args)
        # The very audio may be there under another name, or with other tags.
        twin = self.by_audio.get(song.audio)
        return self.weighing(vector[None])[0], self.songs[twin] if twin is not None else song

    def hear(self, path: Path, args) -> tuple[np.ndarray, Song]:
        """The features (D,) of any file, as `index` would take them, and what is known of it."""
        network = load_network(
            encoder_of(self.stores[0].folder, args.ckpt), "levels", args.device, args.amp
        )
        if network.identity != self.about.identity:
            raise Stop(
                f"{path} is not in the store, and {network.name} is not the encoder that it was "
                f"made with: {self.about.to_type(network.name)}"
            )
        hearing = listen.Hearing(
            network.sample_rate, network.size, every=self.about.listening == "all"
        )
        rows = []
        song = Song(os.fsencode(path), 0, 0)
        for _, kind, content in listen.hear_all([path], hearing, 1, args.timeout):
            if kind == listen.FAILED:
                raise Stop(f"{path}: {content}")
            if kind == listen.AGAIN:
                rows.clear()
            elif isinstance(content, listen.Heard):
                song.seconds = content.seconds
                song.audio = content.audio
                self.imprints[content.audio] = content.imprint
                for name, value in content.tags.items():
                    setattr(song, name, value and storable(value))
            elif kind == listen.PIECE:
                rows.append(network(content))
        return np.concatenate(rows).mean(0), song


def without(songs: list[Song], others: list[Song]) -> list[Song]:
    """Songs whose files are none of the others, under this name or another."""
    paths = {song.path for song in others}
    alike: dict[tuple, list[Song]] = {}
    for song in others:
        alike.setdefault((song.size, song.mtime), []).append(song)
    return [
        song
        for song in songs
        if song.path not in paths
        and not any(
            same_file(song.path, other.path) for other in alike.get((song.size, song.mtime), ())
        )
    ]


# --- rules


def plain(text: str | None) -> str:
    """A name for comparing: case, accents, spacing and punctuation do not count.

    >>> plain("Sigur  Rós!") == plain("SIGUR ROS")
    True
    """
    text = unicodedata.normalize("NFKD", text or "")
    text = "".join(letter for letter in text if not unicodedata.combining(letter)).casefold()
    return " ".join(re.findall(r"\w+", text))


def same_length(a: Song, b: Song) -> bool:
    """May two songs be one recording, as far as their lengths tell? Two seconds and 3 % are a fade
    or silence cut off."""
    if not a.seconds or not b.seconds:
        return True
    return abs(a.seconds - b.seconds) <= 2 + 0.03 * min(a.seconds, b.seconds)


def recording_score(collection: "Collection", a: Song, b: Song) -> float:
    """How far two songs are one recording: 1 the same audio, from `copies.COPY` on one recording,
    about 0 others."""
    if a.audio and a.audio == b.audio:
        return 1.0
    # Of equal length they are aligned but for a codec's delay.
    shifts = copies.NEAR if abs((a.seconds or 0) - (b.seconds or 0)) < 0.1 else copies.SHIFT
    return copies.likeness(collection.imprint(a), collection.imprint(b), shifts=shifts)


def are_copies(collection: "Collection", a: Song, b: Song, score: float) -> bool:
    """Are two songs one recording? By their audio; by artist and title; or by their imprints, where
    they sound alike."""
    if a.audio and a.audio == b.audio:
        return True
    if not same_length(a, b):
        return False
    named = plain(a.artist), plain(a.title)
    if all(named) and named == (plain(b.artist), plain(b.title)):
        return True
    return score >= ALIKE and recording_score(collection, a, b) >= copies.COPY


@dataclass
class Rules:
    """What a list may hold: so many of an artist and of an album; no copies; nothing from certain
    albums."""

    per_artist: int | None = None
    per_album: int | None = None
    copies: bool = False
    without: frozenset = frozenset()

    @classmethod
    def of(cls, args, seeds: list[Song] = ()) -> "Rules":
        """Those of a command."""
        albums = frozenset(album_of(song) for song in seeds if album_of(song))
        return cls(
            args.per_artist,
            args.per_album,
            args.copies,
            albums if getattr(args, "other_albums", False) else frozenset(),
        )


def album_of(song: Song) -> tuple:
    """An album is its name and where it lies: there are many albums called Greatest Hits. () where
    the tag is missing."""
    return (plain(song.album), os.path.dirname(song.name)) if plain(song.album) else ()


class Choice:
    """Songs chosen so far, and which may follow.

    seeds: songs that are not to come again; with `counted` they stand in the list themselves, and
    count for their artists and albums."""

    def __init__(
        self,
        collection: Collection,
        rules: Rules,
        seeds: list[tuple[np.ndarray, Song]] = (),
        counted: bool = False,
    ):
        self.collection = collection
        self.rules = rules
        self.chosen: list[int] = []
        self.units = [unit for unit, _ in seeds]
        self.songs = [song for _, song in seeds]
        self.artists: dict = {}
        self.albums: dict = {}
        self.refused = {"per-artist": 0, "per-album": 0, "copies": 0}
        for song in self.songs if counted else ():
            self.count(song)

    def count(self, song: Song):
        """A song stands in the list."""
        artist = plain(song.artist)
        album = album_of(song)
        self.artists[artist] = self.artists.get(artist, 0) + 1
        self.albums[album] = self.albums.get(album, 0) + 1

    def take(self, k: int) -> bool:
        """Song k, if the rules allow it."""
        song = self.collection.songs[k]
        artist = plain(song.artist)
        album = album_of(song)
        if (
            any(song.path == other.path for other in self.songs)
            or album in self.rules.without
            and album
        ):
            return False
        # A song without the tag is nobody's: many unknown artists are not one.
        if artist and self.artists.get(artist, 0) >= (self.rules.per_artist or 1e9):
            self.refused["per-artist"] += 1
            return False
        if album and self.albums.get(album, 0) >= (self.rules.per_album or 1e9):
            self.refused["per-album"] += 1
            return False
        unit = self.collection.unit[k].float().numpy()
        if not self.rules.copies:
            for other, its in zip(self.songs, self.units):
                if are_copies(self.collection, song, other, float(its @ unit)):
                    self.refused["copies"] += 1
                    return False
        self.count(song)
        self.units.append(unit)
        self.songs.append(song)
        self.chosen.append(k)
        return True


def nearest(collection: Collection, seeds: np.ndarray, any_of: bool = False) -> np.ndarray:
    """Scores (N,) for seeds (q, d): cosine to their centre, or to the nearest of them."""
    query = seeds if any_of else seeds.mean(0, keepdims=True)
    query = query / np.maximum(np.linalg.norm(query, axis=1, keepdims=True), 1e-12)
    scores = products_of(torch.from_numpy(query.astype(np.float32)), collection.unit)
    return scores.amax(0).numpy()


def in_order(scores: np.ndarray, first: int = 1000):
    """Indices by falling score; the first of them without sorting all."""
    first = min(first, len(scores))
    best = np.argpartition(-scores, first - 1)[:first]
    yield from best[np.argsort(-scores[best], kind="stable")]
    if first < len(scores):
        rest = np.argsort(-scores, kind="stable")
        yield from rest[~np.isin(rest, best)]


def arc(a: np.ndarray, b: np.ndarray, n: int) -> np.ndarray:
    """n unit vectors (n, d) at equal angles between the unit vectors a and b (d,), without them."""
    angle = np.arccos(np.clip(a @ b, -1, 1))
    t = np.linspace(0, 1, n + 2)[1:-1, None]
    # At an angle of 0 or of a half-circle the line has to do.
    points = (
        np.sin((1 - t) * angle) * a + np.sin(t * angle) * b
        if 1e-3 < angle < 3.14
        else (1 - t) * a + t * b
    )
    return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12)


def way(
    collection: Collection,
    ends: list[tuple[np.ndarray, Song]],
    n: int,
    rules: Rules,
    width: int = 40,
) -> Choice:
    """Songs between two, n - 2 of them: of the songs nearest to each point of the arc, those in a
    row that together leap least; songs that a rule forbids give way to the next of their point.

    Each song is a candidate of one point alone, so none comes twice. The ends stand in the list as
    well, and count for their artists and albums.
    """
    points = arc(ends[0][0], ends[1][0], n - 2).astype(np.float32)
    scores = products_of(torch.from_numpy(points), collection.unit).numpy()
    layers: list[list[int]] = [[] for _ in points]
    orders = [in_order(row) for row in scores]
    taken: set[int] = set()
    choice = Choice(collection, Rules(copies=rules.copies), ends)
    # In turn, so that no point takes the best songs of all.
    for _ in range(width):
        for layer, order in zip(layers, orders):
            for k in order:
                if k not in taken:
                    taken.add(k)
                    if choice.take(k):
                        layer.append(k)
                        break
    final = Choice(collection, rules, ends, counted=True)
    for layer in smooth(collection, layers, scores, ends):
        next((k for k in layer if final.take(k)), None)
    final.refused["copies"] += choice.refused["copies"]
    return final


def smooth(
    collection: Collection, layers: list[list[int]], scores: np.ndarray, ends
) -> list[list[int]]:
    """The layers, in each that song first with which the squared steps from song to song, the ends
    among them, and the squared distances from the arc, are least in sum (dynamic programming)."""
    layers = [layer for layer in layers if layer]
    if not layers:
        return []
    cost = (1 - ends[0][0] @ collection.unit[layers[0]].float().numpy().T) ** 2
    back = []
    for i, layer in enumerate(layers):
        units = collection.unit[layer].float().numpy()
        if i:
            leaps = (1 - collection.unit[layers[i - 1]].float().numpy() @ units.T) ** 2
            total = cost[:, None] + leaps
            back.append(total.argmin(0))
            cost = total.min(0)
        cost = cost + (1 - scores[min(i, len(scores) - 1), layer]) ** 2
    cost = cost + (1 - collection.unit[layers[-1]].float().numpy() @ ends[1][0]) ** 2
    at = int(cost.argmin())
    best = [at]
    for pointers in reversed(back):
        at = int(pointers[at])
        best.insert(0, at)
    return [[layer[at], *layer[:at], *layer[at + 1 :]] for layer, at in zip(layers, best)]


# --- verbs


def similar(args) -> int:
    """The verb: songs near one, or near several."""
    check_playlist(args)
    collection = Collection(args.library)
    seeds = [collection.find(path, args) for path in args.songs]
    scores = nearest(collection, np.stack([unit for unit, _ in seeds]), args.any)
    choice = Choice(collection, Rules.of(args, [song for _, song in seeds]), seeds)
    for k in in_order(scores):
        if len(choice.chosen) == args.n:
            break
        choice.take(int(k))
    songs = [(collection.songs[k], float(scores[k])) for k in choice.chosen]
    say_shortage(choice, len(songs), args)
    return show(songs, args, [song for _, song in seeds])


def say_shortage(choice: Choice, count: int, args):
    """One line where a list has fewer songs than were asked for: why."""
    if count < args.n and not args.json:
        why = "".join(f"; {n} left out by {name}" for name, n in choice.refused.items() if n)
        has = len(choice.collection.songs)
        print(f"{count} of the {args.n} songs asked for: the store has {has}{why}")


def path(args) -> int:
    """The verb: a smooth way from one song to another."""
    if args.n < 2:
        raise WrongCommand("--n counts both ends: expected 2 or more")
    check_playlist(args)
    collection = Collection(args.library)
    ends = [collection.find(song, args) for song in args.songs]
    choice = way(collection, ends, args.n, Rules.of(args))
    between = choice.chosen
    units = [ends[0][0], *(collection.unit[k].float().numpy() for k in between), ends[1][0]]
    steps = [1.0, *(float(a @ b) for a, b in zip(units, units[1:]))]
    songs = [ends[0][1], *(collection.songs[k] for k in between), ends[1][1]]
    say_shortage(choice, len(songs), args)
    return show(list(zip(songs, steps)), args, [], "step")


def check_playlist(args):
    """Stop where the playlist could not be written."""
    if args.m3u:
        check_target(args.m3u, "--m3u")


def as_entry(song: Song, **more) -> dict:
    """A song as JSON has it."""
    tags = {name: getattr(song, name) for name in ("artist", "title", "album", "year")}
    return {"path": song.name, **more, **tags, "seconds": song.seconds, "bytes": song.size}


def show(songs: list[tuple[Song, float]], args, seeds: list[Song], score: str = "score") -> int:
    """Songs with scores as a table or JSON, and as a playlist where one is asked for."""
    lost = write_m3u(args.m3u, [song for song, _ in songs], args.relative) if args.m3u else 0
    if args.json:
        entries = [as_entry(song, **{score: round(value, 4)}) for song, value in songs]
        print_json({"seeds": [song.name for song in seeds], "songs": entries})
        return 0
    lines = [[score, "time", "artist", "title", "path"]]
    for song, value in songs:
        title = printable(song.title or os.path.basename(song.name))[:40]
        artist = printable(song.artist or "")[:30]
        time = clock(song.seconds or 0)
        lines.append([f"{value:.3f}", time, artist, title, printable(song.name)])
    print(table(lines, right=(0, 1)))
    if not args.m3u:
        print("next: the same command with --m3u list.m3u8 makes a playlist of it")
        return 0
    print(f"{printable(args.m3u)}: {len(songs) - lost} songs")
    if lost:
        print(f"{lost} with a line break in the name, which a playlist cannot hold, left out")
    return 0


def write_m3u(target: Path, songs: list[Song], relative: bool) -> int:
    """A playlist in UTF-8, names that are not UTF-8 with their own bytes. A name with a line break
    cannot stand there: how many were left out."""
    lines = [b"#EXTM3U"]
    lost = 0
    for song in songs:
        place = (
            os.path.relpath(song.name, os.path.dirname(os.path.abspath(target)))
            if relative
            else song.name
        )
        if place.startswith("#"):  # to a player, a comment
            place = f"./{place}"
        if "\n" in place or "\r" in place:
            lost += 1
            continue
        title = " - ".join(filter(None, (song.artist, song.title))) or os.path.basename(song.name)
        title = re.sub(r"[\r\n]+", " ", title)
        lines += [
            f"#EXTINF:{round(song.seconds or -1)},{title}".encode("utf-8", "surrogateescape"),
            os.fsencode(place),
        ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"\n".join(lines) + b"\n")
    return lost
