"""chain.c and block.c, compiled once for this CPU by the C compiler that is there, for ctypes.

What they compute: chain.c the loops of splice.overlap_add, filters.freeverb and filters.recurse,
block.c those of pooled.py, to rounding. Why it is faster: torch takes each of them in dozens of
operations, which go through memory one after the other; here what is read once is finished in
registers. By how much: on one core of an AMD EPYC with AVX-512 a filter takes 0.4 of its time, the
pitch shift and the reverb, half of which are FFTs, 0.5, the chain 0.5 (results/speed/chain.json);
block.c: kernels/__init__.py. The plain ways are torch's, in splice.py, filters.py and the layers,
taken where there is no compiler, which is said once.

A compiled file is kept in the user's cache folder (XDG_CACHE_HOME, else ~/.cache), under a name
made of the source, the compiler and the CPU.
"""

import atexit
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

SLOWER = {  # without each of the sources
    "chain.c": "augmentation takes twice its time",
    "block.c": "a step of melcnn takes a fifth longer",
}
TILE = 7 * 16               # lags that it takes at once
TAPS = 32                   # of the interpolator, and of the one for the search
SHORT_TAPS = 12
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]


class Plan(ctypes.Structure):
    """As in chain.c."""

    WHOLE = ("rows", "size", "blocks", "segments", "hop", "fade", "first", "search", "lags",
             "block", "fractions")
    _fields_ = [*((name, ctypes.c_int64) for name in WHOLE), ("drift", ctypes.c_double)]


def cpu() -> str:
    """What distinguishes this CPU: a file compiled for another might not run."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
    except OSError:
        return platform.processor() + platform.machine()


def cache_folder() -> Path:
    """Of this user; where there is none, one that lasts as long as the process."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clmr"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if cache.stat().st_uid != os.getuid():
            raise OSError(f"{cache} is another user's")
        return cache
    except (OSError, RuntimeError, AttributeError):     # no home; no users, as on Windows
        folder = Path(tempfile.mkdtemp(prefix="clmr-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def build(compiler: str, name: str = "chain.c", lanes: int = 16) -> Path:
    """The path of a source of this folder compiled, made if it is not there."""
    source = Path(__file__).with_name(name)
    command = [compiler, *FLAGS, f"-DLANES={lanes}"]
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    named = source.read_bytes() + version + cpu().encode() + " ".join(command).encode()
    path = cache_folder() / f"{source.stem}-{hashlib.sha256(named).hexdigest()[:16]}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "made.so"
            command += ["-o", str(made), str(source), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            with open(made, "rb") as file:
                os.fsync(file.fileno())
            os.replace(made, path)              # whole, or not there: others may be compiling too
    return path


@lru_cache
def library(name: str = "chain.c", lanes: int = 16) -> ctypes.CDLL | None:
    """The functions of a source, by vectors of so many numbers where it goes by them (block.c);
    None, which is said once, where they cannot be had."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    try:
        if not compiler:
            raise OSError("there is no C compiler")
        path = build(compiler, name, lanes)
        try:
            return ctypes.CDLL(str(path))
        except OSError:                         # damaged: once more
            path.unlink()
            return ctypes.CDLL(str(build(compiler, name, lanes)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (str(getattr(error, "stderr", "") or error).strip().splitlines() or ["?"])[0]
        say_slower(name, reason)
        return None


@lru_cache
def say_slower(name: str, reason: str) -> None:
    warnings.warn(f"{SLOWER[name]}, by the same numbers: kernels/{name} cannot be compiled "
                  f"({reason})", stacklevel=3)


def usable(*tensors: Tensor) -> bool:
    """Is chain.c there, for these tensors?"""
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return False
    watched = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return not watched and library() is not None


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Of a contiguous tensor, which the caller holds until the function returns."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def fits(plan) -> bool:
    """Can chain.c work on augment.Splicing? It reads whole vectors, so a little farther."""
    last = plan.first + (plan.segments - 1) * plan.hop
    reach = last + -(-plan.lags // TILE) * TILE + plan.fade + 16
    sizes = (plan.weights.shape[1], plan.short_weights.shape[1])
    return usable(plan.audio) and sizes == (TAPS, SHORT_TAPS) and reach <= plan.audio.shape[1]


def plan_of(plan) -> Plan:
    """From augment.Splicing."""
    given = {name: getattr(plan, name) for name in Plan.WHOLE if hasattr(plan, name)}
    rows, size = plan.audio.shape
    blocks = plan.attacks.shape[1]
    return Plan(rows=rows, size=size, blocks=blocks, fractions=len(plan.weights) - 1,
                drift=plan.drift, **given)


def search(plan, step: Tensor) -> Tensor:
    """Where each segment starts in the audio, (B, S). step (B,) int64: 1 / fractions samples of
    input from segment to segment."""
    starts = plan.start[:, None].repeat(1, plan.segments)
    scratch = torch.empty(plan.fade + 2 * plan.lags + 2 * TILE + 16)
    library().search(
        ctypes.byref(plan_of(plan)), address(plan.audio), address(plan.attacks.contiguous()),
        address(plan.short_weights), address(step), address(starts), address(scratch))
    return starts


def lay(plan, starts: Tensor, fade_in: Tensor) -> Tensor:
    """The segments read and laid together, (B, S hop)."""
    laid = plan.audio.new_empty(len(starts), plan.segments * plan.hop)
    scratch = torch.empty(plan.segments, plan.hop + plan.fade + 16)
    library().lay(
        ctypes.byref(plan_of(plan)), address(plan.audio), address(starts), address(plan.ratio),
        address(plan.weights), address(fade_in), address(laid), address(scratch))
    return laid


def apply_rooms(spectrum: Tensor, combs: tuple, tables: tuple) -> None:
    """spectrum (B, bins) complex, in place, times the response of the rooms: combs as made by
    filters._combs, (coarse, fine, direct, damped); tables (one_sample, passes), (2, A, COLUMNS)."""
    coarse, fine, direct, damped = combs
    rows, bins = spectrum.shape
    library().rooms(
        address(torch.view_as_real(spectrum)), ctypes.c_int64(rows), ctypes.c_int64(bins),
        address(coarse), address(fine), *map(address, tables), address(direct), address(damped))


def recurse(x: Tensor, coefficients: Tensor) -> Tensor:
    """x (B, T) through second-order filters, coefficients (B, 5) float64: b0, b1, b2, a1, a2."""
    x = x.contiguous()
    y = torch.empty_like(x)
    rows, total = x.shape
    library().recurse(address(x), address(y), address(coefficients),
                      ctypes.c_int64(rows), ctypes.c_int64(total))
    return y
