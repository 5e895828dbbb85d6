"""Published data sets and downloads: every reader, crafted lists and archives, bad connections."""

import csv
import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

import prepare
from recordings import cli, quietly, table, tone  # noqa: F401
from splits import fetch, published

# ------------------------------------------------------------------------------------ the data sets


def mtat(root, clips=60, tags=55):
    """A table of MagnaTagATune's form: clip i lies in folder i mod 16, tags 0 to i mod tags."""
    names = [f"tag {k:02d}" for k in range(tags)]
    rows = [["clip_id", *names, "mp3_path"]]
    info = [["clip_id", "track_number", "title", "artist", "album", "mp3_path"]]
    for i in range(clips):
        path = f"{i % 16:x}/song-{i}.mp3"
        rows.append([str(i), *("1" if i % tags >= k + 1 else "0" for k in range(tags)), path])
        info.append([str(i), "01", f"song {i // 2}", "artist", "album", path])
    root.mkdir(exist_ok=True)
    for name, lines in (("annotations_final.csv", rows), ("clip_info_final.csv", info)):
        with open(root / name, "w", newline="") as file:
            csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL).writerows(lines)
    return [row[-1] for row in rows[1:]]


def test_mtat(cli, tmp_path):
    paths = mtat(tmp_path / "in")
    for k, path in enumerate(paths):
        target = tmp_path / "in" / "mp3" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(target, tone(0.3, 16000, 200 + 10 * k), 16000)
    done = cli(
        [
            "prepare.py",
            "--data",
            "mtat",
            "--root",
            tmp_path / "in",
            "--out",
            tmp_path / "out",
            "--workers",
            2,
        ]
    )
    assert done.returncode == 0, done.stderr
    clips = prepare.Clips(tmp_path / "out")
    assert len(clips) == 60
    assert clips.tags == [f"tag {k:02d}" for k in range(50)]
    assert clips.task == "multilabel"
    for i, name in enumerate(clips.id):
        n = int(name.split("-")[1].split(".")[0])
        split = "train" if n % 16 < 12 else "valid" if n % 16 == 12 else "test"
        assert prepare.SPLITS[clips.split[i]] == split
        assert clips.labels[i].sum() == min(50, n % 55)
        assert clips.group[i] == n // 2
    assert "18706" in done.stdout  # what the published split has, beside what is here


def test_mtats_labelled_clips_are_those_with_a_tag(tmp_path):
    for path in mtat(tmp_path / "in"):
        (tmp_path / "in" / path).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / path).touch()
    labelled = prepare.DATASETS["mtat"](tmp_path / "in", split="labelled")
    assert len(labelled) == 58
    assert labelled.published == (15247, 1529, 4332)


def test_a_published_table_that_was_changed_is_told(tmp_path, cli):
    mtat(tmp_path / "in", clips=4)
    text = (tmp_path / "in" / "annotations_final.csv").read_text()
    (tmp_path / "in" / "annotations_final.csv").write_text(text.replace("mp3_path", "path"))
    done = cli(["prepare.py", "--data", "mtat", "--root", tmp_path / "in"], cwd=tmp_path)
    assert done.returncode == 1
    assert "a table of mtat is not as it was published: no 'mp3_path' in it" in done.stderr


def test_mtat_expects_the_three_empty_files(tmp_path):
    mtat(tmp_path / "in", clips=4)
    for name in ("annotations_final.csv", "clip_info_final.csv"):
        text = (tmp_path / "in" / name).read_text().replace('"3"', '"35644"', 1)
        (tmp_path / "in" / name).write_text(text)
    for i in range(4):
        (tmp_path / "in" / str(i)).mkdir()
        soundfile.write(tmp_path / "in" / str(i) / f"song-{i}.mp3", tone(0.3), 22050)
    (tmp_path / "in/3/song-3.mp3").write_bytes(b"")
    meta = quietly(prepare.DATASETS["mtat"](tmp_path / "in"), tmp_path / "out", max_skipped=0)
    assert [one["file"] for one in meta["skipped"]] == ["3/song-3.mp3"]
    assert meta["clips"]["train"] == 3


