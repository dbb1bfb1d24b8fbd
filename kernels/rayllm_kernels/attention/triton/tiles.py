"""Sizes of the attention kernels' tiles, by what they compute and the GPU's generation; nothing is tuned at start."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

MIN_TILE = 16
"""Rows of the smallest product of tensor cores."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """Query rows and keys of a tile, and how it is computed."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def for_pages(self, page_size: int) -> Tiles:
        """With no tile longer than a page, or over the end of one."""
        return replace(self, keys=min(self.keys, page_size & -page_size))


_DECODE = {
    (8, 64): Tiles(16, 64, 4, 4),
    (8, 128): Tiles(16, 64, 4, 3),
    (8, 256): Tiles(16, 32, 4, 3),
    (9, 64): Tiles(16, 64, 4, 4),
    (9, 128): Tiles(16, 64, 4, 4),
    (9, 256): Tiles(16, 64, 4, 3),
}
_PREFILL = {
    (8, 64): Tiles(128, 64, 8, 3),
    (8, 128): Tiles(128, 64, 8, 2),
    (8, 256): Tiles(64, 32, 8, 2),
    (9, 64): Tiles(128, 64, 8, 3),
    (9, 128): Tiles(128, 64, 8, 3),
    (9, 256): Tiles(64, 64, 8, 2),
}
"""By the first number of the compute capability (9 stands for all later ones) and the padded head width (64 stands for
all narrower ones)."""
_FLOAT32 = Tiles(16, 16, 4, 2)
"""Products of float32 are not those of tensor cores."""


def decode_tiles(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, major: int) -> Tiles:
    if dtype == torch.float32:
        return _FLOAT32
    tiles = _DECODE[_key(head_dim, major)]
    # a cache of float8 takes half the memory, and registers to widen
    return replace(tiles, num_warps=8) if cache_dtype.itemsize == 1 else tiles


def prefill_tiles(head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype, has_slopes: bool, major: int) -> Tiles:
    if dtype == torch.float32:
        return _FLOAT32
    key = _key(head_dim, major)
    is_wide = cache_dtype.itemsize == 1 and key == (9, 256)
    if is_wide or (has_slopes and key == (8, 128)):  # too many registers
        return replace(_PREFILL[key], keys=32, num_stages=3)
    return _PREFILL[key]


def _key(head_dim: int, major: int) -> tuple[int, int]:
    return min(max(major, 8), 9), max(64, padded(head_dim))


def padded(size: int) -> int:
    """The next power of two, at least the smallest tile."""
    return max(MIN_TILE, 1 << (size - 1).bit_length())


@functools.cache
def device_shape(device: torch.device) -> tuple[int, int]:
    """(first number of the compute capability, multiprocessors) of a GPU; those of an H100 where there is none, as in
    the interpreter or for tensors without data."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 9, 132
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count
