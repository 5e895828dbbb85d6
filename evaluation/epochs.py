"""Windows for a network that is trained end to end (section 4.3)."""
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch


class Epochs:
    """An epoch is one random window of every clip, in random order, drawn anew until there are
    `min_steps` steps: 540 clips make 11, after which no validation score says anything yet.

    Args:
        data: the windows to train on, with their starts as x.
        latest (n,): where the last window of the clip of each may start; None: each window counts,
            as it is (mode v1 of the label fractions).
        audio: (windows, size, batch size) -> their audio (b, 1, size), in batches.
        draw: (batch size, least steps of an epoch, seed).
    """

    def __init__(self, data, latest, audio: Callable, size: int, draw: tuple[int, int, int]):
        batch_size, min_steps, seed = draw
        if latest is not None:
            first = np.unique(data.clip, return_index=True)[1]
            data = data[first]
            latest = latest[first]
        self.data = data
        self.latest = latest
        self.audio = audio
        self.size = size
        self.batch_size = batch_size
        self.rng = np.random.default_rng([seed, 2])
        self.length = len(data.clip)
        if self.length > batch_size:
            self.length -= self.length % batch_size  # a short batch has odd statistics
        self.rounds = math.ceil(min_steps / max(1, self.length // batch_size))

    def __call__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The audio and labels (b, K) of an epoch's batches."""
        for _ in range(self.rounds):
            if self.latest is not None:
                self.data.x = torch.from_numpy(self.rng.integers(0, self.latest + 1))
            epoch = self.data[self.rng.permutation(len(self.data.clip))[: self.length]]
            labels = epoch.y.float().split(self.batch_size)
            for x, y in zip(self.audio(epoch, self.size, self.batch_size), labels):
                yield x, y.to(x.device)
