from __future__ import annotations

import os

import pytest

from rayllm.config import devices


@pytest.mark.parametrize(
    ("visible", "num_gpus"), [(None, 3), ("", 0), ("-1", 0), ("0", 1), ("0,2", 2), ("0,1,2,3,4", 3), (" 1 , ", 1)]
)
def test_gpus_are_those_that_cuda_would_show(
    visible: str | None, num_gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = ["/dev/nvidia0", "/dev/nvidia1", "/dev/nvidia2", "/dev/nvidia3abc"]
    monkeypatch.setattr(devices.glob, "glob", lambda pattern: found)
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.count_gpus() == num_gpus


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 5}, raising=False)
    assert devices.count_cores() == 2
