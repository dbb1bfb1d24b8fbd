"""A recorder of graphs on a CPU: it records torch's operators and the kernels' launches with their tensors, and replays
them into the same memory.

Unlike CUDA, it computes while it records, and it keeps every tensor: what it cannot show is memory that one graph takes
from another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from rayllm_kernels.launch import launch, observed

_WAITING = frozenset({"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"})


class RecordedGraph:
    """Calls in order; each writes where it wrote when it was recorded."""

    def __init__(self, calls: list[Callable[[], None]], replays: list[RecordedGraph]):
        self._calls = calls
        self._replays = replays
        self.was_reset = False

    def replay(self) -> None:
        assert not self.was_reset, "a graph that was reset is replayed"
        self._replays.append(self)
        for call in self._calls:
            call()

    def reset(self) -> None:
        self.was_reset = True


class RecordingDouble:
    """A `GraphRecorder`. Reads what each operator does to memory from its schema and its results' storages."""

    def __init__(self) -> None:
        self.graphs: list[RecordedGraph] = []
        self.replays: list[RecordedGraph] = []
        """In order, a graph once for each of its replays."""
        self.num_pools = 0
        self.in_session = False
        self._calls: list[Callable[[], None]] | None = None
        self._modes = contextlib.ExitStack()
        self._has_pool = False

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        self.in_session = True
        yield
        assert self._calls is None, "the session ends while a graph is recorded"
        self.in_session = False

    def begin(self) -> None:
        assert self.in_session
        assert self._calls is None
        if not self._has_pool:
            self._has_pool = True
            self.num_pools += 1
        self._calls = []
        self._modes.enter_context(observed(self._see_launch))
        self._modes.enter_context(_Recording(self._calls))

    def end(self) -> RecordedGraph:
        assert self._calls is not None
        self._modes.close()
        graph = RecordedGraph(self._calls, self.replays)
        self._calls = None
        self.graphs.append(graph)
        return graph

    def abandon(self) -> None:
        self._modes.close()
        self._calls = None

    def alias(self, tensor: Tensor) -> Tensor:
        return tensor

    def forget_pool(self) -> None:
        assert all(graph.was_reset for graph in self.graphs)
        self._has_pool = False

    def _see_launch(self, kernel: Any, grid: tuple[int, ...], args: Any, constants: dict[str, Any]) -> None:
        assert self._calls is not None
        self._calls.append(lambda: launch(kernel, grid, *args, **constants))
        with _disable_current_modes():  # the interpreter's own operators are no device work
            kernel[grid](*args, **constants)


class _Recording(TorchDispatchMode):
    def __init__(self, calls: list[Callable[[], None]]):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _WAITING:
            raise RuntimeError(f"{func} waits for the device, which is not permitted while a graph is recorded")
        results = func(*args, **kwargs)
        if func._schema.name == "aten::empty":
            results.zero_()  # what a later operator would have written is not there while it is recorded
        written = _tensors(results)
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        if func._schema.is_mutable:
            self._calls.append(lambda: func(*args, **kwargs))
        elif not all(tensor.untyped_storage().data_ptr() in known for tensor in written):

            def again() -> None:
                for old, new in zip(written, _tensors(func(*args, **kwargs)), strict=True):
                    old.copy_(new)

            self._calls.append(again)
        return results


def _tensors(tree: Any) -> list[Tensor]:
    """Those with elements; a packed weight's are oneDNN's alone."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and not leaf.is_mkldnn and leaf.numel()]
