"""kernels/cpu.py and pooled.py, against torch's own layers in float64; and the batch norm over
processes that stands in for them."""

import copy
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kernels
import model
from test_model import trained
from pretraining import free_port


@pytest.fixture
def without_kernels(monkeypatch):
    """As where model.py was copied alone."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    model.load_beside.cache_clear()
    yield
    model.load_beside.cache_clear()


def unusual(encoder):
    """Weights as after some training; those of the batch norms of both signs."""
    with torch.no_grad():
        for block in encoder.blocks:
            sign = torch.where(torch.rand(len(block[1].weight)) < 0.3, -1, 1)
            block[1].weight.uniform_(0.5, 1.5).mul_(sign)
            block[1].bias.normal_(0, 0.3)
            block[0].bias.normal_()
    return encoder.train()


def layers_of(encoder):
    """The same blocks of torch's own layers, in float64."""
    return (
        nn.Sequential(*[nn.Sequential(*copy.deepcopy(block)) for block in encoder.blocks])
        .double()
        .train()
    )


def compared(block, x, layers, x_exact, least):
    """Run both forward and backward from the same gradient, which is nought where the output is
    below `least`, near ReLU's corner. Returns: (name, got, expected) of all that comes out, and
    the exact output."""
    y = block(x)
    want = layers(x_exact)
    upstream = torch.randn(want.shape, dtype=torch.float64) * (want > least)
    y.backward(upstream.to(y.dtype))
    want.backward(upstream)
    found = [("output", y, want), ("input's gradient", x.grad, x_exact.grad)]
    found += [
        (name, p.grad, q.grad)
        for (name, p), q in zip(block.named_parameters(), layers.parameters())
    ]
    found += [(name, p, q) for (name, p), q in zip(block.named_buffers(), layers.buffers())]
    return found, want.detach()


def distance(got, expected):
    assert got.shape == expected.shape
    return (got.double() - expected.double()).norm() / expected.double().norm()


