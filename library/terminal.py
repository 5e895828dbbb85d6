"""What a person sees: text that cannot steer the terminal, one progress bar, failures at the
end."""

import json
import os
import shlex
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

USUAL = Path("library.clmr")  # the store where none is named

# Control and formatting characters, surrogates, private and unassigned ones, line and paragraph
# separators.
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


class Stop(Exception):
    """An end with one line for the user: what was expected, what came, what to type."""


class WrongCommand(Stop):
    """The command cannot be meant so: exit code 2."""


def printable(text) -> str:
    r"""Text without control characters and without what is not UTF-8: names and tags come from
    strangers.

    >>> printable("a\x1b[31mb" + chr(0xDCFF))
    'a\\x1b[31mb\\udcff'
    """
    text = os.fsdecode(text) if isinstance(text, (bytes, os.PathLike)) else str(text)
    return "".join(
        (
            letter
            if unicodedata.category(letter) not in UNSEEN
            else letter.encode("unicode_escape").decode()
        )
        for letter in text
    )


def typed(path) -> str:
    """A path as a shell takes it, inside a command to type.

    >>> typed("my lib.clmr"), typed("-n.csv")
    ("'my lib.clmr'", './-n.csv')
    """
    text = os.fsdecode(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def named(folders: list[Path]) -> str:
    """` --library FOLDER` for a command to type, where that is not the usual one."""
    if folders == [USUAL]:
        return ""
    return f" --library {' '.join(map(typed, folders))}"


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds.

    >>> clock(245.3)
    '4:05'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def progress(total: int | None, what: str) -> tqdm:
    """The bar: songs done, songs a second, time left; every 15 s a line where nobody looks on."""
    return tqdm(
        total=total,
        desc=what,
        unit="song",
        smoothing=0.1,
        dynamic_ncols=True,
        disable=sys.stderr is None,
        mininterval=0.5 if sys.stderr and sys.stderr.isatty() else 15,
    )


def padded(short: bool) -> str:
    """What is said of a recording that is shorter than a window."""
    return ", shorter than a window, padded with silence" * short


def report(what: str, files: Iterable[tuple]):
    """One line `WHAT: FILE: why` for each."""
    for path, reason in files:
        print(f"{what}: {printable(path)}: {printable(reason)}")


def as_json(files: Iterable[tuple]) -> list[dict]:
    """Failures, and what was left out, as `print_json` takes them."""
    return [{"file": os.fsdecode(path), "reason": reason} for path, reason in files]


def print_json(value):
    """A value for programs: names that are not UTF-8 keep their bytes as surrogates, escaped."""
    print(json.dumps(value, indent=1, ensure_ascii=True))


def table(rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """Rows of text as aligned columns; `right`: the columns that are numbers."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        [
            cell.rjust(w) if k in right else cell.ljust(w)
            for k, (cell, w) in enumerate(zip(row, widths))
        ]
        for row in rows
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)
