from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import fake_config

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError, WorkerDiedError
from rayllm.executor import fanout
from rayllm.executor.group import WorkerGroup
from rayllm.executor.worker import RunnerFactory, WorkerPlace
from rayllm.messages import StepPlan, StepResult

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

FAIL_STEP, ENVIRONMENT_STEP = 13, 77


def reducing_runner(
    *, load_error: Exception | None = None, leave_at_load: bool = False, broken: str | None = None
) -> RunnerFactory:
    """Runners whose result is the sum over ranks of (rank + 1) * step, by a real all-reduce. The class is made
    here so that it travels to the workers by value: they cannot import the tests."""

    class Runner:
        def __init__(self, config: ResolvedConfig, tp: Any):
            if load_error is not None and tp.rank == tp.size - 1:
                raise load_error
            if broken is not None and os.path.exists(broken):
                raise ConfigError("no such folder")
            if leave_at_load:
                os._exit(7)
            self.tp = tp

        def num_blocks_available(self) -> int:
            return 40 - self.tp.rank

        def start(self, num_blocks: int) -> None:
            self.num_blocks = num_blocks

        def warm_up(self) -> None:
            pass

        def execute(self, plan: StepPlan) -> StepResult:
            import sys

            import torch

            if plan.step == FAIL_STEP and self.tp.rank == 1:
                raise RuntimeError("out of memory")
            total = self.tp.all_reduce(torch.tensor([(self.tp.rank + 1) * plan.step, self.num_blocks]))
            answer = str(total.tolist())
            if plan.step == ENVIRONMENT_STEP:
                heavy = [name for name in ("transformers", "fastapi") if name in sys.modules]
                answer = f"{heavy} {os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()}"
            return StepResult(plan.step, plan.epoch, b"", answer.encode(), {}, {}, 0.0)

    return Runner


def _config(ranks: int = 2, **changes: Any) -> ResolvedConfig:
    return fake_config(engine={"tensor_parallel_size": ranks, "name": "group-test"}, backend="ray", **changes)


def _plan(step: int) -> StepPlan:
    return StepPlan(step, 0, b"", [], b"", b"", b"", b"")


def _check_until_told(group: WorkerGroup) -> None:
    while True:
        select.select([group.result_socket()], [], [])
        group.check()


def _alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@pytest.fixture
def make_group() -> Iterator[Callable[..., WorkerGroup]]:
    groups: list[WorkerGroup] = []

    def make(ranks: int = 2, **runner: Any) -> WorkerGroup:
        groups.append(WorkerGroup(_config(ranks, num_threads=2), runner_factory=reducing_runner(**runner)))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def test_two_ranks_compute_together_and_leave_nothing_behind() -> None:
    stages: list[str] = []
    group = WorkerGroup(_config(num_threads=2), stages.append, runner_factory=reducing_runner())
    assert stages == ["placing workers", "starting 2 workers", "loading weights", "warming up"]
    assert (group.num_blocks, group.pipeline_depth) == (39, 2)
    group.send(_plan(1))
    group.send(_plan(2))
    assert [group.receive(10.0).token_ids, group.receive(10.0).token_ids] == [b"[3, 78]", b"[6, 78]"]
    group.send(_plan(ENVIRONMENT_STEP))
    assert group.receive(10.0).token_ids == b"[] 2 2"
    group.check()
    pids = [place.pid for place in group.places]
    assert len({*pids, os.getpid()}) == 3
    assert [place.devices for place in group.places] == [("cpu",)] * 2
    group.close()
    group.close()
    assert not any(_alive(pid) for pid in pids)


def test_a_single_rank_needs_no_process_group(make_group: Callable[..., WorkerGroup]) -> None:
    group = make_group(ranks=1)
    group.send(_plan(5))
    assert group.receive(10.0).token_ids == b"[5, 40]"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("idle", [True, False])