def test_gtzan_has_the_published_counts(tmp_path):
    for genre in "blues classical country disco hiphop jazz metal pop reggae rock".split():
        (tmp_path / "genres" / genre).mkdir(parents=True)
        for i in range(100):
            (tmp_path / "genres" / genre / f"{genre}.{i:05d}.au").touch()
    listing = prepare.DATASETS["gtzan"](tmp_path)
    counts = Counter(clip.split for clip in listing)
    assert (
        (counts["train"], counts["valid"], counts["test"]) == (443, 197, 290) == listing.published
    )
    assert listing.task == "singlelabel"
    assert len(listing.tags) == 10
    assert all(clip.id.startswith(clip.tags[0]) for clip in listing)


@pytest.fixture
def fma(tmp_path):
    meta = tmp_path / "fma_metadata"
    meta.mkdir()
    table(
        meta / "genres.csv",
        ("genre_id", "title", "top_level"),
        (1, "Rock", 1),
        (2, "Punk", 1),
        (3, "Jazz", 3),
    )
    table(
        meta / "tracks.csv",
        ("", "set", "set", "track", "track", "artist"),
        ("", "split", "subset", "genre_top", "genres_all", "bio"),
        ("track_id", "", "", "", "", ""),
        (2, "training", "small", "Rock", "[1, 2]", "x" * 200_000),
        (5, "validation", "medium", "Jazz", "[3]", "a\nb"),
        (10, "test", "small", "Rock", "[2]", ""),
        (20, "training", "large", "", "[2, 3]", ""),
        (99134, "training", "small", "Rock", "[1]", ""),
    )
    for track in (2, 5, 10, 20):
        folder = tmp_path / "fma_medium" / f"{track // 1000:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{track:06d}.mp3").touch()
    return tmp_path


def test_fmas_medium_subset_has_one_genre_each(fma):
    medium = prepare.DATASETS["fma"](fma)
    clips = [(clip.id, clip.split, clip.tags) for clip in medium]
    assert clips == [
        ("000002", "train", ("Rock",)),
        ("000005", "valid", ("Jazz",)),
        ("000010", "test", ("Rock",)),
    ]
    assert medium.task == "singlelabel"
    assert medium.published == (19922, 2505, 2573)
    assert medium.tags == ["Jazz", "Rock"]
    assert [one["file"] for one in medium.skipped] == ["099134"]
    assert "099134" in medium.broken


def test_fmas_large_subset_has_any_number_of_genres(fma):
    os.rename(fma / "fma_medium", fma / "fma_large")
    large = prepare.DATASETS["fma"](fma, subset="large")
    assert large.task == "multilabel"
    assert [clip.tags for clip in large] == [("Rock",), ("Jazz",), ("Rock",), ("Jazz", "Rock")]


def test_billboard(tmp_path):
    table(
        tmp_path / "billboard-2.0-index.csv",
        ("id", "chart_date", "title", "artist"),
        (3, "1961-07-03", "I Don't Mind", "James Brown"),
        (4, "1970-01-01", "You've Got a Friend", "Roberta Flack"),
        (5, "1970-01-08", "", ""),
        (7, "1971-01-01", "I Don't Mind", "James Brown"),
        (9, "1980-01-01", "Bésame", "Él"),
    )
    (tmp_path / "0004").mkdir()
    for name in ("0003.mp3", "0004/song.flac", "Él - Bésame.ogg", "0007.mp3", "other.wav"):
        (tmp_path / name).touch()
    listing = prepare.DATASETS["billboard"](tmp_path)
    assert [clip.id for clip in listing] == ["0003", "0004", "0009"]
    assert {clip.split for clip in listing} == {"train"}
    assert listing.task == "none"
    assert sorted(Path(one["file"]).name for one in listing.skipped) == ["0007.mp3", "other.wav"]
    others = (
        "an album/01 Intro.mp3",
        "another/01 Intro.mp3",
        "1999/a.mp3",
        "1999/b.mp3",
        "3/a.mp3",
        "3/b.mp3",
    )
    for name in others:  # not the index's business
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    again = prepare.DATASETS["billboard"](tmp_path)
    assert [clip.id for clip in again] == [clip.id for clip in listing]
    assert len(again.skipped) == 8
    # A folder that is a year, not a number of the index:
    os.rename(tmp_path / "Él - Bésame.ogg", tmp_path / "1999" / "Él - Bésame.ogg")
    assert [clip.id for clip in prepare.DATASETS["billboard"](tmp_path)] == [
        clip.id for clip in listing
    ]


