"""Where an engine's processes go: one placement group, asked for only when the cluster is seen to have
room.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rayllm.config import ResolvedConfig, count_cores
from rayllm.errors import NoRoomError
from rayllm.executor.nodes import cluster_raylets, describe_lost, find_lost
from rayllm.executor.ray_private import free_resources

_SMALL_CPU_SHARE = 0.01
_CPUS_LEFT_FOR_OTHERS = 2
_STALE_VIEW_S = 0.8
"""Ray's view of what is free lags behind an engine that has just ended: look again for so long before
refusing.
"""
_LEAVING_S = 10.0
"""The place of a previous engine of this name, whose driver has ended, will be free."""
_CREATE_TIMEOUT_S = 15.0
_PROBE_S = 1.0
"""A node whose raylet does not answer within so long gets no part of an engine."""
_NODE_ID_LABEL = "ray.io/node-id"
_UNIQUE = "@"
"""Separates the part of a placement group's name that is shown from the part that makes it unique."""

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Node:
    """One machine of the cluster, as far as placement asks."""

    node_id: str
    total: Resources
    free: Resources


@dataclass(frozen=True)
class Placement:
    """Bundles to ask for: the driver's first, then one a rank."""

    bundles: list[dict[str, float]]
    strategy: str


def plan_placement(
    config: ResolvedConfig, nodes: Sequence[Node], holders: Sequence[str] = (), lost: Mapping[str, str] | None = None
) -> Placement:
    """Decides the bundles. Raises `NoRoomError` with what is asked, what is free and who holds the rest, and with the
    nodes that are `lost`, which are not among `nodes`, and why.

    Each process asks for one CPU where the nodes have that free and two more for others (Serve's replicas);
    else for 0.01 CPU, so that a small machine can hold an engine and its server: what a rank really uses is
    its number of threads, not this figure. With GPUs a rank asks for one. Ranks never outnumber the cluster's
    GPUs, or its CPUs when they compute there. All go on one node where one has room (STRICT_PACK), else on as
    few as possible (PACK).
    """
    ranks = config.engine.layout.num_ranks
    kind = "GPU" if config.device == "cuda" else "CPU"
    total = _sum(nodes, "total", kind)
    if ranks > total:
        raise NoRoomError(
            f"tensor_parallel_size={ranks} requires {ranks} {kind}s, one per worker, but the cluster has "
            f"{total:g}{_besides(lost)}: set tensor_parallel_size to {max(1, int(total))} or lower"
            + ("" if total or kind == "CPU" else ", or device='cpu'")
        )
    gpu = {"GPU": 1.0} if kind == "GPU" else {}
    for share in (1.0, _SMALL_CPU_SHARE):
        bundles = [{"CPU": share}] + [{**gpu, "CPU": share} for _ in range(ranks)]
        spare = _CPUS_LEFT_FOR_OTHERS if share == 1.0 else 0
        if any(_fits_one(bundles, node, spare) for node in nodes):
            return Placement(bundles, "STRICT_PACK")
        if len(nodes) > 1 and _fits_many(bundles, nodes, spare):
            return Placement(bundles, "PACK")
    asked = f"{ranks} GPUs and " * bool(gpu) + f"{_SMALL_CPU_SHARE * (ranks + 1):g} CPUs"
    raise _no_room(config, asked, kind, nodes, holders, lost)


