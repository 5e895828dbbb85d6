"""`embed`: what the encoder makes of recordings, for one's own programs.

Leaves, of every file, OUT/NAME.npz: `embedding` (n, D) float32, one row a window, `timestamps`
(n,), where the windows start in seconds, and `source`, what the rows depend on. With --one-file
instead OUT.npz: `embedding` (N, D), the mean of each file's windows, and `id` (N,), its name; until
all files are done, what is done lies in OUT.npz.part."""

import contextlib
import os
import zipfile
from pathlib import Path

import numpy as np

from library.listen import files_of
from library.network import Network, hear_whole, load_network, source_of
from library.targets import Journal, check_target
from library.terminal import Stop, as_json, padded, print_json, printable, progress, report


def is_done(target: Path, source: str) -> bool:
    """Was this very source embedded before? ValueError where something else lies there."""
    if not target.exists():
        return False
    was = None
    with contextlib.suppress(ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile), np.load(
        target
    ) as old:
        was = str(old["source"])
    if was != source:
        raise ValueError(
            f"{target} is damaged, or of another recording, encoder or --hop; type --overwrite, "
            "or another --out"
        )
    return True


def save(target: Path, **arrays):
    """An npz that is either there and whole, or not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name[:200]}.partial.npz")
    with open(partial, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)


def what_is_left(
    targets: dict[Path, Path], network: Network, args
) -> tuple[list[Path], list[tuple]]:
    """Files that are not embedded yet, and [(file, why not)] of those whose place is taken."""
    todo = []
    failed = []
    for file, target in targets.items():
        try:
            if args.overwrite or not is_done(target, source_of(network, args.hop, file)):
                todo.append(file)
        except (OSError, ValueError) as error:
            failed.append((file, str(error).removeprefix(f"{file}: ")))
    return todo, failed


def run(args) -> int:
    """The verb."""
    check_target(target_of(args), "--out")
    network = load_network(args.ckpt, args.features, args.device, args.amp, most=None)
    files, left_out = files_of(args.paths)
    if args.one_file:
        return in_one_file(files, left_out, network, args)
    targets = {file: args.out / f"{name}.npz" for name, file in files.items()}
    todo, failed = what_is_left(targets, network, args)
    before = len(targets) - len(todo) - len(failed)
    with progress(len(todo), "embedding") as bar:
        for file, result in hear_whole(todo, network, args.hop, args.workers, args.timeout):
            bar.update()
            if isinstance(result, str):
                failed.append((file, result))
                continue
            rows, starts, short = result
            source = source_of(network, args.hop, file)
            save(targets[file], embedding=rows, timestamps=starts, source=source)
            if not args.json:
                bar.write(f"{printable(targets[file])} {rows.shape}{padded(short)}")
    return close(targets, before, failed, left_out, args)


def target_of(args) -> Path:
    """The one file of --one-file, else a file in the folder of many."""
    if args.one_file:
        return args.out.with_name(f"{args.out.name.removesuffix('.npz')}.npz")
    return args.out / "one.npz"


def in_one_file(files: dict[str, Path], left_out: list[tuple], network: Network, args) -> int:
    """--one-file: a matrix of the files' means, and their names in its order."""
    target = target_of(args)
    if target.exists() and not args.overwrite:
        raise Stop(f"{target} is there already: type --overwrite, or another --out")
    journal = Journal(target)
    sources = {file: source_of(network, args.hop, file) for file in files.values()}
    kept = journal.of(sources)
    names = {file: name for name, file in files.items()}
    failed: list[tuple] = []
    means = {names[file]: line["row"] for file, line in kept.items()}
    todo = [file for file in names if file not in kept]
    with progress(len(todo), "embedding") as bar:
        for file, result in hear_whole(todo, network, args.hop, args.workers, args.timeout):
            bar.update()
            if isinstance(result, str):
                failed.append((file, result))
                continue
            means[names[file]] = result[0].mean(0)
            journal.note(sources[file], means[names[file]])
    if means:
        order = sorted(means)
        save(
            target,
            embedding=np.stack([means[name] for name in order]),
            id=np.array(order),
            identity=network.identity,
        )
        journal.end()
    return close({file: target for file in names}, len(kept), failed, left_out, args)


def close(
    targets: dict[Path, Path], before: int, failed: list[tuple], left_out: list[tuple], args
) -> int:
    """The closing lines, and the exit code."""
    done = len(targets) - len(failed)
    if args.json:
        print_json(
            {
                "embedded": done,
                "before": before,
                "failed": as_json(failed),
                "left_out": as_json(left_out),
                "files": sorted({os.fsdecode(target) for target in targets.values()}),
            }
        )
        return int(bool(failed))
    print(f"{done} of {len(targets)} files embedded, {before} of them before")
    report("left out", left_out)
    report("failed", failed)
    if done:
        example = next(target for file, target in targets.items() if file not in dict(failed))
        print(f"next: in Python, numpy.load({printable(repr(os.fsdecode(example)))})['embedding']")
    return int(bool(failed))
