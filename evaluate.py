"""Evaluate a frozen encoder as the paper does (CLMR, ISMIR 2021, sections 3.6, 3.7 and 4).

    python evaluate.py --ckpt runs/demo/encoder.pt --data demo --seeds 1             # a minute
    python evaluate.py --ckpt runs/mtat/encoder.pt --random --fraction 0.01 0.1 1    # and a control
    python evaluate.py --data mtat --supervised --fraction 0.01                      # end to end
    python evaluate.py --data mtat --features-from mfcc.npz --probe logistic         # of others

The protocol. Every clip is cut into all its non-overlapping full windows; the frozen encoder turns
each into features, once. A linear layer is trained on the windows of the training clips with Adam;
after each epoch the validation clips are scored, five epochs without a better score end it, the
best state is kept. A clip's score is the mean of its windows' probabilities. Test clips are scored
once, by the probe that was kept, for each seed; a seed draws the start, the order of windows and
the subset of `--fraction`. Reported, in [0, 1]: the metrics of `score`, mean and standard deviation
over seeds, a 95 % bootstrap interval over test songs, and the paired interval of the difference to
each control: the untrained encoder (`--random`: initialised from the first seed), and features that
others made (`--features-from`: npz files with `features` (n, D) and `id` (n,), the clip of each
row, one a clip or one a window). Beyond the paper: `--probe logistic`, logistic regression on the
standardised mean features of clips; `--features levels`; `--neighbours K`.

Leaves behind, in the run's folder (of another checkpoint: runs/ITS-NAME/) or where `--out` and
`--export` say: evaluate-DATA.json, with other flags evaluate-DATA-hidden-512.json, which explains
the numbers; encoder.ts, encoder.pt2, and, where all labels were used, tagger.ts and tagger.pt;
features in data/NAME/features/. Pictures: transfer.py; tables in pages: results/tables.py.
"""
import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C is silent
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve beside others

import argparse
import contextlib
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

SPLITS = {"train": "to train on", "valid": "to validate on", "test": "to test on"}
METRICS = {"multilabel": {"roc_auc": "ROC-AUC", "pr_auc": "PR-AUC",
                          "clip_roc_auc": "clip ROC", "clip_pr_auc": "clip PR"},
           "singlelabel": {"accuracy": "accuracy"}}
LOSS = {"multilabel": nn.functional.binary_cross_entropy_with_logits,
        "singlelabel": nn.functional.cross_entropy}

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

# ------------------------------------------------------------------------- windows and features

