"""How do encoders fare on music they were not trained on? Checkpoints x data sets (Table 3).

    python transfer.py --ckpt demo=runs/demo/encoder.pt --data demo --random --seeds 1   # a minute
    python transfer.py --ckpt msd=runs/msd/encoder.pt fma=runs/fma/encoder.pt --data mtat gtzan \
        --random --hidden 0 512
    python transfer.py --ckpt mtat=runs/mtat/encoder.pt --data mtat --plots pictures/
    python transfer.py --results results/full/labels.json --plots pictures/   # of finished results

Every cell is one run of evaluate.py: same windows, probe, seeds, metrics and intervals. `--random`
adds the row of an untrained encoder, without which no cell says anything about pre-training.

A cell is marked when clips of its target were heard in pre-training: the samples of the source's
training clips are compared, by their sha256 in the prepared folders, with the target's test and
training clips. Only whole clips that are the same sample by sample are found, not excerpts, other
encodings or other rates of a recording. `same data` is a source tested on the test clips of its own
data set, which it did not hear; `?` a source whose prepared folder is not at hand.

Leaves behind: runs/transfer.json or `--out`, its markdown on the screen, and beside it the grid as
a heat map. `--plots DIR`: of each cell tags.png (PR-AUC or recall of each tag with its interval),
curves.png (precision over recall), confusion.png, tsne.png (test clips, Appendix C.4), filters.png
(first layer), fractions.png (Figures 4, 5).
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C is silent
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve beside others

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np

# -------------------------------------------------------------------------------------- overlap

def overlap(source, target) -> tuple[int, int, int]:
    """How many test clips of `target`, and how many of its training clips, are, sample by sample,
    training clips of `source`; how many clips they share.

    Args: prepared data with `sha256` (N, 32) and `split` (N,): 0 train, 1 valid, 2 test.
    Returns: heard, trained, shared."""
    def digests(clips, chosen):
        return {row.tobytes() for row in np.ascontiguousarray(clips.sha256[chosen])}

    heard = digests(source, source.split == 0)
    everything = digests(source, slice(None)) & digests(target, slice(None))
    tested, trained = (len(heard & digests(target, target.split == i)) for i in (2, 0))
    return tested, trained, len(everything)

def mark(info: dict, target, load: Callable) -> dict:
    """What a cell says about its source -> {status, heard, trained, shared}. info: of the source's
    encoder file, {} of an untrained one; load(name): the prepared data of that name.

    status: `` (no clip was heard), `same data`, `N test clips heard`, `N training clips heard`, `?`
    (unknown)."""
    if not info:
        return {"status": "", "heard": 0, "trained": 0, "shared": 0}
    if info.get("fingerprint") == target.fingerprint:
        trained = int((target.split == 0).sum())
        return {"status": "same data", "heard": 0, "trained": trained, "shared": len(target)}
    folders = info.get("data_folder") or ""  # of several see evaluation/command.py
    for name in filter(None, (folders, tuple(folders.split()), info.get("data"))):
        with contextlib.suppress(KeyError, TypeError, ValueError, OSError):
            source = load(name)
            # else the folder of that name is another one now
            if source.fingerprint == info.get("fingerprint"):
                break
    else:
        return {"status": "?", "heard": None, "trained": None, "shared": None}
    heard, trained, shared = overlap(source, target)
    status = f"{trained} training clips heard" if trained else ""
    status = f"{heard} test clips heard" if heard else status
    return {"status": status, "heard": heard, "trained": trained, "shared": shared}

def grid(cells: list[dict], metrics: dict[str, dict]) -> list[dict]:
    """Cells {source, target, probe, mark, text: {metric: str}} as rows of a table: one per source
    and probe, a column per target and metric. metrics: target -> {metric: its name}."""
    rows = {}
    for c in cells:
        row = {"trained on": c["source"], "probe": c["probe"]}
        row = rows.setdefault((c["source"], c["probe"]), row)
        note = f" ({c['mark']['status']})" if c["mark"]["status"] else ""
        for metric, name in metrics[c["target"]].items():
            row[f"{c['target']} {name}"] = c["text"][metric] + note
    return list(rows.values())

# ------------------------------------------------------------------------------------- pictures

def picture(path: Path, draw: Callable, size=(8, 6)):
    """Save what draw(axes) draws; size: width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    draw(figure.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path)

