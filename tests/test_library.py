"""`library`: a store that survives what happens to disks, and searches that follow their rules."""

import doctest
import importlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, synthesise

import model
from library import cli, copies, listen, search
from library.store import Store

RATE = 22050
QUICK = ["--workers", "2", "--device", "cpu"]


def type_in(capsys, *args):
    """A command's exit code, what it prints, and its errors."""
    capsys.readouterr()
    try:
        code = cli.main([str(arg) for arg in args])
    except SystemExit as end:
        code = end.code
    out = capsys.readouterr()
    return code, out.out, out.err


def as_json(capsys, *args):
    code, out, err = type_in(capsys, *args, "--json")
    assert out, err
    return json.loads(out)


def song(i, seconds=6):
    """A recording that hardly repeats: song i of the tiny data, with noise of its own."""
    x = synthesise(i)[0]
    x = np.tile(x, int(np.ceil(seconds * RATE / len(x))))[: seconds * RATE]
    return 0.4 * x + 0.05 * np.random.default_rng(i).standard_normal(len(x))


def tag(path, **tags):
    import mutagen

    file = mutagen.File(path, easy=True)
    if file.tags is None:
        file.add_tags()
    for name, value in tags.items():
        file[name] = value
    file.save()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
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


@pytest.fixture(scope="session")
def indexed(encoder, tmp_path_factory):
    """A folder with music/ (16 songs of 4 artists, 2 albums each, in folders; a copy, a softer one,
    one without tags) and library.clmr of it."""
    home = tmp_path_factory.mktemp("home")
    for i in range(16):
        folder = home / "music" / f"artist {i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"song {i}.flac"
        soundfile.write(path, song(i), RATE)
        tag(
            path,
            artist=f"Artist {i % 4}",
            album=f"Album {i // 8}",
            title=f"Title {i}",
            date=str(1990 + i),
        )
    shutil.copy(home / "music/artist 1/song 1.flac", home / "music/copy of 1.flac")
    soundfile.write(home / "music/softer 2.ogg", 0.3 * song(2), RATE)
    assert (
        cli.main(
            [
                "index",
                str(home / "music"),
                "--library",
                str(home / "library.clmr"),
                "--ckpt",
                str(encoder),
                *QUICK,
            ]
        )
        == 0
    )
    return home


@pytest.fixture
def home(indexed, tmp_path):
    """A copy of `indexed` that a test may change."""
    shutil.copytree(indexed, tmp_path / "home")
    store = sqlite3.connect(tmp_path / "home/library.clmr/songs.sqlite")
    with store:
        for (path,) in store.execute("SELECT path FROM songs").fetchall():
            moved = path.replace(os.fsencode(indexed), os.fsencode(tmp_path / "home"))
            state = os.stat(moved)
            store.execute(
                "UPDATE songs SET path = ?, mtime = ? WHERE path = ?",
                (moved, state.st_mtime_ns, path),
            )
    store.close()
    return tmp_path / "home"


def index(capsys, home, *args):
    """Index home/music again -> what it says as JSON."""
    return as_json(
        capsys, "index", home / "music", "--library", home / "library.clmr", *QUICK, *args
    )


def songs_of(home):
    store = Store.read(home / "library.clmr")
    songs = {os.path.relpath(song.name, home / "music"): song for song in store.songs()}
    store.close()
    return songs


# --- the store


def test_every_song_has_a_row_with_its_tags_and_a_vector(indexed):
    songs = songs_of(indexed)
    store = Store.read(indexed / "library.clmr")
    one = songs["artist 1/song 5.flac"]
    assert len(songs) == 18 and store.vectors().dtype == np.float16
    assert (one.artist, one.album, one.title, one.year) == (
        "Artist 1",
        "Album 0",
        "Title 5",
        "1995",
    )
    assert one.seconds == pytest.approx(6, abs=0.1) and one.error is None
    assert np.isfinite(np.asarray(store.vectors()[one.row], np.float32)).all()


