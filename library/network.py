"""Audio to features or tags: one network behind one small face, whatever file it came from."""

import hashlib
import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import model
import numpy as np
import prepare
import torch
from torch.nn import functional as F

from library import listen
from library.terminal import Stop

SHIPPED = Path(__file__).resolve().parent.parent / "demo"
MOST = 2048  # numbers of levels that a store takes: it sums their products, MOST^2


@dataclass
class Network:
    """A network in eval mode: `network(windows (n, size)) -> (n, D)` features, or (n, K)
    probabilities of `tags`.

    identity: what its numbers depend on, a hash. kind: levels (every block's mean and maximum over
    time), output, tags."""

    module: torch.nn.Module
    kind: str
    identity: str
    sample_rate: int
    size: int
    tags: list[str]
    name: str
    dimensions: int
    batch: int = 16
    amp: str = "off"

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> np.ndarray:
        device = next(self.module.parameters()).device
        with model.autocast(device, self.amp):
            rows = [
                self.module(part[:, None].to(device)).float().cpu()
                for part in torch.as_tensor(windows).split(self.batch)
            ]
        return torch.cat(rows).numpy()


def load_network(
    path=None, kind: str = "levels", device: str = "auto", amp: str = "off", most: int | None = MOST
) -> Network:
    """An encoder's or tagger's file as a Network.

    Args:
        path: encoder.pt, tagger.pt, or their TorchScript (a program: load only your own); by
        default what ships.
        kind: levels, output (of encoder.pt), or tags (of a tagger). device, amp: as everywhere.
        most: of an encoder that has no levels, or more numbers in them than a store can count the
        covariance of, output is taken in their place; None: levels, or Stop.

    Raises Stop where the file is of the other sort, and what model.py raises where it cannot be
    read."""
    path = Path(path or default(kind))
    where = model.choose_device(device)
    dimensions = 0
    if path.suffix == ".ts":
        module = load_program(path, where)
        told = "tags" if module.tags else "output"
        sample_rate = module.sample_rate
    elif kind == "tags":
        module = model.load_tagger(path)[0]
        told = "tags"
        sample_rate = module.sample_rate
    else:
        module, info = model.load_encoder(path)
        told = kind
        # Checkpoints of the authors do not state it.
        sample_rate = info["sample_rate"] or prepare.SAMPLE_RATE
    if (told == "tags") != (kind == "tags"):
        wanted = "tagger.pt" if kind == "tags" else "encoder.pt"
        raise Stop(f"{path} gives {told}: expected {wanted}; type --ckpt {wanted}")
    if kind == "levels" and most is None:
        check_levels(path, module)
    sha256 = model.weights_sha256(module)
    if path.suffix != ".ts":
        module, told, dimensions = for_inference(module, told, most)
        module.to(where)
    identity = hashlib.sha256(f"{sha256} {told}".encode()).hexdigest()
    tags = list(getattr(module, "tags", ()))
    return Network(
        module.eval(),
        told,
        identity,
        sample_rate,
        module.input_samples,
        tags,
        str(path.resolve()),
        dimensions or len(tags),
        16 if where.type == "cpu" else 512,
        "off" if path.suffix == ".ts" else model.choose_amp(where, amp),
    )


def check_levels(path: Path, module: torch.nn.Module):
    """Stop where a network's levels are asked for that has none."""
    if path.suffix == ".ts" or not hasattr(module, "blocks"):
        raise Stop(
            f"{path}: expected an encoder.pt that has blocks, whose levels could be taken; type "
            "--features output, or another --ckpt"
        )


def load_program(path: Path, device) -> torch.jit.ScriptModule:
    """A TorchScript file, every byte of it verified; Stop where it is not whole."""
    try:
        if files := model.load_beside("formats.files"):
            files.check_archive(path)
        return torch.jit.load(path, map_location=device)
    except (ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise Stop(
            f"{path} cannot be read: {model.first_line(error)[:150]}; expected an encoder.ts or "
            "tagger.ts: export it again by evaluate.py or model.py --out"
        ) from None


def for_inference(
    module: torch.nn.Module, kind: str, most: int | None
) -> tuple[torch.nn.Module, str, int]:
    """The module with its batch norms folded, what it gives, and how many numbers that is: levels
    only where they are at most so many."""
    folded = model.fold_batch_norm(module)
    if kind == "levels" and hasattr(module, "blocks"):
        levels = model.Levels(folded)
        if most is None or levels.out_dim <= most:
            return levels, kind, levels.out_dim
    return folded, "output" if kind == "levels" else kind, getattr(module, "out_dim", 0)


def default(kind: str) -> Path:
    """What ships for this kind of network."""
    return SHIPPED / ("tagger.pt" if kind == "tags" else "encoder.pt")


class Frames:
    """A recording through the network, one window every `hop` seconds (by default a window), in the
    memory of a piece.

    `push` its audio piece by piece, then take the `rows`.
    """

    def __init__(self, network: Network, hop: float | None = None):
        self.network = network
        self.step = network.size if hop is None else max(1, round(hop * network.sample_rate))
        self.audio = torch.zeros(0)
        self.ahead = 0  # samples to pass over before the next window begins
        self.parts: list[np.ndarray] = []

    def push(self, piece: np.ndarray):
        """The next samples (n,)."""
        self.audio = torch.cat([self.audio, torch.as_tensor(piece)[self.ahead :]])
        self.ahead = max(0, self.ahead - len(piece))
        if len(self.audio) < self.network.size:
            return
        windows = self.audio.unfold(0, self.network.size, self.step)
        self.parts += [self.network(part) for part in windows.split(self.network.batch)]
        done = len(windows) * self.step
        self.ahead = max(0, done - len(self.audio))
        self.audio = self.audio[done:]

    def rows(self) -> tuple[np.ndarray, np.ndarray, bool]:
        """Rows (n, D or K); the windows' starts (n,) in seconds; was it shorter than a window, and
        padded with silence?"""
        short = not self.parts
        if short:
            self.parts.append(
                self.network(F.pad(self.audio, (0, self.network.size - len(self.audio)))[None])
            )
        rows = np.concatenate(self.parts)
        return rows, np.arange(len(rows)) * self.step / self.network.sample_rate, short


def source_of(network: Network, hop: float | None, file: Path) -> str:
    """What the rows of a file depend on, as text."""
    state = file.stat()
    return json.dumps(
        [network.identity, hop, str(file.resolve()), state.st_size, state.st_mtime_ns]
    )


def hear_whole(
    files: Iterable[Path], network: Network, hop: float | None, workers: int, timeout: float
) -> Iterator[tuple[Path, tuple | str]]:
    """Files through the network, decoded in processes: yields (file, what `Frames.rows` gives, or
    the reason why not)."""
    open_files: dict[Path, Frames] = {}
    for path, kind, content in listen.hear_all(
        files, listen.Whole(network.sample_rate), workers, timeout
    ):
        if kind == listen.PIECE:
            open_files.setdefault(path, Frames(network, hop)).push(content)
        elif kind == listen.END:
            yield path, open_files.pop(path, Frames(network, hop)).rows()
        else:
            open_files.pop(path, None)
            if kind == listen.FAILED:
                yield path, content
