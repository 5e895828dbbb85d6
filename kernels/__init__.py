"""The engine room: faster passes of the same numbers. Optional.

Each file's head says what it computes, why it is faster, by how much, and what the plain way is;
nothing here imports anything of the six files at the top, which hand in what is needed. The tests
compare every pass with the plain way. Without this folder the numbers are the same, by torch's own
layers and operations, slower, which is said once.

    cpu.py      a block's training pass on a CPU (model.Block)
    norm.py     batch norm over processes on a CPU, for other blocks
    pooled.py   batch norm, max-pool 2 and ReLU on a CPU (model.MelCNN's blocks), by block.c
    gpu.py      the same on a GPU, as Triton kernels (model.Block)
    filters.py  second-order filters and rooms (augment.low_pass, high_pass, reverb)
    splice.py   the pitch shift's segments found, read and laid together (augment.pitch_shift)
    splice_gpu.py   its search for them as one Triton kernel
    compiled.py their loops in C (chain.c, block.c), where there is a compiler
    graph.py    a training step as one CUDA graph (pretrain)

What the blocks' passes gain, here: SampleCNN's step without the chain, one core of an AMD EPYC with
AVX-512 bf16 that other programs shared, torch 2.11; processor time in seconds, median of two to
four steps, and peak memory in GiB; the passes' numbers before they came into this folder were the
same within the noise (1.42 s, 0.62 s, 0.92 s, 0.46 s), their losses to the bit:
    width, pairs, precision    kernels/       torch's layers
    1.0,  8, float32           1.41   1.7     1.77   2.9
    1.0,  8, bfloat16          0.62   1.7     0.70   2.1    one process: both are torch's layers
    0.5, 16, float32           0.91   1.6     0.93   2.8
    0.5, 16, bfloat16          0.42   1.7     0.45   1.8    one process: both are torch's layers
melcnn, 96 pairs in bfloat16 without spectrogram and chain: 0.211 s by pooled.py, 0.265 by layers.
On an H200, 96 pairs in bfloat16: 35 ms by torch's layers, 9.5 by gpu.py, 7.9 as one CUDA graph
(results/README.md; measured before gpu.py was written anew, not since).
"""
import functools
import warnings

import torch
from torch import nn

from . import cpu, norm, pooled


def training_pass(block: nn.Sequential, x: torch.Tensor):
    """The faster way of a block through x in training, or None: then its layers are the way.

    Args:
        block: convolution, batch norm, max-pool 3 (or none) and ReLU, with the attribute
            `recompute`: to keep its input and output alone for the backward pass. Where the norm
            has a true attribute `over_processes`, its statistics are those of all processes
            (section 3.2).
        x: (B, C, 1, T), or (B, C, H, T) in model.MelCNN, whose max-pool is of 2 x 2.
    Returns: a function of x."""
    if observed(block) and not cpu.over_processes(block[1]):
        return None
    stem = is_stem(block[0])
    passes = passes_for(block, x) if stem or fits(block, x) else None
    if passes is None:
        return through_layers(block) if x.device.type == "cpu" else None
    conv, bn = block[:2]
    step = passes.StemStep if stem else passes.BlockStep
    parameters = (conv.weight, conv.bias, bn.weight, bn.bias)

    def run(x):
        if not x.is_cuda:
            return step.apply(x, *parameters, block)
        with torch.cuda.device(x.device):  # Triton launches on the current one
            return step.apply(x, *parameters, block)

    return run


def observed(block):
    """Does somebody look at the layers one by one: by hooks on them, or torch.jit.trace?

    Over processes that changes nothing, since all must send the same sums, and hooks are often of
    one process alone."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    watched = any(getattr(layer, kind, None) for layer in block for kind in hooks)
    return watched or torch.jit.is_tracing()


def through_layers(block):
    """The block's layers one by one, but what pooled.py and norm.py (over processes) do faster;
    None where its norm is frozen, or torch's affair."""
    bn = block[1]
    if isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return None

    def run(x):
        x = block[0](x)
        if pooled.fits(block, x):
            return pooled.PoolStep.apply(x, bn.weight, bn.bias, bn)
        if not cpu.over_processes(bn):
            x = bn(x)
        else:
            x = norm.NormStep.apply(x, bn.weight, bn.bias, bn)
        for layer in block[2:]:
            x = layer(x)
        return x

    return run


def is_stem(conv):
    """Is it SampleCNN's first convolution, whose windows do not overlap?"""
    return (conv.in_channels, conv.kernel_size, conv.stride) == (1, (1, 3), (1, 3))


def fits(block, x):
    """Is it a later block of SampleCNN, its pool without a remainder?"""
    conv = block[0]
    form = (conv.kernel_size, conv.stride, conv.padding)
    pools = len(block) == 4
    return form == ((1, 3), (1, 1), (0, 1)) and not (pools and x.shape[3] % cpu.POOL)


def passes_for(block, x):
    """gpu or cpu, whose passes are taken (those of cpu.py work on any device), or None."""
    bn = block[1]
    of_torch = isinstance(bn, nn.SyncBatchNorm)  # its statistics are torch's affair
    if not bn.training:
        return None  # frozen, as when fine-tuning with the batch norms in eval mode
    if block.recompute:
        return cpu
    if x.is_cuda and not of_torch and bn.weight.dtype == torch.float32 and not audio_gradient(x):
        return gpu_passes()
    over_processes = cpu.over_processes(bn) and not of_torch
    full_precision = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    # in bfloat16 torch's layers are as fast
    return cpu if over_processes or full_precision else None


def audio_gradient(x):
    """Is x audio whose gradient is wanted? The stem's kernels know none."""
    return x.shape[1] == 1 and x.requires_grad


@functools.cache
def gpu_passes():
    """kernels.gpu; None, and a warning, where it cannot be used."""
    try:
        from . import gpu
        gpu.stem_moments(torch.ones(2, 4, device="cuda"))
        return gpu
    except Exception as error:  # no Triton, no C compiler, an unknown GPU: types of their own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        warnings.warn("training on this GPU goes through torch's own layers, at about a quarter of "
                      f"the speed: kernels/gpu.py cannot be used ({reason})", stacklevel=2)
        return None
