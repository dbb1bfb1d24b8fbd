"""The custom all-reduce of two real processes: their kernels run in Triton's interpreter, over memory that both map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import collectives
import pytest
import torch
from peer_memory import BrokenPeerMemory, DeafPeerMemory, HostPeerMemory
from ranks import RankPool

from rayllm.distributed import all_reduce
from rayllm.distributed.all_reduce import SIZE_LIMITS, CustomAllReduce, SizeLimits, size_limits
from rayllm.distributed.exchange import Exchange
from rayllm_kernels.all_reduce import MAX_PROGRAMS


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.kernels
def test_sums_of_any_size_are_right_whoever_comes_late(two_ranks: RankPool, tmp_path: Path) -> None:
    assert two_ranks.run(collectives.sum_by_kernels, str(tmp_path)) == [[], []]


@pytest.mark.kernels
def test_a_survivor_leaves_its_kernel_and_meets_the_rank_that_replaces_the_lost_one(
    two_ranks: RankPool, tmp_path: Path
) -> None:
    assert two_ranks.run(collectives.sum_after_loss, str(tmp_path)) == [(True, [3.0] * 3)] * 2


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("memory", "problem"),
    [
        (BrokenPeerMemory, "cuMemMap failed with 801: operation not supported (rank 1)"),
        (DeafPeerMemory, "peers did not meet in a kernel within 1 s (rank 0)"),
    ],
)
def test_where_one_rank_cannot_reach_its_peer_all_sum_by_the_library_and_one_line_says_why(
    two_ranks: RankPool, tmp_path: Path, memory: type[HostPeerMemory], problem: str
) -> None:
    (used, lines), (used_too, others) = two_ranks.run(collectives.fall_back, str(tmp_path), memory)
    assert not used
    assert not used_too
    assert lines == [f"all-reduce over 2 ranks: messages of all sizes by NCCL: {problem}"]
    assert others == []


class _Alone(Exchange):
    """A rank whose peers answer as it does."""

    def __init__(self, size: int):
        self.rank, self.size = 0, size

    def gather(self, key: str, value: str) -> list[str]:
        return [value] * self.size


@pytest.mark.parametrize(
    ("limits", "disabled", "one_node", "problem"),
    [
        (SIZE_LIMITS[9, 8], True, True, "disable_custom_all_reduce is set"),
        (SIZE_LIMITS[9, 8], False, False, "the ranks are on several nodes"),
        (None, False, True, "there are no size limits for 8 ranks on GPUs of this kind"),
        (SIZE_LIMITS[9, 8], False, True, "ranks are on the same GPUs: [1, 1, 1, 1, 1, 1, 1, 1]"),
    ],
)
def test_what_rules_the_kernels_out_is_said_before_memory_is_shared(
    limits: SizeLimits | None, disabled: bool, one_node: bool, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", all_reduce.log.name)
    custom = CustomAllReduce(0, 8, torch.device("cuda:1"), limits, disabled=disabled, make_memory=pytest.fail)
    custom.connect(_Alone(8), one_node=one_node)
    assert caplog.messages == [f"all-reduce over 8 ranks: messages of all sizes by NCCL: {problem} (rank 0)"]
    assert not custom.reduce(torch.ones(2))
    custom.abort()
    custom.close()


def test_ranks_on_gpus_of_different_kinds_would_part_at_different_sizes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", all_reduce.log.name)
    others = {"gpu": ["0", "1"], "limits": [str(SIZE_LIMITS[8, 2]), str(SIZE_LIMITS[9, 2])]}
    monkeypatch.setattr(_Alone, "gather", lambda self, key, value: others.get(key, [value] * 2))
    custom = CustomAllReduce(0, 2, torch.device("cuda:0"), SIZE_LIMITS[8, 2], make_memory=pytest.fail)
    custom.connect(_Alone(2), one_node=True)
    assert "GPUs are of different kinds" in caplog.text


def test_gpus_without_peer_access_are_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", all_reduce.log.name)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: other != 3)
    monkeypatch.setattr(_Alone, "gather", lambda self, key, value: ["0", "3"] if key == "gpu" else [value] * 2)
    custom = CustomAllReduce(0, 2, torch.device("cuda:0"), SIZE_LIMITS[8, 2], make_memory=pytest.fail)
    custom.connect(_Alone(2), one_node=True)
    assert "GPU 0 has no peer-to-peer access to GPU 3" in caplog.text


def test_each_two_gpus_must_be_linked_by_nvlink(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", all_reduce.log.name)
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda own, other: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda gpu: SimpleNamespace(uuid=f"u{gpu}"))
    monkeypatch.setattr(all_reduce, "has_nvlink", lambda *uuids: asked.append(uuids) or "GPU-u2" not in uuids)
    gathered = {"gpu": ["0", "1", "2", "3"]}
    monkeypatch.setattr(_Alone, "gather", lambda self, key, value: gathered.get(key, [value] * self.size))
    custom = CustomAllReduce(0, 4, torch.device("cuda:0"), SIZE_LIMITS[8, 4], make_memory=pytest.fail)
    custom.connect(_Alone(4), one_node=True)
    assert asked == [("GPU-u0", "GPU-u1"), ("GPU-u0", "GPU-u2")]
    assert "GPU 0 and GPU 2 are not linked by NVLink (rank 0)" in caplog.text


def test_the_sizes_are_those_of_the_gpu_and_a_kernel_can_take_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert size_limits(torch.device("cuda:0"), 8) == SIZE_LIMITS[9, 8]
    assert size_limits(torch.device("cuda:0"), 3) is None
    assert str(SIZE_LIMITS[9, 8]) == (
        "up to 256 KiB by the one-shot kernel, up to 2048 KiB by the two-shot kernel, longer ones by NCCL"
    )
    for limits in SIZE_LIMITS.values():
        assert limits.one_shot_bytes <= MAX_PROGRAMS * 4096
        assert limits.two_shot_bytes % 16 == 0
