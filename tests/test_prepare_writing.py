"""Writing a prepared folder as a user does: commands, reports, shards, and what ends it early."""

import contextlib
import doctest
import fcntl
import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import prepare
from conftest import ROOT
from recordings import bad_files, cli, contents, quietly, songs, table, tone  # noqa: F401
from splits import tables, workers, writing

# -------------------------------------------------------------------------------------- the command


def test_bad_files_are_counted_skips_and_too_many_an_error(run, tmp_path):
    reasons = bad_files(tmp_path / "in")
    songs(tmp_path / "in", 6)
    soundfile.write(tmp_path / "in" / "kurz.wav", tone(0.2), 22050)  # shorter than any window: kept
    (tmp_path / "in" / "deep er").mkdir()
    stereo = np.stack([tone(1, 44100)] * 2, 1)
    soundfile.write(tmp_path / "in" / "deep er" / "Дорога – 道.flac", stereo, 44100)
    (tmp_path / "in" / "notes.txt").write_text("ignored")
    command = [
        "prepare.py",
        "--data",
        "folder",
        "--root",
        tmp_path / "in",
        "--out",
        tmp_path / "out",
        "--workers",
        2,
    ]
    done = run(command)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert f"{len(reasons)} of 18 files cannot be used" in done.stderr.splitlines()[-1]
    assert "--max-skipped 0.5" in done.stderr
    assert (tmp_path / "out.partial" / "journal.jsonl").stat().st_size > 0
    done = run([*command, "--max-skipped", 0.6])
    assert done.returncode == 0, done.stderr
    assert "0 bytes" in done.stdout
    assert "next: python pretrain.py" in done.stdout
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    skipped = {one["file"]: one["reason"] for one in meta["skipped"]}
    assert skipped.keys() == reasons.keys()
    assert all(reasons[name] in skipped[name] for name in reasons)
    clips = prepare.Clips(tmp_path / "out")
    assert len(clips) == 8
    assert "deep er/Дорога – 道.flac" in clips.id
    assert (clips.task, clips.labels.shape) == ("none", (8, 0))
    assert clips.length[clips.id.tolist().index("kurz.wav")] == 4410
    assert "kurz.wav" in meta["report"]["shorter than 3 s"]
    assert meta["clips"] == {"train": 8, "valid": 0, "test": 0}
    assert meta["report"]["rates"] == {"22050": 7, "44100": 1}


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        ([], 2, ["expected --data", "--check NAME"]),
        (["--data", "folder"], 2, ["--root DIR"]),
        (["--data", "folder", "--root", "nosuch"], 2, ["nosuch: no such file"]),
        (
            ["--data", "folder", "--root", ".", "--labels", "nosuch.csv"],
            2,
            ["nosuch.csv: no such file"],
        ),
        (["--data", "folder", "--root", "."], 1, ["expected audio files", "found none"]),
        (["--data", "nosuch"], 2, ["invalid choice", "folder"]),
        (
            ["--data", "gtzan", "--root", ".", "--labels", "."],
            2,
            ["--labels goes with --data folder"],
        ),
        (["--data", "folder", "--root", ".", "--workers", "0"], 2, ["--workers", "from 1 to"]),
        (["--data", "folder", "--root", ".", "--shard", "5/4"], 2, ["--shard", "2/4"]),
        (["--data", "folder", "--root", ".", "--shard", "0/4"], 2, ["--shard", "2/4"]),
        (["--data", "folder", "--root", ".", "--timeout", "inf"], 2, ["--timeout", "inf"]),
        (["--data", "folder", "--root", ".", "--segment", "1e-9"], 2, ["--segment", "from 0.001"]),
        (["--data", "folder", "--root", ".", "--max-skipped", "nan"], 2, ["--max-skipped", "nan"]),
        (["--data", "folder", "--root", ".", "--sample-rate", "1"], 2, ["--sample-rate", "1000"]),
        (
            ["--data", "mtat", "--root", ".", "--download", "--dry-run"],
            2,
            ["--dry-run", "--download"],
        ),
        (["--data", "mtat", "--root", "."], 1, ["annotations_final.csv", "not there"]),
        (["--data", "folder", "--root", ".", "--download"], 1, ["not public", "mtat"]),
        (["--check", "nosuch"], 2, ["not prepared", "python prepare.py --data folder"]),
        (["--check", "mtat"], 2, ["type: python prepare.py --data mtat --root DIR"]),
    ],
)
def test_wrong_commands_are_told_in_one_line(tmp_path, arguments, code, words, cli):
    done = cli(["prepare.py", *arguments], cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("usage:")]
    assert done.returncode == code
    assert len(lines) == 1
    assert lines[0].startswith("prepare.py: error: "), lines
    assert all(word in lines[0] for word in words)