def test_a_killed_worker_is_named_with_the_cause(
    make_group: Callable[..., WorkerGroup], rank: int, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "_CAUSE_GRACE_S", 30.0)  # a busy machine's Ray is slow to name the cause
    group = make_group()
    os.kill(group.places[rank].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    if not idle:
        group.send(_plan(1))
        ask = partial(group.receive, None)
    else:
        ask = partial(_check_until_told, group)
    with pytest.raises(WorkerDiedError, match=f"worker rank {rank} failed: its process died") as death:
        ask()
    assert death.value.rank == rank
    assert time.monotonic() - killed_at < 60  # a bound against hanging; the benchmark measures how fast it is


def _standby_place(group: WorkerGroup) -> WorkerPlace:
    """Where the standby lives, once it is ready."""
    while not group.standby_is_ready:
        time.sleep(0.05)
    assert group._standby is not None
    place = group._standby.place(60.0)
    assert place is not None
    return place


def _recovered_sum(group: WorkerGroup, step: int = 7) -> bytes:
    group.send(_plan(step))
    return group.receive(10.0).token_ids


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_rank_alone_is_replaced_and_all_compute_again(make_group: Callable[..., WorkerGroup], rank: int) -> None:
    group = make_group()
    before = group.places
    group.send(_plan(1))
    os.kill(before[rank].pid, signal.SIGKILL)
    group.send(_plan(2))
    with pytest.raises(WorkerDiedError):
        _receive_all(group)
    group.recover([rank])
    assert _recovered_sum(group) == b"[21, 78]"
    group.check()
    after = group.places
    assert after[rank].pid != before[rank].pid
    assert after[1 - rank] == before[1 - rank]
    group.close()
    assert not any(_alive(place.pid) for place in (*before, *after))


def _receive_all(group: WorkerGroup) -> None:
    while True:
        group.receive(10.0)


def test_a_stopped_rank_is_found_ended_and_replaced(make_group: Callable[..., WorkerGroup]) -> None:
    group = make_group()
    [survivor, stopped] = group.places
    assert group.silent_ranks() == []
    os.kill(stopped.pid, signal.SIGSTOP)
    group.send(_plan(1))
    with pytest.raises(TimeoutError):
        group.receive(0.5)
    assert group.silent_ranks() == [1]  # the other waits in its collective and answers all the same
    group.recover([1])
    assert not _alive(stopped.pid)
    assert _recovered_sum(group) == b"[21, 78]"
    assert group.places[0] == survivor


def test_a_survivor_that_dies_while_a_peer_is_replaced_is_replaced_too(make_group: Callable[..., WorkerGroup]) -> None:
    group = make_group()
    pids = [place.pid for place in group.places]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        _check_until_told(group)
    os.kill(pids[0], signal.SIGKILL)
    group.recover([1])
    assert _recovered_sum(group) == b"[21, 78]"
    assert not {place.pid for place in group.places} & {*pids}


@pytest.mark.parametrize("standby", ["process", "weights"])
def test_a_standby_takes_the_lost_ranks_place_and_another_gets_ready(standby: str) -> None:
    config = fake_config(engine={"tensor_parallel_size": 2, "standby": standby}, backend="ray", num_threads=2)
    group = WorkerGroup(config, runner_factory=reducing_runner())
    try:
        for rank in (0, 1):
            spare = _standby_place(group)
            os.kill(group.places[rank].pid, signal.SIGKILL)
            with pytest.raises(WorkerDiedError):
                _check_until_told(group)
            group.recover([rank])
            assert group.places[rank] == spare
            assert _recovered_sum(group) == b"[21, 78]"
        pids = [place.pid for place in (*group.places, _standby_place(group))]
    finally:
        group.close()
    assert not any(_alive(pid) for pid in pids)


def test_a_rank_whose_replacement_cannot_load_is_given_up_with_its_reason(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    group = WorkerGroup(_config(1, num_threads=2), runner_factory=reducing_runner(broken=str(broken)))
    try:
        broken.touch()
        os.kill(group.places[0].pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            _check_until_told(group)
        expected = r"rank 0 failed: ConfigError: no such folder, at attempt 3 .*; node \w+, host [\w.]+, cpu"
        with pytest.raises(WorkerDiedError, match=expected):
            group.recover([0])
    finally:
        group.close()


def test_a_step_that_fails_on_one_rank_is_told_with_its_reason(
    make_group: Callable[..., WorkerGroup],
) -> None:
    group = make_group()
    group.send(_plan(FAIL_STEP))
    with pytest.raises(WorkerDiedError) as failure:
        group.receive(None)
    assert (failure.value.rank, failure.value.reason) == (1, "RuntimeError: out of memory")


def test_a_rank_that_cannot_load_gives_its_own_error(make_group: Callable[..., WorkerGroup]) -> None:
    with pytest.raises(ConfigError, match=r"^no weights in this folder$"):
        make_group(load_error=ConfigError("no weights in this folder"))
    with pytest.raises(WorkerDiedError, match=r"worker rank 1 failed: MemoryError: 9 GiB; node \w+, host [\w.]+, cpu"):
        make_group(load_error=MemoryError("9 GiB"))


def test_a_rank_that_dies_while_loading_is_an_error_and_not_a_hang(
    make_group: Callable[..., WorkerGroup],
) -> None:
    with pytest.raises(WorkerDiedError, match="worker rank 0 failed: its process died"):
        make_group(ranks=1, leave_at_load=True)


def test_more_workers_than_the_cluster_holds_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=64 asks for 64 CPUs"):
        WorkerGroup(_config(64), runner_factory=reducing_runner())
