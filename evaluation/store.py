"""Features on the disk: those kept for the next time, and those that others made."""
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class Kept:
    """Tensors in one file of a folder, which is named after all that they depend on: what was
    computed once is read the next time. Embedding MagnaTagATune takes two cores an hour.

    The file is a zip file, with a checksum of each array, which is verified when it is read: one
    flipped bit is noticed, and said, and the features are computed again.

    Args: key: all that they depend on, as JSON can hold it.
    """

    def __init__(self, folder, key):
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        self.path = Path(folder) / f"{name}.npz"

    def read(self) -> dict[str, Tensor] | None:
        """{name: tensor}; None where there are none, or where they are damaged, which is said."""
        try:
            with np.load(self.path) as file:
                return {name: torch.from_numpy(file[name]) for name in file}
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged zip file has many ways to say so
            print(f"{self.path} is damaged ({error}): computed again", file=sys.stderr)
            return None

    def write(self, tensors: dict[str, Tensor]):
        """Keep them, unless the folder is read-only or the disk full: then they are computed again
        the next time."""
        partial = self.path.with_suffix(f".{os.getpid()}.partial.npz")
        try:
            self.path.parent.mkdir(exist_ok=True)
            np.savez(partial, **tensors)
            partial.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):  # on a read-only disk not even that
                partial.unlink()

def read_features(path, clips) -> tuple[Tensor, np.ndarray]:
    """Features that others made of a prepared data set: a npz file with `features` (n, D) and `id`
    (n,), of each row the id of its clip, which may have several rows (its windows).

    Returns: features (n, D) float32; the number (n,) of the clip each is of. Raises: ValueError
    where the file is another one, or where a clip has no row."""
    try:
        with np.load(path) as file:
            x = torch.from_numpy(file["features"].astype(np.float32))
            ids = file["id"].astype(str).tolist()
    except Exception as error:  # a damaged zip file, or another file, has many ways to say so
        raise ValueError(f"{path}: expected a npz file with `id` (n,), clips.id.astype(str), and "
                         f"`features` (n, D); {str(error).splitlines()[0]}") from None
    number = {name: i for i, name in enumerate(clips.id.tolist())}
    clip = np.array([number.get(name, -1) for name in ids])
    missing = len(clips) - len(np.unique(clip[clip >= 0]))
    if missing or len(ids) != len(x) or x.dim() != 2 or not x.isfinite().all():
        raise ValueError(
            f"{path}: {missing} of {len(clips)} clips of {clips.name} have no row; expected finite "
            f"features (n, D) and n ids, got {tuple(x.shape)} and {len(ids)}")
    return x[clip >= 0], clip[clip >= 0]
