from __future__ import annotations

from typing import Any

import pytest
import torch

from rayllm.transfer.download import Download


def test_results_are_read_in_their_shapes_and_types() -> None:
    download = Download(torch.device("cpu"))
    ids, values = torch.tensor([3, 4]), torch.tensor([[0.5], [1.5]])
    read = [download.add(ids), download.add(values)]
    download.start()
    assert read[0].array.tolist() == [3, 4]
    assert read[1].array.tolist() == [[0.5], [1.5]]


class _Event:
    """The GPU's, of which the host has not yet waited for any."""

    waits = 0

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        _Event.waits += 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device whose results are joined and copied, though its tensors are the host's."""
    empty = torch.empty

    def without_pinning(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", without_pinning)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(_Event, "waits", 0)
    return torch.device("cuda")


def test_results_of_odd_lengths_are_read_from_one_copy_of_a_gpu(gpu: torch.device) -> None:
    download = Download(gpu)
    tensors = [torch.tensor([3]), torch.tensor([True]), torch.tensor([[5, 6]]), torch.tensor([[0.5], [1.5]])]
    tensors += [torch.empty(0, dtype=torch.int64), torch.tensor([False, True, True]), torch.tensor(7)]
    read = [download.add(tensor) for tensor in tensors]
    download.start()
    assert [(each.array.tolist(), each.array.dtype) for each in read] == [
        (tensor.tolist(), tensor.numpy().dtype) for tensor in tensors
    ]
    assert _Event.waits == 1


def test_a_gpu_step_without_results_is_waited_for_all_the_same(gpu: torch.device) -> None:
    download = Download(gpu)
    download.start()
    download.wait()
    assert _Event.waits == 1
