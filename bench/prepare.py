"""How fast is prepare.py, and does it stay small? Writes results/speed/prepare.json.

    python bench/prepare.py --root MUSIC [--files 60] [--rounds 5]      # about 10 minutes
    python bench/prepare.py --tables DIR          # only: the split of MagnaTagATune's real tables

Decoding, one pinned core, file by file in turn, median files per second of processor time:
prepare's decoder (mono, 22,050 Hz, int16, sha256) against ffmpeg writing a wav per file (what the
released CLMR code does) and against plain soundfile + torchaudio resampling. Three sets are made
from the first --files recordings below --root: as they are, as 16 kHz mono mp3 (MagnaTagATune's
form) and as 44.1 kHz stereo mp3 (FMA's and the Million Song Dataset's).
Memory: the peak of a whole run over 1,000 and over 100,000 clips of 50 ms, and by how much a worker
grows on three hours of stereo FLAC.
Crops: 96 random crops of 59,049 samples at a time from the memory map against reading the same
bytes with pread, with the file in the page cache and dropped from it.
"""

import argparse
import gzip
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

import common

ROOT = common.ROOT
sys.path.insert(0, str(ROOT))
import prepare  # noqa: E402
from splits import tables as split_tables  # noqa: E402
from splits import writing  # noqa: E402


def ours(path):
    with tempfile.TemporaryDirectory() as folder:
        job = writing.Job(str(path), prepare.SAMPLE_RATE, None, f"{folder}/samples")
        writing.convert(job, prepare.stream)


def plain(path):
    x, rate = soundfile.read(path, dtype="float32", always_2d=True)
    torchaudio.functional.resample(torch.from_numpy(x.mean(1)), rate, prepare.SAMPLE_RATE)


def ffmpeg(path):
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [
                "ffmpeg",
                "-v",
                "error",
                "-threads",
                "1",
                "-i",
                path,
                "-ar",
                str(prepare.SAMPLE_RATE),
                "-ac",
                "1",
                f"{folder}/x.wav",
            ],
            check=True,
        )


def cpu():
    """Seconds of processor time of this process and of those it has waited for: neighbours on the
    machine do not count.
    """
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def decoding(files, rounds):
    """Every file by each method in turn, so that a machine that slows down slows all; rates of
    processor time.
    """
    rates = {one.__name__: [] for one in (ours, ffmpeg, plain)}
    for _ in range(rounds):
        seconds = dict.fromkeys(rates, 0.0)
        for path in files:
            for one in (ours, ffmpeg, plain):
                start = cpu()
                one(path)
                seconds[one.__name__] += cpu() - start
        for name in rates:
            rates[name].append(len(files) / seconds[name])
    times = {
        name: round(statistics.median(a / b for a, b in zip(rates["ours"], rates[name])), 2)
        for name in ("ffmpeg", "plain")
    }
    return {
        "files_per_cpu_second": {
            name: round(statistics.median(values), 2) for name, values in rates.items()
        },
        "files": len(files),
        "all_rounds": {k: [round(v, 2) for v in vs] for k, vs in rates.items()},
        "times_ffmpeg": times["ffmpeg"],
        "times_plain": times["plain"],
    }


MEMORY = """
import itertools, os, pathlib, sys
sys.path.insert(0, {root!r})
import prepare
folder, count = pathlib.Path({out!r}).parent, itertools.count(1)
def peak():  # MiB, of this process alone
    status = open("/proc/self/status")
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) // 1024
def stream(path, rate, survey):
    if next(count) % 200 == 0:
        (folder / f"worker-{{os.getpid()}}").write_text(str(peak()))
    yield from prepare.stream(path, rate, survey)
clips = [prepare.Clip(f"clip {{i}}", prepare.Path({wav!r}), tags=("a",)) for i in range({n})]
listing = prepare.Listing(clips, task="multilabel", tags=[chr(97 + k) for k in range(26)])
prepare.write(listing, {out!r}, prepare.Options(workers=2, progress=False, stream=stream))
print(peak(), max(int(path.read_text()) for path in folder.glob("worker-*")))
"""


