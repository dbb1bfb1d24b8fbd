"""Worker actors in a placement group, their readiness, liveness and replacement, behind the `Executor` interface."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import ray

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError, EngineError, WorkerDiedError
from rayllm.executor.bundles import Bundles
from rayllm.executor.channel import Channel, Listener
from rayllm.executor.executor import Selectable
from rayllm.executor.fanout import WorkerLinks
from rayllm.executor.rank_calls import raise_ended, start_watches
from rayllm.executor.stopwatch import Stopwatch
from rayllm.executor.worker import RunnerFactory
from rayllm.executor.worker_actor import WorkerActor
from rayllm.executor.worker_process import (
    END_TIMEOUT_S,
    LOOPBACK,
    WorkerPlace,
    await_ends,
    is_stopped,
    kill_process,
    last_error,
    log_tail,
    worker_environment,
)
from rayllm.messages import StepPlan, StepResult

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 1.0
"""For a rank in its steps to say that it lives."""
_BUSY_ANSWER_TIMEOUT_S = 4.0
"""More of the same where its process is not seen to be stopped: the machine may be overloaded."""
_QUIET_S = 5.0
_NODE_LOOK_S = 1.0
"""How often to look at the nodes of ranks that are waited for, while they start."""
_START_ANSWER_TIMEOUT_S = 15.0
"""The same for a rank that starts, asked after `_QUIET_S`: loading a library can hold up all of a process's threads."""
_FIRST_START_ANSWER_TIMEOUT_S = 60.0
"""The same while no request waits for the engine yet: on a busy machine it may well start slowly."""
_SETTLE_S = 5.0
"""For survivors to notice that their peer or the driver has left them."""
_REMOTE_SETTLE_S = 0.5
"""The same before they are told, where a lost peer is on another node: the end of its connections may never come."""
_MAX_ATTEMPTS = 3
_STANDBY_DELAY_S = 1.0
_HEALTH = "health"

Stage = Callable[[str], None]


