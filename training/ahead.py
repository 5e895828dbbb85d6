"""The views of the next steps, made while the current step runs.

Reading crops from a disk takes milliseconds, and the augmentation chain on a GPU a part of a step:
both fit beside the step before. What is left of the wait stands in every line of a run's log as
`wait`. The views do not depend on it: they are functions of (seed, step) alone.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor


class Batches:
    """What a step is given: this process's rows of its global batch.

    Args: clips: a prepared set. pairs: its sampler. chain: augmentations, with `draw` and a call.
    device: where the views are made. asymmetric: augment the first view of a pair alone. frames: of
    a crop, for CPC, which takes one view of a pair and 15 negatives a frame; None: two views."""

    def __init__(self, clips, pairs, chain, device, asymmetric=False, frames=None):
        rank = dist.get_rank() if dist.is_initialized() else 0
        size = dist.get_world_size() if dist.is_initialized() else 1
        local = pairs.batch_size // size
        self.clips = clips
        self.pairs = pairs
        self.chain = chain
        self.device = device
        self.frames = frames
        self.rows = slice(rank * local, (rank + 1) * local)
        self.views = 1 if frames else 2  # of a pair
        self.augmented = 1 if asymmetric else self.views

    def draw(self, step: int) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Crops (views x B, 1, T), first views before second; augmentation values; [negatives]."""
        N = self.pairs.batch_size
        index, start = (table[self.rows, : self.views].T.reshape(-1)
                        for table in self.pairs.draw(step))
        tensors = [self.clips.crops(index, start, self.pairs.n)]
        chance = self.pairs.chance("values", step)
        values = {name: value.unflatten(0, (self.augmented, -1))[:, self.rows].flatten(0, 1)
                  for name, value in self.chain.draw(self.augmented * N, chance).items()}
        if self.frames:
            shape = N, self.frames, 15
            tensors += [torch.randint(N * self.frames, shape, generator=chance)[self.rows]]
        if self.device.type == "cuda":  # it copies from pinned memory while the host goes on
            tensors = [tensor if tensor.is_cuda else tensor.pin_memory() for tensor in tensors]
        return tensors[0], values, tensors[1:]

    def augment(self, audio, values, negatives) -> list[Tensor]:
        """What `draw` gave -> [views (2B, 1, T)], or for CPC [views (B, 1, T), negatives]."""
        audio, *negatives = (t.to(self.device, non_blocking=True) for t in (audio, *negatives))
        raw, unchanged = audio.tensor_split([len(audio) * self.augmented // self.views])
        return [torch.cat([self.chain(raw, values), unchanged]), *negatives]


class Prefetch:
    """Call `make(step)` for step = first, first + 1, .. below `last` in a thread, some steps ahead.

    `waited` counts the seconds that `get` had to wait. It raises errors of reading, as OSError that
    names the step, and others as they are.
    """

    def __init__(self, make: Callable, first: int, last: int, ahead: int = 4):
        self.make = make
        self.next = first
        self.last = last
        self.ahead = ahead
        self.thread = ThreadPoolExecutor(1)
        self.made = {}
        self.waited = 0.0

    def get(self, step: int):
        """What `make` returned for this step; each step once, in order."""
        while self.next < min(step + 1 + self.ahead, self.last):
            self.made[self.next] = self.thread.submit(self.make, self.next)
            self.next += 1
        began = time.perf_counter()
        try:
            item = self.made.pop(step).result()
        except (OSError, ValueError, EOFError) as error:
            raise OSError(f"the audio of step {step} cannot be had: {error}") from error
        self.waited += time.perf_counter() - began
        return item

    def close(self):
        """End the thread; what is under way is finished, the rest is not begun."""
        self.thread.shutdown(cancel_futures=True)


class InputsOnCPU:
    """A thread cuts the crops ahead; the chain runs in the step, since it would take its cores.

    Args: draw: step -> crops and values; augment: these -> the step's list of tensors; the steps
    from `first` to `last` - 1.
    """

    def __init__(self, draw: Callable, augment: Callable, first: int, last: int):
        self.augment = augment
        self.prefetch = Prefetch(draw, first, last)

    def get(self, step: int) -> list[Tensor]:
        """What the network is given at this step."""
        return self.augment(*self.prefetch.get(step))

    def waited(self) -> float:
        """Seconds since the last question that steps had to wait for their crops."""
        seconds = self.prefetch.waited
        self.prefetch.waited = 0.0
        return seconds

    def close(self):
        """End the thread."""
        self.prefetch.close()


class InputsOnGPU:
    """A thread cuts the crops and augments them on the GPU, on a stream beside the step's.

    Arguments as of `InputsOnCPU`. The step waits for its views on the GPU, never on the host.
    """

    LIMIT = 8  # steps that a GPU may be behind: busy at all times, yet not full of views

    def __init__(self, draw: Callable, augment: Callable, first: int, last: int, device):
        self.draw = draw
        self.augment = augment
        self.device = device
        self.stream = torch.cuda.Stream(device, priority=-1)
        self.stream.wait_stream(torch.cuda.current_stream())  # the samples may be on their way yet
        self.gaps = []  # (all steps so far are done, the views of the next are there), by step
        self.behind = []  # events of steps that may not be done yet
        self.prefetch = Prefetch(self.make, first, last)

    def make(self, step: int):
        """In the thread: the tensors of a step, and the event at which they are ready."""
        torch.cuda.set_device(self.device)  # of this thread, or leaving the stream would make a
        #                                     context on the first GPU
        with torch.cuda.stream(self.stream):
            return self.augment(*self.draw(step)), self.stream.record_event()

    def get(self, step: int) -> list[Tensor]:
        """What the network is given at this step; the current stream will wait for it."""
        stream = torch.cuda.current_stream()
        free = self.moment()
        self.behind.append(free)
        if len(self.behind) == self.LIMIT:
            self.behind.pop(0).synchronize()
        tensors, ready = self.prefetch.get(step)
        stream.wait_event(ready)
        for tensor in tensors:
            tensor.record_stream(stream)
        self.gaps.append((free, self.moment()))
        return tensors

    def moment(self):
        """An event that is recorded now."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record()
        return event

    def waited(self) -> float:
        """Seconds since the last question that steps had to wait for their views, by the GPU's
        clock; it waits until the GPU has come so far."""
        gaps = self.gaps
        self.gaps = []
        return sum(free.elapsed_time(begun) for free, begun in gaps) / 1000

    def close(self):
        """End the thread."""
        self.prefetch.close()
