"""Evaluate a frozen encoder as the paper does (CLMR, ISMIR 2021, sections 3.6, 3.7 and 4).

    python evaluate.py --ckpt runs/demo/encoder.pt --data demo --seeds 1             # a minute
    python evaluate.py --ckpt runs/mtat/encoder.pt --random --fraction 0.01 0.1 1    # and a control
    python evaluate.py --ckpt runs/mtat/encoder.pt --hidden 512                      # deeper probe
    python evaluate.py --data mtat --supervised --fraction 0.01                      # end to end

The protocol. Every clip is cut into all its non-overlapping full windows; the frozen encoder turns
each into features, once. A linear layer is trained on the windows of the training clips with Adam;
after each epoch the validation clips are scored, five epochs without a better score end it, the
best state is kept. A clip's score is the mean of its windows' probabilities. Test clips are scored
once, by the probe that was kept, for each seed; a seed draws the start, the order of windows and
the subset of `--fraction`. Reported, in [0, 1]: the metrics of `score`, mean and standard deviation
over seeds, a 95 % bootstrap interval over test songs, and the paired interval of the difference to
the untrained control (`--random`: one network, initialised from the first seed).

Leaves behind, in the run's folder (of another checkpoint: runs/ITS-NAME/) or where `--out` and
`--export` say: evaluate-DATA.json, with other flags evaluate-DATA-hidden-512.json, which explains
the numbers; encoder.ts, encoder.pt2, and, where all labels were used, tagger.ts; features in
data/NAME/features/. Pictures of results: transfer.py; tables in pages: results/tables.py.
"""
import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

SPLITS = {"train": "to train on", "valid": "to validate on", "test": "to test on"}
METRICS = {"multilabel": {"roc_auc": "ROC-AUC", "pr_auc": "PR-AUC",
                          "clip_roc_auc": "clip ROC", "clip_pr_auc": "clip PR"},
           "singlelabel": {"accuracy": "accuracy"}}
LOSS = {"multilabel": F.binary_cross_entropy_with_logits, "singlelabel": F.cross_entropy}
DTYPE = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

@dataclass(frozen=True)
class Protocol:
    """What is evaluated, and how: the flags of these names, whose help explains them."""
    fraction: tuple[float, ...] = (1.0,)
    fraction_mode: str = "balanced"
    random: bool = False
    supervised: bool = False
    probe: str = "adam"
    features: str = "last"
    features_from: tuple[Path, ...] = ()
    neighbours: int = 0
    hidden: int = 0
    lr: float = 3e-4
    weight_decay: float = 1e-6
    patience: int = 5
    epochs: int = 1000
    min_steps: int | None = None  # of an epoch; None: 500 of a probe, 100 of a network
    batch_size: int | None = None  # windows a step; None: 256 of a probe, 48 of a network
    seeds: int = 3
    seed: int = 0
    device: str = "auto"
    amp: str = "off"

@dataclass
class Windows:
    """Windows of clips: x, their features (n, D) or their starts (n,) in samples; y, labels (n, K)
    0/1; clip (n,), the clip each is of."""
    x: Tensor
    y: Tensor
    clip: np.ndarray

    def __getitem__(self, rows) -> "Windows":
        return Windows(self.x[rows], self.y[rows], self.clip[rows])

@dataclass
class Result:
    """The scores of one model and probe at one share of the labels. row: what a file holds of it.
    Besides: draws {metric: (resamples,)}; scores (N, K) of the test clips, the mean over seeds;
    module, the probe that was best in validation."""
    row: dict
    draws: dict
    scores: np.ndarray
    module: nn.Module

# ------------------------------------------------------------------------- windows and features

