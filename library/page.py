"""`map`: the collection as a map in a browser, one HTML file that needs no network and no server.

Songs that sound alike lie near each other (t-SNE of the unit vectors). Of a large collection t-SNE
places a sample, and every other song lies between those of the sample that it sounds most like.
map.html is the page without its songs."""

import csv
import json
import os
import urllib.parse
from pathlib import Path

import numpy as np
import torch

from library.index import storable
from library.search import Collection
from library.store import Song
from library.targets import check_target
from library.terminal import Stop, print_json, printable, typed

HERE = Path(__file__).resolve().parent
SAMPLE = 4000  # songs that t-SNE places itself
COMPONENTS = 50  # of the principal component analysis before it
MOST = 50_000  # songs of a page
NEIGHBOURS = 10  # shown of each song


def neighbours(unit: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` nearest songs (N, count) of each song, and their scores; exact, block by
    block."""
    count = min(count, len(unit) - 1)
    full = unit.float()
    index = np.zeros((len(unit), count), np.int64)
    score = np.zeros((len(unit), count), np.float32)
    for start in range(0, len(unit), 1024):
        block = full[start : start + 1024] @ full.T
        rows = torch.arange(len(block))
        block[rows, rows + start] = -2  # not itself
        best = block.topk(count, dim=1)
        index[start : start + 1024] = best.indices.numpy()
        score[start : start + 1024] = best.values.numpy()
    return index, score


def layout(unit: torch.Tensor, seed: int = 0) -> np.ndarray:
    """Places (N, 2) in [0, 1] of unit vectors (N, d)."""
    x = unit.float().numpy()
    if len(x) < 4:
        return np.stack([np.linspace(0.3, 0.7, len(x)), np.full(len(x), 0.5)], 1)
    chosen = np.arange(len(x))
    if len(x) > SAMPLE:
        chosen = np.sort(np.random.default_rng(seed).choice(len(x), SAMPLE, replace=False))
    places = np.zeros((len(x), 2))
    places[chosen] = t_sne(x[chosen], seed)
    rest = np.setdiff1d(np.arange(len(x)), chosen)
    if len(rest):
        places[rest] = between(x[rest], x[chosen], places[chosen], seed)
    low = places.min(0)
    return (places - low) / np.maximum((places - low).max(0), 1e-9) * 0.98 + 0.01


def t_sne(x: np.ndarray, seed: int) -> np.ndarray:
    """scikit-learn's t-SNE of (n, d), n >= 4, after principal component analysis -> (n, 2)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    components = min(COMPONENTS, *x.shape)
    reduced = PCA(components, random_state=seed).fit_transform(x)
    perplexity = min(30, (len(x) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=-1).fit_transform(
        reduced
    )


def between(x: np.ndarray, placed: np.ndarray, places: np.ndarray, seed: int) -> np.ndarray:
    """Places of songs (n, d): the mean of those of the three most alike that are placed, a little
    beside."""
    spread = 0.004 * (places.max(0) - places.min(0))
    noise = np.random.default_rng(seed).standard_normal((len(x), 2)) * spread
    found = np.zeros((len(x), 2))
    for start in range(0, len(x), 1024):
        best = torch.from_numpy(x[start : start + 1024] @ placed.T).topk(3, dim=1)
        weight = best.values.clamp_min(1e-3).numpy() ** 4
        weight /= weight.sum(1, keepdims=True)
        found[start : start + 1024] = (places[best.indices.numpy()] * weight[:, :, None]).sum(1)
    return found + noise


def heard_tags(table: Path) -> dict[str, str]:
    """Of a table that `tag FOLDER --csv` wrote, {file: its first tag}. Names that someone made
    relative count from here, or from where the table lies."""
    with open(table, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not rows.fieldnames or not {"file", "top"} <= set(rows.fieldnames):
            raise Stop(
                f"{table}: expected a table of `python -m library tag FOLDER --csv {typed(table)}`"
            )
        tags: dict[str, str] = {}
        for row in rows:
            for folder in ("", table.parent):
                place = os.path.abspath(os.path.join(folder, row["file"] or ""))
                tags.setdefault(place, (row["top"] or "").split(";")[0])
        return tags


def tag_of(song: Song, tags: dict[str, str]) -> str | None:
    """A song's tag in a table, where names that are not UTF-8 stand with their bytes as escapes."""
    return tags.get(storable(song.name))


def url(path: bytes) -> str:
    """The address of a local file, of a name in any encoding.

    >>> url(b"/music/50% & more?.mp3")
    'file:///music/50%25%20%26%20more%3F.mp3'
    """
    return "file://" + urllib.parse.quote(path)


def as_script(value) -> str:
    """JSON that may stand inside a script element whatever its texts are: no <, >, &, nor line
    separators."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page(
    songs: list[Song], places: np.ndarray, near: tuple[np.ndarray, np.ndarray], tags: dict[str, str]
) -> str:
    """The HTML of a map: songs, their places (N, 2), their neighbours and scores (N, k), and tags
    by path."""
    columns = {
        "x": places[:, 0].round(4).tolist(),
        "y": places[:, 1].round(4).tolist(),
        "near": near[0].tolist(),
        "score": near[1].round(3).tolist(),
        "url": [url(song.path) for song in songs],
        "name": [printable(os.path.basename(song.name)) for song in songs],
        "tag": [printable(tag_of(song, tags) or song.genre or "") for song in songs],
    }
    for key in ("artist", "title", "album", "year"):
        columns[key] = [printable(getattr(song, key) or "") for song in songs]
    columns["year"] = [year[:4] for year in columns["year"]]
    template = (HERE / "map.html").read_text(encoding="utf-8")
    return template.replace("/*SONGS*/", as_script(columns))


def run(args) -> int:
    """The verb."""
    import model

    check_target(args.out, "--out")
    collection = Collection(args.library)
    tags = heard_tags(args.tags) if args.tags else {}
    total = len(collection.songs)
    shown = np.linspace(0, total - 1, min(total, MOST)).astype(int)
    unit = collection.unit[shown]
    songs = [collection.songs[k] for k in shown]
    html = page(songs, layout(unit, args.seed), neighbours(unit, NEIGHBOURS), tags)
    model.write_atomically(args.out, html.encode())
    tagged = sum(tag_of(song, tags) is not None for song in songs)
    if args.json:
        told = {"tagged": tagged} if args.tags else {}
        print_json({"songs": len(songs), "of": total, **told, "page": os.fspath(args.out)})
        return 0
    print(f"{printable(args.out)}: {len(songs):,} songs, {len(html) / 1e6:.1f} MB")
    if args.tags:
        print(f"{tagged:,} of {len(songs):,} songs are in {printable(args.tags)}")
    if total > MOST:
        print(f"a page holds {MOST:,} songs: these are spread evenly over the {total:,} there are")
    print(f"next: open {url(os.fsencode(os.path.abspath(args.out)))} in a browser")
    return 0
