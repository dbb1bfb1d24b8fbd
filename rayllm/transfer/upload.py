"""What a step needs of the host, sent to the device in one copy."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16
_FIRST_BYTES = 2**20
_NUM_HOST_BUFFERS = 3
"""One that is filled, and those of the steps in flight, which the device may still read."""


def int64_array(ids: Iterable[int]) -> np.ndarray:
    """Ids, lines or rows as the device indexes by them."""
    return np.array(list(ids), np.int64)


class Uploaded:
    """An array on its way: its tensor exists once the upload was sent."""

    __slots__ = ("_tensor", "array", "offset")

    def __init__(self, array: np.ndarray, offset: int):
        self.array = array
        self.offset = offset
        self._tensor: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """On the device, with the array's shape and dtype. Valid until the next step's upload is sent."""
        assert self._tensor is not None, "the upload was not sent yet"
        return self._tensor


class Upload:
    """Collects a step's arrays and sends them together: on a GPU in one asynchronous copy out of pinned memory, on a
    CPU by no copy at all.

    The device holds them in one buffer that serves every step: work on one stream comes in order, so what step n + 1
    sends cannot overtake what step n reads. Arrays of the same sizes added in the same order are at the same addresses,
    as CUDA graphs need, until `generation` rises.
    """

    def __init__(self, device: torch.device, num_bytes: int = _FIRST_BYTES):
        self._device = device
        self.generation = 0
        """How often the device's buffer was replaced by a larger one."""
        self._added: list[Uploaded] = []
        self._end = 0
        self._step = 0
        if device.type != "cpu":
            self._allocate(num_bytes)

    def add(self, array: np.ndarray) -> Uploaded:
        """The array must not change until it was sent."""
        uploaded = Uploaded(np.ascontiguousarray(array), self._end)
        self._end += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._added.append(uploaded)
        return uploaded

    def send(self) -> None:
        """Begins the copy; does not wait for the device, where at most two earlier steps are still computed."""
        added, self._added, num_bytes, self._end = self._added, [], self._end, 0
        if self._device.type == "cpu":
            for uploaded in added:
                uploaded._tensor = torch.from_numpy(uploaded.array)
            return
        if num_bytes > len(self._on_device):
            self._allocate(2 * num_bytes)
            self.generation += 1
        self._step = (self._step + 1) % _NUM_HOST_BUFFERS
        host = self._host[self._step]
        bytes_on_host = host.numpy()
        for uploaded in added:
            array = uploaded.array
            bytes_on_host[uploaded.offset : uploaded.offset + array.nbytes] = array.reshape(-1).view(np.uint8)
        self._on_device[:num_bytes].copy_(host[:num_bytes], non_blocking=True)
        for uploaded in added:
            array = uploaded.array
            dtype = torch.from_numpy(array[:0].reshape(-1)).dtype if array.ndim else torch.from_numpy(array).dtype
            flat = self._on_device[uploaded.offset : uploaded.offset + array.nbytes]
            uploaded._tensor = flat.view(dtype).view(array.shape)

    def _allocate(self, num_bytes: int) -> None:
        self._on_device = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._host = [torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(_NUM_HOST_BUFFERS)]
