"""A pretend GPU, for machines that have none: what runs inside it computes on the CPU, but each tensor has a place.

    with PretendGpu() as gpu:
        y = chain(x.to("cuda"), draws)      # y.device is cuda:0; x + y raises, as on a GPU
    gpu.waits                               # [("item", "augment.py", 123), ...]: where the host waited for the GPU

It finds operands on different devices, numpy of a GPU's tensor, and calls that make the host wait. What it cannot see: the
backward pass (the mode is off while `backward()`, a call like any other, is being handled), numerics, memory, speed.
"""
import sys
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import augment

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WAITS = {"item", "tolist", "nonzero", "cpu", "unique", "masked_select", "__bool__", "__float__", "__int__", "__index__"}
MAY_MIX = {"copy_", "__getitem__", "__setitem__", "set_", "__set__", "_has_compatible_shallow_copy_type"}
PLAIN = {"__get__", "__len__", "size", "dim", "stride", "numel", "is_floating_point", "is_complex", "is_contiguous", "element_size"}


def place_of(device):
    """What a `device` argument means here; None: not said."""
    return None if device is None else CUDA if torch.device(device).type == "cuda" else CPU


class PretendGpu(TorchFunctionMode):
    storages = {}  # on the GPU; of the class, since tables that the code keeps outlive one use

    def __init__(self):
        super().__init__()
        self.waits = []

    def __enter__(self):
        self.forget()
        return super().__enter__()

    def __exit__(self, *error):
        self.forget()
        return super().__exit__(*error)

    @staticmethod
    def forget():
        """Tables that augment.py keeps for a device of this name: a real GPU's must not be met here, nor the other way round."""
        augment._circle.cache_clear()
        augment._kernel_table.cache_clear()

    def place(self, tensor):
        return CUDA if tensor.untyped_storage()._cdata in self.storages else CPU

    def put(self, tensor, device):
        storage = tensor.untyped_storage()
        if device == CUDA:
            self.storages[storage._cdata] = StorageWeakRef(storage)  # while that is held, no other gets the address
        else:
            self.storages.pop(storage._cdata, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if function == torch.Tensor.device.__get__:
            return self.place(args[0])
        if function == torch.Tensor.is_cuda.__get__:
            return self.place(args[0]) == CUDA
        if function == torch.Tensor.grad.__get__ and (grad := function(*args)) is not None:
            self.put(grad, self.place(args[0]))  # made by the backward pass, which is not seen
        if name in PLAIN:
            return function(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        device, sent = place_of(kwargs.pop("device", None)), kwargs.get("non_blocking", False)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there, places = {t.untyped_storage()._cdata for t in tensors}, {self.place(t) for t in tensors}
        if len({self.place(t) for t in tensors if t.dim() and t.numel()}) > 1 and name not in MAY_MIX | {"to"}:
            raise RuntimeError(f"{name}: operands on different devices: {[(tuple(t.shape), self.place(t).type) for t in tensors]}")
        if name in ("numpy", "__array__") and CUDA in places:
            raise TypeError(f"{name} of a tensor on the GPU")
        if name == "to":  # .to(device), .to(dtype), .to(tensor), .to(device, dtype, non_blocking) ...: all as a dtype and a place
            others, dtype = [*args[1:], *kwargs.values()], args[0].dtype
            for other in others:
                dtype = getattr(other, "dtype", other if isinstance(other, torch.dtype) else dtype)
                device = self.place(other) if isinstance(other, torch.Tensor) else place_of(other) if isinstance(other, (str, torch.device)) else device
            layout = [other for other in others if isinstance(other, torch.memory_format)] or [torch.preserve_format]
            args, kwargs = (args[0], dtype), {"copy": device not in (None, self.place(args[0])), "memory_format": layout[0]}
        self.note_wait(name, args, device, places, sent)
        if name == "cpu":
            function, device = torch.clone if CUDA in places else lambda x: x, CPU
        result = function(*args, **kwargs)
        if device is None:  # where the operands are; of an index, the indexed
            device = CUDA if CUDA in ({self.place(t) for t in tensors[:1]} if name in MAY_MIX else places) else CPU
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in there:
                self.put(tensor, device)
        return result

    def note_wait(self, name, args, device, places, sent):
        masked = name in ("__getitem__", "__setitem__") and any(getattr(i, "dtype", None) == torch.bool for i in tree_leaves(args[1]))
        here = name in ("tensor", "new_tensor") and CUDA in ({device} if device else places)  # a copy from pageable memory
        here |= name == "to" and device == CUDA and self.place(args[0]) == CPU and not sent
        if here or CUDA in places and (name in WAITS or masked or (name == "to" and device == CPU)):
            frame = sys._getframe(2)
            self.waits.append((name, Path(frame.f_code.co_filename).name, frame.f_lineno))
