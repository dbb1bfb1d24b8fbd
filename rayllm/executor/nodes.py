"""Which nodes of the Ray cluster answer, asked of the nodes themselves.

Ray declares a node dead about 14 s after its raylet ended, and a minute after it froze (`RAY_health_check_*`). Until
then it counts the node's resources as free and places actors there. The port of a raylet tells within milliseconds
whether its process is gone, and within seconds whether it is frozen or its machine unreachable.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

SILENCE_S = 3.0
"""A raylet that does not answer for so long is lost. One on a busy machine answers within some tens of milliseconds."""
_MAX_PROBES = 64
# A client's first bytes in HTTP/2 (RFC 9113, 3.4), with an empty SETTINGS frame: a server answers with its own SETTINGS
# before any request, without authentication. One that wants TLS closes the connection, which is an answer too.
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])


@dataclass(frozen=True)
class Raylet:
    """Where a node's raylet listens; `is_alive` is what Ray knows of it."""

    node_id: str
    host: str
    port: int
    is_alive: bool = True


def why_lost(raylet: Raylet, silence_s: float = SILENCE_S) -> str:
    """Why this node is lost; empty where it answers. Takes up to `silence_s` for one that is silent."""
    if not raylet.is_alive:
        return "Ray declared it dead"
    where, deadline = f"{raylet.host}:{raylet.port}", time.monotonic() + silence_s
    try:
        with socket.create_connection((raylet.host, raylet.port), timeout=silence_s) as connection:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            connection.sendall(_HTTP2_PREFACE)
            connection.recv(1)
    except ConnectionRefusedError:
        return f"nothing listens at its raylet's address {where}"
    except ConnectionError:
        return ""  # a process closed the connection: it lives
    except OSError as error:  # a time-out, or no route to the host
        return f"its raylet at {where} did not answer within {silence_s:g} s ({error.strerror or 'timed out'})"
    return ""


def find_lost(
    raylets: Iterable[Raylet], silence_s: float = SILENCE_S, wanted: Collection[str] | None = None
) -> dict[str, str]:
    """The lost ones among these nodes, each with the reason; all are asked at once. `wanted` limits it to nodes of
    these ids, of which one that is not among the raylets is lost too."""
    raylets = [raylet for raylet in raylets if wanted is None or raylet.node_id in wanted]
    reasons: dict[str, str] = {}
    if raylets:
        with ThreadPoolExecutor(min(len(raylets), _MAX_PROBES), thread_name_prefix="node-probe") as pool:
            found = pool.map(lambda raylet: why_lost(raylet, silence_s), raylets)
            reasons = {raylet.node_id: reason for raylet, reason in zip(raylets, found, strict=True) if reason}
    known = {raylet.node_id for raylet in raylets}
    return reasons | {node_id: "Ray no longer lists it" for node_id in wanted or () if node_id not in known}


def cluster_raylets() -> list[Raylet]:
    """All nodes that Ray knows or knew."""
    import ray

    return [
        Raylet(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerPort"], node["Alive"])
        for node in ray.nodes()
    ]


def lost_nodes(node_ids: Iterable[str], silence_s: float = SILENCE_S) -> dict[str, str]:
    """Those of the cluster's nodes that are lost, each with the reason; this process's own node never is."""
    import ray

    wanted = {*node_ids} - {"", ray.get_runtime_context().get_node_id()}
    return find_lost(cluster_raylets(), silence_s, wanted) if wanted else {}


def describe_lost(lost: dict[str, str]) -> str:
    """`node 1a2b3c4d is lost: ...`, for an error or a log line."""
    return "; ".join(f"node {node_id[:8]} is lost: {reason}" for node_id, reason in sorted(lost.items()))
