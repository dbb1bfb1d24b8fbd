"""A safetensors file, mapped into memory: a tensor, or a slice of one, is read where it is used and not copied."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import KeysView
from pathlib import Path

import torch
from torch import Tensor

from rayllm.errors import ConfigError
from rayllm.weights.safetensors_header import TensorEntry, read_header

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAP_NORESERVE = 0x4000
"""Of Linux: mapping a file that is larger than the memory is no claim to it. Python has no name for it."""


class SafetensorsFile:
    """The tensors of one file. Raises `ConfigError` for a file that is damaged.

    What `get_slice(name)[...]` gives is memory of the mapped file, and not to be changed in place. As soon as nobody
    holds it any more, the process gives its pages back; the system may keep them in its file cache.
    """

    def __init__(self, path: Path):
        self._path = path
        self._entries = read_header(path)
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        # Private, because `ctypes` wants memory that may be written; nothing is copied as long as nobody writes.
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        self._mapped = mmap.mmap(self._fd, 0, mmap.MAP_PRIVATE | _MAP_NORESERVE, protection)

    def keys(self) -> KeysView[str]:
        return self._entries.keys()

    def get_slice(self, name: str) -> MappedSlice:
        return MappedSlice(self, name, self._entries[name])

    def memory(self, begin: int, end: int) -> Tensor:
        """The file's bytes from `begin` to `end`, uint8. The system starts to read them from the disk."""
        if begin == end:
            return torch.empty(0, dtype=torch.uint8)
        os.posix_fadvise(self._fd, begin, end - begin, os.POSIX_FADV_WILLNEED)
        array = (ctypes.c_ubyte * (end - begin)).from_buffer(self._mapped, begin)
        weakref.finalize(array, _give_back, self._mapped, begin, end).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8)

    def torch_dtype(self, name: str) -> torch.dtype:
        dtype = self._entries[name].dtype
        if dtype not in _TORCH_DTYPES:
            known = ", ".join(_TORCH_DTYPES)
            raise ConfigError(f"{self._path}: tensor {name!r} has dtype {dtype}; known are {known}")
        return _TORCH_DTYPES[dtype]


class MappedSlice:
    """A tensor of a file, of which any part can be read."""

    def __init__(self, file: SafetensorsFile, name: str, entry: TensorEntry):
        self._file, self._name, self._entry = file, name, entry
        self.num_bytes = entry.num_bytes

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """By safetensors' names."""
        return self._entry.dtype

    def __getitem__(self, parts: tuple[slice, ...]) -> Tensor:
        """`parts`: begin and end for each dimension, or for the first ones. Only rows of the first dimension that are
        wanted are mapped; of columns that are not wanted no byte is touched."""
        entry, dtype = self._entry, self._file.torch_dtype(self._name)
        rows = range(*parts[0].indices(entry.shape[0])) if parts else range(1)
        row_shape = entry.shape[1:]
        row_bytes = math.prod(row_shape) * dtype.itemsize
        begin = entry.begin + rows.start * row_bytes
        found = self._file.memory(begin, begin + len(rows) * row_bytes).view(dtype)
        if not parts:
            return found.view(entry.shape)
        return found.view(len(rows), *row_shape)[(slice(None), *parts[1:])]


def _give_back(mapped: mmap.mmap, begin: int, end: int) -> None:
    """Drops the whole pages from `begin` to `end` from this process."""
    begin = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    end = end // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)
