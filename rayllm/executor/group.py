"""The ranks that compute together, behind the `Executor` interface: brought up, connected, recovered after a loss."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ray

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError, WorkerDiedError
from rayllm.executor.bundles import Bundles
from rayllm.executor.channel import Channel, Listener
from rayllm.executor.executor import Selectable
from rayllm.executor.fanout import WorkerLinks
from rayllm.executor.rank_actors import RankActors
from rayllm.executor.rank_calls import raise_ended, start_watches
from rayllm.executor.standby import Standby
from rayllm.executor.stopwatch import Stopwatch
from rayllm.executor.worker import RunnerFactory
from rayllm.executor.worker_process import END_TIMEOUT_S, LOOPBACK, WorkerPlace
from rayllm.messages import StepPlan, StepResult
from rayllm.weights.progress import progress_text

log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S = 30.0
_SETTLE_S = 5.0
"""For survivors to notice that their peer or the driver has left them."""
_REMOTE_SETTLE_S = 0.5
"""The same before they are aborted, where a lost peer is on another node: the end of its connections may never come."""
_MAX_ATTEMPTS = 3

Stage = Callable[[str], None]


class WorkerGroup:
    """All ranks of one engine as worker actors: an `Executor`.

    Ready when constructed; `on_stage` is given, in a few words, what is being waited for. Raises `ConfigError`
    where the cluster has no room, the runner's own error where a rank cannot load, `WorkerDiedError` where
    one dies on the way, `EngineError` where two ranks do not reach each other. Without a `placement_group` it makes
    one, and removes it at `close`.

    A group of ranks that compute together lives until one of them is lost. `recover` fills the place of the lost one,
    from the standby where there is one, and joins all in a new group: new store, new sockets, new token, so that
    late messages of the old group reach nobody.
    """

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
        self._on_stage = on_stage
        self._on_gpus = config.device == "cuda"
        self._layout = config.engine.layout
        self.ranks = self._layout.ranks
        self.max_inflight_steps = self._layout.max_inflight_steps
        self.num_blocks = 0
        self._links: WorkerLinks | None = None
        self._has_checked_links = False
        self._run_refs: dict[int, Any] = {}
        self._watcher: threading.Thread | None = None
        self._stopwatch = Stopwatch()
        if placement_group is None:
            on_stage("placing workers")
        self._bundles = Bundles(config, placement_group)
        try:
            self._actors = RankActors(config, self._bundles, runner_factory)
        except BaseException:
            self._bundles.close()
            raise
        self._standby = Standby(self._actors, enabled=config.engine.standby != "off")
        try:
            self._bring_up(self.ranks)
            self._standby.prepare()
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
        places = self._actors.places
        return [places[rank] for rank in sorted(places)]

    @property
    def standby_is_ready(self) -> bool:
        return self._standby.is_ready

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
        return self._actors.describe(rank)

    def silent_ranks(self) -> list[int]:
        return self._actors.silent()

    def stopped_ranks(self) -> list[int]:
        return self._actors.stopped()

    def recover(self, lost: Sequence[int]) -> dict[str, float]:
        watch, actors = Stopwatch(), self._actors
        self._stopwatch = watch
        missing = {*lost, *self._connected().dead_ranks(), *actors.on_lost_nodes(self.ranks)}
        self._connected().close()
        missing |= actors.end(missing)
        watch.lap("end lost ranks")
        runs = {rank: ref for rank, ref in self._run_refs.items() if rank not in missing}
        missing |= actors.end(actors.settle(runs, self._settle_s(missing)))
        watch.lap("survivors settle")
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            try:
                actors.leave_lost_nodes(missing)
                self._bring_up(sorted(missing))
                break
            except WorkerDiedError as error:
                log.warning(
                    "replacing worker ranks %s failed, attempt %d of %d: %s",
                    sorted(missing), attempt, _MAX_ATTEMPTS, error,
                )  # fmt: skip
                missing = {error.rank, *(rank for rank in self.ranks if rank not in actors.loaded)}
                if attempt == _MAX_ATTEMPTS:
                    reason = f"{error.reason} (attempt {attempt} to replace it); {self.describe_rank(error.rank)}"
                    raise WorkerDiedError(error.rank, reason) from error
                actors.end(missing)
                missing |= actors.end(actors.release([rank for rank in self.ranks if rank not in missing]))
        self._standby.prepare_later()
        self._on_stage("ready")
        return watch.laps

    def _settle_s(self, missing: Collection[int]) -> float:
        """How long survivors may take to notice the loss by themselves, before they are aborted. A kernel that waits
        for its peers on a GPU notices nothing."""
        if self._on_gpus:
            return 0.0
        return _SETTLE_S if all(map(self._actors.is_local, missing)) else _REMOTE_SETTLE_S

    def kill(self, rank: int) -> WorkerPlace | None:
        """Kills a rank's process, for fault injection; None where it is not running. The loss is found as any other."""
        return self._actors.kill(rank)

    def close(self) -> None:
        """Ends all workers and waits until Ray has seen them end."""
        with self._actors.lock:
            self._actors.closed = True
        if self._links is not None:
            self._links.close()
        self._actors.close(self._standby.close())
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(END_TIMEOUT_S)
        self._run_refs, self._watcher = {}, None
        self._bundles.close()

    # ------------------------------------------------------------------------------------------ start and restart

    def _bring_up(self, new: Sequence[int]) -> None:
        """Makes the ranks `new`, then has all compute together. Raises `WorkerDiedError`, its rank to be replaced."""
        actors, lap = self._actors, self._stopwatch.lap
        self._on_stage(f"starting {len(new)} worker{'s' * (len(new) > 1)}")
        actors.make([rank for rank in new if not self._standby.promote(rank)])
        actors.show_gpus(new)
        lap("start processes")
        self._on_stage("loading weights")
        actors.call(new, "load", on_wait=lambda: self._show_progress(new))
        lap("load weights")
        actors.loaded.update(new)
        # One that was lost meanwhile is better found now than by peers that wait for it to join; and one may still be
        # in a join that failed.
        actors.call(self.ranks, "alive")
        lap("ask all")
        if len(self.ranks) > 1:
            self._on_stage("joining workers")
            store = actors.call([0], "open_store", LOOPBACK if actors.single_node else actors.places[0].host)[0]
            lap("open store")
            actors.call(self.ranks, "join", store, actors.share_a_node())
            lap("join")
            if not self._has_checked_links:
                self._on_stage("checking links between workers")
                log.info(actors.check_links())
                self._has_checked_links = True
                lap("check links")
        if not self.num_blocks:  # a replacement is given what the first one had: its predecessor's memory is free
            self._on_stage("measuring memory")
            self.num_blocks = min(actors.call(self.ranks, "count_blocks").values())
            lap("measure memory")
        actors.has_started = True
        self._on_stage("warming up")
        actors.call(self.ranks, "start", self.num_blocks)
        lap("warm up")
        self._links = WorkerLinks(self._connect(), self._layout.answering_rank)
        lap("connect")
        self._watcher = start_watches(self._run_refs, self._links, None if actors.single_node else self._bundles)

    def _show_progress(self, ranks: Sequence[int]) -> None:
        bytes_read, num_bytes = self._actors.progress(ranks)
        if num_bytes:
            self._on_stage(f"loading weights: {progress_text(bytes_read, num_bytes)}")

    def _connect(self) -> list[Channel]:
        """Has every rank run, and returns their channels in order of rank. The listener lives only this
        long.
        """
        token = secrets.token_hex(16)
        listener = Listener(token, None if self._actors.single_node else ray.util.get_node_ip_address())
        channels: dict[int, Channel] = {}
        try:
            self._run_refs = self._actors.begin(self.ranks, "run", listener.address, token)
            deadline = time.monotonic() + _CONNECT_TIMEOUT_S
            while len(channels) < len(self.ranks):
                try:
                    channel = listener.accept(0.5)
                except TimeoutError:
                    raise_ended(self._run_refs)
                    if time.monotonic() > deadline:
                        missing = min({*self.ranks} - {*channels})
                        reason = f"it did not connect to the driver within {_CONNECT_TIMEOUT_S:g} s"
                        raise WorkerDiedError(missing, reason) from None
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

    def _connected(self) -> WorkerLinks:
        assert self._links is not None, "the group is not ready"
        return self._links
