"""The chain of augment.py: rows do not depend on each other, draws can be sliced, inputs stay as
they are, silence stays finite, the settings of the process are left alone; what is drawn; errors
and the command. The transforms themselves: test_augment_transforms.py, test_augment_pitch.py."""

import doctest
import math
import os
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import soundfile
import torch
from sounds import RATE, full, music

import augment
from augment import TRANSFORMS, Chain, Transform

MATMUL = torch.backends.cuda.matmul


def test_docstrings_run():
    assert doctest.testmod(augment).failed == 0


# ------------------------------------------------------------------ promises for every transform


def alone(name):
    return Chain(RATE, [name], {name: 1.0})


def chain_of(name):
    return Chain(RATE) if name == "chain" else alone(name)


def rows_of(draws, rows):
    return {key: value[rows] for key, value in draws.items()}


@pytest.mark.parametrize("name", [*TRANSFORMS, "chain"])
def test_rows_do_not_depend_on_each_other(name):
    chain = chain_of(name)
    x = music(11)
    draws = chain.draw(11, torch.Generator().manual_seed(3))
    whole = chain(x, draws)
    for rows in (slice(4, 5), slice(0, 4), slice(3, 11), torch.tensor([9, 2, 5])):
        part = chain(x[rows], rows_of(draws, rows))
        error = (part - whole[rows]).abs().max()
        assert torch.equal(part, whole[rows]), f"{name} {rows}: {error}"


@pytest.mark.parametrize("name", [*TRANSFORMS, "chain"])
def test_the_input_stays_as_it_is(name):
    chain = chain_of(name)
    x = music(11)
    copy = x.clone()
    chain(x, chain.draw(11, torch.Generator().manual_seed(3)))
    assert torch.equal(x, copy)


@pytest.mark.parametrize("name", [*TRANSFORMS, "chain"])
def test_shape_and_finiteness_stay(name):
    chain = chain_of(name)
    x = music(11)
    y = chain(x, chain.draw(11, torch.Generator().manual_seed(3)))
    assert y.shape == x.shape
    assert torch.isfinite(y).all()


def test_a_large_batch_is_its_rows():
    """More rows than the chain takes at once on a CPU."""
    chain = Chain(RATE)
    x = music(70, 4000)
    draws = chain.draw(70, torch.Generator().manual_seed(3))
    whole = chain(x, draws)
    for rows in (slice(0, 3), slice(60, 70)):
        assert torch.equal(whole[rows], chain(x[rows], rows_of(draws, rows)))


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("samples", [1, 700, 59049])
def test_silence_stays_silent(name, samples):
    chain = alone(name)
    draws = chain.draw(3, torch.Generator().manual_seed(0))
    y = chain(torch.zeros(3, 1, samples), draws)
    assert y.shape == (3, 1, samples)
    assert y.abs().max() < 1e-6


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("samples", [1, 700, 59049])
def test_short_and_constant_audio_stays_finite(name, samples):
    chain = alone(name)
    draws = chain.draw(3, torch.Generator().manual_seed(0))
    assert torch.isfinite(chain(torch.ones(3, 1, samples), draws)).all()


def test_an_empty_batch_comes_back_empty():
    chain = Chain(RATE)
    draws = chain.draw(0, torch.Generator())
    assert chain(torch.zeros(0, 1, 100), draws).shape == (0, 1, 100)


def one_by_one(y, d):
    """A view by hand, from the draws' meaning; not by the chain's own table."""
    if d["polarity"]:
        y = -y
    if d["noise"]:
        y = augment.noise(y, d["noise.snr_db"], seed=d["noise.seed"])
    if d["gain"]:
        y = augment.gain(y, d["gain.db"])
    if d["filter"] and d["filter.high"]:
        y = augment.high_pass(y, d["filter.high_pass_hz"], RATE)
    elif d["filter"]:
        y = augment.low_pass(y, d["filter.low_pass_hz"], RATE)
    if d["delay"]:
        y = augment.delay(y, d["delay.ms"], RATE)
    if d["pitch"]:
        y = augment.pitch_shift(y, d["pitch.semitones"], RATE)
    if d["reverb"]:
        room = (d[f"reverb.{key}"] for key in ("reverberance", "damping", "room_size"))
        y = augment.reverb(y, *room, RATE)
    return y


