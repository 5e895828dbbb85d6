"""What ships: the music, the encoder and the tagger in demo/ work right after a clone."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import model

ROOT = Path(__file__).resolve().parent.parent
SONG = sorted((ROOT / "demo/audio").glob("*.ogg"))[0]


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory, run):
    """make demo's path at toy length, in a folder of its own, without git or any other program."""
    folder = tmp_path_factory.mktemp("demo")
    data = folder / "data"
    out = folder / "run"
    short = ["--width", "0.0625", "--batch-size", 8, "--max-steps", 2]
    quick = ["--seeds", 1, "--epochs", 2]
    for args in (
        ["prepare.py", "--data", "demo", "--out", data],
        ["pretrain.py", "--data", data, *short, "--out", out],
        ["evaluate.py", "--ckpt", out / "encoder.pt", "--data", data, *quick],
    ):
        done = run(args, env={"PATH": ""})
        assert done.returncode == 0, (args, done.stderr[-2000:])
    return out


def authors():
    with open(ROOT / "demo/labels.csv", newline="", encoding="utf-8") as file:
        return {row["label"] for row in csv.DictReader(file)}


def tags_heard(run, *tagger):
    done = run(["-m", "library", "tag", SONG, *tagger])
    assert done.returncode == 0, done.stderr
    return {line.split("%")[1].strip() for line in done.stdout.splitlines() if "%" in line}


def test_the_demo_runs_on_the_music_that_ships(demo_run):
    assert (demo_run / "encoder.ts").exists()


def test_the_demos_tagger_knows_the_authors(demo_run, run):
    assert tags_heard(run, "--ckpt", demo_run / "tagger.ts") == authors()


def test_the_tagger_that_ships_works_after_a_clone(run):
    tagger, _ = model.load_tagger(ROOT / "demo/tagger.pt")
    heard = tags_heard(run)
    assert heard and heard <= set(tagger.tags)


def test_the_encoder_that_ships_works_after_a_clone(tmp_path, run):
    done = run(["-m", "library", "embed", SONG, "--out", tmp_path])
    assert done.returncode == 0, done.stderr
    info = torch.load(ROOT / "demo/encoder.pt", weights_only=True)
    windows = 20 * info["sample_rate"] // info["input_samples"]
    rows = np.load(tmp_path / f"{SONG.name}.npz")["embedding"]
    assert rows.shape[0] == windows and np.isfinite(rows).all() and rows.std(0).any()


def test_the_collection_that_ships_is_indexed_and_searched(tmp_path, run):
    store = ["--library", tmp_path / "library.clmr"]
    assert run(["-m", "library", "index", "demo/audio", *store]).returncode == 0
    done = run(["-m", "library", "similar", SONG, "--n", 5, *store])
    songs = [line for line in done.stdout.splitlines() if line.rstrip().endswith(".ogg")]
    assert done.returncode == 0 and len(songs) == 5 and SONG.name not in done.stdout


def test_the_model_card_says_how_the_encoder_was_made():
    info = torch.load(ROOT / "demo/encoder.pt", weights_only=True)
    card = (ROOT / "demo/MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"{info['step']} steps" in card.replace(",", "")
    assert f"batch {info['batch_size']}" in card
