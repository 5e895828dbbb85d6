"""Pre-train an encoder without labels: CLMR (Spijkervet & Burgoyne, ISMIR 2021, sections 3.1 to
3.4) or CPC (section 3.5).

    python pretrain.py --data demo --width 0.125 --batch-size 16 --max-steps 20     # a minute
    torchrun --nproc_per_node=2 pretrain.py --data mtat      # the paper's run, two processes
    python pretrain.py --data mtat --transforms filter --probability filter=1 --asymmetric
    python pretrain.py --data mine more                      # two prepared folders as one set

The same command again continues where the run stopped; a finished one says so. In runs/NAME/:
  checkpoint.pt   everything to continue (checkpoint.previous.pt: the one before it)
  encoder.pt      the encoder alone, for evaluate.py, transfer.py and library/
  log.jsonl       command, versions, configuration; then, per log step: step, epoch, pairs (seen),
                  loss, top1 (share of views whose nearest view is their partner), lr, pairs_per_s,
                  wait (share of the time, for views), others (of each process, for slower ones)

The *global* batch of step s - songs, crops, augmentation values - is a function of (seed, s).
Every process draws all of it and takes its rows, so 1, 2 and 4 processes take the same step (to
rounding), and a killed run ends with the weights of a whole one (on CPUs bit for bit).
Dimensions: N pairs of the global batch, B of one process, P projection, T samples of a crop.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import math
import os
import signal
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch is imported ends it silently
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of a lost connection we tell ourselves
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve beside others

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # the differentiable one
from torch.nn import functional as F

CHECKPOINT = "clmr-checkpoint-1"  # the format

# ------------------------------------------------------- The loss, over any number of processes


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather(z: Tensor) -> Tensor:
    """(B, ...) of this process -> (N, ...) of all processes in rank order, differentiable.

    All must hold equally many. Every process's loss depends on our rows, so their gradients are
    summed over all of them (our slice alone would bend the gradient): with torch's DDP, which
    averages, a mean over local rows gives exactly the gradient of the mean over all rows."""
    rank, size = world()
    if size == 1:
        return z
    everybody = z.new_zeros(size, *z.shape)  # (processes, B, ...)
    everybody[rank] = z
    return all_reduce(everybody).flatten(0, 1)  # the others add zeros


def similarities(z_i: Tensor, z_j: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Cosine similarities / temperature of this process's 2B views with all 2N views.

                 all i (N columns)      all j (N columns)
        our i   [ -inf on itself        .  partner         ]
        our j   [ partner  .            -inf on itself     ]

    In float32 also under autocast (an fp16 norm underflows, and bf16 has ties); float64 stays.
    Returns: (2B, 2N), -inf where a view meets itself; and (2B,) the column of each's partner."""
    if z_i.shape != z_j.shape or z_i.dim() != 2:
        raise ValueError("expected two projections of one shape (B, P), "
                         f"got {list(z_i.shape)} and {list(z_j.shape)}")
    dtype = torch.float64 if z_i.dtype == torch.float64 else torch.float32
    with torch.autocast(z_i.device.type, enabled=False):  # or the product would be in half
        z = F.normalize(torch.stack([z_i, z_j]).to(dtype), dim=2)  # (2, B, P)
        keys = gather(z.transpose(0, 1)).transpose(0, 1).flatten(0, 1)  # (2N, P)
        s = z.flatten(0, 1) @ keys.T / temperature  # (2B, 2N)
    B = len(z_i)
    N = len(keys) // 2
    column = world()[0] * B + torch.arange(B, device=s.device)  # of a first view; N on: its partner
    itself = torch.cat([column, column + N])
    return s.scatter(1, itself[:, None], float("-inf")), torch.cat([column + N, column])


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent (section 3.4): l_ij = -log(exp(s_ij / t) / sum over k != i of exp(s_ik / t)).

    Args: z_i, z_j: (B, P) projections of two views of this process's B songs, in any float type;
    the negatives are the other 2(N-1) views of all processes. temperature: t, the paper's 0.5.
    Returns: the mean over 2B views; the mean over the processes is that of the global batch.

    >>> z = torch.eye(2); round(nt_xent(z, z, 0.5).item(), 4)     # log(1 + 2 exp(-2))
    0.2395"""
    return F.cross_entropy(*similarities(z_i, z_j, temperature))


def dcl(z_i: Tensor, z_j: Tensor, temperature: float = 0.5) -> Tensor:
    """Decoupled contrastive loss (Yeh et al., ECCV 2022): NT-Xent without the positive in the
    denominator, an option for small batches. Arguments and reduction as in `nt_xent`.

    >>> z = torch.eye(2); round(dcl(z, z, 0.5).item(), 4)         # -2 + log 2
    -1.3069"""
    s, partner = similarities(z_i, z_j, temperature)
    positive = s.gather(1, partner[:, None])
    negatives = s.scatter(1, partner[:, None], float("-inf"))
    return (negatives.logsumexp(1) - positive[:, 0]).mean()


LOSSES = {"nt-xent": nt_xent, "dcl": dcl}  # of --loss: (z_i, z_j, temperature) -> scalar


@torch.no_grad()
def contrastive_top1(z_i: Tensor, z_j: Tensor) -> Tensor:
    """Share of this process's views whose most similar view of the global batch is their partner;
    chance is 1 / (2N - 1)."""
    s, partner = similarities(z_i.detach(), z_j.detach(), 1.0)
    return (s.argmax(1) == partner).float().mean()


class CLMR(nn.Module):
    """The learner: `forward(views (2B, 1, T)) -> loss, top1`, first views before second ones."""

    def __init__(self, encoder, projector, loss: Callable = nt_xent, temperature: float = 0.5):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.loss = loss
        self.temperature = temperature

    def forward(self, views):
        z_i, z_j = self.projector(self.encoder(views)).chunk(2)  # one pass: statistics over both
        return self.loss(z_i, z_j, self.temperature), contrastive_top1(z_i, z_j)


# -------------------------------------------------------------------- Which audio step s sees


class Pairs:
    """The sampler: which two crops of which songs make up the global batch of a step.

    Args: length: (clips,) samples of each clip. group: (clips,) its song. n: samples of a crop (the
    encoder's input). batch_size: N. seed. positives: `song` draws both crops anywhere in the song,
    `clip` both from one of its clips.
    Clips shorter than n take no part (`left_out` of them); the pairs that do not fill an epoch's
    last batch are dropped (`dropped` per epoch). No batch holds a song twice.

    >>> pairs = Pairs([100, 100, 50, 9], [0, 0, 1, 2], n=10, batch_size=2, seed=0)
    >>> pairs.left_out, pairs.steps_per_epoch, pairs.draw(0)[0].shape
    (1, 1, (2, 2))"""

    def __init__(self, length, group, n: int, batch_size: int, seed: int, positives: str = "song"):
        length = np.asarray(length)
        group = np.asarray(group)
        usable = np.flatnonzero(length >= n)
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.positives = positives
        self.left_out = len(length) - len(usable)
        self.clip = usable[np.argsort(group[usable], kind="stable")]  # a song's clips side by side
        first = np.unique(group[self.clip], return_index=True)[1]
        # All possible starts in a row: the k-th clip's are edges[k] .. edges[k + 1], the k-th
        # song's bounds[k] .. bounds[k + 1].
        self.edges = np.concatenate([[0], np.cumsum(length[self.clip] - n + 1)])
        self.bounds = self.edges[np.append(first, len(self.clip))]
        self.songs = len(first)
        if self.songs < 2:
            raise ValueError(f"expected at least 2 songs with at least {n} samples, found "
                             f"{self.songs} (the segments of a file are one song): add music")
        if batch_size < 2:
            raise ValueError(f"--batch-size {batch_size}: negatives are other pairs, so at least 2")
        if self.songs < batch_size:
            raise ValueError(f"--batch-size {batch_size}: no batch holds a song twice, and only "
                             f"{self.songs} have {n} samples; type --batch-size {self.songs}")
        self.steps_per_epoch, self.dropped = divmod(self.songs, batch_size)
        self.epoch = None  # the one that self.order is of

    def draw(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Step -> clip (N, 2) and start (N, 2) in samples of the two crops of each pair."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if self.epoch != epoch:
            chance = self.chance("order", epoch)
            self.order = torch.randperm(self.songs, generator=chance).numpy()
            self.epoch = epoch
        songs = self.order[batch * self.batch_size : (batch + 1) * self.batch_size]
        at = self.between(self.bounds, songs, "crops", step)
        place = np.searchsorted(self.edges, at, side="right") - 1  # (N, 2), in self.clip
        if self.positives == "clip":  # the first crop, by its starts, has chosen the clip
            place = place[:, :1].repeat(2, 1)
            at = self.between(self.edges, place[:, 0], "in clip", step)
        return self.clip[place], at - self.edges[place]

    def chance(self, *purpose) -> torch.Generator:
        """Random numbers that depend on (seed, purpose) alone: nothing goes from step to step."""
        digest = hashlib.sha256(repr((self.seed, *purpose)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def between(self, edges, k, purpose: str, step: int) -> np.ndarray:
        """Two of the starts edges[k] .. edges[k + 1] for each pair: (N, 2)."""
        chance = self.chance(purpose, step)
        u = torch.rand(self.batch_size, 2, generator=chance, dtype=torch.float64).numpy()
        return edges[k, None] + (u * (edges[k + 1] - edges[k])[:, None]).astype(np.int64)


# ----------------------------------------------------------------- One step, and what a run leaves


def rate_at(step: int, lr: float, schedule: str, warmup: int, total: int) -> float:
    """The learning rate of a step: linear warm-up, then constant (the paper) or half a cosine to 0.

    >>> [round(rate_at(s, 1.0, "cosine", 2, 6), 3) for s in range(6)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]"""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def plain_step(learner, optimiser, scaler, autocast) -> Callable:
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


def save_checkpoint(path, content: dict):
    """Write tensors, numbers, strings, lists, dicts; a good file exists at every moment.

    The new one is written under a temporary name and flushed to the disk; then the old one
    becomes checkpoint.previous.pt and the new one takes its place (in between, the previous one
    is the good one). A failed write raises OSError and leaves both as they were."""
    path = Path(path)
    temporary = path.with_suffix(".partial")
    previous = path.with_suffix(".previous.pt")
    buffer = io.BytesIO()
    torch.save({"format": CHECKPOINT, **content}, buffer)
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            os.replace(path, previous)  # not a link: some network and memory-card systems have none
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            if previous.exists() and not path.exists():  # the second renaming failed
                os.replace(previous, path)
            temporary.unlink()
        raise OSError(f"the checkpoint, {buffer.tell() / 1e6:.0f} MB, could not be written to "
                      f"{path.parent} ({error.strerror or error}); the one before is untouched: "
                      "make room, then type the same command") from error


def load_checkpoint(path) -> dict | None:
    """The newest whole checkpoint of `path`'s folder, or None if there is none.

    A damaged one is named on stderr and moved aside, or the next save would put it in the place of
    the good one. Raises ValueError when files are there but none can be read, so that no run is
    started over by accident."""
    path = Path(path)
    damaged = []
    for candidate in filter(Path.exists, (path, path.with_suffix(".previous.pt"))):
        try:
            file = io.BytesIO(candidate.read_bytes())
            if zipfile.ZipFile(file).testzip():  # which torch does not compare
                raise ValueError("a checksum does not fit")
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
            if content["format"] != CHECKPOINT:
                raise ValueError(f"its format is not {CHECKPOINT!r}")
            if not all(weight.isfinite().all() for weight in content.get("learner", {}).values()):
                raise ValueError("a weight is not finite")
        except Exception as error:  # whatever it is: not one of ours, or not whole
            reason = (str(error).splitlines() or [""])[0][:80]
            damaged.append(f"{candidate} is damaged ({reason})")
            continue
        if damaged and world()[0] == 0:
            print(f"pretrain.py: {damaged[0]}; continuing from {candidate} (step "
                  f"{content.get('step')})", file=sys.stderr)
            os.replace(path, path.with_suffix(".damaged"))
        return content
    if damaged:
        raise ValueError(f"{'; '.join(damaged)}; no good checkpoint is left: move {path.parent} "
                         "away to begin again")
    return None


# ------------------------------------------------------------------------------------- program
# A function that needs a sibling imports it itself: what stands above works wherever it is copied.


def flag(default, help: str, **argument):
    """A field of `Settings`, and what `build_parser` makes of it."""
    return field(default=default, metadata={"help": help, **argument})


@dataclass
class Settings:
    """The flags. To add one, add a line; the defaults are the paper's."""

    data: list = flag(None, "prepared folders, by name or path: their train splits are one set",
                      nargs="+", metavar="NAME")
    positives: str = flag("song", "both crops anywhere in the song, or in one clip of it",
                          choices=["song", "clip"])
    transforms: list = flag(None, "augmentations; none: crop only (default: CLMR all, CPC none)",
                            nargs="*", metavar="NAME")
    probability: list = flag((), "probabilities that differ from augment.py's table",
                             nargs="+", metavar="NAME=P")
    asymmetric: bool = flag(False, "augment the first view only (Table 2)", action="store_true")
    method: str = flag("clmr", "contrast of two views, or prediction", choices=["clmr", "cpc"])
    encoder: str = flag(None, "of model.py (default: samplecnn; CPC's is cpc)", metavar="NAME")
    width: float = flag(1.0, "factor on all channels; 0.125 trains in minutes on a CPU")
    projection: int = flag(128, "dimensions of the projection z")
    recompute: int = flag(0, "so many blocks keep less for the backward pass", metavar="BLOCKS")
    loss: str = flag("nt-xent", "the paper's, or the decoupled one", choices=list(LOSSES))
    temperature: float = flag(0.5, "of the contrastive loss")
    batch_size: int = flag(None, "pairs, of all processes (default: 96, CPC 64, or all songs)")
    lr: float = flag(3e-4, "learning rate of Adam")
    schedule: str = flag("constant", "of the learning rate", choices=["constant", "cosine"])
    warmup: int = flag(0, "linear start of the learning rate", metavar="STEPS")
    epochs: int = flag(10_000, "length of the run; an epoch is one pair of every song")
    max_steps: int = flag(None, "length of the run in steps, instead of --epochs")
    amp: str = flag("auto", "mixed precision; auto: where the hardware has it",
                    choices=["auto", "off", "bf16", "fp16"])
    out: str = flag(None, "run folder (default: runs/NAME)", metavar="DIR")
    seed: int = flag(0, "of initialisation, order, crops and augmentations")
    timeout: float = flag(5.0, "how long to wait for another process", metavar="MINUTES")
    device: str = flag("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    save_every: int = flag(100, "checkpoint and encoder file", metavar="STEPS")
    log_every: int = flag(10, "line in log.jsonl, means over these steps", metavar="STEPS")
    probe_every: int = flag(0, "quick probe of labelled clips; 0: never", metavar="STEPS")


STATE = "learner", "optimiser", "scaler"  # of a run, in a checkpoint
GROUPS = {"data": "data", "method": "model", "loss": "optimisation", "out": "run"}  # first flags
FREE = {"data", "recompute", "epochs", "max_steps", "out", "timeout", "device", "save_every",
        "log_every", "probe_every"}  # may change when a run is continued: its numbers do not


def build_parser():
    """The parser of `Settings`."""
    parser = argparse.ArgumentParser(
        "pretrain.py", "python pretrain.py --data NAME [options]   (--help lists all)",
        "Pre-train an encoder without labels; the defaults are the paper's.", allow_abbrev=False)
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        number = {"type": f.type} if f.type in (int, float) else {}
        name = f"--{f.name.replace('_', '-')}"
        group.add_argument(name, default=f.default, **f.metadata, **number)
    return parser


def read_settings(parser, argv) -> Settings:
    """Refuse what can be refused before any work; fill in what depends on the method."""
    s = Settings(**vars(parser.parse_args(argv)))
    cpc = s.method == "cpc"
    size = int(os.environ.get("WORLD_SIZE", 1))
    s.encoder = s.encoder or ("cpc" if cpc else "samplecnn")
    if s.transforms == ["none"] or (s.transforms is None and cpc):
        s.transforms = []
    if wrong := import_module("training.processes").wrong_start():
        parser.error(wrong)
    if not s.data:
        parser.error("--data is missing: a prepared folder's name or path, e.g. --data demo")
    if cpc != (s.encoder == "cpc"):
        parser.error(f"--encoder {s.encoder} does not go with --method {s.method}: cpc needs cpc")
    for name in ("loss", "temperature", "projection", "asymmetric", "recompute"):
        if cpc and getattr(s, name) != parser.get_default(name):
            parser.error(f"--{name} is for --method clmr; leave it out with --method cpc")
    for f in fields(s):
        value = getattr(s, f.name)
        number = f.type in (int, float) and f.name != "seed" and value is not None
        if number and not (0 <= value < math.inf and (value or f.default == 0)):
            name = f"--{f.name.replace('_', '-')}"
            parser.error(f"{name} {value} is out of range: expected a finite number above 0")
    if s.batch_size and s.batch_size % size:
        below = s.batch_size // size * size
        near = ", ".join(str(n) for n in (below, below + size) if n)
        parser.error(f"--batch-size {s.batch_size} does not divide by {size} processes; the "
                     f"nearest that do: {near}")
    try:
        pairs = [item.partition("=") for item in s.probability]
        s.probability = {name: float(value) for name, _, value in pairs}
    except ValueError:
        given = " ".join(s.probability)
        parser.error(f"--probability takes NAME=P, P in [0, 1], e.g. filter=0.8, not {given}")
    return s


@functools.cache
def graph_kernels():
    """kernels/graph.py, which makes one launch of a step; None, and a line, where it is missing."""
    try:
        return import_module("kernels.graph")
    except ImportError as error:
        print(f"pretrain.py: each step is launched in pieces, slower ({error})", file=sys.stderr)
        return None


class Run:
    """A run: what it hears, its learner, optimiser and scaler, and the step they are at."""

    def __init__(self, settings: Settings, clips, valid, device, amp: str):
        model = import_module("model")
        self.settings = s = settings
        self.clips = clips
        self.valid = valid  # clips to probe
        self.device = device
        self.amp = amp
        torch.manual_seed(s.seed)  # the initialisation; all else is drawn by `generator`
        self.saved = 0  # the step that is on the disk
        self.encoder = model.build_encoder(s.encoder, width=s.width)
        if s.recompute:
            self.encoder.recompute(s.recompute)
        if s.method == "cpc":
            self.learner = import_module("training.cpc").CPCLoss(self.encoder, gather)
        else:
            projector = model.Projector(self.encoder.out_dim, s.projection)
            self.learner = CLMR(self.encoder, projector, LOSSES[s.loss], s.temperature)
        n = self.encoder.input_samples
        usual = 64 if s.method == "cpc" else 96
        songs = len(np.unique(clips.group[clips.length >= n]))
        self.smaller_batch = s.batch_size is None and songs < usual
        s.batch_size = s.batch_size or min(usual, songs) // world()[1] * world()[1]
        self.pairs = Pairs(clips.length, clips.group, n, s.batch_size, s.seed, s.positives)
        self.chain = import_module("augment").Chain(clips.sample_rate, s.transforms, s.probability)
        self.total = s.max_steps or s.epochs * self.pairs.steps_per_epoch
        name = clips.name.replace("/", "-").replace("\\", "-").lstrip(".")
        self.folder = Path(s.out or Path("runs") / name)
        self.config = {name: value for name, value in vars(s).items() if name not in FREE}
        self.config |= {"amp": amp, "fingerprint": clips.fingerprint}
        self.config |= {"steps": self.total} if s.schedule == "cosine" else {}
        self.code = model.code_version()
        self.versions = model.versions()

    def start(self, checkpoint: dict | None):
        """Go to the device, over all processes, to the step of the checkpoint; None: to the first.

        Raises Stop when that is of a run with another configuration."""
        processes = import_module("training.processes")
        now = self.config
        then = checkpoint["config"] if checkpoint else now
        changed = [f"{name}: {then.get(name)!r} then, {now.get(name)!r} now"
                   for name in now | then if then.get(name) != now.get(name)]
        if changed:
            raise processes.Stop(f"{self.folder} holds another run ({'; '.join(changed)}); type "
                                 "the same flags to continue it, or --out for a new one")
        self.step = self.saved = checkpoint["step"] if checkpoint else 0
        alone = world()[1] == 1
        if not alone:
            self.learner = import_module("model").synchronise(self.learner, self.device)
        self.learner.to(self.device).train()
        if processes.alone_on_its_gpu(self.device):
            self.clips.keep_on(self.device)  # if they fit; else a thread reads them ahead
        fp16 = self.amp == "fp16"  # its scaler asks the GPU for values, which a graph cannot
        self.captured = (self.device.type == "cuda" and alone and not fp16
                         and self.settings.method == "clmr" and graph_kernels() is not None)
        self.optimiser = torch.optim.Adam(self.learner.parameters(), lr=self.settings.lr,
                                          betas=(0.9, 0.999), fused=True, capturable=self.captured)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        for name in STATE if checkpoint else ():
            getattr(self, name).load_state_dict(checkpoint[name])
        self.optimiser.param_groups[0].update(capturable=self.captured)  # not as in the file

    def one_step(self) -> Callable:
        """step(inputs, rate) -> loss, top1, as one CUDA graph where that is possible."""
        autocast = functools.partial(import_module("model").autocast, self.device, self.amp)
        learner = self.learner
        if world()[1] > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            learner = nn.parallel.DistributedDataParallel(learner, ids, broadcast_buffers=False)
        step = plain_step(learner, self.optimiser, self.scaler, autocast)
        if self.captured:
            views = torch.empty(2 * self.pairs.batch_size, 1, self.pairs.n, device=self.device)
            step = graph_kernels().captured_step(step, learner, self.optimiser, views)
        return step

    def inputs(self):
        """What the steps that are left are given, made ahead of them in a thread."""
        ahead = import_module("training.ahead")
        s = self.settings
        frames = self.encoder.frames_per_window if s.method == "cpc" else None
        rows = ahead.Batches(self.clips, self.pairs, self.chain, self.device, s.asymmetric, frames)
        steps = rows.draw, rows.augment, self.step, self.total
        if self.device.type == "cuda":
            return ahead.InputsOnGPU(*steps, self.device)
        return ahead.InputsOnCPU(*steps)

    def due(self) -> list[bool]:
        """Is a line of the log due after this step, a save, a probe? All are at the last one."""
        s = self.settings
        last = self.step == self.total
        return [every > 0 and (last or self.step % every == 0)
                for every in (s.log_every, s.save_every, s.probe_every)]

    def is_finite(self, loss: Tensor, weights_too: bool) -> bool:
        """Is the loss a number, and (a longer look) all that was learned?"""
        weights = self.learner.state_dict().values() if weights_too else ()
        return all(bool(tensor.isfinite().all()) for tensor in (loss, *weights))

    def last_good(self) -> str:
        """What a run that must stop is continued from."""
        folder = f"{self.folder}/" if world()[0] == 0 else "process 0's "
        where = f"{folder}checkpoint.pt, step {self.saved}"
        return f"the last good checkpoint: {where if self.saved else 'none was saved yet'}"

    def save(self):
        """Write the encoder, then the checkpoint: what that says is done is all on the disk."""
        self.saved = self.step
        if world()[0] == 0:
            s = self.settings
            import_module("model").save_encoder(
                self.folder / "encoder.pt", self.encoder, sample_rate=self.clips.sample_rate,
                method=s.method, step=self.step, data=self.clips.name,
                data_folder=" ".join(s.data), fingerprint=self.clips.fingerprint,
                batch_size=s.batch_size, seed=s.seed)
            state = {name: getattr(self, name).state_dict() for name in STATE}
            save_checkpoint(self.folder / "checkpoint.pt",
                            {"step": self.step, "config": self.config, **state})


def train(run: Run, log, watch) -> int:
    """Take the steps that are left: rate, step, agree, meter, save, probe, stop.

    Returns: 0 when the run is complete, else the number of the signal that ended it. Raises
    FloatingPointError when the loss or a weight is not finite, on all processes alike."""
    journal = import_module("training.journal")
    s = run.settings
    take = run.one_step()
    inputs = run.inputs()
    meter = journal.Meter(run.device, run.step, s.batch_size)
    with contextlib.closing(inputs):
        for step in range(run.step, run.total):
            rate = rate_at(step, s.lr, s.schedule, s.warmup, run.total)
            meter.add(*take(inputs.get(step), rate))
            run.step = step + 1

            logs, saves, probes = run.due()
            number = watch.number  # read once: what is saved below must have been looked at here
            finite = True  # not looked at where nothing is due: a GPU would have to wait
            if logs or saves or number or run.device.type == "cpu":
                finite = run.is_finite(meter.sums[0], saves or number)
            stop, lost = watch.agree(number, finite)
            if lost:
                raise FloatingPointError(
                    f"the loss or a weight is not finite at step {run.step}, process {lost - 1}; "
                    f"{run.last_good()}. Try a lower --lr, --amp off, or prepare.py --check")
            if logs or stop:
                log.write({"step": run.step, **meter.read(run.step, inputs, watch), "lr": rate,
                           "epoch": round(run.step / run.pairs.steps_per_epoch, 3)})
            if saves or stop:
                run.save()
            if probes and world()[0] == 0 and run.clips.tags:
                with meter.paused():
                    value = journal.quick_probe(run.encoder, run.clips, run.valid, run.device)
                if value is not None:
                    log.write({"step": run.step, "probe": round(value, 5)})
            if stop:
                break
        if run.step == run.total:
            log.write(meter.end(run.step))
        if world()[1] > 1:
            dist.barrier()  # nobody takes the group apart while another still works in it
    return stop if run.step < run.total else 0


def open_run(s: Settings, device) -> tuple[Run, dict]:
    """A run that has met no other process yet, and what must be the same for all of them."""
    model = import_module("model")
    processes = import_module("training.processes")
    prepare = import_module("prepare")
    try:
        folders = [prepare.find(name) for name in s.data]
        amp = model.choose_amp(device, s.amp)
        import_module("augment").Chain(prepare.SAMPLE_RATE, s.transforms, s.probability)  # names?
        if s.encoder not in model.ENCODERS:
            raise ValueError(f"--encoder {s.encoder}: there are {', '.join(model.ENCODERS)}")
        if s.recompute and not hasattr(model.ENCODERS[s.encoder], "recompute"):
            raise ValueError(f"--recompute: {s.encoder} has no such way; leave it out")
    except (ValueError, OSError) as error:
        raise processes.Stop(str(error), code=2) from None
    clips, valid = (prepare.Clips(folders, split) for split in ("train", "valid"))
    import_module("training.journal").hear_some(clips, s.seed)
    run = Run(s, clips, valid, device, amp)
    return run, run.config | {"total": run.total, "code": run.code, **run.versions}


def begin_or_continue(run: Run, watch) -> int:
    """Train from where the run's folder says, and say how it went. Returns the exit code."""
    journal = import_module("training.journal")
    say = print if world()[0] == 0 else (lambda text: None)
    evaluation = f"Next: python evaluate.py --ckpt {run.folder}/encoder.pt"
    if run.step >= run.total:
        say(f"{run.folder} is complete at step {run.step}; --max-steps adds more. {evaluation}")
        return 0
    say(journal.description(run))
    if stop := train(run, journal.Log(run), watch):
        name = signal.Signals(stop).name
        say(f"stopped after step {run.step} by {name}; the same command continues from there")
        return 128 + stop
    say(f"{run.folder}/encoder.pt after {run.total} steps. {evaluation}")
    return 0


def main(argv=None) -> int:
    """Read the flags, join the other processes, train. Returns the exit code."""
    model = import_module("model")
    processes = import_module("training.processes")
    parser = build_parser()
    parser.formatter_class = model.Help
    s = read_settings(parser, argv)
    if __name__ == "__main__":
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with processes.one_line_errors("pretrain.py") as end:
        model.tune_allocator()
        device = model.choose_device(s.device)
        processes.connect(device, s.timeout)
        run = processes.agreed(lambda: open_run(s, device))
        lock = processes.Lock(run.folder)
        with processes.Watch(s.timeout, run.last_good) as watch, contextlib.closing(lock):
            run.start(processes.from_the_first(
                lambda: lock.take() or load_checkpoint(run.folder / "checkpoint.pt")))
            return begin_or_continue(run, watch)
    return end.code


if __name__ == "__main__":
    sys.exit(main())
