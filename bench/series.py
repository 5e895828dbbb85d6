r"""The project's own experiments on music, each a series of commands: pre-train, then probe.

    python bench/series.py curve --data moods --single moods-quadrants --steps 100 300 1000
    python bench/series.py domains --data moods --other game --both all --steps 1000
    python bench/series.py labels --data moods --ckpt runs/moods/encoder.pt
    python bench/series.py ablation --data moods --width 0.5 --steps 300
    python bench/series.py methods --data moods --width 0.5 --steps 300
    python bench/series.py encoders --data moods --other game free --width 0.25 --seconds 600
    python bench/series.py numbers --data moods --result results/full/moods-20000.json \
        --log results/full/moods-20000.jsonl --where "one H200"

curve: how far training carries. domains: Table 3's shape. labels: Figure 4. ablation: Table 2.
methods: CPC, losses, batch sizes. encoders: SampleCNN, CPC and melcnn at equal seconds of one core,
pre-trained on --data and on --other, with few labels and all. numbers: which to expect, the paper's
and ours.

All names of data are prepared folders. Every stage is skipped when it is there, so an interrupted
series continues with the same command. Rows of one series (but `curve`, where steps are what
varies) have equal budgets: pairs seen, or, for CPC against CLMR, seconds of pre-training. Each row
is probed by transfer.py (three seeds, 95 % intervals over test songs) beside the untrained encoder;
the cost of its pre-training, as its log says, stands beside its scores. JSON, logs and pictures go
into results/small/. `--dry-run` prints the commands.
"""

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import common
import torch

ROOT = common.ROOT
SEVEN = ("polarity", "noise", "gain", "filter", "delay", "pitch", "reverb")  # Table 2

# ------------------------------ runs and their logs


