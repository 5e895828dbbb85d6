"""Pre-train an encoder without labels: CLMR (Spijkervet & Burgoyne, ISMIR 2021, sections 3.1 to 3.4) or CPC (section 3.5).

    python pretrain.py --data demo --width 0.125 --batch-size 16 --max-steps 20        # a minute on a CPU
    torchrun --nproc_per_node=2 pretrain.py --data mtat                                # the paper's run, two processes
    python pretrain.py --data mtat --transforms filter --probability filter=1 --asymmetric     # a row of Table 2
    python pretrain.py --plot runs/mtat                                                # the curves of a run

The same command again continues where the run stopped; a finished run says so. On disk, in runs/NAME/:
  checkpoint.pt   everything to continue (checkpoint.previous.pt: the one before it)
  encoder.pt      the encoder alone, for evaluate.py and transfer.py
  log.jsonl       first the command, versions and configuration, then one object per log step:
                  step, epoch, pairs (seen so far), loss, top1 (share of views whose nearest view is their partner), lr,
                  pairs_per_s, wait (share of the time spent waiting for audio); every --probe-every steps: probe
  curves.png      by --plot

The *global* batch of step s - songs, crops, augmentation values - is a function of (seed, s) alone. Every process draws
it as a whole and takes its rows, so 1, 2 and 4 processes take the same step (to rounding), and a killed run ends with
the same weights as an uninterrupted one. Dimensions: N pairs of the global batch, B of one process, P projection.
"""
import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

