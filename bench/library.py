"""Does the library know a song again, how fast does it hear, how fast does it search?

    python bench/library.py recognition --root MOODS/audio --out results/library/recognition.json
    python bench/library.py windows --root MUSIC --files 100 --out results/library/windows.json
    python bench/library.py speed --root MUSIC --out results/library/speed.json [--bliss PYTHON]
    python bench/library.py search --out results/library/search.json

recognition: of 200 songs another version is made (a 10-second excerpt; 6 dB softer; 6 dB louder and
cut at full scale; a 64 kbit/s mp3; a semitone higher; 5 % faster; by sox) and heard; how many are
nearest to their own song among all? With what a plain mean of the encoder's output gives, step by
step, up to what the library does. windows: the same of 10-second excerpts of songs of minutes,
heard in ten windows and in all of them. speed: processor seconds a song, on one core, in rounds
that take turns: decoding alone (the ten windows; the whole song), `index`, and bliss-audio on the
same files. search: milliseconds of an exact search in a million songs (made-up unit vectors,
memory-mapped)."""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

import common

sys.path.insert(0, str(common.ROOT))
import prepare  # noqa: E402
from library import listen, search  # noqa: E402
from library.network import load_network  # noqa: E402

RATE = 22050
KINDS = ("excerpt of 10 s", "-6 dB", "+6 dB", "mp3, 64 kbit/s", "a semitone up", "5 % faster")
BLISS = """
import sys, bliss_audio
for path in sys.stdin.read().split("\\0"):
    bliss_audio.Song(path)
"""


def versions_of(path, folder, rng):
    """Files of the six versions of a recording, made in `folder`."""
    x = prepare.decode(path, RATE).numpy()
    start = int(rng.integers(0, max(1, len(x) - 10 * RATE)))
    plain = {
        KINDS[0]: x[start : start + 10 * RATE],
        KINDS[1]: x * 10**-0.3,
        KINDS[2]: np.clip(x * 10**0.3, -1, 1),
    }
    for kind, y in plain.items():
        file = folder / f"{len(os.listdir(folder))}.wav"
        soundfile.write(file, y, RATE)
        yield kind, file
    source = folder / "source.wav"
    soundfile.write(source, x, RATE)
    effects = {KINDS[3]: ["-C", "64"], KINDS[4]: ["pitch", "100"], KINDS[5]: ["tempo", "1.05"]}
    for kind, words in effects.items():
        file = folder / f"{len(os.listdir(folder))}.{'mp3' if '-C' in words else 'wav'}"
        before, after = (words, []) if "-C" in words else ([], words)
        subprocess.run(["sox", "-V1", source, *before, file, *after], check=True)
        yield kind, file


def raw(path, sample_rate, size, every=False):
    """The windows of a file at their own level, ten or all."""
    if every:
        yield from listen.every_window(path, sample_rate, size)
    else:
        yield listen.excerpts(path, sample_rate, size, 10)[0]


def hear(files, features, workers, every=False):
    """Means over windows, {name: (N, D)}, and (products, count) of how the last one's windows vary.

    features: {name: (network, whether its windows are scaled to equal loudness)}.
    """
    network = next(iter(features.values()))[0]
    rows = {path: {name: [] for name in features} for path in files}
    last = list(features)[-1]
    products, count = 0.0, 0
    decode = partial(raw, sample_rate=network.sample_rate, size=network.size, every=every)
    for path, kind, content in listen.hear_all(files, decode, workers):
        if kind == listen.FAILED:
            raise RuntimeError(f"{path}: {content}")
        if kind == listen.PIECE:
            for name, (network, equal) in features.items():
                rows[path][name].append(
                    network(listen.equal_loudness(content) if equal else content)
                )
        if kind == listen.END:
            part = np.concatenate(rows[path][last]).astype(np.float64)
            products = products + (part - part.mean(0)).T @ (part - part.mean(0))
            count += len(part)
    means = {
        name: np.stack([np.concatenate(rows[path][name]).mean(0) for path in files])
        for name in features
    }
    return means, (products, count)


