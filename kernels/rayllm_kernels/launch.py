"""How every Triton kernel of this package is started: one function, so that a test can see or replace all launches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Observer = Callable[[Any, tuple[int, ...], Sequence[Any], dict[str, Any]], None]
"""Is given what `launch` is: kernel, grid, positional arguments, keyword arguments."""

_observer: Observer | None = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Starts `kernel`, a function that `triton.jit` decorates, on the current stream. `constants` are its constexpr
    parameters and the compiler's options (`num_warps`, `num_stages`). A grid with a 0 starts nothing."""
    if 0 in grid:
        return
    if _observer is None:
        kernel[grid](*args, **constants)
    else:
        _observer(kernel, grid, args, constants)


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """While this lasts, launches are given to `observer` instead of being started: to record them, to compile them
    without a GPU, or where tensors hold nothing (`FakeTensorMode`)."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before
