"""The house rules: the one-way order of imports, files that work alone, commands and tables that cannot rot, doctests."""
import ast
import csv
import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "results"))
import tables  # noqa: E402

ORDER = {"prepare": set(), "augment": set(), "model": set(), "pretrain": {"prepare", "augment", "model"},
         "evaluate": {"prepare", "model"}, "transfer": {"prepare", "model", "evaluate"}}
TORCH_ALONE = {"augment", "model"}  # what these import at their head, beside the standard library


def head_imports(body):
    for node in body:
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, (ast.Try, ast.If)):
            yield from head_imports(node.body)


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way_and_siblings_stand_in_main(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    assert not set(head_imports(tree.body)) & set(ORDER)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.ClassDef)):
            siblings = set(head_imports(function.body)) & set(ORDER)
            assert siblings <= (ORDER[name] if function.name == "main" else set()), (function.name, siblings)
    if name in TORCH_ALONE:
        assert {m for m in head_imports(tree.body) if m not in sys.stdlib_module_names} == {"torch"}


@pytest.mark.parametrize("name", ORDER)
def test_a_file_copied_alone_imports_and_prints_its_help(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import {name}; {name}.build_parser().format_help(); print('alone')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "alone", done.stderr


@pytest.mark.parametrize("name", ORDER)
def test_doctests(name):
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "doctest", f"{name}.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert name == "transfer" or ">>>" in (ROOT / f"{name}.py").read_text()


def commands():
    """Every command line of README, the Makefile and the docstrings at the files' heads: (where, script, arguments)."""
    for source in ("README.md", "Makefile", *(f"{n}.py" for n in ORDER)):
        text = (ROOT / source).read_text()
        text = ast.get_docstring(ast.parse(text)) if source.endswith(".py") else text
        for line in text.replace("$(PY)", "python").splitlines():
            line = line.strip().lstrip("@")
            found = re.match(r"(?:\S+=\S+ )*(?:python|torchrun(?: --\S+)*) (\w+)\.py(.*)", line)
            if found and found[1] in ORDER:
                yield source, found[1], shlex.split(found[2], comments=True)


@pytest.mark.parametrize("source, script, args", [pytest.param(*c, id=f"{c[0]}: {c[1]} {' '.join(c[2])}"[:90]) for c in commands()])
def test_every_command_parses(source, script, args):
    sys.path.insert(0, str(ROOT))
    importlib.import_module(script).build_parser().parse_args(args)


def test_there_are_commands_to_test():
    assert len(list(commands())) > 30


@pytest.mark.parametrize("name", ORDER)
def test_no_abbreviations_and_every_default_is_shown(name, run):
    source = (ROOT / f"{name}.py").read_text()
    assert "allow_abbrev=False" in source and "ArgumentDefaultsHelpFormatter" in source
    assert "default:" in run([f"{name}.py", "--help"]).stdout


def test_the_papers_constants_stand_once():
    """22,050 Hz in prepare; 59,049 follows from the strides: no digit of it in code."""
    numbers = {22050: [], 59049: []}
    for name in ORDER:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.Constant) and not isinstance(node.value, (str, bool)) and node.value in numbers:
                numbers[node.value].append(name)
    assert numbers == {22050: ["prepare"], 59049: []}


def test_the_python_in_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    code = "\n".join(blocks) + "\nimport torch\nx = torch.rand(2, 1, 30000)\ndraws = chain.draw(2, torch.Generator().manual_seed(0))\n"
    code += "only = augment.Chain(22050, ['reverse'], {'reverse': 1})\nassert torch.equal(only(x, only.draw(2, torch.Generator())), x.flip(-1))\n"
    code += "assert chain(x, draws).shape == x.shape and list(chain.transforms)[-1] == 'reverse'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert blocks and done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "demo/MODEL_CARD.md"])
def test_tables_are_those_of_the_results(page):
    """The tables between markers are exactly what results/tables.py makes of results/*.json."""
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text and tables.refresh(text, (ROOT / page).parent) == text
    assert not re.search(r"<!-- table: \S+ -->\n<!-- /table -->", text)


def test_the_demo_runs_on_the_music_that_ships(tmp_path, run):
    """make demo's path at toy length, in a folder of its own."""
    data, out = tmp_path / "demo", tmp_path / "run"
    for args in (["prepare.py", "--data", "demo", "--out", data],
                 ["pretrain.py", "--data", data, "--width", "0.0625", "--batch-size", 8, "--max-steps", 2, "--out", out],
                 ["evaluate.py", "--ckpt", out / "encoder.pt", "--data", data, "--seeds", 1, "--bootstrap", 20, "--epochs", 2],
                 ["evaluate.py", "--ckpt", out / "tagger.ts", "--tag", next((ROOT / "demo/audio").glob("*.ogg"))]):
        done = run(args, env={"PATH": ""})  # nor do they need git, or any other program
        assert done.returncode == 0, (args, done.stderr[-2000:])
    with open(ROOT / "demo/labels.csv", newline="") as file:
        authors = {row["label"] for row in csv.DictReader(file)}
    assert {line.split("%")[1].strip() for line in done.stdout.splitlines()[1:]} == authors


def test_the_encoder_and_the_tagger_that_ship_work_after_a_clone(tmp_path, run):
    song = sorted((ROOT / "demo/audio").glob("*.ogg"))[0]
    done = run(["evaluate.py", "--ckpt", "demo/encoder.pt", "--embed", song, "--out", tmp_path])
    rows = np.load(tmp_path / f"{song.name}.npz")["embedding"]
    assert done.returncode == 0 and rows.shape[0] == 7 and np.isfinite(rows).all() and rows.std(0).any()
    done = run(["evaluate.py", "--ckpt", "demo/tagger.ts", "--tag", song])
    with open(ROOT / "demo/labels.csv", newline="") as file:
        authors = {row["label"] for row in csv.DictReader(file)}
    assert done.returncode == 0 and {line.split("%")[1].strip() for line in done.stdout.splitlines()[1:]} == authors
    info = torch.load(ROOT / "demo/encoder.pt", weights_only=True)
    card = (ROOT / "demo/MODEL_CARD.md").read_text()
    assert f"batch {info['batch_size']}" in card and f"{info['step']} steps" in card and f"--width {info['sizes']['width']:g}" in card
