"""The command around an evaluation: which data, which files, and how it ends."""
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

# flags that are no part of a result's name

UNNAMED = {"ckpt", "data", "random", "seeds", "device", "out", "export", "neighbours"}

def check(parser, args, given: dict, encoders):
    """End with one line where evaluate.py's flags make no sense together. given: those that are not
    as by default; encoders: the kinds that there are."""
    missing = [str(path) for path in (args.ckpt, *args.features_from) if path and not path.exists()]
    numbers = [args.seeds, args.epochs, args.min_steps, args.batch_size, args.hidden + 1]
    names = [path.stem for path in args.features_from]
    for wrong, what in (
            (len({*names, "untrained"}) <= len(names), "--features-from: a row is named after its "
             f"file: expected different names, none of them untrained, got {', '.join(names)}"),
            (missing, f"{', '.join(missing)}: no such file"),
            (not (args.ckpt or args.random or args.supervised or args.features_from),
             "type --ckpt runs/NAME/encoder.pt"),
            (not all(0 < f <= 1 for f in args.fraction), "--fraction is in (0, 1], e.g. 0.01 1"),
            (args.hidden and args.probe != "adam", "--hidden is of --probe adam: leave it out"),
            (args.encoder not in encoders, f"--encoder: there are {', '.join(encoders)}"),
            (args.ckpt and given.keys() & {"encoder", "width"},
             "--ckpt says what encoder it is: leave out --encoder, --width"),
            (not 0 < args.width < math.inf, "--width is a number above 0, e.g. 0.125"),
            (args.out and args.out.is_dir(), f"--out: {args.out} is a folder"),
            (min(n for n in numbers if n is not None) < 1 or args.neighbours < 0,
             "--seeds, --epochs ... are at least 1")):
        if wrong:
            parser.error(what)

def require_fit(info: dict, clips):
    """ValueError where an encoder, by its info, cannot be evaluated on the clips."""
    if clips.task == "none":
        raise ValueError(f"{clips.name} has no labels: expected tagged data, e.g. prepared with "
                         "--labels FILE.csv, or several folders with the same tags")
    rate = info.get("sample_rate")
    if rate not in (None, clips.sample_rate):
        raise ValueError(f"the encoder works at {rate} Hz, {clips.name} is at {clips.sample_rate} "
                         f"Hz: prepare it again with --sample-rate {rate}")

def trained_on(info: dict, load: Callable):
    """The prepared data that the encoder with this info was trained on, in its folder or under its
    name. load(name, or names of several that are one set) -> clips, or ValueError or OSError, which
    is raised where none can be had."""
    missing = FileNotFoundError("NAME: say what to evaluate on")
    folders = info.get("data_folder") or ""  # several are parted by spaces, which one may have, too
    found = []
    for name in filter(None, (folders, folders.split(), info.get("data"))):
        try:
            found.append(load(name))
        except (ValueError, OSError) as error:  # another one's folder, perhaps, that cannot be read
            missing = error
    for clips in found:
        if clips.fingerprint == info["fingerprint"]:
            return clips
    if found:
        return found[0]
    raise missing

def home_of(ckpt: Path | None) -> Path:
    """Where results go: beside the checkpoint of a run; a file from elsewhere, as those in demo/,
    has a folder of its own."""
    if ckpt is None:
        return Path("runs")
    if (ckpt.parent / "log.jsonl").exists():
        return ckpt.parent
    return Path("runs", f"{ckpt.resolve().parent.name}-{ckpt.stem}")

def file_name(data: str, flags: dict) -> str:
    """Of a result, after its data and what was asked for.

    >>> file_name("mtat", {"hidden": 512, "fraction": (0.01, 1.0), "min_steps": 10, "seeds": 1})
    'evaluate-mtat-fraction-0.01-1.0-hidden-512-min-steps-10.json'
    """
    parts = ["evaluate", data]
    for name in sorted(flags.keys() - UNNAMED):
        values = flags[name] if isinstance(flags[name], (list, tuple)) else [flags[name]]
        parts += [name.replace("_", "-"), *(str(getattr(v, "stem", v)) for v in values)]
    return "-".join(parts) + ".json"

def tagger_name(folder: Path, data: str) -> str:
    """`tagger`, or, where the folder has that of other data, `tagger-DATA`: it stays."""
    try:
        other = json.loads((folder / "tagger.ts.json").read_text(encoding="utf-8"))["data"]
    except (OSError, ValueError, KeyError):
        return "tagger"
    return "tagger" if other == data else f"tagger-{data}"

@contextlib.contextmanager
def shown_at_last(table: str, paths: Sequence[Path] = ()):
    """Write the files of a result in this context: whether they can be written or not, its table is
    printed; whether anybody reads that or not, they are written. paths: those to name, if there."""
    try:
        yield
    finally:
        print(table, *(path for path in paths if path.exists()), sep="\n")

def one_line(program: str, work: Callable) -> int:
    """The exit code of work(); of what goes wrong one line on stderr, and no traceback. A bug keeps
    its traceback: RuntimeError is caught where it means too little memory."""
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError):  # there is none, or a notebook's
                stream.reconfigure(errors="backslashreplace")  # names of files in any encoding
        code = work()
        print(end="", flush=True)
        return code
    except KeyboardInterrupt:
        what = "interrupted; features that were computed are kept"
    except BrokenPipeError:  # who reads has read enough, as `head` has
        what = ""
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        what = f"error: {str(error).strip().splitlines()[0]}"
    try:
        print(end="", flush=True)
    except OSError:  # a closed pipe, a full disk: else Python tries again at its end, and complains
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if what:
        print(f"{program}: {what}", file=sys.stderr)
    return 1
