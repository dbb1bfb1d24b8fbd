"""How many bytes of weights a rank has read, and how many it will. Plain Python."""

from __future__ import annotations

import threading

from rayllm.errors import EngineError


class LoadProgress:
    """Written by the threads that read a checkpoint, asked by any other."""

    def __init__(self, num_ranks: int = 1):
        self._num_ranks = num_ranks
        self._lock = threading.Lock()
        self._num_unseen = 0
        self._num_bytes = 0
        self.bytes_read = 0
        self._is_cancelled = False

    def cancel(self) -> None:
        """Nobody wants the weights any more: what is loading ends at the next tensor."""
        self._is_cancelled = True

    def begin(self, num_bytes: int) -> None:
        """A checkpoint of that size was opened."""
        with self._lock:
            self._num_unseen, self._num_bytes, self.bytes_read = num_bytes, 0, 0

    def see(self, num_bytes: int) -> None:
        """A tensor of that size is wanted, of which this rank will read its part."""
        with self._lock:
            self._num_bytes = self._expected()
            self._num_unseen -= num_bytes

    def read(self, num_bytes: int) -> None:
        """The rank has read so many bytes. Raises `EngineError` after `cancel`."""
        if self._is_cancelled:
            raise EngineError("loading was cancelled")
        with self._lock:
            self.bytes_read += num_bytes

    def numbers(self) -> tuple[int, int]:
        """Bytes that were read, and of how many: nearly, because every rank reads small tensors whole, and some of a
        checkpoint's may be left out."""
        with self._lock:
            self._num_bytes = self._expected()
            return self.bytes_read, self._num_bytes

    def _expected(self) -> int:
        """Never less than before: a tensor is seen a while before it is read."""
        return max(self._num_bytes, self.bytes_read + self._num_unseen // self._num_ranks)


def progress_text(bytes_read: int, num_bytes: int) -> str:
    """`1.20 of 2.02 GB`."""
    return f"{bytes_read / 1e9:.2f} of {num_bytes / 1e9:.2f} GB"
