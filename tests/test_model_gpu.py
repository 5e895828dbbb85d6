"""model_gpu.py and augment.py's kernel: by Triton's interpreter everywhere (interpreted.py), and on a GPU where there is one."""
import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import augment
import model
import pretrain

HERE = Path(__file__).resolve().parent


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton comes with torch for Linux alone")


@needs_triton
@pytest.mark.parametrize("what", ["blocks", "constant_audio", "two_processes", "stem", "search"])
def test_by_the_interpreter(tmp_path, what):
    done = subprocess.run([sys.executable, HERE / "interpreted.py", what, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_triton
def test_all_kernels_compile_for_a_gpu_whatever_is_one():
    """Triton makes constants of arguments that are 1, and some code compiles without that alone."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import model_gpu

    half, single, double, whole = "*bf16", "*fp32", "*fp64", "i32"
    types = dict.fromkeys(("y", "top", "out", "grad", "dy"), half) | dict.fromkeys(("sums", "own"), double) | dict.fromkeys(("step", "starts"), "*i64")
    types |= dict.fromkeys(("gamma", "beta", "bias", "partial", "values", "slopes", "folded", "shift", "running_mean", "running_var"), single)
    types |= dict.fromkeys(("padded", "table", "scale", "candidates", "onward", "far"), single) | dict.fromkeys(("momentum", "eps", "unbiased", "drift"), "fp32")
    tile, sizes = {"POOL": 3, "ROWS": 16, "COLUMNS": 128}, augment_sizes()
    kernels = {model_gpu._maxima: tile, model_gpu._combine: {"PIVOT": True, "POOL": 3, "PROGRAMS": 1024, "COLUMNS": 4}, model_gpu._statistics: tile,
               model_gpu._normalise: tile, model_gpu._gradient_sums: tile, model_gpu._slopes: tile, model_gpu._spread: tile, model_gpu._moments: tile,
               model_gpu._stem: tile, model_gpu._stem_sums: tile, augment._search_kernel(): sizes}
    for kernel, given in kernels.items():
        names = kernel.arg_names
        constants = {n: v for n, v in given.items() if n in names}
        for one in (None, "rows", "count", "programs", "chunk"):
            if one and types.get(one, whole if one in names else "*") != whole or (one == "rows" and kernel.__name__ in ("_moments", "_stem", "_stem_sums")):
                continue
            fixed = constants | ({one: 1} if one else {})
            kinds = {n: "constexpr" if n in fixed else types.get(n, whole) for n in names}
            kinds |= {"rows": single} if kernel.__name__ in ("_moments", "_stem", "_stem_sums") else {}
            source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in fixed.items()})
            assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"], (kernel.__name__, one)


def augment_sizes():
    """What augment._starts hands to its kernel at 22,050 Hz."""
    fade, search = round(augment.FADE * 22050), round(augment.SEARCH * 22050)
    return {"FADE": fade, "LAGS": -(-(2 * search + 1) // 16) * 16, "PHASES": 16, "TAPS": augment.SHORT_TAPS, "FRACTIONS": augment.FRACTIONS,
            "ATTACK_BLOCK": augment.ATTACK_BLOCK, "WIDTH": 1 << (fade - 1).bit_length(), "PART": 64}


def test_without_triton_the_layers_are_taken_and_it_is_said(monkeypatch):
    model.gpu_kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "model_gpu", raising=False)
    with pytest.warns(UserWarning, match="torch's own layers.*triton"):
        assert model.gpu_kernels() is None
    model.gpu_kernels.cache_clear()


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs kernels on a GPU; there is none here")


@needs_a_gpu
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_the_network_by_kernels_is_as_near_to_float64_as_by_layers(amp, monkeypatch):
    """Gradients and statistics. Rounding moves some maxima and closes some ReLUs: that is most of the error, of both ways alike."""
    torch.manual_seed(0)
    device, kernels = model.choose_device("cuda"), model.gpu_kernels()
    assert kernels
    base = pretrain.CLMR(model.build_encoder("samplecnn", width=0.25), model.Projector(128)).train()
    x, exact, errors = torch.randn(16, 1, 59049) * 0.1, copy.deepcopy(base).double(), {}
    want, _ = exact(x.double())  # on the CPU
    want.backward()
    for way in (None, kernels):
        monkeypatch.setattr(model, "gpu_kernels", lambda: way)
        ours = copy.deepcopy(base).to(device)
        with model.autocast(device, amp):
            loss, _ = ours(x.to(device))
        loss.backward()
        assert loss.item() == pytest.approx(want.item(), rel=1e-5 if amp == "off" else 2e-2)
        pairs = [(p.grad, q.grad) for (name, p), q in zip(ours.named_parameters(), exact.parameters()) if not name.endswith("0.bias")]
        pairs += [(p, q) for (name, p), q in zip(ours.named_buffers(), exact.buffers()) if "running" in name]
        errors[way] = sorted(((p.cpu().double() - q).norm() / q.norm()).item() for p, q in pairs)
    middle = len(pairs) // 2
    assert errors[kernels][middle] < 3 * errors[None][middle] + 1e-6, errors
    assert errors[kernels][-1] < max(3 * errors[None][-1], 2e-2), errors  # one maximum that rounding moves is 1e-3, in either way
    assert amp != "off" or errors[kernels][middle] < 1e-4


@needs_a_gpu
def test_a_captured_step_is_a_plain_one_and_leaves_what_it_is_given():
    device, batches = model.choose_device("cuda"), [torch.randn(8, 1, 59049, generator=torch.Generator().manual_seed(i)) * 0.1 for i in range(3)]
    losses = {}
    for captured in (False, True):
        torch.manual_seed(0)
        learner = pretrain.CLMR(model.build_encoder("samplecnn", width=0.25), model.Projector(128)).to(device).train()
        before = {k: v.clone() for k, v in learner.state_dict().items()}
        adam = torch.optim.Adam(learner.parameters(), lr=1e-3, fused=True, capturable=captured)
        parts = learner, adam, torch.amp.GradScaler("cuda", enabled=False), lambda: model.autocast(device, "off")
        take = pretrain.captured_step(*parts, batches[0].to(device)) if captured else pretrain.plain_step(*parts)
        assert all(torch.equal(v, before[k]) for k, v in learner.state_dict().items())
        losses[captured] = [take([x.to(device)], 1e-3)[0].item() for x in batches]
        if captured:  # as when continuing: an optimiser that has moments keeps them
            moments = [{key: value.clone() for key, value in state.items()} for state in adam.state.values()]
            pretrain.captured_step(*parts, batches[0].to(device))
            assert all(torch.equal(value, then[key]) for state, then in zip(adam.state.values(), moments) for key, value in state.items())
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)
