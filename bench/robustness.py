"""What damage, interruptions and strangers' files do. Writes results/robustness/faults.json.

    python bench/robustness.py [--only audio tables ...] [--seed 0]      # about ten minutes

Every fault is tried through the public functions and scripts, and must end in one of two ways: the
result is that of the undamaged input, or one line says what is wrong. What is neither is lost in
silence, and is named in the result. Inputs are made here: noise, tones, the encoder that ships.

    audio        files of 18 formats: cut off, a bit or 3,000 bytes changed, tags and zeros behind
                 them, two in a row
    fuzz         300 mutations of files of 6 formats: bytes, blocks, numbers in headers
    headers      crafted headers: absurd rates, channels, sizes
    tables       tables of labels with slips
    prepared     bits of clips.npz and meta.json, samples of audio.npy, crafted tables
    archives     crafted zips and tars, pickled lists
    kills        prepare.py killed at random moments, and continued
    power        the same, and what had not reached the disk is lost
    encoders     bits of an encoder file, its parts cut off, crafted pickles: loaded by model.py
    checkpoints  bits of a checkpoint and of the one before: resumed by pretrain.py
"""

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import common

sys.path[:0] = [str(common.ROOT), str(common.ROOT / "tests")]
import prepare  # noqa: E402
from recordings import encoded, songs  # noqa: E402
from splits import fetch, published, tables  # noqa: E402

STATED = "wav w64 rf64 aiff au caf flac ogg opus mp3 m4a webm wma tta wv".split()
CHECKED = "flac ogg opus mp3 mp2 m4a aac tta wv ac3".split()
FUZZED = "wav flac ogg mp3 aiff m4a".split()
REFUSED = (ValueError, OSError)


class Tally:
    """How many faults of each kind were tried and held, and which were lost in silence."""

    def __init__(self):
        self.kinds = {}

    def note(self, kind, outcome, what):
        """`outcome`: "refused", "same", "read", or words for what was lost in silence.

        "read": other samples than before, in a format that has nothing that could tell.
        """
        empty = {"tried": 0, "refused": 0, "same": 0, "read": 0, "lost": []}
        row = self.kinds.setdefault(kind, empty)
        row["tried"] += 1
        if outcome in ("refused", "same", "read"):
            row[outcome] += 1
        else:
            row["lost"].append(f"{what}: {outcome}"[:200])

    def rows(self):
        """The table: a row a kind, and the sum."""
        shown = [
            {
                "fault": kind,
                "tried": row["tried"],
                "told in one line": row["refused"],
                "same result": row["same"],
                "other samples, no checksum": row["read"],
                "lost in silence": len(row["lost"]),
            }
            for kind, row in self.kinds.items()
        ]
        total = {"fault": "sum"}
        for key in list(shown[0])[1:]:
            total[key] = sum(row[key] for row in shown)
        return [*shown, total]


def one_line(error):
    return "refused" if "\n" not in str(error) and str(error) else f"no line: {error!r}"


# -------------------------------------------------------------------------------------------- audio


def decoded(folder, suffix, data):
    """Samples of a file with these bytes, or the error it is refused with."""
    path = folder / f"x.{suffix}"
    path.write_bytes(data)
    try:
        return prepare.decode(path).numpy(), None
    except REFUSED as error:
        return None, error


def compare(tally, kind, what, found, wanted):
    """Note a decoded file: refused, or as many samples as wanted, and nearly the same ones."""
    samples, error = found
    if error:
        tally.note(kind, one_line(error), what)
    elif len(samples) == len(wanted) and np.abs(samples - wanted).max() < 1e-3:
        tally.note(kind, "same", what)
    else:
        tally.note(kind, f"{len(samples)} of {len(wanted)} samples, or others", what)


