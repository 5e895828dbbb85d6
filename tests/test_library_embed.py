"""`library embed` and `library tag`: what leaves the project as numbers, files and tables."""

import csv
import json
import os

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT

import model
from library import cli

SIZE = 59049
RATE = 22050


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny encoder with weights of its own."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pt"
    model.save_encoder(
        path,
        model.build_encoder("samplecnn", width=0.0625),
        sample_rate=RATE,
        method="clmr",
        step=1,
    )
    return path


@pytest.fixture
def sounds(tmp_path, tiny_audio):
    """Three songs in a folder in a folder, one shorter than a window, and a file that is no
    audio."""
    folder = tmp_path / "sounds" / "deep"
    folder.mkdir(parents=True)
    x = soundfile.read(tiny_audio / "song 01.flac")[0]
    soundfile.write(folder / "stereo.wav", np.stack([x, x], 1), RATE)
    soundfile.write(folder / "other.wav", soundfile.read(tiny_audio / "song 02.flac")[0], RATE)
    soundfile.write(folder.parent / "short.wav", x[:9000], RATE)
    (folder.parent / "broken.mp3").write_bytes(b"no audio at all")
    return folder.parent


def embed(*args):
    return cli.main(["embed", *map(str, args), "--workers", "2", "--device", "cpu", "--amp", "off"])


def waveform(path):
    return torch.from_numpy(soundfile.read(path, dtype="float32")[0])


def test_the_rows_are_the_encoder_s_and_the_timestamps_their_starts(
    checkpoint, tiny_audio, tmp_path
):
    song = tiny_audio / "song 01.flac"
    assert embed(song, "--ckpt", checkpoint, "--out", tmp_path, "--hop", 1) == 0
    got = np.load(tmp_path / "song 01.flac.npz")
    windows = waveform(song).unfold(0, SIZE, RATE)[:, None]
    with torch.no_grad():
        want = model.load_encoder(checkpoint)[0](windows)
    assert (
        np.allclose(got["embedding"], want, rtol=1e-4, atol=1e-5)
        and got["embedding"].dtype == np.float32
    )
    assert got["timestamps"].tolist() == list(range(len(windows)))


def test_one_broken_file_is_reported_and_ends_nothing(checkpoint, sounds, tmp_path, capsys):
    assert embed(sounds, "--ckpt", checkpoint, "--out", tmp_path / "e") == 1
    text = capsys.readouterr().out
    assert "3 of 4 files embedded" in text and "failed: " in text and "broken.mp3" in text
    made = sorted(
        path.relative_to(tmp_path / "e").as_posix() for path in (tmp_path / "e").rglob("*.npz")
    )
    assert made == ["deep/other.wav.npz", "deep/stereo.wav.npz", "short.wav.npz"]


def test_a_song_shorter_than_a_window_is_padded_and_said_so(checkpoint, sounds, tmp_path, capsys):
    assert embed(sounds / "short.wav", "--ckpt", checkpoint, "--out", tmp_path / "e") == 0
    assert "shorter than a window" in capsys.readouterr().out
    assert np.load(tmp_path / "e" / "short.wav.npz")["embedding"].shape == (1, 32)


def test_what_was_embedded_before_is_not_done_again(checkpoint, sounds, tmp_path, capsys):
    command = [sounds / "deep", "--ckpt", checkpoint, "--out", tmp_path / "e"]
    assert embed(*command) == 0
    before = os.stat(tmp_path / "e" / "stereo.wav.npz").st_mtime_ns
    assert embed(*command) == 0
    assert "2 of 2 files embedded, 2 of them before" in capsys.readouterr().out
    assert os.stat(tmp_path / "e" / "stereo.wav.npz").st_mtime_ns == before


def test_another_hop_is_refused_until_overwrite_is_typed(checkpoint, sounds, tmp_path, capsys):
    command = [sounds / "deep", "--ckpt", checkpoint, "--out", tmp_path / "e"]
    assert embed(*command) == 0
    assert embed(*command, "--hop", 1) == 1
    assert "of another recording, encoder or --hop; type --overwrite" in capsys.readouterr().out
    assert embed(*command, "--hop", 1, "--overwrite") == 0


