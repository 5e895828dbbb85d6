"""pretrain.py on several nodes: they agree before the first step, or each says who differs; what is
lost ends the others in time. Two processes here play two nodes with folders of their own;
bench/nodes.py does it with addresses and links, which needs root."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pretraining import (QUIET, ROOT, TOY, assert_same, command, free_port, read_log,
                         run_to_its_end, start, wait_for_step)
from training import processes

STEPS = 6


def nodes(folder, flags, of_the_second=(), data=None):
    """Start pretrain.py as process 0 and 1 of two nodes -> [Popen, Popen], each with its folder."""
    env = {**os.environ, **QUIET, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
           "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    started = []
    for rank, more in enumerate(([], of_the_second)):
        args = [*flags, *more, "--out", folder / str(rank)]
        program = [sys.executable, str(ROOT / "pretrain.py"), *map(str, args)]
        started.append(subprocess.Popen(
            program, env={**env, "RANK": str(rank)}, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    return started


def ends(processes):
    """(exit code, text) of each."""
    texts = [process.communicate(timeout=200)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts)]


@pytest.fixture(scope="module")
def flags(tiny_data):
    return ["--data", tiny_data, *TOY, "--save-every", 2, "--timeout", 0.3]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, flags):
    folder = tmp_path_factory.mktemp("straight")
    for code, text in ends(nodes(folder, [*flags, "--max-steps", STEPS])):
        assert code == 0, text
    return folder


def test_the_log_says_how_long_each_waited_for_the_others(straight):
    others = [record["others"] for record in read_log(straight / "0") if "loss" in record]
    assert len(others) == STEPS
    assert all(len(shares) == 2 and 0 <= min(shares) <= max(shares) <= 1 for shares in others)


def test_only_the_first_node_writes(straight):
    assert (straight / "0/checkpoint.pt").exists()
    assert not (straight / "1").exists()


@pytest.mark.parametrize("holder", ["0", "1"])
def test_a_checkpoint_on_one_node_alone_continues_to_the_same_weights(
        tmp_path, flags, straight, holder):
    """Also where the nodes have changed places, as after a restart."""
    for code, text in ends(nodes(tmp_path, [*flags, "--max-steps", 2])):
        assert code == 0, text
    if holder == "1":
        os.rename(tmp_path / "0", tmp_path / "1")
    (code, text), other = ends(nodes(tmp_path, [*flags, "--max-steps", STEPS]))
    assert code == other[0] == 0, text
    assert "continuing from step 2" in text
    assert_same(tmp_path / "0", straight / "0")


@pytest.mark.parametrize("flag, value, says", [
    ("--lr", "0.001", "lr is 0.001, but 0.0003"),
    ("--seed", "1", "seed is 1, but 0"),
    ("--data", "OTHER", "fingerprint is"),
    ("--data", "nowhere", "nowhere: not prepared"),
], ids=["lr", "seed", "fingerprint", "missing"])
def test_a_difference_stops_both_nodes_before_the_first_step(
        tmp_path, flags, tiny_single, flag, value, says):
    value = tiny_single if value == "OTHER" else value  # the same audio with other labels
    for code, text in ends(nodes(tmp_path, [*flags, "--max-steps", 2], [flag, value])):
        assert code == 1
        assert text.count("\n") == 1, text
        assert says in text
        assert f"node {socket.gethostname()}" in text
    assert not (tmp_path / "0").exists()


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_lost_is_named_by_the_other(tmp_path, flags, number):
    first, second = nodes(tmp_path, [*flags, "--max-steps", 1000])
    wait_for_step(tmp_path / "0", 3, first)
    second.send_signal(number)
    began = time.monotonic()
    text, _ = first.communicate(timeout=150)
    second.kill()
    second.communicate()
    assert time.monotonic() - began < 90  # 18 s, and what a busy machine adds
    assert first.returncode == 1
    assert f"lost process 1 on {socket.gethostname()}" in text, text
    assert f"the last good checkpoint: {tmp_path}/0/checkpoint.pt" in text
    assert "the same command continues" in text
    assert "Traceback" not in text


def status(pid, field):
    """A field of a process's status, "" when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return ""
    return next(line.split()[1] for line in lines if line.startswith(f"{field}:"))