def heat_map(axes, cells: list[dict], metric: dict[str, str], name: dict[str, str]):
    """Sources x targets, in percent, each column coloured by itself: data sets differ more than
    encoders do. metric: target -> what is shown of it; name: target -> what that is called."""
    sources, targets = (list(dict.fromkeys(c[key] for c in cells)) for key in ("source", "target"))
    values = np.full((len(sources), len(targets)), np.nan)
    for c in cells:
        value = c["mean"][metric[c["target"]]]
        values[sources.index(c["source"]), targets.index(c["target"])] = 100 * value
    low = np.nanmin(values, 0)
    span = np.maximum(np.nanmax(values, 0) - low, 1e-9)
    axes.imshow((values - low) / span, cmap="viridis", vmin=-0.3, vmax=1.3, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white")
    axes.set(xticks=range(len(targets)), xticklabels=[f"{t}\n{name[t]}" for t in targets],
             yticks=range(len(sources)), yticklabels=sources,
             ylabel="trained on", xlabel="tested on")

def tag_bars(axes, per_tag: dict[str, dict], title: str = ""):
    """PR-AUC or recall of each tag with its 95 % interval, best on top; in brackets its clips."""
    rows = sorted((r["value"], tag) for tag, r in per_tag.items() if r["value"] is not None)
    axes.barh(range(len(rows)), [100 * value for value, _ in rows], color="tab:blue")
    for i, (_, tag) in enumerate(rows):
        if None not in per_tag[tag]["interval"]:
            ends = [100 * end for end in per_tag[tag]["interval"]]
            axes.plot(ends, [i, i], color="black", linewidth=1)
    names = [f"{tag} ({per_tag[tag]['positives']})" for _, tag in rows]
    axes.set(yticks=range(len(rows)), yticklabels=names, xlabel="percent", title=title)
    axes.margins(y=0.01)

def pr_curves(axes, scores: np.ndarray, labels: np.ndarray, tags: list[str], n: int = 8):
    """Precision over recall of the n most frequent tags; scores, labels (N, K) of clips."""
    for k in labels.sum(0).argsort()[::-1][:n]:
        hits = labels[scores[:, k].argsort()[::-1], k].cumsum()
        recall = hits / max(hits[-1], 1)
        precision = hits / np.arange(1, len(hits) + 1)
        axes.plot(100 * recall, 100 * precision, label=tags[k])
    axes.set(xlabel="recall in percent", ylabel="precision in percent", ylim=(0, 102))
    axes.legend()

def confusion(axes, counts: np.ndarray, tags: list[str]):
    """Confusion matrix in percent of each true label, from counts (K, K) summed over seeds."""
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(share):
        colour = "white" if value > 50 else "black"
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour)
    axes.set(xticks=range(len(tags)), yticks=range(len(tags)), yticklabels=tags,
             xlabel="predicted", ylabel="true")
    axes.set_xticklabels(tags, rotation=90)

def tsne(axes, h: np.ndarray, labels: np.ndarray, tags: list[str], n: int = 8):
    """Features of clips (N, D) in two dimensions by t-SNE, coloured by a clip's rarest tag among
    the n most frequent."""
    from sklearn.manifold import TSNE

    z = (h - h.mean(0)) / np.maximum(h.std(0), 1e-6)
    perplexity = min(30, max(1, (len(z) - 1) / 3))
    xy = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(z)
    axes.scatter(*xy.T, s=6, color="lightgrey")
    for i, k in enumerate(labels.sum(0).argsort()[::-1][:n]):  # the rarer later, so on top
        axes.scatter(*xy[labels[:, k] > 0].T, s=14, color=f"C{i}", label=tags[k])
    axes.set(xticks=[], yticks=[])
    axes.legend(fontsize="small")

def filters(axes, weight: np.ndarray, sample_rate: int, n: int = 512):
    """Spectra of a first layer's filters (C, 1, ..., k), each over its peak, sorted by centre
    frequency; n: points of the spectrum."""
    spectra = np.abs(np.fft.rfft(weight.reshape(len(weight), -1), n))
    hertz = np.arange(spectra.shape[1]) * sample_rate / n
    centre = (spectra * hertz).sum(1) / spectra.sum(1)
    image = (spectra / spectra.max(1, keepdims=True))[centre.argsort()].T
    axes.imshow(image, origin="lower", aspect="auto", extent=(0, len(weight), 0, hertz[-1]),
                cmap="magma", interpolation="nearest")
    axes.set(xlabel="filter, sorted by centre frequency", ylabel="Hz")