def test_demo_is_read_without_further_flags(cli, tmp_path):
    done = cli(["prepare.py", "--data", "demo", "--out", tmp_path / "demo"])
    assert done.returncode == 0, done.stderr
    clips = prepare.Clips(tmp_path / "demo")
    assert clips.task == "singlelabel"
    assert (clips.labels.sum(1) == 1).all()
    assert not [one for one in clips.meta["skipped"] if not one["reason"].startswith("left out")]
    assert all(len(prepare.Clips(tmp_path / "demo", split)) for split in prepare.SPLITS)


def test_dry_run_writes_nothing(tmp_path, cli):
    songs(tmp_path / "in", 20, 1.0)
    done = cli(["prepare.py", "--data", "folder", "--root", "in", "--dry-run"], cwd=tmp_path)
    assert done.returncode == 0
    assert "20 files (20 train" in done.stdout
    assert "GB free" in done.stdout
    assert os.listdir(tmp_path) == ["in"]


def test_the_estimate_is_that_of_the_samples(tmp_path):
    songs(tmp_path / "in", 20, 1.0)
    size, seconds = writing.estimate(prepare.read_folder(tmp_path / "in"), prepare.Options())
    true = sum(2 * len(prepare.decode(path)) for path in (tmp_path / "in").iterdir())
    assert size == pytest.approx(true, rel=0.02)
    assert seconds > 0


def test_the_next_command_can_be_pasted(tmp_path, cli):
    songs(tmp_path / "my music", 2)
    done = cli(
        ["prepare.py", "--data", "folder", "--root", "my music", "--name", "it's mine"],
        cwd=tmp_path,
    )
    following, after = done.stdout.splitlines()[-2:]
    assert shlex.split(following) == ["next:", "python", "pretrain.py", "--data", "it's mine"]
    assert shlex.split(after) == [
        "then:",
        "python",
        "-m",
        "library",
        "index",
        "my music",
        "--ckpt",
        "runs/it's mine/encoder.pt",
    ]


def test_the_next_command_fits_what_was_prepared(tmp_path, cli):
    songs(tmp_path / "in", 3)
    labels = table(
        tmp_path / "l.csv", ("file", "label"), ("a.wav", "x"), ("b.wav", "y"), ("c.wav", "x")
    )
    done = cli(
        ["prepare.py", "--data", "folder", "--root", "in", "--labels", labels, "--name", "m"],
        cwd=tmp_path,
    )
    assert done.stdout.splitlines()[-1] == "then: python evaluate.py --ckpt runs/m/encoder.pt"


def test_splits_too_small_to_tell_anything_are_named(tmp_path, cli):
    songs(tmp_path / "in", 4)
    labels = table(
        tmp_path / "l.csv",
        ("file", "label", "split"),
        ("a.wav", "x", "train"),
        ("b.wav", "y", "test"),
    )
    done = cli(
        ["prepare.py", "--data", "folder", "--root", "in", "--labels", labels, "--name", "m"],
        cwd=tmp_path,
    )
    assert (
        "note: test has 1 songs, chance moves a figure by 98 points: it begins to tell"
        in done.stdout
    )
    assert "note: valid has 0 songs: it begins to tell something from 30" in done.stdout


