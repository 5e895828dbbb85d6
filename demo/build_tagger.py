#!/usr/bin/env python3
"""Train the tagger that ships: a linear layer on the levels of demo/encoder.pt.

    python bench/peers.py extract --data free --peer musicnn-mtt             # the teacher's tags
    python bench/peers.py extract --data game --peer musicnn-mtt --every 4
    python bench/peers.py extract --data styles --peer musicnn-mtt           # bench/styles.py's
    python bench/peers.py extract --data sung --peer musicnn-mtt             # bench/voices.py's
    python demo/build_tagger.py             # demo/tagger.pt, tagger.ts, JSON of its scores

The teacher, musicnn (Pons & Serra, 2019, ISC licence), was trained on MagnaTagATune's labels; its
probabilities of the 50 tags, a row a clip of freely licensed music, are the targets (soft labels,
by binary cross-entropy), so no recording of MagnaTagATune is needed. Artists, packages of game
music, and styles of made-up music are split 70 : 15 : 15 by a hash of their name: training,
validation (penalty, calibration, choice of tags), and the held-out part, which is looked at once,
for the scores.

A tag ships when the music holds it often enough to learn and to check: at least --least expected
training clips (the sum of the probabilities), and a rank correlation of at least --agreement with
the teacher in validation. The others are named in the scores and in tagger.pt. Calibration: for
each tag a slope and an offset of the logit, on the validation part.
"""
import argparse
import copy
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PENALTIES = (1e-5, 1e-4, 1e-3)


def part_of(artist):
    """train, valid or test: an artist is in one of them, always the same."""
    byte = hashlib.sha256(artist.encode()).digest()[0]
    return "train" if byte < 179 else "valid" if byte < 218 else "test"


def windows_of(encoder, clips, chosen):
    """Features of all full windows of the chosen clips, h (n, D), and the place of each one's clip
    among the chosen, (n,)."""
    import evaluate

    clip, start = evaluate.windows(clips.length[chosen], encoder.input_samples)
    batches = (clips.crops(chosen[clip[i : i + 32]], start[i : i + 32], encoder.input_samples)
               for i in range(0, len(clip), 32))
    return evaluate.embed(encoder, batches), clip


class Music:
    """Windows of all data together: features h (n, D), the clip of each (n,); of the clips the
    targets (N, K) and artists (N,); and the names of the K tags."""

    def __init__(self, names, features, encoder):
        import prepare

        self.h = []
        self.clip = []
        self.targets = []
        self.artists = []
        for name in names:
            with np.load(features / Path(name).name / "musicnn-mtt.npz") as heard:
                row = {str(key): i for i, key in enumerate(heard["id"])}
                probabilities = heard["probabilities"]
                self.tags = heard["tags"].tolist()
            clips = prepare.Clips(prepare.find(name))
            long = clips.length >= encoder.input_samples
            ids = enumerate(clips.id.tolist())
            chosen = np.array([i for i, key in ids if key in row and long[i]])
            h, clip = windows_of(encoder, clips, chosen)
            self.h.append(h)
            self.clip.append(clip + len(self.artists))
            self.targets.append(probabilities[[row[str(key)] for key in clips.id[chosen]]])
            self.artists += [clips.tags[k] for k in clips.labels[chosen].argmax(1)]
        self.h = torch.cat(self.h)
        self.clip = np.concatenate(self.clip)
        self.targets = np.concatenate(self.targets)
        self.parts = np.array([part_of(artist) for artist in self.artists])

    def part(self, name):
        """Windows h (n, D), the clip of each (n,) from 0, and targets (N, K), of a part."""
        chosen = self.parts == name
        rows, clip = rows_of(self.clip, chosen)
        return self.h[rows], clip, torch.from_numpy(self.targets[chosen]).float()

    def count(self, name):
        """How many clips and artists a part has."""
        artists = np.array(self.artists)[self.parts == name]
        return {"clips": len(artists), "artists": len(set(artists))}


def rows_of(owner, chosen):
    """Windows (n,) of the chosen clips (N,) bool, and each one's clip, counted among the chosen."""
    rows = np.flatnonzero(chosen[owner])
    return torch.from_numpy(rows), torch.from_numpy(np.cumsum(chosen)[owner[rows]] - 1)


