"""`index`: hear every song of a folder once, and keep what the encoder makes of it in the store.

Again, only what is new or changed is heard; songs that moved are known by their bytes, or by their
audio where tags were edited on the way; songs that are gone stay in the store, marked, for a disk
may come back."""

import errno
import hashlib
import os
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from library import listen
from library.network import Network, load_network
from library.store import About, Song, Store
from library.terminal import (
    Stop,
    as_json,
    clock,
    named,
    print_json,
    printable,
    progress,
    report,
    typed,
)

BATCH = 64  # windows that the network takes together, from several songs
COMMIT = 30.0  # seconds between transactions, as much as a kill costs; each writes up to 17 MB


@dataclass
class Plan:
    """What is to be done with a collection."""

    todo: list[Path] = field(default_factory=list)
    changed: set[Path] = field(default_factory=set)
    counts: Counter = field(default_factory=Counter)
    failed_before: list[Song] = field(default_factory=list)
    left_out: dict[Path, str] = field(default_factory=dict)  # what is no audio, and why


def in_shard(relative: str, shard: tuple[int, int] | None) -> bool:
    """Does a song belong to part i of n? By a hash of its name below the folder: it stays when
    others come and go.

    >>> sum(in_shard("a.mp3", (i, 3)) for i in (1, 2, 3))
    1
    """
    if not shard:
        return True
    digest = hashlib.sha256(os.fsencode(relative)).digest()
    return int.from_bytes(digest[:8], "big") % shard[1] == shard[0] - 1


def same_file(a, b) -> bool:
    """Do two names lead to one file that is there?"""
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def is_gone(path: bytes) -> bool:
    """Is there certainly no such file? One that a disk or a permission hides is not gone."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ENOTDIR)
    return False


def survey(store: Store, folders: list[Path], args) -> Plan:
    """Compare folders with the store: mark what is gone or back, follow what moved, and say what is
    to be heard."""
    plan = Plan()
    known = {song.path: song for song in store.songs()}
    found = one_name_each(store, songs_below(folders, args.shard, known, plan), known)
    missing = missing_songs(known, found, folders, args.shard)
    moved: list[tuple] = []
    back: list[tuple] = []
    for key, path in found.items():
        song = known.get(key)
        state = path.stat()
        if song and (song.size, song.mtime) == (state.st_size, state.st_mtime_ns):
            if song.row is not None:
                plan.counts["unchanged"] += 1
                back += [(key,)] if song.gone else []
                continue
            if not (song.retry or args.retry):
                plan.failed_before.append(song)
                continue
        old = None if song else moved_from(path, state, missing)
        if old:
            missing.remove(old)
            moved.append((key, state.st_mtime_ns, old.path))
            plan.counts["moved"] += 1
        else:
            plan.todo.append(path)
            plan.changed |= {path} if song else set()
            plan.counts["changed" if song else "new"] += 1
    store.change("UPDATE songs SET path = ?, mtime = ?, gone = 0 WHERE path = ?", moved)
    store.change("UPDATE songs SET gone = 0 WHERE path = ?", back)
    gone = [(song.path,) for song in missing if not song.gone]
    store.change("UPDATE songs SET gone = 1 WHERE path = ?", gone)
    store.change("DELETE FROM songs WHERE gone = ? AND row IS NULL", [(1,)])
    plan.counts["gone"] = len(gone)
    return plan


def songs_below(folders: list[Path], shard, known: dict[bytes, Song], plan: Plan) -> dict:
    """Every song of the shard below the folders, {absolute path as bytes: as Path}; what is left
    out goes into the plan. Stop where there is no audio, and never was any."""
    found: dict[bytes, Path] = {}
    anything = False
    for folder in folders:
        files, left_out = listen.audio_below(folder)
        plan.left_out.update(left_out)
        anything = anything or bool(files)
        for path in files.values():
            if in_shard(os.path.relpath(path, folder), shard):
                absolute = os.path.abspath(path)
                found[os.fsencode(absolute)] = Path(absolute)
    if not anything:
        if not any(below(song, folder) for song in known.values() for folder in folders):
            raise listen.nothing_found(folders, list(plan.left_out.items()))
    return found


def one_name_each(store: Store, found: dict[bytes, Path], known: dict[bytes, Song]) -> dict:
    """Of a file that links, mounts or folders inside one another give several names, the one that
    the store knows, else the first; other names that the store had go."""
    names: dict[tuple[int, int], bytes] = {}
    elsewhere: dict[tuple, list[bytes]] = {}  # songs that were not found, by size and mtime
    for key, song in known.items():
        if key not in found and not song.gone:
            elsewhere.setdefault((song.size, song.mtime), []).append(key)
    second: set[bytes] = set()
    for key in sorted(found, key=lambda key: key not in known):
        state = os.stat(key)
        alike = elsewhere.get((state.st_size, state.st_mtime_ns), ())
        others = {other for other in alike if same_file(key, other)}
        if names.setdefault((state.st_dev, state.st_ino), key) != key:
            second.add(key)
        elif key in known:
            second |= others
        elif others:
            second.add(key)
    store.change("DELETE FROM songs WHERE path = ?", [(key,) for key in second])
    return {key: path for key, path in found.items() if key not in second}


def below(song: Song, folder: Path) -> str | None:
    """A song's path below a folder; None where it lies elsewhere."""
    relative = os.path.relpath(song.name, os.path.abspath(folder))
    outside = relative == os.pardir or relative.startswith(os.pardir + os.sep)
    return None if outside else relative


