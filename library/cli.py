"""What one types: the verbs, their flags, and how they end.

    python -m library index ~/music                                       # -> library.clmr/
    python -m library similar Song.mp3 --n 20 --per-artist 2 --m3u list.m3u8
    python -m library path A.mp3 B.mp3 --n 15 --m3u trip.m3u8
    python -m library duplicates --csv duplicates.csv
    python -m library tag ~/music --csv tags.csv
    python -m library map
    python -m library embed ~/music --out embeddings/

Exit codes: 0 done; 1 failed, or done but for the files that are listed as failed; 2 a wrong
command."""

import argparse
import contextlib
import os
import re
import sys
from importlib import import_module
from pathlib import Path

from library.terminal import USUAL, Stop, WrongCommand, printable, typed

VERBS = {
    "index": ("index", "hear every song of a folder, once; again: only what is new or changed"),
    "similar": ("search", "songs that sound like one, or like several"),
    "path": ("search", "a smooth way from one song to another"),
    "duplicates": ("duplicates", "one recording in several files"),
    "tag": ("tags", "what a tagger hears"),
    "map": ("page", "the collection as a map in a browser, one HTML file"),
    "embed": ("embed", "the encoder's numbers of recordings, as npz"),
}
EXAMPLES = {
    "index": "python -m library index ~/music",
    "similar": "python -m library similar Song.mp3 --n 20 --per-artist 2 --m3u list.m3u8",
    "path": "python -m library path A.mp3 B.mp3 --n 15 --m3u trip.m3u8",
    "duplicates": "python -m library duplicates --csv duplicates.csv",
    "tag": "python -m library tag Song.mp3 --plot",
    "map": "python -m library map --out map.html",
    "embed": "python -m library embed ~/music --out embeddings/",
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Every default is shown, but for None and False, which say nothing."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """An integer above 0."""
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time in seconds, above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e6:
            return value
    raise argparse.ArgumentTypeError(f"expected seconds, above 0, got {text!r}")


def shard(text: str) -> tuple[int, int]:
    """I/N as (i, n), 1 <= i <= n."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N, as in 2/4, got {text!r}")
    return int(found[1]), int(found[2])


def add_hearing(parser, what: str):
    """The flags of verbs that listen to files."""
    add = parser.add_argument_group("listening").add_argument
    add("--ckpt", type=Path, metavar="FILE", help=f"{what} (default: the one that ships)")
    add("--workers", type=positive, metavar="N", default=os.cpu_count(), help="decoding processes")
    add(
        "--timeout",
        type=seconds,
        metavar="S",
        default=300.0,
        help="seconds after which a file is given up",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where the network runs")
    add(
        "--amp",
        choices=["auto", "off", "bf16", "fp16"],
        default="off",
        help="its precision; auto: half where the machine has it, for large networks",
    )


def add_playlist(parser):
    """The flags of verbs that give a list of songs."""
    add = parser.add_argument_group("list").add_argument
    add("--per-artist", type=positive, metavar="N", help="at most so many of an artist")
    add("--per-album", type=positive, metavar="N", help="at most so many of an album")
    add("--copies", action="store_true", help="also further copies of a recording")
    add("--m3u", type=Path, metavar="FILE", help="write a playlist")
    add("--relative", action="store_true", help="with paths relative to the playlist")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = argparse.ArgumentParser(
        prog="library",
        allow_abbrev=False,
        description="What one does with an encoder and a music collection.",
        usage="python -m library VERB [...]   (each verb has its own --help)",
    )
    verbs = parser.add_subparsers(
        dest="verb", metavar="VERB", required=True, prog="python -m library"
    )
    made = {}
    for verb, (_, text) in VERBS.items():
        made[verb] = verbs.add_parser(
            verb,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            allow_abbrev=False,
            epilog=f"example: {EXAMPLES[verb]}",
            formatter_class=Help,
        )
    add_index(made["index"])
    add_similar(made["similar"])
    add_path(made["path"])
    add_duplicates(made["duplicates"])
    add_tag(made["tag"])
    add_map(made["map"])
    add_embed(made["embed"])
    for verb, sub in made.items():
        several = "*" if verb not in ("index", "tag", "embed") else None
        if verb not in ("tag", "embed"):
            sub.add_argument(
                "--library",
                type=Path,
                metavar="DIR",
                default=[USUAL],
                action=Folders,
                nargs="+" if several else None,
                help="the store" + "; several count as one" * bool(several),
            )
        sub.add_argument("--json", action="store_true", help="the outcome as JSON, for programs")
    return parser


class Folders(argparse.Action):
    """One path or several, always as a list."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values if isinstance(values, list) else [values])


def add_index(parser):
    """Flags of index."""
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="with music, searched to its depths"
    )
    parser.add_argument(
        "--windows",
        choices=["ten", "all"],
        help="ten, spread over the song, or all of it, kept one by one beside their mean "
        "(default: as the store has it, at first ten)",
    )
    parser.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="only part I of N, on one of N machines, each with a --library of its own (in an "
        "array job I is $SLURM_ARRAY_TASK_ID); every other verb takes them all: --library A B",
    )
    parser.add_argument(
        "--retry",
        action="store_true",
        help="try files again that failed, though they are unchanged",
    )
    add_hearing(parser, "encoder.pt")


def add_similar(parser):
    """Flags of similar."""
    parser.add_argument(
        "songs", nargs="+", type=Path, metavar="SONG", help="in the store, or any other file"
    )
    parser.add_argument("--n", type=positive, default=20, help="how many")
    parser.add_argument(
        "--any",
        action="store_true",
        help="of several songs: near any of them, not near their centre",
    )
    parser.add_argument(
        "--other-albums", action="store_true", help="nothing from the albums of the songs named"
    )
    add_playlist(parser)
    add_hearing(parser, "encoder.pt, for songs that are not in the store")


def add_path(parser):
    """Flags of path."""
    parser.add_argument("songs", nargs=2, type=Path, metavar="SONG", help="from, to")
    parser.add_argument("--n", type=positive, default=15, help="how many, both ends counted")
    add_playlist(parser)
    add_hearing(parser, "encoder.pt, for songs that are not in the store")


def add_duplicates(parser):
    """Flags of duplicates."""
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write them as a table")
    parser.add_argument(
        "--least",
        type=float,
        metavar="SCORE",
        default=0.45,
        help="from which on files are one recording; 0.75: one master",
    )


def add_tag(parser):
    """Flags of tag."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="SONG|FOLDER", help="what to tag")
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="a row a song, never over a table of your own (default: of folders tags.csv)",
    )
    parser.add_argument(
        "--plot", action="store_true", help="also a picture over time, SONG.png in --out"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path(), help="where pictures go")
    parser.add_argument(
        "--top", type=positive, metavar="N", default=10, help="so many tags of a song"
    )
    parser.add_argument(
        "--hop", type=seconds, metavar="S", help="seconds from window to window (default: a window)"
    )
    add_hearing(parser, "tagger.pt")


