"""pretrain.py's losses against double loops, and exact on any number of processes."""

import math
import os
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import model
import pretrain
from pretraining import TOY, checkpoint, free_port, losses, run_to_its_end
from training.cpc import CPCLoss
from training.journal import read_log


def views(n=6, p=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, p, generator=generator, dtype=torch.float64).unbind()


def double_loop(z_i, z_j, t, decoupled=False):
    z = [np.array(v) / np.linalg.norm(v) for v in z_i.tolist() + z_j.tolist()]
    n = len(z_i)
    terms = []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        others = [k for k in range(2 * n) if k != i and not (decoupled and k == partner)]
        below = sum(math.exp(z[i] @ z[k] / t) for k in others)
        terms.append(-math.log(math.exp(z[i] @ z[partner] / t) / below))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_nt_xent_equals_a_double_loop(temperature):
    want = double_loop(*views(), temperature)
    assert pretrain.nt_xent(*views(), temperature).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_dcl_equals_a_double_loop(temperature):
    want = double_loop(*views(), temperature, decoupled=True)
    assert pretrain.dcl(*views(), temperature).item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_loss_of_half_precision_is_taken_in_float32(dtype):
    z_i, z_j = views()
    got = pretrain.nt_xent(z_i.to(dtype), z_j.to(dtype), 0.5)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(pretrain.nt_xent(z_i.float(), z_j.float()).item(), rel=0.02)


