"""The project's own experiments on music, each a series of the scripts' commands: pre-train, then probe; JSON into results/.

    python bench/series.py curve --data moods --single moods-quadrants --steps 100 300 1000      # the learning curve
    python bench/series.py domains --data moods --other game --both all --steps 1000             # Table 3's shape
    python bench/series.py labels --data moods --ckpt runs/moods/encoder.pt                      # Figure 4
    python bench/series.py ablation --data moods --width 0.5 --steps 300                         # Table 2
    python bench/series.py methods --data moods --width 0.5 --steps 300                          # CPC, losses, batch sizes
    python bench/series.py numbers --data moods --log results/moods-gpu.jsonl --where "one H200"     # which numbers to expect: the paper's, and ours

All names of data are prepared folders. Every stage is skipped when it is there, so an interrupted series continues with the same
command. Rows of one series (but `curve`, where steps are what varies) have equal budgets: pairs seen, or, for CPC against CLMR, seconds of pre-training. Each row is probed
by transfer.py (three seeds, 95 % intervals over test songs) beside the untrained encoder; the cost of its pre-training, as its log
says, stands beside its scores. `--dry-run` prints the commands.
"""
import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SEVEN = ("polarity", "noise", "gain", "filter", "delay", "pitch", "reverb")  # Table 2


def call(args, script, *flags):
    command = [script, *(str(f) for f in flags)]
    print("python", shlex.join(command), file=sys.stderr, flush=True)
    if not args.dry_run:
        subprocess.run([sys.executable, str(ROOT / script), *command[1:]], check=True)
    return shlex.join(["python", *command])


