"""Tables of labels: CSV files as people write them, and who is in which split with which tags.

`read_table` reads the published tables, `read_labels` the one that a user gives to
`prepare.py --data folder --labels FILE.csv`. Both take what is there, or say in which line it is
wrong.
"""

import bisect
import csv
import gzip
import hashlib
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable

KNOWN = ("", "file", "split", "group", "artist")  # columns that are no tags
SPLITS = {"train": "train", "valid": "valid", "validation": "valid", "val": "valid", "test": "test"}


def nfc(text: str) -> str:
    """Text in the one spelling that Unicode calls NFC: an accent may be a letter of its own."""
    return unicodedata.normalize("NFC", text)


def read_lines(path, headers: int = 1, strict: bool = False) -> tuple[list[str], list]:
    """Read a CSV: comma, semicolon or tab; plain or .gz; Excel's first line `sep=;` is understood.

    Args:
        path: the file; where it is missing, the same name with .gz.
        headers: rows of column names; of several the names are joined by dots.
        strict: refuse a quote that stands or ends in the wrong place.

    Returns (columns, [(line, {column: text})]), the line in which each row begins, counted from 1.
    """
    path = Path(path) if Path(path).exists() else Path(f"{path}.gz")
    if not path.exists():
        raise FileNotFoundError(f"{path.with_suffix('')}: expected this table, but it is not there")
    csv.field_size_limit(1 << 24)
    line = 0
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
            first = file.readline()
            told = re.fullmatch(r'"?sep=(.)"?\s*', first)
            separator = told[1] if told else max(",;\t", key=first.count)
            if not told:
                file.seek(0)
            reader = csv.reader(file, delimiter=separator, strict=strict)
            names = zip(*(next(reader, []) for _ in range(headers)))
            columns = [nfc(".".join(parts).strip()) for parts in names]
            rows = []
            while True:
                line = reader.line_num + bool(told) + 1
                fields = next(reader, None)
                if fields is None:
                    return columns, rows
                if any(fields[len(columns):]):
                    raise ValueError(f"{path}, line {line}: more fields than the {len(columns)} "
                                     "columns; put a field that holds the separator in quotes")
                if any(fields):
                    fields += [""] * len(columns)
                    rows.append((line, dict(zip(columns, fields))))
    except csv.Error as error:
        reason = "a quote opens there and never closes" if "end of data" in str(error) else error
        raise ValueError(f"{path}, line {line}: {reason}") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a CSV in UTF-8: {error}") from None


def read_table(path, headers: int = 1) -> tuple[list[dict], list[str]]:
    """A published CSV: (rows as dicts, columns)."""
    columns, rows = read_lines(path, headers)
    return [row for _, row in rows], columns


# ---------------------------------------------------------------------------------- a user's labels

@dataclass
class Form:
    """What a user's table says of the labels: in a column `tags` or `label`, or in a column per
    tag."""
    column: str  # "tags", "label" or ""
    names: list  # columns of 0 and 1
    split: bool  # is there a column `split`?

    @property
    def task(self) -> str:
        """multilabel, singlelabel or none."""
        if self.column == "label":
            return "singlelabel"
        return "multilabel" if self.column or self.names else "none"


def read_labels(path, root, files: dict, aliases: dict | None = None) -> tuple[list[dict], dict]:
    """Match a user's table with the recordings below `root`.

    Args:
        path: a CSV with a column `file` (relative to root, or absolute), optionally `split` (train,
            valid, test), `group` (clips of one song share it) and `artist`, and either `tags`
            ("a; b; c"), or `label`, or one column of 0 and 1 per tag. Beside `tags` or `label`
            further columns are ignored.
        root: the folder of the recordings.
        files: {name: path} of what is there.
        aliases: {name: name among files} of what a link leads to a second time.

    Returns (rows, about): a dict per row, in the order of the names, with id, file (None where it
    is not there), split, group, tags, artist; and of the whole task, tags, split_name, skipped,
    hints. Without a column `split`, labelled songs are dealt 80 : 10 : 10 by `deal`.
    """
    columns, lines = read_lines(path, strict=True)
    form = _form(path, columns)
    known = _Names(root, files, aliases or {})
    rows = {}
    for line, fields in lines:
        fields = {column: nfc(text.strip()) for column, text in fields.items()}
        name = known.find(fields["file"])
        if name in rows:
            raise ValueError(f"{path}, line {line}: {name} stands there a second time")
        try:
            rows[name] = _row(name, fields, form, files)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
    if form.task != "none" and not any(row["tags"] for row in rows.values()) and rows:
        raise ValueError(f"{path}: expected tags, but no row has one; without that column the "
                         "recordings are prepared without labels")
    about = {"task": form.task,
             "tags": form.names or sorted({tag for row in rows.values() for tag in row["tags"]}),
             "split_name": _split(rows, form, Path(path).name),
             "others": [{"file": name, "reason": f"no row in {Path(path).name}"}
                        for name in sorted(files) if name not in rows],
             "hints": _hints(rows.values(), form)}
    return [rows[name] for name in sorted(rows)], about


