"""What tests compare kernels by: seeded inputs, errors in float64, and guarded buffers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
"""The relative error that a reference is allowed in each dtype."""

KERNEL_TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
"""The relative error that a Triton kernel is allowed, unless its row in `kernels/README.md` says otherwise."""

_MARGIN = 64
"""Elements before and behind a guarded tensor: enough to keep its alignment."""

_CANARY_OF_INTS = -77
"""In place of NaN: as an index it hits no valid element and stays near the buffer."""


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; NaN anywhere makes it NaN, which no bound accepts."""
    return float((found.double() - expected).norm() / expected.norm())


class Buffers:
    """Tensors with canaries before and behind them: what a kernel reads there spoils its result, since it is NaN, and
    what it writes there is found by `check`."""

    def __init__(self) -> None:
        self._whole: list[tuple[Tensor, Tensor]] = []
        self._inputs: list[tuple[Tensor, Tensor]] = []

    def output(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A contiguous tensor to be written: NaN, or -77 where it holds integers."""
        num_elements = math.prod(shape)
        whole = torch.full((num_elements + 2 * _MARGIN,), _canary(dtype)).to(dtype)
        self._whole.append((whole, whole.clone()))
        return whole[_MARGIN : _MARGIN + num_elements].view(shape)

    def inout(self, values: Tensor) -> Tensor:
        """A contiguous copy of `values`, which may be written."""
        return self.output(*values.shape, dtype=values.dtype).copy_(values)

    def input(self, values: Tensor) -> Tensor:
        """A contiguous copy of `values`, which must stay as it is."""
        tensor = self.inout(values)
        self._inputs.append((tensor, values.clone()))
        return tensor

    def check(self) -> None:
        """AssertionError where a canary or an input was overwritten."""
        for whole, before in self._whole:
            for what, part in (("before", slice(_MARGIN)), ("behind", slice(len(whole) - _MARGIN, None))):
                same = _bits(whole[part]) == _bits(before[part])
                assert same.all(), f"written {what} a buffer of {len(whole) - 2 * _MARGIN} elements of {whole.dtype}"
        for tensor, values in self._inputs:
            assert torch.equal(_bits(tensor), _bits(values)), f"an input {tuple(values.shape)} was overwritten"


def _canary(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return math.nan
    return _CANARY_OF_INTS % 256 if dtype == torch.uint8 else dtype == torch.bool or _CANARY_OF_INTS


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
