"""What a step gives back to the host, read in one copy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Downloaded:
    """A tensor on its way to the host."""

    __slots__ = ("_array", "_download", "_tensor")

    def __init__(self, tensor: Tensor, download: Download):
        self._tensor = tensor
        self._download = download
        self._array: np.ndarray | None = None

    @property
    def array(self) -> np.ndarray:
        """The tensor's values, in its shape and dtype. Waits for the device."""
        self._download.wait()
        assert self._array is not None
        return self._array


class Download:
    """Collects a step's results and brings them to the host together: on a GPU joined by one kernel, then in one
    asynchronous copy to pinned memory; on a CPU by no copy."""

    def __init__(self, device: torch.device):
        self._device = device
        self._added: list[Downloaded] = []
        self._host: Tensor | None = None
        self._event: torch.cuda.Event | None = None
        self._has_come = False

    def add(self, tensor: Tensor) -> Downloaded:
        """The tensor must not change until it was read."""
        assert self._host is None, "a download that has started takes no more"
        downloaded = Downloaded(tensor, self)
        self._added.append(downloaded)
        return downloaded

    def start(self) -> None:
        """Begins the copy, behind what the device still computes."""
        if self._device.type == "cpu":
            return
        if self._added:
            parts = [downloaded._tensor.contiguous().flatten().view(torch.uint8) for downloaded in self._added]
            joined = parts[0] if len(parts) == 1 else torch.cat(parts)
            self._host = torch.empty(joined.shape, dtype=torch.uint8, pin_memory=True)
            self._host.copy_(joined, non_blocking=True)
        # Also where nothing comes: what the step reads (pinned memory of an `Upload`) is reused once it has ended.
        self._event = torch.cuda.Event()
        self._event.record()

    @property
    def is_done(self) -> bool:
        """Whether `wait` would not wait."""
        return self._event is None or bool(self._event.query())

    def wait(self) -> None:
        """Until all has come, and the device has done what was begun before `start`."""
        if self._has_come:
            return
        self._has_come = True
        begin = 0
        if self._event is not None:
            self._event.synchronize()
        for downloaded in self._added:
            tensor = downloaded._tensor
            if self._host is None:
                downloaded._array = tensor.numpy()
            else:
                end = begin + tensor.nbytes
                # Copied, since torch views bytes as wider numbers at multiples of their width alone.
                downloaded._array = self._host[begin:end].clone().view(tensor.dtype).view(tensor.shape).numpy()
                begin = end
