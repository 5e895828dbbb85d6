"""Features on the disk: what was computed once is read, in place of computed again.

The plain way, evaluate.py without this file: every window goes through the encoder each time, which
takes an hour for MagnaTagATune on two cores, and reading takes seconds. The numbers are the same.

Features are kept in a file in the folder of their data, named after all that they depend on. It is
a zip file, with a checksum of each array, which is verified when it is read: one flipped bit is
noticed, and said, and the features are computed again.
"""
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch


class Kept:
    """Arrays in one file of a folder.

    Args: key: all that they depend on, as JSON can hold it.
    """

    def __init__(self, folder, key):
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
        self.path = Path(folder) / f"{name}.npz"

    def read(self) -> dict[str, torch.Tensor] | None:
        """{name: tensor}; None where there are none, or where they are damaged, which is said."""
        try:
            with np.load(self.path) as file:
                return {name: torch.from_numpy(file[name]) for name in file}
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged zip file has many ways to say so
            print(f"{self.path} is damaged ({error}): computed again", file=sys.stderr)
            return None

    def write(self, arrays: dict[str, torch.Tensor]):
        """Keep them, unless the folder is read-only or the disk full: then they are computed again
        the next time."""
        partial = self.path.with_suffix(f".{os.getpid()}.partial.npz")
        try:
            self.path.parent.mkdir(exist_ok=True)
            np.savez(partial, **arrays)
            partial.replace(self.path)
        except OSError:
            partial.unlink(missing_ok=True)
