"""Reading what torch.save wrote, ours or a stranger's: every byte is verified, and nothing runs.

The plain way, model.py without this file: torch.load(weights_only=True), which verifies no byte,
and refuses the classes that the authors' checkpoints hold beside the weights.
"""
import pickle
import unicodedata
import zipfile
from pathlib import Path

import torch


def check_archive(path):
    """Every byte of a file by torch.save or torch.jit.save against the sums inside it (zip's CRC).

    Raises: ValueError, zipfile.BadZipFile."""
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise ValueError("it is no file of torch.save, or of a torch before 1.6")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if sum(entry.file_size for entry in entries) > 10 * path.stat().st_size:
            raise ValueError("it unpacks to more than ten times its size")
        if len({entry.filename for entry in entries}) < len(entries):
            raise ValueError("it holds two parts of one name")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"it is damaged at {damaged}")


KINDS = {"encoder": str, "sizes": dict, "sample_rate": int, "step": int, "method": str,
         "fingerprint": str, "task": str, "tags": list, "levels": bool,
         "head": list}


class _Inert(dict):
    """Stands in for any class that a file names: takes what it is given and does nothing."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    __setstate__ = append = extend = __init__


class _PlainPickle:
    """A pickle module for torch.load that makes tensors, numbers, strings, lists and dicts alone.

    Nothing it hands out is an object of torch or Python that a file could change: a class is made
    anew each time. Its memo is Python's, which a file cannot make fill the memory as C's."""

    class Unpickler(pickle._Unpickler):
        def find_class(self, module, name):
            if (module, name) == ("collections", "OrderedDict"):
                return type(name, (dict,), {"__setstate__": lambda self, state: None})
            if (module, name) == ("torch._utils", "_rebuild_parameter"):
                return lambda tensor, *rest: tensor
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda *parts: torch._utils._rebuild_tensor(*parts[:4])
            return type("Inert", (_Inert,), {})


def check_info(content: dict):
    """Are the entries beside the weights of the kind that programs count on?

    Raises: ValueError. Text that would move a terminal's cursor is refused."""
    for key, value in content.items():
        kind = KINDS.get(key)
        if kind and not isinstance(value, (kind, type(None))):
            raise ValueError(f"damaged, or made by hand: {key} is no {kind.__name__}")
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(text, str) and any(map(steers, text)) for text in texts):
            raise ValueError(f"damaged, or made by hand: {key} holds control characters")


def steers(letter: str) -> bool:
    """Would it move a terminal's cursor, or turn what stands around it? Other letters that cannot
    be seen are part of names: a no-break space, what joins emoji, bytes that are not UTF-8."""
    turning = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return (unicodedata.category(letter) in ("Cc", "Zl", "Zp")
            or unicodedata.bidirectional(letter) in turning)


def check_weights(state: dict, wanted: dict, what: str):
    """Are the weights of a file those of a network, whole, and numbers?

    Args: wanted: the network's state, for names, shapes and types alone (it may be on "meta").
    Raises: ValueError. A tensor that claims to be larger than what the file holds is refused."""
    missing = sorted(set(wanted) - set(state))
    unexpected = sorted(set(state) - set(wanted))
    if missing or unexpected:
        raise ValueError(f"does not fit {what}: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for key, value in wanted.items():
        found = state[key]
        if found.shape != value.shape or found.is_floating_point() != value.is_floating_point():
            raise ValueError(f"does not fit {what}: {key} is {tuple(found.shape)} of "
                             f"{found.dtype}, expected {tuple(value.shape)} of {value.dtype}")
        if found.untyped_storage().nbytes() < found.nbytes or not found.isfinite().all():
            raise ValueError(f"damaged: {key} is not all numbers")


def read(path):
    """What a file of torch.save holds: tensors, numbers, strings, lists and dicts, on the CPU.

    Raises: whatever a damaged or crafted file makes zipfile, pickle and torch raise."""
    check_archive(path)
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ValueError("it is TorchScript, a program")
    content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PlainPickle)
    if isinstance(content, dict):
        check_info(content)
    return content
