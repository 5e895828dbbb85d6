"""What the tests of pretrain.py share: to start it as a user does, to wait for it, to compare."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pretrain
from training.journal import read_log

ROOT = Path(__file__).resolve().parent.parent
TOY = ["--width", "0.0625", "--batch-size", "4", "--amp", "off", "--device", "cpu"]
TOY += ["--log-every", "1"]
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}


@pytest.fixture
def command(capsys):
    """command([...]) -> CompletedProcess of pretrain.py in this process, which spares the import of
    torch; its handlers of signals are afterwards what they were."""
    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    def command(args):
        before = handlers()
        try:
            code = pretrain.main([str(arg) for arg in args])
        except SystemExit as stop:
            code = stop.code
        assert handlers() == before
        return subprocess.CompletedProcess(args, code, *capsys.readouterr())
    return command


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def script(args, size=1):
    """The command of pretrain.py, plain or as so many processes of torchrun."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={size}"]
    torchrun += ["--master_port", str(free_port())]
    program = [sys.executable, *(torchrun if size > 1 else []), str(ROOT / "pretrain.py")]
    return [*program, *map(str, args)]


def run_to_its_end(args, size=1, **environment):
    """CompletedProcess of `script`, with one thread for each process."""
    env = {**os.environ, **QUIET, **environment}
    return subprocess.run(script(args, size), capture_output=True, text=True, env=env, timeout=300)


def start(args, size=1):
    """Popen of `script`, in a session of its own; what it says comes by stdout."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, **QUIET}
    # whoever runs the tests under nohup ignores SIGHUP, and a child would inherit that
    listen = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    return subprocess.Popen(script(args, size), env=env, start_new_session=True,
                            preexec_fn=listen, **pipes)


def wait_for_step(folder, step, process):
    """Until the log holds this step, or two minutes are over."""
    for _ in range(2400):
        log = folder / "log.jsonl"
        if log.exists() and any(r.get("step", 0) >= step for r in read_log(folder)):
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)
    raise AssertionError("the run did not get there")


def checkpoint(folder):
    """The content of a run's checkpoint.pt."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def losses(folder):
    """The losses of a run's log, in order."""
    return [record["loss"] for record in read_log(folder) if "loss" in record]


def assert_same(a, b):
    """Two run folders hold the same weights, moments and step, bit for bit."""
    a = checkpoint(a)
    b = checkpoint(b)
    assert a["step"] == b["step"]
    for name, value in a["learner"].items():
        assert torch.equal(value, b["learner"][name]), name
    for i, state in a["optimiser"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, b["optimiser"]["state"][i][name]), (i, name)
