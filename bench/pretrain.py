"""What pretrain.py promises, measured: speed, kills survived, bfloat16 against float32.

    python bench/pretrain.py speed --out results/speed/pretrain-cpu.json          # ten minutes
    python bench/pretrain.py kills --out results/robustness/pretrain-kills.json   # eight minutes
    python bench/pretrain.py curves --data moods --out results/speed/pretrain-precision.json
    python bench/pretrain.py gpu --out results/speed/pretrain-gpu-step.json  # a step's parts
    python bench/pretrain.py whole --data mtat --max-steps 300 --log-every 20

speed: a training step on ready-made noise (encoder, projector, NT-Xent, Adam). Each variant runs in
a process of its own (the allocator is set once per process), in turn: A B C A B C ...; the figures
are medians over all timed steps. Variants:
  released    the released network written plainly, float32, torch's Adam, glibc as it is
  ours        model.py with its allocator setting and bfloat16 autocast, as pretrain.py runs it
  recompute   ours with --recompute 3
  float32     ours with --amp off (the same as `ours` where the processor has no bfloat16)
`chain` is the share that the augmentation chain takes of a step of `ours` on real draws. The roof
is what a large matrix product reaches in the same precision in the same run, over the 20.7 GFLOP
that a pair takes forward and backward.

kills: the real script is killed with SIGKILL at random moments, and continued, until it has
survived so many kills; its weights must then equal, bit for bit, those of a run nobody touched.
With one process and with two under torchrun.

curves: the loss of the network (--width) over 30 steps of the same views: float32; float32 from
weights rounded once to bfloat16, which is the smallest difference that bfloat16 can make; and
bfloat16 autocast. 23 minutes at --width 0.25.

gpu: a step of --batch-sizes (96) pairs of noise on a GPU, in bfloat16: by torch's layers; by these
under torch.compile; by the kernels; as one CUDA graph, as pretrain.py runs it; in turn. And the
chain alone on real draws, with its search as a kernel and without. Each part of the step by kernels
is set against its roof: a large matrix product, or a large copy, in the same run; the bytes of a
part are those it must read and write once.

whole: the script itself on real clips, reading, chain, step and log included, on the device it
chooses, in turn: as it is, with crops alone (what the chain costs), as two processes (on one GPU no
test of speed, but of its batch statistics and exchange), and in the other precisions. Rates are
medians of the log's lines, without its first third; no save falls among them.
"""

import argparse
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
from common import GFLOP_PER_PAIR, in_a_process

ROOT = common.ROOT


# ------------------------------ speed


def time_steps(variant, batch, steps):
    """In a process of its own: seconds of each step of one variant, and of the chain."""
    import model

    if variant != "released":
        model.tune_allocator()
    import torch

    import augment
    import pretrain

    torch.manual_seed(0)
    amp = "off" if variant in ("released", "float32") else model.choose_amp("cpu")
    if variant == "roof":
        return {"gflops": common.roof(steps + 1)}
    encoder = (
        common.released_network() if variant == "released" else model.build_encoder("samplecnn")
    )
    if variant == "recompute":
        encoder.recompute(3)
    learner = pretrain.CLMR(encoder, model.Projector())
    optimiser = torch.optim.Adam(
        learner.parameters(), lr=3e-4, **({} if variant == "released" else {"fused": True})
    )
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
    return {
        "seconds": times[1:],
        "chain": chains[1:],
        "loss": loss.item(),
        "amp": amp,
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def launcher(size):
    """How to start a script as so many processes."""
    if size == 1:
        return [sys.executable]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--standalone", f"--nproc_per_node={size}"),
    ]


