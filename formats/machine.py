"""This process and its machine: allocator, device, precision, and what explains a number.

`import model` gives all of it by its name, as model.choose_device("auto").
"""
import contextlib
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch


def tune_allocator():
    """Keep freed memory in the process (glibc only; elsewhere nothing). Call it before the first
    large tensor.

    glibc returns every large block to the system at each free, and half of a training step on the
    CPU is then spent on page faults. Both calls are needed; the heap grows by fragments, which
    jemalloc without decay avoids."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large request
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back


def choose_device(name: str = "auto") -> torch.device:
    """`auto`, `cpu` or `cuda` -> device; in a torchrun process, `cuda` is the GPU of that process.

    >>> choose_device("cpu")
    device(type='cpu')"""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda, not {name!r}")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; type --device cpu")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # on by default: convolutions with errors of 1e-3
    return device


def choose_amp(device, amp: str = "auto") -> str:
    """`auto` -> `bf16` where the hardware multiplies it (AVX-512 BF16, AMX, Ampere or later),
    else `off` (on an older GPU `fp16`)."""
    device = torch.device(device)
    if amp == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if amp == "auto":
        asked = getattr(torch.cpu, "get_capabilities", dict)  # of torch 2.9 or later
        return "bf16" if asked().get("avx512_bf16") or asked().get("amx_bf16") else "off"
    if amp not in ("off", "bf16", "fp16"):
        raise ValueError(f"--amp must be auto, off, bf16 or fp16, not {amp!r}")
    if amp == "fp16" and device.type == "cpu":
        raise ValueError("--amp fp16 is for GPUs; on the CPU type --amp bf16 or --amp off")
    return amp


def autocast(device, amp: str = "auto"):
    """The context of mixed precision: `with autocast(device, "auto"): h = encoder(x)`; see
    `choose_amp`."""
    amp = choose_amp(device, amp)
    dtype = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    return torch.autocast(torch.device(device).type, dtype=dtype, enabled=amp != "off")


def versions() -> dict:
    """Versions that explain a number."""
    return {"python": ".".join(map(str, sys.version_info[:3])), "torch": torch.__version__}


def code_version() -> str:
    """The git commit of this project, `+` when it has changes; else `unknown`."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    folder = Path(__file__).parent.parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    return "unknown"