@pytest.mark.parametrize(
    "closed", [">&- 2>&-", "2>&-", "> /dev/full", "2> /dev/full", "| head -c 0"]
)
def test_a_closed_or_full_output_costs_nothing(tmp_path, python, closed):
    songs(tmp_path / "in", 2)
    command = f"{python} {ROOT / 'prepare.py'} --data folder --root in --name mine"
    subprocess.run(
        ["bash", "-c", f"{command} {closed}"], cwd=tmp_path, timeout=120, capture_output=True
    )
    assert prepare.check(tmp_path / "data" / "mine") == []


def test_text_files_are_utf8_whatever_the_locale(tmp_path, run):
    songs(tmp_path / "in", 1)
    os.rename(tmp_path / "in" / "a.wav", tmp_path / "in" / "größer.wav")
    table(tmp_path / "l.csv", ("file", "label"), ("größer.wav", "größe"))
    done = run(
        ["prepare.py", "--data", "folder", "--root", "in", "--labels", "l.csv", "--name", "m"],
        cwd=tmp_path,
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert done.returncode == 0, done.stderr
    assert prepare.Clips(tmp_path / "data" / "m").tags == ["größe"]


def test_ctrl_c_during_the_imports_is_silent(tmp_path, python):
    process = subprocess.Popen(
        [python, ROOT / "prepare.py", "--check", "nosuch"], cwd=tmp_path, stderr=subprocess.PIPE
    )
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert b"Traceback" not in process.communicate(timeout=60)[1]


# --------------------------------------------------------------------------------------- the report


def test_report_names_duplicates_silence_clipping_and_loudness(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(4), 22050)
    shutil.copy(tmp_path / "a.wav", tmp_path / "b.wav")
    soundfile.write(tmp_path / "quiet.wav", np.zeros(88200), 22050)
    soundfile.write(tmp_path / "square.wav", np.clip(tone(4, level=5.0), -1, 1), 22050)
    soundfile.write(tmp_path / "loud.wav", tone(4, level=1.5), 22050, subtype="FLOAT")
    report = quietly(prepare.read_folder(tmp_path), tmp_path / "out")["report"]
    kinds = [report[kind] for kind in ("duplicate", "silent", "clipped", "turned down")]
    assert kinds == [["b.wav"], ["quiet.wav"], ["square.wav"], ["loud.wav"]]
    assert report["found"] == 5
    assert report["missing"] == report["broken"] == 0
    assert not report["shorter than 3 s"]
    assert report["rates"] == {"22050": 5}


def test_report_names_spikes_and_channels_that_cancel(tmp_path):
    spiked = tone(4, level=0.3)
    spiked[1000] = 2e38
    soundfile.write(tmp_path / "spike.wav", spiked, 22050, subtype="FLOAT")
    soundfile.write(tmp_path / "phase.wav", np.stack([tone(4), -tone(4)], 1), 22050)
    report = quietly(prepare.read_folder(tmp_path), tmp_path / "out")["report"]
    assert report["spike"] == ["spike.wav"]
    assert report["out of phase"] == report["silent"] == ["phase.wav"]
    assert not report["turned down"]


def test_segments_are_clips_of_one_song_and_lose_nothing(tmp_path):
    x = np.random.default_rng(0).uniform(-0.5, 0.5, round(8.6 * 22050))
    soundfile.write(tmp_path / "long.wav", x, 22050)
    soundfile.write(tmp_path / "short.wav", x[:22050], 22050)
    quietly(prepare.read_folder(tmp_path), tmp_path / "out", segment=2.0)
    clips = prepare.Clips(tmp_path / "out")
    assert clips.id.tolist() == [
        "long.wav@0",
        "long.wav@2",
        "long.wav@4",
        "long.wav@6",
        "short.wav",
    ]
    assert clips.group.tolist() == [0, 0, 0, 0, 1]
    assert clips.length.tolist() == [44100, 44100, 44100, 57330, 22050]  # 0.6 s stay with the last
    whole = torch.cat([clips.waveform(i) for i in range(4)])
    assert torch.allclose(whole, torch.from_numpy(x).float(), atol=2 / 32768)


# ---------------------------------------------------------------------------------- ended too early

SLOW = textwrap.dedent("""
    import os, sys, time
    sys.path.insert(0, {root!r})
    import prepare
    def slow(path, rate, survey):
        with open({log!r}, "a") as file:
            file.write(os.path.basename(path) + "\\n")
        time.sleep({pause})
        yield from prepare.stream(path, rate, survey)
    if __name__ == "__main__":
        options = prepare.Options(workers=2, stream=slow, progress=False)
        prepare.write(prepare.read_folder({folder!r}), {out!r}, options)
    """)


def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path, python):
    folder = songs(tmp_path / "in", 24)
    quietly(prepare.read_folder(folder), tmp_path / "straight" / "out")

    def start(pause):
        script = SLOW.format(
            root=str(ROOT),
            log=str(tmp_path / "log"),
            folder=str(folder),
            out=str(tmp_path / "out"),
            pause=pause,
        )
        (tmp_path / "slow.py").write_text(script)
        return subprocess.Popen(
            [python, tmp_path / "slow.py"], env={**os.environ, "OMP_NUM_THREADS": "1"}
        )

    journal = tmp_path / "out.partial" / "journal.jsonl"
    for finished in (3, 9):
        process = start(0.15)
        while not journal.exists() or journal.read_bytes().count(b"\n") < finished:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with open(tmp_path / "out.partial" / "audio.npy", "ab") as file:
        file.write(b"half a clip")  # killed between the samples and the line that vouches for them
    with open(journal, "ab") as file:
        file.write(b'{"lengths": [11')
    sure = journal.read_bytes().count(b"\n")
    decoded = len((tmp_path / "log").read_text().split())
    assert start(0).wait() == 0
    assert (
        len((tmp_path / "log").read_text().split()) - decoded == 24 - sure
    )  # nothing is decoded again
    assert contents(tmp_path / "out") == contents(tmp_path / "straight" / "out")
    assert not journal.parent.exists()


