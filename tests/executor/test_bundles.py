from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fakes import fake_config

from rayllm.errors import NoRoomError
from rayllm.executor import bundles
from rayllm.executor.bundles import Bundles


@dataclass(eq=False)
class _Group:
    nodes: dict[int, str]
    bundle_specs: list[dict[str, float]] = field(default_factory=lambda: [{"CPU": 1.0}] * 3)


class _Cluster:
    """Nodes that may be lost, and groups for single ranks, each on the next free node."""

    def __init__(self) -> None:
        self.lost: set[str] = set()
        self.free = ["c", "d"]
        self.given_back: list[_Group] = []

    def lost_nodes(self, nodes: Iterable[str], silence_s: float) -> dict[str, str]:
        return {node: "nothing listens" for node in nodes if node in self.lost}

    def create_rank_group(self, config: Any, bundle: dict[str, float]) -> _Group:
        if not self.free:
            raise NoRoomError("no room")
        return _Group({0: self.free.pop(0)}, [bundle])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> _Cluster:
    cluster = _Cluster()
    monkeypatch.setattr(bundles, "lost_nodes", cluster.lost_nodes)
    monkeypatch.setattr(bundles, "create_rank_group", cluster.create_rank_group)
    monkeypatch.setattr(bundles, "bundle_nodes", lambda group: group.nodes)
    monkeypatch.setattr(bundles, "give_back", cluster.given_back.append)
    return cluster


def test_ranks_on_a_lost_node_are_named_with_the_reason(cluster: _Cluster) -> None:
    placed = Bundles(fake_config(), _Group({0: "a", 1: "a", 2: "b"}))
    assert placed.on_lost_nodes([0, 1]) == {}
    cluster.lost = {"b"}
    assert placed.on_lost_nodes([0, 1]) == {1: "node b is lost: nothing listens"}
    assert placed.on_lost_nodes([0]) == {}
    assert placed.node_ids() == {"a", "b"}


def test_a_rank_moves_alone_and_gives_its_second_place_back_when_that_is_lost_too(cluster: _Cluster) -> None:
    placed = Bundles(fake_config(), _Group({0: "a", 1: "a", 2: "b"}))
    cluster.lost = {"b"}
    placed.move([1])
    assert (placed.node_of(0), placed.node_of(1)) == ("a", "c")
    assert placed.options(1)["num_cpus"] == 1.0
    cluster.lost = {"b", "c"}
    placed.move([1])
    assert placed.node_of(1) == "d"
    assert [group.nodes for group in cluster.given_back] == [{0: "c"}]
    cluster.lost |= {"d"}
    with pytest.raises(NoRoomError):
        placed.move([1])
    placed.close()
    assert [group.nodes for group in cluster.given_back] == [{0: "c"}, {0: "d"}]


def test_a_rank_goes_back_to_the_engines_group_once_ray_has_placed_its_bundle_anew(cluster: _Cluster) -> None:
    group = _Group({0: "a", 1: "a", 2: "b"})
    placed = Bundles(fake_config(), group)
    cluster.lost = {"b"}
    placed.move([1])
    group.nodes[2] = "e"
    cluster.lost = {"b", "c"}
    placed.move([1])
    assert placed.node_of(1) == "e"
    assert cluster.free == ["d"]