def test_the_loss_is_taken_in_float32_under_autocast():
    z_i, z_j = (z.float() for z in views())
    want = pretrain.nt_xent(z_i, z_j, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert pretrain.nt_xent(z_i, z_j, 0.5).item() == want.item()
        assert pretrain.dcl(z_i, z_j, 0.5).dtype == torch.float32


def test_the_loss_survives_projections_whose_squares_underflow():
    tiny = [(z * 1e-4).half() for z in views()]
    assert math.isfinite(pretrain.nt_xent(*tiny, 0.5).item())


def test_top1_counts_partners():
    z = torch.eye(4)
    assert pretrain.contrastive_top1(z, z).item() == 1
    assert pretrain.contrastive_top1(z, z.roll(1, 0)).item() == 0


@pytest.fixture
def cpc():
    """A tiny CPC learner, audio, and negatives, one of which is the true frame itself."""
    torch.manual_seed(0)
    learner = CPCLoss(model.CPC(width=1 / 64), pretrain.gather, steps=3).double()
    x = torch.rand(2, 1, 59049, dtype=torch.float64) * 2 - 1
    negatives = torch.randint(2 * 124, (2, 124, 4))
    negatives[0, 5, 0] = 5
    return learner, x, negatives


@torch.no_grad()
def cpc_by_loops(learner, x, negatives):
    """CPC's loss and accuracy, contexts and steps one by one."""
    z, c = learner.encoder.context(x)
    z = z.float()
    frames = z.flatten(0, 1)
    W = learner.predictor.weight.reshape(3, 8, 8)
    means = []
    hits = []
    for k in (1, 2, 3):
        terms = []
        for b in range(2):
            for t in range(124 - k):
                p = (W[k - 1] @ c[b, t]).float()
                true = b * 124 + t + k
                others = [m for m in negatives[b, t + k].tolist() if m != true]
                scores = torch.stack([p @ frames[m] for m in [true, *others]])
                terms.append(torch.logsumexp(scores, 0) - scores[0])
                hits.append(float(scores[0] >= scores.max()))
        means.append(torch.stack(terms).mean())
    return torch.stack(means).mean().item(), np.mean(hits)


def test_cpc_equals_loops(cpc):
    loss, accuracy = cpc[0](*cpc[1:])
    want, hits = cpc_by_loops(*cpc)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    assert accuracy.item() == pytest.approx(hits, abs=0.01)


def test_cpc_scores_in_float32_whatever_the_encoder_runs_in(cpc):
    learner, x, negatives = cpc
    seen = []
    look = lambda *tensors: seen.extend([*tensors[:2], torch.is_autocast_enabled("cpu")])
    with torch.autocast("cpu", torch.bfloat16), patch.object(learner, "score", look):
        learner(x, negatives)
    assert [t.dtype for t in seen[:2]] == [torch.float32] * 2
    assert seen[2] is False


# ------------------------------------------------------- exact over processes, on gradients


class Toy(nn.Module):
    """Two blocks of SampleCNN and a projection: what CLMR's gradients pass through, in float64."""

    def __init__(self):
        super().__init__()
        block = model.SampleCNN._block
        self.layers = nn.Sequential(
            block(1, 4, stride=3), block(4, 5, pool=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(5, 6))

    def forward(self, x):
        return self.layers(x)


def toy_run(rank, size, port, folder):
    """The gradients of one step and the state after five, for each loss: CLMR, DDP, plain SGD."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    results = {name: toy_steps(function, rank, size) for name, function in pretrain.LOSSES.items()}
    if rank == 0:
        torch.save(results, f"{folder}/{size}.pt")
    if size > 1:
        dist.barrier()  # nobody takes the group apart while another still works in it
        dist.destroy_process_group()


def toy_steps(loss, rank, size):
    torch.manual_seed(0)
    learner = pretrain.CLMR(Toy(), nn.Identity(), loss, 0.5).double()
    parallel = learner
    if size > 1:
        learner = model.synchronise(learner, "cpu")
        parallel = nn.parallel.DistributedDataParallel(learner, broadcast_buffers=False)
    optimiser = torch.optim.SGD(learner.parameters(), lr=0.1)
    result = {}
    for step in range(5):
        chance = torch.Generator().manual_seed(step)
        x = torch.randn(2, 8, 1, 1, 81, dtype=torch.float64, generator=chance)
        rows = slice(rank * 8 // size, (rank + 1) * 8 // size)
        value, _ = parallel(x[:, rows].flatten(0, 1))
        optimiser.zero_grad()
        value.backward()
        if step == 0:
            value = value.detach() / size
            if size > 1:
                dist.all_reduce(value)
            result["loss"] = value.item()
            result["grads"] = [p.grad.clone() for p in learner.parameters()]
        optimiser.step()
    return {**result, "state": learner.state_dict()}


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """{number of processes: {loss: what `toy_steps` found}}"""
    folder = tmp_path_factory.mktemp("toys")
    toy_run(0, 1, 0, folder)
    for size in (2, 4):
        mp.spawn(toy_run, (size, free_port(), folder), nprocs=size)
    return {size: torch.load(folder / f"{size}.pt") for size in (1, 2, 4)}


def each(toys):
    return [(toys[1][name], toys[size][name]) for size in (2, 4) for name in pretrain.LOSSES]


def test_the_loss_of_two_and_four_processes_equals_that_of_one(toys):
    for one, many in each(toys):
        assert many["loss"] == pytest.approx(one["loss"], rel=1e-12)


def test_the_gradients_of_two_and_four_processes_equal_those_of_one(toys):
    for one, many in each(toys):
        for i, (a, b) in enumerate(zip(one["grads"], many["grads"])):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)
            # The bias before a batch norm has no gradient.
            assert a.abs().max() > 1e-6 or i in (1, 5)


def test_after_five_steps_of_two_and_four_processes_the_state_equals_that_of_one(toys):
    for one, many in each(toys):
        for key, value in one["state"].items():
            other = many["state"][key].double()
            assert torch.allclose(value.double(), other, rtol=1e-10, atol=1e-12), key


@pytest.fixture(scope="module")
def scripts(tmp_path_factory, tiny_data):
    """The run folders of pretrain.py by one, two and four processes."""
    folders = {}
    for size in (1, 2, 4):
        folders[size] = tmp_path_factory.mktemp("scripts") / str(size)
        flags = ["--data", tiny_data, *TOY, "--batch-size", 8, "--max-steps", 5, "--lr", "1e-4"]
        done = run_to_its_end([*flags, "--out", folders[size]], size)
        assert done.returncode == 0, done.stderr
    return folders


def test_the_log_says_how_many_processes_there_were(scripts):
    assert [read_log(scripts[size])[0]["processes"] for size in (1, 2, 4)] == [1, 2, 4]


@pytest.mark.parametrize("size", [2, 4])
def test_the_script_has_the_same_losses_with_one_and_more_processes(scripts, size):
    assert losses(scripts[size]) == pytest.approx(losses(scripts[1]), rel=1e-4)


@pytest.mark.parametrize("size", [2, 4])
def test_the_script_takes_the_same_steps_with_one_and_more_processes(scripts, size):
    """A bias before a batch norm has no gradient: Adam turns its rounding errors into whole steps,
    and the running mean follows. The same happens to the few weights whose gradient is nearly zero,
    so what is left of a difference grows with --lr."""
    one, many = (checkpoint(scripts[n])["learner"] for n in (1, size))
    keys = [key for key, value in one.items()
            if value.is_floating_point() and not key.endswith(("0.bias", "running_mean"))]
    one, many = (torch.cat([state[key].flatten() for key in keys]) for state in (one, many))
    assert (many - one).norm() <= 1e-5 * one.norm()


def test_five_steps_of_the_script_move_the_weights(scripts):
    torch.manual_seed(0)
    start = model.build_encoder("samplecnn", width=0.0625).state_dict()["blocks.3.0.weight"]
    moved = checkpoint(scripts[1])["learner"]["encoder.blocks.3.0.weight"] - start
    assert moved.norm() > 3e-4 * start.norm()
