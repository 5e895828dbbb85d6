"""ROC-AUC and average precision of many resamples of the test clips: each tag is sorted once, and a
resample is one pass over its counts.

The plain way, evaluate.bootstrap without this file: take the clips of each resample, score them.

Both metrics follow from sums at the G distinct scores of a tag's positives, which are few (2 % of
the clips have a tag of MagnaTagATune), so each clip is put into one of 3 G + 1 places, once:

    score        above the 1st | tied with the 1st | above the 2nd | tied with the 2nd |  below all
    negatives          0       |         1         |       2       |         3         | ...  2 G
    positives                  |      2 G + 1      |               |      2 G + 2      |

and the counts of a resample are added up by place. ROC-AUC is the plain way's to the bit (sums of
integers are exact in float64), average precision to the rounding of another order of one sum.
"""
import math

import numpy as np
import torch


class Ranking:
    """The metrics of one tag, from its scores and labels (N,), in any resample of the N clips."""

    def __init__(self, scores, labels):
        positive = np.asarray(labels) > 0
        falling = -np.asarray(scores, np.float64)
        distinct, which = np.unique(falling[positive], return_inverse=True)
        above = np.searchsorted(distinct, falling[~positive], "left")
        place = np.empty(len(falling), np.int64)
        place[~positive] = above + np.searchsorted(distinct, falling[~positive], "right")
        place[positive] = 2 * len(distinct) + 1 + which.reshape(-1)
        self.place = torch.from_numpy(place)
        self.distinct = len(distinct)

    def __call__(self, counts):
        """counts (N, B) float64: how often each clip is in each of B resamples -> roc_auc, pr_auc,
        each (B,) float64, NaN where positives or negatives are missing."""
        sums = counts.new_zeros(3 * self.distinct + 1, counts.shape[1])
        sums.index_add_(0, self.place, counts)
        positive = sums[2 * self.distinct + 1 :]
        negative = sums[: 2 * self.distinct + 1].cumsum(0)
        p = positive.sum(0)
        n = negative[-1]
        above = negative[0:-1:2]  # the negatives above each distinct score ...
        false = negative[1::2]  # ... and those tied with it as well: a tie is half a pair won
        true = positive.cumsum(0)
        roc = (positive * (2 * n - above - false)).sum(0) / (2 * p * n)
        pr = (positive * true / (true + false).clamp_min(1e-300)).sum(0) / p
        return roc.numpy(), pr.where(n > 0, math.nan).numpy()


def in_resamples(scores, labels, of_clips, mean):
    """Metrics in resamples of the clips, as a function of how often each has a clip: counts (B, N)
    -> {metric: (B,)}; `tag` (B, K).

    Args:
        scores, labels: of the clips, (N, K). of_clips: {metric: (N,)}, NaN where it does not exist.
        mean: over the tags, leaving out what is NaN.
    """
    tags = [Ranking(scores[:, k], labels[:, k]) for k in range(labels.shape[1])]

    def metrics(counts):
        counts = torch.from_numpy(np.ascontiguousarray(counts.T, np.float64))  # (N, B)
        roc, pr = np.stack([tag(counts) for tag in tags], -1)  # each (B, K)
        result = {"roc_auc": mean(roc), "pr_auc": mean(pr), "tag": pr}
        for name, values in of_clips.items():
            known = torch.from_numpy(~np.isnan(values)).double()
            total = torch.from_numpy(np.nan_to_num(values)) @ counts
            result[name] = (total / (known @ counts)).numpy()
        return result
    return metrics
