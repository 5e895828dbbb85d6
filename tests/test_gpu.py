"""Where tensors live and when the host waits, on a pretend GPU (pretend_gpu.py): this needs no
GPU, and one that is there is not used."""

import pytest
import torch

import augment
import evaluate
import kernels
import model
import prepare
import pretrain
from pretend_gpu import PretendGpu
from training.journal import read_log


def test_the_pretend_gpu_finds_what_it_is_for():
    here = torch.ones(3)
    with PretendGpu() as gpu:
        x = here.to("cuda")
        made = [
            x + 1,
            x.view(3, 1).expand(3, 2),
            x.new_zeros(2),
            torch.zeros(2, device="cuda"),
            torch.stack([x, x]),
            x[torch.tensor([0, 2])],
            x.float(),
        ]
        assert {t.device.type for t in made} == {
            "cuda"
        } and here.device.type == x.cpu().device.type == "cpu"
        gpu.waits.clear()
        for mixed in (
            lambda: x + here,
            lambda: torch.cat([x, here]),
            lambda: torch.where(x > 0, x, here),
            lambda: torch.nn.functional.linear(x, here),
        ):
            with pytest.raises(RuntimeError, match="different devices"):
                mixed()
        with pytest.raises(TypeError):
            x.numpy()
        assert not gpu.waits
        for waits in (
            lambda: bool(x.sum()),
            lambda: float(x[0]),
            x.tolist,
            x.nonzero,
            x.cpu,
            lambda: x[x > 0],
            lambda: x.to("cpu"),
            lambda: x.new_tensor(1.0),
            lambda: here.to("cuda"),
            lambda: here.to(x),
        ):
            before = len(gpu.waits)
            waits()
            assert len(gpu.waits) > before
        gpu.waits.clear()
        assert here.to("cuda", non_blocking=True).is_cuda and not gpu.waits
    assert made[0].tolist() == [2, 2, 2]


def test_the_chain_never_waits_for_the_gpu():
    chain = augment.Chain(22050, probability={"noise": 0.5})
    x, draws = torch.randn(12, 1, 30000) * 0.1, chain.draw(12, torch.Generator().manual_seed(0))
    with PretendGpu() as gpu:
        on_gpu = x.to("cuda", non_blocking=True)
        chain(on_gpu, draws)  # makes its tables, and waits for them
        gpu.waits.clear()
        y = chain(on_gpu, draws)
        assert y.device.type == "cuda" and gpu.waits == []
    # on a CPU by other loops, and a reverb's tail is good to 1e-4
    assert torch.allclose(y, chain(x, draws), atol=1e-4)


def test_torchs_own_synchronised_batch_norm_is_left_to_torch(monkeypatch):
    block = torch.nn.SyncBatchNorm.convert_sync_batchnorm(
        model.SampleCNN._block(8, 16, pool=True)
    ).train()
    asked = []
    monkeypatch.setattr(kernels, "gpu_passes", lambda: asked.append(1))
    with PretendGpu():
        block.to("cuda")(torch.randn(2, 8, 1, 9).to("cuda", non_blocking=True))
    assert not asked


@pytest.mark.parametrize(
    "flags",
    [
        ["--recompute", "2"],
        ["--asymmetric", "--loss", "dcl", "--schedule", "cosine", "--warmup", "2"],
        ["--method", "cpc"],
    ],
    ids=lambda flags: flags[-1],
)
def test_steps_of_pre_training_never_wait_for_the_gpu(tmp_path, tiny_data, on_a_gpu, flags):
    waits = []
    for steps in (1, 3):  # neither logs nor saves before its end
        out = tmp_path / str(steps)
        code, gpu = on_a_gpu(
            pretrain.main,
            [
                "--data",
                tiny_data,
                "--out",
                out,
                "--width",
                "0.0625",
                "--batch-size",
                "4",
                "--max-steps",
                steps,
                "--amp",
                "off",
                *flags,
            ],
        )
        assert code == 0
        waits.append(
            [wait for wait in gpu.waits if wait[1] not in ("augment.py", "filters.py")]
        )  # whose tables are made in the step that needs them
    assert waits[0] and len(waits[0]) == len(
        waits[1]
    )  # for the one line of the log, and the weights to be saved


def test_a_run_on_a_gpu_is_probed_saved_and_continued(tmp_path, tiny_data, on_a_gpu):
    args = [
        "--data",
        tiny_data,
        "--out",
        tmp_path,
        "--width",
        "0.0625",
        "--batch-size",
        "4",
        "--probe-every",
        "1",
        "--amp",
        "off",
        "--max-steps",
    ]
    assert [on_a_gpu(pretrain.main, [*args, steps])[0] for steps in (1, 2)] == [0, 0]
    assert [r["step"] for r in read_log(tmp_path) if "probe" in r] == [1, 2]
    assert model.load_encoder(tmp_path / "encoder.pt")[1]["step"] == 2


def test_evaluation_on_a_gpu(tmp_path, tiny_data, tiny_audio, on_a_gpu):
    encoder = model.build_encoder("samplecnn", width=0.0625)
    model.save_encoder(tmp_path / "encoder.pt", encoder, sample_rate=22050, method="clmr", step=1)

    def run(args):
        protocol = evaluate.Protocol(
            amp="off", epochs=1, min_steps=2, seeds=1, random=True, supervised=True
        )
        return evaluate.run(*model.load_encoder(args[0]), prepare.Clips(args[1]), protocol)

    (record, *_), _ = on_a_gpu(run, [tmp_path / "encoder.pt", tiny_data])
    models = [row["model"] for row in record["results"]]
    assert models == ["clmr, 1 steps", "untrained", "supervised"]
