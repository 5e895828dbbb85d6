"""`library`: what goes wrong in other people's homes, and what it then says or keeps."""

import csv
import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT
from test_library import (  # noqa: F401, fixtures among them
    QUICK,
    RATE,
    as_json,
    encoder,
    home,
    index,
    indexed,
    song,
    songs_of,
    tag,
    type_in,
)
from test_library_embed import checkpoint, tagger  # noqa: F401

import model
from library import cli, embed, listen, network, search, tags
from library import index as indexing
from library.store import SCHEMA, Store


def write_songs(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        soundfile.write(folder / f"{i}.flac", song(i), RATE)
    return folder


def scatter_of(folder):
    store = Store.read(folder)
    products, count = store.scatter()
    store.close()
    return np.array(products), count


def interrupt_after(monkeypatch, songs):
    """Ctrl-C in the song after so many."""
    before = listen.hear_all

    def interrupted(*args):
        ended = 0
        for event in before(*args):
            if ended == songs:
                raise KeyboardInterrupt
            ended += event[1] == listen.END
            yield event

    monkeypatch.setattr(listen, "hear_all", interrupted)
    return lambda: monkeypatch.setattr(listen, "hear_all", before)


# --- 1: levels


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An encoder whose levels are more numbers than a store takes."""
    path = tmp_path_factory.mktemp("wide") / "encoder.pt"
    torch.manual_seed(6)
    model.save_encoder(
        path,
        model.build_encoder("samplecnn", width=0.375),
        sample_rate=RATE,
        method="clmr",
        step=1,
    )
    assert model.Levels(model.load_encoder(path)[0]).out_dim > network.MOST
    return path


def test_embed_gives_levels_however_many_they_are(capsys, wide, tmp_path):
    write_songs(tmp_path / "in", [1])
    command = ["embed", tmp_path / "in", "--ckpt", wide, "--features", "levels", *QUICK]
    assert type_in(capsys, *command, "--out", tmp_path / "out")[0] == 0
    rows = np.load(tmp_path / "out/1.flac.npz")["embedding"]
    assert rows.shape[1] == model.Levels(model.load_encoder(wide)[0]).out_dim


def test_a_store_still_takes_the_output_of_such_an_encoder(wide):
    stored = network.load_network(wide, "levels", "cpu")
    output = network.load_network(wide, "output", "cpu")
    assert stored.kind == "output" and stored.identity == output.identity


def test_levels_of_a_network_that_gives_output_alone_are_refused(capsys, checkpoint, tmp_path):
    loaded, info = model.load_encoder(checkpoint)
    model.export_torchscript(loaded, tmp_path / "encoder.ts", info["sample_rate"])
    write_songs(tmp_path / "in", [1])
    command = ["embed", tmp_path / "in", "--ckpt", tmp_path / "encoder.ts", *QUICK]
    code, _, err = type_in(capsys, *command, "--features", "levels", "--out", tmp_path / "out")
    assert code == 1 and "expected an encoder.pt" in err and "--features output" in err


# --- 2: a first index that was cut off early


@pytest.mark.parametrize("written", ["", SCHEMA], ids=["no table", "tables that say nothing"])
def test_a_store_cut_off_before_its_first_word_is_begun_again(capsys, encoder, tmp_path, written):
    write_songs(tmp_path / "music", [1, 2])
    (tmp_path / "store").mkdir()
    with sqlite3.connect(tmp_path / "store/songs.sqlite") as database:
        database.executescript(written)
    database.close()
    command = ["--library", tmp_path / "store", *QUICK, "--ckpt", encoder]
    code, _, err = type_in(capsys, "duplicates", "--library", tmp_path / "store")
    assert code == 1 and "half-written" in err
    assert indexing.encoder_of(tmp_path / "store", None) is None
    assert as_json(capsys, "index", tmp_path / "music", *command)["songs"] == 2


def test_a_store_says_what_it_is_about_as_it_is_made(encoder, tmp_path, monkeypatch):
    heard = network.load_network(encoder, "levels", "cpu")
    about = indexing.About(heard.identity, "levels", heard.dimensions, "ten", "x", 0.1)

    def cut_off(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("library.store.json.dumps", cut_off)
    with pytest.raises(KeyboardInterrupt):
        Store.write(tmp_path / "store", about)
    with sqlite3.connect(tmp_path / "store/songs.sqlite") as database:
        assert database.execute("SELECT name FROM sqlite_master").fetchall() == []
    database.close()


def test_a_store_with_songs_that_does_not_say_its_encoder_is_damaged(capsys, home):
    with sqlite3.connect(home / "library.clmr/songs.sqlite") as database:
        database.execute("DELETE FROM about WHERE key = 'ckpt'")
    database.close()
    command = ["index", home / "music", "--library", home / "library.clmr", *QUICK]
    code, _, err = type_in(capsys, *command)
    assert code == 1 and "does not say ckpt" in err


# --- 3: what is summed over windows


def test_songs_and_what_is_summed_over_them_are_killed_together(capsys, encoder, tmp_path):
    music = write_songs(tmp_path / "music", range(8))
    command = ["index", music, "--ckpt", encoder, "--workers", 1, "--device", "cpu"]
    assert type_in(capsys, *command, "--library", tmp_path / "whole")[0] == 0
    code = "import sys, os, library.index as i; i.COMMIT = 0; save = i.save; n = []\n"
    code += "def kill(*a):\n    save(*a); n.append(1)\n    len(n) == 6 and os.kill(os.getpid(), 9)"
    code += "\ni.save = kill; from library import cli; cli.main(sys.argv[1:])"
    store = tmp_path / "store"
    words = [sys.executable, "-W", "ignore", "-c", code, *map(str, command)]
    done = subprocess.run([*words, "--library", store], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert scatter_of(store)[1] == 10 * len(Store.read(store).songs()) > 0
    assert as_json(capsys, *command, "--library", store)["songs"] == 8
    want, count = scatter_of(tmp_path / "whole")
    got, counted = scatter_of(store)
    assert counted == count == 80 and np.allclose(got, want, rtol=1e-3, atol=1e-3 * want.max())


def test_what_a_full_disk_did_not_take_is_not_summed(capsys, home, monkeypatch):
    before = scatter_of(home / "library.clmr")
    soundfile.write(home / "music/new.flac", song(30), RATE)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    monkeypatch.setattr(indexing, "COMMIT", 0)
    command = ["index", home / "music", "--library", home / "library.clmr", *QUICK]
    assert type_in(capsys, *command)[0] == 1
    monkeypatch.undo()
    assert scatter_of(home / "library.clmr")[1] == before[1]
    index(capsys, home)
    assert scatter_of(home / "library.clmr")[1] == before[1] + 10


def test_a_recording_that_is_heard_again_is_summed_once(capsys, home):
    before = scatter_of(home / "library.clmr")
    tag(home / "music/artist 1/song 5.flac", title="Another" * 50)  # changed, but for its audio
    file = home / "library.clmr/vectors.f16"
    os.truncate(file, file.stat().st_size // 2)  # vectors that were lost
    assert index(capsys, home)["heard_again"] == 9
    after_it = scatter_of(home / "library.clmr")
    assert after_it[1] == before[1] and np.array_equal(after_it[0], before[0])


# --- 4: one file by several names


def test_a_folder_and_a_link_to_it_hold_their_songs_once(capsys, encoder, tmp_path):
    music = write_songs(tmp_path / "music", range(3))
    (tmp_path / "link").symlink_to(music)
    command = ["--library", tmp_path / "store", "--ckpt", encoder, *QUICK]
    assert as_json(capsys, "index", music, tmp_path / "link", *command)["songs"] == 3
    assert as_json(capsys, "index", tmp_path / "link", *command)["songs"] == 3
    said = as_json(capsys, "index", tmp_path / "link", music, *command)
    assert (said["songs"], said["unchanged"], said["gone"]) == (3, 3, 0)


def test_a_second_name_that_the_store_had_goes(capsys, home):
    os.link(home / "music/artist 1/song 5.flac", home / "music/artist 1/again.flac")
    one = "artist 1/song 5.flac"
    with sqlite3.connect(home / "library.clmr/songs.sqlite") as database:
        columns = "size, mtime, sample, audio, seconds, row, crc"
        database.execute(
            f"INSERT INTO songs (path, {columns}) SELECT ?, {columns} FROM songs WHERE path = ?",
            [os.fsencode(home / "music/artist 1/again.flac"), os.fsencode(home / "music" / one)],
        )
    database.close()
    (home / "link").symlink_to(home / "music")
    folders = [home / "music", home / "link"]
    command = ["--library", home / "library.clmr", *QUICK]
    groups = as_json(capsys, "duplicates", *command[:2])["groups"]
    assert not any(os.path.samefile(g[0]["path"], h["path"]) for g in groups for h in g[1:])
    assert as_json(capsys, "index", *folders, *command)["songs"] == 18


def test_stores_whose_folders_overlap_hold_a_song_once(capsys, home, encoder):
    (home / "link").symlink_to(home / "music")
    part = home / "part.clmr"
    folders = [home / "music/artist 1", home / "link/artist 2"]
    assert type_in(capsys, "index", *folders, "--library", part, "--ckpt", encoder, *QUICK)[0] == 0
    stores = [home / "library.clmr", part, home / "library.clmr"]
    assert len(search.Collection(stores).songs) == 18
    groups = as_json(capsys, "duplicates", "--library", *stores)["groups"]
    assert [len(group) for group in groups] == [2, 2]


# --- 5 and 6: tables, and long commands that are interrupted


@pytest.mark.parametrize("named", [False, True])
def test_tag_leaves_a_table_of_one_s_own_alone(capsys, tagger, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    write_songs(tmp_path / "music", [1])
    (tmp_path / "tags.csv").write_text("file,tags\n1.flac,jazz\n")
    monkeypatch.setattr(tags, "hear_whole", None)  # before any work
    command = ["tag", "music", "--ckpt", tagger, *["--csv", "tags.csv"] * named]
    code, _, err = type_in(capsys, *command)
    assert code == 1 and "--csv tags-tag.csv" in err
    assert (tmp_path / "tags.csv").read_text() == "file,tags\n1.flac,jazz\n"


def test_tag_writes_its_own_table_again(capsys, tagger, tmp_path):
    music = write_songs(tmp_path / "music", [1])
    command = ["tag", music, "--ckpt", tagger, "--csv", tmp_path / "t.csv"]
    assert type_in(capsys, *command)[0] == 0
    write_songs(music, [2])
    assert type_in(capsys, *command)[0] == 0
    assert len((tmp_path / "t.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("made", [False, True])
def test_an_empty_file_and_a_pipe_are_places_for_a_table(capsys, indexed, tmp_path, made):
    target = tmp_path / "d.csv" if made else "/dev/stdout"
    if made:
        target.touch()
    command = ["duplicates", "--library", indexed / "library.clmr", "--csv", target]
    assert type_in(capsys, *command)[0] == 0


def test_duplicates_leaves_another_table_alone(capsys, indexed, tmp_path):
    (tmp_path / "tags.csv").write_text("file,tags\n")
    command = ["duplicates", "--library", indexed / "library.clmr", "--csv"]
    code, _, err = type_in(capsys, *command, tmp_path / "tags.csv")
    assert code == 1 and "`duplicates` did not write" in err


def heard_files(monkeypatch, module):
    """The files that a command hears, as they are handed to the decoders."""
    heard = []
    before = module.hear_whole

    def listening(files, *args):
        heard.extend(file.name for file in files)
        return before(files, *args)

    monkeypatch.setattr(module, "hear_whole", listening)
    return heard


def test_a_tag_that_was_interrupted_goes_on(capsys, tagger, tmp_path, monkeypatch):
    music = write_songs(tmp_path / "music", range(3))
    whole = tmp_path / "whole.csv"
    command = ["tag", music, "--ckpt", tagger, "--workers", 1, "--csv"]
    assert type_in(capsys, *command, whole)[0] == 0
    undo = interrupt_after(monkeypatch, 1)
    code, _, err = type_in(capsys, *command, tmp_path / "t.csv")
    undo()
    assert code == 1 and "all that is done is kept" in err
    heard = heard_files(monkeypatch, tags)
    assert type_in(capsys, *command, tmp_path / "t.csv")[0] == 0
    assert heard == ["1.flac", "2.flac"] and not (tmp_path / "t.csv.part").exists()
    assert (tmp_path / "t.csv").read_text() == whole.read_text()


def test_a_tag_goes_on_only_with_what_this_tagger_heard_of_these_files(
    capsys, tagger, tmp_path, monkeypatch
):
    music = write_songs(tmp_path / "music", range(2))
    command = ["tag", music, "--ckpt", tagger, "--workers", 1, "--csv", tmp_path / "t.csv"]
    undo = interrupt_after(monkeypatch, 1)
    assert type_in(capsys, *command)[0] == 1
    undo()
    heard = heard_files(monkeypatch, tags)
    with open(tmp_path / "t.csv.part", "ab") as file:
        file.write(b'{"source": "half a li')
    assert type_in(capsys, *command, "--hop", 1)[0] == 0
    assert heard == ["0.flac", "1.flac"]


def test_an_embed_in_one_file_that_was_interrupted_goes_on(capsys, encoder, tmp_path, monkeypatch):
    music = write_songs(tmp_path / "music", range(3))
    command = ["embed", music, "--ckpt", encoder, "--workers", 1, "--one-file", "--out"]
    assert type_in(capsys, *command, tmp_path / "whole")[0] == 0
    undo = interrupt_after(monkeypatch, 1)
    code, _, err = type_in(capsys, *command, tmp_path / "all")
    undo()
    assert code == 1 and "all that is done is kept" in err
    heard = heard_files(monkeypatch, embed)
    code, out, _ = type_in(capsys, *command, tmp_path / "all")
    assert code == 0 and "3 of 3 files embedded, 1 of them before" in out
    assert heard == ["1.flac", "2.flac"]
    whole, got = np.load(tmp_path / "whole.npz"), np.load(tmp_path / "all.npz")
    assert np.array_equal(whole["embedding"], got["embedding"])
    assert whole["id"].tolist() == got["id"].tolist()


def test_an_interrupt_that_keeps_nothing_says_so(capsys, home, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "Collection", interrupted)
    command = ["similar", home / "music/softer 2.ogg", "--library", home / "library.clmr"]
    code, _, err = type_in(capsys, *command)
    assert code == 1 and "begins anew" in err and "kept" not in err


@pytest.mark.parametrize(
    "words, module",
    [
        (["tag", "music", "--csv", "file/t.csv"], "tags"),
        (["tag", "music/1.flac", "--plot", "--out", "file"], "tags"),
        (["embed", "music", "--out", "file/e"], "embed"),
        (["embed", "music", "--one-file", "--out", "file/e"], "embed"),
        (["duplicates", "--csv", "file/d.csv"], "duplicates"),
        (["map", "--out", "file/m.html"], "page"),
        (["similar", "music/1.flac", "--m3u", "file/l.m3u8"], "search"),
        (["path", "music/1.flac", "music/1.flac", "--m3u", "music"], "search"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_a_place_that_cannot_be_written_is_said_before_any_work(
    capsys, tmp_path, monkeypatch, words, module
):
    monkeypatch.chdir(tmp_path)
    write_songs(tmp_path / "music", [1])
    (tmp_path / "file").write_text("no folder")
    worker = "load_network" if module in ("tags", "embed") else "Collection"
    monkeypatch.setattr(f"library.{module}.{worker}", None)
    code, _, err = type_in(capsys, *words)
    assert code == 1 and "give another --" in err and len(err.splitlines()) == 1
    assert sorted(os.listdir()) == ["file", "music"]


def test_duplicates_makes_the_folder_of_its_table(capsys, indexed, tmp_path):
    target = tmp_path / "new/d.csv"
    command = ["duplicates", "--library", indexed / "library.clmr", "--csv", target]
    assert type_in(capsys, *command)[0] == 0 and target.exists()


# --- 7 and 10: what is left out


@pytest.fixture
def mixed(tmp_path):
    """A song, a link to nothing, a FIFO, and a file of another suffix."""
    folder = write_songs(tmp_path / "mixed", [1])
    (folder / "gone.mp3").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.wav")
    (folder / "song.ogx").write_bytes(b"who knows")
    return folder


@pytest.fixture(params=["index", "embed", "tag"])
def hearing(request, tmp_path, encoder, tagger):
    """A verb that hears folders, but for the folders."""
    return {
        "index": ["index", "--library", tmp_path / "store", "--ckpt", encoder, *QUICK],
        "embed": ["embed", "--out", tmp_path / "out", "--ckpt", encoder, *QUICK],
        "tag": ["tag", "--csv", tmp_path / "t.csv", "--ckpt", tagger, *QUICK],
    }[request.param]


def test_a_store_amid_the_music_is_not_called_left_out(capsys, mixed, encoder):
    store = mixed / "its own.clmr"
    command = ["index", mixed, "--library", store, "--ckpt", encoder, *QUICK]
    for _ in range(2):
        told = as_json(capsys, *command)["left_out"]
        assert len(told) == 3 and not any(str(store) in one["file"] for one in told)


def test_what_is_left_out_is_said(capsys, mixed, hearing):
    code, out, _ = type_in(capsys, *hearing, mixed)
    lines = [line for line in out.splitlines() if line.startswith("left out: ")]
    assert code == 0 and sorted(lines) == [
        f"left out: {mixed}/gone.mp3: a link to nothing",
        f"left out: {mixed}/pipe.wav: a FIFO, not a file",
        f"left out: {mixed}/song.ogx: no audio by its name",
    ]
    assert len(as_json(capsys, *hearing, mixed)["left_out"]) == 3


def test_a_folder_without_audio_does_not_stop_the_others(capsys, tmp_path, hearing):
    write_songs(tmp_path / "music", [1])
    (tmp_path / "empty").mkdir()
    code, out, _ = type_in(capsys, *hearing, tmp_path / "empty", tmp_path / "music")
    assert code == 0 and f"left out: {tmp_path}/empty: no audio in it" in out


def test_folders_without_any_audio_are_an_error_that_says_what_lay_there(capsys, mixed, hearing):
    os.unlink(mixed / "1.flac")
    code, _, err = type_in(capsys, *hearing, mixed)
    assert code == 1 and "expected audio files, found none (3 left out, the first " in err


def test_songs_deleted_to_the_last_of_a_folder_are_gone(capsys, home):
    shutil.rmtree(home / "music/artist 1")
    (home / "music/artist 1").mkdir()
    folders = [home / "music/artist 1", home / "music/artist 2"]
    said = as_json(capsys, "index", *folders, "--library", home / "library.clmr", *QUICK)
    assert (said["gone"], said["unchanged"], said["songs"]) == (4, 4, 14)


# --- 8: folders whose name begins with two dots


def test_songs_deleted_from_a_folder_of_dots_are_gone(capsys, encoder, tmp_path):
    band = write_songs(tmp_path / "music/...And You Will Know Us", [1, 2])
    command = ["index", tmp_path / "music", "--library", tmp_path / "store", "--ckpt", encoder]
    assert as_json(capsys, *command, *QUICK)["songs"] == 2
    os.unlink(band / "1.flac")
    assert as_json(capsys, *command, *QUICK)["gone"] == 1


# --- 9: path


def test_the_ends_of_a_path_count_for_their_artists(capsys, indexed):
    ends = [indexed / "music/artist 1/song 1.flac", indexed / "music/artist 2/song 6.flac"]
    command = ["path", *ends, "--library", indexed / "library.clmr", "--n", 8]
    songs = as_json(capsys, *command, "--per-artist", 1)["songs"]
    artists = [one["artist"] for one in songs if one["artist"]]
    assert len(artists) == len(set(artists)) == 4
    songs = as_json(capsys, *command, "--per-album", 1)["songs"]
    albums = [(one["artist"], one["album"]) for one in songs if one["album"]]
    assert len(albums) == len(set(albums))


def test_a_path_of_fewer_songs_than_asked_says_why(capsys, indexed):
    ends = [indexed / "music/artist 1/song 1.flac", indexed / "music/artist 2/song 6.flac"]
    command = ["path", *ends, "--library", indexed / "library.clmr", "--n", 15]
    code, out, _ = type_in(capsys, *command, "--per-artist", 1)
    assert code == 0 and "of the 15 songs asked for" in out and "left out by per-artist" in out


def test_the_first_step_of_a_path_counts_by_its_square():
    class Two:  # half-way, but off the plane of the ends; and nearly the first end
        unit = torch.tensor([[0.495, 0.495, 0.714], [0.974, 0.226, 0]]).half()

    ends = [(np.eye(3, dtype=np.float32)[k], None) for k in (0, 1)]
    (layer,) = search.smooth(Two, [[0, 1]], np.ones((1, 2), np.float32), ends)
    steps = 1 - Two.unit.float().numpy()[:, :2]
    assert layer[0] == (steps**2).sum(1).argmin() == 0


# --- 11: commands to type


def test_paths_in_commands_to_type_are_quoted(capsys, home):
    place = home / "my lib.clmr"
    code, _, err = type_in(capsys, "similar", home / "music/softer 2.ogg", "--library", place)
    assert code == 1 and f"--library '{place}'" in err
    os.rename(home / "library.clmr", place)
    _, out, _ = type_in(capsys, "index", home / "music", "--library", place, *QUICK)
    assert f"--library '{place}'" in out.splitlines()[-1]
    _, out, _ = type_in(capsys, "duplicates", "--library", place)
    assert f"next: python -m library duplicates --library '{place}' --csv" in out
    (place / "songs.sqlite").write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    _, _, err = type_in(capsys, "duplicates", "--library", place)
    assert f"mv '{place}' '{place}.damaged'" in err


def test_an_encoder_that_moved_is_asked_for_by_its_new_place(capsys, home, encoder, tmp_path):
    with sqlite3.connect(home / "library.clmr/songs.sqlite") as database:
        was = json.dumps("/nowhere/encoder.pt")
        database.execute("UPDATE about SET value = ? WHERE key = 'ckpt'", (was,))
    database.close()
    told = "its encoder is no longer at /nowhere/encoder.pt; give its new place by --ckpt"
    command = ["--library", home / "library.clmr", *QUICK]
    code, _, err = type_in(capsys, "index", home / "music", *command)
    assert code == 1 and told in err
    soundfile.write(home / "outside.flac", song(40), RATE)
    code, _, err = type_in(capsys, "similar", home / "outside.flac", *command)
    assert code == 1 and told in err
    moved = shutil.copy(encoder, tmp_path / "moved.pt")
    assert type_in(capsys, "index", home / "music", *command, "--ckpt", moved)[0] == 0


# --- 12


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_help_of_a_verb_is_clean(capsys, verb):
    code, out, _ = type_in(capsys, verb, "--help")
    assert code == 0 and out.startswith(f"usage: python -m library {verb} [-h]")
    assert "PosixPath" not in out
    if "--library" in out:
        assert "library.clmr)" in out


def test_a_name_that_begins_with_a_hash_is_no_comment(tmp_path):
    one = search.Song(os.fsencode(tmp_path / "#9 Dream.ogg"), 1, 1, title="Dream")
    search.write_m3u(tmp_path / "list.m3u8", [one], relative=True)
    assert (tmp_path / "list.m3u8").read_text().splitlines()[-1] == "./#9 Dream.ogg"


def test_a_map_says_how_many_songs_a_table_tags(capsys, indexed, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("file,top\nelsewhere.mp3,jazz\n")
    command = ["map", "--library", indexed / "library.clmr", "--out", tmp_path / "m.html"]
    code, out, _ = type_in(capsys, *command, "--tags", table)
    assert code == 0 and f"0 of 18 songs are in {table}" in out


def test_a_table_of_tag_is_understood_from_anywhere(capsys, home, tagger, monkeypatch):
    monkeypatch.chdir(home)
    assert type_in(capsys, "tag", "music", "--ckpt", tagger, "--csv", "t.csv")[0] == 0
    monkeypatch.chdir(ROOT)
    command = ["map", "--library", home / "library.clmr", "--out", home / "m.html"]
    assert as_json(capsys, *command, "--tags", home / "t.csv")["tagged"] == 18
    with open(home / "t.csv", newline="") as file:
        assert all(os.path.isabs(row["file"]) for row in csv.DictReader(file))


@pytest.mark.parametrize("level, words", [(0.3, "channels cancel"), (0, "silent")])
def test_channels_that_cancel_in_mono_are_not_called_silent(capsys, home, level, words):
    x = level * song(30)
    soundfile.write(home / "music/odd.flac", np.stack([x, -x], 1), RATE)
    assert words in index(capsys, home)["failed"][0]["reason"]
