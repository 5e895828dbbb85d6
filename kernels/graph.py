"""A training step as one CUDA graph, for GPUs.

A step of the paper's network is about 300 launches of kernels. A host that also runs the
augmentation chain and writes the log launches them one by one more slowly than a fast GPU works
them off; recorded once and replayed as a graph they are one launch. Measured with the network
alone, 96 pairs in bfloat16: results/speed. The plain way is the step that is handed in, which
gives the same numbers.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def captured_step(step: Callable, learner, optimiser, views: Tensor) -> Callable:
    """Record `step([views], rate) -> loss, top1` on a GPU -> a function that replays it.

    Args: step: forward pass, backward pass and update of `learner` by `optimiser`, which must be
    `capturable`; it may not ask the GPU for a value, as fp16's scaler does. views: (2B, 1, T),
    shows the shape. Weights, statistics and moments are left as they are.
    Returns: replay([views], rate) -> loss, top1, tensors that the next call overwrites.
    """
    inputs = torch.randn_like(views)
    rate = torch.zeros((), device=views.device)
    weights = {name: value.clone() for name, value in learner.state_dict().items()}
    moments = {p: {key: value.clone() for key, value in state.items()}
               for p, state in optimiser.state.items()}

    graph = torch.cuda.CUDAGraph()
    with fastest_algorithms():
        warm_up(step, inputs, rate)
        optimiser.zero_grad(set_to_none=True)  # the graph's gradients are its own
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, top1 = step([inputs], rate)

    learner.load_state_dict(weights)
    for p, state in optimiser.state.items():
        for key, value in state.items():  # in place: the graph holds these tensors
            value.copy_(moments[p][key]) if p in moments else value.zero_()
    tensors = [*learner.state_dict().values()]
    tensors += [value for state in optimiser.state.values() for value in state.values()]

    def replay(given, now, needed=tensors):
        """`needed`: the graph knows their addresses, and would not notice if they were freed."""
        inputs.copy_(given[0])
        rate.fill_(now)
        graph.replay()
        return loss, top1
    return replay


class fastest_algorithms:
    """cuDNN tries all its convolutions here, and the graph then keeps the fastest."""

    def __enter__(self):
        self.benchmark = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True

    def __exit__(self, *error):
        torch.backends.cudnn.benchmark = self.benchmark


def warm_up(step, inputs, rate, times: int = 3):
    """Take steps on a stream beside the current one, as a capture needs: what is allocated at the
    first call, and cuDNN's trials, must not be recorded."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*capturable=True.*")
        for _ in range(times):
            step([inputs], rate)
    torch.cuda.current_stream().wait_stream(beside)
