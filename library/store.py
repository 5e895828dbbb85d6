"""The store `library.clmr/`: what is known of each song, and its vector.

    songs.sqlite    table `about`: format, encoder, how songs are heard, how they vary in themselves
                    table `songs`: path (bytes), size, mtime, sample, audio, seconds, artist, title,
                    album, year, genre, row (of vectors.f16; none where it failed), crc, error, gone
                    table `imprints`: of each audio what copies of it are known by
    vectors.f16     float16 (rows, D): the mean over a song's windows
    windows.f16     with --windows all: float16 (windows, D), a song's in a row from `first` on
    lock            held by the one process that may write

Vectors are written first, to rows that no song has, and flushed to the disk; then, in one
transaction, the songs that have them, their imprints, and the products summed over their windows.
So a kill at any moment, or a full disk, costs the songs heard since the last transaction
(index.COMMIT: half a minute), which the next index hears; what is there always fits together.

The products hold every recording that was ever heard here once, whatever became of its file: a
recording that has an imprint is in them, and is not added again when it is heard again, from a file
with other tags, a copy, or one whose vector was lost."""

import contextlib
import json
import os
import sqlite3
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from library.terminal import Stop, typed

try:
    import fcntl  # POSIX only: the lock that keeps a second indexer out
except ImportError:
    fcntl = None

FORMAT = 1
SPOT_CHECK = 20_000  # vectors whose checksums are compared on reading, spread over the store
SCHEMA = """
CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value BLOB);
CREATE TABLE IF NOT EXISTS songs (
    id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, size INTEGER, mtime INTEGER, sample TEXT,
    audio TEXT, seconds REAL, artist TEXT, title TEXT, album TEXT, year TEXT, genre TEXT,
    row INTEGER, crc INTEGER, first INTEGER, windows INTEGER, error TEXT,
    retry INTEGER NOT NULL DEFAULT 0, gone INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS imprints (audio TEXT PRIMARY KEY, bits BLOB);
"""


@dataclass
class Song:
    """A row of `songs`: of what is unknown, None."""

    path: bytes
    size: int
    mtime: int
    sample: str | None = None
    audio: str | None = None
    seconds: float | None = None
    artist: str | None = None
    title: str | None = None
    album: str | None = None
    year: str | None = None
    genre: str | None = None
    row: int | None = None
    crc: int | None = None
    first: int | None = None
    windows: int | None = None
    error: str | None = None
    retry: int = 0
    gone: int = 0

    @property
    def name(self) -> str:
        """The path as Python has it: bytes that are not UTF-8 as surrogates."""
        return os.fsdecode(self.path)


COLUMNS = [field.name for field in fields(Song)]


@dataclass(frozen=True)
class About:
    """What all vectors of a store share; stores of equal `identity` may be compared."""

    identity: str  # of the encoder's weights and of what is taken from it
    kind: str  # levels or output
    dimensions: int
    listening: str  # ten or all
    ckpt: str  # where the encoder lay
    loudness: float  # root mean square that windows are scaled to

    def fits(self, other: "About") -> bool:
        """Are their vectors of one kind?"""
        return (self.identity, self.dimensions, self.loudness) == (
            other.identity,
            other.dimensions,
            other.loudness,
        )

    def to_type(self, given: str = "") -> str:
        """What to type for the store's own encoder, where `given` was found to be another."""
        if not os.path.exists(self.ckpt):
            return f"its encoder is no longer at {self.ckpt}; give its new place by --ckpt"
        if self.ckpt == given:
            return f"the weights at {self.ckpt} are others by now; give its old ones by --ckpt"
        return f"type --ckpt {typed(self.ckpt)}"


