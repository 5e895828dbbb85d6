"""A training step on the CPU against the released model's, side by side.

    python bench/pretrain.py --out results/pretrain-speed.json               # about ten minutes on two cores
    python bench/pretrain.py --batch-sizes 16 --rounds 2 --steps 2

Each variant runs in a process of its own (the allocator is set once per process), in turn: A B C A B C ...; the figures are
medians over all timed steps, the ratios are of medians. Views are ready-made noise: what is timed is encoder, projector, NT-Xent
and Adam. Variants:
  released    the released network written plainly (Conv1d, ReLU before max-pool), float32, torch's Adam, glibc as it is
  ours        model.py with its allocator setting and bfloat16 autocast, as pretrain.py runs it
  recompute   ours with --recompute 3
  float32     ours with --amp off: torch's batch norm replaced by the accurate one
`chain` is the share that the augmentation chain takes of a step of `ours` on real draws.
"""
import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def worker(variant, batch, steps):
    sys.path.insert(0, str(ROOT))
    import model

    if variant != "released":
        model.tune_allocator()
    import torch
    from torch import nn

    import augment
    import pretrain

    torch.manual_seed(0)
    if variant == "released":
        sizes = [1, 128, 128, 128, 256, 256, 256, 256, 256, 256, 512, 512]
        encoder = nn.Sequential(*[nn.Sequential(nn.Conv1d(i, o, 3, 1 if n else 3, 1 if n else 0), nn.BatchNorm1d(o), nn.ReLU(),
                                                *([nn.MaxPool1d(3, 3)] if 0 < n < 10 else [])) for n, (i, o) in enumerate(zip(sizes, sizes[1:]))], nn.Flatten())
    else:
        encoder = model.build_encoder("samplecnn")
        encoder.recompute(3 if variant == "recompute" else 0)
    learner = pretrain.CLMR(encoder, model.Projector())
    if variant == "float32":
        learner = model.synchronise(learner, "cpu")
    amp = "off" if variant in ("released", "float32") else model.choose_amp("cpu")
    optimiser = torch.optim.Adam(learner.parameters(), lr=3e-4, **({} if variant == "released" else {"fused": True}))
    views, times, chains = torch.randn(2 * batch, 1, 59049) * 0.1, [], []
    chain = augment.Chain(22050)
    for step in range(steps + 1):
        draws = chain.draw(2 * batch, torch.Generator().manual_seed(step))
        began = time.perf_counter()
        if variant == "ours":
            with torch.no_grad():
                chain(views, draws)
            chains.append(time.perf_counter() - began)
        began = time.perf_counter()
        with model.autocast("cpu", amp):
            loss, _ = learner(views)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": times[1:], "chain": chains[1:], "loss": loss.item(), "amp": amp,
                      "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 48])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed steps per process, after one that is not timed")
    parser.add_argument("--variants", nargs="+", default=["released", "ours", "recompute", "float32"])
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], int(args.worker[1]), int(args.worker[2]))
    import torch

    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    result = {"command": " ".join(["python", "bench/pretrain.py", *sys.argv[1:]]), "machine": {"cpu": cpu, "cores": os.cpu_count()},
              "versions": {"python": platform.python_version(), "torch": torch.__version__}, "steps": []}
    for batch in args.batch_sizes:
        runs = {v: [] for v in args.variants}
        for _ in range(args.rounds):
            for variant in args.variants:
                done = subprocess.run([sys.executable, __file__, "--worker", variant, str(batch), str(args.steps)], capture_output=True, text=True, check=True)
                runs[variant].append(json.loads(done.stdout.splitlines()[-1]))
        base = None
        for variant, found in runs.items():
            seconds = [s for r in found for s in r["seconds"]]
            row = {"batch": batch, "variant": variant, "n": len(seconds), "seconds": round(statistics.median(seconds), 3),
                   "pairs_per_s": round(batch / statistics.median(seconds), 2), "min": round(min(seconds), 3), "max": round(max(seconds), 3),
                   "peak_gib": round(statistics.median(r["peak_gib"] for r in found), 2), "amp": found[0]["amp"]}
            base = base or row["seconds"]
            row["speed_up"] = round(base / row["seconds"], 2)
            if variant == "ours":
                row["chain_share"] = round(statistics.median(s for r in found for s in r["chain"]) / statistics.median(seconds), 3)
            result["steps"].append(row)
            print(json.dumps(row), flush=True)
    result["caption"] = f"Medians on {cpu}, {os.cpu_count()} cores, torch {torch.__version__}; `{result['command']}`"
    result["table"] = [{"batch": r["batch"], "variant": r["variant"], "s / step": r["seconds"], "pairs / s": r["pairs_per_s"], "speed-up": r["speed_up"],
                        "peak GiB": r["peak_gib"], "steps timed": r["n"]} for r in result["steps"]]
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
