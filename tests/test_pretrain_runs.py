"""pretrain.py cannot be killed: whatever ends a run, it continues to the same weights."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretrain
from pretraining import (ROOT, TOY, assert_same, checkpoint, command, losses, run_to_its_end,
                         start, wait_for_step)
from training.journal import read_log

STEPS = 12


@pytest.fixture(scope="module")
def flags(tiny_data):
    return ["--data", tiny_data, *TOY, "--max-steps", STEPS, "--save-every", 2]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("straight") / "run"
    done = run_to_its_end([*flags, "--out", folder])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(tmp_path, uninterrupted):
    """A run folder to harm."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "run"))


def kill(process):
    """SIGKILL to a process of its own session, unless it has ended; was it alive?"""
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


@pytest.fixture(scope="module")
def killed(tmp_path_factory, flags):
    """A run that was killed anywhere in a step or in a save, three times, and continued."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    chance = random.Random(os.getpid())
    kills = 0
    for after in (2, 4, 6):
        process = start([*flags, "--out", folder])
        wait_for_step(folder, after, process)
        time.sleep(chance.uniform(0, 0.3))
        kills += kill(process)
    done = run_to_its_end([*flags, "--out", folder])
    assert done.returncode == 0, done.stderr
    assert kills >= 2
    return folder


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(killed, uninterrupted):
    assert_same(killed, uninterrupted)


def test_the_log_of_a_killed_run_holds_every_step_once(killed):
    steps = [record["step"] for record in read_log(killed) if "loss" in record]
    assert steps == list(range(1, STEPS + 1))


def test_a_killed_run_leaves_nothing_half_written(killed):
    assert not list(killed.glob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")
def test_two_killed_processes_end_with_the_same_weights(tmp_path, flags):
    straight = tmp_path / "straight"
    folder = tmp_path / "run"
    assert run_to_its_end([*flags, "--out", straight], 2).returncode == 0
    process = start([*flags, "--out", folder], 2)
    wait_for_step(folder, 5, process)
    for entry in Path("/proc").glob("[0-9]*"):  # torchrun, and its workers, of other sessions
        try:
            if os.fsencode(folder) in (entry / "cmdline").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except OSError:
            continue
    process.communicate()
    done = run_to_its_end([*flags, "--out", folder], 2)
    assert done.returncode == 0, done.stderr
    assert "continuing from step" in done.stdout
    assert_same(folder, straight)


def stopped_by(number, folder, flags, size=1):
    """Send a signal after step 3 of a run that saves at its end alone -> exit code, text."""
    process = start([*flags, "--save-every", 1000, "--out", folder], size)
    wait_for_step(folder, 3, process)
    process.send_signal(number)
    text, _ = process.communicate(timeout=30)
    return process.returncode, text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_at_the_end_of_the_step(tmp_path, flags, uninterrupted, number):
    code, text = stopped_by(number, tmp_path, flags)
    assert code == 128 + number, text
    assert "stopped after step" in text
    assert "Traceback" not in text
    assert 3 <= checkpoint(tmp_path)["step"] < STEPS
    done = run_to_its_end([*flags, "--out", tmp_path])
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path, uninterrupted)


def test_a_signal_to_torchrun_saves_at_the_end_of_the_step(tmp_path, flags):
    _, text = stopped_by(signal.SIGTERM, tmp_path, flags, size=2)
    assert "stopped after step" in text, text
    assert 3 <= checkpoint(tmp_path)["step"] < STEPS


def test_a_truncated_checkpoint_gives_way_to_the_one_before(copy, flags, uninterrupted):
    (copy / "checkpoint.pt").write_bytes((copy / "checkpoint.pt").read_bytes()[:1000])
    done = run_to_its_end([*flags, "--out", copy])
    assert done.returncode == 0, done.stderr
    assert "is damaged" in done.stderr
    assert "step 10" in done.stderr
    assert_same(copy, uninterrupted)


def test_no_run_begins_where_every_checkpoint_is_damaged(copy, command, flags):
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (copy / name).write_bytes(b"")
    done = command([*flags, "--out", copy])
    assert done.returncode == 1
    assert "no good checkpoint is left" in done.stderr
    assert "Traceback" not in done.stderr


FULL = """
import resource, signal, sys
sys.path.insert(0, {root!r}); sys.argv = ["pretrain.py", *{args!r}]
import pretrain
real, calls = pretrain.save_checkpoint, []
def limited(path, content):
    calls.append(1)
    if len(calls) == 2:  # the disk is full from the second save on: files end at 64 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
    real(path, content)