def alive(pid):
    return status(pid, "State") not in ("", "Z")


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")
def test_workers_do_not_outlive_torchruns_agent(tmp_path, flags):
    agent = start([*flags, "--max-steps", 1000, "--out", tmp_path], 2)
    wait_for_step(tmp_path, 3, agent)
    running = [path.name for path in Path("/proc").glob("[0-9]*")]
    workers = [pid for pid in running if status(pid, "PPid") == str(agent.pid)]
    assert len(workers) == 2
    agent.kill()
    text, _ = agent.communicate(timeout=60)  # ends when nobody writes any more
    assert "stopped after step" in text, text
    for _ in range(300):
        if not any(map(alive, workers)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{workers} go on")


# --------------------------------------------------------------------- each part for itself


@pytest.fixture
def second_of_two(monkeypatch):
    """This process as number 1 of two nodes; the first is far."""
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1,
                        "MASTER_ADDR": "far.example", "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)


def test_a_name_that_means_the_machine_itself_is_pointed_out(second_of_two, monkeypatch):
    address = {"far.example": "192.0.2.7", processes.NODE: "127.0.1.1"}
    monkeypatch.setattr(socket, "gethostbyname", address.get)
    with pytest.raises(processes.Stop, match="127.0.1.1.*GLOO_SOCKET_IFNAME.*NCCL_SOCKET_IFNAME"):
        processes.connect(torch.device("cpu"), 0.02)


def test_who_cannot_connect_says_so_and_what_to_type(second_of_two, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(processes.Stop, match="could not connect.*GLOO_SOCKET_IFNAME"):
        processes.connect(torch.device("cpu"), 0.02)


def test_an_error_of_any_process_is_said_by_that_process(second_of_two, capsys):
    with processes.one_line_errors("pretrain.py") as end:
        raise OSError("the disk is on fire")
    assert end.code == 1
    line = f"pretrain.py: error: process 1 on {processes.NODE}: the disk is on fire\n"
    assert capsys.readouterr().err == line


def test_several_tasks_of_slurm_without_torchrun_are_refused(command, monkeypatch, tiny_data):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_NNODES", "2")
    done = command(["--data", tiny_data])
    assert done.returncode == 2
    assert "srun --ntasks=2 --ntasks-per-node=1 torchrun --nnodes=2 " in done.stderr
    assert "--nproc_per_node=2" in done.stderr


@pytest.fixture
def lock(tmp_path):
    lock = processes.Lock(tmp_path)
    yield lock
    lock.close()


def test_the_clock_of_a_lost_process_starts_with_the_first_exchange(tmp_path, monkeypatch):
    """Not while samples are read into a GPU's memory, which takes as long as it takes."""
    ended = []
    monkeypatch.setattr(processes, "size", lambda: 2)
    monkeypatch.setattr(processes.os, "_exit", ended.append)
    monkeypatch.setattr(processes.Watch, "loss", lambda watch: "it is lost")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with processes.Watch(-0.49, lambda: ""):  # -0.49 min + 30 s: 0.6 s
            time.sleep(2.5)
            assert not ended
            dist.all_reduce(torch.zeros(1))
            for _ in range(100):
                time.sleep(0 if ended else 0.1)
        assert ended
    finally:
        dist.destroy_process_group()


def test_a_lock_that_its_holder_took_away_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    """A opens; the holder leaves, and with it the file; A must not hold a file that nobody sees."""
    holder, later = processes.Lock(tmp_path), processes.Lock(tmp_path)
    holder.take()
    flock = processes.fcntl.flock

    def leave_first(file, how):
        if holder.file:
            holder.close()
            holder.file = None
        flock(file, how)

    monkeypatch.setattr(processes.fcntl, "flock", leave_first)
    later.take()
    with pytest.raises(ValueError, match="is being trained"):
        processes.Lock(tmp_path).take()
    later.close()


def test_a_second_run_into_a_folder_names_the_first(lock, command, flags):
    lock.take()
    done = command([*flags, "--out", lock.path.parent])
    assert done.returncode == 1
    assert f"is being trained (by process {os.getpid()} of {processes.NODE}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_lock_of_a_dead_process_does_not_block(lock):
    lock.path.write_text("by process 1 of a machine that was lost")
    lock.take()
    assert f"process {os.getpid()}" in lock.path.read_text()


def test_a_lock_that_was_given_back_leaves_nothing(lock):
    lock.take()
    lock.close()
    assert not lock.path.exists()


@pytest.fixture
def no_flock(monkeypatch):
    """A disk without locks, as some network disks are."""
    def flock(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(processes.fcntl, "flock", flock)


def test_without_locks_of_the_disk_a_young_file_blocks(lock, no_flock):
    lock.path.write_text("by process 1 of another machine")
    with pytest.raises(ValueError, match="of another machine"):
        lock.take()


def test_without_locks_of_the_disk_an_old_file_does_not_block(lock, no_flock):
    lock.path.write_text("by process 1 of a machine that was lost")
    os.utime(lock.path, (0, 0))
    lock.take()
    assert f"process {os.getpid()}" in lock.path.read_text()
