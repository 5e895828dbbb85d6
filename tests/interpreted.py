"""Kernels run by Triton's interpreter, on a CPU: `python tests/interpreted.py FUNCTION FOLDER`.

In a process of its own, since Triton looks at TRITON_INTERPRET when it is imported. What is
compared
with: torch's layers in float64."""

import copy
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import model
from kernels import gpu


def close(got, want, tolerance=2e-6):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-9)
    assert error < tolerance, error.item()


def block_like(c_in, c_out, pool):
    """With weights of all signs, one of them zero."""
    torch.manual_seed(0)
    block = (
        model.SampleCNN._block(c_in, c_out, pool=pool).to(memory_format=torch.channels_last).train()
    )
    with torch.no_grad():
        for p in (*block[1].parameters(), block[0].bias):
            p.normal_()
        block[1].weight[0] = 0
    return block


def step(block, x):
    conv, norm = block[:2]
    return gpu.BlockStep.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, block)


def compare(block, reference, x, x_reference, tolerance=2e-6):
    close(x.grad, x_reference.grad, tolerance)
    assert torch.equal(block[0].bias.grad, torch.zeros_like(block[0].bias))
    for (name, p), q in zip(block.named_parameters(), reference.parameters()):
        if name != "0.bias":
            close(p.grad, q.grad, tolerance)
    for p, q in zip(block.buffers(), reference.buffers()):
        close(p, q)


def blocks(folder):
    cases = (
        (3, 16, 24, 3, 243),
        (1, 8, 200, 2, 81),
        (3, 8, 8, 5, 27),
        (3, 16, 512, 4, 3),
        (1, 8, 16, 7, 1),
    )
    for pool, c_in, c_out, batch, length in cases:
        block = block_like(c_in, c_out, pool == 3)
        reference = copy.deepcopy(block).double()
        x = (torch.randn(batch, c_in, 1, length) + 0.3).contiguous(
            memory_format=torch.channels_last
        )
        x.requires_grad_()
        x_reference = x.detach().double().requires_grad_()
        y = step(block, x)
        want = nn.Sequential.forward(reference, x_reference)
        close(y, want)
        grad = torch.randn_like(want)
        y.backward(grad.float())
        want.backward(grad)
        compare(block, reference, x, x_reference)
        assert block[0].weight.grad.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last)


def constant_audio(folder):
    """Where the convolution's output does not vary, far from zero, its variance is zero, not the
    rounding of a difference of squares."""
    block = block_like(8, 16, True)
    with torch.no_grad():
        block[0].weight.zero_()[..., 1] = 1e3
    step(block, torch.full((2, 8, 1, 81), 0.3))
    assert (block[1].running_var - 0.9).abs().max() < 1e-6, block[1].running_var


def process(rank, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    block = model.synchronise(nn.Sequential(block_like(8, 12, True)), "cpu")[0]
    x, grad = torch.load(Path(folder) / "given.pt")
    half = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
    y = step(block, half)
    y.backward(grad[2 * rank : 2 * rank + 2])
    gradients = [p.grad for p in block.parameters()]
    torch.save((y, half.grad, gradients, list(block.buffers())), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def two_processes(folder):
    from pretraining import free_port

    block = block_like(8, 12, True)
    x = torch.randn(4, 8, 1, 81).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = step(block, x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.save((x.detach(), grad), Path(folder) / "given.pt")
    mp.spawn(process, (free_port(), folder), nprocs=2)
    y_0, dx_0, grads_0, state_0 = torch.load(Path(folder) / "0.pt")
    y_1, dx_1, grads_1, state_1 = torch.load(Path(folder) / "1.pt")
    close(torch.cat([y_0, y_1]), y)
    close(torch.cat([dx_0, dx_1]), x.grad)
    for a, b, p in zip(grads_0, grads_1, block.parameters()):
        close(a + b, p.grad)
    for a, b, buffer in zip(state_0, state_1, block.buffers()):
        assert torch.equal(a, b)
        close(a, buffer)


def stem(folder):
    torch.manual_seed(0)
    samples = torch.randn(5000, 3).cumsum(0) * 0.01 + 0.5  # neighbours alike, as in music
    rows = torch.cat([torch.ones(5000, 1), samples], 1)
    close(gpu.stem_moments(rows), rows.double().T @ rows.double(), 1e-6)
    affine = torch.cat([torch.randn(1, 24) * 0.1, torch.randn(3, 24)])
    grad = torch.randn(5000, 24)
    out = torch.full((5000, 24), float("nan"))
    gpu.stem(rows, affine, out)
    want = (rows.double() @ affine.double()).relu()
    close(out, want)
    close(gpu.stem_sums(rows, grad, affine), rows.double().T @ (grad * (want > 0)).double())


def stem_step(folder):
    """The whole pass of the stem, against torch's layers in float64."""
    torch.manual_seed(0)
    block = model.SampleCNN(width=0.125).train().blocks[0]
    with torch.no_grad():
        for p in (*block[1].parameters(), block[0].bias):
            p.normal_()
    reference = copy.deepcopy(block).double()
    x = torch.randn(3, 1, 1, 729) + 0.3
    conv, norm = block[:2]
    y = gpu.StemStep.apply(x, conv.weight, conv.bias, norm.weight, norm.bias, block)
    want = nn.Sequential.forward(reference, x.double())
    close(y, want)
    grad = torch.randn_like(want)
    y.backward(grad.float())
    want.backward(grad)
    x.grad = x_grad = torch.zeros_like(x)  # nobody asks for it
    compare(block, reference, x, type("nobody", (), {"grad": x_grad.double()}))


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
