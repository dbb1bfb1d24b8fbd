from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fakes
import pytest
from fakes import fake_config

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError, WorkerDiedError
from rayllm.executor import fanout
from rayllm.executor.group import WorkerGroup
from rayllm.executor.worker import RunnerFactory
from rayllm.executor.worker_process import WorkerPlace
from rayllm.messages import StepPlan, StepResult

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]

FAIL_STEP, ENVIRONMENT_STEP = 13, 77


def reducing_runner(
    *, load_error: Exception | None = None, leave_at_load: bool = False, broken: str | None = None
) -> RunnerFactory:
    """Runners whose result is the sum over ranks of (rank + 1) * step, by a real all-reduce. The class is made
    here so that it travels to the workers by value: they cannot import the tests."""
    import ray

    ray.cloudpickle.register_pickle_by_value(fakes)

    class Runner(fakes.OneStepAtATime):
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


def _config(name: str, ranks: int = 2, standby: str = "off") -> ResolvedConfig:
    engine = {"tensor_parallel_size": ranks, "name": name, "standby": standby}
    return fake_config(engine=engine, backend="ray", num_threads=2)


def _plan(step: int) -> StepPlan:
    return StepPlan(step, 0, b"", [], b"", b"", b"", b"", 0)


def _computed(group: WorkerGroup, step: int = 7) -> bytes:
    group.send(_plan(step))
    return group.receive(10.0).token_ids


def _check_until_told(group: WorkerGroup) -> None:
    while True:
        select.select([group.result_socket()], [], [])
        group.check()


def _receive_until_told(group: WorkerGroup) -> None:
    while True:
        group.receive(None)


def _alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


@dataclass
class Pair:
    """Two ranks, and what was said while they started."""

    group: WorkerGroup
    stages: list[str]


@pytest.fixture(scope="module")
def kept() -> Iterator[list[Pair]]:
    """The pair that computes, if any."""
    kept: list[Pair] = []
    yield kept
    for pair in kept:
        pair.group.close()


@pytest.fixture
def pair(kept: list[Pair]) -> Iterator[Pair]:
    """The last test's, if that left it whole: replacing a rank takes half as long as starting two."""
    if not kept:
        stages: list[str] = []
        group = WorkerGroup(_config("pair"), stages.append, runner_factory=reducing_runner())
        kept.append(Pair(group, stages.copy()))
    yield kept[0]
    try:
        assert _computed(kept[0].group) == b"[21, 78]"
    except Exception:
        kept.pop().group.close()


@pytest.fixture
def group(pair: Pair) -> WorkerGroup:
    return pair.group


@pytest.fixture
def make_group() -> Iterator[Callable[..., WorkerGroup]]:
    groups: list[WorkerGroup] = []

    def make(ranks: int = 2, standby: str = "off", **runner: Any) -> WorkerGroup:
        groups.append(WorkerGroup(_config("group", ranks, standby), runner_factory=reducing_runner(**runner)))
        return groups[-1]

    yield make
    for group in groups:
        group.close()


def test_two_ranks_compute_together(pair: Pair) -> None:
    group = pair.group
    assert pair.stages == [
        "placing workers", "starting 2 workers", "loading weights", "joining workers",
        "checking links between workers", "measuring memory", "warming up",
    ]  # fmt: skip
    assert (group.num_blocks, group.max_inflight_steps) == (39, 2)
    group.send(_plan(1))
    group.send(_plan(2))
    assert [group.receive(10.0).token_ids, group.receive(10.0).token_ids] == [b"[3, 78]", b"[6, 78]"]
    assert _computed(group, ENVIRONMENT_STEP) == b"[] 2 2"
    group.check()
    assert len({os.getpid(), *(place.pid for place in group.places)}) == 3
    assert [place.devices for place in group.places] == [("cpu",)] * 2


def test_a_single_rank_needs_no_process_group(make_group: Callable[..., WorkerGroup]) -> None:
    assert _computed(make_group(ranks=1), step=5) == b"[5, 40]"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("when", ["idle", "before a step", "in its steps"])
def test_a_killed_worker_is_named_with_the_cause_and_it_alone_is_replaced(
    group: WorkerGroup, rank: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fanout, "_CAUSE_GRACE_S", 30.0)  # a busy machine's Ray is slow to name the cause
    before = group.places
    if when == "in its steps":
        group.send(_plan(1))
    os.kill(before[rank].pid, signal.SIGKILL)
    killed_at = time.monotonic()
    if when != "idle":
        group.send(_plan(2))
    with pytest.raises(WorkerDiedError, match=f"worker rank {rank} failed: its process died") as death:
        (_check_until_told if when == "idle" else _receive_until_told)(group)
    assert death.value.rank == rank
    assert time.monotonic() - killed_at < 60  # a bound against hanging; the benchmark measures how fast it is

    group.recover([rank])
    assert _computed(group) == b"[21, 78]"
    group.check()
    after = group.places
    assert after[rank].pid != before[rank].pid
    assert after[1 - rank] == before[1 - rank]
    assert not _alive(before[rank].pid)


