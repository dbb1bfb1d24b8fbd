"""Parts of a model are made side by side, and come in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from rayllm.errors import ConfigError
from rayllm.weights.parallel import make_in_parallel


def test_parts_come_in_their_order_from_threads_that_run_together() -> None:
    both = threading.Barrier(2, timeout=30)

    def maker(number: int) -> Callable[[], tuple[int, int]]:
        def make() -> tuple[int, int]:
            if number < 2:
                both.wait()  # never passed by one thread alone
            return number, torch.get_num_threads()

        return make

    assert make_in_parallel(maker(number) for number in range(5)) == [(number, 1) for number in range(5)]


def test_torch_computes_with_as_many_threads_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert make_in_parallel([lambda: 1]) == [1]
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert [torch.get_num_threads(), *later] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_the_first_failure_is_raised_and_the_rest_left_out() -> None:
    made: list[int] = []

    def fail() -> int:
        raise ConfigError("the first")

    with pytest.raises(ConfigError, match="the first"):
        make_in_parallel([fail, *(lambda number=number: made.append(number) or number for number in range(500))])
    assert len(made) < 500


def test_threads_compute_on_the_callers_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a node whose GPUs all ranks see: each thread has a current GPU of its own, at first number 0."""
    current = threading.local()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "gpu", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: setattr(current, "gpu", gpu))
    torch.cuda.set_device(3)
    assert make_in_parallel([torch.cuda.current_device] * 4) == [3] * 4
