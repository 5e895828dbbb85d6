#!/usr/bin/env python3
"""Train the tagger that ships: a linear layer on the levels of demo/encoder.pt that says what musicnn hears in free music.

    python bench/peers.py extract --data free game --peer musicnn-mtt        # its probabilities of MagnaTagATune's 50 tags
    python demo/build_tagger.py --data free game # demo/tagger.pt, tagger.ts, and the JSON of its scores

musicnn (Pons & Serra, 2019, ISC licence) was trained on MagnaTagATune's labels; its probabilities, one row a clip, are the
targets (soft labels, by binary cross-entropy), so no recording of MagnaTagATune is needed. Artists, and packages of game
music, are split 70 : 15 : 15 by a hash of their name: training, validation (strength of the penalty, calibration), and the
held-out part, which is looked at once, for the scores.

A tag ships when the music holds it often enough to learn and to check: at least --least expected training clips (the sum of
the probabilities), and a rank correlation of at least --agreement with musicnn on the validation part. The others are named
in the scores. Calibration: for each tag a slope and an offset of the logit, on the validation part.
"""
import argparse
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
    """Features of all full windows of the chosen clips: h (n, D), and of which clip each is (n,), 0 .. len(chosen) - 1."""
    import evaluate

    clip, start = evaluate.windows(clips.length[chosen], encoder.input_samples)
    batches = (clips.crops(chosen[clip[i : i + 32]], start[i : i + 32], encoder.input_samples)
               for i in range(0, len(clip), 32))
    return evaluate.embed(encoder, batches), clip


def load(args, encoder):
    """Features, clips of the windows, targets (N, K) and artists (N,) of all data together; the tags."""
    import prepare

    h, owner, targets, artists = [], [], [], []
    count = 0
    for name in args.data:
        clips = prepare.Clips(prepare.find(name))
        with np.load(args.features / Path(name).name / "musicnn-mtt.npz") as heard:
            row = {str(key): i for i, key in enumerate(heard["id"])}
            probabilities = heard["probabilities"]
            tags = heard["tags"].tolist()
        long = clips.length >= encoder.input_samples
        chosen = np.array([i for i, key in enumerate(clips.id.tolist()) if key in row and long[i]])
        features, clip = windows_of(encoder, clips, chosen)
        h.append(features)
        owner.append(clip + count)
        targets.append(probabilities[[row[clips.id[i]] for i in chosen]])
        artists += [f"{clips.tags[k]}" for k in clips.labels[chosen].argmax(1)]
        count += len(chosen)
    return torch.cat(h), np.concatenate(owner), np.concatenate(targets), np.array(artists), tags


