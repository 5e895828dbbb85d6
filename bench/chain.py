"""What kernels/ gains the augmentation chain on one core of a CPU, and what it changes.

    python bench/chain.py --rounds 1                                   # a quick look
    git show 5d0e41e:augment.py > before.py
    python bench/chain.py --before before.py --clips data/demo --out results/speed/chain.json

The ways of the chain take turns, A B C D A B C D ...: as it was (with --before: an augment.py of
another time), augment.py copied alone, kernels/ without a C compiler, and kernels/ as it is. One
thread; medians over the rounds, in views (59,049 samples) a second of CPU time, so that a core that
is shared with others does not count as slowness (their use of the caches does). With --clips, a
prepared folder, also how far the outputs of the ways are from each other on its music.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import common

sys.path.insert(0, str(common.ROOT))

SAMPLE_RATE = 22050
SAMPLES = 59049
ALONE = "augment.py alone"
NO_COMPILER = "kernels/, no C compiler"
NOW = "kernels/"


def module_at(path: Path):
    """augment.py of another time."""
    spec = importlib.util.spec_from_file_location("before", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["before"] = module
    spec.loader.exec_module(module)
    return module


def ways(before: Path | None) -> dict:
    """{name: (module, what to call before its chain)}."""
    import augment
    from kernels import compiled

    kernels = augment._kernels()
    usable = compiled.usable

    def take(these_kernels, this_usable):
        augment._kernels = lambda: these_kernels
        compiled.usable = this_usable

    found = {
        ALONE: (augment, lambda: take(None, usable)),
        NO_COMPILER: (augment, lambda: take(kernels, lambda *tensors: False)),
        NOW: (augment, lambda: take(kernels, usable)),
    }
    if before:
        found = {"before": (module_at(before), lambda: None), **found}
    return found


def cpu_seconds(function) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def speeds(found: dict, rounds: int) -> dict:
    """{task: {way: views a second, in every round}}."""
    import torch

    import augment

    audio = 0.1 * torch.randn(192, 1, SAMPLES, generator=torch.Generator().manual_seed(0))
    tasks = {"chain": (None, None), **{name: ([name], {name: 1.0}) for name in augment.TRANSFORMS}}
    table = {task: {way: [] for way in found} for task in tasks}
    for turn in range(rounds + 1):
        for task, chosen in tasks.items():
            x = audio if task == "chain" else audio[:64]
            for way, (module, take) in found.items():
                take()
                chain = module.Chain(SAMPLE_RATE, *chosen)
                draws = chain.draw(len(x), torch.Generator().manual_seed(turn))
                seconds = cpu_seconds(lambda: chain(x, draws))
                if turn:  # the first one warms up
                    table[task][way].append(len(x) / seconds)
    return table


def differences(found: dict, folder: Path, views: int) -> dict:
    """{way: {"median": relative difference of a view, "more than 1e-4": share of views}}, against
    the first way; in some views two splices are equally good to rounding, and another is taken."""
    import torch

    import prepare

    clips = prepare.Clips(folder)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(len(clips), (views,), generator=generator).tolist()
    start = [int(s) for s in torch.randint(int(min(clips.length)) - SAMPLES, (views,),
                                           generator=generator)]
    x = clips.crops(index, start, SAMPLES)
    outputs = {}
    for way, (module, take) in found.items():
        take()
        chain = module.Chain(clips.sample_rate)
        outputs[way] = chain(x, chain.draw(views, torch.Generator().manual_seed(1)))
    first, *others = outputs
    report = {}
    for way in others:
        away = (outputs[way] - outputs[first]).norm(dim=2)
        away = away / outputs[first].norm(dim=2).clamp_min(1e-9)
        report[way] = {"median": away.median().item(),
                       "more than 1e-4": round((away > 1e-4).float().mean().item(), 4)}
    return {"against": first, "views": views, "of": report}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--before", type=Path, help="an augment.py to compare with")
    parser.add_argument("--clips", type=Path, help="a prepared folder, for the differences")
    parser.add_argument("--views", type=int, default=960, help="of the differences")
    parser.add_argument("--rounds", type=int, default=5, help="of A B C D ...")
    parser.add_argument("--out", type=Path, help="JSON to write")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    warnings.filterwarnings("ignore")
    import model

    model.tune_allocator()
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = ways(args.before)
    rounds = speeds(found, args.rounds)
    table = []
    for task, row in rounds.items():
        medians = {way: statistics.median(values) for way, values in row.items()}
        table.append({"views / s": task, **{way: f"{m:,.0f}" for way, m in medians.items()},
                      "times": round(medians[NOW] / next(iter(medians.values())), 2)})
    command = "python bench/chain.py " + " ".join(sys.argv[1:] if argv is None else argv)
    result = {"command": command, "machine": common.machine(), "torch": torch.__version__,
              "rounds": {task: {way: [round(v, 1) for v in values] for way, values in row.items()}
                         for task, row in rounds.items()},
              "caption": f"Views of {SAMPLES:,d} samples a second of CPU time, one thread on "
                         f"{common.where()}; medians of {args.rounds} rounds; the chain at its "
                         f"own probabilities on 192 views, a transform alone on 64. `{command}`",
              "table": table}
    if args.clips:
        result["differences"] = differences(found, args.clips, args.views)
    common.write(result, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
