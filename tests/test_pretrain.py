"""pretrain.py: exact on any number of processes, unkillable, and honest about bad input.

The toy tests start their own processes with torch.multiprocessing; those of kills, signals and equal weights run the script
as a user does, plain or with torchrun (gloo, CPU); the others call its `main` here, which spares them the import of torch."""
import contextlib
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import model
import prepare
import pretrain

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--width", "0.0625", "--batch-size", "4", "--amp", "off", "--device", "cpu", "--log-every", "1"]


@pytest.fixture
def command(capsys):
    """command([...]) -> CompletedProcess of pretrain.py in this process, whose handlers of signals it leaves as they were."""
    def command(args):
        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
        try:
            code = pretrain.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())
    return command


# ------------------------------------------------------------------------------------------------------------- losses


def views(n=6, p=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, p, generator=generator, dtype=torch.float64).unbind()


def double_loop(z_i, z_j, t, decoupled=False):
    z = [v / math.sqrt(sum(x * x for x in v)) for v in z_i.tolist() + z_j.tolist() for v in [np.array(v)]]
    n, losses = len(z_i), []
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        below = [math.exp(z[i] @ z[k] / t) for k in range(2 * n) if k != i and not (decoupled and k == partner)]
        losses.append(-math.log(math.exp(z[i] @ z[partner] / t) / sum(below)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_the_losses_equal_a_double_loop(temperature):
    z_i, z_j = views()
    assert pretrain.nt_xent(z_i, z_j, temperature).item() == pytest.approx(double_loop(z_i, z_j, temperature), rel=1e-12)
    assert pretrain.dcl(z_i, z_j, temperature).item() == pytest.approx(double_loop(z_i, z_j, temperature, decoupled=True), rel=1e-12)


def test_the_loss_is_taken_in_float32_whatever_comes():
    z_i, z_j = views()
    want = pretrain.nt_xent(z_i.float(), z_j.float(), 0.5)
    for dtype in (torch.float16, torch.bfloat16):
        got = pretrain.nt_xent(z_i.to(dtype), z_j.to(dtype), 0.5)
        assert got.dtype == torch.float32 and got.item() == pytest.approx(want.item(), rel=0.02)
    with torch.autocast("cpu", torch.bfloat16):
        assert pretrain.nt_xent(z_i.float(), z_j.float(), 0.5).item() == want.item()
        assert pretrain.dcl(z_i.float(), z_j.float(), 0.5).dtype == torch.float32
    tiny = (z_i * 1e-4).half(), (z_j * 1e-4).half()  # whose squares underflow in fp16
    assert math.isfinite(pretrain.nt_xent(*tiny, 0.5).item())


def test_top1_counts_partners():
    z_i, z_j = torch.eye(4), torch.eye(4)
    assert pretrain.contrastive_top1(z_i, z_j).item() == 1
    assert pretrain.contrastive_top1(z_i, z_j.roll(1, 0)).item() == 0


def test_cpc_equals_loops():
    torch.manual_seed(0)
    learner = pretrain.CPCLoss(model.CPC(width=1 / 64), steps=3).double()
    x = torch.rand(2, 1, 59049, dtype=torch.float64) * 2 - 1
    negatives = torch.randint(2 * 124, (2, 124, 4))
    negatives[0, 5, 0] = 5  # a negative that is the true frame itself
    loss, accuracy = learner(x, negatives)
    seen = []
    with torch.autocast("cpu", torch.bfloat16), patch.object(learner, "score", lambda *tensors: seen.extend(tensors[:2] + (torch.is_autocast_enabled("cpu"),))):
        learner(x, negatives)
    assert seen[0].dtype == seen[1].dtype == torch.float32 and seen[2] is False  # scored in float32 whatever the encoder ran in
    with torch.no_grad():
        z, c = learner.encoder.context(x)
        z, flat = z.float(), z.float().flatten(0, 1)
        W = learner.predictor.weight.reshape(3, 8, 8)
        means, hits = [], []
        for k in (1, 2, 3):
            terms = []
            for b in range(2):
                for t in range(124 - k):
                    p = (W[k - 1] @ c[b, t]).float()
                    scores = [p @ z[b, t + k]] + [p @ flat[m] for m in negatives[b, t + k].tolist() if m != b * 124 + t + k]
                    terms.append(torch.logsumexp(torch.stack(scores), 0) - scores[0])
                    hits.append(float(scores[0] >= max(scores)))
            means.append(torch.stack(terms).mean())
    assert loss.item() == pytest.approx(torch.stack(means).mean().item(), rel=1e-5)
    assert accuracy.item() == pytest.approx(np.mean(hits), abs=0.01)


# --------------------------------------------------------------------------------- exact over processes, on gradients


class Toy(nn.Module):
    """Two blocks of SampleCNN and a projection: what CLMR's gradients pass through, in float64."""

    def __init__(self):
        super().__init__()
        block = model.SampleCNN._block
        self.layers = nn.Sequential(block(1, 4, stride=3), block(4, 5, pool=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 6))

    def forward(self, x):
        return self.layers(x)


def toy_run(rank, size, port, folder):
    """The gradients of one step and the state after five, for each loss, as pretrain takes them: CLMR under DDP, plain SGD."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=size)
    results = {}
    for loss, function in pretrain.LOSSES.items():
        torch.manual_seed(0)
        learner = pretrain.CLMR(Toy(), nn.Identity(), function, 0.5).double()
        learner = model.synchronise(learner, "cpu") if size > 1 else learner
        parallel = nn.parallel.DistributedDataParallel(learner, broadcast_buffers=False) if size > 1 else learner
        optimiser = torch.optim.SGD(learner.parameters(), lr=0.1)
        for step in range(5):
            x = torch.randn(2, 8, 1, 1, 81, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            value, _ = parallel(x[:, rank * 8 // size : (rank + 1) * 8 // size].flatten(0, 1))
            optimiser.zero_grad()
            value.backward()
            if step == 0:
                value = value.detach() / size
                if size > 1:
                    dist.all_reduce(value)
                results[loss] = {"loss": value.item(), "grads": [p.grad.clone() for p in learner.parameters()]}
            optimiser.step()
        results[loss]["state"] = learner.state_dict()
    if rank == 0:
        torch.save(results, f"{folder}/{size}.pt")
    if size > 1:
        dist.barrier()  # nobody takes the group apart while another still works in it
        dist.destroy_process_group()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_two_and_four_processes_equal_one_in_gradients_and_after_five_steps(tmp_path):
    toy_run(0, 1, 0, tmp_path)
    for size in (2, 4):
        mp.spawn(toy_run, (size, free_port(), tmp_path), nprocs=size)
    one = torch.load(tmp_path / "1.pt")
    for size in (2, 4):
        many = torch.load(tmp_path / f"{size}.pt")
        for loss in pretrain.LOSSES:
            assert many[loss]["loss"] == pytest.approx(one[loss]["loss"], rel=1e-12)
            for i, (a, b) in enumerate(zip(one[loss]["grads"], many[loss]["grads"])):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)
                assert a.abs().max() > 1e-6 or i in (1, 5)  # the bias before a batch norm has no gradient
            for key, value in one[loss]["state"].items():
                assert torch.allclose(value.double(), many[loss]["state"][key].double(), rtol=1e-10, atol=1e-12), key


def torchrun(size, *args, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", "--master_port", str(free_port()), str(ROOT / "pretrain.py")]
    return subprocess.run([*command, *map(str, args)], capture_output=True, text=True, env=env, timeout=300, **kwargs)


def test_the_script_takes_the_same_steps_with_one_two_and_four_processes(tmp_path, run, tiny_data):
    results, losses = {}, {}
    for size in (1, 2, 4):
        out, flags = tmp_path / str(size), ["--data", tiny_data, *TOY, "--batch-size", 8, "--max-steps", 5, "--lr", "1e-4"]
        done = torchrun(size, *flags, "--out", out) if size > 1 else run(["pretrain.py", *flags, "--out", out])
        assert done.returncode == 0, done.stderr
        results[size] = torch.load(out / "checkpoint.pt", weights_only=True)
        losses[size] = [r["loss"] for r in pretrain.read_log(out) if "loss" in r]
        assert pretrain.read_log(out)[0]["processes"] == size
    # A bias before a batch norm has no gradient: Adam turns its rounding errors into whole steps, and the running mean follows.
    # The same happens to the few weights whose gradient is nearly zero, so what is left of a difference grows with --lr.
    keys = [k for k, v in results[1]["learner"].items() if v.is_floating_point() and not k.endswith(("0.bias", "running_mean"))]
    whole = {size: torch.cat([r["learner"][k].flatten() for k in keys]) for size, r in results.items()}
    torch.manual_seed(0)
    start = model.build_encoder("samplecnn", width=0.0625).state_dict()
    moved = results[1]["learner"]["encoder.blocks.3.0.weight"] - start["blocks.3.0.weight"]
    assert moved.norm() > 3e-4 * start["blocks.3.0.weight"].norm()
    for size in (2, 4):
        assert losses[size] == pytest.approx(losses[1], rel=1e-4)
        assert (whole[size] - whole[1]).norm() <= 1e-5 * whole[1].norm(), ((whole[size] - whole[1]).norm() / whole[1].norm()).item()


# ---------------------------------------------------------------------------------------------------------- the sampler


def test_pairs_are_a_function_of_seed_and_step_and_lie_inside_their_song():
    rng = np.random.default_rng(0)
    length, group = rng.integers(5, 60, 200), rng.integers(0, 40, 200)
    make = lambda seed=1, **k: pretrain.Pairs(length, group, 10, 7, seed, **k)
    pairs = make()
    assert pairs.left_out == int((length < 10).sum())
    assert (pairs.steps_per_epoch, pairs.dropped) == divmod(len(set(group[length >= 10])), 7)
    seen = []
    for step in range(3 * pairs.steps_per_epoch):
        clip, start = pairs.draw(step)
        assert (start >= 0).all() and (start + 10 <= length[clip]).all()
        assert (group[clip[:, 0]] == group[clip[:, 1]]).all() and len(set(group[clip[:, 0]])) == 7
        again = make().draw(step)
        assert (again[0] == clip).all() and (again[1] == start).all()
        seen.append(group[clip[:, 0]])
    epochs = np.array(seen).reshape(3, -1)
    assert all(len(set(e)) == len(e) for e in epochs) and not (epochs[0] == epochs[1]).all()
    assert not (make(2).draw(0)[1] == pairs.draw(0)[1]).all()
    for step in range(20):
        clip, _ = make(positives="clip").draw(step)
        assert (clip[:, 0] == clip[:, 1]).all()
    with pytest.raises(ValueError, match="at least 2 songs with at least 10 samples, found 1"):
        pretrain.Pairs([50, 50], [3, 3], 10, 7, 0)


def test_every_start_of_a_song_is_equally_likely():
    pairs = pretrain.Pairs([14, 10, 19, 30], [0, 0, 0, 1], 10, 2, 0)  # song 0: 5 + 1 + 10 possible starts
    counts = np.zeros((3, 10))
    for step in range(4000):
        clip, start = pairs.draw(step)
        for c, s in zip(clip.ravel(), start.ravel()):
            if c < 3:
                counts[c, s] += 1
    possible = np.array([[1] * 5 + [0] * 5, [1] + [0] * 9, [1] * 10])
    expected = 8000 / possible.sum()
    assert (counts[possible == 0] == 0).all()
    chi2 = ((counts[possible == 1] - expected) ** 2 / expected).sum()
    assert chi2 < 37.7  # 99.9 % of chi-squared with 15 degrees of freedom


def test_prefetch_hands_errors_over_and_keeps_the_order():
    prefetch = pretrain.Prefetch(lambda s: s * s, 3, 20)
    assert [prefetch.get(s) for s in range(3, 20)] == [s * s for s in range(3, 20)]
    prefetch.close()

    def fail(step):
        raise ValueError("clip 7 is gone")

    prefetch = pretrain.Prefetch(fail, 0, 5)
    with pytest.raises(OSError, match="step 0 .*clip 7"):
        prefetch.get(0)
    prefetch.close()

    def fail_on_the_gpu(step):
        raise RuntimeError("out of resource")

    prefetch = pretrain.Prefetch(fail_on_the_gpu, 0, 5)
    with pytest.raises(RuntimeError, match="^out of resource"):  # not the audio's fault
        prefetch.get(0)
    prefetch.close()


# -------------------------------------------------------------------------------------------------------- unkillable


def start(args, size=1):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(ROOT / "pretrain.py")]
    if size > 1:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={size}", "--master_port", str(free_port()), command[1]]
    return subprocess.Popen([*command, *map(str, args)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for_step(out, step, process):
    for _ in range(2400):
        log = out / "log.jsonl"
        if log.exists() and any(r.get("step", 0) >= step for r in pretrain.read_log(out)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def same(a, b):
    a, b = (torch.load(p / "checkpoint.pt", weights_only=True) for p in (a, b))
    assert a["step"] == b["step"]
    for key in ("learner",):
        for name, value in a[key].items():
            assert torch.equal(value, b[key][name]), name
    for i, state in a["optimiser"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimiser"]["state"][i][name])
    return True


STEPS = 12


@pytest.fixture(scope="module")
def flags(tiny_data):
    return ["--data", tiny_data, *TOY, "--max-steps", STEPS, "--save-every", 2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, run, flags):
    out = tmp_path_factory.mktemp("straight") / "run"
    done = run(["pretrain.py", *flags, "--out", out])
    assert done.returncode == 0, done.stderr
    return out


def test_kill_9_at_random_moments_and_the_same_weights(tmp_path, run, flags, uninterrupted):
    out, kills = tmp_path / "run", 0
    chance = random.Random(os.getpid())
    for after in (2, 4, 6):
        process = start([*flags, "--out", out])
        wait_for_step(out, after, process)
        time.sleep(chance.uniform(0, 0.3))  # anywhere in a step or in a save
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
    done = run(["pretrain.py", *flags, "--out", out])
    assert done.returncode == 0 and kills >= 2, (done.stderr, kills)
    assert same(out, uninterrupted)
    steps = [r["step"] for r in pretrain.read_log(out) if "loss" in r]
    assert steps == list(range(1, STEPS + 1))  # the log holds every step once
    assert not list(out.glob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds the processes in /proc")
def test_kill_9_of_two_processes_and_the_same_weights(tmp_path, flags):
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert torchrun(2, *flags, "--out", straight).returncode == 0
    process = start([*flags, "--out", out], size=2)
    wait_for_step(out, 5, process)
    for entry in Path("/proc").glob("[0-9]*"):  # torchrun, and its workers, each of a session of its own
        with contextlib.suppress(OSError):
            if os.fsencode(out) in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
    process.communicate()
    done = torchrun(2, *flags, "--out", out)
    assert done.returncode == 0 and "continuing from step" in done.stdout, done.stderr
    assert same(out, straight)


@pytest.mark.parametrize("number, size", [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_at_the_end_of_the_step(tmp_path, run, flags, uninterrupted, number, size):
    out = tmp_path / "run"
    many = [*flags, "--save-every", 1000, "--out", out]  # the signal alone makes the checkpoint
    process = start(many, size)
    wait_for_step(out, 3, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=30)
    assert "stopped after step" in text, text
    if size == 1:
        assert process.returncode == 128 + number and "Traceback" not in text
    step = torch.load(out / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= step < STEPS
    if size == 1:
        assert run(["pretrain.py", *many]).returncode == 0
        assert same(out, uninterrupted)


def test_a_truncated_checkpoint_gives_way_to_the_one_before(tmp_path, run, command, flags, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:1000])
    done = run(["pretrain.py", *flags, "--out", out])
    assert done.returncode == 0 and "is damaged" in done.stderr and "step 10" in done.stderr, done.stderr
    assert same(out, uninterrupted)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (out / name).write_bytes(b"")
    done = command([*flags, "--out", out])
    assert done.returncode == 1 and "no good checkpoint is left" in done.stderr and "Traceback" not in done.stderr


FULL = """
import resource, signal, sys
sys.path.insert(0, {root!r}); sys.argv = ["pretrain.py", *{args!r}]
import pretrain
real, calls = pretrain.save_checkpoint, []
def limited(path, content):
    calls.append(1)
    if len(calls) == 2:  # the disk is full from the second save on: files cannot grow beyond 64 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    real(path, content)
pretrain.save_checkpoint = limited
sys.exit(pretrain.main())
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, run, flags, uninterrupted):
    out = tmp_path / "run"
    args = [*map(str, flags), "--out", str(out)]
    done = subprocess.run([sys.executable, "-c", FULL.format(root=str(ROOT), args=args)], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 1 and "could not be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 2 and not list(out.glob("*.partial"))
    assert run(["pretrain.py", *args]).returncode == 0
    assert same(out, uninterrupted)


def test_between_the_two_renames_the_previous_checkpoint_is_the_good_one(tmp_path, monkeypatch, capsys):
    path, replace = tmp_path / "checkpoint.pt", os.replace
    pretrain.save_checkpoint(path, {"step": 1})

    def killed(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)
    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(os, "link", lambda *names: (_ for _ in ()).throw(PermissionError("there are no links on this file system")))
    with pytest.raises(KeyboardInterrupt):
        pretrain.save_checkpoint(path, {"step": 2})
    assert not path.exists() and pretrain.load_checkpoint(path)["step"] == 1
    monkeypatch.setattr(os, "replace", replace)
    for step in (3, 4):
        pretrain.save_checkpoint(path, {"step": step})
    assert pretrain.load_checkpoint(path)["step"] == 4 and not capsys.readouterr().err
    assert torch.load(path.with_suffix(".previous.pt"), weights_only=True)["step"] == 3


def test_a_finished_run_says_so_and_another_configuration_is_refused(tmp_path, command, flags, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    done = command([*flags, "--out", out])
    assert done.returncode == 0 and "is complete at step 12" in done.stdout
    done = command([*flags, "--out", out, "--lr", "0.1", "--temperature", "0.2"])
    assert done.returncode == 1 and "lr: 0.0003 then, 0.1 now" in done.stderr and "temperature: 0.5 then, 0.2 now" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    done = command([*flags, "--out", out, "--max-steps", 14])
    assert done.returncode == 0 and "continuing from step 12 of 14" in done.stdout, done.stderr


@pytest.mark.parametrize("lr, saved", [("1e38", "none was saved yet"), ("1e19", "checkpoint.pt, step 1")])
def test_what_is_not_finite_stops_the_run_and_is_not_saved(tmp_path, command, flags, lr, saved):
    """1e38 leaves weights that are not finite after a loss that is; 1e19 a loss."""
    out = tmp_path / "run"
    done = command([*flags, "--out", out, "--lr", lr, "--save-every", 1])
    assert done.returncode == 1 and "not finite at step" in done.stderr and "process 0" in done.stderr and saved in done.stderr, done.stderr
    assert (out / "checkpoint.pt").exists() == (lr == "1e19")
    if lr == "1e19":
        assert all(t.isfinite().all() for t in torch.load(out / "checkpoint.pt", weights_only=True)["learner"].values())


# -------------------------------------------------------------------------------------------------- methods and flags


@pytest.mark.parametrize("extra", [
    ["--transforms", "filter", "--probability", "filter=1", "--asymmetric"],
    ["--transforms", "none", "--positives", "clip"],
    ["--loss", "dcl", "--schedule", "cosine", "--warmup", "1"],
    ["--encoder", "samplecnn-large", "--recompute", "2", "--amp", "bf16"],
    ["--method", "cpc"],
])
def test_every_method_takes_a_step_and_gives_an_encoder(tmp_path, command, tiny_data, extra):
    done = command(["--data", tiny_data, *TOY, "--max-steps", 2, "--out", tmp_path / "run", *extra])
    assert done.returncode == 0, done.stderr
    encoder, info = model.load_encoder(tmp_path / "run/encoder.pt")
    assert info["step"] == 2 and info["method"] == ("cpc" if "cpc" in extra else "clmr") and info["sample_rate"] == 22050
    losses = [r["loss"] for r in pretrain.read_log(tmp_path / "run") if "loss" in r]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


def test_it_learns(tmp_path, run, command, tiny_data):
    """Forty steps on twelve songs: the loss falls clearly below chance, which is log(2N - 1)."""
    done = run(["pretrain.py", "--data", tiny_data, *TOY, "--batch-size", 8, "--max-steps", 40, "--lr", "1e-3", "--probe-every", 20, "--out", tmp_path / "run",
                "--transforms", "polarity", "gain"])
    assert done.returncode == 0, done.stderr
    log = pretrain.read_log(tmp_path / "run")
    losses = [r["loss"] for r in log if "loss" in r]
    assert np.mean(losses[-5:]) < 0.8 * math.log(15) and np.mean(losses[-5:]) < 0.85 * np.mean(losses[:5])
    assert len([r for r in log if "probe" in r]) == 2 and log[-1]["done"]
    assert command(["--plot", tmp_path / "run"]).returncode == 0 and (tmp_path / "run/curves.png").stat().st_size > 5000


def test_the_quick_probe_of_one_tag_knows_clips_without_it(tiny_data):
    train, valid = prepare.Clips(tiny_data, "train"), prepare.Clips(tiny_data, "valid")
    for clips in (train, valid):
        clips.tags, clips.labels = clips.tags[:1], clips.labels[:, :1]
    torch.manual_seed(0)
    value = pretrain.quick_probe(model.build_encoder("samplecnn", width=1 / 16), train, valid, torch.device("cpu"))
    assert 0 <= value <= 1


@pytest.mark.parametrize("args, code, says", [
    (["--data", "never-prepared"], 2, "never-prepared"),
    (["--data", "TINY", "--batch-size", "13"], 1, "--batch-size 12"),
    (["--data", "TINY", "--batch-size", "1"], 1, "at least 2"),
    (["--data", "TINY", "--encoder", "resnet"], 2, "samplecnn-large"),
    (["--data", "TINY", "--transforms", "echo"], 2, "echo"),
    (["--data", "TINY", "--probability", "filter"], 2, "filter=0.8"),
    (["--data", "TINY", "--probability", "filter=1.5"], 2, "1.5"),
    (["--data", "TINY", "--method", "cpc", "--encoder", "samplecnn"], 2, "cpc"),
    (["--data", "TINY", "--method", "cpc", "--temperature", "0.1"], 2, "--temperature"),
    (["--data", "TINY", "--transforms", "gain", "--probability", "reverb=1"], 2, "reverb"),
    (["--data", "TINY", "--lr", "0"], 2, "--lr"),
    (["--data", "TINY", "--temp", "0.1"], 2, "--temp"),
    (["--plot", "nowhere"], 2, "nowhere"),
    ([], 2, "--data"),
])
def test_bad_commands_are_one_line(tmp_path, command, tiny_data, args, code, says):
    done = command([tiny_data if a == "TINY" else a for a in args] + ["--out", tmp_path / "run"])
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("usage:")]
    assert done.returncode == code and len(lines) == 1 and says in lines[0], done.stderr
    assert not (tmp_path / "run").exists()


def test_a_batch_that_does_not_divide_names_the_nearest(tmp_path, command, tiny_data, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    done = command(["--data", tiny_data, "--batch-size", 7, "--out", tmp_path / "run"])
    assert done.returncode == 2 and "the nearest that do: 6, 8" in done.stderr
