"""How do encoders fare on music they were not trained on? Checkpoints x data sets, by evaluate.py's protocol (Table 3).

    python transfer.py --ckpt demo=runs/demo/encoder.pt --data demo --random --seeds 1               # a minute
    python transfer.py --ckpt msd=runs/msd/encoder.pt fma=runs/fma/encoder.pt --data mtat gtzan --random --hidden 0 512
    python transfer.py --ckpt mtat=runs/mtat/encoder.pt --data mtat --plots pictures/     # the pictures of one encoder
    python transfer.py --results results/mtat-fractions.json --plots pictures/            # pictures of finished results

Every cell is one run of evaluate.py: same windows, probe, seeds, metrics and intervals. `--random` adds the row of an
untrained encoder, without which no cell says anything about pre-training.

A cell is marked when clips of its target were heard in pre-training: the samples of the source's training clips are
compared, by their sha256 in the prepared folders, with the target's test and training clips. Only whole clips that are
the same sample by sample are found, not excerpts, other encodings or other rates of a recording. `same data` is a source
tested on the test clips of its own data set, which it did not hear; `?` a source whose prepared folder is not at hand.

Leaves behind: runs/transfer.json or `--out`, its markdown on the screen, and beside it the grid as a heat map.
`--plots DIR`: of each cell tags.png (PR-AUC or recall of each tag with its interval), curves.png (precision over
recall), confusion.png, tsne.png (test clips, Appendix C.4), filters.png (first layer), fractions.png (Figures 4, 5).
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np


# ------------------------------------------------------------------------------------------------------------- overlap

def overlap(source, target):
    """How many test clips of `target`, and how many of its training clips, are, sample by sample, training clips of
    `source`; how many clips they share.

    Args: prepared data with `sha256` (N, 32) and `split` (N,): 0 train, 1 valid, 2 test.
    Returns: (heard, trained, shared)."""
    def digests(clips, chosen):
        return {row.tobytes() for row in np.ascontiguousarray(clips.sha256[chosen])}
    everything = slice(None)
    heard = digests(source, source.split == 0)
    return (len(heard & digests(target, target.split == 2)), len(heard & digests(target, target.split == 0)),
            len(digests(source, everything) & digests(target, everything)))


def mark(info, target, load):
    """What a cell says about its source -> {status, heard, trained, shared}; load(name): the prepared data of that name.
    info: of the source's encoder file; {} of an untrained one.

    status: `` (no clip was heard), `same data`, `N test clips heard`, `N training clips heard`, `?` (unknown)."""
    if not info:
        return {"status": "", "heard": 0, "trained": 0, "shared": 0}
    if info.get("fingerprint") == target.fingerprint:
        return {"status": "same data", "heard": 0, "trained": int((target.split == 0).sum()), "shared": len(target)}
    for name in (info.get("data_folder"), info.get("data")):
        with contextlib.suppress(KeyError, TypeError, ValueError, OSError):
            source = load(name)
            if source.fingerprint == info.get("fingerprint"):  # else the folder of that name is another one now
                break
    else:
        return {"status": "?", "heard": None, "trained": None, "shared": None}
    heard, trained, shared = overlap(source, target)
    status = f"{heard} test clips heard" if heard else f"{trained} training clips heard" if trained else ""
    return {"status": status, "heard": heard, "trained": trained, "shared": shared}


def grid(cells, metrics):
    """Cells {source, target, probe, mark, text: {metric: str}} as table rows: one per source and probe, a column per
    target and metric. metrics: target -> {metric: its name in the table}."""
    rows = {}
    for c in cells:
        row = rows.setdefault((c["source"], c["probe"]), {"trained on": c["source"], "probe": c["probe"]})
        for metric, name in metrics[c["target"]].items():
            note = f" ({c['mark']['status']})" if c["mark"]["status"] else ""
            row[f"{c['target']} {name}"] = c["text"][metric] + note
    return list(rows.values())


# ------------------------------------------------------------------------------------------------------------ pictures

def picture(path, draw, size=(8, 6)):
    """Save what draw(axes) draws."""
    from matplotlib.figure import Figure
    figure = Figure(size, layout="constrained")
    draw(figure.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(path)


def heat_map(axes, cells, metric, name):
    """Sources x targets, in percent, each column coloured by itself: data sets differ more than encoders."""
    sources, targets = (list(dict.fromkeys(c[key] for c in cells)) for key in ("source", "target"))
    values = np.full((len(sources), len(targets)), np.nan)
    for c in cells:
        values[sources.index(c["source"]), targets.index(c["target"])] = 100 * c["mean"][metric[c["target"]]]
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    axes.imshow((values - low) / np.maximum(high - low, 1e-9), cmap="viridis", vmin=-0.3, vmax=1.3, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white")
    axes.set(xticks=range(len(targets)), xticklabels=[f"{t}\n{name[t]}" for t in targets], yticks=range(len(sources)),
             yticklabels=sources, ylabel="trained on", xlabel="tested on")


def tag_bars(axes, per_tag, title=""):
    """PR-AUC or recall of each tag with its 95 % interval, best on top; in brackets its test clips."""
    rows = sorted((r["value"], tag) for tag, r in per_tag.items() if r["value"] is not None)
    axes.barh(range(len(rows)), [100 * value for value, _ in rows], color="tab:blue")
    for i, (_, tag) in enumerate(rows):
        if None not in per_tag[tag]["interval"]:
            axes.plot([100 * x for x in per_tag[tag]["interval"]], [i, i], color="black", linewidth=1)
    names = [f"{tag} ({per_tag[tag]['positives']})" for _, tag in rows]
    axes.set(yticks=range(len(rows)), yticklabels=names, xlabel="percent", title=title)
    axes.margins(y=0.01)


def pr_curves(axes, scores, labels, tags, n=8):
    """Precision over recall of the n most frequent tags, from clip scores (N, K)."""
    for k in labels.sum(0).argsort()[::-1][:n]:
        hits = labels[scores[:, k].argsort()[::-1], k].cumsum()
        axes.plot(100 * hits / max(hits[-1], 1), 100 * hits / np.arange(1, len(hits) + 1), label=tags[k])
    axes.set(xlabel="recall in percent", ylabel="precision in percent", ylim=(0, 102))
    axes.legend()


def confusion(axes, counts, tags):
    """Confusion matrix in percent of each true label, from counts (K, K) summed over seeds."""
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (i, j), value in np.ndenumerate(share):
        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if value > 50 else "black")
    axes.set(xticks=range(len(tags)), yticks=range(len(tags)), yticklabels=tags, xlabel="predicted", ylabel="true")
    axes.set_xticklabels(tags, rotation=90)


def tsne(axes, h, labels, tags, n=8):
    """Clip embeddings (N, D) in two dimensions by t-SNE, coloured by a clip's rarest tag among the n most frequent."""
    from sklearn.manifold import TSNE
    z = (h - h.mean(0)) / np.maximum(h.std(0), 1e-6)
    xy = TSNE(perplexity=min(30, max(1, (len(z) - 1) / 3)), init="pca", random_state=0).fit_transform(z)
    axes.scatter(*xy.T, s=6, color="lightgrey")
    for i, k in enumerate(labels.sum(0).argsort()[::-1][:n]):  # the rarer later, so on top
        axes.scatter(*xy[labels[:, k] > 0].T, s=14, color=f"C{i}", label=tags[k])
    axes.set(xticks=[], yticks=[])
    axes.legend(fontsize="small")


