"""Made-up songs in the styles of MMA's library: jazz, country, reggae, choir, metal and so on.

    python bench/styles.py styles/ --each 2
    python prepare.py --data folder --root styles --labels styles/styles.csv --name styles

Free recordings hardly hold these. MMA, the Musical MIDI Accompaniment (GPL), plays any of its 184
files of styles to given chords; here these are common progressions in a random key, tempo and
mode, mostly with a melody: a random walk through the scale and the chords' notes, by one of 37
instruments. Fluidsynth renders with one of three soundfonts (FluidR3 and MuseScore General, MIT;
TimGM6mb, GPL), sox levels and encodes: about a minute each, mono Ogg Vorbis at 22,050 Hz.

Needs Debian's mma, fluidsynth, fluid-soundfont-gm, musescore-general-soundfont,
timgm6mb-soundfont and sox. A song depends on its name alone; one that is there is kept; one that
MMA refuses is named at the end.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARY = Path("/usr/share/mma/lib")
NO_STYLES = re.compile(r"metronome|none\.|stdpats|init|reset|roland|casio|pfpats|count\.|intro\.")
FONTS = [  # the large one, whose samples are packed, is as often as the small one
    "sf2/FluidR3_GM.sf2",
    "sf2/FluidR3_GM.sf2",
    "sf3/MuseScore_General_Full.sf3",
    "sf2/TimGM6mb.sf2",
]
MAJOR = [
    *("I vi IV V", "I V vi IV", "ii V I I", "I IV I V", "I I IV V", "vi IV I V", "I iii IV iv"),
    *("iii vi ii V", "I bVII IV I", "I7 IV7 I7 V7"),
]
MINOR = ["i VII VI V", "i iv V i", "i VI III VII", "i i iv iv", "i VII i v", "i bII i bII"]
DEGREES = {"i": 0, "bii": 1, "ii": 2, "iii": 4, "iv": 5, "v": 7, "vi": 9, "bvii": 10, "vii": 11}
IN_MINOR = {"iii": 3, "vi": 8, "vii": 10}
NOTES = ["C", "Db", "D", "Eb", "E", "F", "Gb", "G", "Ab", "A", "Bb", "B"]
VOICES = """AltoSax TenorSax SopranoSax Flute PanFlute Shakuhachi Whistle Clarinet Oboe Trumpet
    MutedTrumpet Trombone Violin Fiddle Cello Strings Banjo NylonGuitar SteelGuitar JazzGuitar
    CleanGuitar OverDriveGuitar DistortionGuitar Sitar Harmonica Accordion Organ1 Harpsichord Piano1
    EPiano Vibraphone Marimba ChoirAahs VoiceOohs SynthVox SquareWave SawWave""".split()


def chord(symbol: str, key: int, minor_key: bool, sevenths: bool) -> tuple[int, str]:
    """A degree such as bVII or I7 in a key -> its root (semitones above C) and kind."""
    degree = symbol.rstrip("7")
    low = degree.lower()
    root = key + (IN_MINOR.get(low, DEGREES[low]) if minor_key else DEGREES[low])
    kind = "m" if degree.lstrip("b").islower() else ""
    if symbol.endswith("7") or (sevenths and degree == "V"):
        kind += "7"
    elif sevenths:
        kind += "7" if kind else "M7"
    return root % 12, kind


def melody(chance, root, kind, beats, busy, scale) -> str:
    """A bar for MMA's Solo track."""
    chord_notes = [(root + step) % 12 for step in ((0, 3, 7) if "m" in kind else (0, 4, 7))]
    lengths = {1: "8", 2: "4", 4: "2", 8: "1"}  # in eighths
    left, bar = 2 * beats, []
    while left:
        usual = (1, 1, 2, 2, 4) if busy else (1, 2, 2, 4, 4, 8)
        length = chance.choice([n for n in usual if n <= left])
        left -= length
        note = "r"
        if chance.random() > 0.25:
            note = NOTES[chance.choice(chord_notes if chance.random() < 0.5 else scale)].lower()
            note += "+" if chance.random() < 0.15 else ""
        bar.append(lengths[length] + note)
    return "{" + ";".join(bar) + ";}"


