"""Sung songs: speech under free licences, made to sing over music that has no singer.

    python bench/voices.py speech/usr/share sung/ --over game free styles --songs 560
    python prepare.py --data folder --root sung --labels sung/voices.csv --name sung

Free recordings hardly hold singing. Debian's asterisk-core-sounds-{en,es,fr,it,ru}-g722 (CC BY-SA),
fillets-ng-data-{cs,nl}, klettres-data and ktuberling-data (GPL), unpacked into one folder by
`dpkg-deb -x`, hold 42 speakers. The WORLD vocoder takes their speech apart; each syllable is
stretched to a note's length and given its pitch, with glides, drift and vibrato. Notes are drawn
near the last one among those that the music plays at that moment. A singer's formants, effort,
breath and range are moved at random; some songs are spoken to a beat, doubled, sung in two voices
or by a choir, driven, or louder by far than what accompanies them. 45 s each, mono Ogg Vorbis at
22,050 Hz, about 2 s of a core; each counts as a song of its own, and voices.csv names the music of
it, whose label it keeps. A song depends on --seed, its number, the speech and the music alone; one
that is there is kept.

Needs pyworld from PyPI, which requirements.txt does not have, and ffmpeg.
"""

import argparse
import csv
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import fftconvolve

import common

sys.path.insert(0, str(common.ROOT))
import prepare  # noqa: E402

try:
    import pyworld
except ImportError:  # main says so; --help works without
    pyworld = None

RATE = 22050
SECONDS = 45
FRAME = 0.005  # seconds of the vocoder's frames
HOP = 2048  # samples between two looks at what the music plays
SPEAKERS = ["asterisk/sounds/*_*_*", "ktuberling/sounds/*", "klettres/*"]  # a folder each
FISH = "games/fillets-ng/sound/*/{}/*-{}-*.ogg"  # a language, which of the two fish


# --------------------------------------------------------------------------------------- singers
def speakers(root: Path) -> dict[str, list[Path]]:
    """Name -> the recordings of one speaker; those who say little are left out."""
    found = {}
    for pattern in SPEAKERS:
        for folder in sorted(root.glob(pattern)):
            kinds = (".ogg", ".wav", ".g722")
            files = [f for f in folder.rglob("*") if f.suffix in kinds and f.is_file()]
            found[f"{folder.parts[-3]}-{folder.name}"] = files
    for language in ("cs", "nl"):
        for fish in "mv":
            found[f"fish-{language}-{fish}"] = list(root.glob(FISH.format(language, fish)))
    return {name: sorted(files) for name, files in found.items() if len(files) >= 25}


def decode(path: Path) -> np.ndarray:
    """A recording, mono at RATE, (samples,); of a damaged one, what can be had."""
    form = ["-ac", "1", "-ar", str(RATE), "-f", "f32le", "-"]
    done = subprocess.run(["ffmpeg", "-v", "error", "-i", path, *form], capture_output=True)
    return np.frombuffer(done.stdout, np.float32).astype(np.float64)


def syllables(x: np.ndarray) -> list:
    """(pitch (n,), envelope (n, bins), aperiodicity (n, bins)) of each syllable of a recording:
    one voiced stretch, or a part of it, with the consonants before it."""
    f0, t = pyworld.dio(x, RATE, f0_floor=71, f0_ceil=500)
    f0 = pyworld.stonemask(x, f0, t, RATE)
    envelope = pyworld.cheaptrick(x, f0, t, RATE)
    aperiodicity = pyworld.d4c(x, f0, t, RATE)
    loud = envelope.sum(1)
    voiced = (f0 > 0) & (loud > 0.01 * loud.max())
    found = []
    last = 0
    for start, end in np.flatnonzero(np.diff(np.r_[0, voiced, 0])).reshape(-1, 2):
        if end - start < 12:
            continue
        begin = max(last, start - 24)
        pieces = max(1, round((end - start) / 45))
        for cut in np.linspace(start, end, pieces + 1).astype(int)[1:]:
            part = slice(begin, cut)
            parts = (envelope[part].astype(np.float32), aperiodicity[part].astype(np.float32))
            found.append((f0[part], *parts))
            begin = cut
        last = end
    return found