def add_map(parser):
    """Flags of map."""
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("library.html"), help="the page"
    )
    parser.add_argument(
        "--tags", type=Path, metavar="FILE", help="a table of `tag FOLDER --csv`, to colour by"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the layout")


def add_embed(parser):
    """Flags of embed."""
    parser.add_argument("paths", nargs="+", type=Path, metavar="SONG|FOLDER", help="what to embed")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("embeddings"),
        help="one npz a file goes here",
    )
    parser.add_argument(
        "--one-file",
        action="store_true",
        help="instead OUT.npz: a matrix of the songs' means, and ids",
    )
    parser.add_argument(
        "--features",
        choices=["output", "levels"],
        default="output",
        help="the encoder's output, or every block's mean and maximum over time",
    )
    parser.add_argument(
        "--hop", type=seconds, metavar="S", help="seconds from window to window (default: a window)"
    )
    parser.add_argument("--overwrite", action="store_true", help="also what is embedded already")
    add_hearing(parser, "encoder.pt, or its TorchScript")


def check(args):
    """WrongCommand where paths are not there; it says which."""
    named = [
        *getattr(args, "folders", ()),
        *getattr(args, "paths", ()),
        getattr(args, "ckpt", None),
        getattr(args, "tags", None),
    ]
    for path in filter(None, named):
        if not os.path.exists(path):
            raise WrongCommand(f"{path}: no such file or folder")
    for path in getattr(args, "folders", ()):
        if not path.is_dir():
            raise WrongCommand(
                f"{path}: expected a folder with music; to hear one song type: python -m library "
                f"similar {typed(path)}"
            )


def give_up_output():
    """Nobody reads on, or the disk behind the output is full: the rest goes nowhere."""
    with contextlib.suppress(Exception):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def say(verb: str, text):
    """One line on stderr."""
    if sys.stderr:
        print(f"library {verb}: {printable(text)}", file=sys.stderr)


def interrupted(args) -> str:
    """What an interrupt cost."""
    kept = args.verb in ("index", "embed") or args.verb == "tag" and tags_a_table(args)
    if kept:
        return "interrupted; all that is done is kept, the same command goes on"
    return "interrupted; the same command begins anew"


def tags_a_table(args) -> bool:
    """Does a `tag` leave a table, in which it goes on?"""
    return bool(import_module("library.tags").table_of(args)) and not args.plot


def do(args) -> int:
    """Run a verb with arguments that were read; the exit code."""
    check(args)
    verb = import_module(f"library.{VERBS[args.verb][0]}")
    import_module("model").tune_allocator()
    code = getattr(verb, args.verb if args.verb in ("similar", "path") else "run")(args)
    if sys.stdout:
        sys.stdout.flush()
    return code


def main(argv=None) -> int:
    """Read a command and run it; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a notebook's stream, or none
            stream.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args(argv)
    try:
        return do(args)
    except KeyboardInterrupt:
        say(args.verb, interrupted(args))
        return 1
    except BrokenPipeError:  # `| head`
        give_up_output()
        return 1
    except WrongCommand as error:
        say(args.verb, f"error: {error}")
        return 2
    except (Stop, ValueError, OSError, RuntimeError) as error:
        text = str(error).strip().splitlines() or [type(error).__name__]
        say(args.verb, f"error: {text[0]}")
        give_up_output()
        return 1
