"""Tables of labels as people write them: what is taken, and what is said in which line."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
import soundfile

import prepare
from recordings import cli, songs, table, tone  # noqa: F401
from splits import tables


@pytest.fixture
def listing(tmp_path):
    """listing(text or rows, n=4): a folder of n songs a.wav, b.wav, ... read with such a table."""

    def listing(content, n=4):
        path = tmp_path / "l.csv"
        if isinstance(content, (str, bytes)):
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        else:
            table(path, *content)
        return prepare.read_folder(songs(tmp_path / "in", n), path)

    return listing


def test_a_column_of_tags(listing):
    found = listing(
        [
            ("file", "split", "group", "tags", "artist"),
            ("a.wav", "train", "x", "old; loud", "A"),
            ("b.wav", "validation", "x", "", "A"),
            ("c.wav", "test", "y", "loud", "B"),
        ]
    )
    assert (found.task, found.tags) == ("multilabel", ["loud", "old"])
    assert [clip.tags for clip in found] == [("old", "loud"), (), ("loud",)]
    assert [clip.split for clip in found] == ["train", "valid", "test"]
    assert [clip.group for clip in found] == ["x", "x", "y"]
    assert [clip.artist for clip in found] == ["A", "A", "B"]
    assert found.skipped == [{"file": "d.wav", "reason": "no row in l.csv"}]


def test_a_column_of_labels(listing):
    found = listing(
        [
            ("file", "label", "year"),
            ("a.wav", "loud", 1),
            ("b.wav", "old", 2),
            ("./c.wav", "loud", 3),
        ]
    )
    assert (found.task, found.tags) == ("singlelabel", ["loud", "old"])
    assert [clip.id for clip in found] == ["a.wav", "b.wav", "c.wav"]
    assert found.skipped == [{"file": "d.wav", "reason": "no row in l.csv"}]


def test_a_column_for_each_tag(listing):
    found = listing(
        [
            ("file", "old", "loud", "split"),
            ("a.wav", 1, 1, "train"),
            ("b.wav", 0, 0, "valid"),
            ("c.wav", 0, 1, "test"),
        ]
    )
    assert (found.task, found.tags) == ("multilabel", ["old", "loud"])
    assert [clip.tags for clip in found] == [("old", "loud"), (), ("loud",)]
    assert found.skipped == [{"file": "d.wav", "reason": "no row in l.csv"}]


def test_a_table_without_tags_gives_splits_alone(listing):
    found = listing([("file", "split", "artist"), ("a.wav", "test", "Ada")])
    assert (found.task, found.tags, found[0].split, found[0].artist) == ("none", [], "test", "Ada")


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile;label\r\na.wav;größer\r\n",
        "sep=;\r\nfile;label\r\na.wav;größer\r\n",
        "file\tlabel\na.wav\tgrößer\n",
        '"sep=\t"\nfile\tlabel\na.wav\tgrößer\n',
    ],
)
def test_tables_as_spreadsheets_write_them(listing, text):
    assert listing(text).tags == ["größer"]


def test_a_row_without_a_file_and_a_file_without_a_row(cli, tmp_path):
    songs(tmp_path / "in", 3)
    labels = table(
        tmp_path / "l.csv", ("file", "label"), ("a.wav", "x"), ("b.wav", "y"), ("gone.wav", "x")
    )
    command = [
        "prepare.py",
        "--data",
        "folder",
        "--root",
        tmp_path / "in",
        "--labels",
        labels,
        "--out",
        tmp_path / "out",
    ]
    done = cli(command)
    assert done.returncode == 1
    assert "1 of 3 files cannot be used" in done.stderr
    assert "gone.wav: missing" in done.stderr
    done = cli([*command, "--max-skipped", 0.34])
    assert done.returncode == 0
    assert "gone.wav: missing" in done.stdout
    assert "c.wav: no row in l.csv" in done.stdout
    assert prepare.Clips(tmp_path / "out").id.tolist() == ["a.wav", "b.wav"]


@pytest.mark.parametrize(
    "rows, word",
    [
        ([("name", "label"), ("a.wav", "x")], "column `file`"),
        ([("file", "label", "tags"), ("a.wav", "x", "y")], "one of `tags` and `label`"),
        (
            [("file", "label"), ("a.wav", "x"), ("a.wav", "y")],
            "line 3: a.wav stands there a second time",
        ),
        ([("file", "label"), ("a.wav", "")], "line 2: a.wav has no label"),
        (
            [("file", "old", "composer"), ("a.wav", "1", "Bach")],
            "tag column `composer`, found 'Bach'",
        ),
        (
            [("file", "split", "label"), ("a.wav", "dev", "x")],
            "valid or test in the column `split`, found 'dev'",
        ),
        ([("file", "label"), ("z.wav", "x")], "none of the 1 recordings listed is there"),
        ([("file", "label")], "found no row"),
        ([("file", "old", "old"), ("a.wav", "1", "0")], "column `old` stands there twice"),
        ([("file", "caf\u00e9", "cafe\u0301"), ("a.wav", "1", "0")], "stands there twice"),
        (
            [("file", "split", "tags"), ("a.wav", "test", ""), ("b.wav", "train", " ; ")],
            "no row has one",
        ),
        ([("file", "old", "new"), ("a.wav", "0", "0")], "no row has one"),
    ],
)
def test_bad_tables_are_told(listing, rows, word):
    with pytest.raises((ValueError, FileNotFoundError), match=word):
        listing(rows)


@pytest.mark.parametrize(
    "text, word",
    [
        (
            'file,label\na.wav,x\n\n\nb.wav,y\n"c.wav","x\ny"\na.wav,z\n',
            "line 8: a.wav stands there",
        ),
        (
            'file,split,tags\na.wav,train,"x; y\nb.wav,train,x\nc.wav,train,y\n',
            "line 2: a quote opens there",
        ),
        ("sep=;\nfile;label\na.wav;\n", "line 3: a.wav has no label"),
        ('file,label\na.wav,x\nb.wav,"x" y\n', "line 3: "),
    ],
)
def test_the_line_that_is_named_is_the_one_in_the_file(listing, text, word):
    with pytest.raises(ValueError, match=word):
        listing(text)


def test_tags_in_two_unicode_spellings_are_one(listing):
    found = listing("file,label\na.wav,\u00c9lectro\nb.wav,E\u0301lectro\n")
    assert found.tags == ["\u00c9lectro"]


def test_commas_within_tags_are_pointed_out(listing):
    found = listing(
        'file,tags\na.wav,"rock, pop"\nb.wav,"pop, Rock"\nc.wav,rock|jazz\nd.wav,jazz\n'
    )
    assert "3 of 4 rows have a comma or | within a tag, as 'rock, pop'" in found.hints[0]
    assert found.hints[1] == "tags that differ by case alone: 'Rock', 'rock'"


def test_hints_are_printed(cli, tmp_path):
    songs(tmp_path / "in", 3)
    labels = table(
        tmp_path / "l.csv", ("file", "tags"), ("a.wav", "Rock"), ("b.wav", "rock"), ("c.wav", "pop")
    )
    done = cli(
        [
            "prepare.py",
            "--data",
            "folder",
            "--root",
            tmp_path / "in",
            "--labels",
            labels,
            "--out",
            tmp_path / "out",
        ]
    )
    assert "note: tags that differ by case alone: 'Rock', 'rock'" in done.stdout


def test_a_table_in_another_encoding_is_told(listing):
    with pytest.raises(ValueError, match="UTF-8"):
        listing("file,label\na.wav,größer\n".encode("latin-1"))


def test_names_in_either_unicode_spelling_meet(tmp_path):
    soundfile.write(tmp_path / "Cafe\u0301.wav", tone(), 22050)
    labels = table(tmp_path / "l.csv", ("file", "label"), ("Caf\u00e9.wav", "x"))
    found = prepare.read_folder(tmp_path, labels)
    assert [clip.id for clip in found] == ["Caf\u00e9.wav"]
    assert found[0].file.exists()


def test_a_table_may_name_files_in_several_ways(tmp_path, monkeypatch):
    folder = songs(tmp_path / "in" / "sub", 5)
    soundfile.write(folder / "f.wave", tone(0.5), 22050, format="WAV")
    names = (
        "sub/a.wav",
        "./sub/b.wav",
        str(folder / "c.wav"),
        "sub\\d.wav",
        "in/sub/e.wav",
        "sub/f.wave",
        "/elsewhere/g.wav",
    )
    table(tmp_path / "t.csv", ("file", "label"), *((name, "x") for name in names))
    monkeypatch.chdir(tmp_path)
    found = prepare.read_folder(Path("in"), tmp_path / "t.csv")
    expected = [f"sub/{name}" for name in ("a.wav", "b.wav", "c.wav", "d.wav", "e.wav", "f.wave")]
    assert sorted(clip.id for clip in found) == expected
    assert [one["file"] for one in found.skipped] == ["/elsewhere/g.wav"]


def test_a_name_below_the_root_is_not_taken_for_one_beside_it(tmp_path, monkeypatch):
    songs(tmp_path / "disc", 1)
    songs(tmp_path / "disc" / "disc", 2)
    table(tmp_path / "t.csv", ("file", "label"), ("disc/a.wav", "x"), ("disc/c.wav", "x"))
    shutil.copy(tmp_path / "disc" / "a.wav", tmp_path / "disc" / "c.wav")
    monkeypatch.chdir(tmp_path)
    found = prepare.read_folder(Path("disc"), tmp_path / "t.csv")
    assert [clip.id for clip in found] == ["disc/a.wav"]
    assert "disc/c.wav" in [one["file"] for one in found.skipped]  # not c.wav


def test_a_table_may_name_a_file_by_another_link(tmp_path):
    songs(tmp_path / "in" / "albums", 2)
    os.symlink("albums", tmp_path / "in" / "best")
    labels = table(
        tmp_path / "t.csv", ("file", "label"), ("best/a.wav", "x"), ("albums/b.wav", "y")
    )
    found = prepare.read_folder(tmp_path / "in", labels)
    assert [clip.id for clip in found] == ["albums/a.wav", "albums/b.wav"]


def test_a_field_that_was_split_in_two_is_told(listing):
    with pytest.raises(ValueError, match="l.csv, line 2: more fields than the 2 columns"):
        listing("file;tags\na.wav;rock; loud\n")
    assert listing('file;tags;\na.wav;"rock; loud";\n')[0].tags == ("rock", "loud")


def test_songs_are_dealt_to_splits_by_their_group(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [(f"{i}.wav", f"song {i // 3}", "x") for i in range(600)]
    for name, *_ in rows:
        (folder / name).touch()
    found = prepare.read_folder(
        folder, table(tmp_path / "l.csv", ("file", "group", "label"), *rows)
    )
    splits = {}
    for clip in found:
        splits.setdefault(clip.group, set()).add(clip.split)
    assert all(len(one) == 1 for one in splits.values())
    counts = Counter(clip.split for clip in found)
    assert 430 < counts["train"] < 520
    assert counts["valid"] > 30
    assert counts["test"] > 30
    assert found.split_name == "80:10:10 by song"


@pytest.mark.parametrize(
    "n, least",
    [
        (1, ["train"]),
        (2, ["test", "train"]),
        *((n, ["test", "train", "valid"]) for n in range(3, 30)),
    ],
)
def test_every_split_has_some_songs_where_their_number_allows(n, least):
    for first in range(20):
        splits = tables.deal(f"song {first + i}" for i in range(n))
        assert sorted(set(splits.values())) == least
