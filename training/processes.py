"""What lets a run of one or several processes end well: signals, and errors in one line.

pretrain.py's program uses it; the numbers do not depend on it.
"""

import contextlib
import os
import signal
import sys

import torch
import torch.distributed as dist


def rank_and_size() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without torch.distributed."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def alone_on_its_gpu(device) -> bool:
    """Does this process share its GPU with no other? Several share no samples, and have no NCCL."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    return device.type == "cuda" and processes <= max(1, torch.cuda.device_count())


def connect(device):
    """Join the processes that torchrun started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if alone_on_its_gpu(device) else "gloo")


def agree(number: int, finite: bool) -> list[int]:
    """The one exchange of a step.

    Args: the signal that this process caught, 0 for none; are its loss and weights numbers?
    Returns: [the signal that any process caught, 1 + the rank of one that lost its numbers or 0].
    """
    rank, size = rank_and_size()
    answers = torch.tensor([number, 0 if finite else rank + 1])
    if size > 1:
        dist.all_reduce(answers, op=dist.ReduceOp.MAX)
    return answers.tolist()


class Signals:
    """While it lasts, SIGTERM and SIGINT are noted as `number`, for the end of a step."""

    number = 0

    def __enter__(self):
        self.handlers = {n: signal.signal(n, self.note) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        """The first one counts."""
        self.number = self.number or number

    def __exit__(self, *error):
        for number, handler in self.handlers.items():  # the caller may be a program that goes on
            signal.signal(number, handler or signal.SIG_DFL)


class one_line_errors:
    """What may go wrong in a run ends here, in one line on stderr; a bug keeps its traceback.

    The group of processes is left. `program`: the name that the line begins with.
    """

    def __init__(self, program: str):
        self.program = program

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        line = self.line(error) if error else None
        if line:
            print(f"{self.program}: {line}", file=sys.stderr)
        with contextlib.suppress(RuntimeError):
            if dist.is_initialized():
                dist.destroy_process_group()
        return line is not None

    def line(self, error) -> str | None:
        """What to say of an error: nothing where another process says it; None: it is a bug."""
        rank = rank_and_size()[0]
        if isinstance(error, KeyboardInterrupt):  # while it loads; later it ends the step
            return "interrupted before the first step; the same command begins again"
        if isinstance(error, (ValueError, OSError, FloatingPointError)):
            return f"error: {error}" if rank == 0 or isinstance(error, OSError) else ""
        if isinstance(error, torch.OutOfMemoryError):
            reason = str(error).split(". ")[0]
            return (f"error: the GPU's memory is too small ({reason}); type a smaller "
                    "--batch-size, or --recompute 3")
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError)
                                                 and "gloo" in str(error)):
            return f"error: process {rank} stops, since another one ended; see its message"
        return None
