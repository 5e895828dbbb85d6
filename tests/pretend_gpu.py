"""A pretend GPU, for machines that have none: what runs inside it computes on the CPU, but each
tensor has a place.

    with PretendGpu() as gpu:
        y = chain(x.to("cuda"), draws)      # y.device is cuda:0; x + y raises, as on a GPU
    gpu.waits                               # [("item", "augment.py", 123), ...]: where the host
    waited for the GPU

It finds operands on different devices, numpy of a GPU's tensor, and calls that make the host
wait. What it cannot see: the backward pass (the mode is off while `backward()`, a call like any
other, is being handled), numerics, memory, speed. Inside it `torch.cuda` is `Cuda`, threads that
start see the same tensors, and what needs a true GPU is absent: Triton, and CUDA graphs, in whose
place the step that would be captured is taken.
"""

import functools
import sys
import threading
import types
from contextlib import nullcontext
from pathlib import Path

import torch
from pytest import MonkeyPatch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WAITS = {
    "item",
    "tolist",
    "nonzero",
    "cpu",
    "unique",
    "masked_select",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
}
MAY_MIX = {
    "copy_",
    "__getitem__",
    "__setitem__",
    "set_",
    "__set__",
    "_has_compatible_shallow_copy_type",
}
PLAIN = {
    "__get__",
    "__len__",
    "size",
    "dim",
    "stride",
    "numel",
    "is_floating_point",
    "is_complex",
    "is_contiguous",
    "element_size",
}


def place_of(device):
    """What a `device` argument means here; None: not said."""
    return None if device is None else CUDA if torch.device(device).type == "cuda" else CPU


class Stream:
    def __init__(self, device=None, priority=0):
        pass

    def wait_stream(self, other):
        pass

    def record_event(self):
        pass

    def wait_event(self, event):
        pass


class Event:
    def __init__(self, enable_timing=False, blocking=False):
        self.timing = enable_timing
        self.recorded = False

    def record(self):
        self.recorded = True

    def synchronize(self):
        assert self.recorded

    def elapsed_time(self, other):
        assert self.timing and other.timing and self.recorded and other.recorded
        return 0.0


class Cuda(types.ModuleType):
    """In place of the module torch.cuda: one GPU, which is never behind. The rest is torch's
    own."""

    Stream = current_stream = Stream
    Event = Event

    def __init__(self):
        super().__init__("torch.cuda")

    def __getattr__(self, name):
        return getattr(sys.modules["torch.cuda"], name)

    is_available = staticmethod(lambda: True)
    get_rng_state = staticmethod(lambda device=None: torch.empty(0))
    set_rng_state = staticmethod(lambda state, device=None: None)
    is_current_stream_capturing = staticmethod(lambda: False)
    is_bf16_supported = staticmethod(lambda including_emulation=True: True)
    device_count = staticmethod(lambda: 1)
    get_device_name = staticmethod(lambda device=None: "a pretend GPU")
    mem_get_info = staticmethod(lambda device=None: (1 << 36, 1 << 36))
    max_memory_allocated = staticmethod(lambda device=None: 0)
    set_device = staticmethod(lambda device: None)
    device = staticmethod(lambda device: nullcontext())
    stream = staticmethod(lambda stream: nullcontext())


ABSENT = {
    "triton": None,
    "kernels.gpu": None,
    "kernels.splice_gpu": None,
    "kernels.graph": types.SimpleNamespace(captured_step=lambda step, *parts: step),
}
OURS = ("prepare", "augment", "model", "pretrain", "evaluate", "transfer", "kernels",
        "formats")


