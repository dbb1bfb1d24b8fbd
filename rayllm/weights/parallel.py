"""Parts of a model made by several threads: while one waits for the disk or reorders a weight, others read ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

_MIN_THREADS = 2
"""On one core too: reading from a disk costs no computing."""
_MAX_THREADS = 8
"""Each holds copies of the weights that it works on."""

Part = TypeVar("Part")


def make_in_parallel(makers: Iterable[Callable[[], Part]]) -> list[Part]:
    """What each of `makers` returns, in their order. They run on torch's number of threads, at least two, with one
    computing thread each, and compute on the caller's GPU. Raises the error of the first that fails; what has not begun
    then is left out."""
    num_threads = torch.get_num_threads()
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    pool = ThreadPoolExecutor(min(max(num_threads, _MIN_THREADS), _MAX_THREADS), "load-weights", _begin_thread, (gpu,))
    try:
        return [future.result() for future in [pool.submit(make) for make in makers]]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(num_threads)  # it is also what threads that start later get


def _begin_thread(gpu: int | None) -> None:
    torch.set_num_threads(1)
    if gpu is not None:
        torch.cuda.set_device(gpu)  # a thread begins with the first GPU, and Triton launches on its thread's