def _split(rows, form, source):
    """Deal songs to splits where the table has none; the split's name."""
    if form.split:
        return f"column split of {source}"
    if form.task == "none":
        return "all train"
    splits = deal(row["group"] for row in rows.values())
    for row in rows.values():
        row["split"] = splits[row["group"]]
    return "80:10:10 by song"


def _form(path, columns):
    """What the columns say, or a ValueError."""
    twice = sorted(name for name, n in Counter(columns).items() if n > 1 and name)
    if twice:
        raise ValueError(f"{path}: the column `{twice[0]}` stands there twice")
    forms = sorted({"tags", "label"} & set(columns))
    if "file" not in columns or len(forms) > 1:
        raise ValueError(f"{path}: expected a column `file`, and one of `tags` and `label` at "
                         f"most; found {', '.join(columns)}")
    names = [] if forms else [column for column in columns if column not in KNOWN]
    return Form(forms[0] if forms else "", names, "split" in columns)


def _row(name, fields, form, files):
    """A row as a dict; ValueError says what is wrong with it."""
    for tag in form.names:
        if fields[tag] not in ("0", "1"):
            raise ValueError(f"expected 0 or 1 in the tag column `{tag}`, found {fields[tag]!r}; "
                             "for other columns to be ignored, give the tags in one column `tags` "
                             "or `label`")
    split = fields.get("split", "train")
    if split not in SPLITS:
        raise ValueError(f"expected train, valid or test in the column `split`, found {split!r}")
    tags = [tag for tag in form.names if fields[tag] == "1"]
    if form.column == "label":
        if not fields["label"]:
            raise ValueError(f"{name} has no label")
        tags = [fields["label"]]
    elif form.column == "tags":
        tags = [tag.strip() for tag in fields["tags"].split(";") if tag.strip()]
    return {"id": name, "file": files.get(name), "split": SPLITS[split],
            "group": fields.get("group") or name, "tags": tuple(tags),
            "artist": fields.get("artist", "")}


class _Names:
    """Finds what a table means: a name relative to the root or absolute, perhaps with Windows'
    separators, or by another link."""

    def __init__(self, root, files, aliases):
        self.files = files
        self.aliases = aliases
        paths = [Path(spell(root)).as_posix() for spell in (os.path.normpath, os.path.abspath,
                                                            os.path.realpath)]
        starts = [nfc(f"{path}/") for path in paths]
        inside = [start for start in starts if not any(name.startswith(start) for name in files)]
        self.starts = ["", "./", *inside]

    def find(self, text):
        """The name among the files, or the text itself where it is none of them."""
        spellings = [form.removeprefix(start)
                     for form in (text, text.replace("\\", "/")) for start in self.starts]
        for name in spellings:
            name = self.aliases.get(name, name)
            if name in self.files:
                return name
        return spellings[1]


def deal(songs: Iterable[str]) -> dict[str, str]:
    """{song: split}, 80 : 10 : 10 by a hash of its name, so that a song always lands in the same
    split.

    Where chance would leave one empty, the songs whose hashes are nearest make room: three songs
    are enough for three splits.

    >>> sorted(deal(["a", "b", "c"]).values())
    ['test', 'train', 'valid']
    """
    digest = {}
    for song in songs:
        digest[song] = hashlib.sha256(song.encode("utf-8", "surrogateescape")).digest()
    order = sorted(digest, key=digest.get)
    first_bytes = [digest[song][0] for song in order]
    trained = bisect.bisect_left(first_bytes, 205)  # of 256: four fifths
    validated = bisect.bisect_left(first_bytes, 230)
    if len(order) >= 3:
        trained = max(1, min(trained, len(order) - 2))
        validated = max(trained + 1, min(validated, len(order) - 1))
    else:
        trained = 1
        validated = 1
    splits = ["train"] * trained + ["valid"] * (validated - trained)
    splits += ["test"] * (len(order) - len(splits))
    return dict(zip(order, splits))


def _hints(rows, form):
    """What looks like a slip: other separators than the semicolon, tags that differ by case
    alone."""
    hints = []
    labelled = [row["tags"] for row in rows if row["tags"]]
    odd = [tags for tags in labelled if any("," in tag or "|" in tag for tag in tags)]
    if form.column == "tags" and 2 * len(odd) >= len(labelled) and odd:
        hints.append(f"{len(odd)} of {len(labelled)} rows have a comma or | within a tag, as "
                     f"{odd[0][0]!r}: tags are parted by semicolons")
    spellings = {}
    parts = {part.strip() for tags in labelled for tag in tags for part in re.split("[,|]", tag)}
    for tag in sorted(parts):
        spellings.setdefault(tag.casefold(), []).append(tag)
    for tags in spellings.values():
        if len(tags) > 1:
            hints.append(f"tags that differ by case alone: {', '.join(map(repr, tags))}")
    return hints