def nearest_share(collection, queries, true):
    """Share of the queries (n, d) whose nearest of the collection (N, d) is their own song, %."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (collection, queries)]
    return 100 * float(((unit[1] @ unit[0].T).argmax(1) == true).mean())


def recognition(args):
    files = sorted(prepare.audio_files(args.root).values())
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(files), min(args.files or 200, len(files)), replace=False))
    network = load_network(args.ckpt, "levels", "cpu")
    features = {"its own level": (network, False), "equal loudness": (network, True)}
    with tempfile.TemporaryDirectory() as folder:
        made = {kind: [] for kind in KINDS}
        for k in chosen:
            for kind, file in versions_of(files[k], Path(folder), rng):
                made[kind].append(file)
        songs, scatter = hear(files, features, args.workers)
        heard = {kind: hear(paths, features, args.workers)[0] for kind, paths in made.items()}
    rows = []
    weighings = {name: (name, standardise(x)) for name, x in songs.items()}
    last = list(features)[-1]
    weighings["the library: these, weighed by what varies within songs"] = last, search.weigh(
        songs[last], *scatter
    )
    for text, (name, weighing) in weighings.items():
        shares = {
            kind: nearest_share(weighing(songs[name]), weighing(heard[kind][name]), chosen)
            for kind in KINDS
        }
        rows.append({"features": text, **{kind: f"{share:.1f}" for kind, share in shares.items()}})
    caption = (
        f"Share (%) of {len(chosen)} songs whose other version is nearest to its own song among "
        f"{len(files)}: "
        "ten windows a song, cosine of standardised features of "
        f"{args.ckpt or 'the encoder that ships'}. "
        f"{args.note}`python bench/library.py recognition`."
    )
    return {"kind": "library", "caption": caption, "table": rows, "encoder": network.identity}


def standardise(x):
    """A Weighing without what varies within songs."""
    spread = x.std(0)
    return search.Weighing(
        x.mean(0), np.diag(np.where(spread > 1e-6, 1 / np.maximum(spread, 1e-6), 0))
    )


def windows(args):
    files = [path for path in some_of(args.root, args.files or 100) if is_whole(path)]
    network = load_network(args.ckpt, "levels", "cpu")
    rng = np.random.default_rng(0)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cut = []
        for k, path in enumerate(files):
            length = soundfile.info(path).duration
            start = float(rng.uniform(0, max(0.0, length - 10)))
            rate = soundfile.info(path).samplerate
            x = soundfile.read(path, frames=10 * rate, start=int(start * rate))[0]
            cut.append(Path(folder, f"{k}.wav"))
            soundfile.write(cut[-1], x, rate)
        units = []
        features = {"levels": (network, True)}
        for every in (False, True):
            began = time.process_time() + children()
            songs, scatter = hear(files, features, args.workers, every)
            spent = time.process_time() + children() - began
            queries, _ = hear(cut, features, args.workers)
            weighing = search.weigh(songs["levels"], *scatter)
            units.append(weighing(songs["levels"]))
            share = nearest_share(units[-1], weighing(queries["levels"]), np.arange(len(files)))
            rows.append(
                {
                    "heard": "all windows" if every else "ten windows",
                    "windows": f"{scatter[1]:,}",
                    "excerpts found, %": f"{share:.1f}",
                    "processor s a song": f"{spent / len(files):.2f}",
                }
            )
    tens = []
    for unit in units:
        scores = unit @ unit.T
        np.fill_diagonal(scores, -2)
        tens.append(np.argsort(-scores, 1)[:, :10])
    shared = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(*tens)])
    caption = (
        f"{len(files)} songs of minutes: 10-second excerpts whose nearest is their own song. Of "
        "the ten nearest "
        f"songs of a song {100 * shared:.0f} % are the same either way. `python bench/library.py "
        "windows`."
    )
    return {"kind": "library", "caption": caption, "table": rows, "encoder": network.identity}


def some_of(root, count):
    """`count` recordings of a minute and more, chosen evenly below root."""
    files = [
        path
        for path in sorted(prepare.audio_files(root).values())
        if soundfile.info(path).duration > 60
    ]
    return files[:: max(1, len(files) // count)][:count]


def is_whole(path) -> bool:
    """Can all of a recording be decoded?"""
    try:
        for _ in prepare.stream(path, RATE):
            pass
    except ValueError:
        return False
    return True


def children():
    """Processor seconds of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor_seconds(command, given=None):
    """Processor seconds of a command and its children."""
    before = children()
    subprocess.run(
        [str(word) for word in command],
        input=given,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return children() - before


def speed(args):
    files = some_of(args.root, args.files or 200)
    minutes = sum(soundfile.info(path).duration for path in files) / 60
    core = ["taskset", "-c", str(args.core)]
    one = [*core, sys.executable, __file__, "--worker"]
    names = "\0".join(map(str, files))
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        music = Path(folder, "music")
        music.mkdir()
        for k, path in enumerate(files):
            os.symlink(os.path.abspath(path), music / f"{k:04d}{Path(path).suffix}")
        for turn in range(args.rounds):
            index = [
                *core,
                sys.executable,
                common.ROOT / "library",
                "index",
                music,
                "--library",
                Path(folder, f"store{turn}"),
                "--workers",
                "1",
                "--device",
                "cpu",
                *(["--ckpt", args.ckpt] if args.ckpt else []),
            ]
            ways = {
                "nothing (start of Python)": lambda: processor_seconds([*one, "nothing"], b""),
                "decoding ten windows alone": lambda: processor_seconds(
                    [*one, "ten"], names.encode()
                ),
                "decoding all alone": lambda: processor_seconds([*one, "all"], names.encode()),
                "library index": lambda: processor_seconds(index),
            }
            if args.bliss:
                ways["bliss-audio 0.2.0"] = lambda: processor_seconds(
                    [*core, args.bliss, "-c", BLISS], names.encode()
                )
            for name, way in ways.items():
                seconds.setdefault(name, []).append(way())
                print(name, seconds[name], file=sys.stderr)
    start = statistics.median(seconds["nothing (start of Python)"])
    rows = []
    for name, turns in seconds.items():
        each = (
            statistics.median(turns) - (0 if "bliss" in name or "nothing" in name else start)
        ) / len(files)
        rows.append(
            {
                "way": name,
                "processor s a song": f"{each:.3f}",
                "songs/s": f"{1 / max(each, 1e-9):.1f}",
            }
            if "nothing" not in name
            else {"way": name, "processor s a song": f"{start:.1f} once", "songs/s": ""}
        )
    caption = (
        f"{len(files)} songs, {minutes / len(files):.1f} minutes each on average, one core of "
        f"{common.where()}, "
        f"medians of {args.rounds} rounds; {args.note}`python bench/library.py speed`."
    )
    return {"kind": "library", "caption": caption, "table": rows, "seconds": seconds}


def worker(what):
    """Decoding alone, of the files that stand on stdin."""
    torch.set_num_threads(1)
    size = load_network(None, "output", "cpu").size
    files = [name for name in sys.stdin.read().split("\0") if name]
    for path in files:
        if what == "ten":
            listen.excerpts(path, RATE, size, 10)
        elif what == "all":
            is_whole(path)


def search_times(args):
    songs = args.files or 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        unit = np.lib.format.open_memmap(
            Path(folder, "unit.npy"), "w+", np.float16, (songs, search.DIRECTIONS)
        )
        rng = np.random.default_rng(0)
        for start in range(0, songs, 50_000):
            part = rng.standard_normal((min(50_000, songs - start), search.DIRECTIONS), np.float32)
            unit[start : start + 50_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
        mapped = torch.from_numpy(np.load(Path(folder, "unit.npy"), mmap_mode="c"))
        query = mapped[:1].float()
        times = []
        for _ in range(9):
            began = time.perf_counter()
            scores = search.products_of(query, mapped)[0].numpy()
            next(search.in_order(scores))
            times.append(1e3 * (time.perf_counter() - began))
        median, best = statistics.median(times[1:]), min(times)
    rows = [{"songs": f"{songs:,}", "ms, median": f"{median:.0f}", "ms, best": f"{best:.0f}"}]
    caption = (
        f"Exact search among {songs:,} unit vectors of {search.DIRECTIONS} float16 numbers, "
        "memory-mapped, in the page "
        f"cache; {common.where()}; {args.note}`python bench/library.py search`."
    )
    return {"kind": "library", "caption": caption, "table": rows}


def main():
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["recognition", "windows", "speed", "search"])
    parser.add_argument("--root", type=Path, help="recordings")
    parser.add_argument("--files", type=int, help="how many of them; search: how many songs")
    parser.add_argument("--ckpt", type=Path, help="an encoder (default: the one that ships)")
    parser.add_argument("--bliss", type=Path, help="a Python that has bliss-audio 0.2.0")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--note", default="", help="what the machine did beside, for the caption")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ways = {"recognition": recognition, "windows": windows, "speed": speed, "search": search_times}
    args.note = f"{args.note}. " if args.note else ""
    result = {
        **ways[args.what](args),
        "command": common.command_line(__file__),
        "machine": common.machine(),
        "torch": torch.__version__,
    }
    common.write(result, args.out)


if __name__ == "__main__":
    main()