class Singer:
    """What a speaker said, by phrases of syllables, and the median pitch of it (MIDI)."""

    def __init__(self, files, chance, seconds=40.0):
        self.said = []
        total = 0.0
        for k in chance.permutation(len(files)):
            x = decode(files[k])[: 8 * RATE]
            if len(x) < 0.25 * RATE or np.abs(x).max() < 0.01:
                continue
            self.said.append(syllables(x / np.abs(x).max()))
            total += len(x) / RATE
            if total > seconds:
                break
        self.said = [phrase for phrase in self.said if phrase]
        pitches = [f0[f0 > 0] for phrase in self.said for f0, *_ in phrase] or [[440.0]]
        self.pitch = midi(np.median(np.concatenate(pitches)))


# ----------------------------------------------------------------------------------------- notes
def midi(hertz):
    return 12 * np.log2(hertz / 440) + 69


def chroma(x: np.ndarray) -> np.ndarray:
    """How strong each of the 12 pitch classes is, (frames, 12), each HOP samples."""
    n = 8192
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(x, (n // 2, n // 2)), n)[::HOP]
    magnitude = np.abs(np.fft.rfft(frames * np.hanning(n)))
    f = np.fft.rfftfreq(n, 1 / RATE)
    use = (f > 100) & (f < 2000)
    pitch = np.round(midi(f[use])).astype(int) % 12
    classes = np.stack([magnitude[:, use][:, pitch == k].sum(1) for k in range(12)], 1)
    total = classes.sum(1, keepdims=True)
    return np.where(total > 0, classes / total.clip(1e-9), 1 / 12)  # of silence, all alike


def melody(chance, strength, centre, beat, spoken) -> list:
    """Notes (start, length in s, MIDI pitch) of a song, in phrases with rests between them."""
    low = centre - 6
    high = centre + 6
    notes = []
    at = chance.uniform(0, 4) * beat
    pitch = chance.uniform(low + 3, high - 3)
    near = np.arange(round(low), round(high) + 1)
    while at < SECONDS - 1:
        for _ in range(chance.integers(4, 17 if spoken else 11)):
            lengths = (0.25, 0.25, 0.5, 0.5) if spoken else (0.5, 0.5, 1, 1, 1, 1.5, 2, 3)
            length = max(chance.choice(lengths) * beat, 0.11)
            seen = strength[min(int((at + length / 2) * RATE / HOP), len(strength) - 1)]
            weight = (seen[near % 12] / seen.max()) ** 3 * np.exp(-np.abs(near - pitch) / 2.5)
            weight[near == round(pitch)] *= 0.7
            pitch = chance.choice(near, p=weight / weight.sum())
            notes.append((at, length, float(pitch)))
            at += length
        at += chance.choice((0.5, 1, 1, 2, 2, 4)) * beat
    return notes


# --------------------------------------------------------------------------------------- singing
def draw_style(chance) -> dict:
    """How a song is sung."""
    spoken = chance.random() < 0.15
    return {
        "spoken": spoken,
        "shift": chance.normal(0, 3),  # of what is spoken, semitones
        "vibrato": 0.0 if spoken else chance.choice([0, 0.15, 0.3, 0.5]),  # semitones
        "rate": chance.uniform(4.5, 6.5),  # of the vibrato, Hz
        "scoop": chance.choice([0, 0, 0.5, 2]),  # semitones from which a note is reached
        "glide": int(chance.integers(5, 25)),  # frames
        "drift": chance.uniform(0.02, 0.15),  # semitones
        "formants": np.exp(chance.normal(0, 0.09)),
        "tilt": chance.normal(1.5, 2.5),  # dB an octave: effort
        "breath": np.exp(chance.normal(0, 0.5)),
    }


def stretched(spoken: np.ndarray, frames: int) -> np.ndarray:
    """Which frame of a syllable sounds in each of a note's: the onset as said, the rest longer."""
    onset = min(int(np.argmax(spoken > 0)) + 3, frames // 2, len(spoken) - 2)
    body = np.linspace(onset, len(spoken) - 1, frames - onset)
    return np.r_[np.arange(onset), body].astype(int)


def intonation(chance, said, frames, pitch, style) -> np.ndarray:
    """MIDI pitch of each frame of a note."""
    t = np.arange(len(frames)) * FRAME
    target = np.full(len(frames), pitch)
    if style["spoken"]:
        target = midi(np.where(said > 0, said, np.median(said[said > 0]))[frames]) + style["shift"]
    depth = style["vibrato"] * np.clip((t - 0.2) / 0.3, 0, 1)
    target = target + depth * np.sin(2 * np.pi * style["rate"] * t + chance.uniform(0, 6))
    return target + style["scoop"] * -np.exp(-t / 0.05)


def glide(chance, f0, style) -> np.ndarray:
    """Pitch (Hz, 0 where unvoiced) that moves from note to note and is never quite still."""
    sounding = f0 > 0
    logs = np.where(sounding, np.log(f0.clip(1)), 0)
    kernel = np.hanning(style["glide"] | 1)
    weight = np.convolve(sounding, kernel, "same").clip(1e-9)
    smooth = np.convolve(logs, kernel, "same") / weight
    drift = np.convolve(chance.normal(0, 1, len(f0)), np.hanning(41) / 20, "same")
    return np.where(sounding, np.exp(smooth + drift * style["drift"] / 12 * np.log(2)), 0)


def moved(x, by):
    """Spectra (frames, bins) with their frequencies times `by`."""
    index = np.arange(x.shape[1]) / by
    low = np.minimum(index.astype(int), x.shape[1] - 2)
    share = np.minimum(index - low, 1)
    return x[:, low] * (1 - share) + x[:, low + 1] * share


def sing(chance, singer, notes, style) -> np.ndarray:
    """The voice alone, (samples,): one syllable a note, phrase after phrase."""
    total = int(SECONDS / FRAME)
    bins = singer.said[0][0][1].shape[1]
    f0 = np.zeros(total)
    envelope = np.full((total, bins), 1e-12)
    aperiodicity = np.full((total, bins), 1.0)
    phrase = iter(())
    for at, length, pitch in notes:
        syllable = next(phrase, None)
        if syllable is None:
            phrase = iter(singer.said[chance.integers(len(singer.said))])
            syllable = next(phrase)
        said, spectrum, noise = syllable
        start = int(at / FRAME)
        if start >= total:
            break
        frames = stretched(said, max(int(length / FRAME), 8))[: total - start]
        span = slice(start, start + len(frames))
        fade = np.minimum(1, np.arange(len(frames))[::-1] / 10)
        part = spectrum[frames].astype(np.float64)
        part *= (1 / max(part.sum(1).max(), 1e-12)) ** 0.7 * fade[:, None]
        envelope[span] = np.maximum(part, 1e-12)
        aperiodicity[span] = noise[frames]
        target = intonation(chance, said, frames, pitch, style)
        f0[span] = np.where(said[frames] > 0, 440 * 2 ** ((target - 69) / 12), 0)
    envelope = moved(envelope, style["formants"])
    f = np.linspace(0, RATE / 2, bins).clip(200)
    envelope *= (f / 1000) ** (style["tilt"] / 3.01)
    aperiodicity = np.clip(moved(aperiodicity, style["formants"]) ** style["breath"], 1e-3, 1)
    f0 = glide(chance, f0, style)
    spectra = (np.ascontiguousarray(x) for x in (envelope, aperiodicity))
    y = pyworld.synthesize(f0, *spectra, RATE, FRAME * 1e3)
    return np.pad(y, (0, SECONDS * RATE))[: SECONDS * RATE]


def sing_together(chance, singers, singer, notes, style) -> np.ndarray:
    """The voice of a song: one singer, the same twice, in two voices, or a choir."""

    def late(by, shift, detune):
        return [
            (at + abs(chance.normal(0, by)), length, pitch + shift + chance.normal(0, detune))
            for at, length, pitch in notes
        ]

    voice = sing(chance, singer, notes, style)
    kind = chance.random()
    if kind < 0.12:
        for shift in (0, 0, -5, -12, 7)[: chance.integers(2, 6)]:
            other = singers[chance.integers(len(singers))]
            shift += 12 * round((other.pitch + 4 - singer.pitch) / 12)
            again = late(0.03, shift, 0.1)
            another = style | {"formants": np.exp(chance.normal(0, 0.05))}
            extra = sing(chance, other, again, another)
            voice += extra * rms(voice) / rms(extra)
    elif kind < 0.3:
        extra = sing(chance, singer, late(0.015, chance.choice([0, 0, 3, 4, -5, 12]), 0.08), style)
        voice += 0.6 * extra * rms(voice) / rms(extra)
    return voice / rms(voice)


def perform(chance, singers, music) -> np.ndarray:
    """A song of SECONDS: music (samples,) and one or more of the singers."""
    singer = singers[chance.integers(len(singers))]
    style = draw_style(chance)
    beat = 60 / chance.uniform(65, 140)
    centre = singer.pitch + 12 * np.log2(style["formants"]) + chance.uniform(0, 9)
    notes = melody(chance, chroma(music), centre, beat, style["spoken"])
    voice = sing_together(chance, singers, singer, notes, style)
    if chance.random() < 0.2:
        drive = chance.uniform(0.5, 3)
        voice = np.tanh(drive * voice) / drive
        voice /= rms(voice)
    decay = chance.uniform(0.15, 2.0)  # seconds of the room's 60 dB
    t = np.arange(int(decay * RATE)) / RATE
    room = chance.normal(0, 1, len(t)) * np.exp(-6.9 * t / decay)
    wet = fftconvolve(voice, room)[: len(voice)]
    voice += chance.uniform(0, 0.5) * wet / rms(wet)
    decibels = chance.uniform(12, 30) if chance.random() < 0.08 else chance.uniform(-5, 5)
    x = music / max(rms(music), 1e-4) + 10 ** (decibels / 20) * voice / rms(voice)
    return 0.9 * x / np.abs(x).max()


def rms(x):
    """Of the louder half: rests do not count."""
    power = np.square(x[: len(x) // 1024 * 1024]).reshape(-1, 1024).mean(1)
    return np.sqrt(np.sort(power)[len(power) // 2 :].mean()) + 1e-9


# ----------------------------------------------------------------------------------------- songs
def draw_music(chance, clips) -> int:
    """A clip of at least 20 s, any song as likely as another."""
    usable = np.flatnonzero(clips.length >= 20 * RATE)
    songs = np.unique(clips.group[usable])
    return chance.choice(usable[clips.group[usable] == chance.choice(songs)])


def excerpt(chance, x) -> np.ndarray:
    """SECONDS of x (samples,); what is shorter is repeated."""
    n = SECONDS * RATE
    start = chance.integers(max(len(x) - n, 0) + 1)
    x = x[start : start + n].astype(np.float64)
    return np.tile(x, -(-n // len(x)))[:n]


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("speech", type=Path, help="where Debian's packages have their usr/share")
    parser.add_argument("out", type=Path, help="folder for the songs and voices.csv")
    parser.add_argument("--over", nargs="+", required=True, help="prepared folders of music")
    parser.add_argument("--songs", type=int, default=560)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main():
    parser = build_parser()
    args = parser.parse_args()
    if pyworld is None:
        parser.error("expected the WORLD vocoder, got no module pyworld; type: pip install pyworld")
    if not shutil.which("ffmpeg"):
        parser.error("expected ffmpeg, which reads the speech; type: apt install ffmpeg")
    people = speakers(args.speech)
    if not people:
        parser.error(f"{args.speech}: no speakers there; unpack the packages that this file names")
    folders = [prepare.Clips(prepare.find(name)) for name in args.over]
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [("file", "label", "over")]
    singers = None
    for k in range(args.songs):
        file = args.out / f"sung-{args.seed}-{k:04d}.ogg"
        chance = np.random.default_rng([args.seed, k])
        clips = folders[k % len(folders)]
        clip = draw_music(chance, clips)
        labels = [clips.tags[i] for i in np.flatnonzero(clips.labels[clip])]
        rows.append((file.name, *(labels or ["sung"])[:1], clips.id[clip]))
        if file.exists():
            continue
        if singers is None:
            order = np.random.default_rng(args.seed)
            singers = [Singer(files, order) for files in people.values()]
            singers = [singer for singer in singers if singer.said]
        music = excerpt(chance, clips.waveform(clip).numpy().reshape(-1))
        partial = file.with_suffix(".partial")  # until it is whole
        soundfile.write(partial, perform(chance, singers, music), RATE, "VORBIS", format="OGG")
        partial.rename(file)
    with open(args.out / "voices.csv", "w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows(rows)
    print(f"{args.songs} songs by {len(people)} speakers in {args.out}, listed in voices.csv")


if __name__ == "__main__":
    main()
