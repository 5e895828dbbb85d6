"""What others hear in the same music: features of published extractors, a row a clip.

    python bench/peers.py setup                             # their environment, build/peers
    python bench/peers.py extract --data moods               # build/features/moods/NAME.npz of each
    python bench/peers.py extract --data moods --peer mfcc   # of one of them
    python bench/peers.py summary                            # README's results/peers/summary.json

Peers:
  mfcc          20 MFCCs by torch and torchaudio's functional: mean, deviation, deviation of their
                differences (60 numbers)
  bliss         bliss-audio 0.2.0, made by hand for playlists (23 numbers)
  musicnn-mtt   musicnn 0.1.0, supervised on MagnaTagATune: its penultimate layer (200 numbers),
                and its 50 probabilities
  musicnn-msd   the same, supervised on 200,000 songs of the Million Song Dataset

`--peer ships` is no peer: demo/encoder.pt, for its clips a second on the same core.

All are given the samples of the prepared folder, so that nobody hears more than another. musicnn
was made for TensorFlow 1: it runs under 2.21 with legacy Keras and NumPy 1.26. Two things are done
otherwise than in its own extractor, which are faults there: the spectrogram stays float32 (10,000
times a float16 overflows), and each window gets its own features (the extractor repeats those of
the first).

A features file holds `id` (N,) str, `features` (N, D) float32, and `seconds`, of one core, for all
of them; musicnn's also `probabilities` (N, 50) and `tags`. `evaluate.py --features-from` scores it.
"""
import argparse
import os
import subprocess
import sys
import tempfile
import time
import wave
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["tensorflow-cpu==2.21.*", "tf_keras", "librosa==0.11.*", "bliss-audio==0.2.0", "scipy",
            "numpy==1.26.*"]
MUSICNN = {"musicnn-mtt": "MTT_musicnn", "musicnn-msd": "MSD_musicnn"}


