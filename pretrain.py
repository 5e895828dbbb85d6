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
                  pairs_per_s, wait (share of the time spent waiting for views); every --probe-every steps: probe
  curves.png      by --plot

The *global* batch of step s - songs, crops, augmentation values - is a function of (seed, s) alone. Every process draws
it as a whole and takes its rows, so 1, 2 and 4 processes take the same step (to rounding), and a killed run ends with
the same weights as an uninterrupted one (on CPUs bit for bit; on GPUs rounding differs, and grows).
Dimensions: N pairs of the global batch, B of one process, P projection.
"""
import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

try:
    import resource  # POSIX only: the peak memory in the log
except ImportError:
    resource = None

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # the differentiable one
from torch.nn import functional as F
from tqdm import tqdm

CHECKPOINT = "clmr-checkpoint-1"  # the format

# ------------------------------------------------------------------------------ The loss, over any number of processes

def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(z: Tensor) -> Tensor:
    """(B, P) of this process -> (N, P) of all processes in rank order, differentiable; one process: z itself.

    All processes must hold the same number of rows. Each process's loss depends on every process's z, and the gradients
    of our rows are summed over all of them (the own slice alone would bend the gradient): with DistributedDataParallel,
    which averages, a mean over local rows gives exactly the gradient of the mean over all rows."""
    rank, size = world()
    if size == 1:
        return z
    everybody = z.new_zeros(size, *z.shape)  # (processes, B, ...)
    everybody[rank] = z
    return all_reduce(everybody).flatten(0, 1)  # the others add zeros


def similarities(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine similarities / temperature of this process's 2B views with all 2N views, and the column of each one's partner.

                 all i (N columns)      all j (N columns)
        own i   [ -inf on itself        .  partner         ]
        own j   [ partner  .            -inf on itself     ]

    Everything in float32, also under autocast (an fp16 norm underflows, and bf16 has ties); float64 stays. The own column is -inf: no view is its own negative."""
    if z_i.shape != z_j.shape or z_i.dim() != 2:
        raise ValueError(f"expected two projections of one shape (B, P), got {list(z_i.shape)} and {list(z_j.shape)}")
    dtype = torch.float64 if z_i.dtype == torch.float64 else torch.float32
    with torch.autocast(z_i.device.type, enabled=False):  # or the product would be of half precision again
        z = F.normalize(torch.stack([z_i, z_j]).to(dtype), dim=2)  # (2, B, P)
        keys = gather(z.transpose(0, 1)).transpose(0, 1).flatten(0, 1)  # (2N, P)
        s = z.flatten(0, 1) @ keys.T / temperature  # (2B, 2N)
    B, N, rank = len(z_i), len(keys) // 2, world()[0]
    own = torch.arange(rank * B, rank * B + B, device=s.device)
    s = s.scatter(1, torch.cat([own, own + N])[:, None], float("-inf"))
    return s, torch.cat([own + N, own])


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent (section 3.4): l_ij = -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)), mean over both directions.

    Args: z_i, z_j: (B, P) projections of two views of B songs, in any float type; B is this process's share and the
    negatives are the other 2(N-1) views of all processes. temperature: 0.5 is the paper's.
    Returns: the mean over this process's 2B views; the mean of that over processes is the loss of the global batch.

    >>> z = torch.eye(2); round(nt_xent(z, z, 0.5).item(), 4)     # log(1 + 2 exp(-2))
    0.2395"""
    return F.cross_entropy(*similarities(z_i, z_j, temperature))


def dcl(z_i: Tensor, z_j: Tensor, temperature: float = 0.5) -> Tensor:
    """Decoupled contrastive loss (Yeh et al., ECCV 2022): NT-Xent without the positive in the denominator, an option for
    small batches. Arguments and reduction as in `nt_xent`.

    >>> z = torch.eye(2); round(dcl(z, z, 0.5).item(), 4)         # -2 + log 2
    -1.3069"""
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


# -------------------------------------------------------- CLMR and CPC as modules: two views in, loss and accuracy out

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
        z, (B, n, D) = z.float(), z.shape
        predictions = self.predictor(c).float().reshape(B, n, self.steps, D)
        with torch.autocast(z.device.type, enabled=False):  # positives and negatives alike in float32
            return self.score(z, predictions, negatives)

    def score(self, z, predictions, negatives):
        """z (B, n, 512), predictions (B, n, steps, 512) -> loss, accuracy."""
        B, n, _ = z.shape
        others = gather(z).flatten(0, 1)[negatives]  # (B, n, 15, 512)
        own = world()[0] * B * n + torch.arange(B * n, device=z.device).reshape(B, n, 1)
        others_are_own = negatives == own  # a negative that is the true frame itself says nothing: left out
        loss = hits = z.new_zeros(())
        for k in range(1, self.steps + 1):
            p = predictions[:, : n - k, k - 1]  # (B, n-k, 512): what the contexts say of the frame k ahead
            positive = (p * z[:, k:]).sum(-1, keepdim=True)
            negative = torch.einsum("btd,btmd->btm", p, others[:, k:]).masked_fill(others_are_own[:, k:], float("-inf"))
            logits = torch.cat([positive, negative], -1).flatten(0, 1)  # (B (n-k), 16)
            loss = loss + F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=z.device))
            hits = hits + (logits.detach().argmax(1) == 0).float().mean()
        return loss / self.steps, hits / self.steps


# --------------------------------------------------------------------------------------------- Which audio step s sees

def generator(seed: int, *purpose) -> torch.Generator:
    """A CPU generator that depends on (seed, purpose) alone: no state is carried from step to step."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Pairs:
    """The sampler: which two crops of which songs make up the global batch of a step.

    Args: length: (clips,) samples of each clip. group: (clips,) its song. n: samples of a crop (the encoder's input).
    batch_size: N, pairs of the global batch. seed. positives: `song` draws both crops anywhere in the song, `clip` both
    from one of its clips.
    Clips shorter than n take no part and are counted in `left_out`; the pairs that do not fill an epoch's last batch are
    dropped (`dropped` per epoch). No batch holds a song twice.

    >>> pairs = Pairs([100, 100, 50, 9], [0, 0, 1, 2], n=10, batch_size=2, seed=0)
    >>> pairs.left_out, pairs.steps_per_epoch, pairs.draw(0)[0].shape
    (1, 1, (2, 2))"""

    def __init__(self, length, group, n, batch_size, seed, positives="song"):
        length, group = np.asarray(length), np.asarray(group)
        self.n, self.batch_size, self.seed, self.positives = n, batch_size, seed, positives
        usable = np.flatnonzero(length >= n)
        self.left_out = len(length) - len(usable)
        self.clip = usable[np.argsort(group[usable], kind="stable")]  # clips of one song side by side
        first = np.unique(group[self.clip], return_index=True)[1]
        # all possible starts in a row: those of the k-th clip are edges[k] .. edges[k + 1], of the k-th song bounds[k] ..
        self.edges = np.concatenate([[0], np.cumsum(length[self.clip] - n + 1)])
        self.bounds, self.songs = self.edges[np.append(first, len(self.clip))], len(first)
        if batch_size < 2:
            raise ValueError(f"--batch-size {batch_size}: the negatives are the other pairs of the batch, so at least 2 are needed")
        if self.songs < 2:
            raise ValueError(f"expected at least 2 songs with at least {n} samples, found {self.songs}: the negatives of a song are "
                             "others; add music (clips that prepare.py --segment cuts from one file are one song)")
        if self.songs < batch_size:
            raise ValueError(f"--batch-size {batch_size} is larger than the {self.songs} songs with at least {n} samples, and no batch may "
                             f"hold a song twice; type --batch-size {self.songs} or less, or add music")
        self.steps_per_epoch, self.dropped = divmod(self.songs, batch_size)
        self.order = None, None  # the epoch it is of, and the songs

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Step -> clip (N, 2) and start (N, 2) in samples, of the first and second crop of every pair."""
        def between(edges, k, purpose):  # two of the starts edges[k] .. edges[k + 1] for each pair: (N, 2)
            u = torch.rand(self.batch_size, 2, generator=generator(self.seed, purpose, step), dtype=torch.float64).numpy()
            return edges[k, None] + (u * (edges[k + 1] - edges[k])[:, None]).astype(np.int64)

        epoch, batch = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, torch.randperm(self.songs, generator=generator(self.seed, "order", epoch)).numpy()
        at = between(self.bounds, self.order[1][batch * self.batch_size : (batch + 1) * self.batch_size], "crops")
        place = np.searchsorted(self.edges, at, side="right") - 1  # (N, 2), in self.clip
        if self.positives == "clip":  # the first crop chooses the clip, by its starts, then both come from inside it
            place = place[:, :1].repeat(2, 1)
            at = between(self.edges, place[:, 0], "in clip")
        return self.clip[place], at - self.edges[place]


def rate_at(step: int, lr: float, schedule: str, warmup: int, total: int) -> float:
    """The learning rate of a step, a pure function: linear warm-up, then constant (the paper) or half a cosine to zero.

    >>> [round(rate_at(s, 1.0, "cosine", 2, 6), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]"""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr if schedule == "constant" else lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


class Prefetch:
    """Call `make(step)` for step = first, first + 1, ... in a thread, a few steps ahead. An error of reading there is raised here, as OSError."""

    def __init__(self, make, first, last, ahead=4):
        self.make, self.next, self.last, self.ahead = make, first, last, ahead
        self.thread, self.made, self.waited = ThreadPoolExecutor(1), {}, 0.0

    def get(self, step):
        while self.next < min(step + 1 + self.ahead, self.last):
            self.made[self.next] = self.thread.submit(self.make, self.next)
            self.next += 1
        began = time.perf_counter()
        try:
            item = self.made.pop(step).result()
        except (OSError, ValueError, EOFError) as error:  # of reading; whatever else it is, it is not the audio's fault
            raise OSError(f"the audio of step {step} cannot be had: {error}") from error
        self.waited += time.perf_counter() - began
        return item

    def close(self):
        self.thread.shutdown(cancel_futures=True)


class Inputs:
    """What the network is given at each step, on `device`: this process's rows of the global batch. `get(step)` -> views (2B, 1, T),
    the first ones of all pairs before the second; for CPC views (B, 1, T) and negatives.

    A thread works a few steps ahead. On a CPU it cuts the crops alone, since the chain would take the step's cores; on a GPU it
    augments them too, on a stream beside the step's."""

    LIMIT = 8  # steps that a GPU may be behind its host: enough to keep it busy; more would fill its memory with views

    def __init__(self, args, clips, pairs, chain, device, first, last, frames=None):
        rank, size = world()
        self.clips, self.pairs, self.chain, self.device, self.frames, self.seed = clips, pairs, chain, device, frames, args.seed
        self.batch, local = args.batch_size, args.batch_size // size
        self.mine, self.views = slice(rank * local, (rank + 1) * local), 1 if frames else 2  # of a pair
        self.augmented = 1 if args.asymmetric else self.views
        self.stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())  # the samples may still be on their way
            self.gaps, self.behind = [], []
        self.prefetch = Prefetch(self.make, first, last)

    def draw(self, step):
        """The crops, augmentation values and negatives of this process's rows of the global batch."""
        index, start = (table[self.mine, : self.views].T.reshape(-1) for table in self.pairs.draw(step))  # first views, then second
        audio, values = self.clips.crops(index, start, self.pairs.n), generator(self.seed, "values", step)
        draws = self.chain.draw(self.augmented * self.batch, values)
        draws = {k: v.unflatten(0, (self.augmented, -1))[:, self.mine].flatten(0, 1) for k, v in draws.items()}
        n = self.frames
        negatives = [torch.randint(self.batch * n, (self.batch, n, 15), generator=values)[self.mine]] if n else []
        audio, *negatives = (t.pin_memory() if self.stream and not t.is_cuda else t for t in (audio, *negatives))
        return audio, draws, negatives

    def augment(self, audio, draws, negatives):
        first, second = audio.to(self.device, non_blocking=True).tensor_split([len(audio) * self.augmented // self.views])
        return torch.cat([self.chain(first, draws), second]), *(t.to(self.device, non_blocking=True) for t in negatives)

    def make(self, step):
        if not self.stream:
            return self.draw(step)
        torch.cuda.set_device(self.device)  # of this thread, or leaving the stream would make a context on the first GPU
        with torch.cuda.stream(self.stream):
            return self.augment(*self.draw(step)), self.stream.record_event()

    def get(self, step):
        if not self.stream:
            return self.augment(*self.prefetch.get(step))
        stream, free = torch.cuda.current_stream(), self.moment()  # free: when all steps so far are done
        self.behind.append(free)
        if len(self.behind) == self.LIMIT:
            self.behind.pop(0).synchronize()
        tensors, ready = self.prefetch.get(step)
        stream.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(stream)
        self.gaps.append((free, self.moment()))
        return tensors

    def moment(self):
        (event := torch.cuda.Event(enable_timing=True, blocking=True)).record()
        return event

    def waited(self):
        """Seconds since it was last asked that a step had to wait for its views; on a GPU by its own clock."""
        if self.stream:
            gaps, self.gaps = self.gaps, []
            return sum(free.elapsed_time(begun) for free, begun in gaps) / 1000
        seconds, self.prefetch.waited = self.prefetch.waited, 0.0
        return seconds

    def close(self):
        self.prefetch.close()


# ----------------------------------------- What a run leaves: checkpoints that survive everything, log, curves, probe

def save_checkpoint(path, content: dict):
    """Write `content` (tensors, numbers, strings, lists, dicts) so that a good checkpoint exists at every moment.

    The new file is written under a temporary name and flushed to the disk; then the old one becomes checkpoint.previous.pt
    and the new one takes its place (in between, the previous one is the good one). A failed write raises OSError and leaves
    both as they were."""
    path, buffer = Path(path), io.BytesIO()
    temporary, previous = path.with_suffix(".partial"), path.with_suffix(".previous.pt")
    torch.save({"format": CHECKPOINT, **content}, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous)  # not a link: some network and memory-card file systems have none
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            if previous.exists() and not path.exists():  # the second renaming failed
                os.replace(previous, path)
            temporary.unlink()
        raise OSError(f"the checkpoint could not be written to {path.parent} ({error.strerror or error}; {buffer.tell() / 1e6:.0f} MB "
                      "needed); the one before it is untouched: make room, then type the same command") from error


def load_checkpoint(path) -> dict | None:
    """The newest readable checkpoint of `path`'s folder, or None if there is none. A damaged one is named on stderr.

    Raises: ValueError when files are there but none can be read, so that no run is started over by accident."""
    path, broken = Path(path), []
    for candidate in filter(Path.exists, (path, path.with_suffix(".previous.pt"))):
        try:
            content = torch.load(candidate, map_location="cpu", weights_only=True)
            if content["format"] != CHECKPOINT:
                raise ValueError(f"its format is not {CHECKPOINT!r}")
        except Exception as error:  # whatever it is: not one of ours, or not whole
            broken.append(f"{candidate} is damaged ({(str(error).splitlines() or [''])[0][:80]})")
            continue
        if broken and world()[0] == 0:
            print(f"pretrain.py: {broken[0]}; continuing from {candidate} (step {content['step']})", file=sys.stderr)
            os.replace(path, path.with_suffix(".damaged"))  # or the next save would put it in the good one's place
        return content
    if broken:
        raise ValueError("; ".join(broken) + f"; no good checkpoint is left: move {path.parent} away to begin again")


def read_log(folder) -> list[dict]:
    """The objects of a run's log.jsonl; a last line cut by a crash is left out."""
    records = []
    for line in (Path(folder) / "log.jsonl").read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Log:
    """log.jsonl and its lines on screen. Continuing at step `done` drops what an interrupted run wrote beyond it."""

    def __init__(self, out, first, done, total, tensorboard=False):
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard needs the package tensorboard; type: pip install tensorboard") from None
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.total, self.events = out / "log.jsonl", total, SummaryWriter(out, purge_step=done) if tensorboard else None
        kept = read_log(out) if done and self.path.is_file() else []
        kept = [r for r in kept if r.get("step", 0) <= done and not r.get("done")]
        partial = self.path.with_suffix(".partial")  # a full disk must not cost the log
        partial.write_text("".join(json.dumps(r) + "\n" for r in [*kept, first]))
        os.replace(partial, self.path)

    def write(self, record):
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        shown = {k: v for k, v in record.items() if k in ("loss", "top1", "pairs_per_s", "wait", "probe")}
        for key, value in shown.items() if self.events else ():
            self.events.add_scalar(key, value, record["step"])
            self.events.flush()
        if "pairs" in record:
            shown["left"] = f"{(self.total / record['step'] - 1) * record['pairs'] / record['pairs_per_s'] / 60:.0f} min"
        if shown:
            tqdm.write(f"step {record['step']}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
            sys.stdout.flush()


def plot(folder) -> Path:
    """log.jsonl -> curves.png: loss, contrastive accuracy, probe and learning rate over steps."""
    from matplotlib.figure import Figure

    titles = {"loss": "contrastive loss", "top1": "contrastive top-1", "probe": "quick probe, validation", "lr": "learning rate"}
    curves = {key: [(r["step"], r[key]) for r in read_log(folder) if key in r and "step" in r] for key in titles}
    curves = {key: points for key, points in curves.items() if points}
    if not curves:
        raise ValueError(f"{folder}/log.jsonl holds no steps yet; let the run reach its first --log-every")
    figure = Figure(figsize=(4.2 * len(curves), 3.2), layout="constrained")
    for axis, (key, points) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        axis.plot(*zip(*points), ".-" if key == "probe" else "-")
        axis.set(xlabel="step", title=titles[key])
        axis.grid(alpha=0.3)
    figure.savefig(Path(folder) / "curves.png", dpi=110)
    return Path(folder) / "curves.png"


def quick_probe(encoder, train, valid, device, most=600) -> float | None:
    """Ridge regression from the middle window of each clip to its labels: macro ROC-AUC (multi-label) or accuracy on
    validation, a coarse and quick picture of the representation (collapse shows at once); evaluate.py gives the numbers.

    Args: train, valid: Clips with labels; most: clips used of each, evenly spread. None where validation has no labels."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score

    n, training = encoder.input_samples, encoder.training
    labelled = [np.flatnonzero((clips.length >= n) & ((clips.labels.sum(1) > 0) | (clips.task != "singlelabel"))) for clips in (train, valid)]
    if min(map(len, labelled)) < 2:
        return None

    @torch.no_grad()
    def table(clips, rows):
        rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]
        windows = clips.crops(rows, (clips.length[rows] - n) // 2, n).split(16)
        return torch.cat([encoder(w.to(device)).double().cpu() for w in windows]).numpy(), clips.labels[rows]

    encoder.eval()
    (x, y), (v, truth) = table(train, labelled[0]), table(valid, labelled[1])
    encoder.train(training)
    mean, std = x.mean(0), x.std(0, ddof=1).clip(1e-9)
    scores = Ridge(alpha=len(x)).fit((x - mean) / std, y).predict((v - mean) / std).reshape(truth.shape)
    if train.task == "singlelabel":
        return float((scores.argmax(1) == truth.argmax(1)).mean())
    both = (truth.sum(0) > 0) & (truth.sum(0) < len(truth))
    return float(roc_auc_score(truth[:, both], scores[:, both], average="macro")) if both.any() else None


# ---------------------------------------------------------------------------------------------- One step of training

def plain_step(learner, optimiser, scaler, autocast):
    """step(inputs, rate) -> loss, top1: forward pass, backward pass and update."""
    def step(inputs, rate):
        optimiser.param_groups[0]["lr"] = rate
        with autocast():
            loss, top1 = learner(*inputs)
        optimiser.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimiser)
        scaler.update()
        return loss.detach(), top1
    return step


def captured_step(learner, optimiser, scaler, autocast, views):
    """The same as a CUDA graph: its 300 launches are then one, for which a host that also runs the chain has the time. The
    optimiser must be `capturable`; views (2B, 1, T) show the shape. Weights, statistics and optimiser are left as they are."""
    inputs, rate, graph, warm = torch.randn_like(views), torch.zeros((), device=views.device), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    step = plain_step(learner, optimiser, scaler, autocast)
    weights = {name: value.clone() for name, value in learner.state_dict().items()}
    moments = {p: {key: value.clone() for key, value in state.items()} for p, state in optimiser.state.items()}
    warm.wait_stream(torch.cuda.current_stream())
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True  # the fastest algorithms, which the graph then keeps
    try:
        with torch.cuda.stream(warm), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*capturable=True.*")
            for _ in range(3):
                step([inputs], rate)
        torch.cuda.current_stream().wait_stream(warm)
        optimiser.zero_grad(set_to_none=True)  # the graph's gradients are its own
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, top1 = step([inputs], rate)
    finally:
        torch.backends.cudnn.benchmark = benchmark
    learner.load_state_dict(weights)
    for p, state in optimiser.state.items():
        for key, value in state.items():  # in place: the graph holds these tensors
            value.copy_(moments[p][key]) if p in moments else value.zero_()

    tensors = [*learner.state_dict().values(), *(value for state in optimiser.state.values() for value in state.values())]

    def replay(given, now, needed=tensors):  # the graph knows their addresses, and would not notice if they were freed
        inputs.copy_(given[0])
        rate.fill_(now)
        graph.replay()
        return loss, top1
    return replay


# ---------------------------------------------------------------------------------------------------- the command

def build_parser():
    parser = argparse.ArgumentParser(
        prog="pretrain.py", description="Pre-train an encoder on unlabelled music. The defaults are the paper's.", allow_abbrev=False,
        usage="python pretrain.py --data NAME [options]   (--help lists all; torchrun --nproc_per_node=2 for two processes)",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="NAME", help="prepared folder: a name under data/ or a path; its train split is used")
    add("--positives", choices=["song", "clip"], default="song", help="both crops anywhere in the song, or in one clip of it")
    add("--transforms", nargs="*", metavar="NAME", help="augmentations to use; none: crop only (CLMR: all, CPC: none, unless given)")
    add("--probability", nargs="+", default=[], metavar="NAME=P", help="probabilities that differ from the chain's table in augment.py")
    add("--asymmetric", action="store_true", help="augment the first view only (Table 2)")
    add = parser.add_argument_group("model").add_argument
    add("--method", choices=["clmr", "cpc"], default="clmr", help="contrastive learning of two views, or predictive coding")
    add("--encoder", metavar="NAME", help="samplecnn or samplecnn-large; CPC has its own (default: the method's)")
    add("--width", type=float, default=1.0, help="factor on all channels; 0.125 trains in minutes on a CPU")
    add("--projection", type=int, default=128, help="dimensions of the projection z")
    add("--recompute", type=int, default=0, metavar="BLOCKS", help="keep less of so many first blocks for the backward pass: less memory, same gradients")
    add = parser.add_argument_group("optimisation").add_argument
    add("--loss", choices=list(LOSSES), default="nt-xent", help="contrastive loss")
    add("--temperature", type=float, default=0.5, help="of the contrastive loss")
    add("--batch-size", type=int, help="pairs of the global batch, over all processes (default: 96; CPC: 64)")
    add("--lr", type=float, default=3e-4, help="of Adam")
    add("--schedule", choices=["constant", "cosine"], default="constant", help="of the learning rate")
    add("--warmup", type=int, default=0, metavar="STEPS", help="linear warm-up of the learning rate")
    add("--epochs", type=int, default=10_000, help="length of the run; an epoch is one pair of every song")
    add("--max-steps", type=int, help="length of the run in steps, instead of --epochs")
    add("--amp", choices=["auto", "off", "bf16", "fp16"], default="auto", help="mixed precision; auto: where the hardware has it")
    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="DIR", help="run folder (default: runs/NAME)")
    add("--seed", type=int, default=0, help="of initialisation, order, crops and augmentations")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--save-every", type=int, default=100, metavar="STEPS", help="checkpoint and encoder file")
    add("--log-every", type=int, default=10, metavar="STEPS", help="line in log.jsonl, means over these steps")
    add("--probe-every", type=int, default=0, metavar="STEPS", help="quick linear probe on labelled train / valid windows; 0: never")
    add("--tensorboard", action="store_true", help="also write TensorBoard events (needs tensorboard)")
    add("--plot", metavar="DIR", help="draw the curves of a run folder and stop")
    return parser


def check_arguments(parser, args):
    """Refuse whatever can be refused before any work is done; fill the defaults that depend on the method."""
    cpc, size = args.method == "cpc", int(os.environ.get("WORLD_SIZE", 1))
    args.encoder = args.encoder or ("cpc" if cpc else "samplecnn")
    args.batch_size = (64 if cpc else 96) if args.batch_size is None else args.batch_size
    args.transforms = [] if args.transforms == ["none"] or (args.transforms is None and cpc) else args.transforms
    if not args.data:
        parser.error("--data is missing: a prepared folder's name or path, e.g. --data demo")
    if cpc != (args.encoder == "cpc"):
        parser.error(f"--encoder {args.encoder} does not go with --method {args.method}; clmr takes samplecnn or samplecnn-large, cpc takes cpc")
    unused = [name for name in ("loss", "temperature", "projection", "asymmetric", "recompute") if getattr(args, name) != parser.get_default(name)]
    if cpc and unused:
        parser.error(f"--{unused[0]} is for --method clmr; leave it out with --method cpc")
    may_be_0 = ("warmup", "probe_every", "recompute")
    for name in ("batch_size", "epochs", "max_steps", "save_every", "log_every", "projection", "lr", "temperature", "width", *may_be_0):
        value = getattr(args, name)
        if value is not None and not (0 <= value < math.inf and (value or name in may_be_0)):
            parser.error(f"--{name.replace('_', '-')} {value} is out of range: a finite number above 0 is expected")
    if args.batch_size % size:
        below = args.batch_size // size * size
        near = ", ".join(map(str, sorted({max(n, size) for n in (below, below + size)})))
        parser.error(f"--batch-size {args.batch_size} does not divide by {size} processes; the nearest that do: {near}")
    try:
        args.probability = {name: float(value) for name, _, value in (item.partition("=") for item in args.probability)}
    except ValueError:
        parser.error(f"--probability takes NAME=P with P in [0, 1], e.g. filter=0.8, not {' '.join(args.probability)}")


def train(args, clips, valid, Chain, model, device, amp):
    """The run. Returns 0 when it is complete, 128 + the signal's number when a signal ended it early."""
    rank, size = world()
    cpc, gpu = args.method == "cpc", device.type == "cuda"
    say = print if rank == 0 else (lambda text: None)
    torch.manual_seed(args.seed)  # the initialisation; everything later is drawn by `generator`
    encoder = model.build_encoder(args.encoder, width=args.width)
    if args.recompute:
        encoder.recompute(args.recompute)
    learner = CPCLoss(encoder) if cpc else CLMR(
        encoder, model.Projector(encoder.out_dim, args.projection), LOSSES[args.loss], args.temperature)
    pairs = Pairs(clips.length, clips.group, encoder.input_samples, args.batch_size, args.seed, args.positives)
    chain = Chain(clips.sample_rate, args.transforms, args.probability)
    total = args.max_steps or args.epochs * pairs.steps_per_epoch

    out = Path(args.out or Path("runs") / clips.name)
    free = ("data", "out", "device", "plot", "epochs", "max_steps", "save_every", "log_every", "probe_every", "tensorboard", "recompute")
    config = {k: v for k, v in vars(args).items() if k not in free} | {"amp": amp, "fingerprint": clips.fingerprint}
    config |= {"steps": total} if args.schedule == "cosine" else {}
    checkpoint = load_checkpoint(out / "checkpoint.pt") or {"step": 0, "config": config}
    then, done = checkpoint["config"], checkpoint["step"]
    changed = [f"{k}: {then.get(k)!r} then, {config.get(k)!r} now" for k in {**config, **then} if then.get(k) != config.get(k)]
    if changed:
        raise ValueError(f"{out} holds a run with another configuration ({'; '.join(changed)}); type the same flags to continue it, "
                         "or --out for a new run")
    if done >= total:
        say(f"{out} is complete at step {done}; more steps: --max-steps above {done}. Next: python evaluate.py --ckpt {out}/encoder.pt")
        return 0
    if size > 1:
        learner = model.synchronise(learner, device)
    learner.to(device).train()
    if gpu and int(os.environ.get("LOCAL_WORLD_SIZE", size)) <= max(1, torch.cuda.device_count()):  # several share none
        clips.keep_on(device)  # if they fit; else a thread reads them ahead
    captured = gpu and size == 1 and not cpc and amp != "fp16"
    optimiser = torch.optim.Adam(learner.parameters(), lr=args.lr, betas=(0.9, 0.999), fused=True, capturable=captured)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    state = {"learner": learner, "optimiser": optimiser, "scaler": scaler}
    for name in state if done else ():
        state[name].load_state_dict(checkpoint[name])
    optimiser.param_groups[0].update(capturable=captured)  # as here, not as where the checkpoint was written
    parallel = learner if size == 1 else nn.parallel.DistributedDataParallel(
        learner, device_ids=[device.index] if gpu else None, broadcast_buffers=False)

    say(f"{clips.name}: {pairs.songs} songs, {pairs.steps_per_epoch} steps of {args.batch_size} pairs an epoch ({pairs.dropped} songs of each epoch's end "
        f"dropped, {pairs.left_out} clips shorter than {pairs.n} samples left out); {size} process{'es' * (size > 1)} on {device.type}, amp {amp}")
    if args.probe_every and not (clips.tags and len(valid)):
        say("--probe-every: the data has no labelled train and valid clips to probe")
    say(f"continuing from step {done} of {total}" if done else f"{total} steps")
    head = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], "code": model.code_version(), "versions": model.versions() | {"numpy": np.__version__},
            "started": time.strftime("%Y-%m-%dT%H:%M:%S"), "processes": size, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if gpu else str(device),
            "continued_from": done, "total": total, "songs": pairs.songs, "left_out": pairs.left_out,
            "steps_per_epoch": pairs.steps_per_epoch, "dropped": pairs.dropped, "config": config}
    log = Log(out, head, done, total, args.tensorboard) if rank == 0 else None

    parts = parallel, optimiser, scaler, lambda: model.autocast(device, amp)
    take = captured_step(*parts, torch.empty(2 * args.batch_size, 1, pairs.n, device=device)) if captured else plain_step(*parts)
    inputs = Inputs(args, clips, pairs, chain, device, done, total, encoder.frames_per_window if cpc else None)
    sums, caught = torch.zeros(2, device=device), []
    handlers = {n: signal.signal(n, lambda n, _: caught.append(n)) for n in (signal.SIGTERM, signal.SIGINT)}
    opened, began, logged, saved = time.perf_counter(), time.perf_counter(), done, done
    try:
        for step in tqdm(range(done, total), initial=done, total=total, unit="step", disable=rank > 0 or not sys.stderr.isatty()):
            rate = rate_at(step, args.lr, args.schedule, args.warmup, total)
            sums += torch.stack(take(inputs.get(step), rate))
            now, last = step + 1, step + 1 == total
            logs, saves, probes = (every and (now % every == 0 or last) for every in (args.log_every, args.save_every, args.probe_every))

            # one small exchange a step: has anybody caught a signal, or lost its numbers? (a GPU is asked when it must answer anyway)
            number = caught[0] if caught else 0  # read once: what is saved below must have been looked at here
            look = not gpu or logs or saves or number
            finite = not look or torch.isfinite(sums[0]) and (not (saves or number) or all(t.isfinite().all() for t in learner.state_dict().values()))
            flags = torch.tensor([number, 0 if finite else rank + 1])
            if size > 1:
                dist.all_reduce(flags, op=dist.ReduceOp.MAX)
            stop, bad = flags.tolist()
            if bad:
                where = f"{out}/checkpoint.pt, step {saved}" if saved else "none was saved yet"
                raise FloatingPointError(f"the loss or a weight is not finite at step {now}, process {bad - 1}; the last good checkpoint: {where}. "
                                         "Try a lower --lr, --amp off, or look for silent or broken clips with prepare.py --check")
            if logs or stop:
                if size > 1:
                    dist.all_reduce(sums)
                loss, top1 = (sums / size / (now - logged)).tolist()
                elapsed, waited = time.perf_counter() - began, inputs.waited()
                if log:
                    log.write({"step": now, "epoch": round(now / pairs.steps_per_epoch, 3), "pairs": now * args.batch_size, "loss": round(loss, 5),
                               "top1": round(top1, 4), "lr": rate, "pairs_per_s": round((now - logged) * args.batch_size / elapsed, 2),
                               "wait": round(waited / elapsed, 4)})
                sums.zero_()
                began, logged = time.perf_counter(), now
            if saves or stop:
                if log:
                    content = {"step": now, "config": config} | {name: part.state_dict() for name, part in state.items()}
                    model.save_encoder(out / "encoder.pt", encoder, sample_rate=clips.sample_rate, method=args.method, step=now, data=clips.name,
                                       data_folder=str(args.data), fingerprint=clips.fingerprint, batch_size=args.batch_size, seed=args.seed)
                    save_checkpoint(out / "checkpoint.pt", content)  # last: what it says is done is all there
                saved = now
            if log and probes and clips.tags:
                paused, value = time.perf_counter(), quick_probe(encoder, clips, valid, device)
                if value is not None:
                    log.write({"step": now, "probe": round(value, 5)})
                began += time.perf_counter() - paused
            if stop:
                break
        if log and last:
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 if resource else None
            peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else own
            log.write({"step": total, "done": True, "seconds": round(time.perf_counter() - opened, 1), "peak_gib": peak and round(peak, 2)})
        if size > 1:
            dist.barrier()  # nobody takes the group apart while another still works in it
    finally:
        inputs.close()
        for number, handler in handlers.items():  # main may have been called from a program that goes on
            signal.signal(number, handler or signal.SIG_DFL)
    if not last:
        say(f"stopped after step {now} by {signal.Signals(stop).name}; the same command continues from there")
        return 128 + stop
    say(f"{out}/encoder.pt after {total} steps. Next: python evaluate.py --ckpt {out}/encoder.pt")
    return 0


def main(argv=None):
    import augment
    import model
    import prepare

    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.plot:
        check_arguments(parser, args)
    elif not (Path(args.plot) / "log.jsonl").is_file():
        parser.error(f"--plot {args.plot}: no log.jsonl there; give a run folder, e.g. runs/NAME")
    try:
        if args.plot:
            print(plot(args.plot))
            return 0
        try:
            folder, device = prepare.find(args.data), model.choose_device(args.device)
            amp = model.choose_amp(device, args.amp)
            augment.Chain(prepare.SAMPLE_RATE, args.transforms, args.probability)  # are the names and numbers right?
            if args.encoder not in model.ENCODERS:
                raise ValueError(f"--encoder {args.encoder}: there are {', '.join(model.ENCODERS)}")
        except (ValueError, OSError) as error:
            parser.error(str(error))
        model.tune_allocator()
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            enough = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])) <= torch.cuda.device_count()
            dist.init_process_group("cpu:gloo,cuda:nccl" if enough else "gloo")  # several processes on one GPU: gloo there too
        return train(args, prepare.Clips(folder, "train"), prepare.Clips(folder, "valid"), augment.Chain, model, device, amp)
    except KeyboardInterrupt:  # while it loads; later a signal ends the step, and saves
        print("pretrain.py: interrupted before the first step; the same command begins again", file=sys.stderr)
        return 1
    except (ValueError, OSError, FloatingPointError) as error:
        if world()[0] == 0 or isinstance(error, OSError):
            print(f"pretrain.py: error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(f"pretrain.py: error: the GPU's memory is too small ({str(error).split('. ')[0]}); type a smaller --batch-size, or --recompute 3", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        print(f"pretrain.py: error: process {world()[0]} stops, since another one ended; see its message", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
