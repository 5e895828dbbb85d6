"""kernels/gpu.py: by Triton's interpreter everywhere (interpreted.py),
and on a GPU where there is one."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
import model
import pretrain
from kernels.graph import captured_step

HERE = Path(__file__).resolve().parent

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton comes with torch for Linux alone"
)
needs_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="runs kernels on a GPU; there is none here"
)


@needs_triton
@pytest.mark.parametrize(
    "what", ["blocks", "constant_audio", "two_processes", "stem", "stem_step"]
)
def test_by_the_interpreter(tmp_path, what):
    command = [sys.executable, HERE / "interpreted.py", what, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


HALF, SINGLE, DOUBLE, WHOLE = "*bf16", "*fp32", "*fp64", "i32"
TYPES = {
    **dict.fromkeys(("y", "top", "out", "grad", "dy"), HALF),
    **dict.fromkeys(("sums", "everywhere"), DOUBLE),
    **dict.fromkeys(
        ("gamma", "partial", "values", "gradients", "coefficients", "rows", "affine"), SINGLE
    ),
    **dict.fromkeys(("count", "channels", "programs"), WHOLE),
    "shape": (WHOLE, WHOLE),
    "parameters": (SINGLE, SINGLE, SINGLE),
    "running": (SINGLE, SINGLE),
    "settings": ("fp32", "fp32", "fp32"),
}
KERNELS = {
    "_maxima": {"POOL": 3, "COLUMNS": 128},
    "_combine": {"ROWS": 16, "PIVOT": True, "POOL": 3},
    "_statistics": {},
    "_normalise": {"COLUMNS": 128},
    "_gradient_sums": {"COLUMNS": 128},
    "_slopes": {},
    "_spread": {"POOL": 3, "COLUMNS": 128},
    "_moments": {},
    "_stem": {"COLUMNS": 128},
    "_stem_sums": {"COLUMNS": 128},
}


def compiled(kernel, constants, types):
    """The machine code of a kernel for an H100. A type is of an argument, or a tuple where the
    argument is one; constants by name, or by (name, place in the tuple)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    values = {}
    for i, name in enumerate(kernel.arg_names):
        kind = types.get(name)
        if isinstance(kind, tuple):
            signature[name] = tuple(
                "constexpr" if (name, k) in constants else one for k, one in enumerate(kind)
            )
            values |= {
                (i, k): constants[name, k] for k in range(len(kind)) if (name, k) in constants
            }
        else:
            signature[name] = "constexpr" if name in constants else kind
            values |= {(i,): constants[name]} if name in constants else {}
    import triton

    return triton.compile(
        ASTSource(kernel, signature, values), target=GPUTarget("cuda", 90, 32)
    ).asm["cubin"]


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_compiles_for_a_gpu_whatever_is_one(name):
    """Triton makes constants of arguments that are 1, and some code compiles without that alone."""
    from kernels import gpu

    kernel = getattr(gpu, name)
    for one in (None, ("shape", 0), "count", "programs"):
        if one is None or (one if isinstance(one, str) else one[0]) in kernel.arg_names:
            constants = KERNELS[name] | ({one: 1} if one else {})
            assert compiled(kernel, constants, TYPES), (name, one)


def test_without_triton_the_layers_are_taken_and_it_is_said(monkeypatch):
    kernels.gpu_passes.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "kernels.gpu", raising=False)
    monkeypatch.delattr(kernels, "gpu", raising=False)
    with pytest.warns(UserWarning, match="torch's own layers.*triton"):
        assert kernels.gpu_passes() is None
    kernels.gpu_passes.cache_clear()


def distance(got, want):
    return ((got.cpu().double() - want).norm() / want.norm()).item()


def errors_against(exact, ours):
    """Relative errors of all gradients and running statistics, in order of size."""
    found = [
        distance(p.grad, q.grad)
        for (name, p), q in zip(ours.named_parameters(), exact.parameters())
        if not name.endswith("0.bias")
    ]
    found += [
        distance(p, q)
        for (name, p), q in zip(ours.named_buffers(), exact.buffers())
        if "running" in name
    ]
    return sorted(found)


@needs_a_gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_network_by_kernels_is_as_near_to_float64_as_by_layers(amp, monkeypatch):
    """Gradients and statistics. Rounding moves some maxima and closes some ReLUs: that is most of
    the error, of both ways alike."""
    torch.manual_seed(0)
    device = model.choose_device("cuda")
    assert kernels.gpu_passes()
    base = pretrain.CLMR(model.build_encoder("samplecnn", width=0.25), model.Projector(128)).train()
    x = torch.randn(16, 1, 59049) * 0.1
    exact = copy.deepcopy(base).double()
    want, _ = exact(x.double())  # on the CPU
    want.backward()
    errors = {}
    for way in ("kernels", "layers"):
        if way == "layers":
            monkeypatch.setattr(kernels, "training_pass", lambda block, x: None)
        ours = copy.deepcopy(base).to(device)
        with model.autocast(device, amp):
            loss, _ = ours(x.to(device))
        loss.backward()
        assert loss.item() == pytest.approx(want.item(), rel=1e-5 if amp == "off" else 2e-2)
        errors[way] = errors_against(exact, ours)
    by_kernels, by_layers = errors["kernels"], errors["layers"]
    middle = len(by_layers) // 2
    assert by_kernels[middle] < 3 * by_layers[middle] + 1e-6, errors
    # one maximum that rounding moves is 1e-3, in either way
    assert by_kernels[-1] < max(3 * by_layers[-1], 2e-2), errors
    assert amp != "off" or by_kernels[middle] < 1e-4


@needs_a_gpu
def test_a_captured_step_is_a_plain_one_and_leaves_what_it_is_given():
    device = model.choose_device("cuda")
    batches = [
        torch.randn(8, 1, 59049, generator=torch.Generator().manual_seed(i)) * 0.1 for i in range(3)
    ]
    losses = {}
    for captured in (False, True):
        torch.manual_seed(0)
        encoder = model.build_encoder("samplecnn", width=0.25)
        learner = pretrain.CLMR(encoder, model.Projector(128)).to(device).train()
        before = {k: v.clone() for k, v in learner.state_dict().items()}
        adam = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True, capturable=captured)
        parts = (
            learner,
            adam,
            torch.amp.GradScaler("cuda", enabled=False),
            lambda: model.autocast(device, "off"),
        )
        take = (
            captured_step(pretrain.plain_step(*parts), *parts[:2], batches[0].to(device))
            if captured
            else pretrain.plain_step(*parts)
        )
        assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
        losses[captured] = [take([x.to(device)], 1e-3)[0].item() for x in batches]
        if captured:  # as when continuing: an optimiser that has moments keeps them
            moments = [
                {key: value.clone() for key, value in state.items()}
                for state in adam.state.values()
            ]
            captured_step(pretrain.plain_step(*parts), *parts[:2], batches[0].to(device))
            for state, then in zip(adam.state.values(), moments):
                assert all(torch.equal(value, then[key]) for key, value in state.items())
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)