def setup(folder):
    """The peers' environment: they need another NumPy than the project, and TensorFlow."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    install = [folder / "bin/python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *PACKAGES], check=True)
    # it asks for TensorFlow 1
    subprocess.run([*install, "--no-deps", "musicnn==0.1.0"], check=True)


def clips_of(folder):
    """(ids, sample rate, a function: i -> samples (T,) float32) of a prepared folder."""
    import json

    meta = json.loads((folder / "meta.json").read_text())
    with np.load(folder / "clips.npz") as table:
        packed = table["id"].tobytes().decode("utf-8", "surrogateescape")
        start = table["start"]
        length = table["length"]
    ids = np.array(packed.split("\0"))
    audio = np.load(folder / "audio.npy", mmap_mode="r")

    def samples(i):
        return audio[start[i] : start[i] + length[i]].astype(np.float32) / 32768

    return ids, meta["sample_rate"], samples


class Mfcc:
    """Means and deviations of 20 MFCCs: what a decade of music information retrieval began with."""

    def __init__(self, sample_rate):
        import torch
        from torchaudio import functional

        torch.set_num_threads(1)
        self.window = torch.hann_window(2048)
        self.mel = functional.melscale_fbanks(1025, 0.0, sample_rate / 2, 128, sample_rate,
                                              "slaney", "slaney")
        self.dct = functional.create_dct(20, 128, "ortho")

    def __call__(self, samples):
        import torch

        bins = torch.stft(torch.from_numpy(samples), 2048, 512, window=self.window,
                          return_complex=True)
        decibels = 10 * (bins.abs().square().T @ self.mel).clamp_min(1e-10).log10()  # (frames, 128)
        mfcc = decibels.clamp_min(decibels.max() - 80) @ self.dct  # (frames, 20)
        return {"features": torch.cat([mfcc.mean(0), mfcc.std(0), mfcc.diff(dim=0).std(0)]).numpy()}


class Ships:
    """The encoder that ships, as evaluate.py embeds a clip: the mean over its full windows."""

    def __init__(self, sample_rate):
        import torch

        sys.path.insert(0, str(ROOT))
        import model

        torch.set_num_threads(1)
        model.tune_allocator()
        self.encoder = model.fold_batch_norm(model.load_encoder(ROOT / "demo/encoder.pt")[0])

    def __call__(self, samples):
        import torch

        size = self.encoder.input_samples
        windows = torch.from_numpy(samples[: len(samples) // size * size]).view(-1, 1, size)
        with torch.inference_mode():
            return {"features": self.encoder(windows).mean(0).numpy()}


class Bliss:
    """bliss-audio reads files alone, so each clip becomes a wav for a moment."""

    def __init__(self, sample_rate):
        self.sample_rate = sample_rate

    def __call__(self, samples):
        from bliss_audio import Song

        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            with wave.open(file.name, "wb") as out:
                out.setnchannels(1)
                out.setsampwidth(2)
                out.setframerate(self.sample_rate)
                out.writeframes((samples * 32768).astype("<i2").tobytes())
            return {"features": np.array(Song(file.name).analysis, np.float32)}


class Musicnn:
    """Penultimate layer and probabilities: means over windows of 3 s (187 frames at 16 kHz)."""

    def __init__(self, sample_rate, name):
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        import tensorflow as tf
        from musicnn import configuration, models

        self.sample_rate = sample_rate
        self.tags = configuration.MTT_LABELS if "MTT" in name else configuration.MSD_LABELS
        v1 = tf.compat.v1
        v1.disable_eager_execution()
        self.input = v1.placeholder(tf.float32, [None, 187, configuration.N_MELS])
        with tf.name_scope("model"):
            logits, *_, penultimate = models.define_model(self.input, False, name, len(self.tags))
        self.outputs = [penultimate, tf.sigmoid(logits)]
        one_thread = v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
        self.session = v1.Session(config=one_thread)
        v1.train.Saver().restore(self.session, f"{Path(models.__file__).parent / name}/")

    def __call__(self, samples):
        import librosa
        from scipy.signal import resample_poly

        common = np.gcd(16000, self.sample_rate)
        samples = resample_poly(samples, 16000 // common, self.sample_rate // common)
        samples = samples.astype(np.float32)
        samples = np.pad(samples, (0, max(0, 187 * 256 - len(samples))))  # at least one window
        mel = librosa.feature.melspectrogram(y=samples, sr=16000, n_fft=512, hop_length=256,
                                             n_mels=96).T
        mel = np.log10(10000 * mel + 1)
        windows = np.stack([mel[i : i + 187] for i in range(0, len(mel) - 186, 187)])
        features, probabilities = self.session.run(self.outputs, {self.input: windows})
        return {"features": features.mean(0), "probabilities": probabilities.mean(0)}


def build(peer, sample_rate):
    """The extractor of that name: samples (T,) -> {"features": (D,), ...}."""
    if peer in MUSICNN:
        return Musicnn(sample_rate, MUSICNN[peer])
    return {"ships": Ships, "mfcc": Mfcc, "bliss": Bliss}[peer](sample_rate)


def extract(peer, folder, out, every):
    """Features of every `every`-th clip of a prepared folder, into one npz."""
    ids, sample_rate, samples = clips_of(folder)
    extractor = build(peer, sample_rate)
    extractor(samples(0))  # what is done once is not counted
    began = time.process_time()
    chosen = range(0, len(ids), every)
    rows = [extractor(samples(i)) for i in chosen]
    seconds = time.process_time() - began
    columns = {name: np.stack([row[name] for row in rows]).astype(np.float32) for name in rows[0]}
    about = {"tags": np.array(extractor.tags)} if hasattr(extractor, "tags") else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(out, id=ids[::every], seconds=seconds, **columns, **about)
    print(f"{out}: {len(rows)} clips, {columns['features'].shape[1]} numbers, "
          f"{len(rows) / seconds:.1f} clips/s of a core")


SOURCES = {"clmr": "no labels: 59 hours, free or made up", "untrained": "nothing",
           "mfcc": "nothing: made by hand", "bliss": "nothing: made by hand",
           "musicnn-mtt": "MagnaTagATune's labels", "musicnn-msd": "labels of 200,000 songs"}


def summary(folder):
    """One row a model, from the evaluations of the same features on tags and on quadrants."""
    import json

    def pairs(names):
        tables = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["table"]
                  for name in names]
        return list(zip(*tables))

    rows = []
    measured = pairs(("moods", "quadrants"))
    levels = pairs(f"../small/melcnn-{data}-levels" for data in ("moods", "quadrants"))
    for row, other in [measured[0], levels[0], *measured[1:]]:
        name = row["model"].split(",")[0]
        shown = "**demo/encoder.pt**" if name == "clmr" else name
        if "levels" in row["probe"]:
            shown = "the same, `--features levels`"
        rows.append({"features": shown,
                     "learnt from": SOURCES[name], "ROC-AUC": row["ROC-AUC"],
                     "PR-AUC": row["PR-AUC"], "quadrants": other["accuracy"],
                     "quadrants@10": other["labels@10"]})
    caption = ("900 excerpts of released songs, which what ships never heard: 50 mood and genre "
               "words, four quadrants of emotion; percent, 270 test clips, [95 % interval over "
               "songs]. Logistic regression on standardised clip means; quadrants@10: share of the "
               "10 nearest clips in the same quadrant, without the same artist's.")
    text = json.dumps({"kind": "summary", "caption": caption, "table": rows}, indent=1) + "\n"
    (folder / "summary.json").write_text(text, encoding="utf-8")


def build_parser():
    parser = argparse.ArgumentParser(
        prog="peers.py", description="Features of published extractors.", allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("what", choices=["setup", "extract", "summary"],
        help="make the environment, features, or README's table")
    add("--data", type=Path, default=Path("data/demo"),
        help="a prepared folder: a name under data/ or a path")
    add("--peer", nargs="+", default=["mfcc", "bliss", *MUSICNN], help="which of them")
    add("--every", type=int, default=1, metavar="N", help="of every N-th clip alone")
    add("--env", type=Path, default=Path("build/peers"), metavar="DIR",
        help="the peers' environment")
    add("--out", type=Path, default=Path("build/features"), metavar="DIR", help="for DATA/PEER.npz")
    add("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv=None):
    args = build_parser().parse_args(argv)
    if args.what == "setup":
        setup(args.env)
        return 0
    if args.what == "summary":
        summary(ROOT / "results/peers")
        return 0
    folder = args.data if (args.data / "meta.json").exists() else Path("data") / args.data
    for peer in args.peer:
        if peer in ("ships", "mfcc") or args.inside:
            extract(peer, folder, args.out / folder.name / f"{peer}.npz", args.every)
            continue
        # TensorFlow and the project's packages do not live in one environment
        command = [args.env / "bin/python", __file__, "extract", "--inside", "--data", folder,
                   "--peer", peer, "--every", args.every, "--out", args.out]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run([str(part) for part in command], check=True, env=environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
