"""Evaluate a frozen encoder as the paper does, and take the results home (CLMR, ISMIR 2021, sections 3.6, 3.7 and 4).

    python evaluate.py --ckpt runs/demo/encoder.pt --data demo --seeds 1               # a minute
    python evaluate.py --ckpt runs/mtat/encoder.pt --random --fraction 0.01 0.1 1      # beside the untrained control
    python evaluate.py --data mtat --supervised --fraction 0.01                        # the end-to-end baseline
    python evaluate.py --ckpt runs/mtat/encoder.pt --embed song.mp3 folder/ --out embeddings/
    python evaluate.py --ckpt runs/mtat/tagger.ts --tag song.mp3 --plot                # top tags; a picture over time

The protocol. Every clip is cut into all its non-overlapping full windows; the frozen encoder turns each into features,
once. A linear layer (`--hidden 512`: one hidden layer) is trained on the windows of the training clips with Adam. After
each epoch (of at least `--min-steps` steps) the validation clips are scored; `--patience` epochs without a better score
end it, the best state is kept. A clip's score is the mean of its windows' probabilities. Test clips are scored once, by
the probe that was kept, for each seed; a seed draws the start, the order of windows and the subset of `--fraction`.
Reported, in [0, 1]: the metrics of `score`, mean and standard deviation over seeds, a 95 % bootstrap interval over test
songs, and beside the untrained control (`--random`: one network, initialised from the first seed) the paired interval
of the difference.

Leaves behind, in the run's folder (of another checkpoint: runs/ITS-NAME/) or where `--out`, `--export` say:
evaluate-DATA.json, or with other flags evaluate-DATA-hidden512-f0.01.json, which explains the numbers; encoder.ts,
encoder.pt2, and, where all labels were used, tagger.ts; features in data/NAME/features/. `--embed`: a FILE.npz for each
file, `embedding` (n, D), `timestamps` (n,), the windows' starts in seconds, and `source`. Pictures of results: transfer.py;
markdown of results: results/tables.py.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import sys
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

METRICS = {
    "multilabel": {"roc_auc": "ROC-AUC", "pr_auc": "PR-AUC", "clip_roc_auc": "clip ROC", "clip_pr_auc": "clip PR"},
    "singlelabel": {"accuracy": "accuracy"}}
LOSS = {"multilabel": F.binary_cross_entropy_with_logits, "singlelabel": F.cross_entropy}  # of logits, targets (n, K)
IN_MEMORY = ("_draws", "_scores", "_module", "_encoder", "_features")  # keys of results that no file holds
DTYPE = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def windows(length, size, hop=None):
    """Where the full windows of clips lie (section 4.1): length (N,), size, hop in samples -> clip (n,), start (n,).

        samples    0 1 2 3 4 5 6      length 7, size 3, hop 3 (by default the size)
        window 0  |0 1 2|
        window 1        |3 4 5|       sample 6 is left over; a clip shorter than a window has none

    >>> windows([7, 2, 6], 3)
    (array([0, 0, 2, 2]), array([0, 3, 0, 3]))
    """
    hop, length = hop or size, np.asarray(length, np.int64).reshape(-1)
    count = np.maximum(0, (length - size) // hop + 1)
    clip = np.repeat(np.arange(len(length)), count)
    return clip, (np.arange(len(clip)) - np.repeat(np.cumsum(count) - count, count)) * hop


def crops(clips, clip, start, size, batch_size=16):
    """Windows of a prepared data set, in batches (b, 1, size)."""
    parts = range(0, len(clip), batch_size)
    for i in tqdm(parts, "windows", unit="batch", leave=False, mininterval=0.5 if sys.stderr.isatty() else 30):
        yield clips.crops(clip[i : i + batch_size], start[i : i + batch_size], size)


@torch.no_grad()
def embed(encoder, batches):
    """Features of windows: batches (b, 1, T), of one tensor x `x.split(16)`, -> (n, D) float32 on the CPU. The encoder
    is put into eval mode, and keeps its precision and device: no row depends on another.

    >>> embed(nn.Sequential(nn.Flatten(), nn.Linear(8, 4)), torch.zeros(5, 1, 8).split(2)).shape
    torch.Size([5, 4])
    """
    like = next(encoder.eval().parameters())
    return torch.cat([encoder(x.to(like)).float().cpu() for x in batches])


def take_fraction(labels, fraction, seed=0, mode="balanced"):
    """A subset of examples, labels (N, K) 0/1, in which every tag keeps its share (section 4.3) -> (n,) ascending.

    balanced: put the examples in an order, each time by the next of the tag with the smallest share so far, the rarest
        first; while there are tags without any, by the example that serves most of them. The first round(fraction N)
        are the subset: those of one seed are nested. Examples with no tag, one, two ... keep their share like a tag.
    v1: the released code's rule: of each combination of tags max(1, int(fraction n)), at random. Its 1 % of the
        187,060 windows of MagnaTagATune are 6,677.

    >>> np.eye(4, dtype=int).repeat(10, 0)[take_fraction(np.eye(4).repeat(10, 0), 0.2)].sum(0)
    array([2, 2, 2, 2])
    """
    labels, rng = np.asarray(labels) > 0, np.random.default_rng([seed, 1])
    if not 0 < fraction <= 1:
        raise ValueError(f"a label fraction is in (0, 1], got {fraction}")
    if mode == "v1":
        _, kind, count = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
        order = rng.permutation(len(labels))
        order = order[np.argsort(kind.reshape(-1)[order], kind="stable")]  # by combination, at random within each
        parts = [rows[: max(1, int(fraction * len(rows)))] for rows in np.split(order, np.cumsum(count)[:-1])]
        return np.sort(np.concatenate(parts))
    n_tags, tags = labels.shape[1], labels.sum(1, keepdims=True)
    classes = np.concatenate([labels, tags == np.unique(tags)], 1)  # those with equally many tags are a class too
    total = classes.sum(0)
    rarity = np.where(np.arange(len(total)) < n_tags, total, len(labels))  # ... that never goes before a tag
    queues = [iter(rng.permutation(np.flatnonzero(column)).tolist()) for column in classes.T]
    taken, count = np.zeros(len(labels), bool), np.zeros(len(total), int)
    for _ in range(max(1, round(fraction * len(labels)))):
        k = np.lexsort((rarity, np.where(count < total, count / np.maximum(total, 1), np.inf)))[0]
        if count[k]:
            i = next(i for i in queues[k] if not taken[i])
        else:
            candidates = rng.permutation(np.flatnonzero(classes[:, k]))
            i = candidates[labels[candidates][:, count[:n_tags] == 0].sum(1).argmax()]
        taken[i] = True
        count += classes[i]
    return np.flatnonzero(taken)


# ------------------------------------------------------------------------------------------------------------- training

def validation(logits, labels, clip, task, clip_score="sigmoid"):
    """What training keeps the best of: (mean of the clips' ROC-AUC and PR-AUC, or their accuracy; then minus the loss).
    Not the loss first: on small data it is lowest while a probe has learnt little but how frequent the tags are."""
    _, first, clip = np.unique(clip, return_index=True, return_inverse=True)
    loss = LOSS[task](logits, labels).item()
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss became {loss}: try a smaller --lr, or --amp off")
    s = score(clip_scores(logits, clip, len(first), task, clip_score), labels[first].numpy(), task)
    return float(np.nan_to_num(np.mean([s[name] for name in list(METRICS[task])[:2]]))), -loss


def train(module, batches, validate, task, lr=3e-4, weight_decay=1e-6, patience=5, epochs=1000,
          autocast=contextlib.nullcontext, half=False):
    """Adam until `patience` epochs in a row have not bettered `validate()`; the module keeps its best state. batches():
    the (x, y) of an epoch; validate(): as `validation`; half: autocast is to float16, so gradients are scaled. Returns
    {epochs, best_epoch, valid, valid_loss}."""
    optimiser = torch.optim.Adam(module.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
    scaler = torch.amp.GradScaler(enabled=half)
    best, kept, best_epoch, epoch = (-math.inf,), None, 0, 0
    while epoch < epochs and epoch - best_epoch < patience:
        epoch += 1
        module.train()
        for x, y in batches():
            with autocast():
                logits = module(x)
            optimiser.zero_grad()
            scaler.scale(LOSS[task](logits.float(), y)).backward()
            scaler.step(optimiser)
            scaler.update()
        module.eval()
        value = validate()
        if value > best:
            best, best_epoch, kept = value, epoch, {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module.load_state_dict(kept)
    return {"epochs": epoch, "best_epoch": best_epoch, "valid": best[0], "valid_loss": -best[1]}


def fit_probe(x, y, valid_x, valid_y, valid_clip, task="multilabel", hidden=0, batch_size=256, min_steps=500, seed=0,
              clip_score="sigmoid", **how):
    """Train a linear layer, or one hidden layer of ReLUs, on fixed features (sections 3.6 and 3.7) -> the module (n, D)
    -> (n, K) logits that was best in validation, and what `train` says.

    x (n, D), y (n, K) 0/1: training windows; valid_x (m, D), valid_y (m, K), valid_clip (m,): validation windows, and
    the clip each is of; min_steps: an epoch has at least so many (MagnaTagATune's has 731), so a small set is gone
    through several times in one; how: lr, weight_decay, patience, epochs of `train`.

    >>> x = torch.eye(4).repeat(50, 1)
    >>> probe, fit = fit_probe(x, x, x, x, np.arange(200), lr=0.1, epochs=1)
    >>> bool((probe(x).argmax(1) == x.argmax(1)).all())
    True
    """
    layers, sizes, threads = [], [x.shape[1], *[hidden] * (hidden > 0), y.shape[1]], torch.get_num_threads()
    generator, y, valid_y = torch.Generator().manual_seed(seed), y.float(), valid_y.float()
    for fan_in, fan_out in zip(sizes, sizes[1:]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        for parameter in layers[-2].parameters():  # torch's own start, but from this generator
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
    probe = nn.Sequential(*layers[:-1])

    def batches():
        for _ in range(math.ceil(min_steps / math.ceil(len(x) / batch_size))):
            for rows in torch.randperm(len(x), generator=generator).split(batch_size):
                yield x[rows], y[rows]
    try:
        torch.set_num_threads(1)  # steps so small lose more by threads that wait for each other than they gain
        return probe, train(probe, batches, lambda: validation(probe(valid_x), valid_y, valid_clip, task, clip_score),
                            task, **how)
    finally:
        torch.set_num_threads(threads)


def fit_lbfgs(x, y, valid_x, valid_y, valid_clip, task="multilabel", strengths=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), seed=0,
              clip_score="sigmoid"):
    """Logistic regression on standardised features, to the optimum: is the optimiser of `fit_probe` the bottleneck? The
    minimum of scikit-learn's LogisticRegression(C), for all tags at once, with the C that is best in validation; the
    standardisation is folded into the layer. Args and returns as `fit_probe`; the optimum needs no seed."""
    centre, scale, y, fits = x.mean(0), x.std(0).clamp_min(1e-6), y.float(), []
    z, layer, n = (x - centre) / scale, nn.Linear(x.shape[1], y.shape[1]), y.numel() if task == "multilabel" else len(y)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    for strength in strengths:  # each from the optimum of the one before
        optimiser = torch.optim.LBFGS(layer.parameters(), 1, 1000, None, 1e-7, 1e-10, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            value = LOSS[task](layer(z), y) + layer.weight.square().sum() / (2 * strength * n)
            value.backward()
            return value
        optimiser.step(closure)
        probe = nn.Sequential(nn.Linear(x.shape[1], y.shape[1]))
        with torch.no_grad():
            probe[0].weight.copy_(layer.weight / scale)
            probe[0].bias.copy_(layer.bias - probe[0].weight @ centre)
            value = validation(probe(valid_x), valid_y.float(), valid_clip, task, clip_score)
        fits.append((value, probe, {"strength": strength, "valid": value[0], "valid_loss": -value[1]}))
    return max(fits, key=lambda fit: fit[0])[1:]


def load_probe(path, read=partial(torch.load, map_location="cpu", weights_only=True)):
    """A probe of the authors (0.weight or model.0.weight, ...; flat or in state_dict) as a `fit` without training. Its
    outputs must be the data's tags in the same order. read(path) -> dict: `model.read_checkpoint` reads Lightning's."""
    state = read(path)
    state = {key.split("model.")[-1]: value for key, value in state.get("state_dict", state).items()}
    sizes = [state[key].shape for key in ("0.weight", "2.weight") if key in state]
    layers = [layer for fan_out, fan_in in sizes for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())]
    probe = nn.Sequential(*layers[:-1]).requires_grad_(False)
    probe.load_state_dict({key: value for key, value in state.items() if key[:1].isdigit()})

    def fit(x, y, valid_x, valid_y, valid_clip, task, seed=0, clip_score="sigmoid"):
        if not sizes or (sizes[0][1], sizes[-1][0]) != (x.shape[1], y.shape[1]):
            raise ValueError(f"{path} is no probe from {x.shape[1]} features to {y.shape[1]} tags (it has {sizes})")
        return probe, {"valid": validation(probe(valid_x), valid_y.float(), valid_clip, task, clip_score)[0]}
    return fit


# -------------------------------------------------------------------------------------------------------------- metrics

def clip_scores(logits, clip, n_clips, task="multilabel", clip_score="sigmoid"):
    """The score of a clip, the mean over its windows (section 4.1): logits (n, K), clip (n,) in 0 .. n_clips - 1 ->
    (n_clips, K) float64. clip_score: `sigmoid`, the mean probability; `logit`, the probability of the mean logit."""
    link = torch.sigmoid if task == "multilabel" else lambda x: x.softmax(1)
    values, clip = torch.as_tensor(logits).detach().cpu().double(), torch.as_tensor(clip).cpu()
    values = link(values) if clip_score == "sigmoid" else values
    mean = torch.zeros(n_clips, values.shape[1], dtype=torch.float64).index_add_(0, clip, values)
    mean /= torch.bincount(clip, minlength=n_clips)[:, None]
    return (mean if clip_score == "sigmoid" else link(mean)).numpy()


@np.errstate(divide="ignore", invalid="ignore")
def rank_metrics(scores, labels, weights=None):
    """ROC-AUC and average precision of each row, with ties and weights as in scikit-learn, for all rows at once.

    scores, labels (R, N) -> roc_auc, pr_auc, each (R,) float64, NaN where positives or negatives are missing. With
    weights (B, N) and R = 1: a result for each weighting, (B,).

    >>> rank_metrics(np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([[0, 0, 1, 1]]))
    (array([0.75]), array([0.83333333]))
    """
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")
    weights = np.ones(order.shape) if weights is None else np.asarray(weights, np.float64)
    s, y, w = (np.take_along_axis(np.asarray(a), order, -1) for a in (scores, labels, weights))
    # equal scores pass a threshold together, so what counts at each place is the sum up to the end of its ties
    last = np.concatenate([s[:, 1:] != s[:, :-1], np.ones((len(s), 1), bool)], 1)
    end = np.minimum.accumulate(np.where(last, np.arange(s.shape[1]), s.shape[1])[:, ::-1], 1)[:, ::-1]
    positive, negative = w * (y > 0), w * ~(y > 0)
    tp, fp = (np.take_along_axis(np.cumsum(a, 1), end, 1) for a in (positive, negative))
    p, n = positive.sum(1), negative.sum(1)
    # pairs won, counted from the negatives (ties in) and from the positives (ties out): the mean halves the ties
    roc = ((negative * tp).sum(1) + (positive * (n[:, None] - fp)).sum(1)) / (2 * p * n)
    pr = (positive * tp / np.maximum(tp + fp, 1e-300)).sum(1) / p
    return roc, np.where(n > 0, pr, np.nan)


@np.errstate(invalid="ignore")
def score(scores, labels, task="multilabel", weights=None):
    """Metrics of clip scores (N, K), probabilities or anything in the same order, and labels (N, K) 0/1 (section 4.1).

    Returns: multilabel: roc_auc, pr_auc (average precision), the means over tags, clip_roc_auc, clip_pr_auc, the means
        over clips, tag_roc_auc, tag (K,: PR-AUC), tags_left_out, clips_left_out; singlelabel: accuracy, tag (K,:
        recall), confusion (K, K), a row is a true label. What does not exist (no positive, no negative) is NaN, and
        left out of the means. With weights of the clips (B, N): B of each, no counts.
    Raises: ValueError: shapes that differ, no clip, or scores that are NaN.

    >>> score(np.eye(3), np.eye(3, dtype=int), "singlelabel")["accuracy"].item()
    1.0
    """
    scores, labels = (np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x, np.float64)
                      for x in (scores, labels))
    if scores.shape != labels.shape or scores.ndim != 2 or not len(scores):
        raise ValueError(f"expected scores and labels of one shape (N, K); got {scores.shape} and {labels.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).any(1).sum())} of {len(scores)} clips have NaN scores")
    w, k = np.ones((1, len(scores))) if weights is None else weights, labels.shape[1]
    if task == "singlelabel":
        truth, guess = labels.argmax(1), scores.argmax(1)
        right = labels * (truth == guess)[:, None]
        result = {"accuracy": w @ right.sum(1) / w.sum(1), "tag": w @ right / (w @ labels)}
        counts = {"confusion": np.bincount(truth * k + guess, minlength=k * k).reshape(k, k)}
    else:
        roc, pr = tags = np.empty((2, len(w), k))
        for j, i in itertools.product(range(k), range(0, len(w), 64)):  # blocks of resamples that stay in the cache
            tags[:, i : i + 64, j] = rank_metrics(scores[None, :, j], labels[None, :, j], w[i : i + 64])
        result = {"roc_auc": mean(roc), "pr_auc": mean(pr), "tag_roc_auc": roc, "tag": pr}
        for name, values in zip(("clip_roc_auc", "clip_pr_auc"), rank_metrics(scores, labels)):
            result[name] = w @ np.nan_to_num(values) / (w @ ~np.isnan(values))
        counts = {f"{what}_left_out": int((labels.min(axis) == labels.max(axis)).sum())
                  for axis, what in enumerate(("tags", "clips"))}
    return result if weights is not None else {**{name: value[0] for name, value in result.items()}, **counts}


@np.errstate(invalid="ignore")
def mean(values, axis=-1):
    """The mean of what is not NaN; NaN, without a warning, where all is."""
    return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)


def interval(draws, value):
    """95 % interval from draws (n, ...) of a value (...) -> (2, ...): their middle 95 %, moved by the distance of their
    mean from the value, since average precision is on average larger in a resample, where songs occur twice."""
    known = np.where(np.isnan(draws).all(0), 0, draws)  # or numpy warns of a tag that was left out; its mean is NaN
    return np.nanquantile(known, (0.025, 0.975), axis=0) - mean(draws, 0) + value


def bootstrap(scores, labels, group, task="multilabel", n=1000, seed=0):
    """Resample the test songs, group (N,), with replacement (clips of a song stay together); take all metrics again:
    scores (S, N, K) of S seeds, labels (N, K) -> {metric: (n,)}, the mean of the seeds; `tag` (n, K). The same data and
    seed give the same resamples, so two encoders can be compared resample by resample."""
    song = np.unique(group, return_inverse=True)[1].reshape(-1)
    share = np.full(song.max() + 1, 1 / (song.max() + 1))
    weights = np.random.default_rng([seed, 3]).multinomial(len(share), share, n)[:, song].astype(np.float64)  # (n, N)
    runs = [score(s, labels, task, weights) for s in scores]
    return {name: np.mean([run[name] for run in runs], 0) for name in runs[0]}


# ------------------------------------------------------------------------------------------------------------- protocol

def usable(clips, size):
    """{split: its windows (n,), as indices into those of `windows(clips.length, size)`}, {split: counts}."""
    clip, rows, counts = windows(clips.length, size)[0], {}, {}
    labelled, long = (clips.labels.sum(1) == 1) | (clips.task != "singlelabel"), clips.length >= size
    for i, split in enumerate(("train", "valid", "test")):
        here = clips.split == i
        good = here & labelled & long
        rows[split] = np.flatnonzero(good[clip])
        counts[split] = {"clips": int(good.sum()), "songs": len(set(clips.group[good])), "windows": len(rows[split]),
                         "too_short": int((here & ~long).sum()), "without_label": int((here & ~labelled).sum())}
        if not good.any():
            raise ValueError(f"{clips.name}: no usable clip in {split} ({counts[split]}); it takes train, valid, test")
    return rows, counts


def network_on(build, clips, rows, mode="balanced", batch_size=48, min_steps=100, autocast=contextlib.nullcontext,
               clip_score="sigmoid", **options):
    """For `evaluate`: encoder and layer trained together (section 4.3), the supervised baseline, or fine-tuning.
    build(seed): the encoder to start from. An epoch is one random window of every clip (of mode v1 its windows), drawn
    anew until there are min_steps steps: 540 clips make 11, after which no validation score says anything yet."""
    labels = torch.from_numpy(clips.labels).float()

    def run(chosen, seed):
        encoder, rng = build(seed), np.random.default_rng([seed, 2])
        size, device = encoder.input_samples, next(encoder.parameters()).device
        clip, start = windows(clips.length, size)
        examples, valid = clip[chosen] if mode == "v1" else np.unique(clip[chosen]), clip[rows["valid"]]

        def batches():
            for _ in range(math.ceil(min_steps / max(1, len(examples) // batch_size))):
                begin = start[chosen] if mode == "v1" else rng.integers(0, clips.length[examples] - size + 1)
                order = rng.permutation(len(examples))
                order = order[: len(order) // batch_size * batch_size or len(order)]  # a short batch has odd statistics
                y = labels[examples[order]].to(device).split(batch_size)
                yield from zip((x.to(device) for x in crops(clips, examples[order], begin[order], size, batch_size)), y)

        def logits(split):
            with autocast():
                return embed(network, crops(clips, clip[rows[split]], start[rows[split]], size))

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(encoder, nn.Dropout(0.5), nn.Linear(encoder.out_dim, labels.shape[1])).to(device)
            info = train(
                network, batches, lambda: validation(logits("valid"), labels[valid], valid, clips.task, clip_score),
                clips.task, autocast=autocast, **options)
        return network, info, logits("test")
    return run


def evaluate(fit, clips, size, fractions=(1.0,), seeds=(0,), mode="balanced", clip_score="sigmoid", resamples=1000):
    """The protocol at the head of this file -> one dict per fraction: mean, std, interval of each metric; per_tag; runs
    (per seed: what was kept, how training went, every metric). Keys that begin with _ are not for the JSON.

    fit(training windows, seed) -> the trained module, a dict that says how training went, the logits of the test
    windows. clips: all of a prepared data set. size: samples of a window."""
    clip, rows, y, results = windows(clips.length, size)[0], usable(clips, size)[0], clips.labels, []
    test, where = np.unique(clip[rows["test"]], return_inverse=True)
    unit = rows["train"] if mode == "v1" else clip[rows["train"]]  # what is drawn: windows, or clips
    units, first = np.unique(unit, return_index=True)
    for fraction in fractions:
        runs = []
        for seed in seeds:
            drawn = units[take_fraction(y[clip[rows["train"][first]]], fraction, seed, mode)]
            chosen = rows["train"][np.isin(unit, drawn)]
            module, info, logits = fit(chosen, seed)
            kept, scores = np.unique(clip[chosen]), clip_scores(logits, where, len(test), clips.task, clip_score)
            runs.append({"seed": seed, "clips": len(kept), "songs": len(set(clips.group[kept])), "windows": len(chosen),
                         "positives": y[kept].sum(0, dtype=int), **info, **score(scores, y[test], clips.task),
                         "_scores": scores, "_module": module})
        scores = [run["_scores"] for run in runs]
        draws = bootstrap(scores, y[test], clips.group[test], clips.task, resamples)
        each = {name: np.stack([run[name] for run in runs]) for name in (*METRICS[clips.task], "tag")}
        value = {name: mean(each[name], 0) for name in each}
        span = {name: interval(draws[name], value[name]).clip(0, 1) for name in each}
        varied = any((scores[0] != other).any() for other in scores[1:])  # a fit to the optimum is the same each time
        per_tag = [{"positives": n, "value": v, "interval": s}
                   for n, v, s in zip(y[test].sum(0, dtype=int), value.pop("tag"), span.pop("tag").T)]
        results.append({
            "fraction": fraction, "mean": value, "interval": span, "per_tag": dict(zip(clips.tags, per_tag)),
            "std": {name: each[name].std(ddof=1) if varied else None for name in value}, "runs": runs,
            "_draws": draws, "_scores": np.mean(scores, 0),
            "_module": max(runs, key=lambda run: run["valid"])["_module"]})
    return results


def cell(row, metric):
    """A metric in percent: mean, standard deviation over seeds, interval: 77.3 ± 0.2 [75.0, 79.0]."""
    value, std, (low, high) = (row[key][metric] for key in ("mean", "std", "interval"))
    spread = "" if std is None else f" ± {100 * std:.1f}"
    return f"{100 * value:.1f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def to_json(result):
    """A result as text: arrays as lists, NaN as null, floats to six digits, without what is not for a file."""
    def kept(x):  # first: the features alone may be gigabytes
        if isinstance(x, dict):
            return {k: kept(v) for k, v in x.items() if k not in IN_MEMORY}
        return [kept(v) for v in x] if isinstance(x, (list, tuple)) else x
    text = json.dumps(kept(result), default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    text = json.loads(text, parse_constant=lambda _: None, parse_float=lambda x: float(f"{float(x):.6g}"))
    return json.dumps(text, indent=1, ensure_ascii=False) + "\n"


def table(result):
    """The markdown of a result: its `caption`, and its `table`, a list of {column: text}."""
    columns = list(dict.fromkeys(column for row in result["table"] for column in row))
    lines = [columns, ["---"] * len(columns)] + [[str(row.get(c, "")) for c in columns] for row in result["table"]]
    lines = [result.get("caption", ""), "", *("| " + " | ".join(line) + " |" for line in lines)]
    return "\n".join(lines).strip() + "\n"


# -------------------------------------------------------------------------------------------------------------- program

def pooled(kind, sizes, pool):
    """An encoder's sizes with another pooling of its contexts, which CPC alone has."""
    if pool and kind != "cpc":
        raise ValueError(f"--pool is for the contexts of CPC; this encoder is {kind}: leave it out")
    return {**sizes, "pool": pool} if pool else sizes


def trained_on(info, load, name=None):
    """The prepared data to evaluate on: of that name, or what the encoder with this info was trained on, in its folder or
    under its name, where a folder with the fingerprint it was trained on goes first. load(name) -> clips, or
    ValueError or OSError, which is raised where none can be had."""
    names = [name] if name else [n for n in dict.fromkeys([info.get("data_folder"), info.get("data")]) if n] or ["NAME"]
    found = []
    for n in names:
        try:
            found.append(load(n))
        except (ValueError, OSError) as error:  # another one's folder, perhaps, that may not be read here
            missing = error
    if not found:
        raise missing
    return next((clips for clips in found if clips.fingerprint == info.get("fingerprint")), found[0])


def require_fit(info, clips):
    """ValueError where an encoder, by its info, cannot be evaluated on the clips."""
    if clips.task == "none":
        raise ValueError(f"{clips.name} has no labels: expected tagged data, e.g. prepared with --labels FILE.csv")
    if info.get("sample_rate") not in (None, clips.sample_rate):
        raise ValueError(f"the encoder works at {info['sample_rate']} Hz, {clips.name} is at {clips.sample_rate} Hz: "
                         f"prepare it again with --sample-rate {info['sample_rate']}")


def run(args, clips, encoder, info, model):
    """All that the flags ask of one encoder and one data set -> the metrics JSON as a dict. model: model.py."""
    require_fit(info, clips)
    device, names, kept, before = model.choose_device(args.device), METRICS[clips.task], {}, {}
    kind = info.get("encoder", args.encoder)
    sizes = pooled(kind, info.get("sizes", {"width": args.width}), args.pool)

    def build(seed, state):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            new = model.build_encoder(kind, **sizes)
        new.load_state_dict(state or new.state_dict())
        return new.eval()

    def features(new):
        """Of all windows (n, D), on the CPU. They are kept in a file, named after everything that they depend on."""
        amp, before[new] = model.choose_amp(device, args.amp), model.weights_sha256(new)
        key = json.dumps([before[new], new.name, new.sizes, clips.fingerprint, amp]).encode()
        cache = clips.folder / "features" / f"{hashlib.sha256(key).hexdigest()[:24]}.npz"
        with contextlib.suppress(Exception):  # what cannot be read is computed again
            return torch.from_numpy(np.load(cache)["h"])
        fast = model.fold_batch_norm(new).to(device, DTYPE[amp])
        h = embed(fast, crops(clips, clip, start, size, 16 if device.type == "cpu" else 256))
        with contextlib.suppress(OSError):  # where the data is read-only, each time
            cache.parent.mkdir(exist_ok=True)
            np.savez(cache.with_suffix(".partial.npz"), h=h)
            cache.with_suffix(".partial.npz").replace(cache)
        return h

    state = encoder and encoder.state_dict()
    base = build(args.seed, state)
    size = base.input_samples
    (rows, counts), (clip, start) = usable(clips, size), windows(clips.length, size)
    both = {"lr": args.lr, "weight_decay": args.weight_decay, "patience": args.patience, "epochs": args.epochs}
    head, fit = f"hidden {args.hidden}" if args.hidden else "linear", partial(
        fit_probe, hidden=args.hidden, min_steps=args.min_steps or 500, batch_size=args.batch_size or 256, **both)
    if args.head or args.probe == "lbfgs":
        head, fit = (args.head.name, load_probe(args.head, model.read_checkpoint)) if args.head else ("lbfgs", fit_lbfgs)
    if encoder:
        kept[f"{info.get('method')}, {info.get('step') or 0:,d} steps"] = features(base)
    if args.random:
        kept["untrained"] = features(build(args.seed, None))
    y, valid = torch.from_numpy(clips.labels)[clip], rows["valid"]

    def on_features(h, chosen, seed):
        probe, said = fit(h[chosen], y[chosen], h[valid], y[valid], clip[valid], clips.task, seed=seed,
                          clip_score=args.clip_score)
        return probe, said, probe(h[rows["test"]])

    jobs = [(label, head, partial(on_features, h)) for label, h in kept.items()]
    for label, wanted, begin in (("supervised", args.supervised, None), ("fine-tuned", args.finetune, state)):
        if wanted:
            jobs.append((label, "end to end", network_on(
                lambda seed, begin=begin: build(seed, begin).to(device), clips, rows, args.fraction_mode,
                args.batch_size or 48, args.min_steps or 100, lambda: model.autocast(device, args.amp), args.clip_score,
                half=model.choose_amp(device, args.amp) == "fp16", **both)))
    how = args.fraction, range(args.seed, args.seed + args.seeds), args.fraction_mode, args.clip_score, args.bootstrap
    results = [{"model": label, "probe": probe, **result} for label, probe, trained in jobs
               for result in evaluate(trained, clips, size, *how)]
    if any(model.weights_sha256(new) != sha256 for new, sha256 in before.items()):
        raise RuntimeError("an encoder changed while it was evaluated: these are not the numbers of a frozen encoder")
    control = {r["fraction"]: r for r in results if r["model"] == "untrained"}
    for r in results:
        if r["model"] != "untrained" and control:
            other = control[r["fraction"]]
            less = {m: r["mean"][m] - other["mean"][m] for m in names}
            span = {m: interval(r["_draws"][m] - other["_draws"][m], less[m]) for m in names}
            r["over_untrained"] = {m: {"mean": less[m], "interval": span[m]} for m in names}
    counted, split = " / ".join(str(c["clips"]) for c in counts.values()), clips.meta.get("split_name")
    lines = [{"model": r["model"], "probe": r["probe"],
              "labels": f"{100 * r['fraction']:g} % ({r['runs'][0]['clips']:,d} clips)",
              **{text: cell(r, m) for m, text in names.items()}} for r in results]
    caption = (f"{clips.name}, {counted} clips to train / validate / test ({split}). In percent: mean ± standard "
               f"deviation over {args.seeds} seeds, [95 % interval over test songs].")
    return {
        "kind": "evaluate", "caption": caption, "table": lines,
        "data": {"name": clips.name, "split": split, "counts": counts, "tags": clips.tags, "task": clips.task,
                 "fingerprint": clips.fingerprint},
        "encoder": {**info, "encoder": kind, "sizes": sizes, "sha256": list(before.values()), "unchanged": True},
        "versions": {**model.versions(), "numpy": np.__version__}, "code": model.code_version(), "device": str(device),
        "protocol": vars(args), "results": results, "_encoder": base, "_features": list(kept.values())}


@torch.no_grad()
def frames(net, pieces, hop=None):
    """Audio in pieces (T,), as `prepare.stream` gives it -> of its windows, one every `hop` seconds: rows (n, D or K),
    starts (n,) in seconds; and whether it is shorter than a window, and was padded with silence. net: with `frames`,
    `sample_rate`, `input_samples`, as encoder.ts has. This takes the memory of a piece, whatever the length."""
    size, like, audio, ahead, rows = net.input_samples, next(net.parameters()), torch.zeros(0), 0, []
    step = size if hop is None else max(1, round(hop * net.sample_rate))

    def of(audio):
        return net.frames(audio[None, None].to(like), step)[0].float().cpu().numpy()
    for piece in pieces:
        audio, ahead = torch.cat([audio, piece[ahead:]]), max(0, ahead - len(piece))
        if len(audio) >= size:
            rows.append(of(audio))
            done = len(rows[-1]) * step  # where the next window starts: with a hop above a window, perhaps further on
            audio, ahead = audio[done:], max(0, done - len(audio))
    short = not rows
    rows = np.concatenate(rows or [of(F.pad(audio, (0, size - len(audio))))])
    return rows, np.arange(len(rows)) * step / net.sample_rate, short


def tags_over_time(path, rows, starts, tags, seconds):
    """A picture of the probabilities rows (n, K) of K tags over time; seconds: of a window."""
    from matplotlib.figure import Figure
    axes = (figure := Figure((10, 0.3 * len(tags) + 1), layout="constrained")).add_subplot()
    extent = (0, starts[-1] + seconds, len(tags) - 0.5, -0.5)
    figure.colorbar(axes.imshow(rows.T, aspect="auto", vmin=0, extent=extent), label="probability")
    axes.set(yticks=range(len(tags)), yticklabels=tags, xlabel="seconds")
    axes.set_title(path.stem, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def take_home(args, prepare, model):
    """--embed: OUT/NAME.npz for every file, and every audio file of every folder; --tag: top tags -> the exit code."""
    device, jobs, failed, before = model.choose_device(args.device), {}, [], 0
    if args.ckpt.suffix == ".ts":
        net = torch.jit.load(args.ckpt, map_location=device)
    else:
        encoder, info = model.load_encoder(args.ckpt)
        state, encoder = encoder.state_dict(), model.build_encoder(
            encoder.name, **pooled(encoder.name, encoder.sizes, args.pool)).eval()
        encoder.load_state_dict(state)
        net = model.Exported(model.fold_batch_norm(encoder), info["sample_rate"] or prepare.SAMPLE_RATE)
        net.to(device, DTYPE[model.choose_amp(device, args.amp)]).eval()
    if args.tag and not net.tags:
        raise ValueError(f"{args.ckpt} knows no tags: expected a tagger.ts, which an evaluation leaves")
    if args.embed and net.tags:
        raise ValueError(f"{args.ckpt} gives tags, not embeddings: expected an encoder.pt or encoder.ts")
    if args.plot and len({file.name for file in args.tag}) < len(args.tag):
        raise ValueError("--plot: two of the files have one name, and so would their pictures: tag them one by one, each with an --out")
    for file in args.tag or ():
        try:
            rows, starts, short = frames(net, prepare.stream(file, net.sample_rate), args.hop)
        except (ValueError, OSError) as error:
            failed.append(f"failed: {error}")
            continue
        best = rows.mean(0).argsort()[::-1][:10]
        print(f"{file}{', shorter than a window, padded with silence' * short}",
              *(f"  {rows[:, k].mean():6.1%}  {net.tags[k]}" for k in best), sep="\n")
        if args.plot:
            tags_over_time((args.out or Path()) / f"{file.name}.png", rows[:, best], starts,
                           [net.tags[k] for k in best], net.input_samples / net.sample_rate)
    for path in args.embed or ():
        for name, file in (prepare.audio_files(path) if path.is_dir() else {path.name: path}).items():
            target = (args.out or Path("embeddings")) / f"{name}.npz"
            if jobs.setdefault(target, file) != file:
                raise ValueError(f"{jobs[target]} and {file} would both become {target}: give each an --out of its own")
    sha256 = model.weights_sha256(net)
    for target, file in jobs.items():
        try:
            source = [sha256, args.hop, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]  # what the rows depend on
            source = json.dumps(source + [args.pool] * bool(args.pool))
            if target.exists() and not args.overwrite:
                was = None
                with contextlib.suppress(ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(target) as old:
                    was = str(old["source"])
                if was != source:
                    raise ValueError(f"{target} is damaged, or of another recording, encoder, --hop or --pool; type --overwrite, "
                                     "or another --out")
                before += 1
                continue
            rows, starts, short = frames(net, prepare.stream(file, net.sample_rate), args.hop)
        except (ValueError, OSError) as error:
            failed.append(f"failed: {error}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        np.savez(target.with_suffix(".partial.npz"), embedding=rows, timestamps=starts, source=source)
        target.with_suffix(".partial.npz").replace(target)
        print(f"{target} {rows.shape}{', shorter than a window, padded with silence' * short}")
    said = [f"{len(jobs) - len(failed)} of {len(jobs)} files embedded, {before} of them before"] if jobs else []
    for line in [*said, *failed]:
        print(line)
    return int(len(failed) > 0)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate a frozen encoder; embed or tag files.", allow_abbrev=False,
        usage="python evaluate.py --ckpt FILE [--data NAME] [options]   (all of them: --help)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", help="prepared data: a name under data/ or a path (default: what the encoder was trained on)")
    add("--fraction", type=float, nargs="+", default=[1.0], metavar="F", help="shares of the training labels in (0, 1]")
    add("--fraction-mode", choices=["balanced", "v1"], default="balanced", help="v1: the released code's rule")
    add("--embed", nargs="+", type=Path, metavar="PATH", help="instead: features of files and folders, into --out")
    add("--tag", nargs="+", type=Path, metavar="FILE", help="instead: the tags of these files, by a tagger.ts")
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=Path, metavar="FILE", help="encoder.pt; with --embed also encoder.ts, with --tag tagger.ts")
    add("--encoder", default="samplecnn", help="without --ckpt: what --random and --supervised build")
    add("--width", type=float, default=1.0, help="without --ckpt: factor on all its channels")
    add("--head", type=Path, metavar="FILE", help="a trained probe of the authors, instead of training one")
    add("--pool", choices=["mean", "mean+last"], help="CPC: what of the contexts is the feature")
    add("--random", action="store_true", help="also the same probe on an untrained encoder")
    add("--supervised", action="store_true", help="also encoder and layer trained together, from the start")
    add("--finetune", action="store_true", help="also encoder and layer trained together, from --ckpt")
    add = parser.add_argument_group("optimisation").add_argument
    add("--probe", choices=["adam", "lbfgs"], default="adam", help="lbfgs: logistic regression, standardised features")
    add("--hidden", type=int, default=0, metavar="N", help="units of a hidden layer in the probe; 0: a linear probe")
    add("--lr", type=float, default=3e-4, help="Adam's learning rate")
    add("--weight-decay", type=float, default=1e-6, help="Adam's weight decay")
    add("--patience", type=int, default=5, metavar="N", help="epochs without a better validation score before it stops")
    add("--epochs", type=int, default=1000, metavar="N", help="the most epochs")
    add("--min-steps", type=int, metavar="N", help="steps that an epoch has at least (default: 500, a network's 100)")
    add("--batch-size", type=int, metavar="N", help="windows per step (default: probes 256, networks 48)")
    add("--clip-score", choices=["sigmoid", "logit"], default="sigmoid", help="mean of probabilities or logits")
    add = parser.add_argument_group("run").add_argument
    add("--seeds", type=int, default=3, metavar="N", help="how many seeds")
    add("--seed", type=int, default=0, help="the first of them")
    add("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the test songs")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the encoder runs")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="off", help="precision of the encoder; off: float32")
    add("--out", type=Path, metavar="PATH", help="metrics JSON (default: beside --ckpt); --embed, --tag: a folder")
    add("--export", type=Path, metavar="DIR", help="for encoder.ts, encoder.pt2, tagger.ts (default: beside --ckpt)")
    add("--hop", type=float, metavar="S", help="--embed, --tag: seconds from window to window (default: a window)")
    add("--overwrite", action="store_true", help="--embed: also files that are embedded already")
    add("--plot", action="store_true", help="--tag: also a picture over time, FILE.png in --out")
    return parser


def main(argv=None):
    import model
    import prepare
    model.tune_allocator()
    parser = build_parser()
    args = parser.parse_args(argv)
    paths = (args.ckpt, args.head, *(args.embed or ()), *(args.tag or ()))
    missing = [str(path) for path in paths if path and not path.exists()]
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    numbers = [getattr(args, name) for name in ("seeds", "patience", "epochs", "min_steps", "batch_size", "bootstrap")]
    for wrong, what in (
            (missing, f"{', '.join(missing)}: no such file"),
            (not (args.ckpt or args.random or args.supervised), "type --ckpt runs/NAME/encoder.pt"),
            (not args.ckpt and (args.finetune or args.embed or args.tag), "--finetune, --embed and --tag need --ckpt"),
            (not all(0 < f <= 1 for f in args.fraction), "--fraction is in (0, 1], e.g. --fraction 0.01 0.1 1"),
            (args.hidden and args.probe == "lbfgs", "--probe lbfgs is a linear probe: leave out --hidden"),
            (args.head and given & {"hidden", "probe"}, "--head is a probe already: leave out --hidden and --probe"),
            (args.encoder not in model.ENCODERS, f"--encoder: there are {', '.join(model.ENCODERS)}"),
            (args.ckpt and given & {"encoder", "width"}, "--ckpt says what encoder it is: leave out --encoder, --width"),
            (args.hop is not None and not 0 < args.hop < math.inf, "--hop is in seconds, above 0"),
            ("hop" in given and not (args.embed or args.tag), "--hop goes with --embed and --tag"),
            (args.overwrite and not args.embed, "--overwrite goes with --embed"),
            (args.plot and not args.tag, "--plot goes with --tag; results: transfer.py --results FILE --plots DIR"),
            (args.out and args.out.is_dir() and not (args.embed or args.tag), f"--out: {args.out} is a folder"),
            (min(args.hidden + 1, *(n for n in numbers if n is not None)) < 1, "--seeds, --epochs ... are at least 1")):
        if wrong:
            parser.error(what)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's stream
            stream.reconfigure(errors="backslashreplace")  # file names in any encoding
    try:
        if args.embed or args.tag:
            return take_home(args, prepare, model)
        encoder, info = model.load_encoder(args.ckpt) if args.ckpt else (None, {})
        try:
            clips = trained_on(info, lambda name: prepare.Clips(prepare.find(name)), args.data)
        except FileNotFoundError as error:
            parser.error(f"--data {error}")
        result = run(args, clips, encoder, info, model)
        result["argv"] = ["evaluate.py", *(sys.argv[1:] if argv is None else argv)]
        # beside the checkpoint of a run; a file from elsewhere, as those in demo/, stays as it is
        home = Path("runs", f"{args.ckpt.resolve().parent.name}-{args.ckpt.stem}") if args.ckpt else Path("runs")
        home = args.ckpt.parent if args.ckpt and (args.ckpt.parent / "log.jsonl").exists() else home
        flags = [f"hidden{args.hidden}"] * (args.hidden > 0) + ["lbfgs"] * (args.probe == "lbfgs")
        flags += ["f" + "-".join(f"{f:g}" for f in args.fraction)] * (args.fraction != [1.0])
        flags += [name for name in ("supervised", "finetune") if getattr(args, name)]
        flags += [f"{name}-{value.stem if isinstance(value, Path) else value}".replace("_", "-") for name, value in vars(args).items()
                  if name in given & {"fraction_mode", "encoder", "width", "head", "pool", "lr", "weight_decay", "patience", "epochs",
                                      "min_steps", "batch_size", "clip_score", "seed", "amp"}]
        out, folder = args.out or home / f"{'-'.join(['evaluate', clips.name, *flags])}.json", args.export or home
        folder = folder / f"pool-{args.pool}" if args.pool and not args.export else folder  # another length of features
        model.write_atomically(out, to_json(result).encode())
        print(f"{table(result)}\n{out}")
        if encoder:
            probed = result["results"][: len(args.fraction)]  # the first rows are this encoder's
            head = max(probed, key=lambda r: r["fraction"])["_module"]
            what = {"encoder": result["_encoder"], "sample_rate": clips.sample_rate,
                    "info": {"data": clips.name, "fingerprint": clips.fingerprint}}
            model.export_torchscript(path=folder / "encoder.ts", **what)
            model.export_program(path=folder / "encoder.pt2", **what)
            print(folder / "encoder.ts", folder / "encoder.pt2", sep="\n")
            if 1.0 in args.fraction or args.export:  # one trained on fewer labels must not replace it unasked
                model.export_torchscript(path=folder / "tagger.ts", head=head, tags=clips.tags, task=clips.task, **what)
                print(folder / "tagger.ts")
        return 0
    except KeyboardInterrupt:
        print("evaluate.py: interrupted; features that were computed are kept", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evaluate.py: error: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