@contextlib.contextmanager
def interrupted(monkeypatch, files=2):
    """Ctrl-C after so many files."""

    class Bar(writing.tqdm):
        done = 0

        def update(self, n=1):
            Bar.done += 1
            if Bar.done == files:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writing, "tqdm", Bar)
        yield


@pytest.mark.parametrize("fault", ["zeros", "one bit", "a hole"])
def test_samples_that_a_power_cut_lost_are_decoded_again(tmp_path, monkeypatch, fault):
    """The journal's line reached the disk, the samples before it did not."""
    listing = prepare.read_folder(songs(tmp_path / "in", 8))
    quietly(listing, tmp_path / "straight" / "out")
    with interrupted(monkeypatch, files=5):
        quietly(listing, tmp_path / "out")
    path = tmp_path / "out.partial" / "audio.npy"
    data = bytearray(path.read_bytes())
    if fault == "zeros":
        data[-5000:] = bytes(5000)
    elif fault == "one bit":
        data[-5000] ^= 1
    else:
        data[40_000:44_000] = bytes(4000)
    path.write_bytes(data)
    quietly(listing, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "straight" / "out")


def test_a_run_that_is_complete_is_not_repeated_and_not_overwritten(tmp_path, cli):
    folder = songs(tmp_path / "in", 3)
    command = ["prepare.py", "--data", "folder", "--root", folder, "--out", tmp_path / "out"]
    assert cli(command).returncode == 0
    before = (tmp_path / "out" / "audio.npy").stat().st_mtime_ns
    assert cli(command).returncode == 0
    assert (tmp_path / "out" / "audio.npy").stat().st_mtime_ns == before
    soundfile.write(folder / "z.wav", tone(), 22050)
    done = cli(command)
    assert done.returncode == 1
    assert "is there already" in done.stderr
    assert "rm -r" in done.stderr
    assert not (tmp_path / "out.partial").exists()
    assert len(prepare.Clips(tmp_path / "out")) == 3


