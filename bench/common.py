"""What the benches share: the released network, the machine and its roof, how to run and write.

Never imported by the project itself. torch is imported only where a network or a product needs it,
so that a bench may import this in an environment without.
"""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# SampleCNN at full width: one window of 59,049 samples forward; a pair is two of them, forward and
# backward, where backward counts twice (two products for each of forward's).
GFLOP_PER_WINDOW = 3.46
GFLOP_PER_PAIR = 20.7


def machine() -> dict:
    """Processor, cores, system and Python of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def where() -> str:
    """The machine in words, as captions say it: `AMD EPYC, 2 cores`."""
    here = machine()
    return f"{here['cpu']}, {here['cores']} cores"


def released_network():
    """The released SampleCNN's layers as its code has them: (B, 1, 59049) -> (B, 512).

    Conv1d, ReLU before max-pool. Its weights in order are those of `model.SampleCNN`, without the
    dimension of size 1 that our convolutions carry.
    """
    from torch import nn

    def block(c_in, c_out, *pool, **convolution):
        return nn.Sequential(
            nn.Conv1d(c_in, c_out, 3, **convolution), nn.BatchNorm1d(c_out), nn.ReLU(), *pool
        )

    channels = (128, 128, 128, 256, 256, 256, 256, 256, 256, 512)
    blocks = [block(1, 128, stride=3)]
    for c_in, c_out in zip(channels, channels[1:]):
        blocks.append(block(c_in, c_out, nn.MaxPool1d(3, 3), padding=1))
    return nn.Sequential(*blocks, block(512, 512, padding=1), nn.Flatten())


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16; where not, torch emulates it: far slower."""
    import model

    return model.choose_amp("cpu") == "bf16"


def roof(turns: int = 10) -> dict[str, float]:
    """GFLOP/s of a large matrix product in float32 and, where it is native, bfloat16: medians."""
    import torch

    found = {}
    for dtype in (torch.float32, torch.bfloat16) if has_bfloat16() else (torch.float32,):
        a, b, c = torch.randn(3, 4096, 4096).to(dtype)
        seconds = []
        for _ in range(turns + 1):
            began = time.perf_counter()
            torch.mm(a, b, out=c)
            seconds.append(time.perf_counter() - began)
        # The first product warms up.
        rate = 2 * 4096**3 / statistics.median(seconds[1:])
        found[str(dtype).removeprefix("torch.")] = rate / 1e9
    return found


def roof_in_words(gflops: dict[str, float]) -> str:
    """A caption's sentence about `roof`."""
    bfloat16 = "none (the processor has no such arithmetic)"
    if "bfloat16" in gflops:
        bfloat16 = f"{gflops['bfloat16']:.0f}"
    return (
        f"Roof: {gflops['float32']:.0f} GFLOP/s in float32, {bfloat16} in bfloat16, "
        "by a large matrix product in the same run."
    )


def in_a_process(script: str, *words) -> dict:
    """The JSON that `script --worker WORDS` prints as its last line, in a process of its own."""
    command = [sys.executable, script, "--worker", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{' '.join(map(str, words))}: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def command_line(script: str, argv: list[str] | None = None) -> str:
    """The command as one would type it in the repository."""
    words = sys.argv[1:] if argv is None else argv
    return shlex.join(["python", f"bench/{Path(script).name}", *map(str, words)])


def write(result: dict, out: Path | None) -> None:
    """A result as JSON: to a file, with its folder, or, without one, to the screen."""
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    if out is None:
        print(text, end="")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}", file=sys.stderr)
