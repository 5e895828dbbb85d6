#!/usr/bin/env python3
"""Cut the demo set out of Debian packages of free game music: excerpts, labels and attribution.

    python demo/build.py demo/sources.csv                      # downloads 1.5 GB, some minutes
    python demo/build.py demo/sources.csv --packages folder/   # keeps the .deb files, and uses them

sources.csv holds one row per track: who wrote it, under which licence, where it lies in which
package and version, its split, and at which seconds excerpts start. Needs apt-get (after `apt-get
update`), dpkg-deb, tar, ffmpeg with libvorbis, numpy and soundfile; nothing is installed. The same
encoder gives the same bytes.

Leaves in the folder of sources.csv: audio/*.ogg (mono Ogg Vorbis), labels.csv (for `prepare.py
--data demo`) and the table of ATTRIBUTION.md, below its marker. Every excerpt is decoded again and
refused if it is clipped, silent in part or of the wrong length.
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
# Hz; the rate of the paper, so that preparing the set resamples nothing.
RATE = 22050
# Vorbis quality of the mono excerpt: about 32 kbit/s.
QUALITY = 0.5
# Excerpts with a higher peak, before or after coding, are scaled down to it.
CEILING = 0.95
# dBFS; every half second of an excerpt lies above it.
SILENCE = -50.0
LICENCES = {
    "CC-BY-3.0": ("CC BY 3.0", "https://creativecommons.org/licenses/by/3.0/"),
    "CC-BY-SA-3.0": ("CC BY-SA 3.0", "https://creativecommons.org/licenses/by-sa/3.0/"),
}

# Of sources.csv, in the order of labels.csv, where a track is a group.
COLUMNS = ("title", "author", "split", "name", "label")
LABELS_HEAD = ["file", "title", "artist", "split", "group", "label"]
MARKER = "<!-- the table below is written by build.py -->"


def fetch(package: str, version: str, folder: Path) -> Path:
    """Download a Debian package of one version into a folder, unless it is there -> the .deb."""
    name = f"{package}_{version}_*.deb"
    found = sorted(folder.glob(name))
    if found:
        return found[0]
    command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", f"{package}={version}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    found = sorted(folder.glob(name))
    if not found:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(
            f"expected the package {package} {version}, apt-get said: {reason}; type: "
            "apt-get update"
        )
    return found[0]


def unpack(deb: Path, files: set[str], folder: Path) -> None:
    """Unpack the named files (paths in the package, without a leading slash) of a .deb."""
    archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE)
    names = [f"./{name}" for name in sorted(files)]
    subprocess.run(["tar", "-x", "-C", str(folder), *names], stdin=archive.stdout, check=True)
    archive.wait()


def decode(track: Path, start: float) -> np.ndarray:
    """SECONDS of a track from second `start` on, mono at RATE: (T,) float32."""
    # Counted in samples: time stamps of some files have gaps.
    first = round(start * RATE)
    end = first + round(SECONDS * RATE)
    cut = f"atrim=start_sample={first}:end_sample={end}"
    filters = f"aformat=channel_layouts=mono,aresample={RATE},{cut}"
    command = ["ffmpeg", "-v", "error", "-i", str(track), "-af", filters, "-f", "f32le", "-"]
    return np.frombuffer(
        subprocess.run(command, capture_output=True, check=True).stdout, np.float32
    )


def encode(wave: np.ndarray, out: Path, tags: dict[str, str]) -> None:
    """Write (T,) float32 as tagged mono Ogg Vorbis, its decoded peak at most CEILING."""
    command = [
        "ffmpeg",
        "-v",
        "error",
        "-y",
        "-f",
        "f32le",
        "-ar",
        str(RATE),
        "-ac",
        "1",
        "-i",
        "-",
    ]
    command += ["-c:a", "libvorbis", "-q:a", str(QUALITY)]
    command += ["-fflags", "+bitexact", "-flags:a", "+bitexact"]
    for key, value in tags.items():
        command += ["-metadata", f"{key}={value}"]
    peak = np.abs(wave).max()
    while True:
        wave = wave * np.float32(min(1.0, 0.99 * CEILING / peak))
        subprocess.run([*command, str(out)], input=wave.tobytes(), check=True)
        # Lossy coding overshoots, so the peak that counts is the decoded one.
        peak = np.abs(soundfile.read(out, dtype="float32")[0]).max()
        if peak <= CEILING:
            return


def check(file: Path) -> None:
    """ValueError unless an excerpt decodes with the rate, length, peak and level promised."""
    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    if rate != RATE or wave.shape[1] != 1:
        came = f"{wave.shape[1]} channels at {rate} Hz"
        raise ValueError(f"{file}: expected mono at {RATE} Hz, came {came}")
    if abs(len(wave) - SECONDS * RATE) > 64:
        came = f"{len(wave) / rate:.3f} s"
        raise ValueError(f"{file}: expected {SECONDS:g} s, came {came}: choose an earlier start")
    peak = np.abs(wave).max()
    if not peak < 1.0:
        raise ValueError(f"{file}: expected a peak below 1, came {peak:.3f}: lower CEILING")
    half = RATE // 2
    halves = wave[: len(wave) // half * half].reshape(-1, half)
    # dBFS of each half second.
    level = 10 * np.log10((halves.astype(np.float64) ** 2).mean(1) + 1e-12)
    if level.min() < SILENCE:
        came = f"{level.min():.0f}"
        raise ValueError(f"{file}: expected {SILENCE:g} dBFS or more, came {came}: move its start")


def attribution(tracks: list[dict[str, str]]) -> str:
    """The table of ATTRIBUTION.md: one row per track."""
    lines = [
        "| excerpts | title | author | licence | package, version | file in the package |\n",
        "|---|---|---|---|---|---|\n",
    ]
    for track in tracks:
        n = len(track["starts"].split())
        names = f"`{track['name']}-1.ogg`"
        if n > 1:
            names += f" to `-{n}.ogg`"
        licence, url = LICENCES[track["licence"]]
        where = track["path"]
        if track["archive"]:
            where = f"{Path(track['archive']).name}: {where}"
        lines.append(
            f"| {names} | {track['title']} | {track['author']} | [{licence}]({url}) "
            f"| {track['package']} {track['version']} | `{where}` |\n"
        )
    return "".join(lines)


def excerpts(track: dict[str, str], source: Path, audio: Path) -> list[list[str]]:
    """Cut and check the excerpts of one track into `audio`; their rows of labels.csv."""
    rows = []
    for i, start in enumerate(track["starts"].split(), 1):
        file = audio / f"{track['name']}-{i}.ogg"
        package = f"{track['package']} {track['version']}"
        tags = {
            "title": track["title"],
            "artist": track["author"],
            "license": LICENCES[track["licence"]][1],
            "description": f"{SECONDS:g} s from second {start} of {source.name}, {package}",
        }
        encode(decode(source, float(start)), file, tags)
        check(file)
        rows.append([f"audio/{file.name}", *(track[column] for column in COLUMNS)])
    return rows


def from_package(tracks: list[dict[str, str]], packages: Path, audio: Path) -> list[list[str]]:
    """All excerpts of the tracks of one package; their rows of labels.csv."""
    deb = fetch(tracks[0]["package"], tracks[0]["version"], packages)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        unpack(deb, {track["archive"] or track["path"] for track in tracks}, root)
        for track in tracks:
            source = root / track["path"]
            if track["archive"]:
                with zipfile.ZipFile(root / track["archive"]) as archive:
                    source = Path(archive.extract(track["path"], root))
            rows += excerpts(track, source, audio)
    return rows


def build(tracks: list[dict[str, str]], out: Path, packages: Path) -> None:
    """Fetch, cut, check and describe all tracks into `out`."""
    unknown = sorted({track["licence"] for track in tracks} - set(LICENCES))
    if unknown:
        known = ", ".join(LICENCES)
        raise ValueError(f"expected a licence of {known}, came {', '.join(unknown)}")
    audio = out / "audio"
    audio.mkdir(parents=True, exist_ok=True)
    rows = []
    for package in dict.fromkeys(track["package"] for track in tracks):
        of_package = [track for track in tracks if track["package"] == package]
        rows += from_package(of_package, packages, audio)
        print(f"{package}: {len(of_package)} tracks", flush=True)
    with open(out / "labels.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([LABELS_HEAD, *rows])
    page = out / "ATTRIBUTION.md"
    text = page.read_text(encoding="utf-8").split(MARKER)[0]
    page.write_text(f"{text}{MARKER}\n\n{attribution(tracks)}", encoding="utf-8")
    size = sum(file.stat().st_size for file in audio.glob("*.ogg"))
    hours = len(rows) * SECONDS / 3600
    print(f"{len(rows)} excerpts, {hours:.2f} h, {size / 1e6:.1f} MB in {audio}")
    print("next: python prepare.py --data demo")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo/build.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("sources", type=Path, help="table of the tracks; the set is written beside it")
    add("--packages", type=Path, help="folder to keep the .deb files in (default: a temporary one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.sources.is_file():
        parser.error(f"{args.sources}: no such table of tracks; type: build.py demo/sources.csv")
    for tool in ("apt-get", "dpkg-deb", "tar", "ffmpeg"):
        if shutil.which(tool) is None:
            parser.error(f"expected the program {tool}; install it, or use demo/ as it stands")
    try:
        with open(args.sources, newline="", encoding="utf-8") as file:
            tracks = list(csv.DictReader(file))
        with tempfile.TemporaryDirectory() as scratch:
            packages = args.packages or Path(scratch)
            packages.mkdir(parents=True, exist_ok=True)
            build(tracks, args.sources.parent, packages)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"build.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
