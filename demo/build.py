#!/usr/bin/env python3
"""Cut the demo set out of Debian packages of free game music: excerpts, labels and attribution.

    python demo/build.py demo/sources.csv                      # downloads 1.5 GB, some minutes
    python demo/build.py demo/sources.csv --packages folder/   # .deb files that are there already are not fetched again

sources.csv holds one row per track: who wrote it, under which licence, where it lies in which package and version, its
split, and at which seconds excerpts start. Needs apt-get (after `apt-get update`), dpkg-deb, tar, ffmpeg with
libvorbis, numpy and soundfile; nothing is installed. The same encoder gives the same bytes.

Leaves in the folder of sources.csv: audio/*.ogg (mono Ogg Vorbis), labels.csv (for `prepare.py --data demo`) and
the table of ATTRIBUTION.md, below its marker. Every excerpt is decoded again and refused if it is clipped, silent in
part or of the wrong length.
"""
import argparse
import csv
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import soundfile

SECONDS = 20.0
RATE = 22050        # Hz; the rate of the paper, so that preparing the set resamples nothing
QUALITY = 0.5       # Vorbis quality of the mono excerpt: about 32 kbit/s
CEILING = 0.95      # excerpts with a higher peak, before or after coding, are scaled down to it
SILENCE = -50.0     # dBFS; every half second of an excerpt lies above it
LICENCES = {"CC-BY-3.0": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/"),
            "CC-BY-SA-3.0": ("CC BY-SA 3.0", "https://creativecommons.org/licenses/by-sa/3.0/")}

COLUMNS = ("title", "author", "split", "name", "label")   # of sources.csv
MARKER = "<!-- the table below is written by build.py -->"


def fetch(package: str, version: str, folder: Path) -> Path:
    """Download one Debian package of one version into a folder, unless it is there; returns the .deb file."""
    name = f"{package}_{version}_*.deb"
    there = sorted(folder.glob(name))
    if not there:
        command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", f"{package}={version}"]
        got = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        there = sorted(folder.glob(name))
        if not there:
            said = (got.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"expected the package {package} {version}, apt-get said: {said}; type: apt-get update")
    return there[0]


def unpack(deb: Path, files: set[str], folder: Path) -> None:
    """Unpack the named files (paths inside the package, without a leading slash) of a .deb into a folder."""
    archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    names = [f"./{name}" for name in sorted(files)]
    subprocess.run(["tar", "-x", "-C", str(folder), *names], stdin=archive.stdout, check=True)
    archive.wait()


def cut(track: Path, start: float, out: Path, tags: dict[str, str]) -> None:
    """Cut SECONDS of a track from second `start` on, mono at RATE, peak at most CEILING, as tagged Ogg Vorbis."""
    first, n = round(start * RATE), round(SECONDS * RATE)   # counted in samples: time stamps of some files have gaps
    trim = f"aformat=channel_layouts=mono,aresample={RATE},atrim=start_sample={first}:end_sample={first + n}"
    decode = ["ffmpeg", "-v", "error", "-i", str(track), "-af", trim, "-f", "f32le", "-"]
    wave = np.frombuffer(subprocess.run(decode, capture_output=True, check=True).stdout, np.float32)
    metadata = [word for key, value in tags.items() for word in ("-metadata", f"{key}={value}")]
    encode = ["ffmpeg", "-v", "error", "-y", "-f", "f32le", "-ar", str(RATE), "-ac", "1", "-i", "-"]
    encode += ["-c:a", "libvorbis", "-q:a", str(QUALITY), "-fflags", "+bitexact", "-flags:a", "+bitexact"]
    encode += [*metadata, str(out)]
    peak = np.abs(wave).max()
    while True:   # lossy coding overshoots, so the peak that counts is the decoded one
        wave = wave * np.float32(min(1.0, 0.99 * CEILING / peak))
        subprocess.run(encode, input=wave.tobytes(), check=True)
        peak = np.abs(soundfile.read(out, dtype="float32")[0]).max()
        if peak <= CEILING:
            return


