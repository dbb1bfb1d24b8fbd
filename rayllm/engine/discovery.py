"""Finds drivers in this process's Ray cluster by the name of their engine."""

from __future__ import annotations

import asyncio
from typing import Any

from rayllm.config import RAY_NAMESPACE
from rayllm.engine.address import DriverAddress
from rayllm.errors import EngineUnreachableError
from rayllm.executor.worker_process import death_reason

_CALL_TIMEOUT_S = 10.0
"""For a driver to answer a call. A driver on a lost node never does, and Ray notices that node's loss much later."""


def driver_name(engine: str) -> str:
    """The actor's name in `RAY_NAMESPACE`."""
    return f"rayllm:{engine}:driver"


def known_engines(namespace: str = RAY_NAMESPACE) -> list[str]:
    """Names of the engines whose driver is alive in this Ray cluster, sorted."""
    import ray

    names = [
        actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == namespace
    ]
    prefix, suffix = driver_name("|").split("|")
    return sorted(n[len(prefix) : -len(suffix)] for n in names if n.startswith(prefix) and n.endswith(suffix))


def find_driver(engine: str, namespace: str = RAY_NAMESPACE) -> Any:
    """The driver's actor handle. Raises `EngineUnreachableError`, which names the engines that do run."""
    import ray

    if not ray.is_initialized():
        raise EngineUnreachableError(
            f"cannot look for engine {engine!r}: not connected to Ray, call ray.init(address='auto')"
        )
    try:
        return ray.get_actor(driver_name(engine), namespace=namespace)
    except ValueError:
        running = ", ".join(repr(name) for name in known_engines(namespace)) or "none"
        raise EngineUnreachableError(f"no engine named {engine!r} in this Ray cluster; running: {running}") from None


async def find_address(engine: str, namespace: str = RAY_NAMESPACE) -> DriverAddress:
    """Where the engine of that name takes clients from this process's node. Raises `EngineUnreachableError`."""
    import ray

    driver = find_driver(engine, namespace)
    try:
        asked = driver.address.remote(ray.get_runtime_context().get_node_id())
        address: DriverAddress = await asyncio.wait_for(asked, _CALL_TIMEOUT_S)
    except asyncio.TimeoutError:
        message = f"the driver of engine {engine!r} did not answer within {_CALL_TIMEOUT_S:g} s"
        raise EngineUnreachableError(message) from None
    except ray.exceptions.RayActorError as error:
        raise EngineUnreachableError(f"the driver of engine {engine!r} is gone: {death_reason(error)}") from None
    except ray.exceptions.RayTaskError as error:
        raise EngineUnreachableError(f"engine {engine!r} cannot be used: {error.cause}") from None
    return address