def rows_of(owner, chosen):
    """Windows (n,) of the chosen clips (N,) bool, and the chosen clip each belongs to, counted from 0."""
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
    """The linear layer from h (n, D) whose clip probabilities are nearest to target (N, K), by L-BFGS."""
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
    """The layer with slope and offset of each logit chosen on other clips, so that probabilities mean what they say."""
    with torch.no_grad():
        logits = layer(h)
    slope = torch.ones(target.shape[1], requires_grad=True)
    offset = torch.zeros(target.shape[1], requires_grad=True)
    optimiser = torch.optim.LBFGS([slope, offset], 1, 100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        p = clip_mean(torch.sigmoid(logits * slope + offset), clip, len(target)).clamp(1e-6, 1 - 1e-6)
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
    """Per tag: rank correlation with musicnn's probabilities, and ROC-AUC, PR-AUC of its yes (above a half) and no."""
    table = []
    for k, tag in enumerate(tags):
        yes = theirs[:, k] > 0.5
        both = 0 < yes.sum() < len(yes)
        table.append({
            "tag": tag, "clips musicnn is sure of": int(yes.sum()), "expected clips": round(float(theirs[:, k].sum()), 1),
            "rank correlation": round(float(spearmanr(ours[:, k], theirs[:, k]).statistic), 3),
            "ROC-AUC": round(100 * roc_auc_score(yes, ours[:, k]), 1) if both else "",
            "PR-AUC": round(100 * average_precision_score(yes, ours[:, k]), 1) if both else "",
            "mean probability, ours": round(float(ours[:, k].mean()), 4),
            "mean probability, musicnn": round(float(theirs[:, k].mean()), 4)})
    return table


def standardised(h, rows):
    """Mean and deviation of the training windows' features."""
    return h[rows].mean(0), h[rows].std(0).clamp_min(1e-6)


def folded(layer, centre, scale):
    """A layer on standardised features as one on plain features."""
    plain = nn.Linear(layer.in_features, layer.out_features)
    with torch.no_grad():
        plain.weight.copy_(layer.weight / scale)
        plain.bias.copy_(layer.bias - plain.weight @ centre)
    return plain


def train(h, owner, targets, parts):
    """The calibrated layer on standardised features that is best in validation; the loss of each penalty."""
    rows = {part: rows_of(owner, parts == part) for part in ("train", "valid")}
    wanted = {part: torch.from_numpy(targets[parts == part]).float() for part in rows}
    losses = {}
    layers = {}
    for penalty in PENALTIES:
        layer = fit(h[rows["train"][0]], rows["train"][1], wanted["train"], penalty)
        p = probabilities(layer, h[rows["valid"][0]], rows["valid"][1], len(wanted["valid"]))
        losses[penalty] = F.binary_cross_entropy(p, wanted["valid"]).item()
        layers[penalty] = layer
        print(f"penalty {penalty:g}: validation loss {losses[penalty]:.4f}", flush=True)
    best = min(losses, key=losses.get)
    return calibrate(layers[best], h[rows["valid"][0]], rows["valid"][1], wanted["valid"]), best


def build_parser():
    parser = argparse.ArgumentParser(prog="build_tagger.py", description="Train the tagger that ships.", allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--ckpt", type=Path, default=ROOT / "demo/encoder.pt", help="the encoder")
    add("--data", nargs="+", default=["free", "game"], metavar="NAME", help="prepared folders, labelled by artist")
    add("--features", type=Path, default=Path("build/features"), metavar="DIR", help="of bench/peers.py")
    add("--least", type=float, default=30, help="expected training clips that a tag needs")
    add("--agreement", type=float, default=0.5, help="rank correlation in validation that a tag needs")
    add("--out", type=Path, default=ROOT / "demo", metavar="DIR", help="for tagger.pt and tagger.ts")
    add("--scores", type=Path, default=ROOT / "results/peers/tagger.json", metavar="FILE", help="what it agrees in")
    return parser


def main(argv=None):
    import model

    args = build_parser().parse_args(argv)
    torch.set_num_threads(1)
    model.tune_allocator()
    encoder, info = model.load_encoder(args.ckpt)
    encoder = model.Levels(encoder).eval()
    h, owner, targets, artists, tags = load(args, encoder)
    parts = np.array([part_of(artist) for artist in artists])
    centre, scale = standardised(h, rows_of(owner, parts == "train")[0])
    h = (h - centre) / scale
    layer, penalty = train(h, owner, targets, parts)

    checked = {}
    for part in ("valid", "test"):
        rows, clip = rows_of(owner, parts == part)
        ours = probabilities(layer, h[rows], clip, int((parts == part).sum())).numpy()
        checked[part] = agreement(ours, targets[parts == part], tags)
    often = targets[parts == "train"].sum(0) >= args.least
    alike = np.array([row["rank correlation"] >= args.agreement for row in checked["valid"]])
    ships = np.flatnonzero(often & alike)
    named = [tags[k] for k in ships]
    left_out = [tag for tag in tags if tag not in named]

    head = folded(layer, centre, scale)
    chosen = nn.Linear(head.in_features, len(ships))
    with torch.no_grad():
        chosen.weight.copy_(head.weight[ships])
        chosen.bias.copy_(head.bias[ships])
    about = {"teacher": "musicnn 0.1.0, MTT_musicnn (ISC licence)", "data": " + ".join(args.data), "left_out": left_out}
    what = {"encoder": encoder, "sample_rate": info["sample_rate"], "head": chosen, "tags": named, "task": "multilabel"}
    model.save_tagger(args.out / "tagger.pt", **what, **about)
    model.export_torchscript(path=args.out / "tagger.ts", **what, info=about)
    counts = {part: {"clips": int((parts == part).sum()), "artists": len(set(artists[parts == part]))}
              for part in ("train", "valid", "test")}
    held_out = [{**row, "ships": "yes" if row["tag"] in named else "no"} for row in checked["test"]]
    mean = float(np.mean([row["rank correlation"] for row in held_out if row["ships"] == "yes"]))
    caption = (f"Agreement of demo/tagger.pt with musicnn's MTT network on {counts['test']['clips']} clips of "
               f"{counts['test']['artists']} held-out artists; trained on {counts['train']['clips']} clips of "
               f"{counts['train']['artists']}. {len(named)} of {len(tags)} tags ship; their mean rank correlation is {mean:.2f}.")
    result = {"kind": "tagger", "caption": caption, "table": held_out, "counts": counts, "penalty": penalty,
              "left_out": left_out, "encoder": model.weights_sha256(encoder), "versions": model.versions(),
              "code": model.code_version(), "argv": ["demo/build_tagger.py", *(sys.argv[1:] if argv is None else argv)]}
    model.write_atomically(args.scores, (json.dumps(result, indent=1) + "\n").encode())
    print(caption)
    print("left out:", ", ".join(left_out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