class Store:
    """An open store. `Store.read(folder)` to look things up, `Store.write(folder, about)` to add
    songs."""

    def __init__(self, folder: Path, database: sqlite3.Connection, about: About, lock=None):
        self.folder = Path(folder)
        self.database = database
        self.about = about
        self.lock = lock
        self.files = {}

    # --- opening

    @classmethod
    def read(cls, folder) -> "Store":
        """Open for reading. Raises Stop with what to type for a store that is not there, newer,
        half-written, damaged."""
        folder = Path(folder)
        if not (folder / "songs.sqlite").exists():
            raise Stop(
                f"{folder}: no store there; type: python -m library index FOLDER --library "
                f"{typed(folder)}"
            )
        with told(folder):
            store = cls(folder, *_connect(folder))
            store.check()
            return store

    @classmethod
    def read_about(cls, folder) -> About | None:
        """What all vectors of a store share; None where its first index was cut off before it could
        say so."""
        with told(folder), contextlib.closing(_open(folder)) as database:
            return None if _is_begun(database) else _about(database, folder)

    @classmethod
    def write(cls, folder, about: About | None) -> "Store":
        """Open, or make, for writing by this process alone. Raises Stop for a store of another
        encoder, one that another process writes to, and as `read`."""
        folder = Path(folder)
        if folder.exists() and not (folder / "songs.sqlite").exists() and any(folder.iterdir()):
            if {path.name for path in folder.iterdir()} - {
                "lock",
                "vectors.f16",
                "songs.sqlite-journal",
            }:
                raise Stop(
                    f"{folder}: expected a store or nothing, found something else; give another "
                    "--library"
                )
        with told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "a")
            try:
                if fcntl:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.close()
                raise Stop(
                    f"{folder}: another index is at work on it; wait for it, or give another "
                    "--library"
                ) from None
            database, made = _connect(folder, about)
            store = cls(folder, database, made, lock)
            if not made.fits(about):
                store.close()
                raise Stop(
                    f"{folder} was made with another encoder ({made.kind} of {made.ckpt}): "
                    f"{made.to_type(about.ckpt)}, or another --library"
                )
            return store

    def close(self):
        """Close the files, and let others write."""
        self.database.close()
        for file in [*self.files.values(), self.lock]:
            if file:
                file.close()

    def check(self):
        """Stop where vectors are missing, or are not those that were written."""
        rows = dict(self.database.execute("SELECT row, crc FROM songs WHERE row IS NOT NULL"))
        vectors = self.vectors()
        if rows and max(rows) >= len(vectors):
            missing = sum(row >= len(vectors) for row in rows)
            raise Stop(
                f"{self.folder}: the vectors of {missing} of {len(rows)} songs are missing, as "
                "after a copy cut short; type: python -m library index FOLDER --library "
                f"{typed(self.folder)}, which hears them again"
            )
        chosen = sorted(rows)[:: max(1, len(rows) // SPOT_CHECK)]
        wrong = [row for row in chosen if zlib.crc32(vectors[row]) != rows[row]]
        if wrong:
            raise Stop(
                f"{self.folder}: damaged: {len(wrong)} of {len(chosen)} vectors are not as they "
                "were written; type: python -m library index FOLDER --library "
                f"{typed(self.folder)}, which hears them again"
            )

    # --- reading

    def songs(self, where: str = "1", values: tuple = ()) -> list[Song]:
        """Songs in the order in which they came."""
        found = self.database.execute(
            f"SELECT {', '.join(COLUMNS)} FROM songs WHERE {where} ORDER BY id", values
        )
        return [Song(*line) for line in found]

    def vectors(self, name: str = "vectors.f16") -> np.ndarray:
        """The array (rows, D), memory-mapped; whole rows only."""
        path = self.folder / name
        rows = path.stat().st_size // (2 * self.about.dimensions) if path.exists() else 0
        if not rows:
            return np.zeros((0, self.about.dimensions), np.float16)
        return np.memmap(path, np.float16, "r", shape=(rows, self.about.dimensions))

    def scatter(self) -> tuple[np.ndarray, int]:
        """How windows differ from the mean of their song: summed products (D, D) and how many
        windows."""
        found = dict(
            self.database.execute(
                "SELECT key, value FROM about WHERE key IN ('scatter', 'scattered')"
            )
        )
        size = self.about.dimensions
        if len(found.get("scatter") or b"") != 4 * size * size:
            return np.zeros((size, size), np.float32), 0
        return np.frombuffer(found["scatter"], np.float32).reshape(size, size), int(
            found["scattered"]
        )

    def imprint(self, audio: str) -> bytes:
        """What copies of a recording are known by; b"" where that is not known."""
        found = self.database.execute(
            "SELECT bits FROM imprints WHERE audio = ?", (audio,)
        ).fetchone()
        return found[0] if found else b""

    # --- writing

    @contextlib.contextmanager
    def transaction(self):
        """All that is written inside, or nothing of it; one inside another is part of that."""
        if self.database.in_transaction:
            yield
            return
        with told(self.folder), self.database:
            self.database.execute("BEGIN")
            yield

    def free_rows(self, count: int) -> list[int]:
        """Rows of vectors.f16 that no song has, gaps first."""
        used = {
            row for row, in self.database.execute("SELECT row FROM songs WHERE row IS NOT NULL")
        }
        top = max(used, default=-1) + 1
        gaps = [row for row in range(top) if row not in used] if top > len(used) else []
        return [*gaps, *range(top, top + count)][:count]

    def add(
        self, songs: list[Song], vectors: list[np.ndarray], windows: list[np.ndarray] | None = None
    ):
        """Write songs and, of those without an error, their vectors (D,) and windows (n, D):
        vectors first."""
        heard = [song for song in songs if song.error is None]
        with self.transaction():
            for song, row, vector in zip(heard, self.free_rows(len(heard)), vectors):
                song.row = row
                song.crc = self.put("vectors.f16", row, vector)
            for song, rows in zip(heard, windows or ()):
                song.first = self.end_of("windows.f16")
                song.windows = len(rows)
                self.put("windows.f16", song.first, rows)
            for file in self.files.values():
                file.flush()
                os.fsync(file.fileno())
            marks = ", ".join("?" * len(COLUMNS))
            self.database.executemany(
                f"INSERT OR REPLACE INTO songs ({', '.join(COLUMNS)}) VALUES ({marks})",
                [tuple(asdict(song).values()) for song in songs],
            )

    def put(self, name: str, row: int, rows: np.ndarray) -> int:
        """Write rows (n, D) or one (D,) from `row` on; their checksum."""
        if name not in self.files:
            path = self.folder / name
            self.files[name] = open(path, "r+b" if path.exists() else "w+b")
        data = np.ascontiguousarray(np.clip(rows, -65504, 65504), np.float16)
        self.files[name].seek(2 * self.about.dimensions * row)
        self.files[name].write(data.tobytes())
        return zlib.crc32(data)

    def end_of(self, name: str) -> int:
        """The first row behind all that songs have."""
        column = "MAX(first + windows)" if name == "windows.f16" else "MAX(row) + 1"
        committed = self.database.execute(f"SELECT {column} FROM songs").fetchone()[0] or 0
        file = self.files.get(name)
        if not file:
            return committed
        return max(committed, file.tell() // (2 * self.about.dimensions))

    def change(self, sql: str, values):
        """One statement for each tuple of values, in one transaction."""
        with self.transaction():
            self.database.executemany(sql, values)

    def note_scatter(self, products: np.ndarray, count: int):
        """Replace the summed products of `scatter`."""
        self.change(
            "INSERT OR REPLACE INTO about VALUES (?, ?)",
            [("scatter", products.astype(np.float32).tobytes()), ("scattered", count)],
        )

    def forget_lost(self) -> int:
        """Songs whose vectors are missing or damaged are to be heard again; how many."""
        vectors = self.vectors()
        rows = list(self.database.execute("SELECT row, crc FROM songs WHERE row IS NOT NULL"))
        lost = [
            (row,) for row, crc in rows if row >= len(vectors) or zlib.crc32(vectors[row]) != crc
        ]
        self.change(
            "UPDATE songs SET row = NULL, retry = 1, error = 'its vector was lost' WHERE row = ?",
            lost,
        )
        return len(lost)


@contextlib.contextmanager
def told(folder: Path):
    """Errors of SQLite and of the disk as one line that says what to do."""
    try:
        yield
    except sqlite3.OperationalError as error:
        what = {
            "full": "the disk is full; what is done is kept, the same command goes on when there "
            "is room",
            "locked": "another process writes to it; wait for it",
            "readonly": "it cannot be written to",
        }
        text = next((said for word, said in what.items() if word in str(error)), str(error))
        raise Stop(f"{folder}: {text}") from None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        raise Stop(
            f"{folder}: damaged ({error}); move it away and index again: {_away(folder)}"
        ) from None
    except OSError as error:
        raise Stop(
            f"{folder}: cannot be read or written: {error.strerror or error}; what is done is kept"
        ) from None


def _away(folder) -> str:
    """The command that moves a damaged store away."""
    return f"mv {typed(folder)} {typed(f'{folder}.damaged')}"


def _open(folder) -> sqlite3.Connection:
    return sqlite3.connect(Path(folder) / "songs.sqlite", timeout=10)


def _connect(folder: Path, about: About | None = None) -> tuple[sqlite3.Connection, About]:
    """The database and what stands in it; with `about` it is made where it is missing."""
    database = _open(folder)
    try:
        if about is not None:
            _begin(database, about)
        return database, _about(database, folder)
    except BaseException:
        database.close()
        raise


def _begin(database: sqlite3.Connection, about: About):
    """Make what is missing, in one transaction: tables without what is said about them would be a
    store of nobody's."""
    database.execute("PRAGMA synchronous = FULL")
    with database:
        database.execute("BEGIN IMMEDIATE")
        begun = _is_begun(database)
        for statement in SCHEMA.split(";"):
            database.execute(statement)
        if begun:
            said = {"format": FORMAT, **asdict(about)}
            database.executemany(
                "INSERT OR REPLACE INTO about VALUES (?, ?)",
                [(key, json.dumps(value)) for key, value in said.items()],
            )


def _is_begun(database: sqlite3.Connection) -> bool:
    """Was it made just now, or was its first index cut off before it said whose songs it holds? It
    has no song then, and does not say all that one is about."""
    tables = {name for name, in database.execute("SELECT name FROM sqlite_master")}
    if "about" not in tables:
        return True
    if "songs" in tables and database.execute("SELECT 1 FROM songs LIMIT 1").fetchone():
        return False
    found = {key for key, in database.execute("SELECT key FROM about")}
    return not found >= {field.name for field in fields(About)}


def _about(database: sqlite3.Connection, folder: Path) -> About:
    """What stands in `about`, or Stop."""
    if _is_begun(database):
        raise Stop(
            f"{folder}: half-written: its first index was cut off; type: python -m library index "
            f"FOLDER --library {typed(folder)}"
        )
    names = ["format", *(field.name for field in fields(About))]
    found = {
        key: json.loads(value)
        for key, value in database.execute("SELECT key, value FROM about")
        if key in names
    }
    if found.get("format", FORMAT) != FORMAT:
        raise Stop(
            f"{folder}: a store of format {found['format']}, this program knows {FORMAT}: update "
            "it, or give another --library"
        )
    if set(found) != set(names):
        missing = ", ".join(sorted(set(names) - set(found)))
        raise Stop(
            f"{folder}: damaged (it does not say {missing}); move it away and index again: "
            f"{_away(folder)}"
        )
    return About(**{key: value for key, value in found.items() if key != "format"})
