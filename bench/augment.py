"""Speed of the augmentation chain beside the libraries people use; quality of the pitch shift.

    python bench/augment.py --rounds 1 --seconds 0.3 --only ours        # a quick look
    python bench/augment.py --make-peers ~/peers --out results/speed/augment.json
    python bench/augment.py --peers ~/peers --clips FOLDER --out results/speed/augment.json

The second installs the peers and measures; the third measures again, and the quality on real music.

The peers live in an environment of their own (torch 2.8, the last with a fast sox), never in this
project's; one that does not install or run is named in the JSON with its reason (the released
code's sox: apt-get install libsox-dev). Each library runs in its own process, pinned to one core,
one thread; the rounds go A B C A B C ..., and medians over the rounds are reported, in views
(59,049 samples) per second of wall time. `busy` is CPU time over wall time: well below 1, the core
was shared and the figure is too low.
"""

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

SAMPLE_RATE, SAMPLES = 22050, 59049
RELEASED = {
    "polarity": 0.8,
    "noise": 0.01,
    "gain": 0.3,
    "filter": 0.8,
    "delay": 0.3,
    "pitch": 0.6,
    "reverb": 0.6,
}
PEERS = {
    "released": ["wavaugment", "torchaudio-augmentations==0.2.4"],
    "torch-audiomentations": ["torch-audiomentations"],
    "audiomentations": ["audiomentations"],
    "pedalboard": ["pedalboard"],
}
PARTIAL = ["torch-audiomentations", "audiomentations"]
BATCH = 64

# ------------------------------ what each library runs, in its process
# name -> {task: function of a batch (B, 1, T) float32 tensor}


def ours() -> dict:
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import augment

    generator = torch.Generator().manual_seed(0)

    def run(chain):
        return lambda x: chain(x, chain.draw(len(x), generator))

    tasks = {
        "chain": run(augment.Chain(SAMPLE_RATE, probability=RELEASED)),
        "chain at the paper's probabilities": run(augment.Chain(SAMPLE_RATE)),
    }
    return tasks | {
        name: run(augment.Chain(SAMPLE_RATE, [name], {name: 1.0})) for name in augment.TRANSFORMS
    }


def released() -> dict:
    """The released code's own transforms, through wavaugment's sox."""
    import torch
    import torchaudio_augmentations as t

    def each(transform):
        return lambda x: torch.stack([transform(row) for row in x])

    alone = {
        "polarity": t.PolarityInversion(),
        "noise": t.Noise(),
        "gain": t.Gain(),
        "filter": t.HighLowPass(SAMPLE_RATE),
        "delay": t.Delay(SAMPLE_RATE),
        "pitch": t.PitchShift(SAMPLES, SAMPLE_RATE, -5, 5),
        "reverb": t.Reverb(SAMPLE_RATE),
    }
    chain = t.Compose([t.RandomApply([alone[name]], p=p) for name, p in RELEASED.items()])
    return {"chain": each(chain)} | {name: each(transform) for name, transform in alone.items()}


def torch_audiomentations() -> dict:
    """On whole batches. It has neither delay nor reverb: its chain goes without."""
    import torch_audiomentations as t

    common = {"sample_rate": SAMPLE_RATE, "output_type": "tensor"}
    kinds = {
        "polarity": (t.PolarityInversion, {}),
        "noise": (
            t.AddColoredNoise,
            {"min_snr_in_db": 80, "max_snr_in_db": 80, "min_f_decay": 0, "max_f_decay": 0},
        ),
        "gain": (t.Gain, {"min_gain_in_db": -6, "max_gain_in_db": 0}),
        "low-pass": (t.LowPassFilter, {"min_cutoff_freq": 2200, "max_cutoff_freq": 4000}),
        "high-pass": (t.HighPassFilter, {"min_cutoff_freq": 200, "max_cutoff_freq": 1200}),
        "pitch": (t.PitchShift, {"min_transpose_semitones": -5, "max_transpose_semitones": 5}),
    }

    def make(name, p):
        if name == "filter":
            return t.OneOf(
                [make("low-pass", 1.0), make("high-pass", 1.0)], p=p, output_type="tensor"
            )
        kind, options = kinds[name]
        return kind(p=p, **options, **common)

    names = ("polarity", "noise", "gain", "filter", "pitch")
    chain = t.Compose([make(name, RELEASED[name]) for name in names], output_type="tensor")
    transforms = {"chain": chain} | {name: make(name, 1.0) for name in names}
    return {
        name: lambda x, f=f: f(x.clone(), sample_rate=SAMPLE_RATE) for name, f in transforms.items()
    }