def speed(args):
    rows, roofs = [], []
    for batch in args.batch_sizes:
        runs = {v: [] for v in args.variants}
        for _ in range(args.rounds):
            roofs.append(in_a_process(__file__, "time_steps", "roof", batch, args.steps)["gflops"])
            for variant in args.variants:
                runs[variant].append(
                    in_a_process(__file__, "time_steps", variant, batch, args.steps)
                )
        base = None
        for variant, found in runs.items():
            seconds = [s for r in found for s in r["seconds"]]
            rate = batch / statistics.median(seconds)
            row = {
                "batch": batch,
                "variant": variant,
                "n": len(seconds),
                "seconds": round(batch / rate, 3),
                "pairs_per_s": round(rate, 2),
                "min": round(min(seconds), 3),
                "max": round(max(seconds), 3),
                "amp": found[0]["amp"],
                "peak_gib": round(statistics.median(r["peak_gib"] for r in found), 2),
            }
            base = base or row["seconds"]
            row["speed_up"] = round(base / row["seconds"], 2)
            roof = statistics.median(
                r["bfloat16" if row["amp"] == "bf16" else "float32"] for r in roofs
            )
            row["share_of_roof"] = round(rate * GFLOP_PER_PAIR / roof, 3)
            if variant == "ours":
                row["chain_share"] = round(
                    statistics.median(s for r in found for s in r["chain"])
                    / statistics.median(seconds),
                    3,
                )
            rows.append(row)
            print(json.dumps(row), flush=True)
    roof = {k: round(statistics.median(r[k] for r in roofs)) for k in roofs[0]}
    table = [
        {
            "batch": r["batch"],
            "variant": r["variant"],
            "s / step": r["seconds"],
            "pairs / s": r["pairs_per_s"],
            "speed-up": r["speed_up"],
            "of the roof": f"{100 * r['share_of_roof']:.0f} %",
            "peak GiB": r["peak_gib"],
            "steps timed": r["n"],
        }
        for r in rows
    ]
    caption = f"Medians of a step on {common.where()}. {common.roof_in_words(roof)}"
    return {"roof_gflops": roof, "steps": rows, "caption": caption, "table": table}


# ------------------------------ kills


def kills(args):
    """Kill, continue, compare; 1 and 2 processes."""
    import torch

    rng, rows, details = random.Random(0), [], []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for size in (1, 2):
            flags = (
                "--width 0.0625 --batch-size 8 --save-every 1 --log-every 1 --device cpu".split()
            )
            flags += ["--data", args.data, "--max-steps", str(args.max_steps)]
            quiet = {
                "stdout": subprocess.DEVNULL,
                "stderr": subprocess.PIPE,
                "cwd": ROOT,
                "start_new_session": True,
            }
            start = [*launcher(size), "pretrain.py", *flags]
            command = lambda out: [*start, "--out", str(Path(folder) / out)]
            subprocess.run(command(f"whole{size}"), check=True, **quiet)
            out, moments, damaged = Path(folder) / f"killed{size}", [], 0
            checkpoint = out / "checkpoint.pt"
            while len(moments) < args.kills:
                before = checkpoint.stat().st_mtime if checkpoint.exists() else 0
                process = subprocess.Popen(command(out.name), **quiet)
                go_on = rng.random() < 0.8  # mostly wait for a step, else anywhere in the start
                while (
                    go_on
                    and process.poll() is None
                    and (not checkpoint.exists() or checkpoint.stat().st_mtime == before)
                ):
                    time.sleep(0.002)
                time.sleep(rng.random() * (args.spread if go_on else 5))
                if process.poll() is not None:
                    raise RuntimeError(
                        f"the run ended by itself ({process.returncode}): "
                        f"{process.stderr.read().decode()[-300:]}; give a larger --max-steps"
                    )
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if size == 2:  # torchrun's workers have sessions of their own
                    subprocess.run(["pkill", "-9", "-f", str(out)], check=False)
                    time.sleep(0.5)
                damaged += b"damaged" in process.stderr.read()
                moments.append(
                    len((out / "log.jsonl").read_text().splitlines())
                    if (out / "log.jsonl").exists()
                    else 0
                )
                print(
                    f"{size} process(es), kill {len(moments)}: log lines {moments[-1]}",
                    file=sys.stderr,
                )
            subprocess.run(command(out.name), check=True, **quiet)
            whole, killed = (
                torch.load(Path(folder) / f"{kind}{size}" / "checkpoint.pt", weights_only=True)
                for kind in ("whole", "killed")
            )
            same = (
                all(
                    torch.equal(whole["learner"][k], killed["learner"][k]) for k in whole["learner"]
                )
                and whole["step"] == killed["step"]
            )
            leftovers = [p.name for p in out.iterdir() if "partial" in p.name]
            details.append(
                {
                    "processes": size,
                    "kills": len(moments),
                    "damaged_checkpoints_met": damaged,
                    "bit_identical": same,
                    "steps": killed["step"],
                    "leftovers": leftovers,
                }
            )
            rows.append(
                {
                    "processes": size,
                    "kills": len(moments),
                    "steps": killed["step"],
                    "weights equal to the whole run's": "bit for bit" if same else "NO",
                }
            )
            print(json.dumps(details[-1]), flush=True)
    return {
        "runs": details,
        "caption": f"SIGKILL at random moments, most within {args.spread:g} s of a save, "
        "the others while it starts; a checkpoint after every step.",
        "table": rows,
    }