# ---------------------------------------------------------------------------------------------------------------------
# The loss, over any number of processes
# ---------------------------------------------------------------------------------------------------------------------


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class _Gather(torch.autograd.Function):
    """Forward: all rows of all processes. Backward: the sum over processes of the gradients that arrive for our rows.

    Each process's loss depends on every process's z, so the sum is needed; returning only the own slice leaves the loss
    as it is and bends the gradient."""

    @staticmethod
    def forward(ctx, z):
        rank, size = world()
        ctx.rows = slice(rank * len(z), (rank + 1) * len(z))
        parts = [torch.empty_like(z) for _ in range(size)]
        dist.all_gather(parts, z.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[ctx.rows]


def gather(z: Tensor) -> Tensor:
    """(B, P) of this process -> (N, P) of all processes in rank order, differentiable; one process: z itself.

    All processes must hold the same number of rows. With DistributedDataParallel, which averages gradients, a mean over
    local rows then gives exactly the gradient of the mean over all rows."""
    return _Gather.apply(z) if world()[1] > 1 else z


def similarities(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine similarities / temperature of this process's 2B views with all 2N views, and the column of each one's partner.

                 all i (N columns)      all j (N columns)
        own i   [ -inf on itself        .  partner         ]
        own j   [ partner  .            -inf on itself     ]

    Everything in float32 (an fp16 norm underflows), float64 stays. The own column is -inf: no view is its own negative."""
    if z_i.shape != z_j.shape or z_i.dim() != 2:
        raise ValueError(f"expected two projections of one shape (B, P), got {list(z_i.shape)} and {list(z_j.shape)}")
    dtype = torch.float64 if z_i.dtype == torch.float64 else torch.float32
    z_i, z_j = (F.normalize(z.to(dtype), dim=1) for z in (z_i, z_j))
    B, rank = len(z_i), world()[0]
    keys = torch.cat([gather(z_i), gather(z_j)])  # (2N, P)
    N = len(keys) // 2
    own = torch.arange(rank * B, rank * B + B, device=z_i.device)
    s = torch.cat([z_i, z_j]) @ keys.T / temperature  # (2B, 2N)
    s = s.scatter(1, torch.cat([own, own + N])[:, None], float("-inf"))
    return s, torch.cat([own + N, own])


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent (section 3.4): l_ij = -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), mean over both directions.

    Args: z_i, z_j: (B, P) projections of two views of B songs, in any float type; B is this process's share and the
    negatives are the other 2(N-1) views of all processes. temperature: 0.5 is the paper's.
    Returns: the mean over this process's 2B views; the mean of that over processes is the loss of the global batch.

    >>> z = torch.eye(2); round(nt_xent(z, z, 0.5).item(), 4)     # log(1 + 2 exp(-2))
    0.2395
    """
    return F.cross_entropy(*similarities(z_i, z_j, temperature))


def dcl(z_i: Tensor, z_j: Tensor, temperature: float = 0.5) -> Tensor:
    """Decoupled contrastive loss (Yeh et al., ECCV 2022): NT-Xent without the positive in the denominator, an option for
    small batches. Arguments and reduction as in `nt_xent`.

    >>> z = torch.eye(2); round(dcl(z, z, 0.5).item(), 4)         # -2 + log 2
    -1.3069
    """
    s, partner = similarities(z_i, z_j, temperature)
    positive = s.gather(1, partner[:, None])
    negatives = s.scatter(1, partner[:, None], float("-inf"))
    return (negatives.logsumexp(1) - positive[:, 0]).mean()


LOSSES = {"nt-xent": nt_xent, "dcl": dcl}


@torch.no_grad()
def contrastive_top1(z_i: Tensor, z_j: Tensor) -> Tensor:
    """Share of this process's views whose most similar view of the global batch is their partner; chance is 1 / (2N - 1)."""
    s, partner = similarities(z_i.detach(), z_j.detach(), 1.0)
    return (s.argmax(1) == partner).float().mean()


# ---------------------------------------------------------------------------------------------------------------------
# CLMR and CPC as modules: two views in, loss and accuracy out
# ---------------------------------------------------------------------------------------------------------------------


class CLMR(nn.Module):
    """encoder and projector; `forward(views (2B, 1, T)) -> loss, top1`, rows 0..B-1 the first view of each pair."""

    def __init__(self, encoder, projector, loss=nt_xent, temperature=0.5):
        super().__init__()
        self.encoder, self.projector, self.loss, self.temperature = encoder, projector, loss, temperature

    def forward(self, views):
        z_i, z_j = self.projector(self.encoder(views)).chunk(2)  # one pass: batch statistics over both views
        return self.loss(z_i, z_j, self.temperature), contrastive_top1(z_i, z_j)


class CPCLoss(nn.Module):
    """CPC's objective (section 3.5): from each context predict the frames 1..20 steps ahead among 15 negatives.

    `forward(views (B, 1, T), negatives (B, n, 15)) -> loss, accuracy`. The prediction of step k from context c_t is W_k c_t;
    its score with a frame z is their dot product; the loss is the cross-entropy of the true frame among 16, averaged over
    contexts, steps and examples. `negatives` are numbers of frames in the global batch (row x n + frame)."""

    def __init__(self, encoder, steps=20):
        super().__init__()
        self.encoder, self.steps = encoder, steps
        self.predictor = nn.Linear(encoder.context_dim, steps * encoder.frame_dim, bias=False)

    def forward(self, views, negatives):
        z, c = self.encoder.context(views)  # (B, n, 512), (B, n, 256)
        B, n, D = z.shape
        z = z.float()
        predictions = self.predictor(c).float().reshape(B, n, self.steps, D)
        others = gather(z).flatten(0, 1)[negatives]  # (B, n, 15, 512)
        first = world()[0] * B
        own = (torch.arange(first, first + B, device=z.device)[:, None] * n + torch.arange(n, device=z.device))[..., None]
        others_are_own = negatives == own  # a negative that is the true frame itself says nothing: left out
        loss, hits = z.new_zeros(()), z.new_zeros(())
        for k in range(1, self.steps + 1):
            p = predictions[:, : n - k, k - 1]  # (B, n-k, 512): what the contexts say of the frame k ahead
            positive = (p * z[:, k:]).sum(-1, keepdim=True)
            negative = torch.einsum("btd,btmd->btm", p, others[:, k:]).masked_fill(others_are_own[:, k:], float("-inf"))
            logits = torch.cat([positive, negative], -1).flatten(0, 1)  # (B (n-k), 16)
            loss = loss + F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=z.device))
            hits = hits + (logits.detach().argmax(1) == 0).float().mean()
        return loss / self.steps, hits / self.steps


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch statistics over all processes on the CPU, where torch's own SyncBatchNorm refuses to work; same state-dict keys.

    Also for one process in float32: torch's channels-last kernel adds up long columns one number after the other, which
    puts gradients off by up to 3 % (against float64; here 2e-5), more than any number of processes would."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        y, mean, var, count = _SyncNorm.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        return y


