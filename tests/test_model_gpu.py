"""model_gpu.py and augment.py's kernel: by Triton's interpreter everywhere (interpreted.py), and on a GPU where there is one."""
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import pretrain

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("what", ["blocks", "constant_audio", "two_processes", "stem", "search"])
def test_by_the_interpreter(tmp_path, what):
    done = subprocess.run([sys.executable, HERE / "interpreted.py", what, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


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
    assert errors[kernels][middle] < 1.5 * errors[None][middle] + 1e-6 and errors[kernels][-1] < 3 * errors[None][-1] + 1e-5, errors
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
        if captured:  # continued: the graph keeps the moments of an optimiser that has some
            again = pretrain.captured_step(*parts, batches[0].to(device))
            losses["again"] = again([batches[0].to(device)], 0.0)[0].item()
            assert losses["again"] == pytest.approx(take([batches[0].to(device)], 0.0)[0].item(), rel=1e-4)
    assert losses[True] == pytest.approx(losses[False], rel=1e-3)