def fraction_curve(axes, results: list[dict], metric: str, name: str):
    """Figures 4 and 5: the metric over the share of labels, a line per model with its interval."""
    for model in dict.fromkeys(f"{r['model']}, {r['probe']}" for r in results):
        rows = [r for r in results if f"{r['model']}, {r['probe']}" == model]
        rows = [r for r in rows if r["mean"][metric] is not None]
        rows.sort(key=lambda r: r["fraction"])
        share = [100 * r["fraction"] for r in rows]
        axes.plot(share, [100 * r["mean"][metric] for r in rows], marker="o", label=model)
        low, high = ([100 * r["interval"][metric][i] for r in rows] for i in (0, 1))
        axes.fill_between(share, low, high, alpha=0.15)
    axes.set(xscale="log", xlabel="percent of the labels", ylabel=f"{name} in percent")
    axes.legend()

def result_pictures(folder: Path, result: dict, metrics: dict[str, dict]):
    """What a metrics JSON of evaluate.py holds, as pictures: tags, confusion, fractions. metrics:
    task -> {metric: its name}."""
    if "results" not in result:
        kind = result.get("kind", "another kind")
        raise ValueError(f"expected a metrics JSON of evaluate.py, got one of {kind}")
    rows = result["results"]
    tags = result["data"]["tags"]
    task = result["data"]["task"]
    metric = list(metrics[task])[:2][-1]  # PR-AUC, or accuracy
    last = max(rows, key=lambda r: (r["model"] != "untrained", r["fraction"]))
    title = f"{last['model']}, {last['probe']}"
    size = (7, 1 + 0.2 * len(tags))
    picture(folder / "tags.png", lambda axes: tag_bars(axes, last["per_tag"], title), size)
    if task == "singlelabel":
        counts = np.sum([run["confusion"] for run in last["runs"]], 0)
        size = (2 + 0.4 * len(tags),) * 2
        picture(folder / "confusion.png", lambda axes: confusion(axes, counts, tags), size)
    if len({r["fraction"] for r in rows if r["mean"][metric] is not None}) > 1:
        name = metrics[task][metric]
        picture(folder / "fractions.png",
                lambda axes: fraction_curve(axes, rows, metric, name), (7, 5))

def cell_pictures(folder: Path, encoder, test, scores: np.ndarray, clips):
    """What needs the encoder and the scores: precision-recall curves, t-SNE, filters. test: the
    test clips with the mean of their features, as of `evaluate.by_clip`; scores (N, K): theirs."""
    labels = test.y.numpy().astype(int)
    first = next(p for p in encoder.parameters() if p.dim() > 2).detach().numpy()
    picture(folder / "curves.png", lambda axes: pr_curves(axes, scores, labels, clips.tags))
    if len(labels) > 2:
        picture(folder / "tsne.png", lambda axes: tsne(axes, test.x.numpy(), labels, clips.tags))
    if first.size == len(first) * first.shape[-1]:  # of audio, not of a spectrogram
        picture(folder / "filters.png", lambda axes: filters(axes, first, clips.sample_rate))

# --- program: what follows imports the siblings it needs when it is called, by name, so that this
# file, copied alone, can be imported.

def read_sources(named: dict[str, str], random: bool) -> list[tuple]:
    """The rows of the grid: (name, encoder, the info of its file); of an untrained encoder, one of
    every kind and size among them, the info is {}."""
    model = import_module("model")
    rows = [(name, *model.load_encoder(path)) for name, path in named.items()]
    kinds = {json.dumps([e.name, e.sizes]): (e.name, e.sizes) for _, e, _ in rows}
    kinds = list(kinds.values()) or [("samplecnn", {})]
    for kind, sizes in kinds if random else ():
        encoder = model.build_encoder(kind, **sizes)
        name = "untrained"
        if len(kinds) > 1:
            name = f"untrained {kind}, width {encoder.sizes['width']:g}"
        if name in [row[0] for row in rows]:  # of the same width, but not the same
            name += f", {', '.join(f'{key} {value}' for key, value in encoder.sizes.items())}"
        rows.append((name, encoder, {}))
    return rows

