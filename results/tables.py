"""Tables of results as markdown, made from the JSON files that hold them, so that no page can
differ from what was measured.

    python results/tables.py results/full/moods.json         # print its table, between its markers
    python results/tables.py README.md results/README.md     # renew the tables that stand in pages

A page names the file of a table, relative to the page's own folder; what stands between the markers
is replaced:

    <!-- table: full/moods.json -->
    <!-- /table -->

A file of results has a `table`, a list of rows {column: text}, and a `caption`, which goes above
it. evaluate.py and transfer.py write theirs by this file.
"""
import argparse
import json
import re
import sys
from pathlib import Path

BETWEEN_MARKERS = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.S)


def cell(row: dict, metric: str) -> str:
    """A metric in percent: mean, deviation over seeds, interval: 77.3 ± 0.2 [75.0, 79.0].

    >>> cell({"mean": {"f": 0.773}, "std": {"f": None}, "interval": {"f": (0.75, 0.79)}}, "f")
    '77.3 [75.0, 79.0]'
    """
    std = row["std"][metric]
    low, high = row["interval"][metric]
    spread = "" if std is None else f" ± {100 * std:.1f}"
    return f"{100 * row['mean'][metric]:.1f}{spread} [{100 * low:.1f}, {100 * high:.1f}]"


def of_evaluation(results: list, names: dict[str, str], clips, data: dict) -> dict:
    """The metrics JSON of evaluate.py: its caption, its table, the data that it is about, its rows.

    Args:
        results: of each model, probe and share of the labels, with its `row`.
        names: {metric: its column}, of others than these their own name.
        clips: the prepared data. data: {split: the windows that were used, with `clip` (n,)}.
    """
    rows = [result.row for result in results]
    counts = {
        split: {
            "clips": len(set(windows.clip)),
            "songs": len(set(clips.group[windows.clip])),
            "windows": len(windows.clip),
        }
        for split, windows in data.items()
    }
    split = clips.meta.get("split_name")
    used = " / ".join(str(count["clips"]) for count in counts.values())
    return {
        "kind": "evaluate",
        "caption": f"{clips.name}, {used} clips to train / validate / test ({split}). In percent: "
        f"mean ± standard deviation over {len(rows[0]['runs'])} seeds, [95 % interval over test "
        "songs].",
        "table": [
            {
                "model": row["model"],
                "probe": row["probe"],
                "labels": f"{100 * row['fraction']:g} % ({row['runs'][0]['clips']:,d} clips)",
                **{names.get(metric, metric): cell(row, metric) for metric in row["mean"]},
            }
            for row in rows
        ],
        "data": {
            "name": clips.name,
            "split": split,
            "counts": counts,
            "tags": clips.tags,
            "task": clips.task,
            "fingerprint": clips.fingerprint,
        },
        "results": rows,
    }


def table(result: dict) -> str:
    """The markdown of a result: its `caption`, and its `table`, a list of rows {column: text}.

    >>> print(table({"caption": "In percent.", "table": [{"model": "clmr", "PR-AUC": "35.1"}]}))
    In percent.
    <BLANKLINE>
    | model | PR-AUC |
    | --- | --- |
    | clmr | 35.1 |
    <BLANKLINE>
    """
    columns = list(dict.fromkeys(column for row in result["table"] for column in row))
    rows = [[str(row.get(column, "")) for column in columns] for row in result["table"]]
    lines = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    return "\n".join([result.get("caption", ""), "", *lines]).strip() + "\n"


def to_json(result: dict) -> str:
    """A result as text: arrays as lists, NaN as null, floats to six digits; of names that are not
    UTF-8 the bytes as escapes."""
    text = json.dumps(result, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    short = json.loads(text, parse_constant=lambda _: None,
                       parse_float=lambda digits: float(f"{float(digits):.6g}"))
    text = json.dumps(short, indent=1, ensure_ascii=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode()


def read(path) -> dict:
    """A file of results; ValueError if it is none."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if not isinstance(result, dict) or "table" not in result:
        raise ValueError(f"{path}: expected a JSON file of results, with a `table`")
    return result


def refresh(text: str, root) -> str:
    """A page with each table between its markers made anew from the file it names, relative to the
    folder `root`."""
    def made_anew(found):
        return found[1] + table(read(Path(root) / found[2])) + found[3]
    return BETWEEN_MARKERS.sub(made_anew, text)


def build_parser():
    parser = argparse.ArgumentParser(
        prog="results/tables.py", allow_abbrev=False,
        description="Renew the tables of pages; print those of results.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE",
                        help="pages (.md), results (.json)")
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
