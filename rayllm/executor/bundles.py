"""Where each process of an engine is put: the bundles of its placement group, and of those that replace lost ones."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import Any

from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllm.config import ResolvedConfig
from rayllm.executor.nodes import SILENCE_S, describe_lost, lost_nodes
from rayllm.executor.placement import bundle_nodes, create_placement_group, create_rank_group, give_back

log = logging.getLogger(__name__)


class Bundles:
    """Bundle 0 of the engine's placement group is the driver's, and the standby's with it; bundle r + 1 is rank r's. A
    rank whose node is lost gets a placement group of its own on another node (`move`).

    Without a `placement_group` it makes one, which goes with `close`. Raises `NoRoomError` where there is no room.
    """

    def __init__(self, config: ResolvedConfig, placement_group: Any = None):
        self._config = config
        self._own: list[Any] = []
        if placement_group is None:
            placement_group = create_placement_group(config)
            self._own.append(placement_group)
        self._group = placement_group
        self._moved: dict[int, Any] = {}

    def options(self, rank: int | None) -> dict[str, Any]:
        """Ray's options for the actor of a rank, or of the standby."""
        if rank is None:
            return {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": _in_bundle(self._group, 0)}
        group, index = self._place(rank)
        resources = group.bundle_specs[index]
        return {
            "num_cpus": resources.get("CPU", 0),
            "num_gpus": resources.get("GPU", 0),
            "scheduling_strategy": _in_bundle(group, index),
        }

    def node_of(self, rank: int) -> str:
        """The node that holds the rank's bundle; empty while Ray has none for it."""
        group, index = self._place(rank)
        return bundle_nodes(group).get(index, "")

    def node_ids(self) -> set[str]:
        """All nodes of the engine's placement group."""
        return set(bundle_nodes(self._group).values())

    def on_lost_nodes(self, ranks: Iterable[int], silence_s: float = SILENCE_S) -> dict[int, str]:
        """Those of the ranks whose bundle is on a lost node, each with the reason."""
        nodes = {rank: self.node_of(rank) for rank in ranks}
        lost = lost_nodes(set(nodes.values()), silence_s)
        return {rank: describe_lost({node: lost[node]}) for rank, node in nodes.items() if node in lost}

    def move(self, ranks: Collection[int]) -> None:
        """Gives each of the ranks, whose bundle's node is lost, one on a node that answers. Raises `NoRoomError`."""
        for rank in ranks:
            previous = self._moved.pop(rank, None)
            if previous is not None:
                self._own.remove(previous)
                give_back(previous)
                if self.node_of(rank) and not self.on_lost_nodes([rank]):
                    continue  # Ray has placed the first bundle anew in the meantime
            group = create_rank_group(self._config, self._group.bundle_specs[rank + 1])
            self._moved[rank] = group
            self._own.append(group)
            log.warning("worker rank %d moves to node %s", rank, self.node_of(rank)[:8])

    def close(self) -> None:
        """Gives back what was made here; idempotent."""
        for group in self._own:
            give_back(group)
        self._own = []

    def _place(self, rank: int) -> tuple[Any, int]:
        moved = self._moved.get(rank)
        return (self._group, rank + 1) if moved is None else (moved, 0)


def _in_bundle(group: Any, index: int) -> PlacementGroupSchedulingStrategy:
    return PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