def cell_of(source: tuple, clips, protocol, plots: Path | None) -> dict:
    """One cell of the grid, by evaluate.run, and its pictures."""
    evaluate = import_module("evaluate")
    tables = import_module("results.tables")
    name, encoder, info = source
    if not info:
        encoder = evaluate.fresh(encoder, protocol.seed)
        protocol = replace(protocol, random=True)
    print(f"{name} on {clips.name}, hidden units of the probe: {protocol.hidden}", file=sys.stderr)
    record, results, features = evaluate.run(encoder, info, clips, protocol)
    if plots and info:
        hidden = f"-hidden-{protocol.hidden}" if protocol.hidden else ""
        folder = plots / f"{name}-{clips.name}{hidden}"
        result_pictures(folder, json.loads(tables.to_json(record)), evaluate.METRICS)
        test = evaluate.by_clip(next(iter(features.values()))["test"])
        cell_pictures(folder, encoder, test, results[0].scores, clips)
    row = results[0].row
    return {"source": name, "target": clips.name, "mark": mark(info, clips, load_data),
            "encoder": record["encoder"], "data": record["data"], **row,
            "text": {metric: tables.cell(row, metric) for metric in row["mean"]}}

@functools.cache
def load_data(name):
    """The prepared data of a name under data/, or a path, or of several in a tuple, as one set."""
    prepare = import_module("prepare")
    return prepare.Clips([prepare.find(one) for one in np.atleast_1d(name)])

def write_grid(cells: list[dict], metrics: dict[str, dict], out: Path, how: dict) -> dict:
    """The JSON of all cells, whose table shows the first two metrics of each target, and those of
    neighbours -> the table's columns, target -> {metric: its name}. metrics: all of each target."""
    model = import_module("model")
    tables = import_module("results.tables")
    shown = {target: dict(list(names.items())[:2]) for target, names in metrics.items()}
    columns = {target: dict(names) for target, names in shown.items()}
    data = {}
    for c in cells:
        data[c["target"]] = {"metrics": metrics[c["target"]], **c.pop("data")}
        columns[c["target"]] |= {metric: metric for metric in c["mean"] if "@" in metric}
    caption = (f"In percent: mean ± standard deviation over {how['protocol']['seeds']} seeds, [95 "
               "% interval over test songs].")
    result = {"kind": "transfer", "caption": caption, "table": grid(cells, columns), **how,
              "versions": model.versions(), "code": model.code_version(), "targets": data,
              "cells": cells}
    with import_module("evaluation.command").shown_at_last(tables.table(result)):
        model.write_atomically(out, tables.to_json(result).encode())
    return shown

def draw_grid(cells: list[dict], shown: dict[str, dict], out: Path):
    """A heat map for each probe, beside the JSON: PR-AUC, or accuracy."""
    last = {target: list(names)[-1] for target, names in shown.items()}
    names = {target: shown[target][metric] for target, metric in last.items()}
    probes = list(dict.fromkeys(c["probe"] for c in cells))
    for probe in probes:
        rows = [c for c in cells if c["probe"] == probe]
        suffix = f"-{probe.replace(' ', '-')}" if len(probes) > 1 else ""
        size = (2 + 2 * len(shown), 1 + 0.6 * len({c["source"] for c in rows}))
        picture(out.with_name(f"{out.stem}{suffix}.png"),
                lambda axes: heat_map(axes, rows, last, names), size)
    print(out)