# ------------------------------ curves


def curve(variant, data, width, batch, steps):
    """In a process of its own: the losses of `steps` steps on real views."""
    import model
    import prepare

    model.tune_allocator()
    import torch

    import augment
    import pretrain

    clips = prepare.Clips(prepare.find(data), "train")
    torch.manual_seed(0)
    encoder = model.build_encoder("samplecnn", width=float(width))
    learner = pretrain.CLMR(encoder, model.Projector(encoder.out_dim))
    if variant == "rounded":
        with torch.no_grad():
            for p in learner.parameters():
                p.copy_(p.bfloat16().float())
    optimiser = torch.optim.Adam(learner.parameters(), lr=3e-4, fused=True)
    pairs = pretrain.Pairs(clips.length, clips.group, encoder.input_samples, batch, 0)
    chain = augment.Chain(clips.sample_rate)
    losses = []
    for step in range(steps):
        views = clips.crops(*(t.T.reshape(-1) for t in pairs.draw(step)), pairs.n)
        with torch.no_grad():
            views = chain(views, chain.draw(len(views), pairs.chance("values", step)))
        with model.autocast("cpu", "bf16" if variant == "bfloat16" else "off"):
            loss, _ = learner(views)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def curves(args):
    found = {
        v: in_a_process(
            __file__, "curve", v, args.data, args.width, args.batch_sizes[0], args.max_steps
        )
        for v in ("float32", "rounded", "bfloat16")
    }
    base, rows, away = found["float32"], [], {}
    spread = statistics.pstdev(b - a for a, b in zip(base, base[1:]))
    for variant, losses in found.items():
        away[variant] = [abs(a - b) for a, b in zip(losses, base)]
        rows.append(
            {
                "variant": variant,
                "first loss": f"{losses[0]:.4f}",
                "mean of the last ten": f"{statistics.mean(losses[-10:]):.4f}",
                "mean distance to float32": f"{statistics.mean(away[variant]):.4f}",
                "largest": f"{max(away[variant]):.4f}",
            }
        )
    return {
        "losses": {v: [round(x, 5) for x in losses] for v, losses in found.items()},
        "step_to_step": round(spread, 4),
        "table": rows,
        "caption": f"NT-Xent over {args.max_steps} steps of batch {args.batch_sizes[0]} on "
        f"{args.data}, width {args.width:g}, same views and start; from one step to "
        f"the next the float32 loss itself moves by {spread:.3f} (standard deviation).",
    }


# ------------------------------ gpu


