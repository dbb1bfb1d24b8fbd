from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from fakes import fake_config

from rayllm.distributed.links import Link
from rayllm.errors import EngineError, WorkerDiedError
from rayllm.executor import rank_actors
from rayllm.executor.rank_actors import RankActors
from rayllm.executor.worker_process import WorkerPlace


class _Actor:
    """Its methods give their result at once, as references do; those in `silent` never do."""

    def __init__(self, rank: int | None, silent: tuple[str, ...] = ()):
        self.rank, self.silent = rank, silent

    def __getattr__(self, method: str) -> Any:
        result = ("nothing", self.rank) if method in self.silent else (method, self.rank)
        call = SimpleNamespace(remote=lambda *arguments: (*result, *arguments))
        call.options = lambda concurrency_group: call
        return call


class _Bundles:
    def __init__(self, nodes: set[str], lost: dict[int, str]):
        self._nodes, self.lost, self.moved = nodes, lost, list[list[int]]()

    def node_ids(self) -> set[str]:
        return self._nodes

    def on_lost_nodes(self, ranks: Any) -> dict[int, str]:
        return {rank: reason for rank, reason in self.lost.items() if rank in ranks}

    def move(self, ranks: list[int]) -> None:
        self.moved.append(ranks)


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Ray, as far as actors are called: every reference is done, but for those of silent methods."""

    def wait(refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        done = [ref for ref in refs if ref[0] != "nothing"][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    context = SimpleNamespace(get_node_id=lambda: "here")
    fake = SimpleNamespace(
        get_runtime_context=lambda: context, wait=wait, get=lambda ref: ref, killed=[],
        exceptions=SimpleNamespace(RayError=RuntimeError),
        kill=lambda actor, no_restart: fake.killed.append(actor.rank),
    )  # fmt: skip
    monkeypatch.setattr(rank_actors, "ray", fake)
    monkeypatch.setattr(rank_actors, "raise_ended", lambda refs, is_first_load: None)
    monkeypatch.setattr(rank_actors, "kill_process", lambda place: None)
    return fake


def _actors(nodes: tuple[str, ...] = ("here",), lost: dict[int, str] | None = None, **silent: Any) -> RankActors:
    """Two ranks, rank r on `nodes[r]`, or both on the only one."""
    config = fake_config(engine={"tensor_parallel_size": 2})
    actors = RankActors(config, _Bundles(set(nodes), lost or {}), None)  # type: ignore[arg-type]
    for rank in (0, 1):
        place = WorkerPlace(os.getpid(), nodes[min(rank, len(nodes) - 1)], "host", ("cpu",))
        actors.adopt(rank, _Actor(rank, silent.get(f"rank{rank}", ())), place)
    return actors


def test_a_call_brings_the_answer_of_each_rank() -> None:
    assert _actors().call([0, 1], "join", "store") == {0: ("join", 0, "store"), 1: ("join", 1, "store")}


def test_a_rank_that_does_not_respond_ends_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_actors, "_QUIET_S", 0.0)
    actors = _actors(rank1=("load", "alive"))
    actors.has_started = True
    with pytest.raises(WorkerDiedError, match="rank 1 failed: its process did not respond within 15 s"):
        actors.call([0, 1], "load")


def test_a_rank_whose_node_is_lost_ends_a_call_with_the_reason() -> None:
    actors = _actors(("here", "there"), {1: "node there is lost"}, rank1=("load",))
    with pytest.raises(WorkerDiedError, match="rank 1 failed: node there is lost"):
        actors.call([0, 1], "load")


def test_a_call_ends_when_the_engine_is_being_closed() -> None:
    actors = _actors()
    actors.closed = True
    with pytest.raises(EngineError, match="is being closed"):
        actors.call([0, 1], "load")


def test_nodes_are_asked_only_where_there_are_several() -> None:
    assert _actors(lost={0: "lost"}).on_lost_nodes([0, 1]) == {}
    actors = _actors(("here", "there"), {1: "lost"})
    assert actors.on_lost_nodes([0, 1]) == {1: "lost"}
    actors.leave_lost_nodes([0, 1])
    assert actors._bundles.moved == [[1]]  # type: ignore[attr-defined]


def test_silent_ranks_are_those_that_do_not_answer_and_first_those_on_lost_nodes() -> None:
    assert _actors().silent() == []
    assert _actors(rank1=("alive",)).silent() == [1]
    both_silent = {"rank0": ("alive",), "rank1": ("alive",)}
    assert _actors(("here", "there"), {1: "lost"}, **both_silent).silent() == [1]


def test_survivors_that_do_not_leave_their_step_are_found_though_aborted() -> None:
    assert _actors().settle({0: ("run", 0), 1: ("nothing", 1)}, settle_s=0.0) == {1}
    assert _actors().settle({}, settle_s=0.0) == set()


def test_links_are_summed_up_and_a_bad_one_is_named_with_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = _actors(("node-a-very-long-id", "node-b-very-long-id"))
    seen = {0: [Link(0, 1, 12.0, 40.0)], 1: [Link(1, 0, 15.0, 38.5)]}
    monkeypatch.setattr(actors, "call", lambda ranks, method: seen)
    assert actors.check_links() == "1 links between ranks: 12-15 us, 38.5-40 GB/s"
    seen[1] = [Link(1, 0, problem="got no answer within 5 s")]
    with pytest.raises(EngineError) as raised:
        actors.check_links()
    assert str(raised.value).startswith(
        "workers do not reach each other: rank 0 (node node-a-v, host host, cpu) and rank 1 (node node-b-v, host host, "
        "cpu): rank 1 got no answer within 5 s. Check cables"
    )
    assert raised.value.code == "bad_link"


def test_survivors_of_a_failed_start_that_are_not_free_again_are_found() -> None:
    assert _actors().release([0, 1]) == set()
    assert _actors(rank1=("place",)).release([0, 1]) == {1}
    assert _actors().release([]) == set()


def test_a_rank_sees_all_gpus_of_the_engine_on_its_node_and_late_ones_come_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actors, calls = _actors(), list[Any]()
    monkeypatch.setattr(actors, "begin", lambda ranks, *call: calls.append((ranks, *call)))
    for rank, devices in enumerate((("cuda:5",), ("cuda:2",))):
        actors.places[rank] = WorkerPlace(1, "here", "host", devices)
    actors.show_gpus([0, 1])
    assert calls == [([0], "show_gpus", ("5", "2"), "5"), ([1], "show_gpus", ("5", "2"), "2")]
    actors.places[0] = WorkerPlace(2, "here", "host", ("cuda:0",))
    actors.places[1] = WorkerPlace(3, "there", "host", ("cuda:2",))
    calls.clear()
    actors.show_gpus([0, 1])
    assert calls == [([0], "show_gpus", ("5", "2", "0"), "0"), ([1], "show_gpus", ("2",), "2")]


def test_ranks_on_cpus_are_shown_no_gpus() -> None:
    actors = _actors(rank0=("show_gpus",))
    actors.show_gpus([0, 1])
    assert actors._node_gpus == {"here": []}


def test_an_ended_rank_is_killed_and_has_no_weights_any_more(ray: SimpleNamespace) -> None:
    actors = _actors()
    actors.loaded.update({0, 1})
    assert actors.end([1]) == {1}
    assert (ray.killed, actors.loaded) == ([1], {0})


def test_a_rank_is_described_by_its_node_host_and_devices() -> None:
    actors = _actors(("there",))
    assert actors.describe(0) == "node there, host host, cpu"
    assert actors.describe(5) == "its process was not placed on a node yet"


def test_who_waits_for_an_answer_may_look_at_progress_meanwhile(ray: SimpleNamespace) -> None:
    actors, waits = _actors(rank1=("load",)), list[int]()

    def give_up() -> None:
        waits.append(1)
        if len(waits) == 3:
            raise EngineError("enough")

    with pytest.raises(EngineError, match="enough"):
        actors.call((0, 1), "load", on_wait=give_up)


def test_progress_is_the_sum_of_the_ranks_that_answer(ray: SimpleNamespace) -> None:
    ray.get = lambda ref: (10 * (ref[1] + 1), 100)
    assert _actors().progress((0, 1)) == (30, 200)
    assert _actors(rank0=("progress",)).progress((0, 1)) == (20, 100)
    assert _actors(rank0=("progress",), rank1=("progress",)).progress((0, 1)) == (0, 0)