def test_an_exchanged_file_is_decoded_again(tmp_path):
    folder = songs(tmp_path / "in", 4)
    listing = prepare.read_folder(folder)
    (folder / "d.wav").write_bytes(b"broken")
    with pytest.raises(ValueError, match="d.wav"):
        quietly(listing, tmp_path / "out")
    soundfile.write(folder / "d.wav", tone(2), 22050)
    assert quietly(listing, tmp_path / "out")["clips"]["train"] == 4


def test_two_runs_at_once(tmp_path, cli):
    folder = songs(tmp_path / "in", 2)
    (tmp_path / "out.partial").mkdir()
    with open(tmp_path / "out.partial" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = cli(["prepare.py", "--data", "folder", "--root", folder, "--out", tmp_path / "out"])
    assert done.returncode == 1
    assert "another run is preparing it" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_what_is_done(tmp_path, run):
    folder = songs(tmp_path / "in", 12)
    quietly(prepare.read_folder(folder), tmp_path / "straight" / "out")
    command = [
        "prepare.py",
        "--data",
        "folder",
        "--root",
        folder,
        "--out",
        tmp_path / "out",
        "--workers",
        2,
    ]
    small = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    done = run(command, preexec_fn=small)
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "GB more" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    assert run(command).returncode == 0
    for name in ("audio.npy", "clips.npz"):
        assert contents(tmp_path / "out")[name] == contents(tmp_path / "straight" / "out")[name]


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path, monkeypatch):
    folder = songs(tmp_path / "in", 12)
    full = shutil._ntuple_diskusage(10**6, 10**6, 50_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match="0.00 GB are needed there, 0.00 GB are free"):
        quietly(prepare.read_folder(folder), tmp_path / "second" / "out")


def poisonous(path, rate, survey):
    if path.endswith("b.wav"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if path.endswith("d.wav"):
        time.sleep(60)
    yield from prepare.stream(path, rate, survey)


def test_a_file_that_crashes_or_hangs_a_decoder_costs_that_file_alone(tmp_path):
    listing = prepare.read_folder(songs(tmp_path / "in", 8))
    meta = quietly(listing, tmp_path / "out", max_skipped=0.3, timeout=1.5, stream=poisonous)
    reasons = {one["file"]: one["reason"] for one in meta["skipped"]}
    assert reasons == {
        "b.wav": "broken: it crashes the decoder (exit code -11)",
        "d.wav": "broken: not decoded after 1.5 s",
    }
    kept = ["a.wav", "c.wav", "e.wav", "f.wav", "g.wav", "h.wav"]
    assert prepare.Clips(tmp_path / "out").id.tolist() == kept
    assert not prepare.check(tmp_path / "out")


def test_what_crashed_the_decoder_is_tried_again_by_the_next_run(tmp_path):
    listing = prepare.read_folder(songs(tmp_path / "in", 8))
    quietly(listing, tmp_path / "straight" / "out")
    with pytest.raises(ValueError, match="2 of 8 files cannot be used"):
        quietly(listing, tmp_path / "out", timeout=1.5, stream=poisonous)
    meta = quietly(listing, tmp_path / "out")
    assert not meta["skipped"]
    assert meta["fingerprint"] == prepare.Clips(tmp_path / "straight" / "out").fingerprint
    assert not prepare.check(tmp_path / "out")


def once(job):
    """Crashes at the first try of job 3, and where others run beside it."""
    with open(job[1], "a") as log:
        log.write(f"{job[0]}\n")
    if job[0] == 3 and Path(job[1]).read_text().split().count("3") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return 10 * job[0]


def test_a_job_that_crashed_once_is_tried_alone(tmp_path):
    jobs = [(i, str(tmp_path / "log")) for i in range(12)]
    assert list(workers.in_processes(once, jobs, 3, 10)) == [10 * i for i in range(12)]
    order = (tmp_path / "log").read_text().split()
    assert order.count("3") == 2


def raising(path, rate, survey):
    if path.endswith("b.wav"):
        raise MemoryError
    if path.endswith("d.wav"):
        raise KeyError("what no decoder should throw")
    yield from prepare.stream(path, rate, survey)


def test_whatever_a_decoder_raises_costs_that_file_alone(tmp_path):
    listing = prepare.read_folder(songs(tmp_path / "in", 5))
    meta = quietly(listing, tmp_path / "out", max_skipped=0.5, stream=raising)
    assert [one["file"] for one in meta["skipped"]] == ["b.wav", "d.wav"]
    assert meta["clips"]["train"] == 3


def test_what_stands_in_the_way_is_said_before_the_work(tmp_path):
    listing, started = prepare.read_folder(songs(tmp_path / "in", 3)), []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="found something else"):
        quietly(listing, tmp_path / "out", stream=lambda *a: started.append(a))
    assert not started
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "out.partial").exists()


