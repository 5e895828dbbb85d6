"""The prepared folder as one reads it: samples, views, crops, several folders, what was changed."""

import csv
import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
from recordings import cli, quietly, songs, table  # noqa: F401
from splits import prepared

# --------------------------------------------------------------------------------------- one folder


def test_the_samples_are_what_was_decoded(tiny_data, tiny_audio):
    clips = prepare.Clips(tiny_data)
    audio = np.load(tiny_data / "audio.npy", mmap_mode="r")
    assert audio.dtype == np.int16
    assert len(audio) == clips.length.sum()
    assert (np.diff(clips.start) == clips.length[:-1]).all()
    for i in (0, 7, 23):
        x = prepare.decode(tiny_audio / clips.id[i])
        assert torch.allclose(clips.waveform(i), x, atol=0.6 / 32768)
        assert clips.waveform(i).dtype == torch.float32
        samples = audio[clips.start[i] : clips.start[i] + clips.length[i]]
        assert hashlib.sha256(samples.tobytes()).digest() == clips.sha256[i].tobytes()


def test_the_tables_are_those_of_the_listing(tiny_data, tiny_audio):
    clips = prepare.Clips(tiny_data)
    with open(tiny_audio / "tags.csv", encoding="utf-8") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    for i, name in enumerate(clips.id):
        active = [tag for k, tag in enumerate(clips.tags) if clips.labels[i, k]]
        assert "; ".join(active) == rows[name]["tags"]
        assert prepare.SPLITS[clips.split[i]] == rows[name]["split"]
    kinds = {
        key: getattr(clips, key).dtype for key in ("start", "length", "group", "split", "labels")
    }
    assert kinds == {
        "start": np.int64,
        "length": np.int64,
        "group": np.int64,
        "split": np.uint8,
        "labels": np.uint8,
    }


def test_crops_from_a_devices_memory_are_those_from_the_disk(tiny_data):
    train = prepare.Clips(tiny_data, "train")
    index, start = np.arange(len(train)), np.arange(len(train)) * 11
    want = train.crops(index, start, 59049)
    assert train.keep_on("cpu")
    assert train.samples.dtype == torch.int16
    assert torch.equal(train.crops(index, start, 59049), want)
    with pytest.raises(ValueError, match="not inside"):
        train.crops([0], [train.length[0] - 59048], 59049)
    assert pickle.loads(pickle.dumps(train)).samples is None


def test_a_view_is_one_split(tiny_data):
    everything, test = prepare.Clips(tiny_data), prepare.Clips(tiny_data, "test")
    chosen = np.flatnonzero(everything.split == 2)
    assert len(test) == 6
    assert (test.id == everything.id[chosen]).all()
    assert (test.labels == everything.labels[chosen]).all()


def test_crops_are_pieces_of_the_waveform(tiny_data):
    test = prepare.Clips(tiny_data, "test")
    index, start = [5, 0, 5], torch.tensor([10, 0, 20000])
    crops = test.crops(index, start, 30000)
    assert crops.shape == (3, 1, 30000)
    assert crops.dtype == torch.float32
    for b in range(3):
        assert torch.equal(crops[b, 0], test.waveform(index[b])[start[b] : start[b] + 30000])


def test_crops_outside_of_their_clip_are_refused(tiny_data):
    test = prepare.Clips(tiny_data, "test")
    last = int(test.length[0])
    assert test.crops([0], [last - 5], 5).shape == (1, 1, 5)
    for index, start, word in (
        ([0], [last - 4], "not inside"),
        ([0], [-1], "not inside"),
        ([6], [0], "0 .. 5"),
        ([0, 1], [0], "one start"),
    ):
        with pytest.raises(ValueError, match=word):
            test.crops(index, start, 5)


def test_clips_are_small_to_hand_over(tiny_data):
    test = prepare.Clips(tiny_data, "test")
    again = pickle.loads(pickle.dumps(test))
    assert len(pickle.dumps(test)) < 100_000
    assert torch.equal(again.waveform(3), test.waveform(3))


def test_a_folder_is_found_by_name_and_by_path(tiny_data, tmp_path, monkeypatch):
    assert prepare.find(tiny_data) == tiny_data
    (tmp_path / "data").mkdir()
    shutil.copytree(tiny_data, tmp_path / "data" / "mine")
    monkeypatch.chdir(tmp_path)
    assert prepare.find("mine") == Path("data/mine")


def test_an_unknown_split_is_told(tiny_data):
    with pytest.raises(ValueError, match="expected split train, valid, test"):
        prepare.Clips(tiny_data, "tset")


def test_one_long_name_costs_no_memory_for_the_others(tmp_path):
    """numpy gives each text the width of the longest: one of 3,600 made 20,000 clips 291 MB."""
    names = np.array(["x" * 3600, *(f"song {i}" for i in range(2000))], object)
    packed = prepared._pack_text(names)
    assert packed.nbytes < 30_000
    assert (prepared._unpack_text(packed) == names).all()


# ------------------------------------------------------------------------------------------- damage


@pytest.fixture
def copy(tiny_data, tmp_path):
    return Path(shutil.copytree(tiny_data, tmp_path / "copy"))