def clip_mean(values, clip, count):
    """The mean over a clip's windows: values (n, K), clip (n,) -> (count, K)."""
    total = values.new_zeros(count, values.shape[1]).index_add_(0, clip, values)
    return total / torch.bincount(clip, minlength=count)[:, None]


def probabilities(layer, h, clip, count):
    """Clip probabilities (count, K), the mean over windows, as the tagger gives them."""
    with torch.no_grad():
        return clip_mean(torch.sigmoid(layer(h)), clip, count)


def fit(h, clip, target, penalty):
    """The linear layer on h (n, D) whose clip probabilities are nearest to target (N, K)."""
    layer = nn.Linear(h.shape[1], target.shape[1])
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimiser = torch.optim.LBFGS(layer.parameters(), 1, 100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        p = clip_mean(torch.sigmoid(layer(h)), clip, len(target)).clamp(1e-6, 1 - 1e-6)
        loss = F.binary_cross_entropy(p, target) + penalty * layer.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return layer


def calibrate(layer, h, clip, target):
    """The layer with slope and offset of each logit chosen on other clips (Platt's calibration)."""
    with torch.no_grad():
        logits = layer(h)
    slope = torch.ones(target.shape[1], requires_grad=True)
    offset = torch.zeros(target.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([slope, offset], 1, 100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        p = clip_mean(torch.sigmoid(logits * slope + offset), clip, len(target))
        p = p.clamp(1e-6, 1 - 1e-6)
        # a tag that hardly occurs here keeps its slope
        loss = F.binary_cross_entropy(p, target) + 1e-4 * (slope - 1).square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        layer.weight.mul_(slope[:, None])
        layer.bias.mul_(slope).add_(offset)
    return layer


def agreement(ours, theirs, tags):
    """Per tag: rank correlation with the teacher's probabilities, and ROC-AUC and PR-AUC of what it
    is sure of (above a half)."""
    table = []
    for k, tag in enumerate(tags):
        yes = theirs[:, k] > 0.5
        both = 0 < yes.sum() < len(yes)
        table.append({
            "tag": tag,
            "clips musicnn is sure of": int(yes.sum()),
            "expected clips": round(float(theirs[:, k].sum()), 1),
            "rank correlation": round(float(spearmanr(ours[:, k], theirs[:, k]).statistic), 3),
            "ROC-AUC": round(100 * roc_auc_score(yes, ours[:, k]), 1) if both else "",
            "PR-AUC": round(100 * average_precision_score(yes, ours[:, k]), 1) if both else "",
            "mean probability, ours": round(float(ours[:, k].mean()), 4),
            "mean probability, musicnn": round(float(theirs[:, k].mean()), 4)})
    return table


def train(music):
    """The layer on standardised features that is best in validation, calibrated there, as one on
    plain features; and its penalty."""
    h, clip, target = music.part("train")
    centre = h.mean(0)
    scale = h.std(0).clamp_min(1e-6)
    h = (h - centre) / scale
    valid_h, valid_clip, valid_target = music.part("valid")
    valid_h = (valid_h - centre) / scale
    fits = {}
    for penalty in PENALTIES:
        layer = fit(h, clip, target, penalty)
        p = probabilities(layer, valid_h, valid_clip, len(valid_target))
        fits[penalty] = (F.binary_cross_entropy(p, valid_target).item(), layer)
        print(f"penalty {penalty:g}: validation loss {fits[penalty][0]:.4f}", flush=True)
    penalty = min(fits, key=lambda name: fits[name][0])
    layer = calibrate(fits[penalty][1], valid_h, valid_clip, valid_target)
    plain = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        plain.weight.copy_(layer.weight / scale)
        plain.bias.copy_(layer.bias - plain.weight @ centre)
    return plain, penalty


def only(layer, outputs):
    """A linear layer with some of its outputs."""
    chosen = nn.Linear(layer.in_features, len(outputs))
    with torch.no_grad():
        chosen.weight.copy_(layer.weight[outputs])
        chosen.bias.copy_(layer.bias[outputs])
    return chosen


def build_parser():
    parser = argparse.ArgumentParser(
        prog="build_tagger.py", description="Train the tagger that ships.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default=ROOT / "demo/encoder.pt", help="the encoder")
    add("--data", nargs="+", default=["free", "game", "styles", "sung"], metavar="NAME",
        help="prepared folders, labelled by artist")
    add("--features", type=Path, default=Path("build/features"), metavar="DIR",
        help="of bench/peers.py")
    add("--least", type=float, default=30, help="expected training clips that a tag needs")
    add("--agreement", type=float, default=0.5, help="rank correlation that a tag needs")
    add("--check", metavar="NAME", help="another prepared folder, of which nothing is learnt")
    add("--out", type=Path, default=ROOT / "demo", metavar="DIR", help="for tagger.pt, tagger.ts")
    add("--scores", type=Path, default=ROOT / "results/peers/tagger.json", metavar="FILE",
        help="what it agrees in")
    return parser


def report(music, layer, named):
    """The scores: per tag, on the held-out artists; a caption."""
    h, clip, target = music.part("test")
    ours = probabilities(layer, h, clip, len(target)).numpy()
    rows = agreement(ours, target.numpy(), music.tags)
    rows = [{**row, "ships": "yes" if row["tag"] in named else "no"} for row in rows]
    alike = np.mean([row["rank correlation"] for row in rows if row["ships"] == "yes"])
    test = music.count("test")
    learnt = music.count("train")
    caption = (
        f"Agreement of demo/tagger.pt with musicnn's MTT network on {test['clips']} clips of "
        f"{test['artists']} held-out artists (or packages of game music); trained on "
        f"{learnt['clips']} clips of {learnt['artists']}. {len(named)} of {len(rows)} tags ship; "
        f"their mean rank correlation is {alike:.2f}.")
    return {"kind": "tagger", "caption": caption, "table": rows, "counts": [learnt, test]}


def listen_elsewhere(scores, music, layer, name):
    """Adds to the scores how the tags agree with the teacher on music of another kind."""
    clip = torch.from_numpy(music.clip)
    ours = probabilities(layer, music.h, clip, len(music.targets)).numpy()
    found = {row["tag"]: row["rank correlation"]
             for row in agreement(ours, music.targets, music.tags)}
    for row in scores["table"]:
        row[f"rank correlation, {name}"] = found[row["tag"]]
    alike = np.mean([found[row["tag"]] for row in scores["table"] if row["ships"] == "yes"])
    scores["caption"] += f" On all {len(ours)} clips of {name}, none of them learnt: {alike:.2f}."


def choose(music, layer, least, agreed):
    """The tags (their places) that the music holds often enough, and in which validation agrees."""
    h, clip, target = music.part("valid")
    ours = probabilities(layer, h, clip, len(target)).numpy()
    checked = agreement(ours, target.numpy(), music.tags)
    expected = music.part("train")[2].sum(0)
    return [k for k, row in enumerate(checked)
            if expected[k] >= least and row["rank correlation"] >= agreed]


def as_it_lay(levels):
    """The levels of an encoder in half precision, at half the size, where that changes no weight:
    where its file held it so."""
    half = copy.deepcopy(levels).half()
    kept = all(bool((a.float() == b).all()) for a, b in
               zip(half.state_dict().values(), levels.state_dict().values()))
    return half if kept else levels


def main(argv=None):
    import model

    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    model.tune_allocator()
    encoder, info = model.load_encoder(args.ckpt)
    levels = model.Levels(encoder).eval()
    music = Music(args.data, args.features, levels)
    layer, penalty = train(music)
    ships = choose(music, layer, args.least, args.agreement)
    named = [music.tags[k] for k in ships]
    about = {"teacher": "musicnn 0.1.0, MTT_musicnn (ISC licence)", "data": " + ".join(args.data),
             "left_out": [tag for tag in music.tags if tag not in named]}
    what = {"head": only(layer, ships), "tags": named, "task": "multilabel",
            "sample_rate": info["sample_rate"]}
    model.save_tagger(args.out / "tagger.pt", as_it_lay(levels), **what, **about)
    model.export_torchscript(levels, args.out / "tagger.ts", **what, info=about)
    arguments = sys.argv[1:] if argv is None else argv
    scores = report(music, layer, named)
    if args.check:
        listen_elsewhere(scores, Music([args.check], args.features, levels), layer, args.check)
    scores = {**scores, "penalty": penalty, **about,
              "encoder": model.weights_sha256(encoder), "versions": model.versions(),
              "code": model.code_version(), "argv": ["demo/build_tagger.py", *arguments]}
    model.write_atomically(args.scores, (json.dumps(scores, indent=1) + "\n").encode())
    print(scores["caption"], "Left out:", ", ".join(about["left_out"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