def audiomentations() -> dict:
    """Row by row. It has neither delay nor a reverb of this kind: its chain goes without."""
    import audiomentations as a

    kinds = {
        "polarity": lambda p: a.PolarityInversion(p=p),
        "noise": lambda p: a.AddGaussianSNR(min_snr_db=80, max_snr_db=80, p=p),
        "gain": lambda p: a.Gain(min_gain_db=-6, max_gain_db=0, p=p),
        "filter": lambda p: a.OneOf(
            [a.LowPassFilter(2200, 4000, p=1.0), a.HighPassFilter(200, 1200, p=1.0)], p=p
        ),
        "pitch": lambda p: a.PitchShift(min_semitones=-5, max_semitones=5, p=p),
    }
    chain = a.Compose([kind(RELEASED[name]) for name, kind in kinds.items()])

    def each(transform):
        return lambda x: [transform(row, sample_rate=SAMPLE_RATE) for row in x[:, 0].numpy()]

    return {"chain": each(chain)} | {name: each(kind(1.0)) for name, kind in kinds.items()}


def pedalboard() -> dict:
    """Row by row, with a board per view; its reverb has the room, damping and wet level as
    parameters.
    """
    import numpy as np
    import pedalboard as p

    draw = random.Random(0)

    def noise(x):
        return x + (
            x.std()
            * 1e-4
            * np.random.default_rng(draw.getrandbits(32)).standard_normal(x.shape, np.float32)
        )

    effects = {
        "polarity": lambda: p.Invert(),
        "gain": lambda: p.Gain(draw.uniform(-6, 0)),
        "filter": lambda: (
            p.LowpassFilter(draw.uniform(2200, 4000))
            if draw.random() < 0.5
            else p.HighpassFilter(draw.uniform(200, 1200))
        ),
        "delay": lambda: p.Delay(draw.randrange(200, 501, 50) / 1000, feedback=0.0, mix=0.33),
        "pitch": lambda: p.PitchShift(draw.uniform(-5, 5)),
        "reverb": lambda: p.Reverb(
            room_size=draw.random(), damping=draw.random(), wet_level=0.33, dry_level=1.0
        ),
    }

    def chain(row):
        board = []
        for name, probability in RELEASED.items():
            if draw.random() < probability:
                if name == "noise":
                    row = noise(row)
                else:
                    board.append(effects[name]())
        return p.Pedalboard(board)(row, SAMPLE_RATE)

    def each(f):
        return lambda x: [f(row) for row in x[:, 0].numpy()]

    alone = {name: each(lambda row, e=e: e()(row, SAMPLE_RATE)) for name, e in effects.items()}
    return {"chain": each(chain), "noise": each(noise)} | alone


LIBRARIES = {
    "ours": ours,
    "released": released,
    "torch-audiomentations": torch_audiomentations,
    "audiomentations": audiomentations,
    "pedalboard": pedalboard,
}


def keep_freed_blocks() -> None:
    """As the training does: glibc keeps what is freed (M_MMAP_MAX 0, M_TRIM_THRESHOLD -1), or page
    faults dominate.
    """
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0), libc.mallopt(-1, -1)