def call(args, script, *flags):
    """Run a script of this repository, or, with --dry-run, only say what would run."""
    command = [script, *map(str, flags)]
    print("python", shlex.join(command), file=sys.stderr, flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not args.dry_run:
        subprocess.run([sys.executable, str(ROOT / script), *command[1:]], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of processors


def read_json(path, default=None):
    """A JSON file, or the default where there is none."""
    if default is not None and not path.exists():
        return default
    return json.loads(path.read_text(encoding="utf-8"))


def log_of(path):
    """What a run's log says: pairs, pairs a second (median), hours at that speed, peak memory."""
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rates = sorted(r["pairs_per_s"] for r in records if "pairs_per_s" in r)
    rate = rates[len(rates) // 2]
    first = records[0]
    last = [r for r in records if "pairs" in r][-1]
    # A run that was stopped has no last line; one that was continued counts its last part alone.
    end = next((r for r in reversed(records) if r.get("done")), {})
    whole = not first["continued_from"] and sum("command" in r for r in records) == 1
    return {
        "pairs": last["pairs"],
        "steps": last["step"],
        "pairs_per_s": rate,
        "hours": round(last["pairs"] / rate / 3600, 2),
        "peak_gib": end.get("peak_gib"),
        "seconds": end.get("seconds") if whole else None,
        "amp": first["config"]["amp"],
        "threads": first["threads"],
        "code": first["code"],
    }


def pretrain(args, label, flags, steps=None, data=None):
    """One run of a series -> its encoder.pt."""
    out = args.runs / args.what / label
    budget = ["--data", data or args.data, "--max-steps", steps or args.steps[-1]]
    network = ["--width", args.width, "--lr", args.lr, "--seed", args.seed]
    call(args, "pretrain.py", *budget, *network, "--save-every", 50, "--out", out, *flags)
    return out / "encoder.pt"


# ------------------------------ the series


def batch(args):
    return ["--batch-size", args.batch_size]


def curve(args):
    """One run, its encoder kept after each of --steps."""

    def fits(path, steps):
        info = torch.load(path, weights_only=True) if path.exists() else {}
        log = args.runs / "curve" / "run" / "log.jsonl"
        if log.exists():
            first = log.read_text(encoding="utf-8").splitlines()[0]
            info["lr"] = json.loads(first)["config"]["lr"]
        wanted = {
            "step": steps,
            "data": args.data,
            "sizes": {"width": args.width},
            "batch_size": args.batch_size,
            "seed": args.seed,
            "lr": args.lr,
        }
        return all(info.get(key) == value for key, value in wanted.items())

    found = {}
    for steps in sorted(args.steps):
        copy = args.runs / "curve" / f"{steps}.pt"
        found[f"{steps} steps"] = copy
        if fits(copy, steps):
            continue
        encoder = pretrain(args, "run", batch(args), steps)
        if args.dry_run:
            continue
        if not fits(encoder, steps):
            sys.exit(
                f"{encoder} is further on than step {steps}, or of other data: "
                "give another folder with --runs"
            )
        shutil.copy(encoder, copy)
    return found


def domains(args):
    return {
        data: pretrain(args, data, batch(args), data=data)
        for data in (args.data, *(args.other or ()), args.both)
        if data
    }


def ablation(args):
    """Crops alone; with one transform at probability 1 on one of the views; the whole chain."""
    rows = {"crop only": ["--transforms", "none"]}
    for name in SEVEN:
        only = ["--transforms", name, "--probability", f"{name}=1", "--asymmetric"]
        rows[f"crop, {name}"] = only
    rows["the whole chain"] = []
    return {
        label: pretrain(args, label.replace(", ", "-").replace(" ", "-"), batch(args) + flags)
        for label, flags in rows.items()
    }


def methods(args):
    """NT-Xent and the decoupled loss at three batch sizes and equal pairs; CPC at equal seconds.

    The seconds are those that CLMR takes at batch 96.
    """
    found = {}
    pairs = args.steps[-1] * args.batch_size
    for size in (48, 96, 192):
        for loss in ("nt-xent", "dcl"):
            flags = ["--batch-size", size, "--loss", loss]
            found[f"{loss}, batch {size}"] = pretrain(args, f"{loss}-{size}", flags, pairs // size)
    if args.dry_run:
        return found
    folder = args.runs / "methods"
    cpc = ["--method", "cpc", "--log-every", 5]
    # Twenty steps tell CPC's speed; then the same run goes on for as long as CLMR's.
    pretrain(args, "cpc", cpc, 20)
    seconds = 3600 * log_of(folder / "nt-xent-96" / "log.jsonl")["hours"]
    steps = round(seconds * log_of(folder / "cpc" / "log.jsonl")["pairs_per_s"] / 64)
    found["CPC, equal seconds"] = pretrain(args, "cpc", cpc, max(20, steps))
    return found


def encoders(args):
    """Each encoder for --seconds of one core, on each music; its speed is measured beforehand.

    Returns {(encoder, music): its encoder.pt}.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    few = ["--lr", "1e-3", "--schedule", "cosine"]
    ways = {
        f"SampleCNN, width {args.width:g}": ["--width", args.width, "--temperature", "0.2", *few],
        f"CPC, width {args.width:g}": ["--method", "cpc", "--width", args.width, *few],
        "melcnn": ["--encoder", "melcnn", "--temperature", "0.2", *few],
    }
    found = {}
    for name, flags in ways.items():
        folder = args.runs / "encoders" / name.replace(", ", "-").replace(" ", "-")
        cost = {}
        for steps in (2, 12):
            out = folder.with_name(f"{folder.name}-{steps}-steps")
            shutil.rmtree(out, ignore_errors=True)
            budget = ["--data", *args.other, "--max-steps", steps, "--save-every", 100]
            cost[steps] = call(args, "pretrain.py", *budget, *flags, "--out", out)
        steps = 1 if args.dry_run else round(args.seconds / (cost[12] - cost[2]) * 10)
        for music in ([args.data], args.other):
            out = folder.with_name(f"{folder.name}-on-{'-'.join(music)}")
            flags_of = ["--warmup", min(200, steps // 10), "--log-every", 20, "--out", out]
            there = out / "encoder.pt"
            if not there.exists() or not is_done(out, steps):
                budget = ["--data", *music, "--max-steps", steps, "--save-every", 100]
                spent = call(args, "pretrain.py", *budget, *flags, *flags_of)
                if not args.dry_run:
                    (out / "seconds").write_text(f"{spent:.0f}")
            found[name, " and ".join(music)] = there
    return found


def is_done(run, steps):
    """Has a run's log come to its last step, of so many or nearly (speeds vary)?"""
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    return last.get("done") and abs(last["step"] - steps) < 0.2 * steps


def few_labels(args, encoders):
    """evaluate.py on --data of each encoder by logistic regression; a row each, and the control."""
    out = args.out or Path("results/small/encoders.json")
    rows = {}
    results = {}
    for (name, music), path in encoders.items():
        scores = args.runs / "encoders" / f"{path.parent.name}.json"
        flags = ["--probe", "logistic", "--random", "--seeds", args.seeds, "--amp", args.amp]
        files = ["--export", path.parent, "--out", scores]
        fractions = ["--fraction", "0.01", "0.1", "1"]
        if not scores.exists() or scores.stat().st_mtime < path.stat().st_mtime:
            call(args, "evaluate.py", "--ckpt", path, "--data", args.data, *fractions, *flags,
                 *files)
        if args.dry_run:
            continue
        cost = log_of(path.parent / "log.jsonl")
        found = read_json(scores)["results"]
        kept = ("model", "fraction", "mean", "std", "interval")
        parts = [{key: r[key] for key in kept} for r in found]
        results[f"{name} on {music}"] = {"results": parts, "cost": cost}
        for r in found:
            trained = r["model"] != "untrained"
            where = music if trained else "nothing"
            head = {"encoder": name, "trained on": where}
            if trained:
                spent = (path.parent / "seconds").read_text()
                head |= {"core s": spent, "steps": f"{cost['steps']:,}"}
                head["pairs"] = f"{cost['pairs']:,}"
            row = rows.setdefault((name, where), head)
            row |= {f"{100 * r['fraction']:g} %: ROC / PR": " / ".join(
                f"{100 * r['mean'][metric]:.1f}" for metric in ("roc_auc", "pr_auc"))}
    if args.dry_run:
        return
    command = common.command_line(__file__)
    caption = (
        f"Percent on the test clips of {args.data}, by the share of its labels that the probe saw "
        f"(logistic regression on clip means, means of {args.seeds} draws of the labels). Each "
        f"encoder was trained for about {args.seconds:g} s of a core, chain included, one seed; in "
        f"domain: on the training clips of {args.data}. {common.where()}; `{command}`"
    )
    result = {"caption": caption, "table": list(rows.values()), "command": command,
              "machine": common.machine(), "evaluations": results}
    common.write(result, out)


# ------------------------------ their scores


def keep_logs(args, encoders, out):
    """The logs of a series' runs in one file beside its JSON, each line with its run's name.

    Returns {label: what the run took}.
    """
    logs = {label: path.parent / "log.jsonl" for label, path in encoders.items()}
    if args.what == "curve":
        # All its encoders are of one run.
        logs = {list(encoders)[-1]: args.runs / "curve" / "run" / "log.jsonl"}
    with open(out.with_suffix(".jsonl"), "w") as file:
        for label, path in logs.items():
            for record in map(json.loads, path.read_text().splitlines()):
                if "command" in record:
                    record["command"][0] = Path(record["command"][0]).name
                file.write(json.dumps({"run": label, **record}) + "\n")
    return {label: log_of(path) for label, path in logs.items()}


def probe(args, encoders):
    """transfer.py over all encoders of a series; their costs beside their scores."""
    out = args.out or Path("results/small", f"{args.what}.json")
    sources = [f"{label}={path}" for label, path in encoders.items()]
    targets = [args.data, args.single] if args.single else [args.data]
    flags = ["--hidden", 0, 512] if args.what == "domains" else []
    flags += ["--random", "--seeds", args.seeds, "--amp", args.amp, "--out", out]
    call(args, "transfer.py", "--ckpt", *sources, "--data", *targets, *flags)
    if args.dry_run:
        return
    result = read_json(out)
    costs = keep_logs(args, encoders, out)
    for row in result["table"]:
        cost = costs.get(row["trained on"])
        if cost and args.what != "curve":
            row |= {"steps": cost["steps"], "pairs/s": cost["pairs_per_s"]}
            row |= {"hours": cost["hours"], "peak GiB": cost["peak_gib"]}
    command = common.command_line(__file__)
    result |= {"series": args.what, "command": command, "costs": costs}
    result["machine"] = common.machine()
    network = f"Width {args.width:g}, batch {args.batch_size}"
    result["caption"] += f" {network}, {common.where()}; `{command}`"
    common.write(result, out)
    if args.what == "curve":
        draw(args, result, out.with_suffix(".png"))


def draw(args, result, path):
    """Scores over steps, with their intervals; the untrained encoder is step 0."""
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(c["target"] for c in result["cells"]))
    figure = Figure((5 * len(targets), 3.6), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets):
        cells = {
            0 if c["source"] == "untrained" else int(c["source"].split()[0]): c
            for c in result["cells"]
            if c["target"] == target
        }
        steps = sorted(cells)
        for metric, name in list(result["targets"][target]["metrics"].items())[:2]:
            mean = [100 * cells[s]["mean"][metric] for s in steps]
            low, high = zip(*(cells[s]["interval"][metric] for s in steps))
            axes.plot(steps, mean, "o-", label=name)
            axes.fill_between(steps, [100 * x for x in low], [100 * x for x in high], alpha=0.15)
        axes.set(xlabel=f"steps of {args.batch_size} pairs", ylabel="percent", title=target)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def label_jobs(args):
    """(file, fractions, seeds, flags) of each evaluation that `labels` is made of."""
    for probe_name in ("adam", "lbfgs"):
        flags = ["--random", "--probe", probe_name]
        yield f"{probe_name}.json", args.fraction, args.seeds, flags
    if args.supervised:
        # A network trained end to end takes minutes to hours, a probe seconds.
        for fraction in args.supervised_fraction or args.fraction:
            flags = ["--supervised", "--lr", args.lr]
            yield f"supervised-{fraction}.json", [fraction], args.supervised, flags


def is_finished(args, path, fractions, seeds, flags):
    """Whether an evaluation of this very encoder, data and protocol lies there."""
    result = read_json(path, {"protocol": {}, "encoder": {}})
    found = {**result["protocol"], "step": result["encoder"].get("step")}
    wanted = {
        "ckpt": str(args.ckpt),
        "data": [args.data],
        "fraction": [float(fraction) for fraction in fractions],
        "seeds": seeds,
        "amp": args.amp,
        "step": torch.load(args.ckpt, weights_only=True)["step"] if args.ckpt.exists() else None,
    }
    if "--lr" in flags:
        wanted["lr"] = args.lr
    return all(found.get(key) == value for key, value in wanted.items())


def labels(args):
    """The label fractions of Figure 4 for CLMR and the untrained control, and for the supervised.

    By the probe of the paper and by logistic regression to its optimum (which no early stopping can
    disturb); the picture beside the JSON.
    """
    out = args.out or Path("results/small/labels.json")
    folder = args.runs / "labels"
    rows = {}
    result = {}
    for name, fractions, seeds, flags in label_jobs(args):
        path = folder / name
        if not is_finished(args, path, fractions, seeds, flags):
            flags = [*flags, "--fraction", *fractions, "--seeds", seeds, "--amp", args.amp]
            files = ["--out", path, "--export", folder]
            call(args, "evaluate.py", "--ckpt", args.ckpt, "--data", args.data, *flags, *files)
        if args.dry_run:
            continue
        part = read_json(path)
        result = {**part, **result}
        for row in part["results"]:
            # A checkpoint is probed along with the supervised network: the first counts.
            rows.setdefault((row["model"], row["probe"], row["fraction"]), row)
    if args.dry_run:
        return
    result["results"] = list(rows.values())
    result["table"] = fractions_table(result["results"])
    result["command"] = common.command_line(__file__)
    result["caption"] = (
        "Share (and number) of the training clips' labels; in percent, mean ± standard deviation "
        "over seeds; 95 % intervals over test songs are in the picture and the file. "
        f"`{result['command']}`"
    )
    common.write(result, out)
    call(args, "transfer.py", "--results", out, "--plots", folder)
    shutil.copy(folder / out.stem / "fractions.png", out.with_suffix(".png"))


def fractions_table(results):
    """One row a score, model and probe; one column a share of the labels."""
    rows = {}
    for metric, name in (("pr_auc", "PR-AUC"), ("roc_auc", "ROC-AUC")):
        for r in results:
            head = {"score": name, "model": r["model"], "probe": r["probe"]}
            head["seeds"] = len(r["runs"])
            row = rows.setdefault((metric, r["model"], r["probe"]), head)
            column = f"{100 * r['fraction']:g} % ({r['runs'][0]['clips']})"
            row[column] = f"{100 * r['mean'][metric]:.1f}"
            if r["std"][metric] is not None:
                row[column] += f" ± {100 * r['std'][metric]:.1f}"
    return list(rows.values())


# ------------------------------ the paper's numbers

PAPER = [
    ("CLMR, 10,000 epochs", "pretrain.py --data mtat", "88.7 / 35.6; hidden layer 89.3 / 36.0"),
    ("CLMR, 1,000 epochs", "pretrain.py --data mtat --epochs 1000", "- / 34.4"),
    (
        "CLMR, 1 % of the labels (Figure 4, where all labels give 35.1), by the released code's "
        "rule, which keeps 36 % of the clips",
        "evaluate.py --ckpt runs/mtat/encoder.pt --fraction 0.01 --fraction-mode v1",
        "- / 33.1",
    ),
    ("CPC", "pretrain.py --data mtat --method cpc", "86.6 / 31.0; hidden layer 88.0 / 33.0"),
    ("supervised SampleCNN", "evaluate.py --data mtat --supervised", "88.6 / 34.4"),
    ("untrained SampleCNN", "evaluate.py --data mtat --random", "- / 15.4"),
]


def numbers(args):
    """What the paper reports, and what was measured here, from the other results."""
    table = [
        {
            "data": "MagnaTagATune, all clips",
            "what": what,
            "type": f"`{command}`",
            "the paper": value,
            "here": "not run",
        }
        for what, command, value in PAPER
    ]
    result = read_json(args.result)
    cost = log_of(args.log)
    seconds = cost["seconds"] or cost["pairs"] / cost["pairs_per_s"]
    training = f"{seconds / 60:.0f} min on {args.where} ({cost['amp']})"
    protocol = result["protocol"]
    command = f"evaluate.py --ckpt {protocol['ckpt']} --random --fraction 0.1 1"
    for r in result["results"]:
        if r["fraction"] not in (0.1, 1.0):
            continue
        values = []
        for metric in ("roc_auc", "pr_auc"):
            low, high = r["interval"][metric]
            values.append(f"{100 * r['mean'][metric]:.1f} ± {100 * (high - low) / 2:.1f}")
        table.append(
            {
                "data": args.data,
                "what": f"{r['model']}, {100 * r['fraction']:g} % of the labels",
                "type": f"`{command} --amp {protocol['amp']}`",
                "the paper": "-",
                "here": " / ".join(values),
                "cost": "minutes" if r["model"] == "untrained" else training,
            }
        )
    caption = (
        "ROC-AUC / PR-AUC in percent. ± is half of the 95 % interval over test songs; another test "
        "set of this size may differ by 1.4 times as much."
    )
    out = args.out or Path("results/full/numbers.json")
    common.write({"caption": caption, "table": table}, out)


# ------------------------------ program


def build_parser():
    parser = argparse.ArgumentParser(
        prog="bench/series.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        choices=["curve", "domains", "labels", "ablation", "methods", "encoders", "numbers"],
    )
    parser.add_argument("--data", required=True, help="tagged data: pre-trained on and probed on")
    parser.add_argument("--single", help="curve ...: single-label data to probe as well")
    parser.add_argument("--other", nargs="+", help="domains, encoders: other music to train on")
    parser.add_argument("--seconds", type=float, default=600, help="encoders: of a core, for each")
    parser.add_argument("--both", help="domains: both together")
    parser.add_argument("--ckpt", type=Path, help="labels: the encoder")
    parser.add_argument("--log", type=Path, help="numbers: of the encoder's training")
    parser.add_argument("--result", type=Path, help="numbers: of its evaluation")
    parser.add_argument("--where", default="two cores", help="numbers: what training ran on")
    parser.add_argument(
        "--supervised",
        type=int,
        default=0,
        metavar="SEEDS",
        help="labels: also so many networks trained end to end (hours on a CPU)",
    )
    parser.add_argument(
        "--supervised-fraction", nargs="+", help="labels: of these (default: of --fraction)"
    )
    parser.add_argument(
        "--fraction",
        nargs="+",
        default=["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"],
        help="labels",
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs="+",
        default=[100, 300, 1000],
        help="curve: each of them; else the last",
    )
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument(
        "--lr", type=float, default=3e-4, help="of pre-training, and of networks trained end to end"
    )
    parser.add_argument("--seed", type=int, default=0, help="of pre-training")
    parser.add_argument("--seeds", type=int, default=3, help="of the probe")
    parser.add_argument("--amp", default="auto", help="precision of the frozen encoder")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/series"), help="where the runs are kept"
    )
    parser.add_argument("--out", type=Path, help="JSON (default: results/small/WHAT.json)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    return parser


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.what == "numbers" and not (args.log and args.result):
        parser.error("numbers needs --result FILE and --log FILE")
    if args.what == "labels" and not args.ckpt:
        parser.error("labels needs --ckpt FILE")
    try:
        if args.what in ("labels", "numbers"):
            globals()[args.what](args)
        elif args.what == "encoders":
            few_labels(args, encoders(args))
        else:
            probe(args, globals()[args.what](args))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