def check(file: Path) -> None:
    """Decode an excerpt and raise ValueError unless rate, channels, length, peak and level are as promised."""
    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    if rate != RATE or wave.shape[1] != 1:
        raise ValueError(f"{file}: expected mono at {RATE} Hz, came {wave.shape[1]} channels at {rate} Hz")
    if abs(len(wave) - SECONDS * RATE) > 64:
        raise ValueError(f"{file}: expected {SECONDS:g} s, came {len(wave) / rate:.3f} s: choose an earlier start")
    peak = np.abs(wave).max()
    if not peak < 1.0:
        raise ValueError(f"{file}: expected a peak below 1, came {peak:.3f}: lower CEILING")
    halves = wave[: len(wave) // (RATE // 2) * (RATE // 2)].reshape(-1, RATE // 2)
    level = 10 * np.log10((halves.astype(np.float64) ** 2).mean(1) + 1e-12)   # dBFS of each half second
    if level.min() < SILENCE:
        raise ValueError(f"{file}: expected {SILENCE:g} dBFS or more, came {level.min():.0f}: move its start")


def attribution(tracks: list[dict[str, str]]) -> str:
    """The table of ATTRIBUTION.md: one row per track."""
    lines = ["| excerpts | title | author | licence | package, version | file in the package |\n",
             "|---|---|---|---|---|---|\n"]
    for track in tracks:
        n = len(track["starts"].split())
        names = f"`{track['name']}-1.ogg`" if n == 1 else f"`{track['name']}-1.ogg` to `-{n}.ogg`"
        licence, url = LICENCES[track["licence"]]
        where = f"{Path(track['archive']).name}: {track['path']}" if track["archive"] else track["path"]
        lines.append(f"| {names} | {track['title']} | {track['author']} | [{licence}]({url}) "
                     f"| {track['package']} {track['version']} | `{where}` |\n")
    return "".join(lines)


def build(tracks: list[dict[str, str]], out: Path, packages: Path) -> None:
    """Fetch, cut, check and describe all tracks into `out`."""
    unknown = sorted({track["licence"] for track in tracks} - set(LICENCES))
    if unknown:
        raise ValueError(f"expected a licence of {', '.join(LICENCES)}, came {', '.join(unknown)}")
    audio = out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    labels = []
    for package in dict.fromkeys(track["package"] for track in tracks):
        mine = [track for track in tracks if track["package"] == package]
        with tempfile.TemporaryDirectory() as tmp:
            root = Path(tmp)
            deb = fetch(package, mine[0]["version"], packages)
            unpack(deb, {track["archive"] or track["path"] for track in mine}, root)
            for track in mine:
                source = root / track["path"]
                if track["archive"]:
                    with zipfile.ZipFile(root / track["archive"]) as archive:
                        source = Path(archive.extract(track["path"], root))
                for i, start in enumerate(track["starts"].split(), 1):
                    file = audio / f"{track['name']}-{i}.ogg"
                    origin = f"{SECONDS:g} s from second {start} of {source.name}, {package} {track['version']}"
                    cut(source, float(start), file, {"title": track["title"], "artist": track["author"],
                                                     "license": LICENCES[track["licence"]][1], "description": origin})
                    check(file)
                    labels.append([f"audio/{file.name}", *(track[key] for key in COLUMNS)])
        print(f"{package}: {len(mine)} tracks", flush=True)
    with open(out / "labels.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["file", "title", "artist", "split", "group", "label"])   # a track is a group
        writer.writerows(labels)
    text = (out / "ATTRIBUTION.md").read_text(encoding="utf-8")
    (out / "ATTRIBUTION.md").write_text(text.split(MARKER)[0] + f"{MARKER}\n\n{attribution(tracks)}", encoding="utf-8")
    size = sum(file.stat().st_size for file in audio.glob("*.ogg"))
    print(f"{len(labels)} excerpts, {len(labels) * SECONDS / 3600:.2f} h, {size / 1e6:.1f} MB in {audio}")
    print("next: python prepare.py --data demo")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     usage="build.py SOURCES.csv [--packages FOLDER]",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser.add_argument("sources", type=Path, help="table of the tracks; the set is written beside it")
    parser.add_argument("--packages", type=Path, help="folder to keep the .deb files in; without it a temporary one")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.sources.is_file():
        parser.error(f"{args.sources}: expected a table of tracks, found no such file; type: build.py demo/sources.csv")
    for tool in ("apt-get", "dpkg-deb", "tar", "ffmpeg"):
        if shutil.which(tool) is None:
            parser.error(f"expected the program {tool}, found none; install it, or use the set as it stands in demo/")
    try:
        with open(args.sources, newline="", encoding="utf-8") as f:
            tracks = list(csv.DictReader(f))
        with tempfile.TemporaryDirectory() as tmp:
            packages = args.packages or Path(tmp)
            packages.mkdir(parents=True, exist_ok=True)
            build(tracks, args.sources.parent, packages)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
