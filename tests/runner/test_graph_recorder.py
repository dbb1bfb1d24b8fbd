"""The calls of CUDA that recording makes, on a fake of `torch.cuda`; and where an alias says that a tensor is."""

from __future__ import annotations

import contextlib
import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rayllm.runner.graph_recorder import CudaRecorder, _Memory


class _Cuda:
    """What of `torch.cuda` a recorder calls; `calls` are in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.breaks = False
        self.num_pools = 0

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("Stream", "stream", "synchronize", "empty_cache", "graph_pool_handle", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device: torch.device) -> str:
        return "side stream"

    @contextlib.contextmanager
    def stream(self, stream: str) -> Any:
        self.calls.append(("enter", stream))
        yield
        self.calls.append(("leave", stream))

    def synchronize(self, device: torch.device) -> None:
        self.calls.append(("synchronize",))

    def empty_cache(self) -> None:
        self.calls.append(("empty_cache",))

    def graph_pool_handle(self) -> tuple[int, int]:
        self.num_pools += 1
        return (0, self.num_pools)

    def CUDAGraph(self) -> Any:
        def begin(*, pool: Any, capture_error_mode: str) -> None:
            assert not gc.isenabled()
            self.calls.append(("begin", pool, capture_error_mode))

        def end() -> None:
            self.calls.append(("end",))
            if self.breaks:
                raise RuntimeError("operation failed due to a previous error during capture")

        return SimpleNamespace(capture_begin=begin, capture_end=end)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> _Cuda:
    found = _Cuda()
    found.patch(monkeypatch)
    return found


def test_pieces_are_captured_on_a_stream_of_their_own_into_one_pool(cuda: _Cuda) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    with recorder.session():
        for _ in range(2):
            recorder.begin()
            recorder.end()
    assert gc.isenabled()
    piece = [("begin", (0, 1), "thread_local"), ("end",)]
    first = [("synchronize",), ("empty_cache",)]
    assert cuda.calls == [*first, ("enter", "side stream"), *piece, *piece, ("leave", "side stream")]
    recorder.forget_pool()
    with recorder.session():
        recorder.begin()
    assert ("begin", (0, 2), "thread_local") in cuda.calls


def test_a_recording_that_failed_is_ended_without_another_error(cuda: _Cuda) -> None:
    recorder = CudaRecorder(torch.device("cuda", 0))
    cuda.breaks = True
    with recorder.session():
        recorder.begin()
        recorder.abandon()
        assert cuda.calls[-1] == ("end",)
        recorder.abandon()  # none is open
    assert gc.isenabled()
    assert cuda.calls.count(("end",)) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.float8_e4m3fn])
def test_an_alias_names_the_memory_of_a_strided_tensor(dtype: torch.dtype) -> None:
    whole = torch.arange(60).view(5, 4, 3).to(dtype)
    part = whole[1:, ::2]
    described = SimpleNamespace(__array_interface__=_Memory(part).__cuda_array_interface__)
    aliased = torch.from_numpy(np.asarray(described)).view(dtype)
    assert torch.equal(aliased.float(), part.float())
    assert aliased.data_ptr() == part.data_ptr()
    assert aliased.stride() == part.stride()
