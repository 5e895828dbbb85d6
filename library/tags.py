"""`tag`: what a tagger hears in a song, or in every song of a folder.

A song's probability of a tag is the mean over its windows. A folder gives one row a song in a CSV:
`file` (absolute, so that `map` finds it from anywhere), `top` (the tags above a half, else the
first one), and a column a tag. Until all songs are done, what is done lies in CSV.part; the table
itself is only ever written over another of `tag`."""

import csv
import os
from pathlib import Path

import numpy as np

from library.listen import files_of
from library.network import Network, hear_whole, load_network, source_of
from library.targets import Journal, check_table, check_target
from library.terminal import Stop, as_json, padded, print_json, printable, progress, report

FIRST = ["file", "top"]  # columns of a table


def over_time(path: Path, song: Path, rows: np.ndarray, starts: np.ndarray, network: Network):
    """A picture of the probabilities rows (n, K) of a song's first ten tags over time."""
    from matplotlib.figure import Figure

    best = rows.mean(0).argsort()[::-1][:10]
    figure = Figure((10, 0.3 * len(best) + 1), layout="constrained")
    axes = figure.add_subplot()
    extent = (0, starts[-1] + network.size / network.sample_rate, len(best) - 0.5, -0.5)
    picture = axes.imshow(rows[:, best].T, aspect="auto", vmin=0, extent=extent)
    figure.colorbar(picture, label="probability")
    axes.set(yticks=range(len(best)), yticklabels=[network.tags[k] for k in best], xlabel="seconds")
    axes.set_title(printable(song.stem), parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def top(mean: np.ndarray, tags: list[str]) -> list[str]:
    """The tags above a half, the likeliest first; where there is none, the likeliest.

    >>> top(np.array([0.1, 0.6, 0.9]), ["a", "b", "c"])
    ['c', 'b']
    """
    order = mean.argsort()[::-1]
    return [tags[k] for k in order if mean[k] > 0.5] or [tags[order[0]]]


def write_csv(path: Path, songs: dict[Path, np.ndarray], tags: list[str]):
    """One row a song; names that are not UTF-8 with their bytes as backslash escapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        lines = csv.writer(file)
        lines.writerow([*FIRST, *tags])
        for song in sorted(songs):
            mean = songs[song]
            lines.writerow(
                [os.path.abspath(song), "; ".join(top(mean, tags)), *(f"{p:.4f}" for p in mean)]
            )
    partial.replace(path)


def show(song: Path, mean: np.ndarray, tags: list[str], short: bool, count: int) -> str:
    """A song's likeliest tags, a line each."""
    best = mean.argsort()[::-1][:count]
    return "\n".join(
        [
            f"{printable(song)}{padded(short)}",
            *(f"  {mean[k]:6.1%}  {printable(tags[k])}" for k in best),
        ]
    )


def table_of(args) -> Path | None:
    """The table that a command leaves; of songs that are named, none but what is asked for."""
    return args.csv or (Path("tags.csv") if any(path.is_dir() for path in args.paths) else None)


def check(args):
    """Stop where the outcome cannot be written, or not as it is asked for."""
    if table_of(args):
        check_table(table_of(args), FIRST, "tag")
    if not args.plot:
        return
    if any(path.is_dir() for path in args.paths):
        raise Stop("--plot draws a song, not a folder; type: python -m library tag SONG --plot")
    if len({file.name for file in args.paths}) < len({*args.paths}):
        raise Stop(
            "--plot: two of the files have one name, and so would their pictures: tag them one by "
            "one, each with an --out"
        )
    check_target(args.out / f"{args.paths[0].name}.png", "--out")


def run(args) -> int:
    """The verb."""
    check(args)
    network = load_network(args.ckpt, "tags", args.device, args.amp)
    files, left_out = files_of(args.paths)
    table = table_of(args)
    journal = Journal(table) if table else None
    songs, failed = hear(list(files.values()), network, journal, args)
    if table and songs:
        write_csv(table, songs, network.tags)
        journal.end()
    return close(songs, (failed, left_out), table, network.tags, args)


def hear(
    files: list[Path], network: Network, journal: Journal | None, args
) -> tuple[dict[Path, np.ndarray], list[tuple]]:
    """Every song's probabilities (K,), those that a command before it came to among them, and
    [(song, why not)]."""
    sources = {song: source_of(network, args.hop, song) for song in files}
    kept = journal.of(sources) if journal and not args.plot else {}
    songs = {song: line["row"] for song, line in kept.items()}
    failed: list[tuple] = []
    todo = [song for song in files if song not in kept]
    with progress(len(todo), "tagging") as bar:
        for song, result in hear_whole(todo, network, args.hop, args.workers, args.timeout):
            bar.update()
            if isinstance(result, str):
                failed.append((song, result))
                continue
            rows, starts, short = result
            songs[song] = rows.mean(0)
            if not any(path.is_dir() for path in args.paths) and not args.json:
                bar.write(show(song, songs[song], network.tags, short, args.top))
            if args.plot:
                over_time(args.out / f"{song.name}.png", song, rows, starts, network)
            if journal:
                journal.note(sources[song], songs[song])
    return songs, failed


def close(
    songs: dict[Path, np.ndarray],
    others: tuple[list[tuple], list[tuple]],
    table: Path | None,
    tags: list[str],
    args,
) -> int:
    """The closing lines, and the exit code; others: what failed, and what was left out."""
    failed, left_out = others
    if args.json:
        heard = [
            {
                "file": os.fspath(song),
                "tags": {
                    tags[k]: round(float(songs[song][k]), 4)
                    for k in songs[song].argsort()[::-1][: args.top]
                },
            }
            for song in sorted(songs)
        ]
        faults = {"failed": as_json(failed), "left_out": as_json(left_out)}
        print_json({"songs": heard, **faults})
        return int(bool(failed))
    if table:
        print(
            f"{len(songs)} of {len(songs) + len(failed)} songs tagged"
            + f": {printable(table)}" * bool(songs)
        )
    report("left out", left_out)
    report("failed", failed)
    if songs:
        print("next: python -m library index FOLDER    # then similar, map, duplicates")
    return int(bool(failed))