def test_check_says_when_nothing_has_changed(copy, cli):
    done = cli(["prepare.py", "--check", copy])
    assert done.returncode == 0
    assert "as it was written" in done.stdout


def test_check_finds_one_bit_of_the_samples(copy, cli):
    audio = np.load(copy / "audio.npy", mmap_mode="r+")
    audio[audio.size // 2] ^= 1
    audio.flush()
    done = cli(["prepare.py", "--check", copy])
    assert done.returncode == 1
    assert "samples have changed" in done.stdout
    assert "1 faults" in done.stdout


def test_a_quick_check_finds_changed_clips(copy):
    audio = np.load(copy / "audio.npy", mmap_mode="r+")
    clips = prepare.Clips(copy)
    clips.verify(seed=3)
    audio[clips.start + 7] ^= 1
    audio.flush()
    with pytest.raises(ValueError, match="not what was written.*--check"):
        prepare.Clips(copy).verify(seed=3, n_clips=1)


def test_check_finds_samples_cut_off(copy):
    with open(copy / "audio.npy", "r+b") as file:
        file.truncate(200_000)
    assert "audio.npy cannot be read" in prepare.check(copy)[0]


def test_samples_of_another_length_are_refused_at_the_first_crop(copy):
    np.save(copy / "audio.npy", np.zeros(100_000, np.int16))
    with pytest.raises(ValueError, match="audio.npy: expected .* samples, found 100000"):
        prepare.Clips(copy).waveform(0)


def test_check_finds_a_changed_label(copy):
    arrays = dict(np.load(copy / "clips.npz"))
    arrays["labels"][3, 0] ^= 1
    np.savez(copy / "clips.npz", **arrays)
    assert "fingerprint" in prepare.check(copy)[0]


@pytest.mark.parametrize(
    "before, after",
    [
        ('"bright"', '"dark"'),
        ('"multilabel"', '"none"'),
        ('"name": "tiny"', '"name": "../tiny"'),
        ('"train": 12', '"train": 13'),
    ],
)
def test_check_finds_what_was_changed_in_meta(copy, before, after):
    text = (copy / "meta.json").read_text()
    assert before in text
    (copy / "meta.json").write_text(text.replace(before, after, 1))
    assert "fingerprint" in prepare.check(copy)[0]


def test_every_flipped_bit_of_the_tables_is_found(copy):
    """Or it stands in what zip ignores, and then nothing is other than before."""
    data = (copy / "clips.npz").read_bytes()
    same = prepare.Clips(copy)
    rng = np.random.default_rng(0)
    missed = 0
    for at in rng.integers(0, len(data), 100):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        (copy / "clips.npz").write_bytes(damaged)
        try:
            clips = prepare.Clips(copy)
        except ValueError:
            continue
        missed += 1
        for key in ("start", "length", "labels", "id", "peak", "rate", "clipped", "sha256"):
            assert (getattr(clips, key) == getattr(same, key)).all()
    assert missed < 30


def crafted(folder, **changes):
    """A folder whose fingerprint and checksum fit, with other tables."""
    meta = json.loads((folder / "meta.json").read_text())
    tables = prepared._unpack((folder / "clips.npz").read_bytes()) | changes
    meta["name"] = changes.pop("name", meta["name"])
    tables.pop("name", None)
    prepared.seal(
        folder,
        tables,
        {k: v for k, v in meta.items() if k not in ("fingerprint", "checksum", "format")},
    )


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/x", "a\\b", "..", "", "a\nb"])
def test_a_name_cannot_lead_out_of_the_folder(copy, name):
    crafted(copy, name=name)
    with pytest.raises(ValueError, match="is no name"):
        prepare.Clips(copy)


@pytest.mark.parametrize("column, value", [("start", -5), ("start", 1 << 50), ("length", -1)])
def test_crafted_places_are_refused(copy, column, value):
    tables = prepared._unpack((copy / "clips.npz").read_bytes())
    tables[column][3] = value
    np.savez(
        copy / "clips.npz",
        **{
            **tables,
            "id": prepared._pack_text(tables["id"]),
            "artist": prepared._pack_text(tables["artist"]),
        },
    )
    meta = json.loads((copy / "meta.json").read_text())
    meta["fingerprint"] = prepared.fingerprint(tables, meta["sample_rate"], meta["tags"])
    meta["checksum"] = prepared._checksum(meta)
    (copy / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="do not fit each other"):
        prepare.Clips(copy)


def test_a_crafted_archive_takes_no_memory(copy):
    """A thousandfold compressed column, one that claims a terabyte, one that is a pickle."""
    for write in (
        lambda box: box.writestr("labels.npy", bytes(1 << 27), zipfile.ZIP_DEFLATED),
        lambda box: box.writestr("start.npy", header(1 << 40)),
        lambda box: box.writestr("start.npy", header(1, "|O") + b"cos\nsystem\n(S'true'\ntR."),
    ):
        with zipfile.ZipFile(copy / "clips.npz", "w") as box:
            write(box)
        with pytest.raises(ValueError, match="cannot be read"):
            prepare.Clips(copy)


def header(n, kind="<i8"):
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': ({n},)}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def test_rubbish_is_told(copy):
    (copy / "clips.npz").write_bytes(b"PK rubbish")
    with pytest.raises(ValueError, match="prepare it again"):
        prepare.Clips(copy)


def test_a_missing_table_is_told(copy):
    os.unlink(copy / "clips.npz")
    with pytest.raises(FileNotFoundError, match="clips.npz is missing"):
        prepare.Clips(copy)


# ----------------------------------------------------------------------- several folders as one set


@pytest.fixture(scope="module")
def two_folders(tmp_path_factory):
    """Two prepared folders with the same two tags, 4 and 3 songs, of which some have two clips."""
    root = tmp_path_factory.mktemp("two")
    for name, n in (("one", 4), ("two", 3)):
        songs(root / f"{name}-in", n, 0.5 if name == "one" else 0.7)
        rows = [
            (f"{chr(97 + i)}.wav", ("train", "test")[i % 2], f"song {i // 2}", "x" if i else "y")
            for i in range(n)
        ]
        labels = table(root / f"{name}.csv", ("file", "split", "group", "tags"), *rows)
        quietly(prepare.read_folder(root / f"{name}-in", labels), root / name)
    return root / "one", root / "two"


def test_several_folders_are_one_set_in_their_order(two_folders):
    one, two = map(prepare.Clips, two_folders)
    both = prepare.Clips(two_folders)
    assert len(both) == 7
    assert both.id.tolist() == one.id.tolist() + two.id.tolist()
    assert (both.labels == np.concatenate([one.labels, two.labels])).all()
    for i in range(7):
        assert torch.equal(both.waveform(i), one.waveform(i) if i < 4 else two.waveform(i - 4))


def test_what_is_said_of_several_folders_is_their_sum(two_folders):
    both = prepare.Clips(two_folders)
    about = (both.tags, both.task, both.sample_rate, both.name)
    assert about == (["x", "y"], "multilabel", 22050, "one+two")
    assert both.meta["clips"] == {"train": 4, "valid": 0, "test": 3}


def test_songs_of_several_folders_are_kept_apart(two_folders):
    assert prepare.Clips(two_folders).group.tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert prepare.Clips(two_folders, "train").group.tolist() == [0, 1, 2, 3]


def test_crops_come_from_every_folder_and_from_a_devices_memory_the_same(two_folders):
    test = prepare.Clips(two_folders, "test")
    index = np.array([2, 0, 1, 2])
    start = np.array([5, 0, 700, 0])
    crops = test.crops(index, start, 8000)
    for b in range(4):
        assert torch.equal(crops[b, 0], test.waveform(index[b])[start[b] : start[b] + 8000])
    assert test.keep_on("cpu")
    assert torch.equal(test.crops(index, start, 8000), crops)
    assert torch.equal(pickle.loads(pickle.dumps(test)).crops(index, start, 8000), crops)


def test_several_folders_are_checked(two_folders):
    prepare.Clips(two_folders).verify(n_clips=100)


def test_the_fingerprint_of_several_folders_is_made_of_theirs(two_folders):
    one, two = two_folders
    assert prepare.Clips([one]).fingerprint == prepare.Clips(one).fingerprint
    sets = (one, two, [one, two], [two, one])
    assert len({prepare.Clips(folders).fingerprint for folders in sets}) == 4


def test_folders_of_other_tags_count_without_labels(two_folders, tmp_path):
    quietly(prepare.read_folder(songs(tmp_path / "in", 2)), tmp_path / "out")
    mixed = prepare.Clips([two_folders[0], tmp_path / "out"])
    assert (mixed.task, mixed.tags, mixed.labels.shape) == ("none", [], (6, 0))


def test_one_folder_twice_is_refused(two_folders):
    with pytest.raises(ValueError, match="the same in"):
        prepare.Clips([*two_folders, two_folders[0]])


def test_folders_of_other_sample_rates_are_refused(two_folders, tmp_path):
    quietly(prepare.read_folder(songs(tmp_path / "in", 2)), tmp_path / "out", sample_rate=16000)
    with pytest.raises(ValueError, match="one sample rate, found .*22050 Hz, .*16000 Hz"):
        prepare.Clips([two_folders[0], tmp_path / "out"])


def test_artists_are_kept_and_change_no_fingerprint(tmp_path):
    songs(tmp_path / "in", 2)
    with_artist = table(
        tmp_path / "a.csv", ("file", "artist", "tags"), ("a.wav", "Ada", "x"), ("b.wav", "", "y")
    )
    without = table(tmp_path / "b.csv", ("file", "tags"), ("a.wav", "x"), ("b.wav", "y"))
    quietly(prepare.read_folder(tmp_path / "in", with_artist), tmp_path / "with")
    quietly(prepare.read_folder(tmp_path / "in", without), tmp_path / "without")
    known, unknown = prepare.Clips(tmp_path / "with"), prepare.Clips(tmp_path / "without")
    assert known.artist.tolist() == ["Ada", ""]
    assert unknown.artist.tolist() == ["", ""]
    assert known.fingerprint == unknown.fingerprint