def audio(tally, folder, rng):
    """Damage to whole files, where the container or the codec has what it takes to see it."""
    noise = rng.uniform(-0.3, 0.3, 8 * 44100)
    for suffix in sorted({*STATED, *CHECKED}):
        data = encoded(f"a.{suffix}", noise)
        wanted = decoded(folder, suffix, data)[0]
        if suffix in STATED:
            for share in rng.uniform(0.05, 0.97, 6):
                cut = decoded(folder, suffix, data[: int(share * len(data))])
                compare(tally, "audio cut off", f"{suffix} at {share:.2f}", cut, wanted)
        if suffix in CHECKED:
            for _ in range(4):
                at = rng.integers(len(data) // 4, 3 * len(data) // 4)
                damaged = data[:at] + rng.bytes(3000) + data[at + 3000 :]
                found = decoded(folder, suffix, damaged)
                compare(tally, "audio overwritten, 3,000 bytes", f"{suffix} at {at}", found, wanted)
        if suffix in ("flac", "ogg", "opus", "tta", "wv"):
            for _ in range(10):
                damaged = bytearray(data)
                at = rng.integers(len(data) // 10, len(data))
                damaged[at] ^= 1 << rng.integers(8)
                found = decoded(folder, suffix, bytes(damaged))
                compare(tally, "audio with checksums, one bit", f"{suffix} at {at}", found, wanted)
        for tail in (bytes(4096), b"TAG" + rng.bytes(125)):
            found = decoded(folder, suffix, data + tail)
            compare(tally, "zeros or tags behind audio", f"{suffix} {tail[:3]}", found, wanted)
        twice = decoded(folder, suffix, data + data)
        if twice[1] is None and len(twice[0]) < 1.98 * len(wanted):
            tally.note("two files in a row", f"{len(twice[0])} of 2 x {len(wanted)}", suffix)
        else:
            outcome = "same" if twice[1] is None else one_line(twice[1])
            tally.note("two files in a row", outcome, suffix)


def mutated(data, rng):
    """A file with one to four random changes: bytes, blocks, a number in its header."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(data)))
        n = int(rng.integers(1, 2000))
        kind = rng.integers(5)
        if kind == 0:
            data[at] = rng.integers(256)
        elif kind == 1:
            data[at : at + n] = rng.bytes(n)
        elif kind == 2:
            del data[at : at + n]
        elif kind == 3:
            data[at:at] = data[-n:]
        else:
            place = int(rng.integers(min(200, len(data) - 4)))
            data[place : place + 4] = struct.pack("<I", rng.integers(1 << 32))
    return bytes(data)


FUZZ = """
import hashlib, json, resource, sys
sys.path.insert(0, {root!r})
import prepare
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
for path in sys.argv[1:]:
    try:
        digest = hashlib.sha256(prepare.decode(path).numpy()).hexdigest()
        print(json.dumps([path, digest, ""]), flush=True)
    except (ValueError, OSError) as error:
        print(json.dumps([path, None, str(error)]), flush=True)
"""


def fuzz(tally, folder, rng):
    """Mutated files may be refused, or read; nothing else: no crash, no traceback, no hang."""
    noise = rng.uniform(-0.3, 0.3, 2 * 44100)
    paths = []
    for suffix in FUZZED:
        data = encoded(f"a.{suffix}", noise)
        paths.append(folder / f"whole.{suffix}")
        paths[-1].write_bytes(data)
        for k in range(50):
            paths.append(folder / f"{k}.{suffix}")
            paths[-1].write_bytes(mutated(data, rng))
    command = [sys.executable, "-c", FUZZ.format(root=str(common.ROOT)), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    answers = {}
    for line in done.stdout.splitlines():
        path, digest, error = json.loads(line)
        answers[Path(path)] = (digest, error)
    for path in paths:
        wanted = answers[path.with_stem("whole")][0]
        if path.stem == "whole":
            continue
        digest, error = answers.get(path, (f"ended with {done.returncode}", ""))
        outcome = one_line(error) if error else "same" if digest == wanted else "read"
        outcome = digest if path not in answers else outcome
        if outcome == "read" and path.suffix in (".flac", ".ogg"):
            outcome = "other samples, in spite of checksums"
        tally.note(f"fuzzed {path.suffix[1:]}", outcome, path.name)


def headers(tally, folder, rng):
    """Headers that claim what no recording has."""
    data = encoded("a.wav", rng.uniform(-0.3, 0.3, 44100))
    claims = {"rate 0": (24, "<I", 0), "rate 1": (24, "<I", 1), "rate 2^31": (24, "<I", 2**31 - 1)}
    claims |= {"no channels": (22, "<H", 0), "65,535 channels": (22, "<H", 65535)}
    claims |= {"no bits": (34, "<H", 0), "odd format": (20, "<H", 0x4242)}
    claims |= {"format chunk of 2 GB": (16, "<I", 2**31), "riff of 0": (4, "<I", 0)}
    claims |= {"data of 1 GB": (40, "<I", 10**9)}
    for what, (at, kind, value) in claims.items():
        crafted = bytearray(data)
        struct.pack_into(kind, crafted, at, value)
        wanted = decoded(folder, "wav", data)[0]
        compare(tally, "crafted headers", what, decoded(folder, "wav", bytes(crafted)), wanted)


# --------------------------------------------------------------------------------- tables, prepared


def labels(tally, folder, rng):
    """Tables with slips: an error that names the line, or the right reading."""
    files = {f"s{i}.wav": folder / f"s{i}.wav" for i in range(1, 5)}
    slips = {
        "open quote": ('file,tags\ns1.wav,"x\ns2.wav,y\n', "line 2"),
        "twice": ("file,label\ns1.wav,a\n\n\ns2.wav,b\ns1.wav,c\n", "line 6"),
        "no tag": ("file,tags\ns1.wav,\ns2.wav,\n", "no row has one"),
        "column twice": ("file,x,x\ns1.wav,1,0\n", "stands there twice"),
        "no file column": ("name,label\ns1.wav,a\n", "column `file`"),
        "split unknown": ("file,label,split\ns1.wav,a,dev\n", "'dev'"),
        "too many fields": ("file;tags\ns1.wav;a; b\n", "line 2"),
        "latin-1": ("file,label\ns1.wav,größer\n", "UTF-8"),
        "zero byte": ("file,label\ns1.wav,a\0b\n", ""),
        "empty": ("", "column `file`"),
        "sep=": ("sep=;\nfile;label\ns1.wav;a\n", ["a"]),
        "two spellings": ("file,label\ns1.wav,\u00c9a\ns2.wav,E\u0301a\n", ["\u00c9a"]),
    }
    for what, (text, wanted) in slips.items():
        path = folder / "t.csv"
        path.write_bytes(text.encode("latin-1" if what == "latin-1" else "utf-8"))
        try:
            rows, about = tables.read_labels(path, folder, dict(files))
            same = about["tags"] == wanted or what == "zero byte"
            tally.note("tables of labels", "same" if same else f"read as {about['tags']}", what)
        except REFUSED as error:
            right = isinstance(wanted, str) and wanted in str(error)
            tally.note("tables of labels", one_line(error) if right else f"{error}", what)


def opened(folder):
    """All that one sees of a prepared folder, as one hash, or the error."""
    try:
        clips = prepare.Clips(folder)
        digest = hashlib.sha256()
        for key in ("start", "length", "split", "group", "labels", "sha256", "rate", "peak"):
            digest.update(getattr(clips, key).tobytes())
        about = [
            clips.id.tolist(),
            clips.tags,
            clips.task,
            clips.sample_rate,
            clips.name,
            clips.meta["clips"],
        ]
        digest.update(json.dumps(about).encode())
        if faults := prepare.check(folder):
            return ValueError(faults[0])
        return digest.hexdigest()
    except REFUSED as error:
        return error


def prepared(tally, folder, rng):
    """Flipped bits in every file of a prepared folder."""
    listing = prepare.read_folder(songs(folder / "in", 12))
    prepare.write(listing, folder / "whole", prepare.Options(workers=1, progress=False))
    wanted = opened(folder / "whole")
    for name, times in (("clips.npz", 100), ("meta.json", 100), ("audio.npy", 100)):
        path = folder / "whole" / name
        data = path.read_bytes()
        for _ in range(times):
            damaged = bytearray(data)
            at = int(rng.integers(len(data)))
            damaged[at] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            found = opened(folder / "whole")
            if isinstance(found, Exception):
                tally.note(f"prepared folder, one bit of {name}", one_line(found), f"at {at}")
            else:
                outcome = "same" if found == wanted else "other tables"
                tally.note(f"prepared folder, one bit of {name}", outcome, f"at {at}")
        path.write_bytes(data)


def archives(tally, folder, rng):
    """Crafted archives, and pickles where lists of songs should be."""
    from test_splits import ARRAY, link, linked, tar, zipped

    crafted = {
        "outside.zip": zipped(("../evil", "x")),
        "absolute.zip": zipped(("/evil", "x")),
        "link.zip": zipped((linked(), "..")),
        "bomb.zip": zipped(("a", bytes(60_000_000))),
        "tar.zip": tar(("a", b"x")),
        "outside.tar.gz": tar(("../evil", b"x")),
        "link.tar.gz": tar(link("songs", ".."), ("songs/evil", b"x")),
        "bomb.tar.gz": tar(("a", bytes(60_000_000))),
        "zip.tar.gz": zipped(("a", "x")),
        "half.tar.gz": tar(("a", rng.bytes(10_000)))[:5000],
        "bit.zip": bytes(bytearray(zipped(("a", rng.bytes(1000))))[:500] + b"\xff" * 10),
    }
    for name, data in crafted.items():
        root = folder / "root"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        (root / name).write_bytes(data)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                fetch.unpack(root / name, root, spare=1_000_000)
            outcome = "unpacked"
        except OSError as error:
            outcome = one_line(error)
        outside = (folder / "evil").exists() or len(os.listdir(root)) > 1
        tally.note("crafted archives", "written outside" if outside else outcome, name)
    evil = b"cos\nsystem\n(S'touch " + str(folder / "owned").encode() + b"'\ntR."
    short = b"(I1\n(L1152921504606846976L\ntcnumpy\ndtype\n(S'f8'\nI0\nI1\ntRI00\nS'short'\ntb."
    for what, data in {
        "code": evil,
        "huge array": ARRAY + short,
        "objects": ARRAY + b"(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI00\n(S'x'\nltb.",
        "a dtype": b"cnumpy\ndtype\n(S'f8'\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb.",
        "a class": b"cnumpy\nndarray\n(dS'x'\nI1\nsb.",
        "cut": pickle.dumps([b"TR0"] * 1000)[:-100],
        "rubbish": rng.bytes(1000),
    }.items():
        (folder / "list.cP").write_bytes(data)
        try:
            published.read_pickle(folder / "list.cP")
            outcome = "read"
        except ValueError as error:
            outcome = one_line(error)
        outcome = "ran code" if (folder / "owned").exists() else outcome
        tally.note("crafted lists of songs", outcome, what)


# ------------------------------------------------------------------------------------ interruptions


def begin(main, words, log=os.devnull):
    """A script's main in a process of its own, without the seconds that the imports take."""

    def child():
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w")
        sys.stderr = open(2, "w")
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = error.code
        sys.exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def samples_of(out):
    return hashlib.sha256((out / "audio.npy").read_bytes()).hexdigest()


def interrupted(tally, folder, rng, times, kind, damage):
    """Kill prepare.py at random moments of its work, then run it to its end."""
    root = songs(folder / "in", 20, 8.0)
    whole = folder / "whole"
    words = ["--data", "folder", "--root", root, "--workers", 2, "--out"]
    begin(prepare.main, [*words, whole]).join()
    wanted = samples_of(whole)
    for k in range(times):
        out = folder / f"{kind}-{k}"
        journal = folder / f"{kind}-{k}.partial" / "journal.jsonl"
        process = begin(prepare.main, [*words, out])
        lines = int(rng.integers(1, 19))
        while process.is_alive():
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.002)
        process.kill()
        process.join()
        if journal.exists():
            damage(journal.parent, rng)
        again = begin(prepare.main, [*words, out])
        again.join()
        same = again.exitcode == 0 and samples_of(out) == wanted and not prepare.check(out)
        tally.note(kind, "same" if same else f"exit code {again.exitcode}", f"after {lines} files")
        shutil.rmtree(out, ignore_errors=True)


def kills(tally, folder, rng):
    """SIGKILL while it decodes and writes."""
    interrupted(tally, folder, rng, 15, "prepare.py killed", lambda *_: None)


def power(tally, folder, rng):
    """And the last bytes that were written have not reached the disk, though the journal has."""

    def lose(partial, rng):
        audio = partial / "audio.npy"
        size = audio.stat().st_size
        lost = int(min(size - 128, rng.integers(1, 600_000)))
        with open(audio, "r+b") as file:
            if lost > 0:
                file.seek(size - lost)
                file.write(bytes(lost))

    interrupted(tally, folder, rng, 15, "prepare.py, power cut", lose)


# ------------------------------------------------------------------------- encoders and checkpoints


def encoders(tally, folder, rng):
    """A shipped encoder, damaged: the same embedding, or a line."""
    import model
    import torch

    source = (common.ROOT / "demo" / "encoder.pt").read_bytes()
    x = torch.rand(1, 1, 59049, generator=torch.Generator().manual_seed(0)) - 0.5

    def embedding(data):
        path = folder / "encoder.pt"
        path.write_bytes(data)
        try:
            network, _ = model.load_encoder(path)
            with torch.no_grad():
                return network.eval()(x)
        except REFUSED as error:
            return error

    wanted = embedding(source)
    for kind, times in (("encoder, one bit", 100), ("encoder, cut off", 10)):
        for _ in range(times):
            at = int(rng.integers(len(source)))
            damaged = bytearray(source[:at] if "cut" in kind else source)
            if "bit" in kind:
                damaged[at] ^= 1 << rng.integers(8)
            found = embedding(bytes(damaged))
            if isinstance(found, Exception):
                tally.note(kind, one_line(found), f"at {at}")
            else:
                same = torch.equal(found, wanted)
                tally.note(kind, "same" if same else "another embedding", f"at {at}")


def checkpoints(tally, folder, rng):
    """A run's checkpoint, damaged: the run goes on from the one before, says so, or stops."""
    import pretrain
    import torch

    torch.set_num_threads(1)
    data = folder / "data"
    listing = prepare.read_folder(songs(folder / "in", 12, 4.0))
    prepare.write(listing, data, prepare.Options(workers=1, progress=False))
    flags = ["--data", data, "--width", 0.0625, "--batch-size", 4, "--save-every", 1]
    log = folder / "log"

    def run(out, steps):
        words = [*flags, "--device", "cpu", "--max-steps", steps, "--out", out]
        process = begin(pretrain.main, words, log)
        process.join()
        return process.exitcode, log.read_text(errors="replace")

    def weights(out):
        state = torch.load(out / "encoder.pt", weights_only=True)["state"]
        return hashlib.sha256(b"".join(v.numpy().tobytes() for v in state.values())).hexdigest()

    begun = folder / "begun"
    for out, steps in ((folder / "straight", 6), (begun, 4)):
        code, said = run(out, steps)
        if code:
            raise RuntimeError(said)
    wanted = weights(folder / "straight")
    for kind in ("checkpoint, one bit", "checkpoint, cut off"):
        for _ in range(10):
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(begun, out)
            damaged = bytearray((out / "checkpoint.pt").read_bytes())
            at = int(rng.integers(len(damaged)))
            damaged[at] ^= 1 << rng.integers(8)
            (out / "checkpoint.pt").write_bytes(damaged[:at] if "cut" in kind else damaged)
            code, said = run(out, 6)
            outcome = "refused" if said.strip() and "Traceback" not in said else said[-200:]
            if not code:
                outcome = "same" if weights(out) == wanted else "other weights"
            tally.note(kind, outcome, f"at {at}")


KINDS = {
    "audio": audio,
    "fuzz": fuzz,
    "headers": headers,
    "tables": labels,
    "prepared": prepared,
    "archives": archives,
    "kills": kills,
    "power": power,
    "encoders": encoders,
    "checkpoints": checkpoints,
}


def build_parser():
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="bench/robustness.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    default = common.ROOT / "results" / "robustness" / "faults.json"
    parser.add_argument("--out", type=Path, default=default)
    return parser


def main(argv=None):
    """Try all faults; exit code 1 where one was lost in silence."""
    args = build_parser().parse_args(argv)
    # What was measured before stays, but for the kinds that are measured anew.
    result = json.loads(args.out.read_text()) if args.out.exists() else {"kinds": {}}
    for name in args.only:
        began = time.monotonic()
        tally = Tally()
        with tempfile.TemporaryDirectory() as folder:
            KINDS[name](tally, Path(folder), np.random.default_rng(args.seed))
        result["kinds"][name] = tally.kinds
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        common.write(conclude(result, args.seed, common.command_line(__file__, argv)), args.out)
    return 1 if any(row["lost in silence"] for row in result["table"]) else 0


def conclude(result, seed, command):
    """The result with its table, caption and machine."""
    whole = Tally()
    for name in KINDS:
        whole.kinds |= result["kinds"].get(name, {})
    rows = whole.rows()
    lost = rows[-1]["lost in silence"]
    caption = (
        f"Faults tried through the public functions and scripts: told in one line, or the result "
        f"of the undamaged input; {lost} lost in silence. Fuzzed wav, aiff, mp3, m4a have no "
        f"checksum of their samples. Seed {seed}; {common.where()}; "
        "`python bench/robustness.py`"
    )
    result |= {
        "command": command,
        "machine": common.machine(),
        "caption": caption,
        "table": rows,
    }
    return result


if __name__ == "__main__":
    sys.exit(main())
