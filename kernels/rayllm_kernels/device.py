"""Which implementation computes: Triton's on a GPU, the reference elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor

_interpreted = False


def uses_triton(x: Tensor) -> bool:
    """Whether kernels whose arguments are where `x` is are Triton kernels."""
    return x.is_cuda or _interpreted


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """While this lasts, tensors on a CPU too are computed by Triton kernels, in Triton's interpreter: thousands of
    times slower, for tests and for a debugger. `TRITON_INTERPRET=1` must be set before a kernel is imported."""
    global _interpreted
    before, _interpreted = _interpreted, True
    try:
        yield
    finally:
        _interpreted = before
