"""The pitch shift's segments found, read and laid together: a few large products, or one kernel.

What it computes: augment._overlap_add, to rounding. The output of a pitch shift is laid together
from S segments of 50 ms, one after the other, each starting where the input is most like what would
have come next; then each is read at the new speed by a band-limited interpolator.

Why it is faster. The plain way takes the segments one by one: for each it normalises 336 candidates
of 220 samples and multiplies them with what would come next, and reads 1,322 samples by 32 weights
each. Here
- all that does not depend on the segment before (the norms of the candidates, by running sums; the
  attacks around them) is computed for all segments at once;
- the product with the candidates is one small matrix product, in which neighbouring candidates
  share what they read (`_match`);
- the segments of an example share the fractions between the samples at which they are read, so the
  interpolation of all of them is a few small matrix products (`_read`);
- on a GPU with Triton the search is one kernel, a program for each example, in place of some 1,300
  launches one after the other.

By how much: on one core of an AMD EPYC a pitch shift takes 1/4 of its plain time; with chain.c
(compiled.py), which has the search and the reading in one pass each, 1/8
(results/speed/chain.json); on a GPU see splice_gpu.py.

Handed in: augment.Splicing. Letters: B examples, S segments, and of a segment
count x P candidates, where P is the block for which attacks are counted alike.
"""

import math
import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import compiled

GROUP = 32                  # outputs that the interpolator computes in one matrix product
ROWS = 4                    # examples read at once on a CPU: the temporaries stay in the cache


def overlap_add(plan) -> Tensor:
    """The segments laid together, (B, S hop)."""
    starts = search(plan)
    fade_in = torch.linspace(0, math.pi / 2, plan.fade, device=starts.device).sin().square()
    if compiled.fits(plan):
        return compiled.lay(plan, starts, fade_in)
    laid = plan.audio.new_empty(len(starts), plan.segments, plan.hop)
    step = ROWS if starts.device.type == "cpu" else max(len(starts), 1)
    for i in range(0, len(starts), step):
        rows = slice(i, i + step)
        pieces = _read(plan, rows, starts)
        overlap = pieces[:, 1:, : plan.fade]
        overlap.copy_(torch.lerp(pieces[:, :-1, plan.hop :], overlap, fade_in))
        laid[rows] = pieces[:, :, : plan.hop]
    return laid.flatten(1)


# ------------------------------------------------------------------------------- the search


class Tables(NamedTuple):
    """What the search reads that does not depend on where the segment before it starts. Attacks are
    running sums; of the stretch that is cross-faded, those before its end and, with the sign
    changed, before its beginning."""

    step: Tensor            # (B,) int64: 1 / fractions samples of input from segment to segment
    scale: Tensor           # (B, S - 1, count, P): 1 / norm of each candidate
    candidates: Tensor      # (B, S - 1, 2, count): attacks of each block of candidates
    onward: Tensor          # (B, blocks, 2): attacks of going straight on, by its block
    far: Tensor             # (count, P): a cost so small that it settles ties alone


def search(plan) -> Tensor:
    """Where each segment starts in the audio, (B, S)."""
    if plan.segments == 1:
        return plan.start[:, None]
    if compiled.fits(plan):
        return compiled.search(plan, step_of(plan))
    if in_one_kernel(plan.audio.device):
        from .splice_gpu import search_in_one_kernel

        return search_in_one_kernel(plan, tables_of(plan))
    return _search_in_steps(plan, tables_of(plan))


def step_of(plan) -> Tensor:
    """(B,) int64: 1 / fractions samples of the audio from one segment to the next."""
    return (plan.ratio * (plan.hop * (len(plan.short_weights) - 1))).round().long()


def tables_of(plan) -> Tables:
    """Made for all segments at once."""
    candidates, onward = _attacks_cut(plan)
    lag = torch.arange(plan.lags, device=plan.audio.device).view(-1, plan.block)
    return Tables(
        step=step_of(plan),
        scale=_scale_of_candidates(plan),
        candidates=candidates,
        onward=onward,
        far=1e-5 * (lag / plan.search - 1).square())


def _scale_of_candidates(plan) -> Tensor:
    shape = (len(plan.audio), plan.segments - 1, plan.lags + plan.fade)
    stride = (plan.audio.stride(0), plan.hop, 1)
    around = plan.audio.as_strided(shape, stride, plan.first + plan.hop)
    energy = pad(around.square().cumsum(2), (1, 0))
    energy = energy[:, :, plan.fade : plan.fade + plan.lags] - energy[:, :, : plan.lags]
    return energy.clamp_min_(1e-8).rsqrt_().unflatten(2, (-1, plan.block))


def _attacks_cut(plan) -> tuple[Tensor, Tensor]:
    """candidates and onward of Tables."""
    device = plan.audio.device
    own = torch.arange(1, plan.segments, device=device)[:, None] * plan.hop
    lag = torch.arange(0, plan.lags, plan.block, device=device)
    begin = (plan.first + own + lag) // plan.block                              # (S - 1, count)
    end = begin + plan.fade // plan.block + 2
    candidates = torch.stack([plan.attacks[:, end], -plan.attacks[:, begin]], 2)
    reach = plan.fade // plan.block + 3
    before = pad(plan.attacks, (1, 0))[:, : -reach - 1]
    return candidates, torch.stack([plan.attacks[:, reach:], -before], 2)