class WorkerGroup:
    """All ranks of one engine as worker actors: an `Executor`.

    Ready when constructed; `on_stage` is told in a few words what is being waited for. Raises `ConfigError`
    where the cluster has no room, the runner's own error where a rank cannot load, `WorkerDiedError` where
    one dies on the way. Without a `placement_group` it makes one, and removes it at `close`.

    A group of ranks that compute together lives until one of them is lost. `recover` fills the place of the lost one,
    from the standby where there is one, and joins all in a new group: new store, new sockets, new token, so that
    nothing which the old group may yet say is heard.
    """

    max_inflight_steps = 2

    def __init__(
        self,
        config: ResolvedConfig,
        on_stage: Stage = lambda stage: None,
        placement_group: Any = None,
        runner_factory: RunnerFactory | None = None,
    ):
        if config.engine.standby == "weights" and config.device != "cpu":
            raise ConfigError(
                "standby='weights' keeps a second copy of the model in host memory and works on CPU only: "
                "set standby='process'"
            )
        self._config = config
        self._on_stage = on_stage
        self._runner_factory = runner_factory
        self._bundles: Bundles | None = None
        self._own_node = ray.get_runtime_context().get_node_id()
        self._actors: dict[int, Any] = {}
        self._places: dict[int, WorkerPlace] = {}
        self._loaded: set[int] = set()
        self._standby: _Standby | None = None
        self._standby_timer: threading.Timer | None = None
        self._links: WorkerLinks | None = None
        self._run_refs: dict[int, Any] = {}
        self._watcher: threading.Thread | None = None
        self._stopwatch = Stopwatch()
        self._lock = threading.Lock()  # makes and ends actors
        self._closed = False
        self.ranks = range(config.engine.tensor_parallel_size)
        self.num_blocks = 0
        try:
            if placement_group is None:
                on_stage("placing workers")
            self._bundles = Bundles(config, placement_group)
            self._single_node = self._bundles.node_ids() == {self._own_node}
            self._bring_up(self.ranks)
            self._prepare_standby()
        except WorkerDiedError as error:
            reason = f"{error.reason}; {self.describe_rank(error.rank)}"
            self.close()
            raise WorkerDiedError(error.rank, reason) from error
        except BaseException:
            self.close()
            raise

    @property
    def places(self) -> list[WorkerPlace]:
        """Where each rank lives, in order of rank."""
        return [self._places[rank] for rank in sorted(self._places)]

    @property
    def standby_is_ready(self) -> bool:
        standby = self._standby
        return standby is not None and standby.prepared.done() and standby.prepared.exception() is None

    # ------------------------------------------------------------------------------------------- the Executor

    def send(self, plan: StepPlan) -> None:
        self._connected().send(plan)

    def receive(self, timeout_s: float | None) -> StepResult:
        return self._connected().receive(timeout_s)

    def check(self) -> None:
        self._connected().check()

    def result_socket(self) -> Selectable | None:
        return self._connected().result_socket()

    def describe_rank(self, rank: int) -> str:
        place = self._places.get(rank)
        if place is None:
            return "it was never placed"
        text = f"node {place.node_id}, host {place.host}, {', '.join(place.devices)}"
        tail = log_tail(place) if place.node_id == self._own_node else ""
        said = last_error(tail)
        if not said:
            return text
        log.error("the log of worker rank %d on %s ends:\n%s", rank, text, tail)
        return f"{text}; its log's last error: {said}"

    def silent_ranks(self) -> list[int]:
        if stopped := self.stopped_ranks():
            return stopped
        silent = self._silent(self.ranks, _ANSWER_TIMEOUT_S)
        if not silent:
            return []
        on_lost_nodes = self._on_lost_nodes(silent)
        return list(on_lost_nodes) or self._silent(silent, _BUSY_ANSWER_TIMEOUT_S)

    def stopped_ranks(self) -> list[int]:
        places = self._places
        return [rank for rank in self.ranks if places[rank].node_id == self._own_node and is_stopped(places[rank])]

    def recover(self, lost: Sequence[int]) -> dict[str, float]:
        watch = self._stopwatch = Stopwatch()
        missing = {*lost, *self._connected().dead_ranks(), *self._on_lost_nodes(self.ranks)}
        self._connected().close()
        missing |= self._end(missing)
        watch.lap("end the lost")
        settle_s = _SETTLE_S if all(self._is_local(rank) for rank in missing) else _REMOTE_SETTLE_S
        missing |= self._end(self._settle([rank for rank in self.ranks if rank not in missing], settle_s))
        watch.lap("survivors settle")
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                self._leave_lost_nodes(missing)
                self._bring_up(sorted(missing))
                break
            except WorkerDiedError as error:
                log.warning("attempt %d to replace worker ranks %s: %s", attempt, sorted(missing), error)
                missing = {error.rank, *(rank for rank in self.ranks if rank not in self._loaded)}
                if attempt == _MAX_ATTEMPTS:
                    reason = f"{error.reason}, at attempt {attempt} to replace it; {self.describe_rank(error.rank)}"
                    raise WorkerDiedError(error.rank, reason) from error
                self._end(missing)
                aborts = self._abort([rank for rank in self.ranks if rank not in missing])
                if aborts:
                    ray.wait(aborts, num_returns=len(aborts), timeout=_ANSWER_TIMEOUT_S)
        self._prepare_standby_soon()
        self._on_stage("ready")
        return watch.laps

    def kill(self, rank: int) -> WorkerPlace | None:
        """Kills a rank's process, for fault injection; None where it is not running. The loss is found as any other."""
        place, actor = self._places.get(rank), self._actors.get(rank)
        if place is None or actor is None:
            return None
        if place.node_id == self._own_node:
            return place if kill_process(place) else None
        ray.kill(actor, no_restart=True)
        return place

    def close(self) -> None:
        """Ends all workers and waits until Ray has seen them end."""
        with self._lock:
            self._closed = True
        if self._links is not None:
            self._links.close()
        places = [*self._places.values(), *self._drop_standby()]
        for actor in list(self._actors.values()):  # a recovery may be under way
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        for place in places:
            if place.node_id == self._own_node:
                kill_process(place)  # one that is stopped does not hear Ray
        await_ends(place for place in places if place.node_id == self._own_node)
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(END_TIMEOUT_S)
        self._actors, self._places, self._run_refs, self._watcher = {}, {}, {}, None
        if self._bundles is not None:
            self._bundles.close()

    # ------------------------------------------------------------------------------------------ start and restart

    def _bring_up(self, new: Sequence[int]) -> None:
        """Makes the ranks `new`, then has all compute together. Raises `WorkerDiedError`, its rank to be replaced."""
        self._on_stage(f"starting {len(new)} worker{'s' * (len(new) > 1)}")
        fresh = [rank for rank in new if not self._promote(rank)]
        for rank in fresh:
            self._make_actor(rank)
        self._places |= self._all({rank: self._actors[rank].place.remote() for rank in fresh}, are_up=False)
        lap = self._stopwatch.lap
        lap("start processes")
        self._on_stage("loading weights")
        num_blocks = self._all({rank: self._actors[rank].load.remote() for rank in new})
        lap("load weights")
        self._loaded.update(new)
        # A replacement is given what the first one had: what its predecessor held is free, or about to be.
        self.num_blocks = self.num_blocks or min(num_blocks.values())
        self._on_stage("warming up")
        # One that was lost meanwhile is better found now than by peers that wait for it to join; and one may still be
        # in a join that failed.
        self._all({rank: self._actors[rank].alive.remote() for rank in self.ranks})
        lap("ask all")
        if len(self.ranks) > 1:
            host = LOOPBACK if self._single_node else self._places[0].host
            store = self._all({0: self._actors[0].open_store.remote(host)})[0]
            lap("open store")
            self._all({rank: self._actors[rank].join.remote(store) for rank in self.ranks})
            lap("join")
        self._all({rank: self._actors[rank].start.remote(self.num_blocks) for rank in self.ranks})
        lap("warm up")
        self._links = WorkerLinks(self._connect())
        lap("connect")
        self._watcher = start_watches(self._run_refs, self._links, None if self._single_node else self._bundles)

    def _make_actor(self, rank: int) -> None:
        with self._lock:
            self._raise_if_closed()
            self._actors[rank] = self._create_actor(rank)

    def _create_actor(self, rank: int | None) -> Any:
        assert self._bundles is not None
        options = {"max_restarts": 0, "concurrency_groups": {_HEALTH: 1}, **self._bundles.options(rank)}
        # No runtime_env: Ray would start the process twice over, and could give it none of those that wait for work.
        environment = worker_environment(self._config, self._single_node)
        return ray.remote(**options)(WorkerActor).remote(self._config, rank, environment, self._runner_factory)

    def _end(self, ranks: Iterable[int]) -> set[int]:
        """Ends these ranks' processes, also where they are stopped; a rank that Ray cannot end now is cut off by its
        closed socket.
        """
        ranks = set(ranks)
        for rank in ranks:
            self._loaded.discard(rank)
            actor, place = self._actors.pop(rank, None), self._places.get(rank)
            local = place is not None and place.node_id == self._own_node
            if place is not None and local:
                kill_process(place)
            if actor is not None:
                with contextlib.suppress(Exception):
                    ray.kill(actor, no_restart=True)
            if place is not None and local and self._config.device == "cuda":
                await_ends([place])  # its memory is needed
        return ranks

    def _settle(self, survivors: Sequence[int], settle_s: float) -> set[int]:
        """Waits until the survivors have left their steps; those that do not, even when told after `settle_s`, are
        returned."""
        refs = {self._run_refs[rank]: rank for rank in survivors if rank in self._run_refs}
        _, stuck = ray.wait(list(refs), num_returns=len(refs), timeout=settle_s) if refs else ([], [])
        if stuck:
            self._abort([refs[ref] for ref in stuck])
            _, stuck = ray.wait(stuck, num_returns=len(stuck), timeout=_SETTLE_S)
        return {refs[ref] for ref in stuck}

    def _abort(self, ranks: Iterable[int]) -> list[Any]:
        """Makes them leave what they wait for their peers in; the calls, to be waited for."""
        return [self._actors[rank].abort.options(concurrency_group=_HEALTH).remote() for rank in ranks]

    # ------------------------------------------------------------------------------------------------ standby

    def _prepare_standby(self) -> None:
        """Has a spare worker get ready, beside the others' work."""
        with self._lock:
            if self._standby is not None or self._closed or self._config.engine.standby == "off":
                return
            actor = self._create_actor(None)
            self._standby = _Standby(actor, actor.place.remote(), actor.prepare.remote().future())

    def _prepare_standby_soon(self) -> None:
        """Once requests have caught up: a starting process would take their cores from them."""
        with self._lock:
            if self._standby_timer is not None:
                self._standby_timer.cancel()
            self._standby_timer = threading.Timer(_STANDBY_DELAY_S, self._prepare_standby)
            self._standby_timer.daemon = True
            self._standby_timer.start()

    def _promote(self, rank: int) -> bool:
        """The standby takes the rank, where there is one and it lives on the lost one's node."""
        with self._lock:
            standby, old = self._standby, self._places.get(rank)
            if standby is None or old is None:
                return False
            place = standby.place(_ANSWER_TIMEOUT_S)
            if place is None or place.node_id != old.node_id:
                return False
            self._standby = None
            self._actors[rank] = standby.actor
            self._places[rank] = dataclasses.replace(place, devices=old.devices)
        self._actors[rank].take.remote(rank, old.devices)  # where it has died, the next call tells
        return True

    def _drop_standby(self) -> list[WorkerPlace]:
        """Ends the standby; where it lived."""
        with self._lock:
            standby, self._standby = self._standby, None
            if self._standby_timer is not None:
                self._standby_timer.cancel()
        if standby is None:
            return []
        place = standby.place(0)
        with contextlib.suppress(Exception):
            ray.kill(standby.actor, no_restart=True)
        return [place] if place is not None else []

    # ------------------------------------------------------------------------------------------------ channels

    def _connect(self) -> list[Channel]:
        """Has every rank run, and returns their channels in order of rank. The listener lives only this
        long.
        """
        token = secrets.token_hex(16)
        listener = Listener(token, None if self._single_node else ray.util.get_node_ip_address())
        channels: dict[int, Channel] = {}
        try:
            self._run_refs = {rank: self._actors[rank].run.remote(listener.address, token) for rank in self.ranks}
            deadline = time.monotonic() + _CONNECT_TIMEOUT_S
            while len(channels) < len(self.ranks):
                try:
                    channel = listener.accept(0.5)
                except TimeoutError:
                    raise_ended(self._run_refs)
                    if time.monotonic() > deadline:
                        missing = min({*self.ranks} - {*channels})
                        raise WorkerDiedError(missing, f"it did not connect in {_CONNECT_TIMEOUT_S:g} s") from None
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
        return [channels[rank] for rank in self.ranks]

    # ------------------------------------------------------------------------------------------------ Ray calls

    def _all(self, refs: dict[int, Any], *, are_up: bool = True) -> dict[int, Any]:
        """Every rank's answer; the first failure, or a rank that hangs, ends the wait. Ranks that are not up yet are
        waited for as long as Ray takes to start them.
        """
        pending, quiet_since = list(refs.values()), time.monotonic()
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=_NODE_LOOK_S)
            raise_ended({rank: ref for rank, ref in refs.items() if ref in done}, is_first_load=not self.num_blocks)
            self._raise_if_closed()
            if done:
                quiet_since = time.monotonic()
                continue
            waited_for = [rank for rank, ref in refs.items() if ref in pending]
            for rank, reason in self._on_lost_nodes(waited_for).items():
                raise WorkerDiedError(rank, reason)
            if are_up and time.monotonic() - quiet_since >= _QUIET_S:
                timeout_s = _START_ANSWER_TIMEOUT_S if self.num_blocks else _FIRST_START_ANSWER_TIMEOUT_S
                for rank in self._silent(waited_for, timeout_s):
                    raise WorkerDiedError(rank, "it hangs: its process does not answer")
                quiet_since = time.monotonic()
        return {rank: ray.get(ref) for rank, ref in refs.items()}

    def _is_local(self, rank: int) -> bool:
        place = self._places.get(rank)
        return place is not None and place.node_id == self._own_node

    def _on_lost_nodes(self, ranks: Iterable[int]) -> dict[int, str]:
        """Those of the ranks whose node is lost, each with the reason."""
        assert self._bundles is not None
        return {} if self._single_node else self._bundles.on_lost_nodes(ranks)

    def _leave_lost_nodes(self, ranks: Iterable[int]) -> None:
        """Gives ranks without a process another place where theirs is on a lost node. Raises `NoRoomError`."""
        assert self._bundles is not None
        if lost := self._on_lost_nodes(ranks):
            log.warning("worker ranks %s: %s", sorted(lost), "; ".join(sorted(set(lost.values()))))
            self._bundles.move(sorted(lost))

    def _silent(self, ranks: Sequence[int], timeout_s: float) -> list[int]:
        calls = {rank: self._actors[rank].alive.options(concurrency_group=_HEALTH).remote() for rank in ranks}
        answered, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        return [rank for rank, ref in calls.items() if ref not in answered]

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise EngineError("the engine is being closed")

    def _connected(self) -> WorkerLinks:
        assert self._links is not None, "the group is not ready"
        return self._links


@dataclasses.dataclass(frozen=True)
class _Standby:
    """A worker without a rank, and what it was asked."""

    actor: Any
    place_ref: Any
    prepared: Future[None]

    def place(self, timeout_s: float) -> WorkerPlace | None:
        """Where it lives; None where it does not yet, or no longer."""
        try:
            place: WorkerPlace = ray.get(self.place_ref, timeout=timeout_s)
        except ray.exceptions.RayError:
            return None
        return place
