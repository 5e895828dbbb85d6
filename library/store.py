"""The store `library.clmr/`: what is known of each song, and its vector.

    songs.sqlite    table `about`: format, encoder, how songs are heard, how they vary in themselves
                    table `songs`: path (bytes), size, mtime, sample, audio, seconds, artist, title,
                    album, year, genre, row (of vectors.f16; none where it failed), crc, error, gone
                    table `imprints`: of each audio what copies of it are known by
    vectors.f16     float16 (rows, D): the mean over a song's windows
    windows.f16     with --windows all: float16 (windows, D), a song's in a row from `first` on
    lock            held by the one process that may write

Vectors are written first, to rows that no song has, and flushed to the disk; then the songs that
have them, in one transaction. So a kill at any moment, or a full disk, costs the songs since the
last transaction, and nothing else."""

import contextlib
import json
import os
import sqlite3
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from library.terminal import Stop

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
                f"{folder}: no store there; type: python -m library index FOLDER --library {folder}"
            )
        with told(folder):
            store = cls(folder, *_connect(folder))
            store.check()
            return store

    @classmethod
    def read_about(cls, folder) -> About:
        """What all vectors of a store share."""
        with told(folder):
            database, about = _connect(Path(folder))
            database.close()
            return about

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
                    f"{folder} was made with another encoder ({made.kind} of {made.ckpt}); type "
                    "--ckpt "
                    f"{made.ckpt}, or another --library"
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
                "after a copy cut "
                f"short; type: python -m library index FOLDER --library {self.folder}, which "
                "hears them again"
            )
        chosen = sorted(rows)[:: max(1, len(rows) // SPOT_CHECK)]
        wrong = [row for row in chosen if zlib.crc32(vectors[row]) != rows[row]]
        if wrong:
            raise Stop(
                f"{self.folder}: damaged: {len(wrong)} of {len(chosen)} vectors are not as they "
                "were written; "
                f"type: python -m library index FOLDER --library {self.folder}, which hears them "
                "again"
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
        with told(self.folder):
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
            with self.database:
                for song in songs:
                    self.database.execute(
                        f"INSERT OR REPLACE INTO songs ({', '.join(COLUMNS)}) VALUES ({marks})",
                        tuple(asdict(song).values()),
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
        with told(self.folder), self.database:
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
            f"{folder}: damaged ({error}); move it away and index again: mv {folder} "
            f"{folder}.damaged"
        ) from None
    except OSError as error:
        raise Stop(
            f"{folder}: cannot be read or written: {error.strerror or error}; what is done is kept"
        ) from None


def _connect(folder: Path, about: About | None = None) -> tuple[sqlite3.Connection, About]:
    """The database and what stands in it; with `about` it is made where it is missing."""
    database = sqlite3.connect(folder / "songs.sqlite", timeout=10)
    try:
        if about is not None:
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(SCHEMA)
            with database:
                for key, value in {"format": FORMAT, **asdict(about)}.items():
                    database.execute(
                        "INSERT OR IGNORE INTO about VALUES (?, ?)", (key, json.dumps(value))
                    )
        tables = {name for name, in database.execute("SELECT name FROM sqlite_master")}
        if "about" not in tables:
            raise Stop(
                f"{folder}: half-written: its first index was cut off; type: python -m library "
                "index FOLDER "
                f"--library {folder}"
            )
        names = ["format", *(field.name for field in fields(About))]
        found = {
            key: json.loads(value)
            for key, value in database.execute("SELECT key, value FROM about")
            if key in names
        }
        if found.get("format", FORMAT) != FORMAT:
            raise Stop(
                f"{folder}: a store of format {found['format']}, this program knows {FORMAT}: "
                "update it, or give "
                "another --library"
            )
        if set(found) != set(names):
            raise Stop(
                f"{folder}: damaged (it does not say "
                f"{', '.join(sorted(set(names) - set(found)))}); move it away "
                f"and index again: mv {folder} {folder}.damaged"
            )
        return database, About(**{key: value for key, value in found.items() if key != "format"})
    except BaseException:
        database.close()
        raise