def filters(axes, weight, sample_rate, n=512):
    """Spectra of a first layer's filters (C, 1, ..., k), each over its peak, sorted by centre frequency."""
    spectra = np.abs(np.fft.rfft(weight.reshape(len(weight), -1), n))
    hertz = np.arange(spectra.shape[1]) * sample_rate / n
    order = (spectra * hertz).sum(1) / spectra.sum(1)
    image = (spectra / spectra.max(1, keepdims=True))[order.argsort()].T
    axes.imshow(image, origin="lower", aspect="auto", extent=(0, len(weight), 0, hertz[-1]), cmap="magma",
                interpolation="nearest")
    axes.set(xlabel="filter, sorted by centre frequency", ylabel="Hz")


def fraction_curve(axes, results, metric, name):
    """Figures 4 and 5: the metric over the share of labels, a line per model with its interval."""
    for model in dict.fromkeys(f"{r['model']}, {r['probe']}" for r in results):
        rows = sorted((r for r in results if f"{r['model']}, {r['probe']}" == model and r["mean"][metric] is not None),
                      key=lambda r: r["fraction"])
        x, y = [100 * r["fraction"] for r in rows], [100 * r["mean"][metric] for r in rows]
        axes.plot(x, y, marker="o", label=model)
        axes.fill_between(x, *[[100 * r["interval"][metric][i] for r in rows] for i in (0, 1)], alpha=0.15)
    axes.set(xscale="log", xlabel="percent of the labels", ylabel=f"{name} in percent")
    axes.legend()


