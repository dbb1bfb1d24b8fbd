"""Worker actors in a placement group, their readiness and their liveness, behind the `Executor` interface."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.util.placement_group import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayllm.config import ResolvedConfig
from rayllm.errors import EngineError, RayLLMError, WorkerDiedError
from rayllm.executor.channel import Channel, Listener
from rayllm.executor.executor import Selectable
from rayllm.executor.fanout import WorkerLinks
from rayllm.executor.inproc import one_line
from rayllm.executor.placement import create_placement_group
from rayllm.executor.worker import (
    END_TIMEOUT_S,
    LOOPBACK,
    RunnerFactory,
    WorkerActor,
    WorkerPlace,
    await_ends,
    death_reason,
    worker_environment,
)
from rayllm.messages import StepPlan, StepResult

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 30.0

Stage = Callable[[str], None]


class WorkerGroup:
    """All ranks of one engine as worker actors: an `Executor` of depth 2.

    Ready when constructed; `on_stage` is told in a few words what is being waited for. Raises `ConfigError`
    where the cluster has no room, the runner's own error where a rank cannot load, `WorkerDiedError` where
    one dies on the way. Without a `placement_group` it makes one, and removes it at `close`.
    """

    pipeline_depth = 2

    def __init__(
        self,
        config: ResolvedConfig,
        on_stage: Stage = lambda stage: None,
        placement_group: Any = None,
        runner_factory: RunnerFactory | None = None,
    ):
        self._config = config
        self._on_stage = on_stage
        self._owned_group: Any = None
        self._own_node = ray.get_runtime_context().get_node_id()
        self._actors: list[Any] = []
        self._links: WorkerLinks | None = None
        self._run_refs: list[Any] = []
        self._watcher: threading.Thread | None = None
        self.num_blocks = 0
        self.places: list[WorkerPlace] = []
        try:
            if placement_group is None:
                on_stage("placing workers")
                placement_group = self._owned_group = create_placement_group(config)
            self._start(placement_group, runner_factory)
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------------------------------- the Executor

    def send(self, plan: StepPlan) -> None:
        self._connected().send(plan)

    def receive(self, timeout_s: float | None) -> StepResult:
        return self._connected().receive(timeout_s)

    def check(self) -> None:
        self._connected().check()

    def result_socket(self) -> Selectable | None:
        return self._connected().result_socket()

    def close(self) -> None:
        """Ends all workers and waits until Ray has seen them end."""
        if self._links is not None:
            self._links.close()
        for actor in self._actors:
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        await_ends(place for place in self.places if place.node_id == self._own_node)
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(END_TIMEOUT_S)
        self._actors, self._run_refs, self._watcher, self.places = [], [], None, []
        if self._owned_group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._owned_group)
            self._owned_group = None

    # ------------------------------------------------------------------------------------------------ start

    def _start(self, placement_group: Any, runner_factory: RunnerFactory | None) -> None:
        size = self._config.engine.tensor_parallel_size
        nodes = {*placement_group_table(placement_group)["bundles_to_node_id"].values(), self._own_node}
        single_node = len(nodes) == 1
        self._on_stage(f"starting {size} worker{'s' * (size > 1)}")
        environment = worker_environment(self._config, single_node)
        self._actors = [
            _create_actor(self._config, rank, placement_group, environment, runner_factory) for rank in range(size)
        ]
        self.places = self._all([actor.place.remote() for actor in self._actors])
        store = None
        if size > 1:
            host = LOOPBACK if single_node else self.places[0].host
            store = self._all([self._actors[0].open_store.remote(host)])[0]
        self._on_stage("loading weights")
        self.num_blocks = min(self._all([actor.load.remote(store) for actor in self._actors]))
        self._on_stage("warming up")
        self._all([actor.start.remote(self.num_blocks) for actor in self._actors])
        self._links = WorkerLinks(self._connect(single_node))
        self._watcher = threading.Thread(target=self._watch, name="worker-watch", daemon=True)
        self._watcher.start()

    def _connect(self, single_node: bool) -> list[Channel]:
        """Has every rank run, and returns their channels in order of rank. The listener lives only this
        long.
        """
        token = secrets.token_hex(16)
        listener = Listener(token, None if single_node else ray.util.get_node_ip_address())
        channels: dict[int, Channel] = {}
        try:
            self._run_refs = [actor.run.remote(listener.address, token) for actor in self._actors]
            deadline = time.monotonic() + _CONNECT_TIMEOUT_S
            while len(channels) < len(self._actors):
                try:
                    channel = listener.accept(0.5)
                except TimeoutError:
                    self._raise_ended(self._run_refs)
                    if time.monotonic() > deadline:
                        missing = sorted({*range(len(self._actors))} - {*channels})
                        raise EngineError(
                            f"worker ranks {missing} did not connect in {_CONNECT_TIMEOUT_S:g} s"
                        ) from None
                    continue
                channels[int(channel.peer)] = channel
        except BaseException:
            for channel in channels.values():
                channel.close()
            raise
        finally:
            listener.close()
        for rank, channel in channels.items():
            channel.admit(f"worker rank {rank}")
        return [channels[rank] for rank in range(len(self._actors))]

    def _all(self, refs: Sequence[Any]) -> list[Any]:
        """Every rank's answer; the first failure ends the wait."""
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            self._raise_ended(done, refs)
        return ray.get(list(refs))

    def _raise_ended(self, candidates: Sequence[Any], refs: Sequence[Any] | None = None) -> None:
        refs = candidates if refs is None else refs
        for ref in ray.wait(list(candidates), num_returns=len(candidates), timeout=0)[0]:
            try:
                ray.get(ref)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                if isinstance(cause, RayLLMError):
                    raise cause from None
                raise WorkerDiedError(refs.index(ref), one_line(cause)) from error
            except ray.exceptions.RayError as error:
                raise WorkerDiedError(refs.index(ref), death_reason(error)) from error

    # ----------------------------------------------------------------------------------------------- liveness

    def _watch(self) -> None:
        """Waits for any `run` to return: none does while all is well. Ends when all have."""
        ranks, links = {ref: rank for rank, ref in enumerate(self._run_refs)}, self._connected()
        while ranks:
            try:
                done, _ = ray.wait(list(ranks), num_returns=1)
            except Exception:  # Ray itself was shut down, the workers with it
                for rank in ranks.values():
                    links.report_loss(rank, "Ray was shut down")
                return
            for ref in done:
                links.report_loss(ranks.pop(ref), _end_reason(ref))

    def _connected(self) -> WorkerLinks:
        assert self._links is not None, "the group is not ready"
        return self._links


def _create_actor(
    config: ResolvedConfig,
    rank: int,
    group: Any,
    environment: dict[str, str],
    runner_factory: RunnerFactory | None,
) -> Any:
    bundle = group.bundle_specs[rank + 1]
    options = {
        "num_cpus": bundle["CPU"],
        "num_gpus": bundle.get("GPU", 0),
        "max_restarts": 0,
        "runtime_env": {"env_vars": environment},
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank + 1),
    }
    return ray.remote(WorkerActor).options(**options).remote(config, rank, runner_factory)


def _end_reason(ref: Any) -> str:
    try:
        reason = ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        return one_line(error.cause)
    except Exception as error:
        return death_reason(error)
    return reason or "it stopped serving"
