"""The journal of a training run: its log, what a line of it says, its curves, and a quick probe.

    python training/journal.py runs/mtat          # draws runs/mtat/curves.png

pretrain.py keeps it while it trains. This file needs numpy and torch; matplotlib for the curves and
scikit-learn for the probe.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

try:
    import resource  # POSIX only: the peak memory
except ImportError:
    resource = None


def read_log(folder) -> list[dict]:
    """The objects of a run's log.jsonl; a last line cut by a crash is left out."""
    records = []
    for line in (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def hear_some(clips, seed: int, few: int = 16):
    """Are the samples of some clips, which the seed chooses, and of the last what was prepared?

    `clips`: with sha256 (N, 32) of each one's int16 samples. Raises ValueError for one that is not.
    """
    if len(clips) == 0:
        return
    chosen = np.random.default_rng(abs(seed)).permutation(len(clips))[:few]
    for i in {*chosen.tolist(), len(clips) - 1}:
        try:
            samples = (clips.waveform(i) * 32768).to(torch.int16).numpy()
        except (ValueError, OSError) as error:
            raise ValueError(f"{clips.folder}: the samples of {clips.id[i]} cannot be read "
                             f"({error}); type: python prepare.py --check {clips.name}") from None
        if hashlib.sha256(samples).digest() != clips.sha256[i].tobytes():
            raise ValueError(f"{clips.folder}: the samples of {clips.id[i]} have changed since "
                             f"they were prepared; type: python prepare.py --check {clips.name}")


def description(run) -> str:
    """What there is to know of a run before its first step."""
    pairs = run.pairs
    processes = dist.get_world_size() if dist.is_initialized() else 1
    text = (f"{run.clips.name}: {pairs.songs} songs, {pairs.steps_per_epoch} steps of "
            f"{pairs.batch_size} pairs an epoch ({pairs.dropped} songs of each epoch's end "
            f"dropped, {pairs.left_out} clips shorter than {pairs.n} samples left out); "
            f"{processes} process{'es' * (processes > 1)} on {run.device.type}, amp {run.amp}\n")
    if run.settings.probe_every and not (run.clips.tags and len(run.valid)):
        text += "--probe-every: the data has no labelled train and valid clips to probe\n"
    if run.smaller_batch:
        text += (f"{pairs.batch_size} pairs are the most that these songs and processes allow; the "
                 "paper has more: --batch-size\n")
    if run.step:
        return text + f"continuing from step {run.step} of {run.total}"
    return text + f"{run.total} steps"


def first_line(run) -> dict:
    """The first object of a log: what explains the numbers below it."""
    gpu = run.device.type == "cuda"
    return {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "code": run.code,
            "versions": run.versions | {"numpy": np.__version__},
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "processes": dist.get_world_size() if dist.is_initialized() else 1,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(run.device) if gpu else str(run.device),
            "continued_from": run.step, "total": run.total, "songs": run.pairs.songs,
            "left_out": run.pairs.left_out, "steps_per_epoch": run.pairs.steps_per_epoch,
            "dropped": run.pairs.dropped, "config": run.config}


class Log:
    """log.jsonl in a run's folder, and its lines on screen; only the first process keeps one.

    What an interrupted run wrote beyond the step that it is continued from is dropped.
    """

    def __init__(self, run):
        self.path = run.folder / "log.jsonl"
        self.total = run.total
        self.silent = dist.is_initialized() and dist.get_rank() > 0
        if self.silent:
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        earlier = read_log(run.folder) if run.step and self.path.is_file() else []
        records = [r for r in earlier if r.get("step", 0) <= run.step and not r.get("done")]
        records.append(first_line(run))
        partial = self.path.with_suffix(".partial")  # a full disk must not cost the log
        partial.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
        os.replace(partial, self.path)

    def write(self, record: dict):
        """Append one object, and say what a listener of the run wants to know of it."""
        if self.silent:
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        names = ("loss", "top1", "pairs_per_s", "wait", "others", "probe")
        shown = [f"{name} {record[name]}" for name in names if name in record]
        if record.get("pairs_per_s"):
            pairs_left = (self.total / record["step"] - 1) * record["pairs"]
            shown.append(f"left {pairs_left / record['pairs_per_s'] / 60:.0f} min")
        if shown:
            print(f"step {record['step']}/{self.total}  " + "  ".join(shown), flush=True)


class Meter:
    """Means of loss and top-1 over the steps since the last line of the log, and their time.

    Args: device: of the losses. step: the one the run begins at. batch_size: pairs of a step.
    """

    def __init__(self, device, step: int, batch_size: int):
        self.sums = torch.zeros(2, device=device)
        self.step = step
        self.batch_size = batch_size
        self.opened = time.perf_counter()
        self.began = self.opened

    def add(self, loss, top1):
        """Count a step."""
        self.sums += torch.stack([loss, top1])

    def read(self, step: int, inputs, watch) -> dict:
        """The means over all processes after this step, and how fast they came; then begin again.

        `inputs.waited()`: the seconds that steps waited for their views. `watch.waited`: those that
        this process waited for slower ones.
        """
        steps = step - self.step
        loss, top1 = (self.sums / steps).tolist()  # on a GPU: when it has come so far
        elapsed = time.perf_counter() - self.began
        record = {"step": step, "pairs": step * self.batch_size, "loss": round(loss, 5),
                  "top1": round(top1, 4),
                  "pairs_per_s": round(steps * self.batch_size / elapsed, 2),
                  "wait": round(inputs.waited() / elapsed, 4)}
        if dist.is_initialized():
            processes = dist.get_world_size()
            row = torch.zeros(2 + processes)
            row[:2] = torch.tensor([loss, top1]) / processes
            row[2 + dist.get_rank()] = watch.waited / elapsed
            watch.waited = 0.0
            dist.all_reduce(row)
            loss, top1, *others = row.tolist()
            record |= {"loss": round(loss, 5), "top1": round(top1, 4)}
            record["others"] = [round(share, 4) for share in others]
        self.sums.zero_()
        self.step = step
        self.began += elapsed
        return record

    def end(self, step: int) -> dict:
        """The last line of a log: seconds of the whole, and the most memory that was in use."""
        peak = None
        if self.sums.is_cuda:
            peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        elif resource:
            peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        seconds = round(time.perf_counter() - self.opened, 1)
        return {"step": step, "done": True, "seconds": seconds, "peak_gib": peak}

    @contextlib.contextmanager
    def paused(self):
        """What happens meanwhile is no part of the steps' time."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began


@torch.no_grad()
def middle_windows(encoder, clips, most: int, device) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, D) of the middle window of at most so many labelled clips, and labels (n, K)."""
    n = encoder.input_samples
    labelled = (clips.labels.sum(1) > 0) | (clips.task != "singlelabel")
    rows = np.flatnonzero((clips.length >= n) & labelled)
    if len(rows) == 0:
        return np.zeros((0, encoder.out_dim)), clips.labels[rows]
    rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]  # evenly spread
    windows = clips.crops(rows, (clips.length[rows] - n) // 2, n).split(16)
    features = [encoder(window.to(device)).double().cpu() for window in windows]
    return torch.cat(features).numpy(), clips.labels[rows]


def quick_probe(encoder, train, valid, device, most: int = 600) -> float | None:
    """A coarse picture of a representation: collapse shows at once. evaluate.py gives the numbers.

    Ridge regression from the middle windows of at most so many training clips to their labels ->
    macro ROC-AUC (multi-label) or accuracy on validation; None where fewer than 2 have labels.
    """
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score

    training = encoder.training
    encoder.eval()
    x, y = middle_windows(encoder, train, most, device)
    v, truth = middle_windows(encoder, valid, most, device)
    encoder.train(training)
    if min(len(x), len(v)) < 2:
        return None
    mean = x.mean(0)
    std = x.std(0, ddof=1).clip(1e-9)
    ridge = Ridge(alpha=len(x)).fit((x - mean) / std, y)
    scores = ridge.predict((v - mean) / std).reshape(truth.shape)
    if train.task == "singlelabel":
        return float((scores.argmax(1) == truth.argmax(1)).mean())
    both = (truth.sum(0) > 0) & (truth.sum(0) < len(truth))  # a tag that some have and some lack
    return float(roc_auc_score(truth[:, both], scores[:, both])) if both.any() else None


def plot(folder) -> Path:
    """log.jsonl -> curves.png: loss, contrastive accuracy, probe and learning rate over steps."""
    from matplotlib.figure import Figure

    titles = {"loss": "contrastive loss", "top1": "contrastive top-1",
              "probe": "quick probe, validation", "lr": "learning rate"}
    records = [r for r in read_log(folder) if "step" in r]
    curves = {key: [(r["step"], r[key]) for r in records if key in r] for key in titles}
    curves = {key: points for key, points in curves.items() if points}
    if not curves:
        raise ValueError(f"{folder}/log.jsonl holds no steps yet; let the run reach --log-every")
    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (key, points) in zip(axes, curves.items()):
        axis.plot(*zip(*points), ".-" if key == "probe" else "-")
        axis.set(xlabel="step", title=titles[key])
        axis.grid(alpha=0.3)
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    return Path(folder) / "curves.png"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path, help="a run's folder, e.g. runs/mtat")
    args = parser.parse_args(argv)
    if not (args.folder / "log.jsonl").is_file():
        parser.error(f"{args.folder}: no log.jsonl there; give a run's folder, e.g. runs/mtat")
    try:
        print(plot(args.folder))
    except ValueError as error:
        print(f"journal.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