def score(style: Path, chance) -> str:
    """A song for MMA in one of its styles."""
    text = style.read_text(errors="replace")
    grooves = re.findall(r"(?im)^\s*DefGroove\s+(\S+)", text)
    grooves = [g for g in grooves if not re.search(r"(?i)intro|end|fill", g)] or grooves
    beats = int((re.findall(r"(?im)^\s*Time\s+(\d+)", text) or [4])[0])
    tempo = int((re.findall(r"(?im)Tempo\s+(\d+)", text) or [chance.randint(70, 150)])[0])
    tempo = int(tempo * chance.uniform(0.8, 1.25))
    minor, sevenths, busy = (chance.random() < p for p in (0.45, 0.5, 0.5))
    key = chance.randrange(12)
    steps = (0, 2, 3, 5, 7, 8, 10) if minor else (0, 2, 4, 5, 7, 9, 11)
    scale = [(key + step) % 12 for step in steps]
    lines = [f"Tempo {tempo}", f"Use {style.relative_to(LIBRARY).with_suffix('')}"]
    lines.append(f"Groove {chance.choice(grooves)}")
    solo = chance.random() < 0.65
    if solo:
        lines += [f"Solo Voice {chance.choice(VOICES)}", f"Solo Octave {chance.choice('4556')}"]
        lines += ["Solo Articulate 90", f"Solo Volume {chance.choice(['mf', 'f', 'ff'])}"]
    parts = [chance.choice(MINOR if minor else MAJOR).split() for _ in range(2)]
    for bar in range(max(12, 55 * tempo // 60 // beats)):
        part = parts[bar // 16 % 2]
        root, kind = chord(part[bar % len(part)], key, minor, sevenths)
        sung = solo and bar // 8 % 3 < 2
        notes = melody(chance, root, kind, beats, busy, scale) if sung else ""
        lines.append(f"{bar + 1} {NOTES[root]}{kind} {notes}")
        if bar % 8 == 7 and chance.random() < 0.5:
            lines.append(f"Groove {chance.choice(grooves)}")
    return "\n".join(lines) + "\n"


def render(style: Path, name: str, out: Path) -> str:
    """Write a song's file; why not, where MMA or fluidsynth refuse."""
    chance = random.Random(name)
    with tempfile.TemporaryDirectory() as folder:
        song = Path(folder, "song.mma")
        song.write_text(score(style, chance))
        font = Path("/usr/share/sounds", chance.choice(FONTS))
        midi, wave = song.with_suffix(".mid"), song.with_suffix(".wav")
        synth = ["fluidsynth", "-o", "synth.dynamic-sample-loading=1", "-niq", "-r", "22050"]
        levels = ["compand", "0.05,0.3", "6:-50,-30,-12", "0", "-90", "0.1", "gain", "-n", "-1"]
        partial = out / f".{name}.ogg"  # until it is whole
        for command in (
            ["mma", song],
            [*synth, "-g", "0.6", "-F", wave, font, midi],
            ["sox", "-V1", wave, "-c", "1", partial, "remix", "-", *levels, "trim", "0", "90"],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return (done.stdout + done.stderr).strip().splitlines()[-1]
        partial.rename(out / f"{name}.ogg")
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=2, help="songs of each file of styles")
    args = parser.parse_args()
    styles = [f for f in sorted(LIBRARY.rglob("*.mma")) if not NO_STYLES.search(f.name)]
    if not styles:
        sys.exit(f"{LIBRARY}: no styles there; type: apt-get install mma")
    args.out.mkdir(parents=True, exist_ok=True)
    refused = {}
    for k in range(args.each):
        for style in styles:
            name = "-".join([*style.relative_to(LIBRARY).with_suffix("").parts, str(k)])
            if not (args.out / f"{name}.ogg").exists():
                if why := render(style, name, args.out):
                    refused[name] = why
    for name, why in refused.items():
        print(f"{name}: {why}")
    names = sorted(path.name for path in args.out.glob("[!.]*.ogg"))
    rows = [f"{name},{name.rpartition('-')[0]}" for name in names]
    (args.out / "styles.csv").write_text("\n".join(["file,label", *rows]) + "\n")
    print(f"{len(names)} songs in {args.out}, labelled by styles.csv; {len(refused)} refused")


if __name__ == "__main__":
    main()