def test_a_damaged_npz_is_refused(checkpoint, sounds, tmp_path, capsys):
    song = sounds / "deep" / "other.wav"
    target = tmp_path / "other.wav.npz"
    target.write_bytes(b"half of it")
    assert embed(song, "--ckpt", checkpoint, "--out", tmp_path) == 1
    assert "is damaged" in capsys.readouterr().out


def test_two_files_of_one_target_are_refused(checkpoint, sounds, tiny_audio, tmp_path, capsys):
    other = tmp_path / "elsewhere" / "stereo.wav"
    other.parent.mkdir()
    soundfile.write(other, waveform(tiny_audio / "song 03.flac"), RATE)
    assert (
        embed(sounds / "deep" / "stereo.wav", other, "--ckpt", checkpoint, "--out", tmp_path / "c")
        == 1
    )
    assert "would both become stereo.wav" in capsys.readouterr().err


def test_one_file_holds_a_matrix_and_the_names_in_its_order(checkpoint, sounds, tmp_path):
    assert (
        embed(sounds / "deep", "--ckpt", checkpoint, "--out", tmp_path / "all", "--one-file") == 0
    )
    assert embed(sounds / "deep", "--ckpt", checkpoint, "--out", tmp_path / "each") == 0
    got = np.load(tmp_path / "all.npz")
    assert got["id"].tolist() == ["other.wav", "stereo.wav"]
    for row, name in zip(got["embedding"], got["id"]):
        rows = np.load(tmp_path / "each" / f"{name}.npz")["embedding"]
        assert np.allclose(row, rows.mean(0), rtol=1e-5, atol=1e-6)