# --------------------------------------------------------------- the Million Song Dataset's pickles


def msd(root, train=201690, test=3):
    """The field's index files as Python 2 left them: byte strings, protocol 2, numpy's vectors."""
    root.mkdir(exist_ok=True)
    ids = [f"TR{i:016d}".encode() for i in range(train + test)]
    vectors = {name: np.eye(1, 50, k % 50)[0] for k, name in enumerate(ids[:60] + ids[-20:])}
    vectors = {**dict.fromkeys(ids, np.zeros(50)), **vectors}
    for name, what in (
        ("filtered_list_train.cP", ids[:train]),
        ("filtered_list_test.cP", ids[train:]),
        ("msd_id_to_tag_vector.cP", vectors),
        ("MSD_id_to_7D_id.pkl", {ids[1]: b"777"}),
    ):
        (root / name).write_bytes(pickle.dumps(what, 2))
    (root / "50tagList.txt").write_text("".join(f"Tag{k}\n" for k in range(50)))
    return [name.decode() for name in ids]


def test_msd(tmp_path):
    ids = msd(tmp_path)
    (tmp_path / "7" / "77").mkdir(parents=True)
    for name in (f"{ids[0]}.mp3", "7/77/777.clip.mp3", f"{ids[201680]}.mp3", f"{ids[-1]}.mp3"):
        (tmp_path / name).touch()
    listing = prepare.DATASETS["msd"](tmp_path)
    clips = [(clip.id, clip.split, clip.tags) for clip in listing]
    assert clips == [
        (ids[0], "train", ("tag0",)),
        (ids[1], "train", ("tag1",)),
        (ids[201680], "valid", ("tag17",)),
        (ids[-1], "test", ("tag29",)),
    ]
    assert len(listing.skipped) == len(ids) - 4
    assert listing.published == (201680, 11774, 28435)


def refused(tmp_path, data):
    (tmp_path / "list.cP").write_bytes(data)
    with pytest.raises(ValueError, match="list.cP: expected a pickled list or dict: "):
        published.read_pickle(tmp_path / "list.cP")


def test_msd_runs_no_code_from_its_index(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'owned'}",)

    refused(tmp_path, pickle.dumps([Evil()], 2))
    assert not (tmp_path / "owned").exists()


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


@pytest.mark.parametrize(
    "data",
    [
        ARRAY
        + b"(I1\n(L1152921504606846976L\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntRI00\nS'short'\ntb.",
        ARRAY + b"(I1\n(I-1\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntRI00\nS''\ntb.",
        ARRAY + b"(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI00\n(S'x'\nltb.",
        ARRAY + b"(I1\n(I1\ntcnumpy\ndtype\n(S'V99999999'\nI0\nI1\ntRI00\nS'x'\ntb.",
        ARRAY + b"(I1\n(I1\ntS'no dtype'\nI00\nS'x'\ntb.",
        b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb.",
        b"cnumpy\nndarray\n(dS'x'\nI1\nsb.",
        b"cnumpy\ndtype\n(NN(S'shape'\nI1\ndtb.",
        b"c_codecs\nencode\n}S'a'\nI1\nsb.",
        b"(lp0\n",
        b"\x80\x09.",
        b"." * 100,
        b"",
        b"I1\n" * 5,
        b"(" * 100_000 + b"l" * 100_000 + b".x",
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"ctorch\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(ttR.",
    ],
)
def test_crafted_lists_are_told_in_one_line(tmp_path, data):
    before = {
        name: set(vars(value)) for name, value in vars(published).items() if isinstance(value, type)
    }
    (tmp_path / "list.cP").write_bytes(data)
    try:
        found = published.read_pickle(tmp_path / "list.cP")
    except ValueError as error:
        assert "expected a pickled list or dict" in str(error)
        assert "\n" not in str(error)
    else:
        assert isinstance(found, list)
    after = {
        name: set(vars(value)) for name, value in vars(published).items() if isinstance(value, type)
    }
    assert after == before  # the pickle has changed nothing of the running process