def worker(library: str) -> int:
    """Answer {"task", "batch", "seconds"} lines on stdin with {"views_per_s", "busy"} lines on
    stdout.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not garble the answers
    sys.path.remove(
        str(Path(__file__).resolve().parent)
    )  # wavaugment's module is called augment, as this file is
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if library == "ours":
        keep_freed_blocks()
    tasks = LIBRARIES[library]()
    audio = 0.1 * torch.randn(192, 1, SAMPLES, generator=torch.Generator().manual_seed(0))
    print(json.dumps(sorted(tasks)), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        x = audio[: request["batch"]]
        tasks[request["task"]](x[:8])  # warm
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, cpu, views = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - wall < request["seconds"]:
            tasks[request["task"]](x)
            views += len(x)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        print(
            json.dumps(
                {
                    "views_per_s": views / wall,
                    "busy": cpu / wall,
                    "peak_mib": max(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
                    / 1024,
                }
            ),
            file=answers,
            flush=True,
        )
    return 0


# ------------------------------ the measurements


def start(library: str, python: str) -> tuple[subprocess.Popen, list[str]]:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "NUMBA_NUM_THREADS": "1",
    }
    core = max(os.sched_getaffinity(0))
    process = subprocess.Popen(
        [python, __file__, "--worker", library],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(process.stderr.read().strip().splitlines()[-1])
    return process, json.loads(line)


def ask(process: subprocess.Popen, task: str, seconds: float, batch: int = BATCH) -> dict:
    process.stdin.write(json.dumps({"task": task, "batch": batch, "seconds": seconds}) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError(f"{task}: " + process.stderr.read().strip().splitlines()[-1])
    return json.loads(line)


def median(answers: list[dict]) -> dict:
    return {
        "views_per_s": round(statistics.median(a["views_per_s"] for a in answers), 1),
        "all_rounds": [round(a["views_per_s"], 1) for a in answers],
        "busy": round(statistics.median(a["busy"] for a in answers), 3),
    }


def speeds(libraries: dict[str, str], rounds: int, seconds: float) -> tuple[dict, dict]:
    """{task: {library: figures}} and {library: why it did not run}."""
    processes, tasks, failed = {}, {}, {}
    for library, python in libraries.items():
        try:
            processes[library], tasks[library] = start(library, python)
        except (RuntimeError, OSError) as error:
            failed[library] = str(error)
    table = {}
    for task in tasks["ours"]:
        answers = {library: [] for library in processes if task in tasks[library]}
        for _ in range(rounds):
            for library in list(answers):
                try:
                    answers[library].append(ask(processes[library], task, seconds))
                except (RuntimeError, OSError) as error:
                    failed[f"{library}, {task}"] = str(error)
                    del answers[library]
                    processes[library], _ = start(library, libraries[library])
        table[task] = {library: median(rows) for library, rows in answers.items()}
        print(
            task, {library: row["views_per_s"] for library, row in table[task].items()}, flush=True
        )
    table["chain by batch"] = {
        f"ours, {batch}": median(
            [ask(processes["ours"], "chain", seconds, batch) for _ in range(rounds)]
        )
        for batch in (1, BATCH, 192)
    }
    for process in processes.values():
        process.stdin.close()
        process.wait()
    return table, failed


def against(table: dict) -> dict:
    """{task: the fastest peer and how many times as fast ours is}; the whole chain also against
    whole chains alone.
    """
    ratios = {}
    for task, row in table.items():
        for title, left_out in (
            (task, ()),
            ("chain, against those with delay and reverb", PARTIAL),
        ):
            others = {
                name: figures["views_per_s"]
                for name, figures in row.items()
                if not name.startswith("ours") and name not in left_out
            }
            if others and (title == task or task == "chain"):
                fastest = max(others, key=others.get)
                ratios[title] = {
                    "fastest_peer": fastest,
                    "ours_over_it": round(row["ours"]["views_per_s"] / others[fastest], 2),
                }
    return ratios


def memory(python: str) -> float:
    """MiB at the peak per view beyond what the process holds before, chain at batch 192, in a
    process of its own.
    """
    process, _ = start("ours", python)
    small, large = ask(process, "chain", 0.0, 2), ask(process, "chain", 1.0, 192)
    process.stdin.close()
    process.wait()
    return round((large["peak_mib"] - small["peak_mib"]) / 192, 3)


def limits() -> dict:
    """What one core of this machine can do at best: copy, and the FFTs that pitch shift and reverb
    cannot avoid.
    """
    import torch

    torch.set_num_threads(1)
    keep_freed_blocks()

    def best(f, n: int = 20) -> float:
        times = []
        for _ in range(n):
            begin = time.perf_counter()
            f()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    source = torch.randn(2**24)
    target = torch.empty_like(source)
    rows = torch.randn(8, 2**16)
    a = torch.randn(1024, 1024)
    return {
        "copy_gb_per_s": round(
            2 * source.numel() * 4 / best(lambda: target.copy_(source)) / 1e9, 2
        ),
        "fft_pairs_of_2^16_per_s": round(
            8 / best(lambda: torch.fft.irfft(torch.fft.rfft(rows), 2**16)), 1
        ),
        "matmul_gflop_per_s": round(2 * 1024**3 / best(lambda: a @ a) / 1e9, 1),
    }


def distance(chain_views_per_s: float, limit: dict) -> dict:
    """The whole chain against those limits.

    Per view, at the released probabilities: one FFT pair for each pitch shift and each reverb; and
    2 x 4 bytes a sample for every transform that is on, were each a single pass over memory.
    """
    pairs = RELEASED["pitch"] + RELEASED["reverb"]
    passes = sum(RELEASED.values())
    return limit | {
        "fft_pairs_per_view": pairs,
        "bytes_per_view": round(passes * SAMPLES * 8),
        "share_of_time_at_fft_limit": round(
            chain_views_per_s * pairs / limit["fft_pairs_of_2^16_per_s"], 3
        ),
        "share_of_time_at_copy_limit": round(
            chain_views_per_s * passes * SAMPLES * 8 / (limit["copy_gb_per_s"] * 1e9), 3
        ),
    }


# ------------------------------ quality of the pitch shift


def log_spectral_distance(a, b) -> float:
    """dB, root mean square over frequency, mean over frames of 93 ms, of what is above -80 dB of
    the clip's peak.
    """
    import torch

    def level(x):
        window = torch.hann_window(2048)
        return torch.stft(x, 2048, 512, window=window, return_complex=True).abs().square()

    a, b = level(a), level(b)
    floor = b.max() * 1e-8
    return (10 * ((a + floor).log10() - (b + floor).log10())).square().mean(0).sqrt().mean().item()


def pitch_quality(folder: Path, clips: int, semitones: tuple[float, ...]) -> dict:
    """Mean log-spectral distance to Rubber Band (its finer engine) of ours, torchaudio's and sox's,
    on crops of 6 s.
    """
    import soundfile
    import torch
    import torchaudio

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import augment

    for tool in ("rubberband", "sox"):
        if not shutil.which(tool):
            raise RuntimeError(f"expected the program {tool}: apt-get install rubberband-cli sox")
    files = sorted(
        p for p in folder.rglob("*") if p.suffix.lower() in (".ogg", ".wav", ".flac", ".mp3")
    )
    files = random.Random(0).sample(files, min(clips, len(files)))
    rows = {name: {s: [] for s in semitones} for name in ("ours", "torchaudio", "sox", "unchanged")}
    with tempfile.TemporaryDirectory() as scratch:
        source, target = f"{scratch}/in.wav", f"{scratch}/out.wav"
        for file in files:
            audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
            x = torch.from_numpy(audio).mean(1)
            middle = max(0, len(x) // 2 - 3 * rate)
            x = 0.7 * x[middle : middle + 6 * rate]
            soundfile.write(source, x.numpy(), rate, subtype="FLOAT")
            for s in semitones:

                def program(*command):
                    subprocess.run(command, check=True, capture_output=True)
                    y = torch.from_numpy(soundfile.read(target, dtype="float32")[0])
                    return torch.nn.functional.pad(y, (0, max(0, len(x) - len(y))))[: len(x)]

                reference = program("rubberband", "-3", "-p", str(s), source, target)
                outputs = {
                    "ours": augment.pitch_shift(x[None, None], torch.tensor([s]), rate)[0, 0],
                    "torchaudio": torchaudio.functional.pitch_shift(x, rate, s),
                    "sox": program(
                        "sox",
                        "-D",
                        source,
                        "-e",
                        "floating-point",
                        "-b",
                        "32",
                        target,
                        "pitch",
                        str(100 * s),
                    ),
                    "unchanged": x,
                }
                for name, y in outputs.items():
                    rows[name][s].append(log_spectral_distance(y, reference))
    means = {
        name: {f"{s:+g}": round(statistics.mean(v), 3) for s, v in row.items()}
        for name, row in rows.items()
    }
    for name, row in rows.items():
        means[name]["all"] = round(statistics.mean(d for v in row.values() for d in v), 3)
    nearer = {
        peer: round(
            statistics.mean(
                a < b for s in semitones for a, b in zip(rows["ours"][s], rows[peer][s])
            ),
            3,
        )
        for peer in ("torchaudio", "sox")
    }
    return {
        "log_spectral_distance_to_rubberband_db": means,
        "share_of_clips_where_ours_is_nearer_than": nearer,
        "clips": len(files),
        "semitones": semitones,
    }


# ------------------------------ program


def make_peers(folder: Path) -> dict[str, str]:
    """An environment with the peers; {library: why not} for what does not install."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python, failed = str(folder / "bin" / "python"), {}
    for name, packages in {"torch 2.8": ["torch==2.8.0", "torchaudio==2.8.0"], **PEERS}.items():
        done = subprocess.run(
            [python, "-m", "pip", "install", "-q", *packages], capture_output=True, text=True
        )
        if done.returncode:
            failed[name] = (
                "did not install: " + (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            )
    return failed


def versions(python: str) -> dict[str, str]:
    names = [
        "torch",
        "torchaudio",
        "torchaudio-augmentations",
        "wavaugment",
        "torch-audiomentations",
        "audiomentations",
        "pedalboard",
        "numpy",
    ]
    code = (
        "import importlib.metadata as m, json\nv = {}\nfor n in %r:\n    try: v[n] = m.version(n)\n"
        "    except m.PackageNotFoundError: pass\nprint(json.dumps(v))" % names
    )
    return json.loads(
        subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    )


def summary(speed: dict) -> dict:
    """caption and table, as `results/tables.py` prints them: views a second of each transform and
    library.
    """
    rows = [
        {"views/s": name}
        | {
            library: f"{values[library]['views_per_s']:,.0f}" if library in values else "-"
            for library in LIBRARIES
        }
        for name, values in speed["views_per_s"].items()
        if "ours" in values and "views_per_s" in values["ours"]
    ]
    at = "at " + " ".join(f"{p:g}" for p in speed["probabilities_of_chain"].values())
    return {
        "caption": f"Views of {SAMPLES:,d} samples a second on one core "
        f"({speed['machine']['cpu']}), batch {BATCH}, medians; the chain {at}. "
        f"The chains of the audiomentations pair lack delay and reverb. `{speed['command']}`",
        "table": rows,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/augment.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--peers", type=Path, help="environment that holds the peers")
    parser.add_argument(
        "--make-peers", type=Path, metavar="DIR", help="make that environment first"
    )
    parser.add_argument("--only", choices=["ours"], help="measure only this library")
    parser.add_argument(
        "--clips", type=Path, help="folder of recordings for the quality of the pitch shift"
    )
    parser.add_argument("--n-clips", type=int, default=20, help="how many of them")
    parser.add_argument("--rounds", type=int, default=5, help="of A B C ...")
    parser.add_argument("--seconds", type=float, default=1.0, help="per measurement")
    parser.add_argument(
        "--out", type=Path, help="JSON to write; parts not measured this time are kept from it"
    )
    parser.add_argument("--skip-speed", action="store_true", help="only the quality")
    parser.add_argument("--worker", choices=list(LIBRARIES), help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.worker:
        return worker(args.worker)
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    command = "python bench/augment.py " + " ".join(sys.argv[1:] if argv is None else argv)
    failed = make_peers(args.make_peers) if args.make_peers else {}
    peers = args.make_peers or args.peers
    if not args.skip_speed:
        libraries = {"ours": sys.executable}
        if peers and args.only is None:
            libraries |= {
                name: str(peers / "bin" / "python")
                for name in LIBRARIES
                if name not in ("ours", *failed)
            }
        limit = limits()
        table, broken = speeds(libraries, args.rounds, args.seconds)
        result["speed"] = {
            "command": command,
            "machine": common.machine() | {"used": "one core, pinned"},
            "versions": {"ours": versions(sys.executable)}
            | ({"peers": versions(str(peers / "bin" / "python"))} if peers else {}),
            "what": f"views of {SAMPLES} samples a second on one core, batch {BATCH}, "
            f"medians of {args.rounds} rounds",
            "probabilities_of_chain": RELEASED,
            "views_per_s": table,
            "against_the_fastest_peer": against(table),
            "peers_without_delay_and_reverb": PARTIAL,
            "did_not_run": failed | broken,
            "peak_mib_per_view_beyond_the_libraries": memory(sys.executable),
            "limits": distance(table["chain"]["ours"]["views_per_s"], limit),
        }
    if args.clips:
        shifts = (-5.0, -2.5, -1.0, 1.0, 2.5, 5.0)
        result["pitch_quality"] = {"command": command} | pitch_quality(
            args.clips, args.n_clips, shifts
        )
    if "speed" in result:
        result |= summary(result["speed"])
    common.write(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