def least_bytes(batch, channels, samples):
    """Bytes that each kernel of kernels/gpu.py must move in a step of so many views, bfloat16."""
    names = ("_stem", "_stem_sums", "_maxima", "_normalise", "_gradient_sums", "_spread")
    total = dict.fromkeys(names, 0)
    steps = samples // 3
    stem = 2 * batch * steps * channels[0]
    rows = 16 * batch * steps
    total["_stem"] = total["_stem_sums"] = stem + rows
    for i, c in enumerate(channels[1:]):
        pool = 3 if i < 9 else 1
        y = 2 * batch * steps * c
        top = y // pool
        total["_maxima"] += y + top
        total["_normalise"] += 2 * top
        total["_gradient_sums"] += 2 * top
        total["_spread"] += 2 * y + top
        steps //= pool
    return total


def gpu(args):
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    import augment
    import kernels
    import model
    import pretrain
    from kernels import splice
    from kernels.graph import captured_step

    device, batch, steps = model.choose_device("cuda"), args.batch_sizes[0], max(args.steps, 10)
    views, chain = torch.randn(2 * batch, 1, 59049, device=device) * 0.1, augment.Chain(22050)
    draws = chain.draw(2 * batch, torch.Generator().manual_seed(0))

    def milliseconds(function):
        """By the GPU's clock, and how long the host was busy with it; of one call."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        first.record()
        began = time.perf_counter()
        for _ in range(steps):
            function()
        host = (time.perf_counter() - began) / steps * 1e3
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / steps, host

    def step_of(layers=False, compiled=False, captured=False):
        torch.manual_seed(0)
        network = model.build_encoder("samplecnn")
        if layers:  # the same, but for what a Block does in training
            network = torch.nn.Sequential(
                torch.nn.Unflatten(1, (1, 1)),
                *(torch.nn.Sequential(*block) for block in network.blocks),
                torch.nn.Flatten(),
            )
        learner = pretrain.CLMR(network, model.Projector()).to(device).train()
        adam = torch.optim.Adam(learner.parameters(), lr=3e-4, fused=True, capturable=captured)
        parts = (
            torch.compile(learner) if compiled else learner,
            adam,
            torch.amp.GradScaler("cuda", enabled=False),
            lambda: model.autocast(device, "bf16"),
        )
        take = pretrain.plain_step(*parts)
        if captured:
            take = captured_step(take, *parts[:2], views)
        return lambda: take([views], 3e-4)

    def chain_in_steps():
        in_one = splice.in_one_kernel
        splice.in_one_kernel = lambda device: False
        chain(views, draws)
        splice.in_one_kernel = in_one

    if not kernels.gpu_passes():
        raise RuntimeError("kernels/gpu.py cannot be used here; see the warning above")
    variants = {
        "by torch's layers": step_of(layers=True),
        "by torch's layers under torch.compile": step_of(layers=True, compiled=True),
        "by kernels/gpu.py": step_of(),
        "by kernels/gpu.py, as one CUDA graph": step_of(captured=True),
        f"the chain on {2 * batch} views, its search in steps": chain_in_steps,
        f"the chain on {2 * batch} views": lambda: chain(views, draws),
    }
    large, times = torch.empty(2, 1 << 29, device=device), {name: [] for name in variants}
    a, b = torch.randn(2, 8192, 8192, device=device).bfloat16()
    roofs = {
        "copy_TB_per_s": lambda ms: 2 * large[0].nbytes / ms / 1e9,
        "matmul_TFLOP_per_s": lambda ms: 2 * 8192**3 / ms / 1e9,
    }
    found = {name: [] for name in roofs}
    for turn in range(args.rounds + 1):
        for name, function in variants.items():
            taken = milliseconds(function)
            times[name] += [taken] if turn else []  # the first turn warms up
        for (name, of), function in zip(
            roofs.items(), (lambda: large[0].copy_(large[1]), lambda: a @ b)
        ):
            taken = milliseconds(function)[0]
            found[name] += [of(taken)] if turn else []
    roofs = {name: round(statistics.median(values), 2) for name, values in found.items()}
    with profiler(activities=[ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            variants["by kernels/gpu.py"]()
        torch.cuda.synchronize()
    least, parts = least_bytes(2 * batch, model.SampleCNN.channels, 59049), {}
    for event in profile.key_averages():
        if event.self_device_time_total:
            convolution = any(word in event.key for word in ("xmma", "cudnn", "cutlass", "gemm"))
            part = (
                event.key
                if event.key in least
                else "convolutions" if convolution else "all the rest"
            )
            parts[part] = parts.get(part, 0) + event.self_device_time_total / 1000 / steps
    rows = []
    for name, taken in times.items():
        ms, host = (statistics.median(column) for column in zip(*taken))
        rows.append(
            {
                "what": name,
                "ms": round(ms, 2),
                "host ms": round(host, 2),
                "pairs / s": round(batch / ms * 1000),
                "n": len(taken) * steps,
                **({} if "chain" in name else {"TFLOP / s": round(batch * GFLOP_PER_PAIR / ms)}),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    under = []
    for part, ms in sorted(parts.items(), key=lambda item: -item[1]):
        rate = (
            {
                "of": f"{batch * GFLOP_PER_PAIR / ms:.0f} TFLOP/s",
                "share": batch * GFLOP_PER_PAIR / ms / roofs["matmul_TFLOP_per_s"],
            }
            if part == "convolutions"
            else (
                {
                    "of": f"{least[part] / ms / 1e9:.2f} TB/s",
                    "share": least[part] / ms / 1e9 / roofs["copy_TB_per_s"],
                }
                if part in least
                else {}
            )
        )
        under.append(
            {
                "part": part,
                "ms": round(ms, 3),
                "rate": rate.get("of", ""),
                "of its roof": f"{100 * rate['share']:.0f} %" if rate else "",
            }
        )
        print(json.dumps(under[-1]), flush=True)
    table = [
        {
            "what": r["what"],
            "ms": r["ms"],
            "ms of the host": r["host ms"],
            "pairs / s": f"{r['pairs / s']:,}",
            "TFLOP / s": r.get("TFLOP / s", ""),
        }
        for r in rows
    ]
    return {
        "roofs": roofs,
        "times": times,
        "rows": rows,
        "parts": under,
        "table": table,
        "caption": f"{batch} pairs, bfloat16, on one {torch.cuda.get_device_name()}; medians of "
        f"{args.rounds} turns of {steps}; by the GPU's clock, and how long the host was busy. "
        f"Roofs in the same run: {roofs['matmul_TFLOP_per_s']:.0f} TFLOP/s (matrix product), "
        f"{roofs['copy_TB_per_s']:.2f} TB/s (copy).",
    }


# ------------------------------ whole

# MagnaTagATune's training songs by artist, album, track and title: one pair of each an epoch.
MTAT_SONGS = 3_923


def whole(args):
    import torch

    import model
    from training.journal import read_log

    gpu, chosen = torch.cuda.is_available(), model.choose_amp(model.choose_device())
    cases = {
        "as it is": (1, []),
        "crops alone": (1, ["--transforms", "none"]),
        "two processes on it": (2, []),
        **{
            f"--amp {amp}": (1, ["--amp", amp])
            for amp in ("off", *(["fp16"] if gpu else []))
            if amp != chosen
        },
    }
    runs = {case: [] for case in cases}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for case, (size, flags) in [*cases.items()] * args.rounds:
            out, errors = Path(folder) / f"{case}-{len(runs[case])}", Path(folder) / "errors"
            command = [
                *launcher(size),
                "pretrain.py",
                "--data",
                args.data,
                "--width",
                str(args.width),
                "--batch-size",
                str(args.batch_sizes[0]),
                "--max-steps",
                str(args.max_steps),
                "--log-every",
                str(args.log_every),
                "--save-every",
                str(args.max_steps),
                "--out",
                str(out),
                *flags,
            ]
            with open(errors, "w") as file:
                process = subprocess.Popen(
                    command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file
                )
            process.wait()
            if process.returncode:
                raise RuntimeError(f"{case}: {errors.read_text().strip().splitlines()[-1]}")
            head, *log = read_log(out)
            steps = [line for line in log if "pairs" in line]
            runs[case].append(
                {
                    "rates": [line["pairs_per_s"] for line in steps[len(steps) // 3 :]],
                    "wait": statistics.median(line["wait"] for line in steps),
                    "loss": steps[-1]["loss"],
                    "peak_gib": log[-1]["peak_gib"],
                    "amp": head["config"]["amp"],
                    "device": head["device"],
                }
            )
            print(json.dumps({"case": case, **runs[case][-1]}), flush=True)
    where = torch.cuda.get_device_name() if gpu else f"{common.where()}"
    return {
        "runs": runs,
        "table": summary(runs),
        "caption": f"pretrain.py on {args.data}, {args.max_steps} steps of {args.batch_sizes[0]} "
        f"pairs, width {args.width:g}, on {where}; "
        f"{args.rounds} turn{'s' * (args.rounds > 1)}.",
    }


def summary(runs):
    rows = []
    for case, found in runs.items():
        rate = statistics.median(r for run in found for r in run["rates"])
        wait = statistics.median(run["wait"] for run in found)
        rows.append(
            {
                "run": case,
                "precision": found[0]["amp"],
                "pairs / s": f"{rate:,.0f}" if rate > 100 else round(rate, 1),
                "1,000 epochs of MTAT, hours": round(1000 * MTAT_SONGS / rate / 3600, 2),
                "waiting for views": f"{100 * wait:.1f} %",
                "peak GiB": found[0]["peak_gib"],
                "last loss": round(found[0]["loss"], 3),
            }
        )
    return rows


# ------------------------------ program


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench/pretrain.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="?", choices=["speed", "kills", "curves", "gpu", "whole"], default="speed"
    )
    parser.add_argument(
        "--batch-sizes",
        type=int,
        nargs="+",
        help="speed (default: 16 48); of curves (16), gpu and whole (96) the first",
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="speed, gpu, whole: turns of every variant"
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=3,
        help="speed: timed steps a process, after one that is not; gpu: of a turn, at least 10",
    )
    parser.add_argument(
        "--variants", nargs="+", default=["released", "ours", "recompute", "float32"], help="speed"
    )
    parser.add_argument("--data", default="demo", help="kills, curves, whole: prepared data")
    parser.add_argument(
        "--width", type=float, default=1.0, help="curves, whole: factor on all channels"
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        help="kills (default: 5 a kill), curves (default: 30), whole (default: 100)",
    )
    parser.add_argument(
        "--log-every", type=int, default=10, help="whole: steps that one rate is taken over"
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="kills of the run with one process, and of that with two",
    )
    parser.add_argument(
        "--spread", type=float, default=0.5, help="kills: seconds within which the kill comes"
    )
    parser.add_argument("--scratch", help="kills, whole: where the run folders are made")
    parser.add_argument("--out", type=Path, help="JSON")
    return parser


def worker(function, variant, *rest):
    """In a process of its own: one variant of `time_steps` or `curve`."""
    return globals()[function](variant, *(int(word) if word.isdigit() else word for word in rest))


def main(argv=None):
    args = build_parser().parse_args(argv)
    args.batch_sizes = args.batch_sizes or {"whole": [96], "gpu": [96]}.get(args.what, [16, 48])
    args.max_steps = args.max_steps or {"curves": 30, "whole": 100}.get(args.what, 5 * args.kills)
    import torch

    began = time.perf_counter()
    result = {
        "command": common.command_line(__file__, argv),
        "machine": common.machine(),
        "versions": {"torch": torch.__version__},
        **{"speed": speed, "kills": kills, "curves": curves, "gpu": gpu, "whole": whole}[args.what](
            args
        ),
    }
    result["minutes"] = round((time.perf_counter() - began) / 60, 1)
    result["caption"] += f" torch {torch.__version__}; `{result['command']}`"
    if args.out:
        common.write(result, args.out)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(*sys.argv[2:])))
        sys.exit(0)
    sys.exit(main())
