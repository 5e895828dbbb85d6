"""Features side by side by cross-validation: what 270 test clips cannot tell apart.

    python bench/judge.py ships=demo/encoder.pt both=runs/a/encoder.pt+runs/b/encoder.pt \\
      mfcc=build/features/moods/mfcc.npz --data moods moods-quadrants --out judged.json

A row is NAME=FILES: encoders, or features made elsewhere (bench/peers.py), side by side where there
are several. By each, a logistic regression on the standardised means over each clip's windows, its
C the best of six for all rows alike; five folds, no artist in two, means over --divisions of the
artists into folds. The train and valid clips alone are looked at, unless --all is given: choose by
the former, tell by the latter. ROC / PR of the tags, again of the tags that begin with --only, the
share of right classes of a set of classes; and of the ten nearest clips, by cosine of standardised
features, how alike their labels are (other artists' alone) and how many of its artist's are there.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

import common
import small

import evaluate  # noqa: E402, small.py made the folder of it known
import model  # noqa: E402
import prepare  # noqa: E402
from evaluation import neighbours, store  # noqa: E402


def clip_features(path: Path, clips, protocol) -> tuple[torch.Tensor, np.ndarray]:
    """The mean over each clip's windows (n, D) of an encoder's or others' features; which clips."""
    if path.suffix == ".npz":
        parts = evaluate.by_split(clips, *store.read_features(path, clips))
    else:
        encoder, _ = model.load_encoder(path)
        encoder = model.Levels(encoder) if protocol.features == "levels" else encoder
        windows = evaluate.cut(clips, encoder.input_samples)
        parts = evaluate.features_of(encoder, clips, windows, protocol)
    parts = [evaluate.by_clip(part) for part in parts.values()]
    clip = np.concatenate([part.clip for part in parts])
    order = clip.argsort()
    return torch.cat([part.x for part in parts])[torch.from_numpy(order)], clip[order]


def judge(paths, sets, args) -> dict:
    """A row of the table: the metrics of the features of paths, side by side."""
    row = {}
    for clips in sets:
        found = [clip_features(path, clips, evaluate.Protocol(features=args.features, device="cpu"))
                 for path in paths]
        index = found[0][1]
        keep = np.full(len(index), True) if args.all else clips.split[index] < 2
        x, index = torch.cat([x for x, _ in found], 1)[torch.from_numpy(keep)], index[keep]
        row["numbers"] = f"{x.shape[1]:,}"
        scores = small.cross_validate(x, clips, index, args.divisions)
        if clips.task == "singlelabel":
            row[f"{clips.name}"] = f"{scores['accuracy']:.1f}"
        else:
            row[f"{clips.name}: ROC / PR"] = f"{scores['ROC']:.1f} / {scores['PR']:.1f}"
            only = args.only or "\0"  # which no tag begins with
            if some := [i for i, tag in enumerate(clips.tags) if tag.startswith(only)]:
                scores = small.cross_validate(x, clips, index, args.divisions, some)
                row[f"{args.only}*: ROC / PR"] = f"{scores['ROC']:.1f} / {scores['PR']:.1f}"
        near = neighbours.neighbours(x, clips.labels[index], clips.group[index],
                                     clips.artist[index])
        if clips.task == "singlelabel":
            row[f"{clips.name}@10"] = f"{100 * near['labels'].mean():.1f}"
        else:
            row["artist@10"] = f"{100 * np.nanmean(near['artist']):.1f}"
    return row


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("rows", nargs="+", metavar="NAME=FILE[+FILE]", help="a row of the table")
    parser.add_argument("--data", nargs="+", required=True, help="prepared folders with labels")
    parser.add_argument("--features", choices=["last", "levels"], default="last",
                        help="of encoders")
    parser.add_argument("--all", action="store_true", help="test clips as well")
    parser.add_argument("--only", metavar="PREFIX", help="beside all tags, those that begin so")
    parser.add_argument("--divisions", type=int, default=3, help="of the artists into five folds")
    parser.add_argument("--out", type=Path, help="JSON with the table")
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    rows = {}
    for word in args.rows:
        name, _, files = word.partition("=")
        if not files:
            parser.error(f"expected NAME=FILE[+FILE], got {word!r}")
        rows[name] = [Path(file) for file in files.split("+")]
    torch.set_num_threads(1)
    model.tune_allocator()
    table = []
    try:
        sets = [prepare.Clips(prepare.find(name)) for name in args.data]
        for name, paths in rows.items():
            table.append({"features": name, **judge(paths, sets, args)})
            print(json.dumps(table[-1]), flush=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    which = "all clips" if args.all else "the train and valid clips"
    caption = (f"5-fold cross-validation over {which} of {' and '.join(args.data)}, no artist in "
               f"two folds, means of {args.divisions} divisions; percent. Logistic regression on "
               f"standardised clip means ({args.features}), its C the best of six for each row")
    common.write({"caption": caption, "command": common.command_line(__file__),
                  "machine": common.machine(), "versions": model.versions(), "table": table},
                 args.out)


if __name__ == "__main__":
    main()