def _search_in_steps(plan, tables: Tables) -> Tensor:
    """One segment after the other, all examples at once: few and small calls. Times are in fixed
    point, 1 / fractions of a sample."""
    fractions = len(plan.short_weights) - 1
    row = torch.arange(len(plan.audio), device=plan.audio.device)
    starts = [plan.start]
    for s in range(plan.segments - 1):
        begin = plan.first + (s + 1) * plan.hop                                 # of the candidates
        ahead = torch.add(tables.step, starts[-1], alpha=fractions)
        here = tables.onward[row, ahead // fractions // plan.block][:, :, None]     # (B, 2, 1)
        cut = torch.maximum(tables.candidates[:, s], here).sum(1)               # (B, count)
        match = _match(plan, begin, _what_comes_next(plan, ahead, row))         # (B, count, P)
        cost = torch.addcmul(cut[:, :, None] + tables.far, match, tables.scale[:, s], value=-1)
        lag = cost.flatten(1).argmin(1)
        drift = (ahead // fractions - (begin + plan.search)).abs()
        hold = (cut[row, lag // plan.block] > 0.2) & (drift < plan.drift)       # no splice here
        starts.append(torch.where(hold, (ahead + fractions // 2) // fractions, lag + begin))
    return torch.stack(starts, 1)


def _what_comes_next(plan, ahead: Tensor, row: Tensor) -> Tensor:
    """(B, fade) of norm 1: the audio of each row, read between its samples from ahead (B,) on."""
    fractions = len(plan.short_weights) - 1
    weights = plan.short_weights[ahead % fractions]                             # (B, taps)
    taps = weights.shape[1]
    near = plan.audio.unfold(1, plan.fade + taps - 1, 1)[row, ahead // fractions - (taps // 2 - 1)]
    near = near.unfold(1, plan.fade, 1).contiguous()                            # (B, taps, fade)
    template = torch.bmm(weights[:, None], near)[:, 0]
    return template / torch.linalg.vector_norm(template, dim=1, keepdim=True).clamp_min(1e-4)


def _match(plan, begin: int, template: Tensor) -> Tensor:
    """(B, count, P): the template (B, fade) times the candidate at lag P q + p after begin.

    One small matrix product: the audio from P q on, times the template moved by p. A view can only
    move it the other way, so p runs backwards."""
    width = plan.fade + plan.block - 1
    shape = (len(template), plan.lags // plan.block, width)
    room = plan.audio.as_strided(shape, (plan.audio.stride(0), plan.block, 1), begin).contiguous()
    moved = pad(template, (plan.block - 1, plan.block - 1)).unfold(1, width, 1)     # (B, P, width)
    return torch.bmm(room, moved.contiguous().transpose(1, 2)).flip(2)


@lru_cache(maxsize=8)
def in_one_kernel(device: torch.device) -> bool:
    """Whether the search is one kernel: on a GPU where Triton works, or it is said once why not.
    Triton comes with torch for Linux, and needs a C compiler and Python's headers."""
    if device.type != "cuda":
        return False
    try:
        from .splice_gpu import trial

        trial(device)
        return True
    except Exception as error:  # of types of Triton's own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        text = f"pitch_shift takes its slower way on this GPU: Triton cannot be used ({reason})"
        warnings.warn(text, stacklevel=2)
        return False


# ------------------------------------------------------------------------------- reading


def _read(plan, rows: slice, starts: Tensor) -> Tensor:
    """Of these rows, (B, S, hop + fade): from each start on every ratio-th sample.

    GROUP neighbouring outputs (G) of all segments are one product with a banded matrix, K of them
    for the length of a segment."""
    starts = starts[rows]
    length = plan.hop + plan.fade
    groups = -(-length // GROUP)
    span = math.ceil(GROUP * max(1.34, plan.highest)) + plan.weights.shape[1]
    band, base = _band(plan, plan.ratio[rows], groups, span)                    # (B, K, G, span)
    index = starts[:, None, :] + base[:, :, None]                               # (B, K, S)
    row = torch.arange(len(starts), device=starts.device)[:, None, None]
    windows = plan.audio[rows].unfold(1, span, 1)[row, index]                   # (B, K, S, span)
    pieces = torch.bmm(windows.flatten(0, 1), band.flatten(0, 1).transpose(1, 2))
    pieces = pieces.view(len(starts), groups, -1, GROUP).transpose(1, 2)        # (B, S, K, G)
    return pieces.flatten(2)[:, :, :length]


def _band(plan, ratio: Tensor, groups: int, span: int) -> tuple[Tensor, Tensor]:
    """The weights of each group as a matrix, (B, K, G, span), and where it begins to read, (B, K),
    from the start of the segment on."""
    taps = plan.weights.shape[1]
    position = torch.arange(groups * GROUP, device=ratio.device) * ratio[:, None]       # float64
    whole = position.floor().long()
    fraction = (position - whole).float() * (len(plan.weights) - 1)
    whole = whole.view(-1, groups, GROUP)
    weights = plan.weights.index_select(0, fraction.round().long().flatten())
    weights = weights.view(*whole.shape, taps)
    column = (whole - whole[:, :, :1])[..., None] + torch.arange(taps, device=ratio.device)
    zeros = weights.new_zeros(len(ratio), groups, GROUP, span)
    return zeros.scatter_(3, column, weights), whole[:, :, 0] - (taps // 2 - 1)