def plan_rank(
    config: ResolvedConfig,
    bundle: Resources,
    nodes: Sequence[Node],
    holders: Sequence[str] = (),
    lost: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """The bundle to ask for where one rank alone, whose bundle was `bundle`, gets another place: the same, or its small
    share of a CPU. Raises `NoRoomError` as `plan_placement` does."""
    for share in (bundle["CPU"], _SMALL_CPU_SHARE):
        wanted = {**bundle, "CPU": share}
        if any(_fits_one([wanted], node, 0) for node in nodes):
            return wanted
    kind = "GPU" if "GPU" in bundle else "CPU"
    asked = "1 GPU and " * ("GPU" in bundle) + f"{_SMALL_CPU_SHARE:g} CPUs on one node"
    raise _no_room(config, asked, kind, nodes, holders, lost)


def _no_room(
    config: ResolvedConfig,
    asked: str,
    kind: str,
    nodes: Sequence[Node],
    holders: Sequence[str],
    lost: Mapping[str, str] | None,
) -> NoRoomError:
    free = ", ".join(
        f"{_sum(nodes, 'free', name):g} of {_sum(nodes, 'total', name):g} {name}s" for name in {kind: 0, "CPU": 0}
    )
    held = "; held by " + ", ".join(holders) if holders else "; held by other Ray actors and tasks"
    return NoRoomError(
        f"engine {config.engine.name!r} requires at least {asked}, but the Ray cluster has free "
        f"{free}{_besides(lost)}{held}: stop one of them, add a node, or ask for fewer workers (tensor_parallel_size)"
    )


def _besides(lost: Mapping[str, str] | None) -> str:
    return f" ({describe_lost(dict(lost))})" if lost else ""


def create_placement_group(config: ResolvedConfig) -> Any:
    """The engine's placement group, ready, on nodes that answer. Raises `NoRoomError` within seconds when the cluster
    has no room.

    It belongs to the calling job or actor and goes with it.
    """
    view, placement = _plan_when_settled(config)
    return _create(config, placement.bundles, placement.strategy, view.lost)


def create_rank_group(config: ResolvedConfig, bundle: Resources) -> Any:
    """A placement group of one bundle, for a rank whose own is on a lost node; the rest as above."""
    view = ClusterView.look()
    return _create(config, [plan_rank(config, bundle, view.nodes, _holders(), view.lost)], "PACK", view.lost)


def _create(config: ResolvedConfig, bundles: list[dict[str, float]], strategy: str, lost: Collection[str]) -> Any:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # Ray takes each name once, and that of a previous engine is given back only some time after its end.
    name = f"{_group_name(config)}{_UNIQUE}{secrets.token_hex(4)}"
    selectors = [{_NODE_ID_LABEL: f"!in({','.join(sorted(lost))})"}] * len(bundles) if lost else None
    group = placement_group(bundles, strategy=strategy, name=name, bundle_label_selector=selectors)
    try:
        ray.get(group.ready(), timeout=_CREATE_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        remove_placement_group(group)
        held = ", ".join(_holders()) or "nothing else is placed, try again"
        raise NoRoomError(
            f"Ray did not place engine {config.engine.name!r} ({bundles}, {strategy}) "
            f"within {_CREATE_TIMEOUT_S:g} s although the resources appeared to be free: {held}"
        ) from None
    return group


def give_back(group: Any) -> None:
    """Removes a placement group; what runs in it ends. One that is gone, or of a Ray that is, is no error."""
    from ray.util.placement_group import remove_placement_group

    with contextlib.suppress(Exception):
        remove_placement_group(group)


def is_whole(group: Any) -> bool:
    """Whether all its places are still there, as far as Ray knows."""
    from ray.util.placement_group import placement_group_table

    return bool(placement_group_table(group).get("state") == "CREATED")


def bundle_nodes(group: Any) -> dict[int, str]:
    """The node of each bundle, as far as it is placed."""
    from ray.util.placement_group import placement_group_table

    return {int(index): str(node) for index, node in placement_group_table(group)["bundles_to_node_id"].items() if node}


@dataclass(frozen=True)
class ClusterView:
    """The nodes that answer, and why the others of those that Ray counts as alive do not."""

    nodes: list[Node]
    lost: dict[str, str]

    @classmethod
    def look(cls) -> ClusterView:
        import ray

        own = ray.get_runtime_context().get_node_id()
        alive = [raylet for raylet in cluster_raylets() if raylet.is_alive and raylet.node_id != own]
        lost = find_lost(alive, _PROBE_S)
        return cls([node for node in cluster_nodes() if node.node_id not in lost], lost)


def _plan_when_settled(config: ResolvedConfig) -> tuple[ClusterView, Placement]:
    began_s = time.monotonic()
    patience_s = _STALE_VIEW_S
    while True:
        holders, view = _holders(), ClusterView.look()
        try:
            return view, plan_placement(config, view.nodes, holders, view.lost)
        except NoRoomError as error:
            if any(holder.startswith(f"{_group_name(config)} (") for holder in holders):
                patience_s = _LEAVING_S
            if "requires at least" not in str(error) or time.monotonic() - began_s > patience_s:
                raise
        time.sleep(0.1)


def _group_name(config: ResolvedConfig) -> str:
    return f"rayllm:{config.engine.name}"


def cluster_nodes() -> list[Node]:
    """The cluster's living nodes with what they have and what is free."""
    import ray

    free = free_resources()
    return [
        Node(node["NodeID"], node["Resources"], free.get(node["NodeID"], {})) for node in ray.nodes() if node["Alive"]
    ]


def cluster_devices() -> tuple[int, int]:
    """GPUs in the cluster and CPU cores of its largest node; of this machine, no more than it has."""
    nodes = cluster_nodes()
    num_cores = int(max((node.total.get("CPU", 0.0) for node in nodes), default=0.0))
    if len(nodes) == 1:
        num_cores = min(num_cores, count_cores())
    return int(_sum(nodes, "total", "GPU")), max(1, num_cores)


def _holders() -> list[str]:
    """Placement groups that hold something, as `name (4 GPU, 1 CPU)`; plain actors are not known by name
    to Ray.
    """
    from ray.util.placement_group import placement_group_table

    found = []
    for group in placement_group_table().values():
        if group["state"] in ("REMOVED", "PENDING"):
            continue
        held: dict[str, float] = {}
        for bundle in group["bundles"].values():
            for name, amount in bundle.items():
                held[name] = held.get(name, 0) + amount
        amounts = ", ".join(f"{amount:g} {name}" for name, amount in sorted(held.items()))
        name = group["name"].partition(_UNIQUE)[0] or f"placement group {group['placement_group_id'][:8]}"
        found.append(f"{name} ({amounts})")
    return found


def _sum(nodes: Sequence[Node], which: str, name: str) -> float:
    return sum(getattr(node, which).get(name, 0.0) for node in nodes)


def _fits_one(bundles: Sequence[Resources], node: Node, spare_cpus: float) -> bool:
    needed: dict[str, float] = {"CPU": float(spare_cpus)}
    for bundle in bundles:
        for name, amount in bundle.items():
            needed[name] = needed.get(name, 0.0) + amount
    return all(node.free.get(name, 0.0) >= amount - 1e-6 for name, amount in needed.items())


def _fits_many(bundles: Sequence[Resources], nodes: Sequence[Node], spare_cpus: float) -> bool:
    """Whether the bundles fit when each goes to the first node with room; the spare CPUs may be anywhere."""
    free = [dict(node.free) for node in nodes]
    for bundle in bundles:
        home = next((left for left in free if all(left.get(n, 0.0) >= a - 1e-6 for n, a in bundle.items())), None)
        if home is None:
            return False
        for name, amount in bundle.items():
            home[name] -= amount
    return sum(left.get("CPU", 0.0) for left in free) >= spare_cpus
