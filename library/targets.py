"""Where a command's outcome goes: looked at before hours of work, not after; and of a command that
writes one file at its end, what is done so far, so that the same command goes on."""

import base64
import contextlib
import csv
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from library.terminal import Stop, typed


def check_target(path: Path, flag: str):
    """Stop where a file cannot be written, nor a folder made for it. It leaves nothing behind."""
    if path.is_dir():
        raise Stop(f"{path}: expected a file's name, found a folder; give another {flag}")
    if path.exists() and not path.is_file():  # a pipe, or /dev/stdout
        return
    folder = next(place for place in path.absolute().parents if os.path.lexists(place))
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise Stop(f"{path}: cannot be written there: {reason}; give another {flag}") from None


def check_table(path: Path, columns: list[str], verb: str):
    """As `check_target`, of a --csv; Stop where a table lies there whose first columns are others
    than those that this verb writes: it is the user's own."""
    check_target(path, "--csv")
    if not path.is_file() or not path.stat().st_size:
        return
    found: list[str] = []
    with contextlib.suppress(csv.Error), open(
        path, newline="", encoding="utf-8", errors="replace"
    ) as file:
        found = next(csv.reader(file), [])
    if found[: len(columns)] != columns:
        other = typed(path.with_name(f"{path.stem}-{verb}.csv"))
        raise Stop(
            f"{path}: there is a file that `{verb}` did not write, and it stays as it is; give "
            f"another place, as in --csv {other}"
        )


class Journal:
    """What is done of a command whose one file comes at its end: a line a recording in FILE.part,
    which outlives Ctrl-C, a kill and a full disk.

    A line is known by its `source`: all that the numbers depend on, the network's weights and the
    file's size and time among it. Lines of another tagger, or of a file as it was before it
    changed, are passed over."""

    def __init__(self, target: Path):
        self.path = target.with_name(f"{target.name[:200]}.part")
        self.lines = self.read()
        self.file = None

    def read(self) -> dict[str, dict]:
        """The lines of a command that was cut off, by their source."""
        lines: dict[str, dict] = {}
        with contextlib.suppress(FileNotFoundError), open(self.path, "rb") as file:
            for text in file:
                with contextlib.suppress(ValueError, KeyError, TypeError):  # the last may be half
                    line = json.loads(text)
                    row = np.frombuffer(base64.b64decode(line["row"]), np.float32)
                    lines[line["source"]] = {**line, "row": row}
        return lines

    def of(self, sources: dict[Path, str]) -> dict[Path, dict]:
        """Of recordings with these sources those that are done, with their lines."""
        return {file: self.lines[one] for file, one in sources.items() if one in self.lines}

    def note(self, source: str, row: np.ndarray, **more):
        """A recording is done: its numbers (D,)."""
        if self.file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "ab")
        text = base64.b64encode(np.asarray(row, np.float32).tobytes()).decode()
        line = json.dumps({"source": source, "row": text, **more})
        # A line break before it as well, for the line above it may have been cut off.
        self.file.write(f"\n{line}\n".encode())
        self.file.flush()

    def end(self):
        """The file that all this was for is written."""
        if self.file:
            self.file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
