"""Contrastive Predictive Coding's objective (section 3.5): what the paper compares CLMR with."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class CPCLoss(nn.Module):
    """CPC's objective (section 3.5): which of 16 frames is the one k = 1 .. 20 steps ahead?

    `forward(views (B, 1, T), negatives (B, n, 15)) -> loss, accuracy`; negatives are numbers of
    frames in the global batch (row x n + frame). Step k is predicted from context c_t as W_k c_t
    and scored with a frame by their dot product; the loss is the mean cross-entropy.

    Args: encoder: with `context(x) -> frames (B, n, D), contexts (B, n, C)`, `frame_dim` D and
    `context_dim` C. gather: (B, ...) of this process -> (N, ...) of all, differentiable. steps: how
    many frames ahead.
    """

    def __init__(self, encoder, gather: Callable, steps: int = 20):
        super().__init__()
        self.gather = gather
        self.encoder = encoder
        self.steps = steps
        self.predictor = nn.Linear(encoder.context_dim, steps * encoder.frame_dim, bias=False)

    def forward(self, views, negatives):
        z, c = self.encoder.context(views)  # (B, n, D), (B, n, C)
        z = z.float()
        ahead = self.predictor(c).float().unflatten(2, (self.steps, -1))  # (B, n, steps, D)
        with torch.autocast(z.device.type, enabled=False):  # positives and negatives alike
            return self.score(z, ahead, negatives)

    def score(self, z: Tensor, ahead: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor]:
        """Frames z (B, n, D), predictions (B, n, steps, D), negatives (B, n, 15) -> loss, hits."""
        B, n, _ = z.shape
        others = self.gather(z).flatten(0, 1)[negatives]  # (B, n, 15, D)
        rank = dist.get_rank() if dist.is_initialized() else 0
        number = rank * B * n + torch.arange(B * n, device=z.device).reshape(B, n, 1)
        no_negative = negatives == number  # but the true frame itself: it is left out
        loss = z.new_zeros(())
        hits = z.new_zeros(())
        for k in range(1, self.steps + 1):
            p = ahead[:, : n - k, k - 1]  # (B, n-k, D): what the contexts say of the frame k ahead
            positive = (p * z[:, k:]).sum(-1, keepdim=True)
            negative = torch.einsum("btd,btmd->btm", p, others[:, k:])
            negative = negative.masked_fill(no_negative[:, k:], float("-inf"))
            logits = torch.cat([positive, negative], -1).flatten(0, 1)  # (B (n-k), 16)
            true = torch.zeros(len(logits), dtype=torch.long, device=z.device)
            loss = loss + F.cross_entropy(logits, true)
            hits = hits + (logits.detach().argmax(1) == 0).float().mean()
        return loss / self.steps, hits / self.steps