def windows(length, size: int, hop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where the full windows of clips lie (section 4.1): clip (n,) of each, start (n,). length
    (N,), size, hop, start are in samples.

        samples    0 1 2 3 4 5 6      length 7, size 3, hop 3 (by default the size)
        window 0  |0 1 2|
        window 1        |3 4 5|       sample 6 is left over; a clip shorter than a window has none

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
    found = {}
    for i, (split, purpose) in enumerate(SPLITS.items()):
        rows = np.flatnonzero((labelled & (clips.split == i))[clip])
        found[split] = Windows(x[rows], torch.from_numpy(clips.labels[clip[rows]]), clip[rows])
        if not len(rows):
            raise ValueError(
                f"{clips.name} has no usable clip {purpose} (of {sum(clips.split == i)}, too short "
                "or without a label): prepare it again with longer ones, or by a table that has a "
                "column `split` of train, valid and test")
    return found

def by_clip(data: Windows) -> Windows:
    """The mean of the features of each clip's windows."""
    clip, first, of = np.unique(data.clip, return_index=True, return_inverse=True)
    total = data.x.new_zeros(len(clip), data.x.shape[1]).index_add_(0, torch.from_numpy(of), data.x)
    return Windows(total / torch.from_numpy(np.bincount(of))[:, None], data.y[first], clip)

def crops(clips, data: Windows, size: int, batch_size: int = 16) -> Iterator[Tensor]:
    """The audio of windows, in batches (b, 1, size)."""
    silent = sys.stderr is None or not sys.stderr.isatty()
    for i in tqdm(range(0, len(data.clip), batch_size), "windows", leave=False, disable=silent):
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
    features = torch.empty(n, encoder.out_dim)
    done = 0
    for h in rows:
        features[done : done + len(h)] = h
        done += len(h)
    return features

def take_fraction(labels, fraction: float, seed: int = 0, mode: str = "balanced") -> np.ndarray:
    """A subset (n,), ascending, of examples with labels (N, K) 0/1, in which every tag keeps its
    share (section 4.3).

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
        torch.set_num_threads(1)  # in steps so small more threads wait more than they gain
        return probe, train(probe, batches, validate, task, protocol)
    finally:
        torch.set_num_threads(threads)

def fit_lbfgs(training: Windows, valid: Windows, task: str = "multilabel", protocol=None, seed=0,
              strengths=(1e-4, 1e-3, 1e-2, 1e-1, 1.0)) -> tuple[nn.Module, dict]:
    """Logistic regression on standardised features, to the optimum: the minimum of scikit-learn's
    LogisticRegression(C), for all tags at once, with the strength C that is best in validation.
    As `fit_probe`; the optimum needs neither protocol nor seed."""
    centre = training.x.mean(0)
    scale = training.x.std(0, correction=min(1, len(training.x) - 1)).clamp_min(1e-6)
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
    # pairs won, counted from the negatives (ties in) and the positives (ties out): ties are halved
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
    Raises: ValueError: shapes that differ, no clip, scores that are NaN.

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

# --- program: it imports what it needs when it is called, so this file works when copied alone

def draw(clips, training: np.ndarray, fraction: float, seed: int, mode: str) -> np.ndarray:
    """A share of the training windows (n,), which are of the clips `training`: all windows of clips
    that are drawn; of mode v1 windows are drawn."""
    unit = np.arange(len(training)) if mode == "v1" else training
    units, first = np.unique(unit, return_index=True)
    drawn = units[take_fraction(clips.labels[training[first]], fraction, seed, mode)]
    return np.flatnonzero(np.isin(unit, drawn))

def evaluate(fit: Callable, clips, data: dict[str, Windows], protocol: Protocol,
             names: tuple[str, str] = ("model", "probe")) -> list:
    """The protocol at the head of this file -> a Result for each share of the labels. data: the
    windows of each split; names: of model and probe. fit(rows (n,) of the training windows, seed)
    -> the trained module, what is to be said of its training, the scores (N, K) of test clips."""
    test = np.unique(data["test"].clip)
    truth = (clips.labels[test], clips.group[test], clips.task)
    results = []
    for fraction in protocol.fraction:
        runs = []
        for seed in range(protocol.seed, protocol.seed + protocol.seeds):
            rows = draw(clips, data["train"].clip, fraction, seed, protocol.fraction_mode)
            module, info, scores = fit(rows, seed)
            heard = np.unique(data["train"].clip[rows])
            run = {"seed": seed, "clips": len(heard), "songs": len(set(clips.group[heard])),
                   "windows": len(rows), "positives": clips.labels[heard].sum(0, dtype=int)}
            runs.append((run | info | score(scores, truth[0], clips.task), scores, module))
        row = {"model": names[0], "probe": names[1], "fraction": fraction}
        columns = {"tags": clips.tags, "metrics": METRICS[clips.task]}
        results.append(import_module("evaluation.intervals").result_of(
            row, runs, truth, columns, (rank_metrics, score)))
    return results

def fresh(encoder: nn.Module, seed: int) -> nn.Module:
    """An untrained encoder of the same kind and sizes, initialised from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return import_module("model").build_encoder(encoder.name, **encoder.sizes).eval()

def features_of(encoder: nn.Module, clips, data: dict[str, Windows], protocol: Protocol):
    """The windows of each split with their features (n, D) as x, read where they were kept."""
    model = import_module("model")
    device = model.choose_device(protocol.device)
    amp = model.choose_amp(device, protocol.amp)
    key = [3, model.weights_sha256(encoder), encoder.name, encoder.sizes, clips.fingerprint, amp]
    kept = import_module("evaluation.store").Kept(clips.folder / "features", key)
    found = kept.read()
    if found is None:
        fast = model.fold_batch_norm(encoder).to(device)
        batch_size = 16 if device.type == "cpu" else 256
        with model.autocast(device, amp):
            found = {split: embed(fast, crops(clips, of, encoder.input_samples, batch_size),
                                  len(of.clip)) for split, of in data.items()}
        kept.write(found)
    return {split: replace(of, x=found[split]) for split, of in data.items()}

def network_on(data: dict[str, Windows], clips, protocol: Protocol, build: Callable,
               autocast: Callable = contextlib.nullcontext, half: bool = False) -> Callable:
    """For `evaluate`: encoder and layer trained together (section 4.3), the supervised baseline.
    data: with starts as x; build(seed): the encoder; autocast, half: as in `train`."""
    def fit(rows, seed):
        encoder = build(seed)
        drawn = data["train"][rows]
        size = encoder.input_samples
        device = next(encoder.parameters()).device
        latest = None if protocol.fraction_mode == "v1" else clips.length[drawn.clip] - size
        epochs = import_module("evaluation.epochs").Epochs(
            drawn, latest, lambda *epoch: (x.to(device) for x in crops(clips, *epoch)), size,
            (protocol.batch_size or 48, protocol.min_steps or 100, seed))

        def logits(split):
            with autocast():
                return embed(network, crops(clips, data[split], size))

        def validate():
            return validation(logits("valid"), data["valid"].y, data["valid"].clip, clips.task)

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layer = nn.Linear(encoder.out_dim, drawn.y.shape[1])
            network = nn.Sequential(encoder, nn.Dropout(0.5), layer).to(device)
            info = train(network, epochs, validate, clips.task, protocol, autocast, half)
        tested, where = np.unique(data["test"].clip, return_inverse=True)
        return network, info, clip_scores(logits("test"), where, len(tested), clips.task)
    return fit

def features_of_all(frozen: dict, clips, data: dict[str, Windows], protocol: Protocol) -> dict:
    """{name: the windows of each split with features} of frozen encoders {name: encoder}, and of
    what others made."""
    levels = import_module("model").Levels if protocol.features == "levels" else nn.Module.eval
    found = {name: features_of(levels(net), clips, data, protocol) for name, net in frozen.items()}
    for path in protocol.features_from:
        made_elsewhere = import_module("evaluation.store").read_features(path, clips)
        found[path.stem] = by_split(clips, *made_elsewhere)
    return found

def run(encoder: nn.Module, info: dict, clips, protocol: Protocol) -> tuple[dict, list, dict]:
    """All that a protocol asks of an encoder, with the info of its file ({}: untrained), on a data
    set -> what the metrics JSON holds, its results, and {model: {split: windows with features}}."""
    import_module("evaluation.command").require_fit(info, clips)
    model = import_module("model")
    device = model.choose_device(protocol.device)
    data = cut(clips, encoder.input_samples)
    frozen = {f"{info['method']}, {info.get('step') or 0:,d} steps": encoder} if info else {}
    if protocol.random:
        frozen["untrained"] = fresh(encoder, protocol.seed)
    sha256 = {name: model.weights_sha256(net) for name, net in frozen.items()}
    features = features_of_all(frozen, clips, data, protocol)
    results = []
    for name, of in features.items():
        layer = " on levels" if name in frozen and protocol.features == "levels" else ""
        results += on_features(name, layer, of, clips, protocol)
    if protocol.supervised:
        half = model.choose_amp(device, protocol.amp) == "fp16"
        fit = network_on(data, clips, protocol, lambda seed: fresh(encoder, seed).to(device),
                         lambda: model.autocast(device, protocol.amp), half)
        results += evaluate(fit, clips, data, protocol, ("supervised", "end to end"))
    if any(model.weights_sha256(net) != sha256[name] for name, net in frozen.items()):
        raise RuntimeError("an encoder changed while it was evaluated: it was not frozen")
    for control in [name for name in features if name in ("untrained", *list(features)[1:])]:
        import_module("evaluation.intervals").compare(results, control)
    record = import_module("results.tables").of_evaluation(
        results, METRICS[clips.task], clips, next(iter(features.values()), data))
    record["encoder"] = {**info, "encoder": encoder.name, "sizes": encoder.sizes,
                         "sha256": list(sha256.values()), "unchanged": True}
    record |= {"versions": {**model.versions(), "numpy": np.__version__},
               "code": model.code_version(), "device": str(device), "protocol": asdict(protocol)}
    return record, results, features

def on_features(name: str, layer: str, data: dict[str, Windows], clips, protocol: Protocol):
    """The results of a probe on fixed features of that name, with the neighbours among them."""
    kind = f"hidden {protocol.hidden}" if protocol.hidden else "linear"
    kind = kind if protocol.probe == "adam" else protocol.probe
    of_clips = {split: by_clip(of) for split, of in data.items()}
    probed = of_clips if protocol.probe == "logistic" else data
    training, valid, test = probed.values()
    tested, where = np.unique(test.clip, return_inverse=True)
    fit_one = fit_probe if protocol.probe == "adam" else fit_lbfgs

    def fit(rows, seed):
        drawn = training if len(rows) == len(training.clip) else training[rows]  # no copy of all
        probe, info = fit_one(drawn, valid, clips.task, protocol, seed)
        return probe, info, clip_scores(probe(test.x), where, len(tested), clips.task)

    results = evaluate(fit, clips, probed, protocol, (name, kind + layer))
    if protocol.neighbours:
        near = import_module("evaluation.neighbours")
        near.add(results, list(of_clips.values()), clips, protocol.neighbours)
    return results

def export(encoder: nn.Module, result, clips, folder: Path, tagger: bool) -> list[Path]:
    """encoder.ts, encoder.pt2 and, if wanted, tagger.ts and tagger.pt by the probe of a result ->
    their paths. A tagger of other data that is there already stays: this one gets their name."""
    model = import_module("model")
    info = {"data": clips.name, "fingerprint": clips.fingerprint}
    paths = [folder / "encoder.ts", folder / "encoder.pt2"]
    model.export_torchscript(encoder, paths[0], clips.sample_rate, info=info)
    model.export_program(encoder, paths[1], clips.sample_rate, info)
    if tagger:
        name = import_module("evaluation.command").tagger_name(folder, clips.name)
        head = (result.module, clips.tags, clips.task)
        paths += [folder / f"{name}.ts", folder / f"{name}.pt"]
        model.export_torchscript(encoder, paths[2], clips.sample_rate, *head, info)
        model.save_tagger(paths[3], encoder, *head, clips.sample_rate, **info)
    return paths

def build_parser():
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Evaluate a frozen encoder.", allow_abbrev=False,
        usage="python evaluate.py --ckpt FILE [--data NAME] [options]   (all of them: --help)")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", metavar="NAME", help="prepared data, names under data/ or paths: one "
        "set (default: what the encoder was trained on)")
    add("--fraction", type=float, nargs="+", metavar="F", help="shares of the training labels")
    add("--fraction-mode", choices=["balanced", "v1"], help="v1: the released code's rule")
    add = parser.add_argument_group("model").add_argument
    add("--ckpt", type=Path, metavar="FILE", help="encoder.pt of a run, or the authors' checkpoint")
    add("--encoder", default="samplecnn", help="without --ckpt: what --random, --supervised build")
    add("--width", type=float, default=1.0, help="without --ckpt: factor on all its channels")
    add("--features", choices=["last", "levels"], help="levels: mean and maximum of every block")
    add("--features-from", type=Path, nargs="+", metavar="NPZ", help="also features of others")
    add("--random", action="store_true", help="also the same probe on an untrained encoder")
    add("--supervised", action="store_true", help="also an encoder trained together with its layer")
    add = parser.add_argument_group("optimisation").add_argument
    add("--probe", choices=["adam", "lbfgs", "logistic"],
        help="lbfgs: to the optimum; logistic: the same, of clips in place of windows")
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