def result_pictures(folder, result, metrics):
    """What a metrics JSON of evaluate.py holds, as pictures: tags, confusion, fractions."""
    if "results" not in result:
        raise ValueError(f"expected a metrics JSON of evaluate.py, got one of {result.get('kind', 'another kind')}")
    rows, tags = result["results"], result["data"]["tags"]
    main_metric = list(metrics[result["data"]["task"]])[:2][-1]  # PR-AUC, or accuracy
    last = max(rows, key=lambda r: (r["model"] != "untrained", r["fraction"]))
    title = f"{last['model']}, {last['probe']}"
    picture(folder / "tags.png", lambda axes: tag_bars(axes, last["per_tag"], title), (7, 1 + 0.2 * len(tags)))
    if result["data"]["task"] == "singlelabel":
        counts = np.sum([run["confusion"] for run in last["runs"]], 0)
        picture(folder / "confusion.png", lambda axes: confusion(axes, counts, tags), (2 + 0.4 * len(tags),) * 2)
    if len({r["fraction"] for r in rows if r["mean"][main_metric] is not None}) > 1:
        name = metrics[result["data"]["task"]][main_metric]
        picture(folder / "fractions.png", lambda axes: fraction_curve(axes, rows, main_metric, name), (7, 5))


def cell_pictures(folder, result, clips, windows, usable):
    """What needs the encoder and the scores: precision-recall curves, t-SNE, filters. `result`: of evaluate.run."""
    encoder, h = result["_encoder"], result["_features"][0].numpy()
    clip, rows = windows(clips.length, encoder.input_samples)[0], usable(clips, encoder.input_samples)[0]["test"]
    test, where = np.unique(clip[rows], return_inverse=True)
    mean = np.zeros((len(test), h.shape[1]))
    np.add.at(mean, where, h[rows])
    mean /= np.bincount(where)[:, None]
    scores, labels = result["results"][0]["_scores"], clips.labels[test].astype(int)
    first = next(p for p in encoder.parameters() if p.dim() > 2).detach().numpy()
    picture(folder / "curves.png", lambda axes: pr_curves(axes, scores, labels, clips.tags))
    if len(test) > 2:
        picture(folder / "tsne.png", lambda axes: tsne(axes, mean, labels, clips.tags))
    picture(folder / "filters.png", lambda axes: filters(axes, first, clips.sample_rate))


# ------------------------------------------------------------------------------------------------------------- program

