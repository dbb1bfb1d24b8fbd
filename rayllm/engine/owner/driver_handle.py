"""A driver and its placement group in the hands of who made them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rayllm.config import RAY_NAMESPACE, ResolvedConfig
from rayllm.engine.discovery import driver_name, known_engines
from rayllm.engine.driver.actor import DriverActor
from rayllm.errors import ConfigError, EngineError, NodeLostError
from rayllm.executor.nodes import SILENCE_S, describe_lost, lost_nodes
from rayllm.executor.placement import bundle_nodes, create_placement_group, is_whole
from rayllm.executor.worker import RunnerFactory
from rayllm.executor.worker_process import WorkerPlace, await_ends, death_reason

_STAGE_POLL_S = 0.2
_NODE_LOOK_S = 1.0
_SHUTDOWN_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class DriverHandle:
    """A driver and its placement group, as their maker holds them; both go when the maker goes."""

    driver: Any
    placement_group: Any
    nodes: Mapping[int, str]
    """The node of each of its bundles, the driver's first, as they were placed: kept, since Ray may be gone when
    somebody asks."""

    def start(
        self,
        config: ResolvedConfig,
        on_stage: Callable[[str], None] | None = None,
        num_restarts: int = 0,
        previous_failure: str = "",
    ) -> ResolvedConfig:
        """Brings the engine up and returns when it serves: its config, with the context that fits. `on_stage` is called
        with each stage. The rest as for `Driver.start`.

        Raises the engine's own error (`ConfigError`, `EngineError` ...), without Ray's traceback, and `NodeLostError`.
        """
        import ray

        ready, last_stage = self.driver.start.remote(config.model_dump_json(), num_restarts, previous_failure), ""
        looked_s = time.monotonic()
        try:
            while not ray.wait([ready], timeout=_STAGE_POLL_S if on_stage else _NODE_LOOK_S)[0]:
                if time.monotonic() - looked_s >= _NODE_LOOK_S:
                    if lost := self.why_lost():
                        raise NodeLostError(f"the driver could not start: {lost}")
                    looked_s = time.monotonic()
                if on_stage is None:
                    continue
                with contextlib.suppress(ray.exceptions.GetTimeoutError):
                    stage = ray.get(self.driver.stage.remote(), timeout=_NODE_LOOK_S)
                    if stage != last_stage:
                        last_stage = stage
                        on_stage(stage)
            return ResolvedConfig.model_validate_json(ray.get(ready))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.RayActorError as error:
            raise EngineError(f"the driver died while it started: {death_reason(error)}") from None

    def lost_nodes(self, silence_s: float = SILENCE_S) -> dict[str, str]:
        """The lost ones among the nodes of its placement group, each with the reason."""
        return lost_nodes(self.nodes.values(), silence_s)

    def why_lost(self) -> str:
        """Why the driver's node is lost; empty where it is not."""
        return describe_lost(lost_nodes([self.node_id()]))

    def node_id(self) -> str:
        """The driver's node; empty where Ray had none for it."""
        return self.nodes.get(0, "")

    def is_local(self) -> bool:
        """Whether the driver is on this process's node."""
        import ray

        return bool(self.node_id() == ray.get_runtime_context().get_node_id())

    def close(self) -> None:
        """Ends driver and workers and gives the resources back."""
        from ray.util.placement_group import remove_placement_group

        self.end_driver(is_reachable=not self.why_lost())
        remove_placement_group(self.placement_group)

    def end_driver(self, *, is_reachable: bool = True) -> Any:
        """Ends driver and workers; returns the placement group, which is kept. One whose node is lost is only given up
        to Ray, which ends it should the node come back."""
        import ray

        place: WorkerPlace | None = None
        with contextlib.suppress(ray.exceptions.RayError):
            if is_reachable:
                place = ray.get(self.driver.shutdown.remote(), timeout=_SHUTDOWN_TIMEOUT_S)
        with contextlib.suppress(ray.exceptions.RayError):
            ray.kill(self.driver, no_restart=True)
        if place is not None and place.node_id == ray.get_runtime_context().get_node_id():
            await_ends([place])
        return self.placement_group


def create_driver(
    config: ResolvedConfig, runner_factory: RunnerFactory | None = None, previous_group: Any = None
) -> DriverHandle:
    """Places an engine and makes its driver actor, not yet started: call `driver.start.remote(config_json)`
    and ask `driver.stage` meanwhile. Raises `ConfigError` where there is no room or the name is taken.

    `previous_group` is the placement group of a driver of the same config that has ended: it is used again where all
    its places are still there, and removed where not.
    """
    import ray
    from ray.util.placement_group import remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    name = config.engine.name
    if name in known_engines():
        raise ConfigError(f"an engine named {name!r} is already running: give this one another name, or stop that one")
    if previous_group is not None and not is_whole(previous_group):
        remove_placement_group(previous_group)
        previous_group = None
    group = previous_group or create_placement_group(config)
    options: dict[str, Any] = {
        "name": driver_name(name),
        "namespace": RAY_NAMESPACE,
        "num_cpus": group.bundle_specs[0]["CPU"],
        "max_restarts": 0,
        "max_concurrency": 1000,
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0),
    }
    try:
        driver = ray.remote(DriverActor).options(**options).remote(group, runner_factory)
    except BaseException as error:
        remove_placement_group(group)
        if isinstance(error, ValueError):
            raise ConfigError(f"cannot make the driver of engine {name!r}: {error}") from None
        raise
    return DriverHandle(driver, group, bundle_nodes(group))