def test_a_list_that_multiplies_its_bytes_is_stopped(tmp_path):
    """A thousand times the same megabyte, encoded anew: a gigabyte from a file of 1 MB."""
    text = "x" * 1_000_000
    data = (
        b"\x80\x02(X"
        + len(text).to_bytes(4, "little")
        + text.encode()
        + b"q\x01"
        + 1000 * b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R"
        + b"l."
    )
    refused(tmp_path, data)


def test_numbers_of_every_kind_are_read(tmp_path):
    lists = [
        {"a": [1, 2.5, b"x", "y", None, True]},
        [np.arange(5, dtype=kind) for kind in ("<f8", ">i4", "u1")],
    ]
    for protocol in (0, 2, 4):
        (tmp_path / "list.cP").write_bytes(pickle.dumps(lists, protocol))
        found = published.read_pickle(tmp_path / "list.cP")
        assert found[0] in (
            {"a": [1, 2.5, b"x", "y", None, True]},
            {b"a": [1, 2.5, b"x", b"y", None, True]},
        )
        assert all((np.asarray(array) == np.arange(5)).all() for array in found[1])


# ---------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(monkeypatch):
    """A server on loopback: .files {path: bytes}, .drop {path: how often it breaks}, .asked."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            server.asked.append((self.path, self.headers.get("Range")))
            data = server.files.get(self.path)
            if data is None:
                return self.send_error(404)
            first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            if first >= len(data):
                return self.send_error(416)
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(data) - first))
            self.end_headers()
            if server.drop.get(self.path, 0) > 0:
                server.drop[self.path] -= 1
                self.wfile.write(data[first : first + (len(data) - first) // 2])
                self.wfile.flush()
                self.close_connection = True
                return self.connection.shutdown(2)
            self.wfile.write(data[first:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.drop, server.asked = {}, {}, []
        server.address = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        yield server
        server.shutdown()


def sha256(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_download_continues_after_a_lost_connection(server, tmp_path):
    data = np.random.default_rng(0).bytes(300_000)
    server.files["/a"], server.drop["/a"] = data, 2
    fetch.download([server.address + "a"], tmp_path / "a", sha256(data), pause=0)
    assert (tmp_path / "a").read_bytes() == data
    assert [asked[1] for asked in server.asked] == [None, "bytes=150000-", "bytes=225000-"]
    assert os.listdir(tmp_path) == ["a"]


def test_download_refuses_a_wrong_checksum(server, tmp_path):
    server.files["/bad"] = b"x" * 1000
    with pytest.raises(OSError, match="sha256 is .*, expected"):
        fetch.download(
            [server.address + "bad"], tmp_path / "a", sha256(b"y" * 1000), tries=2, pause=0
        )
    assert os.listdir(tmp_path) == []


def test_download_tries_the_next_address(server, tmp_path):
    server.files.update({"/bad": b"x" * 1000, "/good": b"y" * 1000})
    addresses = [server.address + name for name in ("gone", "bad", "good")]
    fetch.download(addresses, tmp_path / "a", sha256(b"y" * 1000), pause=0)
    assert (tmp_path / "a").read_bytes() == b"y" * 1000
    assert os.listdir(tmp_path) == ["a"]


def test_download_tells_a_404(server, tmp_path):
    with pytest.raises(OSError, match="404"):
        fetch.download([server.address + "gone"], tmp_path / "a", pause=0)


def test_download_keeps_what_has_arrived(server, tmp_path):
    server.files["/a"], server.drop["/a"] = b"z" * 1000, 99
    with pytest.raises(OSError, match="connection was lost after .* of 1,000 bytes"):
        fetch.download([server.address + "a"], tmp_path / "a", tries=2, pause=0)
    assert os.listdir(tmp_path) == ["a.part"]
    assert (tmp_path / "a.part").stat().st_size == 750
    server.drop["/a"] = 0
    fetch.download([server.address + "a"], tmp_path / "a", pause=0)
    assert (tmp_path / "a").read_bytes() == b"z" * 1000


def test_download_starts_over_where_more_is_there_than_the_file_has(server, tmp_path):
    (tmp_path / "b.part").write_bytes(b"z" * 2000)
    server.files["/b"] = b"b" * 100
    fetch.download([server.address + "b"], tmp_path / "b", pause=0)
    assert (tmp_path / "b").read_bytes() == b"b" * 100


def test_download_takes_no_more_than_what_is_expected(server, tmp_path):
    server.files["/a"] = b"z" * 100_000
    with pytest.raises(OSError, match="more than the 50,000 bytes"):
        fetch.download([server.address + "a"], tmp_path / "a", tries=1, pause=0, most=50_000)
    assert (tmp_path / "a.part").stat().st_size <= 50_000


def test_download_ends_in_time(server, tmp_path, monkeypatch):
    server.files["/a"] = b"z" * 1000
    clock = iter(range(0, 10**9, 10**5))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(OSError, match="too slow"):
        fetch.download([server.address + "a"], tmp_path / "a", pause=0, most=1000)


def test_mtat_is_downloaded_joined_unpacked_and_prepared(server, tmp_path, monkeypatch, capsys):
    paths = mtat(tmp_path / "source", clips=20)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for k, path in enumerate(paths):
            sound = io.BytesIO()
            soundfile.write(sound, tone(0.3, 16000, 200 + 20 * k), 16000, format="MP3")
            archive.writestr(path, sound.getvalue())
    whole = whole.getvalue()
    for k in range(3):
        server.files[f"/mp3.zip.00{k + 1}"] = whole[len(whole) * k // 3 : len(whole) * (k + 1) // 3]
    for name in ("annotations_final.csv", "clip_info_final.csv"):
        server.files[f"/{name}"] = (tmp_path / "source" / name).read_bytes()
    server.drop["/mp3.zip.002"] = 1
    checksums = {"annotations_final.csv": sha256(server.files["/annotations_final.csv"])}
    items = [
        fetch.Download(item.name, (server.address,), 1, checksums.get(item.name, ""))
        for item in fetch.DOWNLOADS["mtat"]
    ]
    monkeypatch.setitem(fetch.DOWNLOADS, "mtat", items)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    command = [
        "--data",
        "mtat",
        "--root",
        str(tmp_path / "root"),
        "--out",
        str(tmp_path / "out"),
        "--download",
    ]
    assert prepare.main(command) == 0
    assert len(prepare.Clips(tmp_path / "out")) == 20
    left = [
        name
        for name in os.listdir(tmp_path / "root")
        if "part" in name or "zip" in name or "unpack" in name
    ]
    assert not left
    server.asked.clear()
    assert prepare.main(command) == 0
    assert server.asked == []  # nothing is fetched twice


def test_gtzan_archive_from_the_second_mirror(server, tmp_path, monkeypatch):
    sound = io.BytesIO()
    soundfile.write(sound, tone(), 22050, format="AU")
    data = tar(("genres/blues/blues.00029.au", sound.getvalue()))
    server.files["/two/genres.tar.gz"] = data
    places = (server.address + "one/", server.address + "two/")
    monkeypatch.setitem(
        fetch.DOWNLOADS, "gtzan", [fetch.Download("genres.tar.gz", places, 1, sha256(data))]
    )
    (tmp_path / "genres.tar.gz.unpacking").mkdir()  # left by an interruption
    fetch.fetch("gtzan", tmp_path, pause=0)
    assert sorted(os.listdir(tmp_path)) == ["downloaded.txt", "genres"]
    assert len(prepare.DATASETS["gtzan"](tmp_path)) == 1


def test_an_archive_that_is_there_with_another_checksum_is_fetched_anew(
    server, tmp_path, monkeypatch
):
    data = tar(("genres/blues/blues.00029.au", b"x"))
    server.files["/genres.tar.gz"] = data
    items = [fetch.Download("genres.tar.gz", (server.address,), 1, sha256(data))]
    monkeypatch.setitem(fetch.DOWNLOADS, "gtzan", items)
    (tmp_path / "genres.tar.gz").write_bytes(b"half of it")
    fetch.fetch("gtzan", tmp_path, pause=0)
    assert (tmp_path / "genres/blues/blues.00029.au").read_bytes() == b"x"


# ----------------------------------------------------------------------------------------- archives


def tar(*members):
    """The bytes of a .tar.gz of (name, bytes) and ready-made TarInfo."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))
    return data.getvalue()


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zipped(*members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return data.getvalue()


def linked():
    info = zipfile.ZipInfo("songs")
    info.external_attr = 0o120777 << 16
    return info


def test_unpacking_leaves_what_else_is_there(tmp_path):
    (tmp_path / "genres" / "blues").mkdir(parents=True)
    (tmp_path / "genres" / "notes.csv").write_text("mine")
    (tmp_path / "genres" / "blues" / "a.wav").write_text(
        "half of it, from an interrupted unpacking"
    )
    (tmp_path / "g.zip").write_bytes(zipped(("genres/blues/a.wav", "whole")))
    fetch.unpack(tmp_path / "g.zip", tmp_path)
    assert (tmp_path / "genres" / "notes.csv").read_text() == "mine"
    assert (tmp_path / "genres" / "blues" / "a.wav").read_text() == "whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.zip", "genres"]