def missing_songs(known: dict[bytes, Song], found: dict, folders: list[Path], shard) -> list[Song]:
    """Songs of the store that lay below these folders and lie there no more, and those that were
    gone before."""
    missing = []
    for key, song in known.items():
        if key in found:
            continue
        places = filter(None, (below(song, folder) for folder in folders))
        if any(in_shard(place, shard) for place in places) and is_gone(key) or song.gone:
            missing.append(song)
    return missing


def moved_from(path: Path, state: os.stat_result, missing: list[Song]) -> Song | None:
    """The missing song that has the same bytes, as far as its size and samples of it tell."""
    alike = [song for song in missing if song.size == state.st_size and song.row is not None]
    if not alike:
        return None
    try:
        sample = listen.sample_of(path)
    except OSError:
        return None
    return next((song for song in alike if song.sample == sample), None)


class Embedding:
    """Windows of many songs through the network, in batches across songs; the means of the songs
    that are complete."""

    def __init__(self, network: Network, every: bool):
        self.network = network
        self.every = every
        self.waiting: list[tuple[Path, np.ndarray]] = []
        self.rows: dict[Path, list[np.ndarray]] = {}
        self.heard: dict[Path, listen.Heard] = {}

    def push(self, path: Path, piece):
        """Windows (n, size) of a song, or at its end its Heard."""
        if isinstance(piece, listen.Heard):
            self.heard[path] = piece
        else:
            self.waiting.append((path, piece))
        if sum(len(windows) for _, windows in self.waiting) >= BATCH:
            self.flush()

    def drop(self, path: Path):
        """What came of a song is void."""
        self.waiting = [pair for pair in self.waiting if pair[0] != path]
        self.rows.pop(path, None)
        self.heard.pop(path, None)

    def flush(self):
        """All that waits, through the network."""
        if not self.waiting:
            return
        rows = self.network(np.concatenate([windows for _, windows in self.waiting]))
        ends = np.cumsum([len(windows) for _, windows in self.waiting])[:-1]
        for (path, _), part in zip(self.waiting, np.split(rows, ends)):
            self.rows.setdefault(path, []).append(part)
        self.waiting.clear()

    def complete(self) -> list[tuple[Path, listen.Heard, np.ndarray]]:
        """Songs all of whose windows are done, with their rows (n, D); they stay until they are
        dropped, for they may not reach the disk."""
        self.flush()
        done = []
        for path, heard in self.heard.items():
            rows = np.concatenate(self.rows[path])
            if not np.isfinite(rows).all():
                raise Stop(
                    f"the encoder gives numbers that are not finite, of {path} first: expected a "
                    "trained one, or --amp off"
                )
            done.append((path, heard, rows))
        return done


