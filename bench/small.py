"""Small compute: variants of MelCNN at equal core time, and the training of the encoder that ships.

    python bench/small.py --train game free --data moods quadrants --seconds 240     # the table
    python bench/small.py --train game free --ship 3200 --out runs/small             # encoder.pt
    python bench/small.py --train game free --renew       # beside it, on another core: new views
    python bench/small.py --join runs/a/encoder.pt runs/b/encoder.pt --out runs/both

Where a core is all there is, the chain and the spectrogram cost as much as the network. So views of
5.4 s are made once, by the paper's chain, and kept as log-mel spectrograms in a pool (`--pool`,
about 0.06 MB each); a step draws songs, two views of each and a window of 2.7 s in each view, so
that no two pairs are the same. `--renew` replaces the pool's views by new ones for as long as it
runs. Everything else is pretrain.py's: NT-Xent, Adam, no song twice in a batch; beyond the paper
are the temperature (0.2), warm-up and cosine, and `mix`: another song's power spectrogram, up to
that share of the sum, is added to each view; and `mask`: a row of bands of each view is silenced.

A variant's core time counts each view's making, spread over four uses. It is judged by 5-fold
cross-validation over the train and valid clips of --data, no artist in two folds: a logistic
regression on the standardised means over each clip's windows, its C the best of six for all
variants alike. Test clips are never looked at. Writes --out (JSON with a table), a line a variant
as it comes; --ship leaves encoder.pt, checkpoint.pt and log.jsonl in the folder --out, and goes on
where it stopped.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

import common

sys.path.insert(0, str(common.ROOT))
import augment  # noqa: E402
import model  # noqa: E402
import prepare  # noqa: E402
import pretrain  # noqa: E402

FRAMES = 152  # of a window of 59,049 samples
USES = 4  # of a view, when a variant's core time is counted
CHAIN_S = 0.0015  # of a core, for the chain and the spectrogram of 2.7 s
CS = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)  # for 500 features; for more, in proportion less
BATCH = 96

# name: what differs from the first
SHIPPED = (16, 32, 64, 192, 384)
VARIANTS = {
    "16-32-64-128-256": {},
    "16-32-64-128-512": {"channels": (16, 32, 64, 128, 512)},
    "16-32-64-192-384": {"channels": SHIPPED},
    "first stride 2 x 2": {"stride": 2},
    "bands kept": {"keep_bands": True},
    "mix 0.4": {"mix": 0.4},
    "mix 0.4, temperature 0.1": {"mix": 0.4, "temperature": 0.1},
    "mix 0.4, windows of 5.4 s": {"mix": 0.4, "frames": 305, "batch": 64},
    "16-32-64-192-384, mix 0.3": {"channels": SHIPPED, "mix": 0.3},
    "the same, mask 0.2": {"channels": SHIPPED, "mix": 0.3, "masked": 0.2},
    "the same, DCL": {"channels": SHIPPED, "mix": 0.3, "loss": "dcl"},
    "the same, DCL and mask 0.2": {"channels": SHIPPED, "mix": 0.3, "loss": "dcl", "masked": 0.2},
}


# ---------------------------------------------------------------------------------------- views
class Pool:
    """Augmented views of every song as spectrograms, (songs, views, bands, frames) float16."""

    def __init__(self, path: Path, folders, views: int, seed: int = 0):
        clips = prepare.Clips(folders)
        self.clips = clips
        self.n = 2 * 3**10  # samples of a view
        self.chain = augment.Chain(clips.sample_rate)
        self.encoder = model.MelCNN()
        usable = np.flatnonzero(clips.length >= self.n)
        songs = np.unique(clips.group[usable])
        self.songs = [usable[clips.group[usable] == song] for song in songs]
        first = np.cumsum([0] + [len(prepare.Clips(folder)) for folder in folders])
        self.folder = [np.searchsorted(first, song[0], "right") - 1 for song in self.songs]
        frames = (self.n - self.encoder.window) // self.encoder.hop + 1
        shape = (len(songs), views, self.encoder.scales.num_features, frames)
        if path.exists():
            self.views = np.lib.format.open_memmap(path, "r+")
        else:
            unfinished = path.with_suffix(".partial")
            self.views = np.lib.format.open_memmap(unfinished, "w+", np.float16, shape)
            generator = torch.Generator().manual_seed(seed)
            for song in range(len(songs)):
                self.views[song] = self.make(song, views, generator)
            unfinished.rename(path)

    def make(self, song: int, count: int, generator) -> np.ndarray:
        """New views of a song, from anywhere in it: (count, bands, frames)."""
        clip = self.songs[song]
        room = torch.as_tensor(self.clips.length[clip] - self.n + 1, dtype=torch.float64)
        which = torch.multinomial(room, count, replacement=True, generator=generator)
        where = torch.rand(count, generator=generator, dtype=torch.float64) * room[which]
        x = self.clips.crops(clip[which.numpy()], where.long().numpy(), self.n)
        x = self.chain(x, self.chain.draw(count, generator))
        return torch.cat([self.encoder.spectrogram(row) for row in x.split(1)]).half().numpy()

    def renew(self):
        """Replace views, a few of one song after the other, until interrupted."""
        generator = torch.Generator().manual_seed(time.time_ns() % 2**40)
        while True:
            for song in torch.randperm(len(self.songs), generator=generator).tolist():
                places = torch.randperm(self.views.shape[1], generator=generator)[:16]
                self.views[song, places.numpy()] = self.make(song, len(places), generator)

    def pairs(self, songs, frames: int, generator) -> torch.Tensor:
        """Two views of each song: (2 B, bands, frames), all first ones before the second."""
        count, longest = self.views.shape[1], self.views.shape[3]
        x = np.empty((2, len(songs), self.views.shape[2], frames), np.float16)
        for i, song in enumerate(songs):
            for j, view in enumerate(torch.randperm(count, generator=generator)[:2].tolist()):
                start = int(torch.randint(longest - frames + 1, (), generator=generator))
                x[j, i] = self.views[song, view, :, start : start + frames]
        return torch.from_numpy(x).flatten(0, 1).float()


def mix(x, share: float, generator):
    """Add another song's power, a share up to `share` of the sum, to each view of (2 B, ...)."""
    power = torch.expm1(x)
    other = torch.randperm(len(x) // 2, generator=generator)
    r = torch.rand(len(x), 1, 1, generator=generator) * share
    return torch.log1p((1 - r) * power + r * power[torch.cat([other, other + len(x) // 2])])


def mask(x, share: float, generator):
    """Silence a row of up to that share of the bands, another in each view of (2 B, bands, ...)."""
    bands = x.shape[1]
    height = (torch.rand(len(x), 1, generator=generator) * (share * bands + 1)).long()
    low = (torch.rand(len(x), 1, generator=generator) * (bands - height + 1)).long()
    band = torch.arange(bands)
    return x * ~((band >= low) & (band < low + height))[:, :, None]


# ------------------------------------------------------------------------------------- training
class Network(nn.Module):
    """A variant of MelCNN that takes spectrograms: (B, bands, frames) -> (B, D)."""

    def __init__(self, channels=(16, 32, 64, 128, 256), stride=None, keep_bands=False, width=1.0):
        super().__init__()
        self.encoder = type("MelCNN", (model.MelCNN,), {"channels": channels})(width)
        if stride:
            self.encoder.blocks[0][0].stride = (stride, stride)
        self.keep_bands = keep_bands
        with torch.no_grad():
            bands = self.encoder.scales.num_features
            self.out_dim = self.eval()(torch.zeros(1, bands, FRAMES)).shape[1]
        self.train()

    def forward(self, spectrogram):
        x = self.encoder.blocks(self.encoder.normalise(spectrogram))
        axes = 3 if self.keep_bands else (2, 3)
        return torch.cat([x.mean(axes).flatten(1), x.amax(axes).flatten(1)], 1)


def join(encoders) -> model.MelCNN:
    """MelCNNs of the same sizes as one, whose branches they are."""
    sizes = {**encoders[0].sizes, "branches": sum(e.branches for e in encoders)}
    joined = model.MelCNN(**sizes)
    states = [encoder.state_dict() for encoder in encoders]
    parts = {key: [state[key] for state in states] for key in states[0]}
    joined.load_state_dict({k: torch.cat(p) if p[0].dim() else p[0] for k, p in parts.items()})
    return joined.eval()


def ship_joined(paths, out: Path, half: bool):
    """encoder.pt of encoders side by side; its step is the sum of theirs. half: their weights in
    half precision, at half the size; model.load_encoder gives float32 all the same."""
    encoders, infos = zip(*(model.load_encoder(path) for path in paths))
    about = {"method": "clmr", "batch_size": BATCH, "sample_rate": infos[0]["sample_rate"]}
    about["step"] = sum(info["step"] for info in infos)
    about["data"] = " and ".join(info["data"] for info in infos)
    about["fingerprint"] = " ".join(info["fingerprint"] for info in infos)
    out.mkdir(parents=True, exist_ok=True)
    joined = join(encoders)
    model.save_encoder(out / "encoder.pt", joined.half() if half else joined, **about)


def train(pool, seconds, out=None, share=0.0, masked=0.0, loss="nt-xent", temperature=0.2,
          frames=FRAMES, batch=BATCH, seed=0, renewed=False, weights=None, **sizes):
    """Train for `seconds` of a core; returns the network and the pairs it saw.

    With `out` a checkpoint is kept there, from which the same call goes on. Without `renewed` the
    making of views counts as well. `weights`: how likely a song of each of the pool's folders is
    to be in a batch; by default all songs come in turn."""
    torch.manual_seed(seed)
    network = Network(**sizes)
    projector = model.Projector(network.out_dim)
    learner = nn.ModuleList([network, projector])
    adam = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True)
    step, used, order = 0, 0.0, []
    likely = torch.tensor([weights[k] for k in pool.folder] if weights else [])
    if weights and (likely > 0).sum() < batch:
        sys.exit(f"--weights: expected at least {batch} songs of a weight above 0")
    recipe = {"share": share, "masked": masked, "loss": loss, "temperature": temperature,
              "frames": frames, "batch": batch, "seed": seed, "weights": weights, "sizes": sizes}
    saved = pretrain.load_checkpoint(out / "checkpoint.pt") if out else None
    if saved and saved.get("recipe", recipe) != recipe:
        sys.exit(f"{out}: expected to go on as it began, {saved['recipe']}, got {recipe}")
    if saved:
        learner.load_state_dict(saved["learner"])
        adam.load_state_dict(saved["adam"])
        step, used = saved["step"], saved["used"]
    generator = torch.Generator().manual_seed(seed + step)
    making = 0 if renewed else 2 * batch * CHAIN_S * frames / FRAMES / USES
    last, losses = time.process_time(), []
    while used < seconds:
        if weights:
            songs = torch.multinomial(likely, batch, generator=generator).tolist()
        else:
            if len(order) < batch:
                order = torch.randperm(len(pool.songs), generator=generator).tolist()
            songs, order = order[:batch], order[batch:]
        x = pool.pairs(songs, frames, generator)
        x = mix(x, share, generator) if share else x
        x = mask(x, masked, generator) if masked else x
        cosine = 0.5 * (1 + math.cos(math.pi * used / seconds))
        adam.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 200) * cosine
        with model.autocast("cpu"):
            z = projector(network(x))
        value = pretrain.LOSSES[loss](*z.chunk(2), temperature)
        adam.zero_grad()
        value.backward()
        adam.step()
        step += 1
        losses.append(value.item())
        now = time.process_time()
        used += now - last + making
        last = now
        if out and (step % 500 == 0 or used >= seconds):
            line = {"step": step, "pairs": step * batch, "loss": np.mean(losses), "core_s": used}
            with open(out / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            losses = []
            state = {"learner": learner.state_dict(), "adam": adam.state_dict(), "step": step,
                     "used": used, "recipe": recipe}
            pretrain.save_checkpoint(out / "checkpoint.pt", state)
            info = {"method": "clmr", "step": step, "batch_size": batch, "data": pool.clips.name}
            info |= {key: getattr(pool.clips, key) for key in ("sample_rate", "fingerprint")}
            model.save_encoder(out / "encoder.pt", network.encoder, **info)
    return network.eval(), step * batch


# -------------------------------------------------------------------------------------- judging
@torch.no_grad()
def features(network, clips, index, frames=FRAMES):
    """The mean over the windows of each clip of index (N,) of the network's output, (N, D)."""
    rows = []
    for i in index:
        spectrogram = network.encoder.spectrogram(clips.waveform(i)[None, None])
        windows = spectrogram.unfold(2, frames, frames)[0].transpose(0, 1)  # (n, bands, frames)
        rows.append(network(windows).mean(0))
    return torch.stack(rows)


def logistic(x, y, weight, c, single):
    """Scores (folds, N, K) of logistic regressions, one a row of weight (folds, N)."""
    w = torch.zeros(len(weight), x.shape[1] + 1, y.shape[1], requires_grad=True)
    solver = torch.optim.LBFGS([w], max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        scores = x @ w[:, :-1] + w[:, -1:]
        surprise = scores.logsumexp(2) if single else F.softplus(scores).sum(2)
        losses = surprise - (scores * y).sum(2)
        value = ((losses * weight).sum() * c + w[:, :-1].square().sum() / 2) / len(x)
        value.backward()
        return value

    solver.step(closure)
    return (x @ w[:, :-1] + w[:, -1:]).detach()


def cross_validate(x, clips, index, divisions=1, tags=slice(None)) -> dict:
    """The best over CS of ROC and PR (tags) or accuracy (a label a clip), in percent: means over
    so many divisions of the artists into five folds. tags: those that are asked for."""
    artists = clips.artist if any(clips.artist) else clips.group
    names, number = np.unique(artists[index], return_inverse=True)
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    u, s, _ = torch.linalg.svd(x, full_matrices=False)  # turned, so that rows are no longer than N
    y = torch.as_tensor(clips.labels[index])[:, tags].float()
    single = clips.task == "singlelabel"
    found = []
    for c, seed in itertools.product(CS, range(divisions)):
        fold = torch.as_tensor(np.random.default_rng(seed).permutation(len(names)) % 5)[number]
        weight = (fold != torch.arange(5)[:, None]).float()
        scores = logistic(u * s, y, weight, c * 500 / x.shape[1], single)
        scores = scores[fold, torch.arange(len(x))]  # of each clip by the fold that lacks it
        if single:
            found.append({"accuracy": (scores.argmax(1) == y.argmax(1)).float().mean().item()})
        else:
            kinds = {"ROC": roc_auc_score, "PR": average_precision_score}
            found.append({name: f(y, scores, average="macro") for name, f in kinds.items()})
    values = {name: [row[name] for row in found] for name in found[0]}
    means = {name: np.reshape(v, (len(CS), divisions)).mean(1) for name, v in values.items()}
    return {name: round(100 * float(v.max()), 1) for name, v in means.items()}


def compare(args, pool) -> None:
    """Every variant for the same core time; writes the table after each."""
    judged = [prepare.Clips(prepare.find(name)) for name in args.data]
    about = {"argv": sys.argv, "machine": common.machine(), "versions": model.versions()}
    rows = []
    for name in args.only or VARIANTS:
        sizes = dict(VARIANTS[name])
        share = sizes.pop("mix", 0.0)
        network, pairs = train(pool, args.seconds, share=share, **sizes)
        row = {"variant": name, "pairs": f"{pairs:,}"}
        for clips in judged:
            index = np.flatnonzero(clips.split < 2)  # not the test clips
            x = features(network, clips, index, sizes.get("frames", FRAMES))
            row |= {key: f"{v:.1f}" for key, v in cross_validate(x, clips, index).items()}
        rows.append(row)
        print(json.dumps(row), flush=True)
        caption = f"MelCNN's variants, {args.seconds:g} s of a core each, on {common.where()}"
        text = json.dumps({"caption": caption, **about, "table": rows}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--train", nargs="+", default=[], help="prepared folders to train on")
    parser.add_argument("--data", nargs="+", default=[], help="prepared folders to judge on")
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), help="some variants")
    parser.add_argument("--seconds", type=float, default=240, help="of a core, for each variant")
    parser.add_argument("--ship", type=float, metavar="SECONDS", help="train what ships")
    parser.add_argument("--join", nargs="+", type=Path, help="encoders of one size, as branches")
    parser.add_argument("--half", action="store_true", help="with --join: half precision")
    parser.add_argument("--seed", type=int, default=0, help="with --ship")
    parser.add_argument("--mask", type=float, default=0.0, help="with --ship: share of the bands")
    parser.add_argument("--width", type=float, default=1.0, help="with --ship: of the network")
    parser.add_argument("--loss", choices=list(pretrain.LOSSES), default="nt-xent",
                        help="with --ship")
    parser.add_argument("--weights", type=float, nargs="+",
                        help="with --ship: how likely a song of each folder is")
    parser.add_argument("--renew", action="store_true", help="renew the pool until interrupted")
    parser.add_argument("--pool", type=Path, default=Path("data/views.npy"), help="the views' file")
    parser.add_argument("--views", type=int, default=48, help="of each song in the pool")
    parser.add_argument("--out", type=Path, default=Path("variants.json"), help="file, or folder")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    if bool(args.train) == bool(args.join):
        parser.error("type --train and music to learn from, or --join and encoders")
    if args.weights and len(args.weights) != len(args.train):
        parser.error("type as many --weights as folders after --train")
    if args.join:
        try:
            return ship_joined(args.join, args.out, args.half)
        except (OSError, ValueError) as error:
            parser.error(str(error))
    model.tune_allocator()
    torch.set_num_threads(1)
    pool = Pool(args.pool, [prepare.find(name) for name in args.train], args.views)
    if args.renew:
        pool.renew()
    elif args.ship:
        args.out.mkdir(parents=True, exist_ok=True)
        shipped = {"share": 0.3, "channels": SHIPPED, "renewed": True}
        shipped |= {"masked": args.mask, "weights": args.weights}
        shipped |= {"width": args.width, "loss": args.loss}
        train(pool, args.ship, out=args.out, seed=args.seed, **shipped)
    else:
        compare(args, pool)


if __name__ == "__main__":
    main()
