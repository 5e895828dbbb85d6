"""Any folder of audio: what is found, what is left out, and that it is said."""

import os
import socket

import pytest
import soundfile

import prepare
from recordings import cli, songs, tone  # noqa: F401


def left_out(folder):
    return {one["file"]: one["reason"] for one in prepare.audio_files(folder).left_out}


def test_names_that_are_no_text_at_all(tmp_path, cli):
    (tmp_path / "in").mkdir()
    for name in (b"\xff\xfe.wav", b"new\nline.wav", b"-dash.wav"):
        soundfile.write(tmp_path / "a.wav", tone(), 22050)
        os.rename(tmp_path / "a.wav", os.path.join(os.fsencode(tmp_path / "in"), name))
    done = cli(["prepare.py", "--data", "folder", "--root", "in", "--name", "odd"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(prepare.Clips("data/odd")) == 3
    assert prepare.check("data/odd") == []
    assert "\\udcff" in done.stdout


def test_control_characters_are_not_sent_to_a_terminal(tmp_path, cli):
    soundfile.write(tmp_path / "\x1b[31mred\x07.wav", tone(), 22050)
    done = cli(["prepare.py", "--data", "folder", "--root", tmp_path, "--out", tmp_path / "out"])
    assert "\\x1b[31mred\\x07.wav" in done.stdout
    assert not set("\x1b\x07") & set(done.stdout + done.stderr.replace("\x1b[A", ""))


def test_a_newline_in_a_name_does_not_break_the_report(tmp_path, cli):
    soundfile.write(tmp_path / "two\nlines.wav", tone(), 22050)
    done = cli(["prepare.py", "--data", "folder", "--root", tmp_path, "--out", tmp_path / "out"])
    assert done.returncode == 0
    assert "two\\nlines.wav" in done.stdout
    assert not [line for line in done.stdout.splitlines() if line.startswith("lines.wav")]


def test_a_circle_of_links_is_followed_once(tmp_path):
    songs(tmp_path / "elsewhere", 2)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "album").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "circle").symlink_to(tmp_path / "in")
    assert list(prepare.audio_files(tmp_path / "in")) == ["album/a.wav", "album/b.wav"]
    assert left_out(tmp_path / "in") == {"album/circle": "left out: a link in a circle"}


def test_a_folder_that_is_reached_twice_stands_there_once(tmp_path):
    songs(tmp_path / "a album", 2)
    (tmp_path / "best of").symlink_to("a album")
    (tmp_path / "one more.wav").symlink_to("a album/a.wav")
    found = prepare.audio_files(tmp_path)
    assert sorted(found.values()) == [tmp_path / "a album" / "b.wav", tmp_path / "one more.wav"]
    assert found.aliases == {
        "a album/a.wav": "one more.wav",
        "best of/a.wav": "one more.wav",
        "best of/b.wav": "a album/b.wav",
    }


def test_two_files_of_one_name_are_an_error(tmp_path):
    for name in ("\u00e9.wav", "e\u0301.wav"):  # two spellings of one letter
        soundfile.write(tmp_path / name, tone(), 22050)
    with pytest.raises(ValueError, match="are both"):
        prepare.audio_files(tmp_path)


def test_names_that_begin_with_a_dot_are_found(tmp_path):
    for album in (".38 Special", "...Like Clockwork"):
        songs(tmp_path / album, 1)
    for name in ("._a.wav", ".DS_Store"):
        (tmp_path / name).write_bytes(b"of the file system")
    songs(tmp_path / ".Trashes", 1)
    assert list(prepare.audio_files(tmp_path)) == ["...Like Clockwork/a.wav", ".38 Special/a.wav"]
    assert left_out(tmp_path) == {}


def test_what_is_no_audio_by_its_name_is_listed(tmp_path):
    songs(tmp_path, 1)
    for name in ("cover.jpg", "notes.txt", "song.xyz", "no suffix"):
        (tmp_path / name).touch()
    reason = "left out: no audio by its name"
    assert left_out(tmp_path) == {"no suffix": reason, "song.xyz": reason}


def test_what_is_no_file_is_called_what_it_is(tmp_path):
    songs(tmp_path, 1)
    os.mkfifo(tmp_path / "b.wav")
    (tmp_path / "c.wav").symlink_to("nothing")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "d.wav"))
        assert left_out(tmp_path) == {
            "b.wav": "left out: a FIFO, not a file",
            "c.wav": "left out: a link to nothing",
            "d.wav": "left out: a socket, not a file",
        }


def test_a_folder_that_cannot_be_read_is_listed(tmp_path, monkeypatch):
    songs(tmp_path, 1)
    songs(tmp_path / "locked", 1)
    scandir = os.scandir

    def refuse(folder):
        if os.path.basename(folder) == "locked":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert left_out(tmp_path) == {"locked": "left out: it cannot be read: Permission denied"}


def test_what_was_left_out_is_counted(tmp_path, cli):
    songs(tmp_path / "in", 2)
    (tmp_path / "in" / "song.xyz").touch()
    done = cli(
        ["prepare.py", "--data", "folder", "--root", tmp_path / "in", "--out", tmp_path / "out"]
    )
    assert done.returncode == 0
    assert "left out: 1\n" in done.stdout
    assert "song.xyz: left out: no audio by its name" in done.stdout