def storable(text: str) -> str:
    """Text as SQLite takes it: of bytes that are not UTF-8 their escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def song_of(
    path: Path, heard: listen.Heard | None = None, error: str | None = None, retry: bool = False
) -> Song:
    """A row for the store."""
    key = os.fsencode(path)
    try:
        state = path.stat()
    except OSError:  # it went away while it was heard
        return Song(key, 0, 0, error="no such file any more", retry=1)
    song = Song(
        key, state.st_size, state.st_mtime_ns, error=error and storable(error), retry=int(retry)
    )
    if heard:
        song.sample = heard.sample
        song.audio = heard.audio
        song.seconds = heard.seconds
        for name, value in heard.tags.items():
            setattr(song, name, value and storable(value))
    return song


def add_up(store: Store, done: list[tuple[Path, listen.Heard, np.ndarray]]):
    """Add to the store's products the windows of recordings that were never heard before, each
    once."""
    new = {heard.audio: rows for _, heard, rows in done if not store.imprint(heard.audio)}
    if not new:
        return
    # One product of all: (D, D) numbers are too many to go through for every song. In float64, for
    # the order in which songs come must not decide between two copies.
    apart = np.concatenate([rows - rows.mean(0) for rows in new.values()], dtype=np.float64)
    products, count = store.scatter()
    store.note_scatter(products + apart.T @ apart, count + len(apart))


def save(store: Store, embedding: Embedding, counts: Counter):
    """One transaction: the songs that are complete, and what is summed over their windows; a gone
    song of the same audio has moved here, with other tags."""
    done = embedding.complete()
    if not done:
        return
    songs = [song_of(path, heard) for path, heard, _ in done]
    gone = {song.audio: song.path for song in store.songs("gone = 1")}
    moved = [(gone[song.audio],) for song in songs if song.error is None and song.audio in gone]
    rows = [rows for _, _, rows in done]
    imprints = [(heard.audio, heard.imprint) for _, heard, _ in done]
    with store.transaction():
        store.add(songs, [part.mean(0) for part in rows], rows if embedding.every else None)
        store.change("DELETE FROM songs WHERE gone = 1 AND path = ?", moved)
        add_up(store, done)
        store.change("INSERT OR REPLACE INTO imprints VALUES (?, ?)", imprints)
    for path, *_ in done:
        embedding.drop(path)
    counts.update(moved=len(moved), new=-len(moved), gone=-len(moved))


def hear(store: Store, network: Network, plan: Plan, args) -> list[tuple]:
    """Hear what is to be heard; returns [(path, reason)] of what could not be. All that is done is
    kept, whatever ends it."""
    hearing = listen.Hearing(
        network.sample_rate, network.size, every=store.about.listening == "all"
    )
    embedding = Embedding(network, hearing.every)
    failed: list[tuple] = []
    saved = time.monotonic()
    unsure: dict[Path, str] = {}
    try:
        with progress(len(plan.todo), "listening") as bar:
            for path, kind, content in listen.hear_all(
                plan.todo, hearing, args.workers, args.timeout
            ):
                if kind == listen.PIECE:
                    embedding.push(path, content)
                    continue
                bar.update(kind != listen.AGAIN)
                if kind == listen.AGAIN:
                    unsure[path] = content
                if kind != listen.END:
                    embedding.drop(path)
                if kind == listen.FAILED:
                    failed.append((path, content))
                    plan.counts["changed" if path in plan.changed else "new"] -= 1
                    # A crash or a time-out is never final: the next index tries again.
                    store.add([song_of(path, error=content, retry=path in unsure)], [])
                if time.monotonic() - saved > COMMIT:
                    save(store, embedding, plan.counts)
                    saved = time.monotonic()
    finally:
        save(store, embedding, plan.counts)
    return failed


def encoder_of(folder: Path, ckpt: Path | None) -> Path | None:
    """The encoder to use: the one that is named, else the store's own where it still lies there,
    else what ships."""
    if ckpt or not (folder / "songs.sqlite").exists():
        return ckpt
    about = Store.read_about(folder)
    return Path(about.ckpt) if about and os.path.exists(about.ckpt) else None


def run(args) -> int:
    """The verb."""
    start = time.monotonic()
    folder = args.library[0]
    network = load_network(encoder_of(folder, args.ckpt), "levels", args.device, args.amp)
    about = About(
        network.identity,
        network.kind,
        network.dimensions,
        args.windows or "ten",
        network.name,
        listen.LOUDNESS,
    )
    store = Store.write(folder, about)
    try:
        if args.windows and store.about.listening != args.windows:
            raise Stop(
                f"{folder} was made with --windows {store.about.listening}; type that, or another "
                "--library"
            )
        lost = store.forget_lost()
        plan = survey(store, args.folders, args)
        failed = hear(store, network, plan, args)
        return close(store, plan, failed, lost, time.monotonic() - start, args)
    finally:
        store.close()


def close(store: Store, plan: Plan, failed: list[tuple], lost: int, seconds: float, args) -> int:
    """The closing lines, and the exit code."""
    there = "FROM songs WHERE row IS NOT NULL AND gone = 0"
    total = store.database.execute(f"SELECT COUNT(*) {there}").fetchone()[0]
    counts = {name: plan.counts[name] for name in ("new", "changed", "moved", "gone", "unchanged")}
    left = len(plan.failed_before)
    left_out = list(plan.left_out.items())
    if args.json:
        faults = {"failed": as_json(failed), "failed_before": left, "heard_again": lost}
        place = {"library": os.fspath(store.folder), "songs": total}
        others = {"left_out": as_json(left_out), "seconds": round(seconds, 1)}
        print_json({**place, **counts, **faults, **others})
        return int(bool(failed))
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    pace = f", {len(plan.todo) / seconds:.1f} songs/s" if plan.todo else ""
    place = f"{printable(store.folder)}: {total:,} songs ({told or 'nothing new'})"
    print(f"{place} in {clock(seconds)}{pace}")
    if lost:
        print(f"{lost} vectors were lost or damaged: their songs were heard again")
    if left:
        print(f"{left} files that failed before, and have not changed, were left out; --retry")
        print("tries them again")
    report("left out", left_out)
    report("failed", failed)
    song = store.database.execute(f"SELECT path {there} LIMIT 1").fetchone()
    if song:
        name = typed(song[0])
        print(printable(f"next: python -m library similar {name}{named(args.library)}"))
    return int(bool(failed))
