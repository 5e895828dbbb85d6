"""kernels/chain.c, compiled, against the same loops as torch operations (splice.py, filters.py)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sounds import RATE, full, music, white

import augment
from kernels import compiled, splice

needs_a_compiler = pytest.mark.skipif(compiled.library() is None, reason="there is no C compiler")
SLOWER = "twice its time.*kernels/chain.c"


@pytest.fixture
def by_torch(monkeypatch):
    """by_torch(function) -> what it returns without chain.c."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "usable", lambda *tensors: False)
            return function()

    return call


def plan_of(samples, semitones, rate=RATE):
    x = music(len(semitones), samples)[:, 0]
    return augment.Splicing(x, 2 ** (torch.tensor(semitones).double() / 12), rate)


SEMITONES = [-12.0, -5.0, -0.7, 0.0, 2.3, 5.0, 12.0]


@needs_a_compiler
@pytest.mark.parametrize("samples", [1, 1103, 14000, 59049])
def test_segments_start_where_torch_finds_them(by_torch, samples):
    plan = plan_of(samples, SEMITONES)
    assert compiled.fits(plan)
    assert torch.equal(splice.search(plan), by_torch(lambda: splice.search(plan)))


@needs_a_compiler
@pytest.mark.parametrize("rate", [4000, 22050, 96000])
def test_segments_are_read_and_laid_together_as_by_torch(by_torch, rate):
    plan = plan_of(14000, SEMITONES, rate)
    want = by_torch(lambda: splice.overlap_add(plan))
    assert (splice.overlap_add(plan) - want).norm() < 1e-6 * want.norm()


@needs_a_compiler
@pytest.mark.parametrize("samples", [1, 700, 59049])
@pytest.mark.parametrize("cutoff", [1.0, 30.0, 1200.0, 11000.0])
@pytest.mark.parametrize("kind", ["low_pass", "high_pass"])
def test_filters_are_those_of_torch(by_torch, kind, cutoff, samples):
    x = white(9, samples)                       # more than the 8 rows that are taken at once
    want = by_torch(lambda: getattr(augment, kind)(x, full(cutoff, 9), RATE))
    y = getattr(augment, kind)(x, full(cutoff, 9), RATE)
    assert (y - want).norm() < 1e-5 * want.norm() + 1e-7 * x.norm()


@needs_a_compiler
@pytest.mark.parametrize("samples", [1, 5000, 59049, 70000])
def test_reverb_is_that_of_torch(by_torch, samples):
    x = 0.1 * white(3, samples)
    room = torch.tensor([[90.0, 0, 100], [20, 100, 0], [30, 100, 100]])
    want = by_torch(lambda: augment.reverb(x, *room, RATE))
    assert (augment.reverb(x, *room, RATE) - want).norm() < 1e-4 * want.norm()


@needs_a_compiler
def test_gradients_are_those_of_torch():
    x = music(2, 3000).requires_grad_()
    augment.low_pass(x, full(1000, 2), RATE).sum().backward()
    assert x.grad.abs().sum() > 0


@needs_a_compiler
def test_a_second_process_takes_the_file_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = compiled.shutil.which("cc") or compiled.shutil.which("gcc")
    path = compiled.build(compiler)
    written = path.stat().st_mtime_ns
    assert compiled.build(compiler) == path
    assert path.stat().st_mtime_ns == written
    assert [file.name for file in (tmp_path / "clmr").iterdir()] == [path.name]


@needs_a_compiler
def test_a_damaged_file_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiler = compiled.shutil.which("cc") or compiled.shutil.which("gcc")
    compiled.build(compiler).write_bytes(b"no library")
    compiled.library.cache_clear()
    assert compiled.library() is not None
    compiled.library.cache_clear()


@pytest.mark.parametrize("compiler", ["/no/such/compiler", "false"])
def test_without_a_compiler_torch_is_taken_and_it_is_said(monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    for forgetting in (compiled.library, compiled.say_slower):
        forgetting.cache_clear()
    with pytest.warns(UserWarning, match=SLOWER):
        assert not compiled.usable(torch.zeros(1))
    compiled.library.cache_clear()


def test_where_there_is_no_home_to_keep_it_the_chain_works(tmp_path):
    code = "import augment, torch; augment.low_pass(torch.zeros(1, 1, 9), torch.ones(1) * 99, 8000)"
    environment = {"PATH": compiled.os.environ["PATH"], "HOME": "/proc/nowhere"}
    root = str(Path(compiled.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
