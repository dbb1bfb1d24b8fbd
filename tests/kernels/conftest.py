"""Every kernel under test runs in an interpreter that is right, and what it allocates holds NaN until it is written."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_accuracy import Buffers
from triton_interpreter import corrected


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    with corrected():
        yield


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def buffers() -> Iterator[Buffers]:
    """Tensors with canaries round them, which are checked when the test ends."""
    made = Buffers()
    yield made
    made.check()