@pytest.mark.parametrize("dtype, most", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_training_on_a_cpu_equals_torchs_layers_in_float64(dtype, most):
    """Outputs, gradients of all weights and of the audio, and running statistics, block by
    block."""
    torch.manual_seed(0)
    encoder = unusual(model.SampleCNN(width=0.125))
    plain = layers_of(encoder)
    x = torch.randn(6, 1, 1, 59049)
    x[5] = 0  # silence: every position is a maximum
    for block, layers in zip(encoder.to(dtype).blocks, plain):
        assert kernels.training_pass(block, x.to(dtype))
        found, x_next = compared(
            block,
            x.to(dtype, copy=True).requires_grad_(),
            layers,
            x.to(torch.float64, copy=True).requires_grad_(),
            1e-3,
        )
        for name, got, expected in found:
            if name == "0.bias":  # before a batch norm: its gradient is nought
                assert not got.any() and expected.abs().max() < 1e-6
            else:
                assert distance(got, expected) <= most, (block, name)
        x = x_next.float()


@pytest.mark.parametrize(
    "i, shape", [(0, (8, 1, 1, 729)), (1, (8, 16, 1, 243)), (10, (8, 64, 1, 9))]
)
def test_training_in_bfloat16_stays_near_float64(i, shape):
    """As two processes of a CPU with bfloat16 train: the same passes, the products in bfloat16
    (where two numbers that a pool compares become one, it may take the other: 5 % of a
    gradient)."""
    torch.manual_seed(0)
    encoder = unusual(model.SampleCNN(width=0.125))
    layers = layers_of(encoder)[i]
    encoder.recompute(11)
    x = torch.randn(shape) if i == 0 else torch.randn(shape).relu()
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = compared(
            encoder.blocks[i], x.clone().requires_grad_(), layers, x.double().requires_grad_(), 0.05
        )
    for name, got, expected in found:
        assert name == "0.bias" or distance(got, expected) <= 0.1, name


needs_a_compiler = pytest.mark.skipif(
    kernels.compiled.library("block.c") is None, reason="there is no C compiler"
)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@needs_a_compiler
@pytest.mark.parametrize("branches, width", [(1, 1.0), (2, 1.0), (1, 1.5)])
def test_melcnns_blocks_equal_torchs_layers_in_float64(threads, branches, width):
    """By block.c; the fourth block's pool has a remainder, and 24 channels fill no 16 lanes."""
    torch.manual_seed(0)
    encoder = unusual(model.MelCNN(width, branches=branches))
    plain = layers_of(encoder)
    x = torch.randn(6, branches, 96, 152)
    x[5] = 0  # silence: every position is a maximum
    for block, layers in zip(encoder.blocks, plain):
        conv_out = torch.empty(1, block[0].out_channels, 2, 2)
        assert kernels.pooled.fits(block, conv_out) == (len(block) == 4)
        found, x_next = compared(
            block, x.clone().requires_grad_(), layers, x.double().requires_grad_(), 1e-3
        )
        for name, got, expected in found:
            if name == "0.bias":  # before a batch norm: its gradient is nought
                assert got.abs().max() < 0.1 and expected.abs().max() < 1e-6
            else:
                assert distance(got, expected) <= 2e-5, (block, name)
        x = x_next.float()


@needs_a_compiler
def test_melcnns_blocks_in_bfloat16_are_as_near_to_float64_as_torchs_layers():
    torch.manual_seed(0)
    encoder = unusual(model.MelCNN())
    exact = layers_of(encoder)
    layers = nn.Sequential(*[nn.Sequential(*copy.deepcopy(block)) for block in encoder.blocks])
    x = torch.randn(6, 1, 96, 152)
    want = exact(x.double())
    upstream = torch.randn_like(want)
    want.backward(upstream)
    for blocks in (encoder.blocks, layers):
        with torch.autocast("cpu", torch.bfloat16):
            y = blocks(x)
        y.backward(upstream.bfloat16())
    for (name, p), ours, theirs in zip(
        exact.named_parameters(), encoder.blocks.parameters(), layers.parameters()
    ):
        if not name.endswith("0.bias"):
            limit = 1.25 * distance(theirs.grad, p.grad) + 0.01
            assert distance(ours.grad, p.grad) < limit, name


@needs_a_compiler
def test_what_is_no_number_goes_through_melcnns_blocks_as_through_torchs_layers():
    torch.manual_seed(0)
    block = unusual(model.MelCNN()).blocks[1]
    layers = nn.Sequential(*copy.deepcopy(block))
    x = torch.randn(4, 16, 8, 8)
    for bad in (float("nan"), float("inf")):
        x[1, 3, 2, 2] = bad
        assert torch.equal(block(x).isnan(), layers(x).isnan())


@pytest.fixture
def no_compiler(monkeypatch):
    def forget():
        kernels.compiled.library.cache_clear()
        kernels.compiled.say_slower.cache_clear()

    forget()
    monkeypatch.setenv("CC", "/no/such/compiler")
    yield
    forget()


def test_melcnns_blocks_without_a_compiler_are_left_to_the_layers(no_compiler):
    block = unusual(model.MelCNN()).blocks[0]
    x = torch.randn(2, 1, 96, 152)
    with pytest.warns(UserWarning, match="a step of melcnn .* kernels/block.c cannot be compiled"):
        y = block(x)
    assert torch.equal(y, nn.Sequential(*copy.deepcopy(block))(x))


def unlike_melcnns(norm=None, **pool):
    """A block that only looks like melcnn's."""
    pool = nn.MaxPool2d(**({"kernel_size": 2} | pool))
    return model.Block(nn.Conv2d(1, 16, 3), norm or nn.BatchNorm2d(16), pool, nn.ReLU()).train()


@pytest.mark.parametrize(
    "block",
    [
        unlike_melcnns(stride=1),
        unlike_melcnns(padding=1),
        unlike_melcnns(dilation=2),
        unlike_melcnns(ceil_mode=True),
        unlike_melcnns(nn.BatchNorm2d(16, momentum=None)),
        unlike_melcnns(nn.BatchNorm2d(16, affine=False)),
        unlike_melcnns(nn.BatchNorm2d(16, track_running_stats=False)),
        unlike_melcnns(nn.GroupNorm(4, 16)),
    ],
    ids=lambda block: f"{block[1]} {block[2]}",
)
def test_blocks_of_another_kind_are_left_to_the_layers(block):
    x = torch.randn(3, 1, 11, 13)
    layers = nn.Sequential(*copy.deepcopy(block))
    assert torch.equal(block(x), layers(x))


@pytest.mark.parametrize("kind", [model.SampleCNN, model.MelCNN])
def test_hooks_on_a_blocks_inner_layers_are_called_in_training(kind):
    encoder = kind(width=0.25).train()
    seen = []
    for layer in encoder.blocks[1]:
        layer.register_forward_hook(lambda layer, given, out: seen.append(type(layer).__name__))
    encoder(torch.randn(2, 1, 59049))
    assert seen == [type(layer).__name__ for layer in encoder.blocks[1]]


@pytest.mark.parametrize("kind", [model.SampleCNN, model.MelCNN])
def test_an_encoder_in_training_can_be_traced(kind):
    encoder = kind(width=0.25).train()
    torch.manual_seed(0)
    x = torch.randn(8, 1, 59049)
    traced = torch.jit.trace(encoder, x, check_trace=False)
    assert torch.allclose(traced(x), encoder(x), rtol=1e-2, atol=1e-3)


def test_an_image_too_small_to_pool_is_refused_as_by_the_layers():
    block = unusual(model.MelCNN()).blocks[1]
    with pytest.raises(RuntimeError, match="Output size is too small"):
        block(torch.randn(2, 16, 1, 8))


@needs_a_compiler
def test_tensors_that_are_none_and_another_default_device_do_no_harm():
    block = unusual(model.MelCNN()).blocks[1]
    x = torch.randn(2, 16, 8, 8)
    want = copy.deepcopy(block)(x)
    with torch.device("meta"):
        assert torch.equal(block(x), want)
    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        assert block(fakes.from_tensor(x)).shape == want.shape


@needs_a_compiler
@pytest.mark.parametrize("mean", [0.0, 1e3])
def test_statistics_far_from_nought_do_not_cancel(mean):
    """Once the running mean has come near."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(16)
    norm.running_mean.fill_(mean + 0.5)
    x = torch.randn(4, 16, 8, 8) + mean
    relu = nn.ReLU()
    layers = nn.Sequential(copy.deepcopy(norm).double(), nn.MaxPool2d(2), relu)
    y = kernels.pooled.PoolStep.apply(x, norm.weight, norm.bias, norm)
    assert distance(y, layers(x.double())) < 1e-4
    assert torch.allclose(norm.running_var.double(), layers[0].running_var, rtol=1e-4)


@needs_a_compiler
def test_second_derivatives_are_refused_and_not_wrong():
    block = unusual(model.MelCNN()).blocks[1]
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


def test_training_on_a_cpu_takes_any_layout_of_memory():
    torch.manual_seed(0)
    block = model.SampleCNN._block(4, 6, pool=True)
    x = torch.randn(3, 4, 1, 27)
    want = copy.deepcopy(block)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(block(x), want, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(block(x), want, rtol=1e-5, atol=1e-6)


def test_behind_frozen_layers_weights_alone_ask_for_a_gradient():
    block = model.SampleCNN._block(4, 6, pool=True)
    block(torch.randn(3, 4, 1, 27)).sum().backward()
    assert block[1].bias.grad.any()
    assert block[0].weight.grad.shape == block[0].weight.shape


def test_a_pool_with_a_remainder_is_left_to_the_layers():
    block = model.SampleCNN._block(4, 6, pool=True)
    assert block(torch.randn(2, 4, 1, 29)).shape == (2, 6, 1, 9)


def test_a_convolution_of_another_form_is_left_to_the_layers():
    block = model.Block(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(block.train()(x), nn.Sequential(*copy.deepcopy(block))(x))


def test_a_batch_norm_that_is_frozen_stays_frozen():
    """Fine-tuning with the batch norms in eval mode: their running statistics normalise, and do
    not move."""
    torch.manual_seed(0)
    encoder = trained(model.SampleCNN(width=0.125))
    audio = torch.rand(3, 1, 59049) * 2 - 1
    with torch.no_grad():
        want = encoder.eval()(audio)
    before = copy.deepcopy(encoder.state_dict())
    encoder.train()
    for block in encoder.blocks:
        block[1].eval()
    for recompute in (0, 3):
        encoder.recompute(recompute)
        assert torch.allclose(encoder(audio), want, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())


def test_recomputing_gives_the_same_gradients_and_statistics():
    torch.manual_seed(0)
    plain = model.SampleCNN(width=0.125).train()
    again = copy.deepcopy(plain)
    again.recompute(3)
    audio = torch.rand(4, 1, 59049) * 2 - 1
    for encoder in (plain, again):
        encoder(audio).square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), again.parameters()):
        assert torch.equal(p.grad, q.grad), name
    for (name, p), q in zip(plain.named_buffers(), again.buffers()):
        assert torch.equal(p, q), name


def test_without_kernels_the_same_numbers_come_from_the_layers_and_it_is_said_once(without_kernels):
    torch.manual_seed(0)
    encoder = model.SampleCNN(width=0.125).train()
    audio = torch.rand(4, 1, 59049) * 2 - 1
    with pytest.warns(UserWarning, match="no kernels/ beside model.py") as warned:
        slow = copy.deepcopy(encoder)(audio)
        copy.deepcopy(encoder)(audio)
    assert len(warned) == 1
    model.load_beside.cache_clear()
    sys.modules["kernels"] = kernels
    assert torch.allclose(encoder(audio), slow, rtol=1e-3, atol=1e-4)


SHAPES = {"samplecnn": (4, 1, 1, 243), "melcnn": (4, 1, 12, 20)}  # of a batch for two blocks
MOST = {torch.float64: 1e-9, torch.float32: 3e-5}


def two_blocks(kind):
    """Their weights far from the initial ones, in float64."""
    torch.manual_seed(0)
    blocks = nn.Sequential(
        model.SampleCNN._block(1, 6, stride=3), model.SampleCNN._block(6, 8, pool=True)
    )
    if kind == "melcnn":
        blocks = model.MelCNN().blocks[:2]
    blocks = blocks.double()
    with torch.no_grad():
        for p in blocks.parameters():
            p.normal_()
    return blocks.train()


def process(rank, port, folder, kind, dtype, case):
    """Half of the batch, with statistics over both processes; by model.py alone, or one of them
    without a compiler."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    if case == "model.py alone":
        sys.modules["kernels"] = None
    if case == "one compiler" and rank:
        os.environ["CC"] = "/no/such/compiler"
    blocks = model.synchronise(two_blocks(kind).to(dtype), "cpu")
    given = torch.load(folder / "given.pt")
    x, grad = (part[2 * rank : 2 * rank + 2].to(dtype, copy=True) for part in given)
    y = blocks(x.requires_grad_())
    y.backward(grad)
    gradients = [p.grad for p in blocks.parameters()]
    torch.save((y.detach(), x.grad, gradients, list(blocks.buffers())), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "kind, dtype, case",
    [
        ("samplecnn", torch.float64, "kernels"),
        ("samplecnn", torch.float64, "model.py alone"),
        ("melcnn", torch.float64, "kernels"),  # norm.py
        ("melcnn", torch.float64, "model.py alone"),
        ("melcnn", torch.float32, "kernels"),  # pooled.py
        ("melcnn", torch.float32, "one compiler"),  # both
    ],
)
def test_two_processes_take_the_step_of_one(tmp_path, kind, dtype, case):
    """Outputs, gradients (of the weights summed up, as DDP does) and statistics, against one of
    torch's layers in float64."""
    blocks = two_blocks(kind)
    layers = nn.Sequential(*[nn.Sequential(*block) for block in copy.deepcopy(blocks)])
    x = torch.randn(SHAPES[kind], dtype=torch.float64, requires_grad=True)
    y = layers(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.save((x.detach(), grad), tmp_path / "given.pt")
    mp.spawn(process, (free_port(), tmp_path, kind, dtype, case), nprocs=2)
    y_0, of_x_0, gradients_0, state_0 = torch.load(tmp_path / "0.pt")
    y_1, of_x_1, gradients_1, state_1 = torch.load(tmp_path / "1.pt")
    assert distance(torch.cat([y_0, y_1]), y) < MOST[dtype]
    assert distance(torch.cat([of_x_0, of_x_1]), x.grad) < MOST[dtype]
    for (name, p), first, second in zip(layers.named_parameters(), gradients_0, gradients_1):
        error = (first + second - p.grad).norm()
        assert error < MOST[dtype] * (10 + p.grad.norm()), name
    for buffer, first, second in zip(layers.buffers(), state_0, state_1):
        assert torch.equal(first, second)
        assert torch.allclose(first.double(), buffer.double(), rtol=MOST[dtype], atol=MOST[dtype])


def test_without_kernels_a_run_goes_on_by_torchs_layers(tiny_data, tmp_path):
    root = Path(model.__file__).parent
    for name in ("prepare.py", "augment.py", "model.py", "pretrain.py"):
        shutil.copy(root / name, tmp_path)
    for name in ("formats", "splits", "training"):
        shutil.copytree(root / name, tmp_path / name)
    flags = ["--width", "0.0625", "--batch-size", "4", "--max-steps", "1", "--device", "cpu"]
    command = [sys.executable, "pretrain.py", "--data", str(tiny_data), "--out", "run", *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "kernels" in done.stderr and (tmp_path / "run/encoder.pt").exists()
