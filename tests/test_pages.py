"""The pages people read: their commands parse, their tables are the results, their Python runs."""

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in ("results", "bench"):
    sys.path.append(str(ROOT / folder))
import tables  # noqa: E402

PAGES = [
    name
    for name in ("README.md", "results/README.md", "splits/README.md", "demo/MODEL_CARD.md")
    if (ROOT / name).exists()
]
FOLDERS = ("library", "training", "splits", "results", "bench", "demo")
COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:python3?|torchrun(?: --\S+)*) (-m library|[\w/]+\.py)\b(.*)"
)
TABLE = re.compile(r"<!-- table: \S+ -->.*?<!-- /table -->", re.S)


# ------------------------------------------------------------------------------- commands


def makefile():
    """The Makefile with its variables written out, PY as `python`."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(\w+) \??= (.*)$", text, re.M)) | {"PY": "python"}
    return re.sub(r"\$\((\w+)\)", lambda found: values.get(found[1], found[0]), text)


def texts():
    """(where, text) of all that shows commands: pages, the Makefile, first docstrings of files."""
    for page in PAGES:
        yield page, TABLE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    yield "Makefile", makefile()
    files = [
        *ROOT.glob("*.py"),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    ]
    for path in sorted(files):
        head = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        yield str(path.relative_to(ROOT)), head or ""


def commands():
    """(where, script, arguments) of every command, on a line of its own or between backticks."""
    for where, text in texts():
        lines = text.replace("\\\n", " ").splitlines()
        spans = re.findall(r"`((?:python|torchrun) [^`]*)`", text.replace("\n", " "))
        for line in [*lines, *spans]:
            found = COMMAND.match(line.strip().lstrip("@"))
            if found is None or re.search(r"\bVERB\b|\.\.\.", found[2]):
                continue
            optional = found[2].translate(str.maketrans("[]|", "   "))
            yield where, found[1], shlex.split(optional, comments=True)


def parser_inside(main):
    """The parser that a main() without build_parser() makes."""

    class Caught(Exception):
        pass

    def catch(parser, args=None, namespace=None):
        raise Caught(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script"])
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        with pytest.raises(Caught) as caught:
            main()
    return caught.value.args[0]


@cache
def parser_of(script):
    """The parser of a script of ours; None where its folder is not in the repository."""
    if script == "-m library":
        return (
            importlib.import_module("library.cli").build_parser()
            if (ROOT / "library/cli.py").exists()
            else None
        )
    if not (ROOT / script).exists():
        return None
    # Not by its plain name: bench/evaluate.py is another module than evaluate.py.
    name = "script_" + re.sub(r"\W", "_", script)
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.build_parser() if hasattr(module, "build_parser") else parser_inside(module.main)


ALL = list(dict.fromkeys((where, script, tuple(args)) for where, script, args in commands()))


@pytest.mark.parametrize(
    "where, script, args",
    [pytest.param(*c, id=f"{c[0]}: {c[1]} {' '.join(c[2])}"[:90]) for c in ALL],
)
def test_every_command_parses(where, script, args):
    parser = parser_of(script)
    if parser is None:
        assert script == "-m library", f"{where} names {script}, which is not there"
        pytest.skip("no library here yet")
    if "--help" not in args:
        parser.parse_args(list(args))


@pytest.mark.parametrize(
    "page, least", [("README.md", 12), ("results/README.md", 8), ("pretrain.py", 4)]
)
def test_there_are_commands_to_test(page, least):
    assert sum(where == page for where, _, _ in ALL) >= least


# ------------------------------------------------------------------------------- tables


def tables_of(page):
    return re.findall(r"<!-- table: (\S+) -->", (ROOT / page).read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if tables_of(page)])
def test_tables_are_those_of_the_results(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables.refresh(text, (ROOT / page).parent) == text


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_a_page_has_tables_and_none_is_empty(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables_of(page) and not re.search(r"<!-- table: \S+ -->\n<!-- /table -->", text)


def results(*suffixes):
    return sorted(path for path in (ROOT / "results").rglob("*") if path.suffix in suffixes)


def test_every_result_lies_in_the_folder_of_its_question():
    assert [
        path.name for path in results(".json", ".jsonl", ".png") if path.parent == ROOT / "results"
    ] == []


@pytest.mark.parametrize(
    "path", results(".jsonl", ".png"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_log_and_a_picture_share_the_stem_of_their_result(path):
    assert path.with_suffix(".json").exists()


@pytest.mark.parametrize("path", results(".json"), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_result_is_told_of_in_a_page(path):
    name = f"{path.parent.name}/{path.name}"
    assert any(name in (ROOT / page).read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [
        link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link
    ]
    assert [
        link for link in links if link and not (ROOT / page).parent.joinpath(link).exists()
    ] == []


# ------------------------------------------------------------------------------- README


def test_the_newcomers_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_python_in_readme_runs():
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    use = """
import torch
x = torch.rand(2, 1, 30000)
only = augment.Chain(22050, ['reverse'], {'reverse': 1})
assert torch.equal(only(x, only.draw(2, torch.Generator())), x.flip(-1))
assert chain(x, chain.draw(2, torch.Generator().manual_seed(0))).shape == x.shape
assert list(chain.transforms)[-1] == 'reverse'
"""
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks) + use], cwd=ROOT, capture_output=True, text=True
    )
    assert blocks and done.returncode == 0, done.stderr
