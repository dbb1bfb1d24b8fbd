"""Nodes of a Ray cluster are removed or frozen under streams: no token is lost, and /health says what happens.

`pytest -m slow -n 0 -s tests/chaos/test_node_losses.py` takes five minutes and prints the times of silence: a quiet
machine needs about half a second to notice a removed node and as long as a driver and its ranks take to start
elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from chaos.lost_nodes import Load, Nodes, Served, running_nodes
from tiny import make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(400)]

MAX_NOTICE_S = 3.0
MAX_FROZEN_NOTICE_S = 10.0
FLAGS = ("--tensor-parallel-size", "2", "--device", "cpu", "--driver-wait-s", "120")


@dataclass
class Running:
    nodes: Nodes
    served: Served
    undisturbed: list[str]

    def node_of(self, role: str) -> str:
        return self.served.nodes()[role]

    def check(self, load: Load, lost_at: float, notice_s: float) -> None:
        """Every answer is the undisturbed one's, and /health said so soon that there was none."""
        load.finish()
        assert load.texts == self.undisturbed
        begin, length = load.silence
        sick = [at for at, status, _ in load.health if at > lost_at and status != 200]
        print(f"silence {length:.1f} s; /health told of it after {sick[0] - lost_at:.1f} s" if sick else "no silence")
        assert sick, "/health never said that there was no progress"
        assert sick[0] - lost_at < notice_s
        during = [status for at, status, _ in load.health if sick[0] < at < begin + length - 1.0]
        assert set(during) <= {503}, f"/health was {during} while nothing came"
        assert self.served.health()[0] == 200


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("nodes") / "tiny", max_position_embeddings=1024)


def test_the_node_of_one_rank_is_removed_and_then_that_of_the_next_freezes(model: Path) -> None:
    """The first test: the others keep a cluster of their own."""
    with running_nodes(3) as nodes:
        nodes.fill(nodes.ids(), 3.985)  # each has room for one process of an engine
        with nodes.serving(model, *FLAGS) as served:
            with Load(served) as load:
                load.finish()
            running = Running(nodes, served, load.texts)
            nodes.add()
            where = served.nodes()
            lost = next(where[rank] for rank in ("worker 0", "worker 1") if where[rank] != where["driver"])
            for take_away in (nodes.remove, nodes.freeze):
                with Load(served) as load:
                    load.wait_flowing(200)
                    lost_at = time.monotonic()
                    take_away(lost)
                    running.check(load, lost_at, MAX_FROZEN_NOTICE_S)
                after = served.nodes()
                assert lost not in after.values()
                assert after["driver"] == where["driver"], "the driver lives on"
                nodes.add()
                lost = next(after[rank] for rank in ("worker 0", "worker 1") if after[rank] != after["driver"])


@pytest.fixture(scope="module")
def running(model: Path) -> Iterator[Running]:
    """Two nodes, one of which has all of the engine."""
    with running_nodes(2) as nodes, nodes.serving(model, *FLAGS) as served:
        with Load(served) as load:
            load.finish()
        yield Running(nodes, served, load.texts)


def test_the_node_of_driver_and_ranks_is_removed(running: Running) -> None:
    lost = running.node_of("driver")
    with Load(running.served) as load:
        load.wait_flowing(200)
        lost_at = time.monotonic()
        running.nodes.remove(lost)
        running.check(load, lost_at, MAX_NOTICE_S)
    assert lost not in running.served.nodes().values()


def test_the_node_of_driver_and_ranks_freezes(running: Running) -> None:
    running.nodes.add()
    frozen = running.node_of("driver")
    with Load(running.served) as load:
        load.wait_flowing(200)
        lost_at = time.monotonic()
        running.nodes.freeze(frozen)
        running.check(load, lost_at, MAX_FROZEN_NOTICE_S)
    assert frozen not in running.served.nodes().values()
    running.nodes.remove(frozen)


def test_another_node_is_lost_while_the_engine_starts_there(running: Running) -> None:
    running.nodes.add()
    running.nodes.add()
    with Load(running.served) as load:
        load.wait_flowing(200)
        lost_at = time.monotonic()
        running.nodes.remove(running.node_of("driver"))
        next_node = running.nodes.wait_for("ray::DriverActor")
        running.nodes.remove(next_node)
        running.check(load, lost_at, MAX_NOTICE_S)


def test_without_room_the_engine_waits_for_a_node_and_says_so(running: Running) -> None:
    with Load(running.served) as load:
        load.wait_flowing(200)
        lost_at = time.monotonic()
        for node in running.nodes.ids():
            running.nodes.remove(node)
        deadline = lost_at + 60
        while "waiting for free resources in the Ray cluster" not in (said := running.served.health()[1]):
            assert time.monotonic() < deadline, said
            time.sleep(0.2)
        assert "tensor_parallel_size=2 requires 2 CPUs, one per worker, but the cluster has 0" in said
        running.nodes.add()
        running.check(load, lost_at, MAX_NOTICE_S)