def test_the_chain_is_the_transforms_one_by_one():
    chain = Chain(RATE, probability={"noise": 0.5})
    x = music(24)
    draws = chain.draw(24, torch.Generator().manual_seed(8))
    whole = chain(x, draws)
    for row in range(24):
        y = one_by_one(x[row : row + 1], rows_of(draws, slice(row, row + 1)))
        assert (whole[row : row + 1] - y).norm() < 1e-5 * y.norm(), row


@pytest.mark.parametrize("rate", [4000, 8000, 96000])
def test_the_chain_works_at_any_sample_rate(rate):
    chain = Chain(rate, probability=dict.fromkeys(TRANSFORMS, 1.0))
    x = music(48, 3000)
    assert torch.isfinite(chain(x, chain.draw(48, torch.Generator().manual_seed(0)))).all()


# ------------------------------------------------------------------------------ the settings


@pytest.fixture
def tf32():
    """As a user may have set it."""
    before = MATMUL.fp32_precision
    MATMUL.fp32_precision = "tf32"
    yield
    MATMUL.fp32_precision = before


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def settings():
    return MATMUL.fp32_precision, torch.get_num_threads()


def chain_that_calls(function):
    """A chain of one transform, which calls function() and changes nothing."""

    def look(x, sample_rate):
        function()
        return x

    return Chain(RATE, ["look"], table={"look": Transform(1.0, look)})