LONG = """
import resource, sys
sys.path.insert(0, {root!r})
import prepare
from splits import writing
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
writing.convert(writing.Job({path!r}, prepare.SAMPLE_RATE, None, {out!r}), prepare.stream)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def memory(folder):
    soundfile.write(
        folder / "short.wav", 0.1 * np.ones(round(0.05 * prepare.SAMPLE_RATE)), prepare.SAMPLE_RATE
    )
    result = {}
    for n in (1000, 100_000):
        script = MEMORY.format(
            root=str(ROOT), wav=str(folder / "short.wav"), n=n, out=str(folder / str(n) / "out")
        )
        (folder / str(n)).mkdir()
        start = time.perf_counter()
        parent, worker = subprocess.run(
            [sys.executable, "-c", script], check=True, capture_output=True, text=True
        ).stdout.split()
        result[f"{n}_clips"] = {
            "parent_mib": int(parent),
            "largest_worker_mib": int(worker),
            "seconds": round(time.perf_counter() - start, 1),
        }
    with soundfile.SoundFile(folder / "long.flac", "w", 44100, 2) as file:
        for _ in range(180):
            file.write(np.zeros((60 * 44100, 2), np.int16))
    script = LONG.format(
        root=str(ROOT), path=str(folder / "long.flac"), out=str(folder / "samples")
    )
    grown = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    result["three_hours_of_stereo_flac_mib"] = int(grown)
    result["bytes_per_clip"] = round(
        (result["100000_clips"]["parent_mib"] - result["1000_clips"]["parent_mib"]) * 2**20 / 99_000
    )
    return result


def crops(folder, rounds, batch=96, n=59049, batches=12):
    clips = prepare.Clips(folder)
    path = clips.folder / "audio.npy"
    file = os.open(path, os.O_RDONLY)

    def cold():
        vars(clips).pop("maps", None)  # unmap, else the pages stay
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)

    def draw(seed):
        generator = np.random.default_rng(seed)
        index = generator.choice(np.flatnonzero(clips.length >= n), batch)
        return index, (generator.random(batch) * (clips.length[index] - n)).astype(np.int64)

    def read(index, start):
        for first in (clips.start[index] + start).tolist():
            os.pread(file, 2 * n, 128 + 2 * first)

    result = {}
    for state in ("warm", "cold"):
        rates = {"crops": [], "pread": []}
        for r in range(rounds):
            for name, one in (("crops", lambda i, s: clips.crops(i, s, n)), ("pread", read)):
                draws = [
                    draw(1000 * r + 100 * (name == "pread") * (state == "cold") + k)
                    for k in range(batches)
                ]
                if state == "warm":
                    for d in draws:
                        read(*d)
                else:
                    cold()
                start = time.perf_counter()
                for d in draws:
                    one(*d)
                rates[name].append(batch * batches / (time.perf_counter() - start))
        result[state] = {
            f"{name}_per_second": round(statistics.median(values)) for name, values in rates.items()
        }
        result[state]["times_pread"] = round(
            statistics.median(rates["crops"]) / statistics.median(rates["pread"]), 2
        )
    os.close(file)
    return result


def tables(folder, scratch):
    """The published counts on MagnaTagATune's real tables, over empty files in place of the mp3s.
    """
    rows, _ = split_tables.read_table(Path(folder, "annotations_final.csv"))
    for row in rows:
        path = scratch / row["mp3_path"]
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for name in ("annotations_final.csv", "clip_info_final.csv"):
        source = next(
            path for path in (Path(folder, name), Path(folder, name + ".gz")) if path.exists()
        )
        with (gzip.open if source.suffix == ".gz" else open)(source, "rb") as file:
            (scratch / name).write_bytes(file.read())
    result = {}
    for split in ("all", "labelled"):
        listing = prepare.DATASETS["mtat"](scratch, split=split)
        count = Counter(clip.split for clip in listing if clip.id not in listing.broken)
        result[split] = {
            "train_valid_test": [count[name] for name in prepare.SPLITS],
            "published": list(listing.published),
            "songs": len({clip.group for clip in listing}),
            "cello_in_test": sum("cello" in clip.tags for clip in listing if clip.split == "test"),
            "choral_in_valid": sum(
                "choral" in clip.tags for clip in listing if clip.split == "valid"
            ),
        }
        assert tuple(result[split]["train_valid_test"]) == listing.published, result
    return result


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench/prepare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--root", type=Path, help="recordings to decode")
    parser.add_argument("--tables", type=Path, help="MagnaTagATune's two tables, plain or .gz")
    parser.add_argument("--files", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--only",
        nargs="*",
        choices=("decoding", "memory", "crops"),
        default=("decoding", "memory", "crops"),
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "speed" / "prepare.json")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchaudio": torchaudio.__version__,
        "numpy": np.__version__,
        "soundfile": soundfile.__version__,
        "libsndfile": soundfile.__libsndfile_version__,
    }
    if shutil.which("ffmpeg"):
        versions["ffmpeg"] = subprocess.run(
            ["ffmpeg", "-version"], capture_output=True, text=True
        ).stdout.split()[2]
    result |= {"versions": versions, **common.machine()}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        folder = Path(folder)
        if args.tables:
            (folder / "mtat").mkdir()
            result["mtat_tables"] = tables(args.tables, folder / "mtat")
        if args.root:
            found = list(prepare.audio_files(args.root).values())
            if "memory" in args.only:
                result["memory"] = memory(folder)
            if "crops" in args.only:
                listing = prepare.read_folder(args.root)
                prepare.write(listing, folder / "cache")
                result["crops"] = crops(folder / "cache", args.rounds)
            if "decoding" in args.only:
                files = found[:: max(1, len(found) // args.files)][: args.files]
                sets = {"as they are": files, "mp3, 16 kHz mono": [], "mp3, 44.1 kHz stereo": []}
                for k, path in enumerate(files):
                    for name, options in (
                        ("mp3, 16 kHz mono", ["-ar", "16000", "-ac", "1", "-b:a", "32k"]),
                        ("mp3, 44.1 kHz stereo", ["-ar", "44100", "-ac", "2", "-b:a", "128k"]),
                    ):
                        sets[name].append(folder / f"{k}-{options[1]}.mp3")
                        subprocess.run(
                            ["ffmpeg", "-v", "error", "-i", path, *options, sets[name][-1]],
                            check=True,
                        )
                if hasattr(os, "sched_setaffinity"):
                    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
                torch.set_num_threads(1)
                result["decoding"] = {
                    name: decoding(paths, args.rounds) for name, paths in sets.items()
                }
    if "decoding" in result:
        result |= {
            "caption": "Files of about 30 s a second of processor time, one core "
            f"({result['cpu']}): ours, ffmpeg to a wav per file, and plain soundfile and "
            "torchaudio's resampling without checks",
            "table": [
                {
                    "files": name,
                    **{who: f"{speed:.1f}" for who, speed in row["files_per_cpu_second"].items()},
                    "ours / ffmpeg": f"{row['times_ffmpeg']:.1f}",
                }
                for name, row in result["decoding"].items()
            ],
        }
    common.write(result, args.out)
    common.write({key: value for key, value in result.items() if key != "versions"}, None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