def windows(length, size: int, hop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where the full windows of clips lie (section 4.1): clip (n,) of each, start (n,).

        samples    0 1 2 3 4 5 6      length 7, size 3, hop 3 (by default the size)
        window 0  |0 1 2|
        window 1        |3 4 5|       sample 6 is left over; a clip shorter than a window has none

    length (N,), size, hop, start: in samples.

    >>> windows([7, 2, 6], 3)
    (array([0, 0, 2, 2]), array([0, 3, 0, 3]))
    """
    hop = hop or size
    length = np.asarray(length, np.int64).reshape(-1)
    count = np.maximum(0, (length - size) // hop + 1)
    clip = np.repeat(np.arange(len(length)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    return clip, (np.arange(len(clip)) - first) * hop

def cut(clips, size: int) -> dict[str, Windows]:
    """{split: the full windows of `size` samples of its labelled clips, their starts as x}."""
    clip, start = windows(clips.length, size)
    return by_split(clips, torch.from_numpy(start), clip)

def by_split(clips, x: Tensor, clip: np.ndarray) -> dict[str, Windows]:
    """{split: its windows}, from x (n, ...), of the clips (n,). ValueError for an empty one."""
    labelled = (clips.labels.sum(1) == 1) | (clips.task != "singlelabel")
    y = torch.from_numpy(clips.labels)
    found = {}
    for i, (split, purpose) in enumerate(SPLITS.items()):
        rows = np.flatnonzero((labelled & (clips.split == i))[clip])
        found[split] = Windows(x[rows], y[clip[rows]], clip[rows])
        if not len(rows):
            count = (clips.split == i).sum()
            raise ValueError(
                f"{clips.name} has no usable clip {purpose}: {count} are in this split, too short "
                "or without a label; prepare it again from longer files, or with a table that has "
                "a column `split` of train, valid and test")
    return found

def by_clip(data: Windows) -> Windows:
    """The mean of the features of each clip's windows."""
    clip, first, of = np.unique(data.clip, return_index=True, return_inverse=True)
    total = data.x.new_zeros(len(clip), data.x.shape[1]).index_add_(0, torch.from_numpy(of), data.x)
    return Windows(total / torch.from_numpy(np.bincount(of))[:, None], data.y[first], clip)

def crops(clips, data: Windows, size: int, batch_size: int = 16) -> Iterator[Tensor]:
    """The audio of windows, in batches (b, 1, size)."""
    parts = range(0, len(data.clip), batch_size)
    silent = sys.stderr is None or not sys.stderr.isatty()
    for i in tqdm(parts, "windows", unit="batch", leave=False, disable=silent):
        batch = data[i : i + batch_size]
        yield clips.crops(batch.clip, batch.x.numpy(), size)

@torch.no_grad()
def embed(encoder: nn.Module, batches: Iterable[Tensor], n: int | None = None) -> Tensor:
    """Features (n, D) of windows, batches (b, 1, T), of one tensor x `x.split(16)`; float32 on the
    CPU. The encoder is put into eval mode, and keeps its precision and device: no row depends on
    another. Where n is given, this takes no more memory than the features.

    >>> embed(nn.Sequential(nn.Flatten(), nn.Linear(8, 4)), torch.zeros(5, 1, 8).split(2)).shape
    torch.Size([5, 4])
    """
    like = next(encoder.eval().parameters())
    rows = (encoder(x.to(like)).float().cpu() for x in batches)
    if n is None:
        return torch.cat(list(rows))
    features = None
    done = 0
    for h in rows:
        features = h.new_empty(n, h.shape[1]) if features is None else features
        features[done : done + len(h)] = h
        done += len(h)
    return features

def take_fraction(labels, fraction: float, seed: int = 0, mode: str = "balanced") -> np.ndarray:
    """A subset (n,), ascending, of examples with labels (N, K) 0/1, in which every tag keeps its
    share (section 4.3). ValueError for a fraction outside (0, 1].

    balanced: put the examples in an order, each time by the next of the tag with the smallest share
        so far, the rarest first; while there are tags without any, by the example that serves most
        of them. The first round(fraction N) are the subset: those of one seed are nested. Examples
        with no tag, one, two ... keep their share like a tag.
    v1: the released code's rule: of each combination of tags max(1, int(fraction n)), at random.
        Its 1 % of the 187,060 windows of MagnaTagATune are 6,677.

    >>> np.eye(4, dtype=int).repeat(10, 0)[take_fraction(np.eye(4).repeat(10, 0), 0.2)].sum(0)
    array([2, 2, 2, 2])
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"a label fraction is in (0, 1], got {fraction}")
    labels = np.asarray(labels) > 0
    rng = np.random.default_rng([seed, 1])
    if mode == "v1":
        _, kind, count = np.unique(labels, axis=0, return_inverse=True, return_counts=True)
        order = rng.permutation(len(labels))
        order = order[np.argsort(kind.reshape(-1)[order], kind="stable")]  # by combination
        parts = np.split(order, np.cumsum(count)[:-1])
        return np.sort(np.concatenate([p[: max(1, int(fraction * len(p)))] for p in parts]))
    return np.sort(_in_balance(labels, max(1, round(fraction * len(labels))), rng))

def _in_balance(labels, n, rng):
    """The first n examples in the order of `take_fraction`."""
    n_tags = labels.shape[1]
    tags = labels.sum(1, keepdims=True)
    # examples with equally many tags are a class too, one that never goes before a tag
    classes = np.concatenate([labels, tags == np.unique(tags)], 1)
    total = classes.sum(0)
    rarity = np.where(np.arange(len(total)) < n_tags, total, len(labels))
    queues = [iter(rng.permutation(np.flatnonzero(column)).tolist()) for column in classes.T]
    count = np.zeros(len(total), int)
    taken = {}
    while len(taken) < n:
        share = np.where(count < total, count / np.maximum(total, 1), np.inf)
        k = np.lexsort((rarity, share))[0]
        if count[k]:
            i = next(i for i in queues[k] if i not in taken)
        else:
            candidates = rng.permutation(np.flatnonzero(classes[:, k]))
            i = candidates[labels[candidates][:, count[:n_tags] == 0].sum(1).argmax()]
        taken[int(i)] = True
        count += classes[i]
    return list(taken)

# --------------------------------------------------------------------------------------- probes

def validation(logits: Tensor, y: Tensor, clip, task: str) -> tuple[float, float]:
    """What training keeps the best of, from logits and labels (n, K) of windows of the clips (n,):
    the mean of their ROC-AUC and PR-AUC, or their accuracy; then minus the loss. Not the loss
    first: on small data it is lowest while a probe has learnt little but how frequent tags are."""
    loss = LOSS[task](logits, y.to(logits)).item()
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss became {loss}: try a smaller --lr, or --amp off")
    _, first, clip = np.unique(clip, return_index=True, return_inverse=True)
    metrics = score(clip_scores(logits, clip, len(first), task), y[first].numpy(), task)
    value = np.mean([metrics[name] for name in list(METRICS[task])[:2]])
    return float(np.nan_to_num(value)), -loss

def train(module: nn.Module, batches: Callable, validate: Callable, task: str, protocol: Protocol,
          autocast: Callable = contextlib.nullcontext, half: bool = False) -> dict:
    """Adam until `patience` epochs in a row have not bettered `validate()`; the module keeps its
    best state. batches(): the (x, y) of an epoch; validate(): as `validation`; half: autocast is to
    float16, so gradients are scaled. Returns {epochs, best_epoch, valid, valid_loss}."""
    optimiser = torch.optim.Adam(module.parameters(), lr=protocol.lr,
                                 weight_decay=protocol.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(enabled=half)
    best = (-math.inf,)
    epoch = best_epoch = 0
    while epoch < protocol.epochs and epoch - best_epoch < protocol.patience:
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
            best = value
            best_epoch = epoch
            state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    module.load_state_dict(state)
    return {"epochs": epoch, "best_epoch": best_epoch, "valid": best[0], "valid_loss": -best[1]}

def fit_probe(training: Windows, valid: Windows, task: str = "multilabel",
              protocol: Protocol = Protocol(), seed: int = 0) -> tuple[nn.Module, dict]:
    """Train a linear layer, or one hidden layer of ReLUs, on fixed features (sections 3.6, 3.7) ->
    the module (n, D) -> (n, K) logits that was best in validation, and what `train` says. An epoch
    has at least 500 steps (MagnaTagATune's 731), so a small set is gone through several times.

    >>> x = torch.eye(4).repeat(50, 1)
    >>> data = Windows(x, x, np.arange(200))
    >>> probe, _ = fit_probe(data, data, protocol=Protocol(lr=0.1, epochs=1))
    >>> bool((probe(x).argmax(1) == x.argmax(1)).all())
    True
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = [protocol.hidden] if protocol.hidden else []
    layers = []
    for fan_in, fan_out in itertools.pairwise([training.x.shape[1], *hidden, training.y.shape[1]]):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        for parameter in layers[-2].parameters():  # torch's own start, but from this generator
            nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
    probe = nn.Sequential(*layers[:-1])
    batch_size = protocol.batch_size or 256
    rounds = math.ceil((protocol.min_steps or 500) / math.ceil(len(training.x) / batch_size))

    def batches():
        for _ in range(rounds):
            for rows in torch.randperm(len(training.x), generator=generator).split(batch_size):
                yield training.x[rows], training.y[rows].float()

    def validate():
        return validation(probe(valid.x), valid.y, valid.clip, task)

    threads = torch.get_num_threads()
    try:
        # steps so small lose more by threads that wait for each other than they gain
        torch.set_num_threads(1)
        return probe, train(probe, batches, validate, task, protocol)
    finally:
        torch.set_num_threads(threads)

def fit_lbfgs(training: Windows, valid: Windows, task: str = "multilabel", protocol=None, seed=0,
              strengths=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)) -> tuple[nn.Module, dict]:
    """Logistic regression on standardised features, to the optimum: the minimum of scikit-learn's
    LogisticRegression(C), for all tags at once, with the strength C that is best in validation.
    Args and returns as `fit_probe` (the standardisation is folded into the layer); the optimum
    needs neither protocol nor seed."""
    centre = training.x.mean(0)
    scale = training.x.std(0).clamp_min(1e-6)
    z = (training.x - centre) / scale
    y = training.y.float()
    n = y.numel() if task == "multilabel" else len(y)
    layer = nn.Linear(z.shape[1], y.shape[1])
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    fits = []
    for strength in strengths:  # each from the optimum of the one before
        optimiser = torch.optim.LBFGS(layer.parameters(), 1, 1000, None, 1e-7, 1e-10,
                                      line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            value = LOSS[task](layer(z), y) + layer.weight.square().sum() / (2 * strength * n)
            value.backward()
            return value

        optimiser.step(closure)
        probe = nn.Sequential(nn.Linear(z.shape[1], y.shape[1]))
        with torch.no_grad():
            probe[0].weight.copy_(layer.weight / scale)
            probe[0].bias.copy_(layer.bias - probe[0].weight @ centre)
            value = validation(probe(valid.x), valid.y, valid.clip, task)
        info = {"strength": strength, "valid": value[0], "valid_loss": -value[1]}
        fits.append((value, probe, info))
    return max(fits, key=lambda fit: fit[0])[1:]

# -------------------------------------------------------------------------------------- metrics

def clip_scores(logits, clip, n_clips: int, task: str = "multilabel") -> np.ndarray:
    """The score of a clip, the mean probability of its windows (section 4.1): logits (n, K), clip
    (n,) in 0 .. n_clips - 1 -> (n_clips, K) float64."""
    values = torch.as_tensor(logits).detach().cpu().double()
    values = torch.sigmoid(values) if task == "multilabel" else values.softmax(1)
    clip = torch.as_tensor(clip).cpu()
    total = torch.zeros(n_clips, values.shape[1], dtype=torch.float64).index_add_(0, clip, values)
    return (total / torch.bincount(clip, minlength=n_clips)[:, None]).numpy()

@np.errstate(divide="ignore", invalid="ignore")
def rank_metrics(scores, labels) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC and average precision of each row, with ties as in scikit-learn, of all rows at once:
    scores, labels (R, N) -> roc_auc, pr_auc, each (R,) float64, NaN where positives or negatives
    are missing.

    >>> rank_metrics(np.array([[0.1, 0.4, 0.35, 0.8]]), np.array([[0, 0, 1, 1]]))
    (array([0.75]), array([0.83333333]))
    """
    order = np.argsort(-np.asarray(scores, np.float64), axis=-1, kind="stable")
    falling = np.take_along_axis(np.asarray(scores), order, -1)
    positive = np.take_along_axis(np.asarray(labels), order, -1) > 0
    size = falling.shape[1]
    # equal scores pass a threshold together: what counts at each place is the sum up to their end
    last = np.ones(falling.shape, bool)
    last[:, :-1] = falling[:, 1:] != falling[:, :-1]
    end = np.minimum.accumulate(np.where(last, np.arange(size), size)[:, ::-1], 1)[:, ::-1]
    true = np.take_along_axis(np.cumsum(positive, 1, np.float64), end, 1)
    false = end + 1 - true
    p = positive.sum(1, dtype=np.float64)
    n = size - p
    # pairs won, counted from the negatives (ties in) and from the positives (ties out): the mean
    # halves the ties
    won = (~positive * true).sum(1) + (positive * (n[:, None] - false)).sum(1)
    pr = (positive * true / (true + false)).sum(1) / p
    return won / (2 * p * n), np.where(n > 0, pr, np.nan)

@np.errstate(invalid="ignore")
def score(scores, labels, task: str = "multilabel") -> dict:
    """Metrics of clip scores (N, K), probabilities or anything in the same order, and labels (N, K)
    0/1 (section 4.1).

    Returns: multilabel: roc_auc, pr_auc (average precision), the means over tags, clip_roc_auc,
        clip_pr_auc, the means over clips, tag_roc_auc, tag (K,: PR-AUC), tags_left_out,
        clips_left_out; singlelabel: accuracy, tag (K,: recall), confusion (K, K), a row is a true
        label. What does not exist (no positive, no negative) is NaN, and left out of the means.
    Raises: ValueError: shapes that differ, no clip, or scores that are NaN.

    >>> score(np.eye(3), np.eye(3, dtype=int), "singlelabel")["accuracy"].item()
    1.0
    """
    scores, labels = (np.asarray(x.detach().cpu().double() if torch.is_tensor(x) else x, np.float64)
                      for x in (scores, labels))
    if scores.shape != labels.shape or scores.ndim != 2 or not len(scores):
        raise ValueError("expected scores and labels of one shape (N, K); "
                         f"got {scores.shape} and {labels.shape}")
    if np.isnan(scores).any():
        raise ValueError(f"{np.isnan(scores).any(1).sum()} of {len(scores)} clips have NaN scores")
    if task == "singlelabel":
        k = labels.shape[1]
        cells = labels.argmax(1) * k + scores.argmax(1)
        confusion = np.bincount(cells, minlength=k * k).reshape(k, k)
        right = confusion.diagonal()
        return {"accuracy": right.sum() / len(labels), "tag": right / labels.sum(0),
                "confusion": confusion}
    tag_roc, tag_pr = rank_metrics(scores.T, labels.T)
    clip_roc, clip_pr = rank_metrics(scores, labels)
    return {"roc_auc": mean(tag_roc), "pr_auc": mean(tag_pr), "tag_roc_auc": tag_roc, "tag": tag_pr,
            "clip_roc_auc": mean(clip_roc), "clip_pr_auc": mean(clip_pr),
            "tags_left_out": int((labels.min(0) == labels.max(0)).sum()),
            "clips_left_out": int((labels.min(1) == labels.max(1)).sum())}

@np.errstate(invalid="ignore")
def mean(values, axis=-1):
    """The mean of what is not NaN; NaN, without a warning, where all is."""
    return np.nansum(values, axis) / (~np.isnan(values)).sum(axis)

def interval(draws, value) -> np.ndarray:
    """95 % interval from draws (n, ...) of a value (...) -> (2, ...): their middle 95 %, moved by
    the distance of their mean from the value, since average precision is on average larger in a
    resample, where songs occur twice."""
    # a tag that was left out is NaN in all draws, of which numpy would warn; its mean is NaN, too
    known = np.where(np.isnan(draws).all(0), 0, draws)
    return np.nanquantile(known, (0.025, 0.975), axis=0) - mean(draws, 0) + value

def bootstrap(scores, labels, group, task: str = "multilabel", n=1000, seed=0) -> dict:
    """Resample the test songs, group (N,), with replacement (clips of a song stay together); take
    all metrics again: scores (S, N, K) of S seeds, labels (N, K) -> {metric: (n,)}, the mean of the
    seeds; `tag` (n, K). The same data and seed give the same resamples, so two encoders can be
    compared resample by resample."""
    metrics = [_in_resamples(np.asarray(of_seed), np.asarray(labels), task) for of_seed in scores]
    blocks = []
    for counts in resamples(group, n, seed):
        runs = [of_seed(counts) for of_seed in metrics]
        blocks.append({name: np.mean([run[name] for run in runs], 0) for name in runs[0]})
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}

def resamples(group, n: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """How often each clip is in each resample of the songs, group (N,): in blocks (b, N) of n."""
    song = np.unique(group, return_inverse=True)[1].reshape(-1)
    share = np.full(song.max() + 1, 1 / (song.max() + 1))
    rng = np.random.default_rng([seed, 3])
    for i in range(0, n, 64):
        yield rng.multinomial(len(share), share, min(64, n - i))[:, song]

def _in_resamples(scores, labels, task):
    """The metrics (b, ...) in b resamples as a function of their counts (b, N) of the clips."""
    ranks = _kernels("ranks", "intervals take longer") if task == "multilabel" else None
    if ranks:
        of_clips = dict(zip(("clip_roc_auc", "clip_pr_auc"), rank_metrics(scores, labels)))
        return ranks.in_resamples(scores, labels, of_clips, mean)

    def metrics(counts):
        rows = [np.repeat(np.arange(len(scores)), of_clips) for of_clips in counts]
        runs = [score(scores[i], labels[i], task) for i in rows]
        return {name: np.stack([run[name] for run in runs]) for name in (*METRICS[task], "tag")}
    return metrics

@functools.cache
def _kernels(name, otherwise):
    try:
        return import_module(f"kernels.{name}")
    except ImportError:
        print(f"evaluate.py: without kernels/{name}.py {otherwise}", file=sys.stderr)

def neighbours(x: Tensor, labels, song, artist, k: int = 10) -> dict[str, np.ndarray]:
    """What the k nearest clips have in common with each clip, by the cosine of its standardised
    features x (N, D): {`labels`: (N,), the mean Jaccard similarity of their labels (N, K), with one
    label the share with the same, among clips by other artists; `artist`: (N,), which share of the
    others by its artist are among the k nearest from other songs, NaN where there is none}. song,
    artist (N,): an artist that is not known, "", is that of its song alone.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> found = neighbours(x, np.eye(2)[[0, 0, 1, 1]], np.arange(4), np.array(list("abcd")), 1)
    >>> found["labels"], found["artist"]
    (array([1., 1., 1., 1.]), array([nan, nan, nan, nan]))
    """
    names = [f"a {a}" if a else f"song {s}" for a, s in zip(artist, song)]
    artist, song = (torch.from_numpy(np.unique(of, return_inverse=True)[1]) for of in (names, song))
    y = torch.as_tensor(np.asarray(labels), dtype=torch.float32)
    z = F.normalize((x - x.mean(0)) / x.std(0).clamp_min(1e-6))
    rows = []
    for i in torch.arange(len(z)).split(256):  # (b, N) similarities fit into memory
        near = z[i] @ z.T
        value, other = near.masked_fill(artist[i, None] == artist, -2).topk(min(k, len(z) - 1))
        both = torch.einsum("bk,bnk->bn", y[i], y[other])
        shared = both / (y[i].sum(1)[:, None] + y[other].sum(2) - both).clamp_min(1)
        wanted = (artist[i, None] == artist) & (song[i, None] != song)
        nearest = near.masked_fill(song[i, None] == song, -2).topk(min(k, len(z) - 1)).indices
        rows.append(torch.stack([shared.where(value > -2, math.nan).nanmean(1),
                                 wanted.gather(1, nearest).sum(1) / wanted.sum(1)]))
    return dict(zip(("labels", "artist"), torch.cat(rows, 1).double().numpy()))

# ------------------------------------------------------------------------------------- protocol

def evaluate(fit: Callable, clips, data: dict[str, Windows], protocol: Protocol,
             names: tuple[str, str] = ("model", "probe")) -> list[Result]:
    """The protocol at the head of this file -> a result for each share of the labels. data: the
    windows of each split; names: of model and probe. fit(rows (n,) of the training windows, seed)
    -> the trained module, what is to be said of its training, the scores (N, K) of test clips."""
    training = data["train"].clip
    test = np.unique(data["test"].clip)
    # what is drawn: clips, or windows
    unit = np.arange(len(training)) if protocol.fraction_mode == "v1" else training
    units, first = np.unique(unit, return_index=True)
    labels = clips.labels[training[first]]
    results = []
    for fraction in protocol.fraction:
        runs, scores, modules = [], [], []
        for seed in range(protocol.seed, protocol.seed + protocol.seeds):
            drawn = units[take_fraction(labels, fraction, seed, protocol.fraction_mode)]
            rows = np.flatnonzero(np.isin(unit, drawn))
            module, info, scored = fit(rows, seed)
            heard = np.unique(training[rows])
            runs.append({"seed": seed, "clips": len(heard), "songs": len(set(clips.group[heard])),
                         "windows": len(rows), "positives": clips.labels[heard].sum(0, dtype=int),
                         **info, **score(scored, clips.labels[test], clips.task)})
            scores.append(scored)
            modules.append(module)
        draws = bootstrap(scores, clips.labels[test], clips.group[test], clips.task)
        row = {**dict(zip(("model", "probe"), names)), "fraction": fraction,
               **summary(runs, draws, clips, test), "runs": runs}
        if not any((scores[0] != other).any() for other in scores[1:]):
            row["std"] = dict.fromkeys(row["std"])  # one seed, or a fit to the optimum
        best = max(range(len(runs)), key=lambda i: runs[i]["valid"])
        results.append(Result(row, draws, np.mean(scores, 0), modules[best]))
    return results

def summary(runs, draws, clips, test) -> dict:
    """{mean, interval, per_tag, std} of every metric over the runs of all seeds."""
    values = {name: np.stack([run[name] for run in runs]) for name in (*METRICS[clips.task], "tag")}
    means = {name: mean(of_seeds, 0) for name, of_seeds in values.items()}
    spans = {name: interval(draws[name], means[name]).clip(0, 1) for name in values}
    positives = clips.labels[test].sum(0, dtype=int)
    tags = zip(clips.tags, positives, means.pop("tag"), spans.pop("tag").T)
    return {"mean": means, "interval": spans,
            "per_tag": {tag: {"positives": n, "value": value, "interval": span}
                        for tag, n, value, span in tags},
            "std": {name: values[name].std(ddof=int(len(runs) > 1)) for name in means}}

def add_neighbours(results: list[Result], data: dict[str, Windows], clips, k: int):
    """Write the metrics of `neighbours`, among the clips of all splits, beside the others."""
    parts = [by_clip(of) for of in data.values()]
    clip = np.concatenate([of.clip for of in parts])
    artist = getattr(clips, "artist", np.full(len(clips), ""))[clip]
    song = clips.group[clip]
    found = neighbours(torch.cat([of.x for of in parts]), clips.labels[clip], song, artist, k)
    for name, values in found.items():
        known = (~np.isnan(values)).astype(float)
        if known.any():
            values = np.nan_to_num(values)
            blocks = [counts @ values / (counts @ known) for counts in resamples(song)]
            draws = np.concatenate(blocks)
            value = values.sum() / known.sum()
            for result in results:
                result.draws[f"{name}@{k}"] = draws
                result.row["mean"][f"{name}@{k}"] = value
                result.row["interval"][f"{name}@{k}"] = interval(draws, value).clip(0, 1)
                result.row["std"][f"{name}@{k}"] = None

def compare(results: list[Result], control: str = "untrained"):
    """Write into each row its difference to the control with the same share of the labels."""
    controls = {of.row["fraction"]: of for of in results if of.row["model"] == control}
    for result in results if controls else ():
        other = controls[result.row["fraction"]]
        if other is not result:
            differences = result.row[f"over_{control}"] = {}
            for name, value in result.row["mean"].items():
                more = value - other.row["mean"][name]
                span = interval(result.draws[name] - other.draws[name], more)  # it is paired
                differences[name] = {"mean": more, "interval": span}

# --- program: what follows imports the siblings it needs when it is called, by name, so that this
# file, copied alone, can be imported.

def fresh(encoder: nn.Module, seed: int) -> nn.Module:
    """An untrained encoder of the same kind and sizes, initialised from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return import_module("model").build_encoder(encoder.name, **encoder.sizes).eval()

def trained_on(info: dict, load: Callable):
    """The prepared data that the encoder of this info was trained on, in its folder or under its
    name. load(name) -> clips, or ValueError or OSError."""
    missing = FileNotFoundError("NAME: say what to evaluate on")
    found = []
    for name in filter(None, (info.get("data_folder"), info.get("data"))):
        try:
            found.append(load(name))
        except (ValueError, OSError) as error:  # another one's folder, perhaps, that cannot be read
            missing = error
    for clips in found:
        if clips.fingerprint == info["fingerprint"]:
            return clips
    if found:
        return found[0]
    raise missing

def require_fit(info: dict, clips):
    """ValueError where an encoder, by its info, cannot be evaluated on the clips."""
    if clips.task == "none":
        raise ValueError(f"{clips.name} has no labels: expected tagged data, e.g. prepared with "
                         "--labels FILE.csv, or several folders with the same tags")
    rate = info.get("sample_rate")
    if rate not in (None, clips.sample_rate):
        raise ValueError(f"the encoder works at {rate} Hz, {clips.name} is at {clips.sample_rate} "
                         f"Hz: prepare it again with --sample-rate {rate}")

def features_of(encoder: nn.Module, clips, data: dict[str, Windows], protocol: Protocol):
    """The windows of each split with their features (n, D) as x, read where they were kept."""
    model = import_module("model")
    device = model.choose_device(protocol.device)
    amp = model.choose_amp(device, protocol.amp)
    key = [2, model.weights_sha256(encoder), encoder.name, encoder.sizes, clips.fingerprint, amp]
    store = _kernels("store", "features are computed each time")
    kept = store.Kept(clips.folder / "features", key) if store else None
    found = kept.read() if kept else None
    if found is None:
        fast = model.fold_batch_norm(encoder).to(device, DTYPE[amp])
        batch_size = 16 if device.type == "cpu" else 256
        size = encoder.input_samples
        found = {split: embed(fast, crops(clips, of, size, batch_size), len(of.clip))
                 for split, of in data.items()}
        if kept:
            kept.write(found)
    return {split: replace(of, x=found[split]) for split, of in data.items()}

def read_features(path: Path, clips) -> dict[str, Windows]:
    """Features that others made: a npz file with `features` (n, D) and of each row the `id` (n,) of
    its clip, which may have several rows, its windows. ValueError where a clip has none."""
    try:
        with np.load(path) as file:
            x = torch.from_numpy(file["features"].astype(np.float32))
            ids = file["id"].astype(str).tolist()
    except Exception as error:  # a damaged zip file, or another file, has many ways to say so
        raise ValueError(f"{path}: expected a npz file with `id` (n,) and `features` (n, D); "
                         f"{str(error).splitlines()[0]}") from None
    number = {name: i for i, name in enumerate(clips.id.tolist())}
    clip = np.array([number.get(name, -1) for name in ids])
    missing = len(clips) - len(np.unique(clip[clip >= 0]))
    if missing or len(ids) != len(x) or x.dim() != 2 or not x.isfinite().all():
        raise ValueError(
            f"{path}: {missing} of {len(clips)} clips of {clips.name} have no row; expected finite "
            f"features (n, D) and n ids, got {tuple(x.shape)} and {len(ids)}")
    return by_split(clips, x[clip >= 0], clip[clip >= 0])

def probe_on(data: dict[str, Windows], task: str, protocol: Protocol) -> Callable:
    """For `evaluate`: a probe trained on fixed features."""
    training, valid, test = data.values()
    tested, where = np.unique(test.clip, return_inverse=True)
    fit = fit_probe if protocol.probe == "adam" else fit_lbfgs

    def fit_and_score(rows, seed):
        drawn = training if len(rows) == len(training.clip) else training[rows]  # no copy of all
        probe, info = fit(drawn, valid, task, protocol, seed)
        return probe, info, clip_scores(probe(test.x), where, len(tested), task)
    return fit_and_score

def network_on(data: dict[str, Windows], clips, protocol: Protocol, build: Callable,
               autocast: Callable = contextlib.nullcontext, half: bool = False) -> Callable:
    """For `evaluate`: encoder and layer trained together (section 4.3), the supervised baseline.
    data: with starts as x; build(seed): the encoder. An epoch is one random window of every clip
    (of mode v1 its windows), drawn anew until there are 100 steps: 540 clips make 11, after which
    no validation score says anything yet."""
    batch_size = protocol.batch_size or 48

    def fit(rows, seed):
        encoder = build(seed)
        size = encoder.input_samples
        device = next(encoder.parameters()).device
        rng = np.random.default_rng([seed, 2])
        drawn = data["train"][rows]
        if protocol.fraction_mode != "v1":
            drawn = drawn[np.unique(drawn.clip, return_index=True)[1]]
        n = len(drawn.clip)
        n -= n % batch_size if n > batch_size else 0  # a short batch has odd statistics
        rounds = math.ceil((protocol.min_steps or 100) / max(1, n // batch_size))

        def batches():
            for _ in range(rounds):
                if protocol.fraction_mode != "v1":
                    latest = clips.length[drawn.clip] - size
                    drawn.x = torch.from_numpy(rng.integers(0, latest + 1))
                epoch = drawn[rng.permutation(len(drawn.clip))[:n]]
                audio = crops(clips, epoch, size, batch_size)
                for x, y in zip(audio, epoch.y.float().split(batch_size)):
                    yield x.to(device), y.to(device)

        def logits(split):
            with autocast():
                return embed(network, crops(clips, data[split], size))

        def validate():
            return validation(logits("valid"), data["valid"].y, data["valid"].clip, clips.task)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = nn.Linear(encoder.out_dim, drawn.y.shape[1])
            network = nn.Sequential(encoder, nn.Dropout(0.5), layer).to(device)
            info = train(network, batches, validate, clips.task, protocol, autocast, half)
        tested, where = np.unique(data["test"].clip, return_inverse=True)
        return network, info, clip_scores(logits("test"), where, len(tested), clips.task)
    return fit

def run(encoder: nn.Module, info: dict, clips, protocol: Protocol) -> tuple[dict, list, dict]:
    """All that a protocol asks of an encoder, with the info of its file ({}: untrained), on a data
    set -> what the metrics JSON holds, its results, and {model: {split: windows with features}}."""
    require_fit(info, clips)
    model = import_module("model")
    device = model.choose_device(protocol.device)
    data = cut(clips, encoder.input_samples)
    frozen = {f"{info['method']}, {info.get('step') or 0:,d} steps": encoder} if info else {}
    if protocol.random:
        frozen["untrained"] = fresh(encoder, protocol.seed)
    sha256 = {name: model.weights_sha256(net) for name, net in frozen.items()}
    take = model.Levels if protocol.features == "levels" else nn.Module.eval
    features = {name: features_of(take(net), clips, data, protocol) for name, net in frozen.items()}
    for path in protocol.features_from:
        features[path.stem] = read_features(path, clips)
    results = []
    for name, of in features.items():
        results += on_features(name, of, clips, protocol)
    if protocol.supervised:
        half = model.choose_amp(device, protocol.amp) == "fp16"
        fit = network_on(data, clips, protocol, lambda seed: fresh(encoder, seed).to(device),
                         lambda: model.autocast(device, protocol.amp), half)
        results += evaluate(fit, clips, data, protocol, ("supervised", "end to end"))
    if any(model.weights_sha256(net) != sha256[name] for name, net in frozen.items()):
        raise RuntimeError("an encoder changed while it was evaluated: it was not frozen")
    for control in [name for name in features if name != results[0].row["model"]]:
        compare(results, control)
    about = {**info, "encoder": encoder.name, "sizes": encoder.sizes,
             "sha256": list(sha256.values()), "unchanged": True}
    code = {"versions": {**model.versions(), "numpy": np.__version__},
            "code": model.code_version(), "device": str(device)}
    tables = import_module("results.tables")
    rows = [result.row for result in results]
    used = next(iter(features.values()), data)
    record = tables.of_evaluation(rows, METRICS[clips.task], clips, used)
    record |= {"encoder": about, **code, "protocol": asdict(protocol)}
    return record, results, features

def on_features(name: str, data: dict[str, Windows], clips, protocol: Protocol) -> list[Result]:
    """The results of a probe on fixed features, with the neighbours among them."""
    kind = f"hidden {protocol.hidden}" if protocol.hidden else "linear"
    kind = kind if protocol.probe == "adam" else protocol.probe
    probed = data
    if protocol.probe == "logistic":
        probed = {split: by_clip(of) for split, of in data.items()}
    fit = probe_on(probed, clips.task, protocol)
    results = evaluate(fit, clips, probed, protocol, (name, kind))
    if protocol.neighbours:
        add_neighbours(results, data, clips, protocol.neighbours)
    return results

def export(encoder: nn.Module, result: Result, clips, folder: Path, tagger: bool) -> list[Path]:
    """encoder.ts, encoder.pt2 and, if wanted, tagger.ts and tagger.pt by the probe of a result ->
    their paths. A tagger of other data that is there already stays: this one gets their name."""
    model = import_module("model")
    info = {"data": clips.name, "fingerprint": clips.fingerprint}
    paths = [folder / "encoder.ts", folder / "encoder.pt2"]
    model.export_torchscript(encoder, paths[0], clips.sample_rate, info=info)
    model.export_program(encoder, paths[1], clips.sample_rate, info)
    if tagger:
        name = "tagger"
        with contextlib.suppress(OSError, ValueError, KeyError):
            other = json.loads((folder / "tagger.ts.json").read_text(encoding="utf-8"))["data"]
            name = name if other == clips.name else f"tagger-{clips.name}"
        head = (result.module, clips.tags, clips.task)
        paths += [folder / f"{name}.ts", folder / f"{name}.pt"]
        model.export_torchscript(encoder, paths[2], clips.sample_rate, *head, info)
        model.save_tagger(paths[3], encoder, *head, clips.sample_rate, **info)
    return paths

def one_line(program: str, work: Callable) -> int:
    """The exit code of work(); of what goes wrong one line on stderr, and no traceback."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # there is none, or a notebook's
                stream.reconfigure(errors="backslashreplace")  # names of files in any encoding
        code = work()
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        what = "interrupted; features that were computed are kept"
    except BrokenPipeError:  # who reads has read enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        what = f"error: {str(error).strip().splitlines()[0]}"
    print(f"{program}: {what}", file=sys.stderr)
    return 1

def build_parser():
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate a frozen encoder.", allow_abbrev=False,
        usage="python evaluate.py --ckpt FILE [--data NAME] [options]   (all of them: --help)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="NAME", help="prepared data, by a name under data/ or a path; "
        "several are one set (default: what the encoder was trained on)")
    add("--fraction", type=float, nargs="+", metavar="F", help="shares of the training labels")
    add("--fraction-mode", choices=["balanced", "v1"], help="v1: the released code's rule")
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=Path, metavar="FILE", help="encoder.pt of a run, or the authors' checkpoint")
    add("--encoder", default="samplecnn", help="without --ckpt: what --random, --supervised build")
    add("--width", type=float, default=1.0, help="without --ckpt: factor on all its channels")
    add("--features", choices=["last", "levels"], help="levels: mean and maximum of every block")
    add("--features-from", type=Path, nargs="+", metavar="FILE", help="also features that others "
        "made: npz files with `id` (n,), of clips, and `features` (n, D)")
    add("--random", action="store_true", help="also the same probe on an untrained encoder")
    add("--supervised", action="store_true", help="also an encoder trained together with its layer")
    add = parser.add_argument_group("optimisation").add_argument
    add("--probe", choices=["adam", "lbfgs", "logistic"], help="lbfgs: logistic regression to its "
        "optimum; logistic: the same on the means of clips")
    add("--hidden", type=int, metavar="N", help="units of a hidden layer; 0: a linear probe")
    add("--lr", type=float, help="Adam's learning rate")
    add("--epochs", type=int, metavar="N", help="the most epochs")
    add("--min-steps", type=int, metavar="N", help="of an epoch (default: 500, a network's 100)")
    add("--batch-size", type=int, metavar="N", help="windows (default: 256, a network's 48)")
    add("--neighbours", type=int, metavar="K", help="also what the K nearest clips have in common")
    add = parser.add_argument_group("run").add_argument
    add("--seeds", type=int, metavar="N", help="how many seeds")
    add("--seed", type=int, help="the first of them")
    add("--device", choices=["auto", "cpu", "cuda"], help="where encoders run")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], help="precision of encoders")
    add("--out", type=Path, metavar="FILE", help="metrics JSON (default: beside --ckpt)")
    add("--export", type=Path, metavar="DIR", help="of encoder.ts, ... (default: beside --ckpt)")
    parser.set_defaults(**{field.name: field.default for field in fields(Protocol)})
    return parser

def check(parser, args, given):
    """End with one line where flags make no sense together."""
    encoders = import_module("model").ENCODERS
    missing = [str(path) for path in (args.ckpt, *args.features_from) if path and not path.exists()]
    numbers = [args.seeds, args.epochs, args.min_steps, args.batch_size, args.hidden + 1]
    for wrong, what in (
            (missing, f"{', '.join(missing)}: no such file"),
            (not (args.ckpt or args.random or args.supervised or args.features_from),
             "type --ckpt runs/NAME/encoder.pt"),
            (not all(0 < f <= 1 for f in args.fraction), "--fraction is in (0, 1], e.g. 0.01 1"),
            (args.hidden and args.probe != "adam", "--hidden is of --probe adam: leave it out"),
            (args.encoder not in encoders, f"--encoder: there are {', '.join(encoders)}"),
            (args.ckpt and given & {"encoder", "width"},
             "--ckpt says what encoder it is: leave out --encoder, --width"),
            (args.out and args.out.is_dir(), f"--out: {args.out} is a folder"),
            (min(n for n in numbers if n is not None) < 1, "--seeds, --epochs ... are at least 1")):
        if wrong:
            parser.error(what)

def home_of(ckpt) -> Path:
    """Where results go: beside the checkpoint of a run; a file from elsewhere, as those in demo/,
    has a folder of its own."""
    if not ckpt or (ckpt.parent / "log.jsonl").exists():
        return ckpt.parent if ckpt else Path("runs")
    return Path("runs", f"{ckpt.resolve().parent.name}-{ckpt.stem}")

def main(argv=None):
    import model
    import prepare
    from results import tables
    model.tune_allocator()
    parser = build_parser()
    args = parser.parse_args(argv)
    for name in ("fraction", "features_from"):
        setattr(args, name, tuple(getattr(args, name)))
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    check(parser, args, given)

    def load(names):
        return prepare.Clips([prepare.find(name) for name in np.atleast_1d(names)])

    def work():
        protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol)})
        encoder, info = model.load_encoder(args.ckpt) if args.ckpt else (None, {})
        encoder = encoder or fresh(model.build_encoder(args.encoder, width=args.width), args.seed)
        try:
            clips = load(args.data) if args.data else trained_on(info, load)
        except FileNotFoundError as error:
            parser.error(f"--data {error}")
        record, results, _ = run(encoder, info, clips, protocol)
        record["argv"] = ["evaluate.py", *(sys.argv[1:] if argv is None else argv)]
        record["protocol"] |= {"ckpt": args.ckpt, "data": args.data}
        unnamed = {"data", "ckpt", "random", "seeds", "device", "out", "export", "neighbours"}
        name = f"evaluate-{clips.name}"
        for flag in sorted(given - unnamed):
            values = [getattr(value, "stem", value) for value in np.atleast_1d(getattr(args, flag))]
            name = "-".join([name, flag.replace("_", "-"), *map(str, values)])
        paths = [args.out or home_of(args.ckpt) / f"{name}.json"]
        model.write_atomically(paths[0], tables.to_json(record).encode())
        if args.ckpt:
            of_levels = args.features == "levels"
            folder = args.export or home_of(args.ckpt) / ("levels" if of_levels else "")
            best = max(results[: len(args.fraction)], key=lambda of: of.row["fraction"])
            # a tagger by fewer labels must not replace one unasked
            tagger = best.row["fraction"] == 1 or args.export is not None
            encoder = model.Levels(encoder) if of_levels else encoder
            paths += export(encoder, best, clips, folder, tagger)
        print(tables.table(record), *paths, sep="\n")
        return 0
    return one_line("evaluate.py", work)

if __name__ == "__main__":
    sys.exit(main())
