"""The tables of a prepared folder: sealed with checksums, verified when they are read, joined.

    clips.npz   start, length (int64, samples), split (uint8: 0 train, 1 valid, 2 test), group
                (int64: the song), labels (uint8, N x K), id and artist (UTF-8, parted by zero
                bytes), sha256 (uint8, N x 32: of the samples), and of the file rate, peak, clipped
    meta.json   format, name, sample_rate, task, tags, counts, skipped, report, fingerprint,
                checksum

The fingerprint covers what training and evaluation can see; the checksum the rest of meta.json; the
zip each of its columns. Imports nothing of ours.
"""

import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np

FORMAT = "clmr-data-1"
SPLITS = ("train", "valid", "test")
COLUMNS = {"start": "i", "length": "i", "split": "u", "group": "i", "labels": "u", "sha256": "u",
           "rate": "i", "peak": "f", "clipped": "f"}  # with their kinds; and id, artist


def read(folder: Path) -> tuple[dict[str, np.ndarray], dict]:
    """(tables {column: array}, meta) of one prepared folder, which must be as they were written."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        tables = _unpack((folder / "clips.npz").read_bytes())
        known = fingerprint(tables, meta["sample_rate"], meta["tags"]) == meta["fingerprint"]
        if not known or meta.get("checksum", _checksum(meta)) != _checksum(meta):
            raise ValueError("clips.npz or meta.json have changed: the fingerprint does not fit")
        if meta["name"] in (".", "..") or not re.fullmatch(r"[^/\\\x00-\x1f]+", meta["name"]):
            raise ValueError(f"{meta['name']!r} is no name")
        return tables, meta
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: expected a folder made by prepare.py; "
                                f"{Path(error.filename).name} is missing") from None
    except Exception as error:  # a damaged zip or JSON file has many ways to say so
        raise ValueError(f"{folder}: expected a folder made by prepare.py; it cannot be read "
                         f"({error}), prepare it again") from None


def _unpack(data):
    """{column: array} out of the bytes of clips.npz; its zip has a checksum of each column."""
    with zipfile.ZipFile(io.BytesIO(data)) as box:
        if any(member.compress_type or member.file_size > len(data) for member in box.infolist()):
            raise ValueError("expected columns that are not compressed")
    with np.load(io.BytesIO(data)) as file:
        tables = {key: file[key] for key in COLUMNS}
        texts = {key: file[key] if key in file else np.zeros(len(tables["length"]), "U1")
                 for key in ("id", "artist")}
    for key, column in texts.items():
        tables[key] = column if column.dtype.kind == "U" else _unpack_text(column)
    same = {len(column) for column in tables.values()} == {len(tables["length"])}
    kinds = all(tables[key].dtype.kind == kind for key, kind in COLUMNS.items())
    ends = tables["start"] + tables["length"]
    inside = (tables["start"] >= 0) & (ends <= tables["length"].sum())
    if not (same and kinds and inside.all()):
        raise ValueError("its columns do not fit each other")
    return tables


def _pack_text(texts):
    """Texts as one array of bytes: numpy would give each the width of the longest."""
    return np.frombuffer("\0".join(texts).encode("utf-8", "surrogateescape"), np.uint8)


def _unpack_text(column):
    """The reverse of `_pack_text` -> (N,) str objects."""
    return np.array(column.tobytes().decode("utf-8", "surrogateescape").split("\0"), object)


def fingerprint(tables: dict[str, np.ndarray], sample_rate: int, tags: list[str]) -> str:
    """sha256 over all that training and evaluation can see: samples, splits, songs, labels, rate,
    tags."""
    digest = hashlib.sha256(json.dumps([sample_rate, list(tags), tables["id"].tolist()]).encode())
    for key in ("length", "split", "group", "labels", "sha256"):
        digest.update(np.ascontiguousarray(tables[key]).tobytes())
    return digest.hexdigest()


def _checksum(meta):
    """sha256 of a meta, but for its checksum."""
    rest = {key: value for key, value in meta.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def join(folders: list[Path], metas: list[dict]) -> dict:
    """One meta for several folders that count as one set; ValueError for one that comes twice, for
    each of its songs would be another song than itself."""
    prints = [meta["fingerprint"] for meta in metas]
    if twice := [str(f) for f, one in zip(folders, prints) if prints.count(one) > 1]:
        raise ValueError(f"expected different music in each folder, got the same in "
                         f"{' and '.join(twice)}; leave all but one out")
    rates = {meta["sample_rate"] for meta in metas}
    if len(rates) > 1:
        found = [f"{folder}: {meta['sample_rate']} Hz" for folder, meta in zip(folders, metas)]
        raise ValueError(f"expected folders of one sample rate, found {', '.join(found)}; prepare "
                         "them again with one --sample-rate")
    labels = (metas[0]["task"], metas[0]["tags"])
    labelled = all((meta["task"], meta["tags"]) == labels for meta in metas)
    digest = hashlib.sha256(json.dumps(prints).encode())
    joined = {"name": "+".join(meta["name"] for meta in metas), "sample_rate": rates.pop(),
              "task": metas[0]["task"] if labelled else "none",
              "tags": metas[0]["tags"] if labelled else [], "fingerprint": digest.hexdigest(),
              "split_name": " + ".join(dict.fromkeys(meta["split_name"] for meta in metas))}
    for key in ("clips", "songs", "hours"):
        joined[key] = {split: sum(meta[key][split] for meta in metas) for split in SPLITS}
    return joined


def seal(folder: Path, tables: dict[str, np.ndarray], meta: dict) -> dict:
    """Write header of audio.npy, clips.npz and meta.json, each sure to be on the disk; the meta."""
    shape = (int(tables["length"].sum()),)
    with open(folder / "audio.npy", "r+b") as file:
        header = {"descr": "<i2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        os.fsync(file.fileno())
    known = fingerprint(tables, meta["sample_rate"], meta["tags"])
    meta = {"format": FORMAT, **meta, "fingerprint": known}
    meta["checksum"] = _checksum(meta)
    packed = {**tables, "id": _pack_text(tables["id"]), "artist": _pack_text(tables["artist"])}
    with open(folder / "clips.npz", "wb") as file:
        np.savez(file, **packed)
        os.fsync(file.fileno())
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        file.write(json.dumps(meta, indent=1) + "\n")
        os.fsync(file.fileno())
    return meta