def test_a_finished_folder_of_other_files_is_not_taken_for_this_one(tmp_path):
    quietly(prepare.read_folder(songs(tmp_path / "one", 3)), tmp_path / "out")
    other = prepare.read_folder(songs(tmp_path / "two", 3, 0.7))
    with pytest.raises(FileExistsError, match="made from other files"):
        quietly(other, tmp_path / "out")


def test_other_recordings_of_the_same_names_and_sizes_are_not_the_same_data(tmp_path, monkeypatch):
    for name, hz in (("clean", 300), ("noisy", 500)):
        for i in range(4):
            (tmp_path / name).mkdir(exist_ok=True)
            soundfile.write(tmp_path / name / f"{i}.wav", tone(0.5, hz=hz + i), 22050)
    with interrupted(monkeypatch):
        quietly(prepare.read_folder(tmp_path / "clean"), tmp_path / "second")
    assert (tmp_path / "second.partial" / "audio.npy").stat().st_size > 128
    quietly(prepare.read_folder(tmp_path / "noisy"), tmp_path / "second")
    clips = prepare.Clips(tmp_path / "second")
    for i in range(4):
        decoded = prepare.decode(tmp_path / "noisy" / clips.id[i])
        assert np.allclose(clips.waveform(i), decoded, atol=1e-4)
    with pytest.raises(FileExistsError, match="made from other files"):
        quietly(prepare.read_folder(tmp_path / "clean"), tmp_path / "second")


def test_an_output_that_is_a_link_is_written_where_it_points(tmp_path):
    (tmp_path / "big disk" / "songs").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "big disk" / "songs", tmp_path / "data" / "mine")
    os.symlink(tmp_path / "big disk" / "later", tmp_path / "data" / "dangling")
    listing = prepare.read_folder(songs(tmp_path / "in", 3))
    for name in ("mine", "dangling"):
        meta = quietly(listing, tmp_path / "data" / name)
        assert (meta["name"], meta["format"]) == (name, "clmr-data-1")
        assert prepare.check(tmp_path / "data" / name) == []
    assert sorted(os.listdir(tmp_path / "big disk")) == ["later", "songs"]
    assert len(os.listdir(tmp_path / "data")) == 2


def test_a_kill_as_the_folder_moves_into_place_costs_nothing(tmp_path, monkeypatch):
    listing, decoded = prepare.read_folder(songs(tmp_path / "in", 4)), tmp_path / "decoded"

    def logged(path, rate, survey):
        with open(decoded, "a") as file:
            file.write(Path(path).name + "\n")
        yield from prepare.stream(path, rate, survey)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt()))
        quietly(listing, tmp_path / "out", stream=logged)
    quietly(listing, tmp_path / "out", stream=logged)
    assert sorted(decoded.read_text().split()) == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert not prepare.check(tmp_path / "out")