def test_the_vector_is_the_mean_of_the_encoder_over_windows_at_one_loudness(indexed, encoder):
    from library.network import load_network

    network = load_network(encoder, "levels", "cpu", "off")
    path = indexed / "music/artist 1/song 5.flac"
    windows, _ = listen.excerpts(path, RATE, network.size, 10)
    want = network(listen.equal_loudness(windows)).mean(0)
    store = Store.read(indexed / "library.clmr")
    got = store.vectors()[songs_of(indexed)["artist 1/song 5.flac"].row].astype(np.float32)
    assert np.allclose(got, want, rtol=0.05, atol=0.05 * np.abs(want).max())  # float16


def test_index_again_hears_nothing(capsys, home):
    said = index(capsys, home)
    assert (said["unchanged"], said["new"], said["songs"], said["failed"]) == (18, 0, 18, [])


def test_index_again_hears_what_is_new_and_what_changed(capsys, home):
    soundfile.write(home / "music/new.flac", song(30), RATE)
    soundfile.write(home / "music/artist 1/song 5.flac", song(31, 7), RATE)
    said = index(capsys, home)
    assert (said["unchanged"], said["new"], said["changed"], said["songs"]) == (17, 1, 1, 19)
    assert songs_of(home)["artist 1/song 5.flac"].seconds == pytest.approx(7, abs=0.1)


def test_files_that_are_gone_are_marked_and_come_back_unheard(capsys, home):
    away = home / "away.flac"
    os.rename(home / "music/artist 1/song 5.flac", away)
    said = index(capsys, home)
    assert (said["gone"], said["songs"]) == (1, 17) and songs_of(home)["artist 1/song 5.flac"].gone
    os.rename(away, home / "music/artist 1/song 5.flac")
    said = index(capsys, home)
    assert (said["new"], said["unchanged"], said["songs"]) == (0, 18, 18)


def test_a_moved_file_keeps_its_row(capsys, home):
    row = songs_of(home)["artist 1/song 5.flac"].row
    os.rename(home / "music/artist 1", home / "music/elsewhere")
    said = index(capsys, home)
    assert (said["moved"], said["new"], said["gone"], said["songs"]) == (4, 0, 0, 18)
    assert songs_of(home)["elsewhere/song 5.flac"].row == row


def test_a_file_moved_and_tagged_anew_is_known_by_its_audio(capsys, home):
    os.rename(home / "music/artist 1/song 5.flac", home / "music/five.flac")
    tag(home / "music/five.flac", artist="Somebody Else With A Longer Name" * 300)
    said = index(capsys, home)
    assert (said["moved"], said["new"], said["gone"], said["songs"]) == (1, 0, 0, 18)
    assert songs_of(home)["five.flac"].artist.startswith("Somebody")


def test_the_songs_of_a_vanished_disk_come_back_with_it_unheard(capsys, home):
    os.rename(home / "music", home / "unplugged")
    (home / "music").mkdir()  # an empty mount point
    said = index(capsys, home)
    assert said["gone"] == 18
    assert said["left_out"] == [{"file": str(home / "music"), "reason": "no audio in it"}]
    (home / "music").rmdir()
    os.rename(home / "unplugged", home / "music")
    said = index(capsys, home)
    assert (said["new"], said["unchanged"], said["songs"]) == (0, 18, 18)


def test_a_broken_file_is_listed_and_ends_nothing(capsys, home):
    (home / "music/broken.mp3").write_bytes(b"no audio at all" * 100)
    soundfile.write(home / "music/zz new.flac", song(30), RATE)
    code, out, _ = type_in(
        capsys, "index", home / "music", "--library", home / "library.clmr", *QUICK
    )
    assert code == 1 and "failed: " in out and "broken.mp3" in out and "1 new" in out
    assert "next: python -m library similar" in out
    code, out, _ = type_in(
        capsys, "index", home / "music", "--library", home / "library.clmr", *QUICK
    )
    assert code == 0 and "1 files that failed before" in out
    assert len(index(capsys, home, "--retry")["failed"]) == 1


def test_a_silent_file_is_no_song(capsys, home):
    soundfile.write(home / "music/silence.flac", np.zeros(5 * RATE), RATE)
    assert "silent" in index(capsys, home)["failed"][0]["reason"]


def test_a_song_shorter_than_a_window_is_a_song(capsys, home):
    soundfile.write(home / "music/short.flac", song(30, 1), RATE)
    assert index(capsys, home)["new"] == 1
    assert as_json(
        capsys, "similar", home / "music/short.flac", "--library", home / "library.clmr"
    )["songs"]


