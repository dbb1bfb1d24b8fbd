"""A CUDA device that is not there: its tensors have shapes, dtypes and places, and no values, and every operation on
them is counted.

`FakeTensorMode` propagates shapes; what this module adds is the guard that torch wants of a device (`guard.cpp`, built
by the C++ compiler of this machine), fakes of pinned memory, events and streams, and `DeviceLog`, which sees each
operation and notes what a GPU would do: launch a kernel, copy, or make the host wait. Operations on the host's tensors
are computed. What comes back from the device is 0.

Blind to values, to the strides of real CUDA kernels and to which kernel a library chooses. Since the guard stays
registered, this is for a process of its own.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
_SOURCE = Path(__file__).parent / "fake_cuda" / "guard.cpp"

_MEMORY = 80 * 2**30

GEMMS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "_scaled_mm", "_grouped_mm"}
_NO_WORK = {
    *(
        "view",
        "_unsafe_view",
        "expand",
        "permute",
        "transpose",
        "t",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
    ),
    *("chunk", "unbind", "detach", "alias", "as_strided", "reshape", "narrow", "unfold", "unsafe_chunk", "lift_fresh"),
    *("split_with_sizes", "diagonal", "empty", "empty_strided", "new_empty", "empty_like", "is_pinned", "is_same_size"),
    *("device", "set_", "resize_", "_reshape_alias", "unsafe_split", "movedim"),
}
"""Operations that start nothing on a device."""
_WAITS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
_WAITS |= {"unique_consecutive", "bincount", "repeat_interleave"}
"""Operations whose result the host must know: a value, or a shape that follows from values."""


def build_guard(folder: Path) -> Path:
    """The shared library that registers the guard. Raises `FileNotFoundError` without a C++ compiler."""
    torch_folder, library = Path(torch.__file__).parent, folder / "guard.so"
    include, libraries = torch_folder / "include", torch_folder / "lib"
    arguments = ["-shared", "-fPIC", "-O1", "-std=c++20", f"-I{include}", str(_SOURCE), "-o", str(library)]
    done = subprocess.run(["g++", *arguments, f"-L{libraries}", "-lc10"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"g++ could not build {_SOURCE}:\n{done.stderr[-3000:]}")
    return library


class DeviceLog(TorchDispatchMode):
    """What the device was asked for while `is_on`, by operation; what made the host wait or copy, by place."""

    def __init__(self) -> None:
        super().__init__()
        self.is_on = False
        self.computes_on_host = True
        """Else tensors of the host have no values either: weights are drawn there."""
        self._clear()

    def begin(self) -> None:
        """From here on, from nothing."""
        self._clear()
        self.is_on = True

    def _clear(self) -> None:
        self.launches: collections.Counter[str] = collections.Counter()
        self.collectives: collections.Counter[str] = collections.Counter()
        self.copies_to_device: collections.Counter[str] = collections.Counter()
        self.copies_to_host: collections.Counter[str] = collections.Counter()
        self.blocking_copies: collections.Counter[str] = collections.Counter()
        self.waits: collections.Counter[str] = collections.Counter()
        self.mismatches: collections.Counter[str] = collections.Counter()
        self.kernels: list[tuple[Any, tuple[int, ...], Sequence[Any], dict[str, Any]]] = []
        """What `rayllm_kernels.launch` was given."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if name == "_pin_memory":
            return args[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if self._is_of_the_host(tensors, kwargs):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            return self._copy(func, name, args, kwargs)
        knows_size = kwargs.get("output_size") is not None  # of `repeat_interleave`
        if name in _WAITS and not knows_size and any(x.is_cuda for x in tensors):
            self._note(self.waits, name)
            return _answer(name, tensors)
        out = func(*args, **kwargs)
        if any(isinstance(leaf, Tensor) and leaf.is_cuda for leaf in tree_leaves((tensors, out))):
            self._see(namespace, name, args, tensors)
        return out

    def launched(self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]) -> None:
        """An observer of `rayllm_kernels.launch`."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if self.is_on:
            self.launches[f"triton {kernel.__name__}"] += 1
            self.kernels.append((kernel, grid, args, constants))
            if any(not x.is_cuda for x in tensors):
                self._note(self.mismatches, f"triton {kernel.__name__}")

    def waited(self, what: str) -> None:
        if self.is_on:
            self._note(self.waits, what)

    def _is_of_the_host(self, tensors: list[Tensor], kwargs: dict[str, Any]) -> bool:
        on_host = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        return self.computes_on_host and on_host and not any(isinstance(x, FakeTensor) for x in tensors)

    def _see(self, namespace: str, name: str, args: Any, tensors: list[Tensor]) -> None:
        if not self.is_on or name in _NO_WORK:
            return
        if namespace in ("c10d", "_c10d_functional"):
            self.collectives[name] += 1
            return
        self.launches[name] += 1
        if any(x.device.type == "cpu" and x.dim() for x in tensors):
            self._note(self.mismatches, name)
        if name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]
        ):
            self._note(self.waits, f"{name} by a mask")

    def _copy(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = args[1] if name == "copy_" else args[0]
        where = args[0].device if name == "copy_" else torch.device(kwargs.get("device") or source.device)
        asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if source.device.type == "cpu" and where.type == "cuda":
            self._note(self.copies_to_device, "")
            if source.dim() and not (asynchronous and _is_pinned(source)):
                self._note(self.blocking_copies, "of memory that is not pinned" if asynchronous else "")
        elif source.device.type == "cuda" and where.type == "cpu":
            self._note(self.copies_to_host, "")
            if not (asynchronous and name == "copy_"):
                self._note(self.waits, "copy to the host")
            if name == "copy_":
                return args[0]
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        elif self.is_on and where.type == "cuda":
            self.launches[name] += 1
        return func(*args, **kwargs)

    def _note(self, counter: collections.Counter[str], what: str) -> None:
        if self.is_on:
            frames = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
            place = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"
            counter[f"{place} {what}".strip()] += 1


def _is_ours(filename: str) -> bool:
    return filename.startswith((f"{ROOT}/rayllm/", f"{ROOT}/kernels/"))


def _answer(name: str, tensors: list[Tensor]) -> Any:
    x = tensors[0]
    if name in ("_local_scalar_dense", "item"):
        return True if x.dtype == torch.bool else 0.0 if x.dtype.is_floating_point else 0
    if name in ("is_nonzero", "equal"):
        return False
    if name == "nonzero":
        return torch.empty((0, x.dim()), dtype=torch.int64, device=x.device)
    raise NotImplementedError(f"{name}: its result's shape follows from values")


# ----------------------------------------------------------------------------------- pinned memory, events, streams

_pinned: list[Tensor] = []


def _is_pinned(x: Tensor) -> bool:
    if isinstance(x, FakeTensor):
        return False
    address = x.untyped_storage().data_ptr()
    return any(buffer.untyped_storage().data_ptr() == address for buffer in _pinned)


def _with_fake_pinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def factory(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        if not pin_memory:
            return make(*args, **kwargs)
        with unset_fake_temporarily(), torch._C._DisableTorchDispatch():
            buffer = make(*args, **kwargs).zero_()
        _pinned.append(buffer)
        return buffer

    return factory


def _fake_event(log: DeviceLog) -> type:
    class Event:
        def __init__(self, *args: Any, **kwargs: Any):
            pass

        def record(self, stream: Any = None) -> None:
            pass

        def wait(self, stream: Any = None) -> None:
            pass

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            log.waited("event")

    return Event


def _tolist_with(log: DeviceLog) -> Callable[[Tensor], Any]:
    def tolist(self: Tensor) -> Any:
        if self.is_cuda:
            log.waited("tolist")
        with unset_fake_temporarily(), torch._C._DisableTorchDispatch():
            return torch.zeros(self.shape, dtype=self.dtype).tolist()

    return tolist


def _patches(log: DeviceLog, arch: int) -> dict[str, Any]:
    """By the name in `torch`: what needs a driver, or does not go together with fake tensors."""
    event = _fake_event(log)
    stream = SimpleNamespace(
        synchronize=lambda: log.waited("stream"), wait_stream=lambda other: None, wait_event=lambda event: None
    )
    capability = divmod(arch, 10)
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], multi_processor_count=132, total_memory=_MEMORY, name="fake"
    )
    return {
        "inference_mode": lambda *args: torch.no_grad(),
        "empty": _with_fake_pinned(torch.empty),
        "zeros": _with_fake_pinned(torch.zeros),
        "cuda.Event": event,
        "cuda.is_available": lambda: True,
        "_subclasses.fake_tensor.init_gpu_context": lambda device: None,
        "cuda.current_stream": lambda device=None: stream,
        "cuda.synchronize": lambda device=None: log.waited("device"),
        "cuda.current_device": lambda: 0,
        "cuda.set_device": lambda device: None,
        "cuda.empty_cache": lambda: None,
        "cuda.mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "cuda.memory_allocated": lambda device=None: 0,
        "cuda.max_memory_allocated": lambda device=None: 0,
        "cuda.memory_reserved": lambda device=None: 0,
        "cuda.max_memory_reserved": lambda device=None: 0,
        "cuda.reset_peak_memory_stats": lambda device=None: None,
        "cuda.get_device_name": lambda device=None: "fake",
        "cuda.get_device_capability": lambda device=None: capability,
        "cuda.get_device_properties": lambda device=None: properties,
    }


@contextlib.contextmanager
def fake_cuda(guard: Path, arch: int = 90) -> Iterator[DeviceLog]:
    """While this lasts, tensors may be on `cuda:0`, a GPU of compute capability `arch`. `guard` is what `build_guard`
    made."""
    from rayllm_kernels.launch import observed

    ctypes.CDLL(str(guard))
    log = DeviceLog()
    with contextlib.ExitStack() as stack:
        for name, value in _patches(log, arch).items():
            stack.enter_context(mock.patch(f"torch.{name}", value))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", _tolist_with(log)))
        stack.enter_context(mock.patch.object(FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(observed(log.launched))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(log)
