"""The house: the one-way order of imports, files that work alone, doctests, help, constants."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What each program may import of ours, below its line `# --- program`; kernels and splits anywhere,
# where they are needed.
ORDER = {
    "prepare": {"splits"},
    "augment": {"kernels"},
    "model": {"kernels", "formats"},
    "pretrain": {"prepare", "augment", "model", "kernels", "training"},
    "evaluate": {"prepare", "model", "evaluation", "results"},
    "transfer": {"prepare", "model", "evaluate", "evaluation", "results"},
}
ROOMS = ("kernels", "formats", "training", "evaluation", "splits")
FOLDERS = (*ROOMS, "library", "results", "bench", "demo", "tests")
OPTIONAL = {"kernels", "formats", "splits"}
TORCH_ALONE = ("augment", "model")
PROGRAM = re.compile(r"^# -{3,} program", re.M)
# A path of somebody's machine.
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:home|root|Users|mnt|work)/\w")


def source_of(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def modules_in(folder):
    """The Python files of a folder, as paths relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))


def imports_in(tree):
    """(top-level name, line) of every import of a tree, `import_module("name")` among them."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in (
            "import_module",
            "__import__",
        ):
            first = node.args[0]
            first = first.values[0] if isinstance(first, ast.JoinedStr) else first
            names = [first.value] if isinstance(first, ast.Constant) else []
        for name in names:
            yield name.split(".")[0], node.lineno


def ours_in(path):
    """(name, line) of what a file imports of ours."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return [(name, line) for name, line in imports_in(tree) if name in (*ORDER, *FOLDERS)]


def program_line(name):
    """The line on which a file's program half begins."""
    source = source_of(name)
    found = PROGRAM.search(source)
    assert found, f"{name}.py has no line `# --- program`"
    return source[: found.start()].count("\n") + 1


# ------------------------------------------------------------------------------- imports


@pytest.mark.parametrize("name", ORDER)
def test_imports_go_one_way(name):
    assert {module for module, _ in ours_in(f"{name}.py")} <= ORDER[name]


@pytest.mark.parametrize("name", ORDER)
def test_the_library_half_imports_no_sibling(name):
    program = program_line(name)
    siblings = [(module, line) for module, line in ours_in(f"{name}.py") if module not in OPTIONAL]
    assert [(module, line) for module, line in siblings if line < program] == []


@pytest.mark.parametrize("name", ORDER)
def test_nothing_of_ours_is_imported_when_a_file_is(name):
    """Not at the head of a file, but where it is needed."""
    head = ast.Module(
        [
            node
            for node in ast.parse(source_of(name)).body
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef))
        ],
        [],
    )
    assert {module for module, _ in imports_in(head)} & {*ORDER, *FOLDERS} == set()


@pytest.mark.parametrize("name", TORCH_ALONE)
def test_augment_and_model_need_torch_alone(name):
    head = [
        node
        for node in ast.parse(source_of(name)).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    modules = {module for module, _ in imports_in(ast.Module(head, []))}
    assert {module for module in modules if module not in sys.stdlib_module_names} == {"torch"}


@pytest.mark.parametrize(
    "path",
    [path for folder in ROOMS for path in modules_in(folder)],
)
def test_the_rooms_of_programs_import_nothing_of_ours(path):
    """What they need is handed in."""
    folder = path.split("/")[0]
    assert {module for module, _ in ours_in(path)} <= {folder}


@pytest.mark.parametrize("path", modules_in("library"))
def test_the_library_imports_prepare_and_model_alone(path):
    assert {module for module, _ in ours_in(path)} <= {"library", "prepare", "model"}


@pytest.mark.parametrize("path", modules_in("results"))
def test_results_import_nothing_of_ours(path):
    assert {module for module, _ in ours_in(path)} == set()


# ------------------------------------------------------------------- files that work alone


@pytest.mark.parametrize("name", ORDER)
def test_a_file_copied_alone_imports_and_prints_its_help(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    code = f"import {name}; {name}.build_parser().format_help(); print('alone')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == "alone", done.stderr


@pytest.mark.parametrize("name", ORDER)
def test_the_doctests_of_a_file_copied_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "doctest", f"{name}.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.parametrize("name", [name for name in ORDER if name != "transfer"])
def test_public_functions_show_by_doctests_what_they_give(name):
    assert ">>>" in source_of(name)


@pytest.mark.parametrize(
    "path",
    [path for folder in FOLDERS[:6] for path in modules_in(folder)],
)
def test_the_doctests_of_the_folders(path):
    if ">>>" not in (ROOT / path).read_text(encoding="utf-8"):
        pytest.skip("it has none")
    module = path.removesuffix(".py").replace("/", ".")
    code = "import doctest, importlib, sys\n"
    code += f"sys.exit(doctest.testmod(importlib.import_module({module!r})).failed)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


# ------------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", ORDER)
def test_no_abbreviations_are_accepted(name):
    assert "allow_abbrev=False" in source_of(name)


@pytest.mark.parametrize("name", ORDER)
def test_help_shows_every_default(name, run):
    help_ = run([f"{name}.py", "--help"]).stdout
    assert "default:" in help_
    assert "None)" not in help_  # a default that says nothing
    assert not re.search(r"default: [^)]*\)\s*\(default", help_)  # nor one that is said twice


# ------------------------------------------------------------------------------- threads


@pytest.mark.parametrize(
    "name, given",
    [
        ("pretrain.py", {}),
        ("evaluate.py", {}),
        ("transfer.py", {}),
        ("library", {}),
        ("pretrain.py", {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_that_wait_sleep(name, given, tmp_path):
    """Spinning, they starve beside other programs; what the user has set is left."""
    at_exit = "import atexit, os\natexit.register(lambda: print(os.environ['OMP_WAIT_POLICY']))\n"
    (tmp_path / "sitecustomize.py").write_text(at_exit)
    environment = {key: v for key, v in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, name, "--help"],
        cwd=ROOT,
        env=environment | given,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == given.get("OMP_WAIT_POLICY", "PASSIVE")


# ------------------------------------------------------------------------------- what stands where


def test_the_papers_constants_stand_once():
    """22,050 Hz in prepare; 59,049 follows from the strides: no digit of it in code."""
    numbers = {22050: [], 59049: []}
    for name in ORDER:
        for node in ast.walk(ast.parse(source_of(name))):
            if (
                isinstance(node, ast.Constant)
                and not isinstance(node.value, (str, bool))
                and node.value in numbers
            ):
                numbers[node.value].append(name)
    assert numbers == {22050: ["prepare"], 59049: []}


def tracked():
    """The files of the repository that are text."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    text = {".py", ".md", ".txt", ".csv", ".json", ".jsonl", ".sh", ""}
    return [name for name in listed if (ROOT / name).suffix in text and (ROOT / name).is_file()]


def test_no_file_says_a_path_of_one_machine():
    if not tracked():
        pytest.skip("not a git repository")
    pages = {
        name: (ROOT / name).read_text(encoding="utf-8", errors="replace") for name in tracked()
    }
    pages.pop("tests/test_repo.py")
    assert {
        name: MACHINE_PATH.search(text)[0]
        for name, text in pages.items()
        if MACHINE_PATH.search(text)
    } == {}


def test_no_recording_lies_outside_demo():
    sounds = {".wav", ".flac", ".ogg", ".mp3", ".opus", ".m4a", ".au", ".aiff"}
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    assert [
        name
        for name in listed
        if Path(name).suffix.lower() in sounds and not name.startswith("demo/")
    ] == []
