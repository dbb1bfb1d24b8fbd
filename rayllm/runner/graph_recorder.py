"""How device work is recorded into a graph that can be replayed: the few calls of CUDA graphs that the runner needs."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

_INTEGERS = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}
"""Of `__cuda_array_interface__`, by bytes: it knows neither bfloat16 nor float8."""


class Graph(Protocol):
    """Recorded device work: it reads and writes the addresses that it was recorded with."""

    def replay(self) -> None:
        """Puts the work on the current stream."""

    def reset(self) -> None:
        """Frees what the graph holds; it is not replayed again. Work that was put on a stream still ends."""


class GraphRecorder(Protocol):
    """Records graphs that share one memory pool, so they must be replayed one after another on one stream."""

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Where `begin` and `end` are called, any number of times in turn. Between them nothing is computed."""

    def begin(self) -> None:
        """From here on device work of this thread is recorded and not done."""

    def end(self) -> Graph: ...

    def abandon(self) -> None:
        """Ends a recording that failed, if one is open."""

    def alias(self, tensor: Tensor) -> Tensor:
        """The same memory, without a claim to it: what is recorded later may reuse it. For a tensor that was allocated
        while recording, as long as its graph is not reset."""

    def forget_pool(self) -> None:
        """The graphs recorded so far were reset: the next one begins a new pool."""


class CudaRecorder:
    """CUDA graphs on one device. They are recorded on a stream of their own, and replayed on any."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()  # while a graph is recorded, the allocator gives back nothing that it caches
        collects = gc.isenabled()
        gc.disable()  # what the collector frees (events, graphs) may call CUDA, which ends a recording
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            if collects:
                gc.enable()

    def begin(self) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (one that aborts collectives) may call CUDA meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Graph:
        graph, self._graph = self._graph, None
        assert graph is not None, "begin() comes first"
        graph.capture_end()
        return graph

    def abandon(self) -> None:
        graph, self._graph = self._graph, None
        if graph is not None:
            with contextlib.suppress(RuntimeError):  # the failure that is being handled has broken it
                graph.capture_end()

    def alias(self, tensor: Tensor) -> Tensor:
        aliased: Tensor = torch.as_tensor(_Memory(tensor), device=self._device)
        return aliased.view(tensor.dtype)

    def forget_pool(self) -> None:
        self._pool = None


class _Memory:
    """Where a tensor's elements are, in the words of `__cuda_array_interface__`."""

    def __init__(self, tensor: Tensor):
        itemsize = tensor.dtype.itemsize
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * itemsize for stride in tensor.stride()),
            "typestr": _INTEGERS[itemsize],
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
