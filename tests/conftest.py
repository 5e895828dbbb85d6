"""Fixtures for all tests: two tiny prepared folders made the way a user makes them, and a way to
run a script.

`tiny_data`    24 songs of 4 to 7 s, 4 tags that can be heard (low, bright, noisy, pulsing), 12
train / 6 valid / 6 test
`tiny_single`  the same recordings with one label each (low, high)
`python`       the interpreter
`run`          run(["prepare.py", "--data", ...], **kwargs of subprocess.run) -> CompletedProcess,
text, one thread
`interrupt`    interrupt(command, library) -> (exit code, what it printed), Ctrl-C as soon as it has
that library in memory
`on_a_gpu`     on_a_gpu(main, ["--data", ...]) -> (exit code, the PretendGpu), a script's main on
a pretend GPU
"""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TAGS = ("bright", "low", "noisy", "pulsing")


def synthesise(i, sample_rate=22050):
    """Song i as (T,) float64 and its tags: bit k of i decides over tag k, so all combinations
    occur."""
    rng = np.random.default_rng(i)
    tags = [tag for k, tag in enumerate(TAGS) if i >> k & 1]
    t = np.arange(round((4 + 3 * (i % 7) / 6) * sample_rate)) / sample_rate
    pitch = rng.uniform(90, 160) if "low" in tags else rng.uniform(400, 700)
    melody = pitch * 2 ** (rng.integers(0, 5, len(t) // 11025 + 1)[(t * 2).astype(int)] / 12)
    phase = 2 * np.pi * np.cumsum(melody) / sample_rate
    x = sum(np.sin(h * phase) / h ** (0.5 if "bright" in tags else 2) for h in range(1, 9))
    if "noisy" in tags:
        x = x + 0.5 * rng.standard_normal(len(t))
    if "pulsing" in tags:
        x = x * (0.1 + 0.9 * (np.sin(2 * np.pi * 4 * t) > 0))
    return 0.5 * x / np.abs(x).max(), tags


@pytest.fixture(scope="session")
def python():
    return sys.executable


@pytest.fixture(scope="session")
def run():
    def run(args, **kwargs):
        env = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            **kwargs.pop("env", {}),
        }
        args = [str(arg) for arg in args]
        if (ROOT / args[0]).is_file():
            args[0] = str(ROOT / args[0])
        return subprocess.run(
            [sys.executable, *args],
            **{
                "capture_output": True,
                "text": True,
                "timeout": 300,
                "cwd": ROOT,
                "env": env,
                **kwargs,
            },
        )

    return run


@pytest.fixture(scope="session")
def interrupt():
    def interrupt(command, library):
        process = subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT,
                                   env={**os.environ, "PYTHONWARNINGS": "ignore"})
        while library.encode() not in Path(f"/proc/{process.pid}/maps").read_bytes():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
        return process.returncode, text
    return interrupt


@pytest.fixture(scope="session")
def tiny_audio(tmp_path_factory):
    """The folder of the 24 recordings, with tags.csv and labels.csv."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for i in range(24):
        x, tags = synthesise(i)
        soundfile.write(folder / f"song {i:02d}.flac", x, 22050)
        rows.append(
            (f"song {i:02d}.flac", "train" if i % 4 < 2 else "valid" if i % 8 < 4 else "test", tags)
        )
    # Songs 0 to 15 hold every combination of the four tags; permute the split, so that each tag
    # occurs in each split.
    order = np.random.default_rng(0).permutation(24)
    rows = [(name, rows[order[i]][1], tags) for i, (name, _, tags) in enumerate(rows)]
    with open(folder / "tags.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "split", "tags")] + [(n, s, "; ".join(t)) for n, s, t in rows]
        )
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [("file", "split", "label")]
            + [(n, s, "low" if "low" in t else "high") for n, s, t in rows]
        )
    return folder


def make(run, audio, labels, out):
    done = run(
        [
            "prepare.py",
            "--data",
            "folder",
            "--root",
            audio,
            "--labels",
            audio / labels,
            "--out",
            out,
            "--workers",
            2,
        ]
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="session")
def tiny_data(run, tiny_audio, tmp_path_factory):
    return make(run, tiny_audio, "tags.csv", tmp_path_factory.mktemp("prepared") / "tiny")


@pytest.fixture(scope="session")
def tiny_single(run, tiny_audio, tmp_path_factory):
    return make(run, tiny_audio, "labels.csv", tmp_path_factory.mktemp("prepared") / "tiny-single")


@pytest.fixture
def on_a_gpu():
    """on_a_gpu(main, arguments) -> what main returns, the PretendGpu: a script as it runs on a
    GPU."""
    from pretend_gpu import PretendGpu

    def on_a_gpu(main, args):
        with PretendGpu() as gpu:
            return main([str(arg) for arg in args]), gpu

    return on_a_gpu