def go_through(chain):
    chain(music(1, 100), chain.draw(1, torch.Generator()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with a GPU; there is none here")
def test_cpu_and_gpu_agree(tf32):
    chain = Chain(RATE, probability={"noise": 1.0})
    x = music(24)
    draws = chain.draw(24, torch.Generator().manual_seed(8))
    on_cpu = chain(x, draws)
    assert (on_cpu - chain(x.cuda(), draws).cpu()).norm() < 1e-3 * on_cpu.norm()


def test_the_chain_turns_tf32_off_for_itself_alone(tf32):
    seen = []
    go_through(chain_that_calls(lambda: seen.append(MATMUL.fp32_precision)))
    assert seen == ["ieee"]
    assert MATMUL.fp32_precision == "tf32"


def test_the_chain_is_float32_under_autocast():
    chain = Chain(RATE)
    x = music(6, 30000)
    draws = chain.draw(6, torch.Generator().manual_seed(3))
    want = chain(x, draws)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chain(x, draws), want)
        assert torch.is_autocast_enabled("cpu")


def test_the_chain_is_float32_where_products_may_be_rougher():
    chain = Chain(RATE)
    x = music(6, 30000)
    draws = chain.draw(6, torch.Generator().manual_seed(3))
    want = chain(x, draws)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(chain(x, draws), want)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_chain_within_a_chain_leaves_the_settings_of_the_outer_one(two_threads):
    seen = []

    def inner():
        go_through(alone("gain"))
        seen.append(torch.get_num_threads())

    go_through(chain_that_calls(inner))
    assert seen == [1]
    assert torch.get_num_threads() == 2


@pytest.fixture
def chains_in_two_threads(tf32, two_threads):
    """What a chain in a second thread saw inside and afterwards, having come to it while one in a
    first thread was inside."""
    first_in = threading.Event()
    second_began = threading.Event()
    seen = []

    def first():
        def inside():
            first_in.set()
            second_began.wait(10)

        go_through(chain_that_calls(inside))

    def second():
        first_in.wait(10)
        second_began.set()
        go_through(chain_that_calls(lambda: seen.append(settings())))
        seen.append(settings())

    workers = [threading.Thread(target=work) for work in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    return seen


def test_a_chain_in_another_thread_is_exact(chains_in_two_threads):
    assert chains_in_two_threads[0] == ("ieee", 1)


def test_chains_in_several_threads_leave_the_settings_of_the_process(chains_in_two_threads):
    assert chains_in_two_threads[1][0] == "tf32"
    assert settings() == ("tf32", 2)


# --------------------------------------------------------------------------------- kernels/


@pytest.fixture
def no_kernels(monkeypatch):
    augment._kernels.cache_clear()
    monkeypatch.setitem(sys.modules, "kernels.splice", None)
    yield
    augment._kernels.cache_clear()


def test_kernels_are_used_where_they_are():
    assert augment._kernels().__name__ == "kernels"


def test_without_kernels_the_plain_ways_are_taken_and_it_is_said(no_kernels):
    with pytest.warns(UserWarning, match="slower.*kernels.splice"):
        assert augment._kernels() is None


def test_without_kernels_it_is_said_once(no_kernels):
    with pytest.warns(UserWarning) as said:
        augment._kernels()
        augment._kernels()
    assert len(said) == 1


@pytest.mark.filterwarnings("ignore:there is no kernels/")
def test_without_kernels_the_chain_gives_the_same_numbers(no_kernels, monkeypatch):
    chain = Chain(RATE, probability={"noise": 0.5})
    x = music(8)
    draws = chain.draw(8, torch.Generator().manual_seed(8))
    plain = chain(x, draws)
    monkeypatch.undo()
    augment._kernels.cache_clear()
    fast = chain(x, draws)
    assert ((fast - plain).norm(dim=2) < 5e-5 * plain.norm(dim=2)).all()


# ------------------------------------------------------------------------- draws and the table

PROBABILITIES = {"polarity": 0.8, "noise": 0.01, "gain": 0.3, "filter": 0.8, "delay": 0.4,
                 "pitch": 0.4, "reverb": 0.4}
RANGES = {"gain.db": (-6, 0), "filter.low_pass_hz": (2200, 4000),
          "filter.high_pass_hz": (200, 1200), "pitch.semitones": (-5, 5),
          "reverb.reverberance": (0, 100), "reverb.damping": (0, 100), "reverb.room_size": (0, 100)}


@pytest.fixture(scope="module")
def many_draws():
    return Chain(RATE).draw(20000, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name, p", PROBABILITIES.items())
def test_transforms_are_drawn_with_the_probabilities_of_the_paper(many_draws, name, p):
    deviation = math.sqrt(p * (1 - p) / 20000)
    assert abs(many_draws[name].float().mean() - p) < 5 * deviation


@pytest.mark.parametrize("key, bounds", RANGES.items())
def test_values_are_uniform_in_the_ranges_of_the_paper(many_draws, key, bounds):
    low, high = bounds
    values = many_draws[key]
    assert low <= values.min() < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 0.01 * (high - low)


def test_choices_are_those_of_the_paper(many_draws):
    assert many_draws["delay.ms"].unique().tolist() == [200, 250, 300, 350, 400, 450, 500]
    assert many_draws["noise.snr_db"].unique().tolist() == [80]
    assert abs(many_draws["filter.high"].float().mean() - 0.5) < 0.02


def test_all_draws_are_independent(many_draws):
    varying = torch.stack([v.double() for v in many_draws.values() if len(v.unique()) > 1])
    independent = torch.eye(len(varying), dtype=torch.float64)
    assert (torch.corrcoef(varying) - independent).abs().max() < 0.04


def test_draws_follow_the_generator_alone():
    torch.manual_seed(1)
    first = Chain(RATE).draw(7, torch.Generator().manual_seed(4))
    torch.manual_seed(2)
    again = Chain(RATE).draw(7, torch.Generator().manual_seed(4))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_values_do_not_depend_on_the_probabilities():
    by_default = Chain(RATE).draw(7, torch.Generator().manual_seed(4))
    always = Chain(RATE, probability={"pitch": 1.0}).draw(7, torch.Generator().manual_seed(4))
    assert always["pitch"].all()
    assert all(torch.equal(by_default[key], always[key]) for key in by_default if key != "pitch")


def test_the_docstring_table_has_the_probabilities_of_the_code():
    rows = re.findall(r"^\| (\w+) \|.*\| ([\d.]+) \|$", augment.__doc__, re.M)
    table = [(name, transform.probability) for name, transform in TRANSFORMS.items()]
    assert [(name, float(p)) for name, p in rows] == table


@pytest.mark.parametrize("name, numbers", {
    "noise": "80", "gain": "-6 0", "filter": "2200 4000 200 1200", "delay": "200 500 50",
    "pitch": "-5 5", "reverb": "0 100"}.items())
def test_the_docstring_table_has_the_ranges_of_the_code(name, numbers):
    line = re.search(rf"^\| {name} \|.*$", augment.__doc__, re.M).group().split("|")[3]
    assert sorted(re.findall(r"-?\d+", line)) == sorted(numbers.split())


def test_a_new_transform_is_one_function_and_one_row():
    def reverse(x, sample_rate):
        return x.flip(-1)

    chain = Chain(RATE, ["reverse"], table={**TRANSFORMS, "reverse": Transform(0.5, reverse)})
    draws = chain.draw(16, torch.Generator().manual_seed(0))
    x = music(16, 500)
    assert 0 < draws["reverse"].sum() < 16
    want = torch.where(draws["reverse"][:, None, None], x.flip(-1), x)
    assert torch.equal(chain(x, draws), want)


# --------------------------------------------------------------------- errors and the command


@pytest.mark.parametrize("call, words", [
    (lambda: Chain(RATE, ["echo"]), "echo"),
    (lambda: Chain(RATE, probability={"pitch": 1.5}), "1.5"),
    (lambda: Chain(RATE, probability={"wobble": 0.5}), "wobble"),
    (lambda: Chain(RATE, ["filter"], {"pitch": 1.0}), "pitch"),
    (lambda: Chain(RATE)(torch.zeros(2, 100), {}), "(B, 1, T)"),
    (lambda: Chain(RATE)(torch.zeros(2, 1, 9), Chain(RATE).draw(3, torch.Generator())), "3"),
    (lambda: augment.gain(torch.zeros(2, 1, 10), torch.zeros(3)), "(3,)"),
    (lambda: augment.pitch_shift(torch.zeros(1, 1, 10).half(), full(1), RATE), "float16"),
    (lambda: augment.high_pass(torch.zeros(1, 1, 0), full(400), RATE), "(1, 1, 0)"),
    (lambda: augment.low_pass(torch.zeros(1, 1, 10), full(20000), RATE), "20000"),
    (lambda: augment.pitch_shift(torch.zeros(1, 1, 10), full(30), RATE), "30"),
    (lambda: augment.reverb(torch.zeros(1, 1, 10), full(-1), full(0), full(0), RATE), "-1"),
    (lambda: augment.delay(torch.zeros(1, 1, 10), full(-200), RATE), "-200"),
])
def test_errors_say_what_came(call, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


NAMES = ["original", *TRANSFORMS, "chain-1", "chain-2", "chain-3"]


@pytest.fixture(scope="module")
def listening(run, tmp_path_factory):
    """(The finished command, its folder), of a stereo recording of three seconds."""
    folder = tmp_path_factory.mktemp("listening")
    song = folder / "a song.flac"
    mono = music(1, 3 * RATE)[0, 0].numpy()
    soundfile.write(song, np.stack([mono, mono], 1), RATE)
    done = run(["augment.py", song, "--out", folder / "listen"])
    assert done.returncode == 0, done.stderr
    return done, folder / "listen"


def test_the_command_writes_every_sound(listening):
    _, folder = listening
    assert {path.name for path in folder.iterdir()} == {f"{name}.wav" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_sounds_are_mono_and_as_long_as_the_recording(listening, name):
    sound, rate = soundfile.read(listening[1] / f"{name}.wav")
    assert rate == RATE
    assert sound.shape == (3 * RATE,)


@pytest.mark.parametrize("words", ["semitones", "dB", "Hz", " ms", "%", "chain-3.wav"])
def test_the_command_prints_what_was_drawn_with_its_units(listening, words):
    assert words in listening[0].stdout


@pytest.mark.parametrize("args, code, words", [
    (["missing.wav"], 2, "missing.wav"),
    (["text.wav"], 1, "text.wav"),
    ([], 2, "FILE"),
    (["text.wav", "--seconds", "-1"], 2, "-1"),
    (["text.wav", "--sec", "3"], 2, "--sec"),
])
def test_bad_commands_get_one_line(tmp_path, monkeypatch, capsys, args, code, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.wav").write_text("no audio")
    try:
        came = augment.main([*args, "--out", "out"])
    except SystemExit as exit:
        came = exit.code
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if not line.startswith("usage:")]
    assert came == code
    assert len(errors) == 1
    assert words in errors[0]


def heard(folder, name):
    return torch.from_numpy(soundfile.read(folder / f"{name}.wav", dtype="float32")[0])


FORMATS = {"m4a": "aac", "webm": "opus", "wma": "wmav2", "mka": "flac", "mp3": "mp3"}


def encode(path, codec, sound):
    """sound (T,) into a container that its suffix names."""
    av = pytest.importorskip("av")
    rate = 48000 if codec == "opus" else 44100
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate = rate
            fifo = av.AudioFifo()
            to_codec = av.AudioResampler(stream.codec_context.format, "mono", rate)
            fifo.write(to_codec.resample(frame)[0])
            while piece := fifo.read(stream.codec_context.frame_size or 1024, partial=True):
                container.mux(stream.encode(piece))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        pytest.skip(f"this ffmpeg does not write {codec}: {error}")
    return rate


@pytest.mark.parametrize("suffix", FORMATS)
def test_any_format_is_read(tmp_path, suffix):
    path = tmp_path / f"song.{suffix}"
    sound = music(1, 96000)[0, 0].numpy()
    rate = encode(path, FORMATS[suffix], sound)
    x, found = augment.read(path, 60.0)
    assert found == rate
    assert abs(x.shape[2] - 96000) < 5000
    ours = np.correlate(x[0, 0].numpy()[:30000], sound[5000:25000], "valid")
    assert ours.max() > 0.8 * (sound[5000:25000] ** 2).sum()


def test_only_the_beginning_of_a_long_recording_is_read(tmp_path):
    path = tmp_path / "song.m4a"
    rate = encode(path, "aac", music(1, 96000)[0, 0].numpy())
    assert augment.read(path, 0.5)[0].shape == (1, 1, rate // 2)


def test_without_pyav_it_is_said_how_to_read_other_formats(tmp_path, monkeypatch):
    (tmp_path / "song.m4a").write_bytes(b"no audio")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="pip install 'av"):
        augment.read(tmp_path / "song.m4a", 1.0)


@pytest.mark.parametrize("rate", [1, 999, 800_000])
def test_a_rate_that_no_recording_has_is_refused(tmp_path, rate):
    soundfile.write(tmp_path / "song.wav", np.zeros(100), rate)
    with pytest.raises(ValueError, match=f"1 to 768 kHz.*{rate}"):
        augment.read(tmp_path / "song.wav", 1.0)


# ----------------------------------------------------------------------------------- streams

PROGRAM = f"{sys.executable} {augment.__file__}"


@pytest.fixture(scope="module")
def song(tmp_path_factory):
    path = tmp_path_factory.mktemp("streams") / "sông.wav"
    soundfile.write(path, music(1, 4000)[0, 0].numpy(), RATE)
    return path


def in_a_shell(command, folder, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment,
        capture_output=True, text=True, encoding="utf-8")


@pytest.mark.parametrize("rest, code", [
    (">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("| true", 0), (">/dev/full", 1)])
def test_wherever_the_output_goes_there_is_no_traceback(song, tmp_path, rest, code):
    done = in_a_shell(f"{PROGRAM} {song} --out listen {rest}", tmp_path)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert len(list((tmp_path / "listen").iterdir())) == len(NAMES)


def test_names_are_printed_in_a_locale_that_lacks_their_letters(song, tmp_path):
    listen = tmp_path / "höre"
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = in_a_shell(f"{PROGRAM} {song} --out {listen}", tmp_path, **ascii_only)
    assert done.returncode == 0, done.stderr


def test_an_error_without_stderr_is_an_exit_code(tmp_path):
    (tmp_path / "text.wav").write_text("no audio")
    done = in_a_shell(f"{PROGRAM} text.wav 2>&-", tmp_path)
    assert done.returncode == 1
    assert not done.stdout
