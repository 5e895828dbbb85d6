"""What the nearest clips have in common: do features put music together that belongs together?

No probe is trained: near is what has a high cosine of standardised features. Clips of one artist
sound alike for reasons of their own (a voice, a studio), so labels are compared with other artists'
clips alone, and how many of its artist's clips a clip finds is a metric of its own.
"""
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from evaluation import intervals

UNREACHABLE = -2.0  # below every cosine


def neighbours(x: Tensor, labels, song, artist, k: int = 10) -> dict[str, np.ndarray]:
    """Metrics of each of N clips, from its k nearest.

    Args:
        x: features (N, D). labels (N, K): 0/1. song (N,): clips of one song share it.
        artist (N,): their names, "" where not known: then the artist of that song alone.
    Returns: labels: the mean Jaccard similarity of its labels and those of the k nearest clips of
        other artists, which is the share of the same class where each has one; artist: the share of
        its artist's other clips that are among the k nearest of other songs, NaN where none is.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> found = neighbours(x, np.eye(2)[[0, 0, 1, 1]], np.arange(4), list("abcd"), 1)
    >>> found["labels"], found["artist"]
    (array([1., 1., 1., 1.]), array([nan, nan, nan, nan]))
    """
    artist = _numbers([f"artist {a}" if a else f"song {i}" for a, i in zip(artist, song)])
    song = _numbers(song)
    y = torch.as_tensor(np.asarray(labels), dtype=torch.float32)
    z = F.normalize((x - x.mean(0)) / x.std(0).clamp_min(1e-6))
    found = []
    for i in torch.arange(len(z)).split(256):  # b clips at a time: their cosines fit into memory
        by_artist = artist[i, None] == artist  # (b, N)
        of_song = song[i, None] == song
        near = z[i] @ z.T
        value, other = near.masked_fill(by_artist, UNREACHABLE).topk(min(k, len(z) - 1))
        shared = jaccard(y[i], y[other]).where(value > UNREACHABLE, math.nan).nanmean(1)
        nearest = near.masked_fill(of_song, UNREACHABLE).topk(min(k, len(z) - 1)).indices
        wanted = by_artist & ~of_song
        found.append(torch.stack([shared, wanted.gather(1, nearest).sum(1) / wanted.sum(1)]))
    return dict(zip(("labels", "artist"), torch.cat(found, 1).double().numpy()))

def _numbers(names):
    return torch.from_numpy(np.unique(names, return_inverse=True)[1])

def jaccard(y: Tensor, others: Tensor) -> Tensor:
    """Similarity (b, n) of the labels y (b, K) of a clip and those of n others (b, n, K)."""
    both = torch.einsum("bk,bnk->bn", y, others)
    return both / (y.sum(1)[:, None] + others.sum(2) - both).clamp_min(1)

def add(results: list, parts: list, clips, k: int):
    """Write `labels@k` and `artist@k`, among the clips of all splits, into the rows of results,
    with intervals over songs. parts: of each split the clips with their features, as Windows."""
    clip = np.concatenate([part.clip for part in parts])
    artist = getattr(clips, "artist", np.full(len(clips), ""))[clip]
    song = clips.group[clip]
    x = torch.cat([part.x for part in parts])
    for name, values in neighbours(x, clips.labels[clip], song, artist, k).items():
        known = (~np.isnan(values)).astype(float)
        if not known.any():
            continue
        values = np.nan_to_num(values)
        value = values.sum() / known.sum()
        draws = [counts @ values / (counts @ known) for counts in intervals.resamples(song)]
        draws = np.concatenate(draws)
        span = intervals.interval(draws, value).clip(0, 1)
        for result in results:
            result.draws[f"{name}@{k}"] = draws
            for key, of in (("mean", value), ("interval", span), ("std", None)):
                result.row[key][f"{name}@{k}"] = of