def test_a_decoder_that_crashes_costs_one_file_and_is_tried_again(capsys, home, monkeypatch):
    soundfile.write(home / "music/killer.flac", song(30), RATE)
    soundfile.write(home / "music/new.flac", song(31), RATE)
    before = listen.excerpts

    def crash(path, *args):
        if "killer" in str(path):
            os._exit(11)
        return before(path, *args)

    monkeypatch.setattr(listen, "excerpts", crash)
    said = index(capsys, home)
    assert said["new"] == 1 and "crashes the decoder" in said["failed"][0]["reason"]
    monkeypatch.setattr(listen, "excerpts", before)
    assert index(capsys, home)["songs"] == 20


def test_a_decoder_that_hangs_is_given_up(capsys, home, monkeypatch):
    soundfile.write(home / "music/slow.flac", song(30), RATE)
    monkeypatch.setattr(listen, "excerpts", lambda *args: time.sleep(60))
    assert "not decoded after 0.5 s" in index(capsys, home, "--timeout", 0.5)["failed"][0]["reason"]


def test_an_interrupt_keeps_what_is_done(capsys, encoder, tmp_path, monkeypatch):
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.flac", song(i), RATE)
    before = listen.hear_all

    def interrupted(*args):
        for n, event in enumerate(before(*args)):
            if n == 4:  # windows and end of two songs
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(listen, "hear_all", interrupted)
    command = [
        "index",
        tmp_path,
        "--library",
        tmp_path / "store",
        "--ckpt",
        encoder,
        "--workers",
        1,
        "--device",
        "cpu",
    ]
    code, _, err = type_in(capsys, *command)
    monkeypatch.setattr(listen, "hear_all", before)
    assert code == 1 and "interrupted; all that is done is kept" in err
    assert as_json(capsys, *command)["unchanged"] == 1


def test_a_full_disk_is_said_and_costs_nothing(capsys, home, monkeypatch):
    soundfile.write(home / "music/new.flac", song(30), RATE)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    code, _, err = type_in(
        capsys, "index", home / "music", "--library", home / "library.clmr", *QUICK
    )
    assert code == 1 and "No space left" in err and "kept" in err
    monkeypatch.undo()
    assert index(capsys, home)["songs"] == 19


def test_two_indexers_at_once(capsys, home):
    store = Store.write(home / "library.clmr", Store.read_about(home / "library.clmr"))
    code, _, err = type_in(
        capsys, "index", home / "music", "--library", home / "library.clmr", *QUICK
    )
    store.close()
    assert code == 1 and "another index is at work" in err


def test_a_store_of_another_encoder(capsys, home):
    torch.manual_seed(4)
    other = home / "other.pt"
    model.save_encoder(
        other,
        model.build_encoder("samplecnn", width=0.0625),
        sample_rate=RATE,
        method="clmr",
        step=1,
    )
    code, _, err = type_in(
        capsys, "index", home / "music", "--library", home / "library.clmr", "--ckpt", other, *QUICK
    )
    assert code == 1 and "another encoder" in err and "--ckpt" in err
    outside = home / "outside.flac"
    soundfile.write(outside, song(40), RATE)
    code, _, err = type_in(
        capsys, "similar", outside, "--library", home / "library.clmr", "--ckpt", other
    )
    assert code == 1 and "not the encoder" in err


def test_a_store_of_a_newer_format(capsys, home):
    with sqlite3.connect(home / "library.clmr/songs.sqlite") as store:
        store.execute("UPDATE about SET value = '2' WHERE key = 'format'")
    code, _, err = type_in(capsys, "duplicates", "--library", home / "library.clmr")
    assert code == 1 and "format 2" in err


def test_a_damaged_store_is_said_in_one_line(capsys, home):
    file = home / "library.clmr/songs.sqlite"
    file.write_bytes(b"SQLite format 3\0" + os.urandom(5000))
    code, _, err = type_in(capsys, "duplicates", "--library", home / "library.clmr")
    assert code == 1 and "damaged" in err and err.count("\n") == 1


