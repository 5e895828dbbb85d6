"""results/tables.py: pages show what the files of results hold."""

import json
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT / "results"))
import tables  # noqa: E402

RESULT = {
    "caption": "In percent.",
    "table": [{"model": "clmr", "PR": "35.1"}, {"model": "untrained", "ROC": "50.0"}],
}
MARKDOWN = """In percent.

| model | PR | ROC |
| --- | --- | --- |
| clmr | 35.1 |  |
| untrained |  | 50.0 |
"""


@pytest.fixture
def page(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RESULT))
    first, second = (
        f"<!-- table: x.json -->\n{content}<!-- /table -->\n" for content in ("old\n", "")
    )
    (tmp_path / "README.md").write_text(f"# A\n{first}between\n{second}end\n")
    return tmp_path / "README.md"


def test_a_table_has_the_columns_of_all_its_rows():
    assert tables.table(RESULT) == MARKDOWN


def test_every_table_of_a_page_is_renewed_and_nothing_else(page):
    text = tables.refresh(page.read_text(), page.parent)
    marked = f"<!-- table: x.json -->\n{MARKDOWN}<!-- /table -->\n"
    assert text == f"# A\n{marked}between\n{marked}end\n"


def test_renewing_twice_changes_nothing_more(page):
    once = tables.refresh(page.read_text(), page.parent)
    assert tables.refresh(once, page.parent) == once


def test_the_command_renews_pages_and_prints_results(page, run):
    done = run(["results/tables.py", page, page.parent / "x.json"])
    assert done.returncode == 0, done.stderr
    assert page.read_text().count(MARKDOWN) == 2
    assert MARKDOWN in done.stdout


@pytest.mark.parametrize(
    "content, says", [("[1]", "expected a JSON file of results"), ("nothing", "is no JSON file")]
)
def test_what_is_no_result_is_refused_in_one_line(content, says, tmp_path, capsys):
    (tmp_path / "bad.json").write_text(content)
    assert tables.main([str(tmp_path / "bad.json")]) == 1
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
