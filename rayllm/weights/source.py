"""Where layers take their parameters from: a checkpoint, or numbers drawn from a seed."""

from __future__ import annotations

import hashlib
import math
from typing import Protocol

import torch
from torch import Tensor


class WeightSource(Protocol):
    """Gives parameters by RayLLM's names (`layers.3.q.weight`), cut to the part that a rank holds."""

    def tensor(self, name: str, shape: tuple[int, ...], *, dim: int = 0, part: range | None = None) -> Tensor:
        """The parameter `name`, whose full shape is `shape`, cut to `part` along `dim`; dtype and device are set.

        `part` may reach past the end of `dim` (a padded vocabulary): what is past the end is zero.
        """
        ...


def clip(part: range, size: int) -> range:
    """What of `part` lies within `size` entries."""
    return range(min(part.start, size), min(part.stop, size))


def pad_to(tensor: Tensor, dim: int, size: int) -> Tensor:
    """`tensor` with zeros appended along `dim` until it has `size` entries."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim=dim)


class DummyWeights:
    """Random weights, each a function of (seed, name): all ranks cut the same full tensor, whatever their number."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device):
        self._seed = seed
        self._dtype = dtype
        self._device = device

    def tensor(self, name: str, shape: tuple[int, ...], *, dim: int = 0, part: range | None = None) -> Tensor:
        if name.endswith("bias"):
            full = torch.zeros(shape, dtype=self._dtype)
        elif len(shape) == 1:
            full = torch.ones(shape, dtype=self._dtype)
        else:
            digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            bound = math.sqrt(3.0 / shape[-1])  # a variance of 1 / fan-in keeps activations of order one
            full = torch.empty(shape, dtype=self._dtype).uniform_(-bound, bound, generator=generator)
        if part is not None:
            inside = clip(part, shape[dim])
            full = pad_to(full.narrow(dim, inside.start, len(inside)), dim, len(part))
        return full.contiguous().to(self._device)