def forget():
    """Tables and choices that our modules keep for a device of this name: a real GPU's must not
    be met here, nor the other way round."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        for value in list(vars(sys.modules[name] or types).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


class PretendGpu(TorchFunctionMode):
    storages = {}  # on the GPU; of the class, since tables that the code keeps outlive one use

    def __init__(self):
        super().__init__()
        self.waits = []

    def __enter__(self):
        forget()
        self.patches = MonkeyPatch()
        for name, module in ABSENT.items():
            self.patches.setitem(sys.modules, name, module)
        run = functools.partialmethod(PretendGpu.run_thread, self, threading.Thread.run)
        self.patches.setattr(threading.Thread, "run", run)
        self.patches.setattr(torch, "cuda", Cuda())
        self.patches.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
        self.patches.setattr(
            torch.backends.cudnn, "enabled", False
        )  # which lays out a GRU's weights anew
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        forget()
        return super().__exit__(*error)

    def run_thread(thread, gpu, run):
        """The mode is a thread's own."""
        with InThread(gpu):
            run(thread)

    def place(self, tensor):
        return CUDA if tensor.untyped_storage()._cdata in self.storages else CPU

    def put(self, tensor, device):
        storage = tensor.untyped_storage()
        if device == CUDA:
            self.storages[storage._cdata] = StorageWeakRef(
                storage
            )  # while that is held, no other gets the address
        else:
            self.storages.pop(storage._cdata, None)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
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
        return self.compute(function, name, args, kwargs)

    def compute(self, function, name, args, kwargs):
        device = place_of(kwargs.pop("device", None))
        sent = kwargs.get("non_blocking", False)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = {t.untyped_storage()._cdata for t in tensors}
        places = {self.place(t) for t in tensors}
        apart = len({self.place(t) for t in tensors if t.dim() and t.numel()}) > 1
        if apart and name not in MAY_MIX | {"to"}:
            operands = [(tuple(t.shape), self.place(t).type) for t in tensors]
            raise RuntimeError(f"{name}: operands on different devices: {operands}")
        if name in ("numpy", "__array__") and CUDA in places:
            raise TypeError(f"{name} of a tensor on the GPU")
        if name == "to":
            device, args, kwargs = self.read_to(device, args, kwargs)
        self.note_wait(name, args, device, places, sent)
        if name == "cpu":
            function = torch.clone if CUDA in places else lambda x: x
            device = CPU
        result = function(*args, **kwargs)
        if device is None:  # where the operands are; of an index, the indexed
            deciding = {self.place(t) for t in tensors[:1]} if name in MAY_MIX else places
            device = CUDA if CUDA in deciding else CPU
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.put(tensor, device)
        return result

    def read_to(self, device, args, kwargs):
        """.to(device), .to(dtype), .to(tensor), .to(device, dtype, non_blocking) ...: all as a
        dtype and a place."""
        tensor, *others = args
        others += kwargs.values()
        dtype = tensor.dtype
        layout = torch.preserve_format
        for other in others:
            if isinstance(other, torch.Tensor):
                dtype = other.dtype
                device = self.place(other)
            elif isinstance(other, torch.dtype):
                dtype = other
            elif isinstance(other, torch.memory_format):
                layout = other
            elif isinstance(other, (str, torch.device)):
                device = place_of(other)
        copy = device not in (None, self.place(tensor))
        return device, (tensor, dtype), {"copy": copy, "memory_format": layout}

    def note_wait(self, name, args, device, places, sent):
        index = tree_leaves(args[1]) if name in ("__getitem__", "__setitem__") else []
        masked = any(getattr(i, "dtype", None) == torch.bool for i in index)
        # a copy from pageable memory
        pageable = name in ("tensor", "new_tensor") and CUDA in ({device} if device else places)
        pageable |= name == "to" and device == CUDA and self.place(args[0]) == CPU and not sent
        back = name in WAITS or masked or (name == "to" and device == CPU)
        if pageable or (CUDA in places and back):
            frame = sys._getframe(1)
            while frame.f_code.co_filename == __file__:
                frame = frame.f_back
            self.waits.append((name, Path(frame.f_code.co_filename).name, frame.f_lineno))


class InThread(TorchFunctionMode):
    """The mode of a PretendGpu in another thread."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return self.gpu.__torch_function__(function, types, args, kwargs)