class _SyncNorm(torch.autograd.Function):
    """Batch norm over (B, ., .) of every process: sums are added over processes, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        high = x.to(torch.promote_types(x.dtype, torch.float32))
        shape = (1, -1, 1, 1)
        sums = torch.stack([high.sum((0, 2, 3)), torch.full_like(weight, x.numel() / x.shape[1], dtype=high.dtype)]).double()
        _over_processes(sums)
        count = sums[1, 0].item()
        mean = sums[0] / count
        # two passes: E[x^2] - E[x]^2 cancels in float32 where features hardly vary, as they do early in training
        var = (high - mean.to(high.dtype).view(shape)).square_().sum((0, 2, 3)).double()
        _over_processes(var)
        var /= count
        mean, var = mean.to(high.dtype), var.to(high.dtype)
        invstd = (var + eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd)
        ctx.count = count
        y = (high - mean.view(shape)) * (invstd * weight).view(shape) + bias.view(shape)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, invstd = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        g = grad.to(mean.dtype)
        normed = (x.to(mean.dtype) - mean.view(shape)) * invstd.view(shape)
        own = torch.stack([g.sum((0, 2, 3)), (g * normed).sum((0, 2, 3))])
        total = own.to(torch.float64, copy=True)
        _over_processes(total)
        total = (total / ctx.count).to(mean.dtype)
        dx = (g - total[0].view(shape) - normed * total[1].view(shape)) * (invstd * weight).view(shape)
        return dx.to(x.dtype), own[1].to(weight.dtype), own[0].to(weight.dtype), None


def _over_processes(x):
    """The sum over processes, in place."""
    if world()[1] > 1:
        dist.all_reduce(x)


def synchronise(module: nn.Module, device) -> nn.Module:
    """Every batch norm of `module` replaced by one whose statistics go over all processes (section 3.2)."""
    if torch.device(device).type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.BatchNorm2d:
                norm = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                norm.load_state_dict(child.state_dict())
                setattr(parent, name, norm.to(child.weight.dtype))
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Which audio step s sees
# ---------------------------------------------------------------------------------------------------------------------


def generator(seed: int, *purpose) -> torch.Generator:
    """A CPU generator that depends on (seed, purpose) alone: no state is carried from step to step."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Pairs:
    """The sampler: which two crops of which songs make up the global batch of a step.

    Args:
        length: (clips,) samples of each clip. group: (clips,) its song. n: samples of a crop (the encoder's input).
        batch_size: N, pairs of the global batch. seed. positives: `song` draws both crops anywhere in the song,
            `clip` both from one of its clips.
    Clips shorter than n take no part and are counted in `left_out`; the pairs that do not fill an epoch's last batch are
    dropped (`dropped` per epoch). No batch holds a song twice.

    >>> pairs = Pairs([100, 100, 50, 9], [0, 0, 1, 2], n=10, batch_size=2, seed=0)
    >>> pairs.left_out, pairs.steps_per_epoch, pairs.draw(0)[0].shape
    (1, 1, (2, 2))
    """

    def __init__(self, length, group, n, batch_size, seed, positives="song"):
        length, group = np.asarray(length), np.asarray(group)
        self.n, self.batch_size, self.seed, self.positives = n, batch_size, seed, positives
        usable = np.flatnonzero(length >= n)
        self.left_out = len(length) - len(usable)
        self.clip = usable[np.argsort(group[usable], kind="stable")]  # clips of one song side by side
        self.end = np.cumsum(length[self.clip] - n + 1)  # number of possible starts up to and with each clip
        songs, first = np.unique(group[self.clip], return_index=True)
        self.songs = len(songs)
        self.low = np.concatenate([[0], self.end])[first]
        self.high = np.concatenate([self.low[1:], self.end[-1:]])
        if batch_size < 2:
            raise ValueError(f"--batch-size {batch_size}: the negatives are the other pairs of the batch, so at least 2 are needed")
        if self.songs < batch_size:
            raise ValueError(f"--batch-size {batch_size} is larger than the {self.songs} songs with at least {n} samples, and no batch may "
                             f"hold a song twice; type --batch-size {max(2, self.songs)} or less, or add music")
        self.steps_per_epoch, self.dropped = divmod(self.songs, batch_size)

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Step -> clip (N, 2) and start (N, 2) in samples, of the first and second crop of every pair."""
        epoch, at = divmod(step, self.steps_per_epoch)
        order = torch.randperm(self.songs, generator=generator(self.seed, "order", epoch)).numpy()
        song = order[at * self.batch_size : (at + 1) * self.batch_size]
        u = torch.rand(self.batch_size, 2, generator=generator(self.seed, "crops", step), dtype=torch.float64).numpy()
        low, high = self.low[song, None], self.high[song, None]  # (N, 1)
        if self.positives == "clip":  # the first number chooses the clip by its starts, then both crops come from inside it
            place = np.searchsorted(self.end, low[:, 0] + (u[:, 0] * (high - low)[:, 0]).astype(np.int64), side="right")
            high = self.end[place, None]
            low = np.concatenate([[0], self.end])[place, None]
            u = torch.rand(self.batch_size, 2, generator=generator(self.seed, "in clip", step), dtype=torch.float64).numpy()
        at = low + np.floor(u * (high - low)).astype(np.int64)
        place = np.searchsorted(self.end, at, side="right")  # (N, 2) position in self.clip
        return self.clip[place], at - np.concatenate([[0], self.end])[place]


class Prefetch:
    """Call `make(step)` for step = first, first + 1, ... in a thread, a few steps ahead. An error there is raised here."""

    def __init__(self, make, first, last, ahead=3):
        self.queue, self.waited, self.stopped = queue.Queue(ahead), 0.0, False

        def work():
            for step in range(first, last):
                try:
                    item = (step, make(step), None)
                except Exception as error:
                    item = (step, None, error)
                while not self.stopped:
                    with contextlib.suppress(queue.Full):
                        self.queue.put(item, timeout=0.2)
                        break
                if self.stopped or item[2] is not None:
                    return

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()

    def get(self, step):
        began = time.perf_counter()
        made, item, error = self.queue.get()
        self.waited += time.perf_counter() - began
        if error is not None:
            raise error
        assert made == step
        return item

    def close(self):
        self.stopped = True
        self.thread.join()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints that survive everything
# ---------------------------------------------------------------------------------------------------------------------

CHECKPOINT = "clmr-checkpoint-1"


def save_checkpoint(path, content: dict):
    """Write `content` (tensors, numbers, strings, lists, dicts) so that a good checkpoint exists at every moment.

    The new file is written under a temporary name in the same folder and flushed to the disk; then the old one becomes
    checkpoint.previous.pt and the new one takes its place. A failed write raises OSError and leaves both as they were."""
    path = Path(path)
    temporary = path.with_suffix(".partial")
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT, **content}, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            previous = path.with_suffix(".previous.pt")
            with contextlib.suppress(FileNotFoundError):
                previous.unlink()
            os.link(path, previous)  # a second name, so that the first never goes missing
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"the checkpoint could not be written to {path.parent} ({error.strerror or error}; {buffer.tell() / 1e6:.0f} MB "
                      "needed); the one before it is untouched: make room, then type the same command") from error


def load_checkpoint(path) -> dict | None:
    """The newest readable checkpoint of `path`'s folder, or None if there is none. A damaged one is named on stderr.

    Raises: ValueError when files are there but none can be read, so that no run is started over by accident."""
    path, broken = Path(path), []
    for candidate in (path, path.with_suffix(".previous.pt")):
        if not candidate.exists():
            continue
        try:
            content = torch.load(candidate, map_location="cpu", weights_only=True)
            if not isinstance(content, dict) or content.get("format") != CHECKPOINT:
                raise ValueError(f"its format is not {CHECKPOINT!r}")
            if broken:
                print(f"pretrain.py: {broken[0]}; continuing from {candidate} (step {content['step']})", file=sys.stderr)
            return content
        except Exception as error:
            broken.append(f"{candidate} is damaged ({(str(error).splitlines() or [''])[0][:80]})")
    if broken:
        raise ValueError("; ".join(broken) + f"; no good checkpoint is left: move {path.parent} away to begin again")
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Learning rate, log, curves
# ---------------------------------------------------------------------------------------------------------------------


def rate_at(step: int, lr: float, schedule: str, warmup: int, total: int) -> float:
    """The learning rate of a step, a pure function: linear warm-up, then constant (the paper) or half a cosine to zero.

    >>> [round(rate_at(s, 1.0, "cosine", 2, 6), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def read_log(folder) -> list[dict]:
    """The objects of a run's log.jsonl; a last line cut by a crash is left out."""
    records = []
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def plot(folder) -> Path:
    """log.jsonl -> curves.png: loss, contrastive accuracy, probe, learning rate over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [r for r in read_log(folder) if "loss" in r or "probe" in r]
    panels = [(key, title) for key, title in (("loss", "contrastive loss"), ("top1", "contrastive top-1"), ("probe", "quick probe, validation"),
                                              ("lr", "learning rate")) if any(key in r for r in records)]
    if not panels:
        raise ValueError(f"{folder}/log.jsonl holds no steps yet; let the run reach its first --log-every")
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), layout="constrained")
    for axis, (key, title) in zip(np.atleast_1d(axes), panels):
        axis.plot([r["step"] for r in records if key in r], [r[key] for r in records if key in r], ".-" if key == "probe" else "-")
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
    out = Path(folder) / "curves.png"
    figure.savefig(out, dpi=110)
    plt.close(figure)
    return out


def code_version() -> str:
    """The git commit of this file's folder, `+` when it has changes; `unknown` outside a repository."""
    try:
        git = lambda *a: subprocess.run(["git", *a], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# An eye on the representation while it trains
# ---------------------------------------------------------------------------------------------------------------------


def quick_probe(encoder, train, valid, device, most=600, ridge=1.0) -> float | None:
    """Ridge regression from the middle window of each clip to its labels: macro ROC-AUC (multi-label) or accuracy on
    validation, a coarse and quick picture of the representation (collapse shows at once); evaluate.py gives the numbers.

    Args: train, valid: Clips with labels; most: clips used of each, evenly spread. None where validation has no labels."""
    from sklearn.metrics import roc_auc_score

    features, labels = [], []
    was_training = encoder.training
    encoder.eval()
    for clips in (train, valid):
        usable = np.flatnonzero((clips.length >= encoder.input_samples) & (clips.labels.sum(1) > 0))
        if len(usable) < 2:
            return None
        usable = usable[np.linspace(0, len(usable) - 1, min(most, len(usable))).astype(int)]
        start = (clips.length[usable] - encoder.input_samples) // 2
        with torch.no_grad():
            rows = [encoder(clips.crops(usable[i : i + 16], start[i : i + 16], encoder.input_samples).to(device)).double().cpu()
                    for i in range(0, len(usable), 16)]
        features.append(torch.cat(rows))
        labels.append(torch.from_numpy(clips.labels[usable]).double())
    encoder.train(was_training)
    mean, std = features[0].mean(0), features[0].std(0).clamp_min(1e-9)
    x, v = ((f - mean) / std for f in features)
    y = labels[0] - labels[0].mean(0)
    weights = torch.linalg.solve(x.T @ x + ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    scores, truth = (v @ weights + labels[0].mean(0)).numpy(), labels[1].numpy()
    if train.task == "singlelabel":
        return float((scores.argmax(1) == truth.argmax(1)).mean())
    both = (truth.sum(0) > 0) & (truth.sum(0) < len(truth))
    return float(roc_auc_score(truth[:, both], scores[:, both], average="macro")) if both.any() else None


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def build_parser():
    parser = argparse.ArgumentParser(prog="pretrain.py", description="Pre-train an encoder on unlabelled music. The defaults are the paper's.",
                                     usage="python pretrain.py --data NAME [options]   (--help lists all; torchrun --nproc_per_node=2 for two processes)",
                                     allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    group = parser.add_argument_group("data")
    group.add_argument("--data", metavar="NAME", help="prepared folder: a name under data/ or a path; its train split is used")
    group.add_argument("--positives", choices=["song", "clip"], default="song", help="both crops anywhere in the song, or in one clip of it")
    group.add_argument("--transforms", nargs="*", metavar="NAME", help="augmentations to use, in the chain's order (python augment.py --help; none for "
                       "crop only; CLMR: all, CPC: none, unless given)")
    group.add_argument("--probability", nargs="+", default=[], metavar="NAME=P", help="probabilities that differ from the chain's table")
    group.add_argument("--asymmetric", action="store_true", help="augment the first view only (Table 2)")
    group = parser.add_argument_group("model")
    group.add_argument("--method", choices=["clmr", "cpc"], default="clmr", help="contrastive learning of two views, or predictive coding")
    group.add_argument("--encoder", metavar="NAME", help="samplecnn or samplecnn-large; CPC has its own (default: the method's)")
    group.add_argument("--width", type=float, default=1.0, help="factor on all channels; 0.125 trains in minutes on a CPU")
    group.add_argument("--projection", type=int, default=128, help="dimensions of the projection z")
    group.add_argument("--recompute", type=int, default=0, metavar="BLOCKS", help="keep less of so many first blocks for the backward pass: less "
                       "memory, some more time, the same gradients")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--loss", choices=list(LOSSES), default="nt-xent", help="contrastive loss")
    group.add_argument("--temperature", type=float, default=0.5, help="of the contrastive loss")
    group.add_argument("--batch-size", type=int, help="pairs of the global batch, over all processes (default: 96; CPC: 64)")
    group.add_argument("--lr", type=float, default=3e-4, help="of Adam")
    group.add_argument("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate")
    group.add_argument("--warmup", type=int, default=0, metavar="STEPS", help="linear warm-up of the learning rate")
    group.add_argument("--epochs", type=int, default=10_000, help="length of the run; an epoch is one pair of every song")
    group.add_argument("--max-steps", type=int, help="length of the run in steps, instead of --epochs")
    group.add_argument("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision; auto: where the hardware has it")
    group = parser.add_argument_group("run")
    group.add_argument("--out", metavar="DIR", help="run folder (default: runs/NAME)")
    group.add_argument("--seed", type=int, default=0, help="of initialisation, order, crops and augmentations")
    group.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    group.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="checkpoint and encoder file")
    group.add_argument("--log-every", type=int, default=10, metavar="STEPS", help="line in log.jsonl, means over these steps")
    group.add_argument("--probe-every", type=int, default=0, metavar="STEPS", help="quick linear probe on labelled train / valid windows; 0: never")
    group.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events (needs tensorboard)")
    group.add_argument("--plot", metavar="DIR", help="draw the curves of a run folder and stop")
    return parser


def check_arguments(parser, args):
    """Whatever can be refused before any work is done; fills the defaults that depend on the method."""
    args.encoder = args.encoder or ("cpc" if args.method == "cpc" else "samplecnn")
    args.batch_size = args.batch_size or (64 if args.method == "cpc" else 96)
    if (args.method == "cpc") != (args.encoder == "cpc"):
        parser.error(f"--encoder {args.encoder} does not go with --method {args.method}; clmr takes samplecnn or samplecnn-large, cpc takes cpc")
    for name in ("batch_size", "epochs", "max_steps", "save_every", "log_every", "projection", "lr", "temperature", "width"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {value}")
    for name in ("warmup", "probe_every"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        near = [n for n in (args.batch_size // processes * processes, -(-args.batch_size // processes) * processes) if n >= 2 * processes]
        parser.error(f"--batch-size {args.batch_size} does not divide by {processes} processes; the nearest that do: {', '.join(map(str, near))}")
    probability = {}
    for item in args.probability:
        name, _, value = item.partition("=")
        try:
            probability[name] = float(value)
        except ValueError:
            parser.error(f"--probability takes NAME=P with P in [0, 1], e.g. filter=0.8, not {item!r}")
    args.probability = probability
    if args.transforms is None and args.method == "cpc":
        args.transforms = []
    elif args.transforms == ["none"]:
        args.transforms = []


def main(argv=None):
    import augment
    import model
    import prepare

    parser = build_parser()
    args = parser.parse_args(argv)
    if args.plot:
        if not (Path(args.plot) / "log.jsonl").is_file():
            parser.error(f"--plot {args.plot}: no log.jsonl there; give a run folder, e.g. runs/NAME")
        try:
            print(plot(args.plot))
            return 0
        except ValueError as error:
            print(f"pretrain.py: error: {error}", file=sys.stderr)
            return 1
    if not args.data:
        parser.error("--data is missing: a prepared folder's name or path, e.g. --data demo")
    check_arguments(parser, args)
    try:
        folder = prepare.find(args.data)
        chain = augment.Chain(1, args.transforms, args.probability) if args.transforms != [] else None  # names and numbers are right?
        device, amp = model.choose_device(args.device), None
        amp = model.choose_amp(device, args.amp)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    model.tune_allocator()
    if size > 1:
        enough = device.type == "cuda" and int(os.environ["LOCAL_WORLD_SIZE"]) <= torch.cuda.device_count()
        dist.init_process_group("cpu:gloo,cuda:nccl" if enough else "gloo")  # several processes on one GPU: gloo there too
    try:
        return train(args, prepare.Clips(folder, "train"), prepare.Clips(folder, "valid"), augment.Chain, model, device, amp, rank, size)
    except (ValueError, OSError, FloatingPointError) as error:
        if rank == 0 or isinstance(error, OSError):
            print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 1
    finally:
        if size > 1:
            dist.destroy_process_group()


def train(args, clips, valid, Chain, model, device, amp, rank, size):
    """The run. Returns 0 when it is complete, 128 + the signal's number when a signal ended it early."""
    torch.manual_seed(args.seed)  # the initialisation; everything later is drawn by `generator`
    encoder = model.build_encoder(args.encoder, width=args.width)
    if args.recompute:
        if args.method == "cpc":
            raise ValueError("--recompute is for the SampleCNN encoders; leave it out with --method cpc")
        encoder.recompute(args.recompute)
    if args.method == "cpc":
        learner = CPCLoss(encoder)
    else:
        learner = CLMR(encoder, model.Projector(encoder.out_dim, args.projection), LOSSES[args.loss], args.temperature)
    pairs = Pairs(clips.length, clips.group, encoder.input_samples, args.batch_size, args.seed, args.positives)
    total = args.max_steps or args.epochs * pairs.steps_per_epoch
    chain = None if args.transforms == [] else Chain(clips.sample_rate, args.transforms, args.probability)

    out = Path(args.out or Path("runs") / clips.name)
    config = {k: v for k, v in vars(args).items() if k not in ("data", "out", "device", "plot", "epochs", "max_steps", "save_every", "log_every",
                                                               "probe_every", "tensorboard", "recompute")}
    config |= {"amp": amp, "fingerprint": clips.fingerprint, **({"steps": total} if args.schedule == "cosine" else {})}
    checkpoint = load_checkpoint(out / "checkpoint.pt")
    done = 0
    if checkpoint:
        changed = [f"{k}: {checkpoint['config'].get(k)!r} then, {v!r} now" for k, v in config.items() if checkpoint["config"].get(k) != v]
        if changed:
            raise ValueError(f"{out} holds a run with another configuration ({'; '.join(changed)}); type the same flags to continue it, or --out for a new run")
        learner.load_state_dict(checkpoint["learner"])
        done = checkpoint["step"]
    if size > 1 or (device.type == "cpu" and amp == "off"):
        learner = synchronise(learner, device)
    learner.to(device)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    optimiser = torch.optim.Adam(learner.parameters(), lr=args.lr, betas=(0.9, 0.999), fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if checkpoint:
        optimiser.load_state_dict(checkpoint["optimiser"])
        scaler.load_state_dict(checkpoint["scaler"])
    parallel = learner
    if size > 1:
        parallel = nn.parallel.DistributedDataParallel(learner, device_ids=[device.index] if device.type == "cuda" else None, broadcast_buffers=False)

    say = print if rank == 0 else (lambda *a, **k: None)
    say(f"{clips.name}: {pairs.songs} songs, {pairs.steps_per_epoch} steps of {args.batch_size} pairs an epoch ({pairs.dropped} songs of each epoch's end "
        f"dropped, {pairs.left_out} clips shorter than {encoder.input_samples} samples left out); {size} process{'es' if size > 1 else ''} on {device.type}, amp {amp}")
    if done >= total:
        say(f"{out} is complete at step {done}; more steps: --max-steps above {done}. Next: python evaluate.py --ckpt {out}/encoder.pt")
        return 0
    log = Log(out, args, config, done, {"processes": size, "device": str(device), "songs": pairs.songs, "left_out": pairs.left_out,
                                        "steps_per_epoch": pairs.steps_per_epoch, "dropped": pairs.dropped, "total": total}) if rank == 0 else None
    if done:
        say(f"continuing from step {done} of {total}")

    local = args.batch_size // size
    mine = slice(rank * local, (rank + 1) * local)

    def make(step):
        """The audio and the augmentation values of this process's rows of the global batch."""
        clip, start = pairs.draw(step)  # (N, 2)
        if args.method == "cpc":
            clip, start = clip[:, :1], start[:, :1]
        crops = clips.crops(clip[mine].T.reshape(-1), start[mine].T.reshape(-1), encoder.input_samples)  # (2B, 1, n): first views, then second
        extra = generator(args.seed, "values", step)
        draws = negatives = None
        if chain is not None:
            views = 1 if args.asymmetric else clip.shape[1]
            draws = {k: torch.cat([v[i * args.batch_size :][mine] for i in range(views)]) for k, v in chain.draw(views * args.batch_size, extra).items()}
        if args.method == "cpc":
            frames = _frames(encoder)
            negatives = torch.randint(args.batch_size * frames, (args.batch_size, frames, 15), generator=extra)[mine]
        return (crops.pin_memory() if device.type == "cuda" else crops), draws, negatives

    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, _: caught.append(n))

    def save(step):
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            save_checkpoint(out / "checkpoint.pt", {"step": step, "config": config, "learner": learner.state_dict(),
                                                    "optimiser": optimiser.state_dict(), "scaler": scaler.state_dict()})
            model.save_encoder(out / "encoder.pt", encoder, sample_rate=clips.sample_rate, method=args.method, step=step, data=clips.name,
                               data_folder=str(args.data), fingerprint=clips.fingerprint, batch_size=args.batch_size, seed=args.seed)

    prefetch = Prefetch(make, done, total)
    sums, bad, began, waited = torch.zeros(2, device=device), -1, time.perf_counter(), 0.0
    opened, last_logged, saved = time.perf_counter(), done, done if checkpoint else None
    learner.train()
    try:
        for step in range(done, total):
            crops, draws, negatives = prefetch.get(step)
            views = crops.to(device, non_blocking=True)
            if draws is not None:
                with torch.no_grad():
                    rows = len(next(iter(draws.values())))
                    views = torch.cat([chain(views[:rows], draws), views[rows:]])
            rate = rate_at(step, args.lr, args.schedule, args.warmup, total)
            for group in optimiser.param_groups:
                group["lr"] = rate
            with model.autocast(device, amp):
                loss, top1 = parallel(views) if negatives is None else parallel(views, negatives.to(device))
            optimiser.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
            sums += torch.stack([loss.detach(), top1])
            now, last = step + 1, step + 1 == total

            # one small exchange a step: has anybody caught a signal, or lost its numbers?
            look = device.type == "cpu" or now % args.log_every == 0 or now % args.save_every == 0 or last
            flags = torch.tensor([caught[0] if caught else 0, rank + 1 if look and not torch.isfinite(sums[0]) else 0])
            if size > 1:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            stop, bad = flags.tolist()
            if bad:
                where = f"{out}/checkpoint.pt, step {saved}" if saved is not None else "none was saved yet"
                raise FloatingPointError(f"the loss is not finite at step {now}, process {bad - 1}; the last good checkpoint: {where}. "
                                         "Try a lower --lr, --amp off, or look for silent or broken clips with prepare.py --check")
            if now % args.log_every == 0 or last or stop:
                if size > 1:
                    dist.all_reduce(sums)
                elapsed, count = time.perf_counter() - began, now - last_logged
                if rank == 0:
                    mean = (sums / size / count).tolist()
                    log.write({"step": now, "epoch": round(now / pairs.steps_per_epoch, 3), "pairs": now * args.batch_size, "loss": round(mean[0], 5),
                               "top1": round(mean[1], 4), "lr": rate, "pairs_per_s": round(count * args.batch_size / elapsed, 2),
                               "wait": round((prefetch.waited - waited) / elapsed, 4)}, total)
                sums.zero_()
                began, waited, last_logged = time.perf_counter(), prefetch.waited, now
            if now % args.save_every == 0 or last or stop:
                save(now)
                saved = now
            if args.probe_every and (now % args.probe_every == 0 or last) and rank == 0 and len(clips.tags):
                value = quick_probe(encoder, clips, valid, device)
                if value is not None:
                    log.write({"step": now, "probe": round(value, 5)}, total)
                began = time.perf_counter()
            if stop and not last:
                say(f"stopped after step {now} by {signal.Signals(stop).name}; the same command continues from there")
                return 128 + stop
        if rank == 0:
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else _peak_memory()
            log.write({"step": total, "done": True, "seconds": round(time.perf_counter() - opened, 1), "peak_gib": round(peak / 2**30, 2)}, total)
    finally:
        prefetch.close()
        if log:
            log.close()
    say(f"{out}/encoder.pt after {total} steps. Next: python evaluate.py --ckpt {out}/encoder.pt")
    return 0


def _frames(encoder):
    """Frames CPC's convolutions give for one window."""
    n = encoder.input_samples
    for k, s, p in zip(encoder.kernels, encoder.strides, encoder.paddings):
        n = (n + 2 * p - k) // s + 1
    return n


def _peak_memory():
    """Largest resident memory of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Log:
    """log.jsonl and the progress on screen. Continuing at step `done` drops what an interrupted run wrote beyond it."""

    def __init__(self, out, args, config, done, facts):
        from tqdm import tqdm

        out.mkdir(parents=True, exist_ok=True)
        path = out / "log.jsonl"
        kept = [r for r in read_log(out) if r.get("step", 0) <= done and not r.get("done")] if done and path.is_file() else []
        first = {"command": sys.argv, "code": code_version(), "versions": {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__},
                 "threads": torch.get_num_threads(), "started": time.strftime("%Y-%m-%dT%H:%M:%S"), "continued_from": done, **facts, "config": config}
        path.write_text("".join(json.dumps(r) + "\n" for r in [*kept, first]))
        self.file = open(path, "a")
        self.bar = tqdm(total=facts["total"], initial=done, unit="step", disable=not sys.stderr.isatty())
        self.events = None
        if args.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs the package tensorboard; type: pip install tensorboard") from None
            self.events = SummaryWriter(out)

    def write(self, record, total):
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.events:
            for key, value in record.items():
                if key != "step":
                    self.events.add_scalar(key, value, record["step"])
        shown = {k: v for k, v in record.items() if k in ("loss", "top1", "pairs_per_s", "wait", "probe")}
        if self.bar.disable:
            eta = (total - record["step"]) * (record["pairs"] / record["step"]) / record["pairs_per_s"] if record.get("pairs_per_s") else None
            print(f"step {record['step']}/{total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()) + (f"  left {eta / 60:.0f} min" if eta else ""), flush=True)
        else:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(record["step"] - self.bar.n)

    def close(self):
        self.bar.close()
        self.file.close()
        if self.events:
            self.events.close()


if __name__ == "__main__":
    sys.exit(main())