def test_the_torchscript_gives_the_same_rows(checkpoint, sounds, tmp_path):
    encoder, info = model.load_encoder(checkpoint)
    model.export_torchscript(encoder, tmp_path / "encoder.ts", info["sample_rate"])
    song = sounds / "deep" / "stereo.wav"
    assert embed(song, "--ckpt", tmp_path / "encoder.ts", "--out", tmp_path / "ts") == 0
    assert embed(song, "--ckpt", checkpoint, "--out", tmp_path / "pt") == 0
    ours, theirs = (
        np.load(tmp_path / kind / "stereo.wav.npz")["embedding"] for kind in ("pt", "ts")
    )
    assert np.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_twenty_minutes_take_hardly_more_memory_than_one(run, checkpoint, tmp_path):
    # VmHWM, for what getrusage says is at least what the parent had when it forked.
    code = (
        "import sys; from library import cli; assert cli.main(sys.argv[1:]) == 0; "
        "print(next(line.split()[1] for line in open('/proc/self/status') if "
        "line.startswith('VmHWM')))"
    )
    minute = np.random.default_rng(0).standard_normal(60 * RATE).astype(np.float32) * 0.1
    peaks = []
    for minutes in (1, 20):
        with soundfile.SoundFile(tmp_path / f"{minutes}.wav", "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        done = run(
            [
                "-c",
                code,
                "embed",
                tmp_path / f"{minutes}.wav",
                "--ckpt",
                checkpoint,
                "--out",
                tmp_path,
                "--json",
                "--device",
                "cpu",
                "--workers",
                1,
            ]
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.splitlines()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 60  # MiB; decoded, the 20 minutes are 106


def test_embed_as_json(checkpoint, sounds, tmp_path, capsys):
    assert embed(sounds, "--ckpt", checkpoint, "--out", tmp_path / "e", "--json") == 1
    said = json.loads(capsys.readouterr().out)
    assert said["embedded"] == 3 and said["before"] == 0
    assert [entry["file"].endswith("broken.mp3") for entry in said["failed"]] == [True]


def test_a_tagger_is_refused_by_embed(tagger, tiny_audio, capsys):
    assert (
        embed(tiny_audio / "song 01.flac", "--ckpt", tagger) == 1
        and "gives tags" in capsys.readouterr().err
    )


# --- tag


@pytest.fixture(scope="module")
def tagger(checkpoint):
    """A tagger of three tags on that encoder, as TorchScript."""
    encoder, info = model.load_encoder(checkpoint)
    torch.manual_seed(5)
    head = torch.nn.Linear(encoder.out_dim, 3)
    path = checkpoint.parent / "tagger.ts"
    model.export_torchscript(
        encoder, path, info["sample_rate"], head, ["jazz", "slow", "loud"], "multilabel"
    )
    return path


def test_tag_prints_the_likeliest_tags_of_a_song(tagger, tiny_audio, capsys):
    song = tiny_audio / "song 02.flac"
    assert cli.main(["tag", str(song), "--ckpt", str(tagger), "--amp", "off"]) == 0
    lines = capsys.readouterr().out.splitlines()
    with torch.no_grad():
        want = torch.jit.load(tagger)(waveform(song)[None, None])[0]
    order = want.argsort(descending=True).tolist()
    assert lines[0] == str(song)
    assert [line.split()[1] for line in lines[1:4]] == [["jazz", "slow", "loud"][k] for k in order]
    assert float(lines[1].split("%")[0]) == pytest.approx(100 * float(want.max()), abs=0.1)


def test_a_flipped_bit_in_a_torchscript_file_is_named(tagger, tiny_audio, tmp_path, capsys):
    damaged = tmp_path / "tagger.ts"
    content = bytearray(tagger.read_bytes())
    content[len(content) // 2] ^= 4
    damaged.write_bytes(content)
    song = tiny_audio / "song 02.flac"
    assert cli.main(["tag", str(song), "--ckpt", str(damaged)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{damaged} cannot be read" in line and "tagger.ts" in line


def test_tag_of_a_folder_is_a_table_of_one_row_a_song(tagger, sounds, tmp_path, capsys):
    table = tmp_path / "tags.csv"
    assert cli.main(["tag", str(sounds), "--ckpt", str(tagger), "--csv", str(table)]) == 1
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [os.path.basename(row["file"]) for row in rows] == [
        "other.wav",
        "stereo.wav",
        "short.wav",
    ]
    assert all(0 <= float(row[tag]) <= 1 for row in rows for tag in ("jazz", "slow", "loud"))
    assert "3 of 4 songs tagged" in (text := capsys.readouterr().out) and "failed: " in text


def test_tag_over_time_is_a_picture(tagger, tiny_audio, tmp_path):
    song = tiny_audio / "song 02.flac"
    assert (
        cli.main(
            [
                "tag",
                str(song),
                "--ckpt",
                str(tagger),
                "--plot",
                "--out",
                str(tmp_path),
                "--hop",
                "0.5",
            ]
        )
        == 0
    )
    assert (tmp_path / "song 02.flac.png").read_bytes()[:4] == b"\x89PNG"


def test_a_tagger_s_weights_say_what_its_torchscript_says(checkpoint, tagger, tiny_audio, capsys):
    encoder, info = model.load_encoder(checkpoint)
    torch.manual_seed(5)
    head = torch.nn.Linear(encoder.out_dim, 3)
    weights = checkpoint.parent / "tagger.pt"
    tags = ["jazz", "slow", "loud"]
    model.save_tagger(weights, encoder, head, tags, "multilabel", info["sample_rate"])
    heard = []
    for file in (tagger, weights):
        song = str(tiny_audio / "song 02.flac")
        assert cli.main(["tag", song, "--ckpt", str(file), "--json"]) == 0
        heard.append(json.loads(capsys.readouterr().out)["songs"][0]["tags"])
    assert heard[0] == pytest.approx(heard[1], abs=1e-3)


def test_an_encoder_is_refused_by_tag(checkpoint, tiny_audio, capsys):
    assert cli.main(["tag", str(tiny_audio / "song 01.flac"), "--ckpt", str(checkpoint)]) == 1
    assert "tagger.pt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, code, words",
    [
        (["embed", __file__, "--hop", "0"], 2, "seconds, above 0"),
        (["embed", __file__, "--hop", "inf"], 2, "seconds, above 0"),
        (["embed", "nowhere.mp3"], 2, "no such file"),
        (["embed", __file__, "--ckpt", "nowhere.pt"], 2, "no such file"),
        (["embed", __file__, "--ckpt", __file__], 1, "cannot be read"),
        (["tag", str(ROOT / "tests")], 1, "found none"),
        (["tag", str(ROOT / "tests"), "--plot"], 1, "--plot draws a song"),
        (["embed", __file__, "--workers", "0"], 2, "whole number above 0"),
        (["frobnicate"], 2, "invalid choice"),
    ],
)
def test_wrong_commands_say_what_is_wrong(args, code, words, capsys):
    try:
        got = cli.main(args)
    except SystemExit as end:
        got = end.code
    assert got == code and words in capsys.readouterr().err
