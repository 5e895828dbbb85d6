"""Tables of results as markdown, made from the JSON files that hold them, so that no page can differ from what was measured.

    python results/tables.py results/full/moods-20000.json              # print its table, between the markers that a page needs
    python results/tables.py README.md results/README.md     # renew the tables that stand in pages

A page names the file of a table, relative to the page's own folder; what stands between the markers is replaced:

    <!-- table: results/full/moods-20000.json -->
    <!-- /table -->

A file of results has a `table`, a list of rows {column: text}, and a `caption`, which goes above it.
"""
import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluate import table  # noqa: E402  what evaluate.py prints is what a page shows

BETWEEN_MARKERS = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.S)


def read(path) -> dict:
    """A file of results; ValueError if it is none."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(result, dict) or "table" not in result:
        raise ValueError(f"{path}: expected a JSON file of results, with a `table`")
    return result


def refresh(text: str, root) -> str:
    """A page with each table between its markers made anew from the file it names, relative to the folder `root`."""
    def made_anew(found):
        return found[1] + table(read(Path(root) / found[2])) + found[3]
    return BETWEEN_MARKERS.sub(made_anew, text)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="results/tables.py", description="Renew the tables of pages; print those of results.", allow_abbrev=False)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="pages (.md), results (.json)")
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    try:
        for path in args.files:
            if path.suffix == ".md":
                page = path.read_text(encoding="utf-8")
                path.write_text(refresh(page, path.parent), encoding="utf-8")
            else:
                print(f"<!-- table: {path} -->\n{table(read(path))}<!-- /table -->\n")
    except (ValueError, OSError) as error:
        print(f"results/tables.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