def log_of(path):
    """What the log of a finished run says: pairs, pairs a second (median), hours at that speed, peak memory."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    rates = sorted(r["pairs_per_s"] for r in records if "pairs_per_s" in r)
    last, first = [r for r in records if "pairs" in r][-1], records[0]
    end = next((r for r in reversed(records) if r.get("done")), {})  # a run that was stopped has none
    seconds = end.get("seconds") if not first["continued_from"] and sum("command" in r for r in records) == 1 else None  # or only of the last part
    return {"pairs": last["pairs"], "steps": last["step"], "pairs_per_s": rates[len(rates) // 2],
            "hours": round(last["pairs"] / rates[len(rates) // 2] / 3600, 2), "peak_gib": end.get("peak_gib"), "seconds": seconds, "amp": first["config"]["amp"], "threads": first["threads"], "code": first["code"]}


def pretrain(args, label, flags, steps=None, data=None):
    """One run of a series -> its encoder.pt."""
    out = args.runs / args.what / label
    call(args, "pretrain.py", "--data", data or args.data, "--max-steps", steps or args.steps[-1], "--width", args.width,
         "--lr", args.lr, "--save-every", 50, "--seed", args.seed, "--out", out, *flags)
    return out / "encoder.pt"


def batch(args):
    return ["--batch-size", args.batch_size]


def curve(args):
    """One run, its encoder kept after each of --steps."""
    def fits(path, steps):
        info, log = torch.load(path, weights_only=True) if path.exists() else {}, args.runs / "curve/run/log.jsonl"
        info["lr"] = json.loads(log.read_text().splitlines()[0])["config"]["lr"] if log.exists() else None
        wanted = {"step": steps, "data": args.data, "sizes": {"width": args.width}, "batch_size": args.batch_size, "seed": args.seed, "lr": args.lr}
        return all(info.get(key) == value for key, value in wanted.items())

    found = {}
    for steps in sorted(args.steps):
        kept = args.runs / "curve" / f"{steps}.pt"
        if not fits(kept, steps):
            encoder = pretrain(args, "run", batch(args), steps)
            if not args.dry_run:
                if not fits(encoder, steps):
                    sys.exit(f"{encoder} is further on than step {steps}, or of other data: give another folder with --runs")
                shutil.copy(encoder, kept)
        found[f"{steps} steps"] = kept
    return found


def domains(args):
    return {data: pretrain(args, data, batch(args), data=data) for data in (args.data, args.other, args.both) if data}


def ablation(args):
    rows = {"crop only": ["--transforms", "none"]}
    rows |= {f"crop, {t}": ["--transforms", t, "--probability", f"{t}=1", "--asymmetric"] for t in SEVEN}
    return {label: pretrain(args, label.replace(", ", "-").replace(" ", "-"), [*batch(args), *flags]) for label, flags in {**rows, "the whole chain": []}.items()}


def methods(args):
    """NT-Xent and the decoupled loss at three batch sizes and equal pairs; CPC for as many seconds as CLMR at batch 96 takes."""
    found, pairs = {}, args.steps[-1] * args.batch_size
    for size in (48, 96, 192):
        for loss in ("nt-xent", "dcl"):
            found[f"{loss}, batch {size}"] = pretrain(args, f"{loss}-{size}", ["--batch-size", size, "--loss", loss], pairs // size)
    if args.dry_run:
        return found
    seconds = 3600 * log_of(args.runs / "methods/nt-xent-96/log.jsonl")["hours"]
    pretrain(args, "cpc", ["--method", "cpc", "--log-every", 5], 20)
    steps = round(seconds * log_of(args.runs / "methods/cpc/log.jsonl")["pairs_per_s"] / 64)
    return {**found, "CPC, equal seconds": pretrain(args, "cpc", ["--method", "cpc", "--log-every", 5], max(20, steps))}


def keep_logs(args, encoders, out):
    """The logs of a series' runs in one file beside its JSON, each line with its run's name -> what each run took."""
    logs = {label: path.parent / "log.jsonl" for label, path in encoders.items()}
    if args.what == "curve":  # the encoders of one run
        logs = {list(encoders)[-1]: args.runs / "curve/run/log.jsonl"}
    with open(out.with_suffix(".jsonl"), "w") as file:
        for label, path in logs.items():
            for record in map(json.loads, path.read_text().splitlines()):
                if "command" in record:
                    record["command"][0] = Path(record["command"][0]).name
                file.write(json.dumps({"run": label, **record}) + "\n")
    return {label: log_of(path) for label, path in logs.items()}


def probe(args, encoders):
    """transfer.py over all encoders of a series; their costs beside their scores."""
    out = args.out or Path("results", f"{args.what}.json")
    targets = [args.data, *([args.single] if args.single else [])]
    hidden = ["--hidden", 0, 512] if args.what == "domains" else []
    call(args, "transfer.py", "--ckpt", *(f"{label}={path}" for label, path in encoders.items()), "--data", *targets, "--random", *hidden,
         "--seeds", args.seeds, "--amp", args.amp, "--out", out)
    if args.dry_run:
        return
    result = json.loads(out.read_text())
    costs = keep_logs(args, encoders, out)
    for row in result["table"]:
        cost = costs.get(row["trained on"])
        if cost and args.what != "curve":
            row |= {"steps": cost["steps"], "pairs/s": cost["pairs_per_s"], "hours": cost["hours"], "peak GiB": cost["peak_gib"]}
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.processor())
    result |= {"series": args.what, "command": shlex.join(["python", "bench/series.py", *sys.argv[1:]]), "costs": costs,
               "machine": {"cpu": cpu, "cores": os.cpu_count()}}
    result["caption"] += f" Width {args.width:g}, batch {args.batch_size}, {cpu}, {os.cpu_count()} cores; `{result['command']}`"
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if args.what == "curve":
        draw(args, result, out.with_suffix(".png"))


def draw(args, result, path):
    """Scores over steps, with their intervals; the untrained encoder is step 0."""
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(c["target"] for c in result["cells"]))
    figure = Figure((5 * len(targets), 3.6), layout="constrained")
    for axes, target in zip(figure.subplots(1, len(targets), squeeze=False)[0], targets):
        cells = {0 if c["source"] == "untrained" else int(c["source"].split()[0]): c for c in result["cells"] if c["target"] == target}
        steps = sorted(cells)
        for metric, name in list(result["targets"][target]["metrics"].items())[:2]:
            axes.plot(steps, [100 * cells[s]["mean"][metric] for s in steps], "o-", label=name)
            axes.fill_between(steps, *[[100 * cells[s]["interval"][metric][i] for s in steps] for i in (0, 1)], alpha=0.15)
        axes.set(xlabel=f"steps of {args.batch_size} pairs", ylabel="percent", title=target)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def labels(args):
    """The label fractions of Figure 4 for CLMR and the untrained control, by the probe of the paper and by logistic regression to
    its optimum (which no early stopping can disturb), and for the supervised network; the picture beside the JSON."""
    out, folder, result = args.out or Path("results/labels.json"), args.runs / "labels", {"results": []}
    jobs = [(f"{probe}.json", args.fraction, args.seeds, ["--random", "--probe", probe]) for probe in ("adam", "lbfgs")]
    if args.supervised:  # a network trained end to end takes minutes to hours, a probe seconds
        jobs += [(f"supervised-{f}.json", [f], args.supervised, ["--supervised", "--lr", args.lr]) for f in args.supervised_fraction or args.fraction]
    for name, fractions, seeds, flags in jobs:
        there = json.loads((folder / name).read_text()) if (folder / name).exists() else {"protocol": {}, "encoder": {}}
        there = {**there["protocol"], "step": there["encoder"].get("step")}
        wanted = {"ckpt": str(args.ckpt), "data": args.data, "fraction": list(map(float, fractions)), "seeds": seeds, "amp": args.amp,
                  "step": torch.load(args.ckpt, weights_only=True)["step"] if args.ckpt.exists() else None}
        wanted |= {"lr": args.lr} if "--lr" in flags else {}
        if any(there.get(key) != value for key, value in wanted.items()):
            call(args, "evaluate.py", "--ckpt", args.ckpt, "--data", args.data, *flags, "--fraction", *fractions, "--seeds", seeds, "--amp", args.amp,
                 "--out", folder / name, "--export", folder)
        if not args.dry_run:
            part = json.loads((folder / name).read_text())
            known = {(r["model"], r["probe"], r["fraction"]) for r in result["results"]}  # a checkpoint is probed along with the supervised network
            result = {**part, **result, "results": result["results"] + [r for r in part["results"] if (r["model"], r["probe"], r["fraction"]) not in known]}
    if args.dry_run:
        return
    rows = {}
    for metric, name in (("pr_auc", "PR-AUC"), ("roc_auc", "ROC-AUC")):
        for r in result["results"]:
            row = rows.setdefault((metric, r["model"], r["probe"]), {"score": name, "model": r["model"], "probe": r["probe"], "seeds": len(r["runs"])})
            spread = "" if r["std"][metric] is None else f" ± {100 * r['std'][metric]:.1f}"
            row[f"{100 * r['fraction']:g} % ({r['runs'][0]['clips']})"] = f"{100 * r['mean'][metric]:.1f}{spread}"
    result |= {"table": list(rows.values()), "command": shlex.join(["python", "bench/series.py", *sys.argv[1:]])}
    result["caption"] = (f"Share (and number) of the training clips' labels; in percent, mean ± standard deviation over seeds; 95 % intervals over "
                         f"test songs are in the picture and the file. `{result['command']}`")
    out.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    call(args, "transfer.py", "--results", out, "--plots", folder)
    shutil.copy(folder / out.stem / "fractions.png", out.with_suffix(".png"))


def numbers(args):
    """results/numbers.json: what the paper reports, and what was measured here, from the other results."""
    paper = [("CLMR, 10,000 epochs", "pretrain.py --data mtat", "88.7 / 35.6; hidden layer 89.3 / 36.0"),
             ("CLMR, 1,000 epochs", "pretrain.py --data mtat --epochs 1000", "- / 34.4"),
             ("CLMR, 1 % of the labels (Figure 4, where all labels give 35.1), by the released code's rule, which keeps 36 % of the clips",
              "evaluate.py --ckpt runs/mtat/encoder.pt --fraction 0.01 --fraction-mode v1", "- / 33.1"),
             ("CPC", "pretrain.py --data mtat --method cpc", "86.6 / 31.0; hidden layer 88.0 / 33.0"),
             ("supervised SampleCNN", "evaluate.py --data mtat --supervised", "88.6 / 34.4"),
             ("untrained SampleCNN", "evaluate.py --data mtat --random", "- / 15.4")]
    table = [{"data": "MagnaTagATune, all clips", "what": what, "type": f"`{command}`", "the paper": value, "here": "not run"}
             for what, command, value in paper]
    result, cost = json.loads(Path("results", f"{args.data}.json").read_text()), log_of(args.log)
    for r in result["results"]:
        if r["fraction"] in (0.1, 1.0):
            values = (f"{100 * r['mean'][m]:.1f} ± {100 * (r['interval'][m][1] - r['interval'][m][0]) / 2:.1f}" for m in ("roc_auc", "pr_auc"))
            table.append({"data": args.data, "what": f"{r['model']}, {100 * r['fraction']:g} % of the labels", "the paper": "-", "here": " / ".join(values),
                          "type": f"`evaluate.py --ckpt {result['protocol']['ckpt']} --random --fraction 0.1 1 --amp {result['protocol']['amp']}`",
                          "cost": "minutes" if r["model"] == "untrained" else f"{(cost['seconds'] or cost['pairs'] / cost['pairs_per_s']) / 60:.0f} min on {args.where} ({cost['amp']})"})
    note = "ROC-AUC / PR-AUC in percent. ± is half of the 95 % interval over test songs; another test set of this size may differ by 1.4 times as much."
    out = args.out or Path("results/numbers.json")
    out.write_text(json.dumps({"caption": note, "table": table}, indent=1, ensure_ascii=False) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", choices=["curve", "domains", "labels", "ablation", "methods", "numbers"])
    parser.add_argument("--data", required=True, help="tagged data: pre-trained on and probed on")
    parser.add_argument("--single", help="curve ...: single-label data to probe as well")
    parser.add_argument("--other", help="domains: other music to pre-train on")
    parser.add_argument("--both", help="domains: both together, prepared as one")
    parser.add_argument("--ckpt", type=Path, help="labels: the encoder")
    parser.add_argument("--log", type=Path, help="numbers: of the encoder's training")
    parser.add_argument("--where", default="two cores", help="numbers: what that ran on")
    parser.add_argument("--supervised", type=int, default=0, metavar="SEEDS", help="labels: also so many networks trained end to end (hours on a CPU)")
    parser.add_argument("--supervised-fraction", nargs="+", help="labels: of these (default: of --fraction)")
    parser.add_argument("--fraction", nargs="+", default=["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"], help="labels")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 300, 1000], help="curve: each of them; else the last")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--lr", type=float, default=3e-4, help="of pre-training, and of networks trained end to end")
    parser.add_argument("--seed", type=int, default=0, help="of pre-training")
    parser.add_argument("--seeds", type=int, default=3, help="of the probe")
    parser.add_argument("--amp", default="auto", help="precision of the frozen encoder")
    parser.add_argument("--runs", type=Path, default=Path("runs/series"), help="where the runs are kept")
    parser.add_argument("--out", type=Path, help="JSON (default: results/WHAT.json)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    if args.what == "numbers" and not args.log:
        parser.error("numbers needs --log FILE")
    if args.what == "labels" and not args.ckpt:
        parser.error("labels needs --ckpt FILE")
    try:
        if args.what in ("labels", "numbers"):
            globals()[args.what](args)
        else:
            probe(args, globals()[args.what](args))
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