def test_a_stopped_rank_is_found_ended_and_replaced(group: WorkerGroup) -> None:
    [survivor, stopped] = group.places
    assert group.silent_ranks() == []
    os.kill(stopped.pid, signal.SIGSTOP)
    group.send(_plan(1))
    with pytest.raises(TimeoutError):
        group.receive(0.5)
    assert group.silent_ranks() == [1]  # the other waits in its collective and answers all the same
    group.recover([1])
    assert not _alive(stopped.pid)
    assert _computed(group) == b"[21, 78]"
    assert group.places[0] == survivor


def test_a_survivor_that_dies_while_a_peer_is_replaced_is_replaced_too(group: WorkerGroup) -> None:
    pids = [place.pid for place in group.places]
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        _check_until_told(group)
    os.kill(pids[0], signal.SIGKILL)
    group.recover([1])
    assert _computed(group) == b"[21, 78]"
    assert not {place.pid for place in group.places} & {*pids}


def test_a_step_that_fails_on_one_rank_is_told_with_its_reason_and_the_rank_replaced(group: WorkerGroup) -> None:
    [survivor, failing] = group.places
    group.send(_plan(FAIL_STEP))
    with pytest.raises(WorkerDiedError) as failure:
        group.receive(None)
    assert (failure.value.rank, failure.value.reason) == (1, "RuntimeError: out of memory")
    group.recover([1])
    assert _computed(group) == b"[21, 78]"
    assert group.places[0] == survivor
    assert not _alive(failing.pid)


def test_closing_leaves_nothing_behind(pair: Pair) -> None:
    """The last test of the pair."""
    pids = [place.pid for place in pair.group.places]
    assert all(map(_alive, pids))
    pair.group.close()
    pair.group.close()
    assert not any(map(_alive, pids))


def _standby_place(group: WorkerGroup) -> WorkerPlace:
    """Where the standby lives, once it is ready."""
    while not group.standby_is_ready:
        time.sleep(0.05)
    place = group._standby.place(60.0)
    assert place is not None
    return place


@pytest.mark.parametrize("standby", ["process", "weights"])
def test_a_standby_takes_the_lost_ranks_place_and_another_gets_ready(
    make_group: Callable[..., WorkerGroup], standby: str
) -> None:
    group = make_group(standby=standby)
    for rank in (0, 1):
        spare = _standby_place(group)
        os.kill(group.places[rank].pid, signal.SIGKILL)
        with pytest.raises(WorkerDiedError):
            _check_until_told(group)
        group.recover([rank])
        assert group.places[rank] == spare
        assert _computed(group) == b"[21, 78]"
    pids = [place.pid for place in (*group.places, _standby_place(group))]
    group.close()
    assert not any(map(_alive, pids))


def test_a_rank_whose_replacement_cannot_load_is_given_up_with_its_reason(
    make_group: Callable[..., WorkerGroup], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    group = make_group(ranks=1, broken=str(broken))
    broken.touch()
    os.kill(group.places[0].pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        _check_until_told(group)
    expected = r"rank 0 failed: ConfigError: no such folder \(attempt 3 .*\); node \w+, host [\w.]+, cpu"
    with pytest.raises(WorkerDiedError, match=expected):
        group.recover([0])


def test_a_rank_that_cannot_load_gives_its_own_error(make_group: Callable[..., WorkerGroup]) -> None:
    with pytest.raises(ConfigError, match=r"^no weights in this folder$"):
        make_group(ranks=1, load_error=ConfigError("no weights in this folder"))
    with pytest.raises(WorkerDiedError, match=r"worker rank 1 failed: MemoryError: 9 GiB; node \w+, host [\w.]+, cpu"):
        make_group(load_error=MemoryError("9 GiB"))


def test_a_rank_that_dies_while_loading_is_an_error_and_not_a_hang(
    make_group: Callable[..., WorkerGroup],
) -> None:
    with pytest.raises(WorkerDiedError, match="worker rank 0 failed: its process died"):
        make_group(ranks=1, leave_at_load=True)


def test_more_workers_than_the_cluster_holds_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size=64 requires 64 CPUs"):
        WorkerGroup(_config("large", 64), runner_factory=reducing_runner())
