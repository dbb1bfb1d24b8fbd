from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from rayllm.errors import WorkerDiedError
from rayllm.executor.channel import Channel
from rayllm.executor.fanout import WorkerLinks
from rayllm.messages import Abort, RowParams, RowStart, StepPlan, StepResult, WorkerFailure
from rayllm.request import pack_ids


class _Workers:
    """Two ranks by hand: `ends` are their sides of the channels."""

    def __init__(self) -> None:
        pairs = [socket.socketpair() for _ in range(2)]
        self.links = WorkerLinks([Channel(ours, f"worker rank {rank}") for rank, (ours, _) in enumerate(pairs)])
        self.ends = [Channel(theirs, "the driver") for _, theirs in pairs]

    def plan(self, rank: int) -> StepPlan:
        return msgspec.msgpack.decode(self.ends[rank].receive(5.0), type=StepPlan)

    def answer(self, step: int) -> None:
        self.ends[0].send(_result(step))


@pytest.fixture
def workers() -> Iterator[_Workers]:
    workers = _Workers()
    yield workers
    workers.links.close()
    for end in workers.ends:
        end.close()


def _plan(step: int, num_tokens: int = 0) -> StepPlan:
    new = RowStart(0, pack_ids([7] * num_tokens), 0, 0, [], RowParams(), 0, 0)
    return StepPlan(step, 0, b"", [new] if num_tokens else [], b"", b"", b"", b"", 0)


def _result(step: int, num_bytes: int = 4) -> StepResult:
    return StepResult(step, 0, b"", b"x" * num_bytes, {}, {}, 0.0)


def test_every_rank_gets_the_plan_and_rank_0_answers(workers: _Workers) -> None:
    workers.links.send(_plan(1))
    assert [workers.plan(0).step, workers.plan(1).step] == [1, 1]
    workers.answer(1)
    assert workers.links.receive(5.0).step == 1


def test_two_plans_may_be_under_way_and_results_come_in_their_order(workers: _Workers) -> None:
    workers.links.send(_plan(1))
    workers.links.send(_plan(2))
    workers.answer(1)
    workers.answer(2)
    assert [workers.links.receive(5.0).step, workers.links.receive(5.0).step] == [1, 2]


def test_no_result_is_a_timeout_and_the_result_still_comes(workers: _Workers) -> None:
    workers.links.send(_plan(1))
    with pytest.raises(TimeoutError, match="no result"):
        workers.links.receive(0.01)
    workers.answer(1)
    assert workers.links.receive(5.0).step == 1


def test_a_result_makes_the_result_socket_readable(workers: _Workers) -> None:
    fd = workers.links.result_socket().fileno()
    assert not select.select([fd], [], [], 0)[0]
    workers.answer(1)
    assert select.select([fd], [], [], 5.0)[0]


def test_a_plan_larger_than_the_sockets_does_not_wait_for_a_busy_worker(workers: _Workers) -> None:
    """Rank 0 is held up by a large result meanwhile: a driver that waited to send would never read it."""
    workers.links.send(_plan(1, num_tokens=1_000_000))
    workers.links.send(_plan(2))
    steps: list[int] = []

    def work(rank: int) -> None:
        if rank == 0:
            workers.ends[0].send(_result(0, num_bytes=4_000_000))
        for _ in range(2):
            plan = workers.plan(rank)
            assert len(plan.new_rows) == (plan.step == 1)
            steps.append(plan.step)
            if rank == 0:
                workers.answer(plan.step)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    assert [workers.links.receive(10.0).step for _ in range(3)] == [0, 1, 2]
    # Rank 1's share may still wait here: it goes out while the next result is awaited.
    with pytest.raises(TimeoutError):
        workers.links.receive(0.5)
    for thread in threads:
        thread.join()
    assert sorted(steps) == [1, 1, 2, 2]


def test_the_end_of_a_worker_is_told_with_its_rank_and_stays(workers: _Workers) -> None:
    workers.links.send(_plan(1))
    workers.ends[1].close()
    for _ in range(2):
        with pytest.raises(WorkerDiedError, match="worker rank 1 failed: worker rank 1 is gone"):
            workers.links.receive(5.0)
    with pytest.raises(WorkerDiedError, match="rank 1"):
        workers.links.check()
    workers.links.send(_plan(2))  # quietly: it is `receive` that tells


def test_a_worker_that_is_gone_is_noticed_without_a_plan(workers: _Workers) -> None:
    workers.links.check()
    workers.ends[0].close()
    assert select.select([workers.links.result_socket().fileno()], [], [], 5.0)[0]
    with pytest.raises(WorkerDiedError, match="rank 0"):
        workers.links.check()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_says_it_failed_is_quoted(workers: _Workers, rank: int) -> None:
    workers.links.send(_plan(1))
    workers.ends[rank].send(WorkerFailure(rank, 0, "OutOfMemoryError: 3 GiB"))
    workers.ends[rank].close()
    with pytest.raises(WorkerDiedError) as failure:
        workers.links.receive(5.0)
    assert (failure.value.rank, failure.value.reason) == (rank, "OutOfMemoryError: 3 GiB")


def test_a_death_is_blamed_and_not_the_peer_whose_collective_it_broke(workers: _Workers) -> None:
    workers.links.send(_plan(1))
    workers.ends[0].send(WorkerFailure(0, 0, "gloo: connection closed by peer"))
    workers.ends[0].close()
    threading.Timer(0.02, workers.ends[1].close).start()
    with pytest.raises(WorkerDiedError) as failure:
        workers.links.receive(5.0)
    assert failure.value.rank == 1


def test_the_cause_that_ray_names_replaces_a_bare_end_of_stream(workers: _Workers) -> None:
    workers.ends[1].close()
    threading.Timer(0.02, workers.links.report_loss, (1, "killed by the OOM killer")).start()
    with pytest.raises(WorkerDiedError, match="worker rank 1 failed: killed by the OOM killer"):
        workers.links.receive(5.0)


def test_a_loss_reported_from_another_thread_wakes_the_wait(workers: _Workers) -> None:
    threading.Timer(0.05, workers.links.report_loss, (1, "its node is gone")).start()
    with pytest.raises(WorkerDiedError, match="its node is gone"):
        workers.links.receive(None)


def test_a_frame_that_is_no_result_is_a_failure_of_its_sender(workers: _Workers) -> None:
    workers.ends[0].send(Abort(1))
    with pytest.raises(WorkerDiedError, match="rank 0 failed: it sent a frame that is neither a result nor a failure"):
        workers.links.receive(5.0)


def test_closing_ends_the_workers_stream_and_may_be_repeated(workers: _Workers) -> None:
    workers.links.close()
    workers.links.close()
    workers.links.report_loss(0, "after the close")
    assert workers.ends[0].sock.recv(1) == workers.ends[1].sock.recv(1) == b""