# ------------------------------------------------------------------------------------------- shards


@pytest.fixture
def shards(tmp_path, cli):
    """11 recordings of 4 songs with labels, one row without a file: whole, and in three shards."""
    folder = songs(tmp_path / "in", 11)
    rows = [(f"{chr(97 + i)}.wav", f"song {i // 3}", "x; y" if i % 2 else "y") for i in range(11)]
    table(tmp_path / "l.csv", ("file", "group", "tags"), *rows, ("zz.wav", "song 9", "x"))
    command = [
        "prepare.py",
        "--data",
        "folder",
        "--root",
        folder,
        "--labels",
        tmp_path / "l.csv",
        "--name",
        "set",
        "--max-skipped",
        1,
        "--segment",
        0.5,
    ]
    assert cli(command, cwd=tmp_path).returncode == 0
    for i in (3, 1, 2):
        done = cli([*command, "--shard", f"{i}/3"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "next: python pretrain.py --data data/set.shard-*-of-3" in done.stdout
    return [tmp_path / "data" / f"set.shard-{i}-of-3" for i in (1, 2, 3)]


def test_shards_are_prepared_folders_that_hold_each_clip_once(shards):
    whole = prepare.Clips(shards[0].parent / "set")
    parts = prepare.Clips(shards)
    assert all(prepare.check(shard) == [] for shard in shards)
    assert sorted(parts.id) == sorted(whole.id)
    place = {name: i for i, name in enumerate(whole.id)}
    for i, name in enumerate(parts.id):
        assert torch.equal(parts.waveform(i), whole.waveform(place[name]))
        assert (parts.labels[i] == whole.labels[place[name]]).all()
        assert parts.split[i] == whole.split[place[name]]


def test_shards_are_cut_at_songs(shards):
    whole = prepare.Clips(shards[0].parent / "set")
    song = dict(zip(whole.id, whole.group))
    sets = [{song[name] for name in prepare.Clips(shard).id} for shard in shards]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 4


def test_a_shard_needs_only_its_own_recordings(shards, tmp_path, cli):
    needed = {name.split("@")[0] for name in prepare.Clips(shards[0]).id}
    for path in (tmp_path / "in").iterdir():
        if path.name not in needed:
            path.unlink()
    shutil.copytree(shards[0], tmp_path / "before")
    shutil.rmtree(shards[0])
    done = cli(
        [
            "prepare.py",
            "--data",
            "folder",
            "--root",
            tmp_path / "in",
            "--labels",
            tmp_path / "l.csv",
            "--name",
            "set",
            "--max-skipped",
            0.5,
            "--segment",
            0.5,
            "--shard",
            "1/3",
        ],
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert prepare.Clips(shards[0]).fingerprint == prepare.Clips(tmp_path / "before").fingerprint


# ----------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("module", [prepare, tables])
def test_doctests(module):
    assert doctest.testmod(module).failed == 0


def test_beside_its_folder_it_needs_nothing_else(tmp_path, python):
    shutil.copy(ROOT / "prepare.py", tmp_path)
    shutil.copytree(ROOT / "splits", tmp_path / "splits")
    songs(tmp_path / "in", 3)
    command = [python, "prepare.py", "--data", "folder", "--root", "in", "--name", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "next: python pretrain.py --data mine" in done.stdout
    assert prepare.check(tmp_path / "data" / "mine") == []


def test_copied_alone_it_decodes_and_reads(tmp_path, python, tiny_data, tiny_audio):
    shutil.copy(ROOT / "prepare.py", tmp_path)
    code = (
        f"import prepare; x = prepare.Clips({str(tiny_data)!r}).waveform(0)\n"
        f"files = prepare.audio_files({str(tiny_audio)!r})\n"
        "y = prepare.decode(files[next(iter(files))])\n"
        "print(len(files), len(x) == len(y), float((x - y).abs().max()) < 1e-4)"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["24", "True", "True"], done.stderr
    assert "splits/formats.py is not beside it" in done.stderr