def test_a_broken_archive_names_the_files_to_remove(tmp_path):
    data = bytearray(zipped(("a.csv", "1,2,3\n" * 1000)))
    data[36:44] = b"\xff" * 8  # inside the compressed member: zlib's own error
    (tmp_path / "g.zip").write_bytes(data)
    with pytest.raises(OSError, match="g.zip: cannot be unpacked .*; rm .*g.zip and"):
        fetch.unpack(tmp_path / "g.zip", tmp_path)
    with pytest.raises(OSError, match="rm one.001 'two 2.002' and type the same command again"):
        fetch.unpack(tmp_path / "g.zip", tmp_path, ["one.001", "two 2.002"])


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.zip", zipped(("../evil", "x"))),
        ("a.zip", zipped(("/evil", "x"))),
        ("a.zip", zipped(("a/../../evil", "x"))),
        ("a.zip", zipped(("..\\evil", "x"))),
        ("a.zip", zipped((linked(), ".."))),
        ("a.zip", tar(("a", b"x"))),
        ("a.zip", b"PK\x05\x06" + bytes(18)[:10]),
        ("a.zip", b""),
        ("a.tar.gz", tar(("../evil", b"x"))),
        ("a.tar.gz", tar(("/evil", b"x"))),
        ("a.tar.gz", tar(link("songs", ".."), ("songs/evil", b"x"))),
        ("a.tar.gz", tar(link("hard", "../list", tarfile.LNKTYPE))),
        ("a.tar.gz", tar(link("pipe", "", tarfile.FIFOTYPE))),
        ("a.tar.gz", zipped(("a", "x"))),
        ("a.tar.gz", tar(("a", bytes(10_000)))[:60]),
        ("a.tar.gz", b""),
    ],
    # not the bytes, which hold the time of day
    ids=lambda value: value if isinstance(value, str) else "archive",
)
def test_crafted_archives_write_nothing_outside(tmp_path, name, data):
    root = tmp_path / "root"
    root.mkdir()
    (root / name).write_bytes(data)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(OSError, match="cannot be unpacked"):
        fetch.unpack(root / name, root)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert os.listdir(root) == [name]  # nor anything inside


@pytest.mark.parametrize(
    "name, make",
    [("a.zip", lambda data: zipped(("a", data))), ("a.tar.gz", lambda data: tar(("a", data)))],
)
def test_an_archive_that_unpacks_to_far_too_much_is_stopped(tmp_path, name, make):
    (tmp_path / name).write_bytes(make(bytes(10_000_000)))
    with pytest.raises(OSError, match="far more than its own size"):
        fetch.unpack(tmp_path / name, tmp_path, growth=20, spare=1_000_000)
    assert os.listdir(tmp_path) == [name]


def test_what_was_there_stays_until_the_whole_archive_is_read(tmp_path):
    data = bytearray(zipped(("a.wav", b"new"), ("b.wav", np.random.default_rng(0).bytes(5000))))
    data[3000] ^= 1  # in the second member: its CRC no longer fits
    (tmp_path / "g.zip").write_bytes(data)
    (tmp_path / "a.wav").write_bytes(b"old")
    with pytest.raises(OSError, match="CRC"):
        fetch.unpack(tmp_path / "g.zip", tmp_path)
    assert (tmp_path / "a.wav").read_bytes() == b"old"