def build_parser():
    parser = argparse.ArgumentParser(
        prog="transfer.py", description="Checkpoints x data sets, and pictures.", allow_abbrev=False,
        usage="python transfer.py --ckpt NAME=FILE ... --data NAME ... [options]   (all of them: --help)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=[], metavar="NAME", help="prepared data sets to test on")
    add("--fraction", type=float, default=1.0, metavar="F", help="share of the training labels, in (0, 1]")
    add("--results", nargs="+", type=Path, default=[], metavar="FILE", help="instead: --plots of metrics JSON files")
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", nargs="+", default=[], metavar="NAME=FILE", help="encoders, with the name of their row")
    add("--random", action="store_true", help="also a row of an untrained encoder for every kind and size among --ckpt")
    add = parser.add_argument_group("optimisation").add_argument
    add("--hidden", type=int, nargs="+", default=[0], metavar="N", help="units of the probe's hidden layer; 0: linear")
    add("--probe", choices=["adam", "lbfgs"], default="adam", help="as in evaluate.py")
    add("--min-steps", type=int, default=500, metavar="N", help="as in evaluate.py")
    add = parser.add_argument_group("run").add_argument
    add("--seeds", type=int, default=3, metavar="N", help="how many seeds")
    add("--seed", type=int, default=0, help="the first of them")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the test songs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the encoders run")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="off", help="precision of the encoders; off: float32")
    add("--out", type=Path, default=Path("runs/transfer.json"), metavar="FILE", help="the result; a heat map beside it")
    add("--plots", type=Path, metavar="DIR", help="also pictures of every cell, or of --results")
    return parser


def main(argv=None):
    import evaluate
    import model
    import prepare
    model.tune_allocator()
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        sources = dict(pair.split("=", 1) if "=" in pair else (Path(pair).parent.name, pair) for pair in args.ckpt)
        for wrong, what in (
                (args.results and not args.plots, "--results needs --plots DIR, where the pictures go"),
                (not args.results and not (args.data and (args.ckpt or args.random)),
                 "type --ckpt NAME=FILE ... and --data NAME ..."),
                (len(sources) < len(args.ckpt), "--ckpt: two encoders have one name; type NAME=FILE"),
                (not 0 < args.fraction <= 1, "--fraction is in (0, 1]"),
                (min(args.hidden) < 0 or min(args.seeds, args.min_steps, args.bootstrap) < 1,
                 "--seeds, --min-steps and --bootstrap are at least 1, --hidden 0"),
                (args.probe == "lbfgs" and any(args.hidden), "--probe lbfgs is a linear probe: leave out --hidden"),
                (args.out.is_dir(), f"--out: {args.out} is a folder")):
            if wrong:
                parser.error(what)
        for path in [Path(p) for p in sources.values()] + args.results:
            if not path.is_file():
                parser.error(f"{path}: no such file")
        names = [path.stem for path in args.results]  # evaluate.py's names are the same in every run's folder
        for path, name in zip(args.results, names):
            name = name if names.count(name) == 1 else f"{path.resolve().parent.name}-{name}"
            result_pictures(args.plots / name, json.loads(path.read_text()), evaluate.METRICS)
        if args.results:
            return 0
        try:
            targets = {clips.name: clips for clips in (prepare.Clips(prepare.find(name)) for name in args.data)}
        except FileNotFoundError as error:
            parser.error(f"--data {error}")
        if len(targets) < len(args.data):
            parser.error("--data: two data sets have one name: prepare one of them again with another --name")
        options = evaluate.build_parser().parse_args([])
        for name in ("probe", "min_steps", "seeds", "seed", "bootstrap", "device", "amp"):
            setattr(options, name, getattr(args, name))
        options.fraction, options.argv = [args.fraction], list(sys.argv[1:] if argv is None else argv)
        return run(args, options, sources, targets, evaluate, model, prepare)
    except KeyboardInterrupt:
        print("transfer.py: interrupted; features that were computed are kept", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"transfer.py: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1


def run(args, options, sources, targets, evaluate, model, prepare):
    """The grid: each cell by `evaluate.run`; then the table, the heat map and the JSON."""
    loaded = {name: model.load_encoder(path) for name, path in sources.items()}
    as_loaded = (options.encoder, options.width, None)  # the encoder, its width and pooling: as --ckpt has them
    rows = [(name, encoder, info, as_loaded) for name, (encoder, info) in loaded.items()]
    kinds = dict.fromkeys((e.name, e.sizes["width"], e.sizes.get("pool")) for e, _ in loaded.values()) or [as_loaded]
    for kind in kinds if args.random else ():
        rows.append(("untrained" if len(kinds) == 1 else f"untrained {kind[0]}, width {kind[1]:g}", None, {}, kind))
    for clips in targets.values():  # before hours of work
        for _, encoder, info, kind in rows:
            evaluate.require_fit(info, clips)
            evaluate.usable(clips, (encoder or model.build_encoder(kind[0], width=kind[1])).input_samples)
    cells, meta = [], {}
    for name, clips in targets.items():
        for source, encoder, info, kind in rows:
            options.random = encoder is None
            options.encoder, options.width, options.pool = kind
            for options.hidden in args.hidden:
                print(f"{source} on {name}, hidden units of the probe: {options.hidden}", file=sys.stderr)
                result = evaluate.run(options, clips, encoder, info, model)
                row = result["results"][0]
                checked = mark(info, clips, lambda data: prepare.Clips(prepare.find(data)))
                metrics = evaluate.METRICS[clips.task]
                text = {m: evaluate.cell(row, m) for m in metrics}
                cells.append({"source": source, "target": name, "mark": checked, "encoder": result["encoder"], **row,
                              "text": text})
                meta[name] = {"metrics": metrics, **result["data"]}
                if args.plots and encoder is not None:
                    folder = args.plots / (f"{source}-{name}" + (f"-hidden-{options.hidden}" if options.hidden else ""))
                    result_pictures(folder, json.loads(evaluate.to_json(result)), evaluate.METRICS)
                    cell_pictures(folder, result, clips, evaluate.windows, evaluate.usable)
    shown = {name: {m: text for m, text in list(meta[name]["metrics"].items())[:2]} for name in targets}
    result = {"kind": "transfer", "caption": f"In percent: mean ± standard deviation over {args.seeds} seeds, [95 % "
              "interval over test songs].", "table": grid(cells, shown), "argv": ["transfer.py", *options.argv],
              "versions": model.versions(), "code": model.code_version(), "protocol": vars(args), "targets": meta,
              "cells": cells}
    model.write_atomically(args.out, evaluate.to_json(result).encode())
    print(evaluate.table(result))
    last = {name: list(metrics)[-1] for name, metrics in shown.items()}  # PR-AUC, or accuracy
    for probe in dict.fromkeys(c["probe"] for c in cells):
        chosen = [c for c in cells if c["probe"] == probe]
        suffix = "" if len(args.hidden) == 1 else f"-{probe.replace(' ', '-')}"
        picture(args.out.with_name(args.out.stem + suffix + ".png"),
                lambda axes: heat_map(axes, chosen, last, {n: shown[n][last[n]] for n in targets}),
                (2 + 2 * len(targets), 1 + 0.6 * len({c["source"] for c in chosen})))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