def main(argv=None):
    import model
    import prepare
    from evaluation import command
    from results import tables
    model.tune_allocator()
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    parser = build_parser()
    parser.formatter_class = model.Help
    args = parser.parse_args(argv)
    for name in ("fraction", "features_from"):
        setattr(args, name, tuple(getattr(args, name)))
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    command.check(parser, args, given, model.ENCODERS)

    def load(names):
        return prepare.Clips([prepare.find(name) for name in np.atleast_1d(names)])

    def work():
        protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol)})
        encoder, info = model.load_encoder(args.ckpt) if args.ckpt else (None, {})
        encoder = encoder or fresh(model.build_encoder(args.encoder, width=args.width), args.seed)
        try:
            clips = load(args.data) if args.data else command.trained_on(info, load)
        except FileNotFoundError as error:
            parser.error(f"--data {error}")
        home = command.home_of(args.ckpt)
        paths = [args.out or home / command.file_name(clips.name, given)]
        paths[0].parent.mkdir(parents=True, exist_ok=True)  # or not: said before hours of work
        record, results, _ = run(encoder, info, clips, protocol)
        record["argv"] = ["evaluate.py", *(sys.argv[1:] if argv is None else argv)]
        record["protocol"] |= {"ckpt": args.ckpt, "data": args.data}
        with command.shown_at_last(tables.table(record), paths):
            model.write_atomically(paths[0], tables.to_json(record).encode())
            if not args.ckpt:
                return 0
            best = max(results[: len(args.fraction)], key=lambda result: result.row["fraction"])
            tagger = best.row["fraction"] == 1 or args.export is not None  # fewer: not unasked
            if args.features == "levels":
                encoder = model.Levels(encoder)
                home = home / "levels"
            paths += export(encoder, best, clips, args.export or home, tagger)
        return 0
    return command.one_line("evaluate.py", work)

if __name__ == "__main__":
    sys.exit(main())