def test_a_flipped_bit_in_a_vector_is_found_and_healed(capsys, home):
    file = home / "library.clmr/vectors.f16"
    data = bytearray(file.read_bytes())
    data[1001] ^= 16
    file.write_bytes(data)
    code, _, err = type_in(capsys, "duplicates", "--library", home / "library.clmr")
    assert code == 1 and "damaged: 1 of 18 vectors" in err
    assert index(capsys, home)["heard_again"] == 1
    assert type_in(capsys, "duplicates", "--library", home / "library.clmr")[0] == 0


def test_a_half_copied_store_is_found_and_healed(capsys, home):
    file = home / "library.clmr/vectors.f16"
    os.truncate(file, file.stat().st_size // 2)
    code, _, err = type_in(capsys, "duplicates", "--library", home / "library.clmr")
    assert code == 1 and "missing" in err and "index FOLDER" in err
    assert index(capsys, home)["heard_again"] == 9 and index(capsys, home)["songs"] == 18


def test_no_store_says_what_to_type(capsys, tmp_path):
    code, _, err = type_in(capsys, "similar", __file__, "--library", tmp_path / "none")
    assert code == 1 and "python -m library index FOLDER" in err


def test_another_folder_is_not_taken_for_a_store(capsys, home):
    code, _, err = type_in(capsys, "index", home / "music", "--library", home, *QUICK)
    assert code == 1 and "expected a store or nothing" in err


def test_a_folder_without_audio(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = type_in(
        capsys, "index", tmp_path / "empty", "--library", tmp_path / "store", *QUICK
    )
    assert code == 1 and "audio files" in err


def test_all_windows_are_kept_beside_their_mean(capsys, encoder, tmp_path):
    soundfile.write(tmp_path / "a.flac", song(1, 12), RATE)
    command = ["index", tmp_path, "--library", tmp_path / "store", "--ckpt", encoder, *QUICK]
    assert as_json(capsys, *command, "--windows", "all")["new"] == 1
    store = Store.read(tmp_path / "store")
    (one,) = store.songs()
    rows = store.vectors("windows.f16")[one.first : one.first + one.windows].astype(np.float32)
    assert one.windows == 12 * RATE // 59049
    assert np.allclose(
        rows.mean(0), store.vectors()[one.row].astype(np.float32), rtol=0.01, atol=0.01
    )
    code, _, err = type_in(capsys, *command, "--windows", "ten")
    assert code == 1 and "--windows all" in err


def test_shards_hold_every_song_once_and_open_as_one(capsys, home, encoder):
    stores = [home / f"part-{i}" for i in (1, 2, 3)]
    counts = [
        as_json(
            capsys,
            "index",
            home / "music",
            "--library",
            store,
            "--shard",
            f"{i}/3",
            "--ckpt",
            encoder,
            *QUICK,
        )["songs"]
        for i, store in enumerate(stores, 1)
    ]
    assert sum(counts) == 18 and all(counts)
    seed = home / "music/artist 1/song 5.flac"
    one = as_json(capsys, "similar", seed, "--library", home / "library.clmr")
    three = as_json(capsys, "similar", seed, "--library", *stores)
    # Of a recording in two files, whose scores differ by rounding alone, either may stand there.
    paths = [
        [song["path"].replace("copy of 1.flac", "artist 1/song 1.flac") for song in found["songs"]]
        for found in (one, three)
    ]
    assert paths[0] == paths[1]
    assert np.allclose(
        [a["score"] for a in one["songs"]], [b["score"] for b in three["songs"]], atol=0.02
    )


def test_names_in_any_encoding_and_very_long_paths(capsys, encoder, tmp_path):
    folder = os.fsencode(tmp_path / "music")
    os.mkdir(folder)
    soundfile.write(tmp_path / "a.flac", song(1), RATE)
    odd = os.path.join(folder, b"caf\xe9 \x1b[31m\n.flac")
    soundfile.write(tmp_path / "b.flac", song(2), RATE)
    os.rename(tmp_path / "b.flac", odd)
    deep = tmp_path / "music"
    os.chdir(deep)
    for _ in range(14):  # more than 3,000 characters in all
        os.mkdir("d" * 220)
        os.chdir("d" * 220)
    shutil.copy(tmp_path / "a.flac", "deep.flac")
    os.chdir(ROOT)
    command = ["--library", tmp_path / "store", *QUICK, "--ckpt", encoder]
    code, out, err = type_in(capsys, "index", tmp_path / "music", *command)
    assert code == 0 and "2 songs" in out and "\x1b" not in out + err, err
    found = as_json(capsys, "similar", os.fsdecode(odd), *command)
    assert len(found["songs"]) == 1 and len(found["songs"][0]["path"]) > 3000
    playlist = tmp_path / "list.m3u8"
    code, out, _ = type_in(capsys, "similar", tmp_path / "a.flac", "--m3u", playlist, *command)
    assert code == 0 and "\x1b" not in out and "1 with a line break in the name" in out
    assert playlist.read_bytes() == b"#EXTM3U\n"


def test_a_store_and_a_collection_on_read_only_disks(capsys, home):
    for folder, _, files in os.walk(home):
        os.chmod(folder, 0o555)
        for name in files:
            os.chmod(os.path.join(folder, name), 0o444)
    try:
        seed = home / "music/artist 1/song 5.flac"
        assert as_json(capsys, "similar", seed, "--library", home / "library.clmr")["songs"]
    finally:
        for folder, _, _ in os.walk(home):
            os.chmod(folder, 0o755)


# --- search


def test_a_song_is_found_by_itself_at_any_level(capsys, home):
    soundfile.write(home / "softer.flac", 0.25 * song(9), RATE)
    found = as_json(
        capsys, "similar", home / "softer.flac", "--copies", "--library", home / "library.clmr"
    )
    assert found["songs"][0]["path"].endswith("song 9.flac") and found["songs"][0]["score"] > 0.95


def test_no_second_copy_of_a_recording(capsys, indexed):
    seed = indexed / "music/artist 1/song 1.flac"
    command = ["similar", seed, "--library", indexed / "library.clmr"]
    names = [os.path.basename(one["path"]) for one in as_json(capsys, *command)["songs"]]
    assert (
        "copy of 1.flac" not in names
        and not {"song 2.flac", "softer 2.ogg"} <= set(names)
        and len(names) == 15
    )
    names = [
        os.path.basename(one["path"]) for one in as_json(capsys, *command, "--copies")["songs"]
    ]
    assert names[0] == "copy of 1.flac" and len(names) == 17


def test_at_most_so_many_of_an_artist_and_an_album(capsys, indexed):
    seed = indexed / "music/artist 1/song 1.flac"
    command = ["similar", seed, "--library", indexed / "library.clmr", "--n", 30]
    artists = [
        one["artist"]
        for one in as_json(capsys, *command, "--per-artist", 2)["songs"]
        if one["artist"]
    ]
    assert sorted(artists) == sorted(["Artist 0", "Artist 1", "Artist 2", "Artist 3"] * 2)
    albums = [
        (one["artist"], one["album"])
        for one in as_json(capsys, *command, "--per-album", 1)["songs"]
        if one["album"]
    ]
    assert len(albums) == len(set(albums)) == 8


def test_songs_without_an_artist_are_not_one_artist(capsys, encoder, tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", song(i), RATE)
    command = ["--library", tmp_path / "store", "--ckpt", encoder, *QUICK]
    assert type_in(capsys, "index", tmp_path, *command)[0] == 0
    assert (
        len(as_json(capsys, "similar", tmp_path / "0.wav", "--per-artist", 1, *command)["songs"])
        == 3
    )


def test_one_artist_with_one_song_each_says_why_the_list_is_short(capsys, encoder, tmp_path):
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.flac", song(i), RATE)
        tag(tmp_path / f"{i}.flac", artist="The Same")
    command = ["--library", tmp_path / "store", "--ckpt", encoder, *QUICK]
    assert type_in(capsys, "index", tmp_path, *command)[0] == 0
    code, out, _ = type_in(capsys, "similar", tmp_path / "0.flac", "--per-artist", 1, *command)
    assert code == 0 and "1 of the 20 songs asked for" in out and "left out by per-artist" in out


def test_nothing_from_the_seeds_albums(capsys, indexed):
    seed = indexed / "music/artist 1/song 1.flac"
    found = as_json(
        capsys, "similar", seed, "--library", indexed / "library.clmr", "--other-albums"
    )["songs"]
    assert found and not [
        one for one in found if (one["artist"], one["album"]) == ("Artist 1", "Album 0")
    ]


def test_several_seeds_by_their_centre_and_by_the_nearest(capsys, indexed):
    seeds = [indexed / f"music/artist {i % 4}/song {i}.flac" for i in (1, 6, 11)]
    collection = search.Collection([indexed / "library.clmr"])
    units = np.stack([collection.find(seed, None)[0] for seed in seeds])
    unit = collection.unit.float().numpy()
    centre = units.mean(0) / np.linalg.norm(units.mean(0))
    assert np.allclose(search.nearest(collection, units), unit @ centre, atol=1e-3)
    assert np.allclose(
        search.nearest(collection, units, any_of=True), (unit @ units.T).max(1), atol=1e-3
    )
    found = as_json(capsys, "similar", *seeds, "--any", "--library", indexed / "library.clmr")[
        "songs"
    ]
    assert not {one["path"] for one in found} & {os.fspath(seed) for seed in seeds}


def test_a_song_that_is_not_in_the_store_is_heard_now(capsys, home):
    soundfile.write(home / "outside.flac", song(3) + 0.01 * song(40), RATE)
    found = as_json(
        capsys, "similar", home / "outside.flac", "--copies", "--library", home / "library.clmr"
    )["songs"]
    assert found[0]["path"].endswith("song 3.flac")


def test_a_path_leads_from_one_to_the_other_without_a_song_twice(capsys, indexed):
    ends = [indexed / "music/artist 1/song 1.flac", indexed / "music/artist 2/song 6.flac"]
    found = as_json(capsys, "path", *ends, "--n", 7, "--library", indexed / "library.clmr")["songs"]
    paths = [one["path"] for one in found]
    assert len(set(paths)) == 7 and [paths[0], paths[-1]] == [os.fspath(end) for end in ends]
    assert (
        len(
            as_json(capsys, "path", *ends, "--n", 2, "--library", indexed / "library.clmr")["songs"]
        )
        == 2
    )


def test_playlists_with_absolute_and_relative_paths(capsys, indexed, tmp_path):
    seed = indexed / "music/artist 1/song 1.flac"
    command = ["similar", seed, "--library", indexed / "library.clmr", "--n", 3, "--m3u"]
    assert type_in(capsys, *command, tmp_path / "a.m3u8")[0] == 0
    lines = (tmp_path / "a.m3u8").read_text().splitlines()
    assert (
        lines[0] == "#EXTM3U"
        and len(lines) == 7
        and all(os.path.isabs(line) for line in lines[2::2])
    )
    assert type_in(capsys, *command, tmp_path / "b.m3u8", "--relative")[0] == 0
    lines = (tmp_path / "b.m3u8").read_text().splitlines()
    assert not any(os.path.isabs(line) for line in lines) and all(
        (tmp_path / line).exists() for line in lines[2::2]
    )


def test_duplicates_finds_the_copy_and_the_softer_one(capsys, indexed, tmp_path):
    groups = as_json(capsys, "duplicates", "--library", indexed / "library.clmr")["groups"]
    names = sorted(sorted(os.path.basename(one["path"]) for one in group) for group in groups)
    assert names == [["copy of 1.flac", "song 1.flac"], ["softer 2.ogg", "song 2.flac"]]
    scores = {os.path.basename(group[1]["path"]): group[1]["score"] for group in groups}
    assert max(scores.values()) == 1 and 0.45 < min(scores.values()) < 1
    assert (
        type_in(
            capsys, "duplicates", "--csv", tmp_path / "d.csv", "--library", indexed / "library.clmr"
        )[0]
        == 0
    )
    assert len((tmp_path / "d.csv").read_text().splitlines()) == 5


def test_imprints_agree_over_codecs_and_levels_and_not_over_songs(tmp_path):
    windows = np.random.default_rng(0).standard_normal((3, 59049)).astype(np.float32)
    other = np.random.default_rng(1).standard_normal((3, 59049)).astype(np.float32)
    one = copies.imprint(windows, RATE)
    assert copies.likeness(one, copies.imprint(0.1 * np.roll(windows, 9000, 1), RATE)) > 0.6
    assert abs(copies.likeness(one, copies.imprint(other, RATE))) < 0.2
    assert copies.likeness(one, copies.imprint(np.zeros_like(windows), RATE)) == 0


def test_the_product_over_half_precision_is_exact():
    unit = torch.nn.functional.normalize(torch.randn(1500, 64), dim=1).half()
    query = torch.nn.functional.normalize(torch.randn(3, 64), dim=1)
    assert torch.allclose(search.products_of(query, unit), query @ unit.float().T, atol=1e-6)


def test_what_varies_within_songs_counts_less():
    rng = np.random.default_rng(0)
    songs = rng.standard_normal((200, 2))
    windows = songs[:, None] + rng.standard_normal((200, 10, 2)) * [3.0, 0.1]
    apart = (windows - windows.mean(1, keepdims=True)).reshape(-1, 2)
    weighing = search.weigh(windows.mean(1), apart.T @ apart, len(apart))
    steadfast, fickle = np.abs(weighing.directions[1]).max(), np.abs(weighing.directions[0]).max()
    assert steadfast > 5 * fickle


# --- hearing


def test_seeking_and_reading_hear_the_same_windows(tmp_path):
    t = np.arange(90 * 44100) / 44100
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * (100 + t) * t), 44100)
    seeking, seconds = listen.by_seeking(tmp_path / "a.wav", RATE, 59049, 10)
    reading, length = listen.by_reading(tmp_path / "a.wav", RATE, 59049, 10)
    assert seconds == pytest.approx(90) and length == pytest.approx(90)
    inside = slice(200, -200)  # the resampler's margin
    assert all(
        min(np.abs(a[inside] - np.roll(b, shift)[inside]).max() for shift in (-1, 0, 1)) < 0.05
        for a, b in zip(seeking, reading)
    )


def test_a_container_that_libsndfile_does_not_read_is_sought_as_well(tmp_path):
    t = np.arange(90 * 44100) / 44100
    x = 0.4 * np.sin(2 * np.pi * (100 + t) * t)
    soundfile.write(tmp_path / "a.wav", np.stack([x, x], 1), 44100)
    encode(tmp_path / "a.wav", tmp_path / "a.m4a")
    want, _ = listen.by_seeking(tmp_path / "a.wav", RATE, 59049, 10)
    got, seconds = listen.by_seeking_with_ffmpeg(tmp_path / "a.m4a", RATE, 59049, 10)
    assert seconds == pytest.approx(90, abs=0.2)
    for a, b in zip(want, got):
        spectra = np.abs(np.fft.rfft(a)), np.abs(np.fft.rfft(b))
        assert np.dot(*spectra) / np.linalg.norm(spectra[0]) / np.linalg.norm(spectra[1]) > 0.99


def encode(source, target):
    """A recording as AAC in an MPEG-4 container."""
    import av

    with av.open(str(source)) as wav, av.open(str(target), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        for frame in wav.decode(audio=0):
            frame.pts = None
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def test_control_characters_of_tags_do_not_reach_a_terminal(capsys, encoder, tmp_path):
    for i in range(2):
        soundfile.write(tmp_path / f"{i}.flac", song(i), RATE)
        tag(tmp_path / f"{i}.flac", title=f"\x1b[2Jgone {i}\x07", artist="<script>\u202e")
    command = ["--library", tmp_path / "store", "--ckpt", encoder, *QUICK]
    assert type_in(capsys, "index", tmp_path, *command)[0] == 0
    code, out, _ = type_in(capsys, "similar", tmp_path / "0.flac", *command)
    assert code == 0 and "gone" in out and not {"\x1b", "\x07", "\u202e"} & set(out)


def test_windows_are_spread_over_a_song():
    starts = listen.place(1000, 10, 10)
    assert starts.tolist() == sorted(starts) and starts[0] == 49 and starts[-1] == 940


def test_a_song_of_three_hours_is_heard_in_ten_windows(capsys, home):
    second = 0.3 * np.sin(2 * np.pi * 220 * np.arange(8000) / 8000)
    with soundfile.SoundFile(home / "music/long.wav", "w", 8000, 1, subtype="PCM_U8") as file:
        for _ in range(3 * 60):
            file.write(np.tile(second, 60))
    assert index(capsys, home)["new"] == 1
    assert songs_of(home)["long.wav"].seconds == pytest.approx(3 * 3600)


def test_a_kill_in_the_middle_costs_what_was_not_yet_written(capsys, encoder, tmp_path):
    for i in range(8):
        soundfile.write(tmp_path / f"{i}.flac", song(i), RATE)
    store = tmp_path / "store"
    command = ["index", tmp_path, "--library", store, "--ckpt", encoder, "--workers", 1]
    code = "import sys, library.index as i; i.COMMIT = 0"
    code += "; from library import cli; cli.main(sys.argv[1:])"
    words = [sys.executable, "-W", "ignore", "-c", code, *map(str, command)]
    running = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while running.poll() is None and time.monotonic() < deadline:
        vectors = store / "vectors.f16"
        if vectors.exists() and vectors.stat().st_size:
            break
    running.kill()
    running.wait()
    said = as_json(capsys, *command)
    assert said["songs"] == 8 and not said["failed"] and said["heard_again"] == 0
    Store.read(store).close()


def test_output_that_nobody_reads_and_full_disks_end_in_silence(run, indexed):
    command = (
        f"{sys.executable} -W ignore -m library similar '{indexed}/music/artist 1/song 1.flac'"
    )
    command += f" --library {indexed}/library.clmr"
    for pipe in ("| head -1", ">&- 2>&-", "> /dev/full"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {pipe}"], capture_output=True, text=True, cwd=ROOT
        )
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_doctests_of_the_package():
    for name in ("listen", "index", "search", "copies", "tags", "page", "terminal"):
        module = importlib.import_module(f"library.{name}")
        found = doctest.testmod(module)
        assert found.attempted and not found.failed, name


def test_all_verbs_on_the_demo_s_music_in_an_empty_home(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    os.mkdir("music")
    names = sorted(os.listdir(ROOT / "demo/audio"))[::8]
    for name in names:
        shutil.copy(ROOT / "demo/audio" / name, "music")
    first, last = (f"music/{name}" for name in (names[0], names[-1]))

    def said(*words):
        code, out, err = type_in(capsys, *words)
        assert code == 0, err
        return out

    indexed = said("index", "music")
    assert f"library.clmr: {len(names)} songs" in indexed
    assert "next: python -m library similar" in indexed
    assert "score" in said("similar", first, "--n", 5, "--m3u", "list.m3u8")
    assert os.path.exists("list.m3u8")
    assert len(json.loads(said("path", first, last, "--n", 5, "--json"))["songs"]) == 5
    assert "recordings in several files" in said("duplicates")
    assert "%" in said("tag", first)
    assert "library.html" in said("map") and os.path.getsize("library.html") > 10_000
    assert "files embedded" in said("embed", first)
    assert os.path.exists(f"embeddings/{names[0]}.npz")


def test_the_command_works_from_any_folder_by_its_path(run, tmp_path):
    done = run([ROOT / "library", "index", "--help"], cwd=tmp_path)
    assert done.returncode == 0 and "example: python -m library index" in done.stdout


def test_a_map_of_the_store(capsys, indexed, tmp_path):
    out = tmp_path / "map.html"
    table = tmp_path / "tags.csv"
    name = indexed / "music/artist 1/song 1.flac"
    table.write_text(f'file,top,jazz\n"{name}","jazz; slow",0.9\n')
    command = ["map", "--library", indexed / "library.clmr", "--out", out, "--tags", table]
    assert as_json(capsys, *command) == {
        "songs": 18,
        "of": 18,
        "tagged": 1,
        "page": str(out),
    }
    text = out.read_text(encoding="utf-8")
    columns = json.loads(text.split('id="songs">')[1].split("</script>")[0])
    assert (
        len(columns["x"]) == 18
        and columns["tag"].count("jazz") == 1
        and "Title 5" in columns["title"]
    )
    table.write_text("name,tag\n")
    code, _, err = type_in(capsys, *command)
    assert code == 1 and "expected a table of" in err