def build_parser():
    parser = argparse.ArgumentParser(
        prog="transfer.py", description="Checkpoints x data sets, and pictures.",
        usage="python transfer.py --ckpt NAME=FILE ... --data NAME ... [options]   (all: --help)",
        allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[], metavar="NAME", help="prepared data sets to test on")
    add("--fraction", type=float, default=1.0, metavar="F", help="share of the training labels")
    add("--results", nargs="+", type=Path, default=[], metavar="FILE",
        help="instead: --plots of metrics JSON files")
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", nargs="+", default=[], metavar="NAME=FILE", help="encoders and their rows' names")
    add("--features", choices=["last", "levels"], default="last", help="as in evaluate.py")
    add("--random", action="store_true", help="also an untrained encoder of every kind and size")
    add = parser.add_argument_group("optimisation").add_argument
    add("--probe", choices=["adam", "lbfgs", "logistic"], default="adam", help="as in evaluate.py")
    add("--hidden", type=int, nargs="+", default=[0], metavar="N",
        help="units of the probe's hidden layer; 0: linear")
    add("--min-steps", type=int, default=500, metavar="N", help="as in evaluate.py")
    add("--neighbours", type=int, default=0, metavar="K", help="as in evaluate.py")
    add = parser.add_argument_group("run").add_argument
    add("--seeds", type=int, default=3, metavar="N", help="how many seeds")
    add("--seed", type=int, default=0, help="the first of them")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where encoders run")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="off", help="their precision")
    add("--out", type=Path, default=Path("runs/transfer.json"), metavar="FILE",
        help="the result; a heat map beside it")
    add("--plots", type=Path, metavar="DIR", help="also pictures of every cell, or of --results")
    return parser

def check(parser, args, sources):
    """End with one line where flags make no sense together, or a file is missing."""
    missing = [p for p in [*map(Path, sources.values()), *args.results] if not p.is_file()]
    for wrong, what in (
            (args.results and not args.plots, "--results needs --plots DIR, for the pictures"),
            (not args.results and not (args.data and (args.ckpt or args.random)),
             "type --ckpt NAME=FILE ... and --data NAME ..."),
            (len(sources) < len(args.ckpt), "--ckpt: two encoders have one name; type NAME=FILE"),
            (not 0 < args.fraction <= 1, "--fraction is in (0, 1]"),
            (min(args.hidden) < 0 or min(args.seeds, args.min_steps) < 1,
             "--seeds and --min-steps are at least 1, --hidden 0"),
            (args.neighbours < 0, "--neighbours is at least 0"),
            (args.probe != "adam" and any(args.hidden),
             "--hidden is of the probe adam: leave it out"),
            (args.out.is_dir(), f"--out: {args.out} is a folder"),
            (missing, f"{', '.join(map(str, missing))}: no such file")):
        if wrong:
            parser.error(what)

def protocol_of(args, kind):
    """What every cell has in common, as evaluate.Protocol."""
    names = {field.name for field in fields(kind)} & vars(args).keys()
    given = {name: getattr(args, name) for name in names - {"random", "hidden"}}
    return kind(**given | {"fraction": (args.fraction,)})

def main(argv=None):
    import evaluate
    import model
    from evaluation import command
    model.tune_allocator()
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = build_parser()
    parser.formatter_class = model.Help
    args = parser.parse_args(argv)
    sources = dict(pair.split("=", 1) if "=" in pair else (Path(pair).parent.name, pair)
                   for pair in args.ckpt)
    check(parser, args, sources)

    def draw_results():
        names = [path.stem for path in args.results]  # the same in every run's folder
        for path, name in zip(args.results, names):
            name = name if names.count(name) == 1 else f"{path.resolve().parent.name}-{name}"
            result = json.loads(path.read_text(encoding="utf-8"))
            result_pictures(args.plots / name, result, evaluate.METRICS)
        return 0

    def work():
        try:
            targets = {clips.name: clips for clips in map(load_data, args.data)}
        except FileNotFoundError as error:
            parser.error(f"--data {error}")
        if len(targets) < len(args.data):
            parser.error("--data: two data sets have one name: prepare one again with --name")
        rows = read_sources(sources, args.random)
        for clips in targets.values():  # before hours of work
            for _, encoder, info in rows:
                command.require_fit(info, clips)
                evaluate.cut(clips, encoder.input_samples)
                if args.features == "levels":
                    model.Levels(encoder)  # it says so where there are none
        protocol = protocol_of(args, evaluate.Protocol)
        cells = [cell_of(row, clips, replace(protocol, hidden=hidden), args.plots)
                 for clips in targets.values() for row in rows for hidden in args.hidden]
        metrics = {name: evaluate.METRICS[clips.task] for name, clips in targets.items()}
        typed = sys.argv[1:] if argv is None else argv
        how = {"argv": ["transfer.py", *typed], "protocol": vars(args)}
        draw_grid(cells, write_grid(cells, metrics, args.out, how), args.out)
        return 0
    return command.one_line("transfer.py", draw_results if args.results else work)

if __name__ == "__main__":
    sys.exit(main())