pretrain.save_checkpoint = limited
sys.exit(pretrain.main())
"""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, flags, uninterrupted):
    args = [*map(str, flags), "--out", str(tmp_path)]
    program = [sys.executable, "-c", FULL.format(root=str(ROOT), args=args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert checkpoint(tmp_path)["step"] == 2
    assert not list(tmp_path.glob("*.partial"))
    assert run_to_its_end(args).returncode == 0
    assert_same(tmp_path, uninterrupted)


@pytest.fixture
def killed_between_the_renames(tmp_path, monkeypatch):
    """A checkpoint of step 1, and a second whose writer is killed between the two renames, on a
    file system without links."""
    path = tmp_path / "checkpoint.pt"
    pretrain.save_checkpoint(path, {"step": 1})
    replace = os.replace

    def killed(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    def no_links(*names):
        raise PermissionError("there are no links on this file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(os, "link", no_links)
        with pytest.raises(KeyboardInterrupt):
            pretrain.save_checkpoint(path, {"step": 2})
    return path


def test_between_the_two_renames_the_previous_checkpoint_is_the_good_one(
        killed_between_the_renames):
    assert not killed_between_the_renames.exists()
    assert pretrain.load_checkpoint(killed_between_the_renames)["step"] == 1


def test_after_a_kill_between_the_renames_saving_goes_on(killed_between_the_renames, capsys):
    path = killed_between_the_renames
    for step in (3, 4):
        pretrain.save_checkpoint(path, {"step": step})
    assert pretrain.load_checkpoint(path)["step"] == 4
    assert not capsys.readouterr().err
    assert torch.load(path.with_suffix(".previous.pt"), weights_only=True)["step"] == 3


def test_a_finished_run_says_so(copy, command, flags):
    done = command([*flags, "--out", copy])
    assert done.returncode == 0
    assert "is complete at step 12" in done.stdout


def test_another_configuration_is_refused_in_one_line(copy, command, flags):
    done = command([*flags, "--out", copy, "--lr", "0.1", "--temperature", "0.2"])
    assert done.returncode == 1
    assert "lr: 0.0003 then, 0.1 now" in done.stderr
    assert "temperature: 0.5 then, 0.2 now" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_finished_run_may_be_made_longer(copy, command, flags):
    done = command([*flags, "--out", copy, "--max-steps", 14])
    assert done.returncode == 0, done.stderr
    assert "continuing from step 12 of 14" in done.stdout


def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(tmp_path, command, flags):
    """This rate leaves such weights after a loss that is a number."""
    done = command([*flags, "--out", tmp_path, "--lr", "1e38", "--save-every", 1])
    assert done.returncode == 1
    assert "not finite at step" in done.stderr
    assert "process 0" in done.stderr
    assert "none was saved yet" in done.stderr
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_loss_that_is_not_finite_stops_the_run_at_its_last_good_checkpoint(
        tmp_path, command, flags):
    done = command([*flags, "--out", tmp_path, "--lr", "1e19", "--save-every", 1])
    assert done.returncode == 1
    assert "not finite at step" in done.stderr
    assert "checkpoint.pt, step 1" in done.stderr
    assert all(t.isfinite().all() for t in checkpoint(tmp_path)["learner"].values())


def test_the_losses_of_a_continued_run_are_those_of_a_whole_one(killed, uninterrupted):
    assert losses(killed) == losses(uninterrupted)
