"""The worker actors of an engine by rank: made in their bundles, called together, watched while they are, ended."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray

from rayllm.config import ResolvedConfig
from rayllm.distributed.links import bad_links, summary
from rayllm.errors import EngineError, WorkerDiedError
from rayllm.executor.bundles import Bundles
from rayllm.executor.rank_calls import raise_ended
from rayllm.executor.worker import RunnerFactory
from rayllm.executor.worker_actor import WorkerActor
from rayllm.executor.worker_process import (
    WorkerPlace,
    await_ends,
    is_stopped,
    kill_process,
    last_error,
    log_tail,
    worker_environment,
)

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 1.0
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
_ABORTED_SETTLE_S = 5.0
"""For survivors to leave a step that was aborted."""
_PROGRESS_TIMEOUT_S = 0.5
"""For ranks to say how far their weights are read."""
_HEALTH = "health"
"""The concurrency group whose calls are answered while others run."""


class RankActors:
    """Calls raise `WorkerDiedError` with the rank that failed, died or does not respond, and `EngineError` once closed.

    Made and used by one thread at a time; `close` may be called from another, and under `lock` nothing is made or ended
    by anybody else.
    """

    def __init__(self, config: ResolvedConfig, bundles: Bundles, runner_factory: RunnerFactory | None):
        self.ranks = config.engine.layout.ranks
        self.own_node: str = ray.get_runtime_context().get_node_id()
        self.single_node = bundles.node_ids() == {self.own_node}
        self.places: dict[int, WorkerPlace] = {}
        self.loaded: set[int] = set()
        """Ranks that have their weights."""
        self.has_started = False
        """Whether all ranks have loaded their weights and counted their KV blocks once: from then on requests may wait
        for them."""
        self.lock = threading.Lock()
        self.closed = False
        self._config = config
        self._bundles = bundles
        self._runner_factory = runner_factory
        self._actors: dict[int, Any] = {}
        self._node_gpus: dict[str, list[str]] = {}

    # ------------------------------------------------------------------------------------------------ made and ended

    def make(self, ranks: Iterable[int]) -> None:
        """New processes for these ranks, each in its bundle."""
        ranks = list(ranks)
        for rank in ranks:
            with self.lock:
                self.raise_if_closed()
                self._actors[rank] = self.create(rank)
        self.places |= self.call(ranks, "place", are_up=False)

    def create(self, rank: int | None) -> Any:
        """The actor of a rank, or of the standby."""
        options = {"max_restarts": 0, "concurrency_groups": {_HEALTH: 1}, **self._bundles.options(rank)}
        # No runtime_env: Ray would start the process twice over, and could give it none of those that wait for work.
        environment = worker_environment(self._config, self.single_node)
        return ray.remote(**options)(WorkerActor).remote(self._config, rank, environment, self._runner_factory)

    def adopt(self, rank: int, actor: Any, place: WorkerPlace) -> None:
        """An actor that was made before takes the rank. Called under `lock`."""
        self._actors[rank] = actor
        self.places[rank] = place

    def show_gpus(self, ranks: Iterable[int]) -> None:
        """Tells ranks whose processes are new which GPUs of their node the engine's ranks have. On each node they keep
        their order, and one that joins later comes last: processes that started before count theirs in the same way.
        """
        for place in (self.places[rank] for rank in self.ranks):
            node_gpus = self._node_gpus.setdefault(place.node_id, [])
            node_gpus += [gpu for gpu in _gpus(place) if gpu not in node_gpus]
        for rank in ranks:
            place = self.places[rank]
            for own_gpu in _gpus(place)[:1]:
                self.begin([rank], "show_gpus", tuple(self._node_gpus[place.node_id]), own_gpu)

    def end(self, ranks: Iterable[int]) -> set[int]:
        """Ends these ranks' processes, also where they are stopped; a rank that Ray cannot end now is cut off by its
        closed socket.
        """
        ranks = set(ranks)
        for rank in ranks:
            self.loaded.discard(rank)
            actor, place = self._actors.pop(rank, None), self.places.get(rank)
            local = place is not None and place.node_id == self.own_node
            if place is not None and local:
                kill_process(place)
            if actor is not None:
                with contextlib.suppress(Exception):
                    ray.kill(actor, no_restart=True)
            if place is not None and local and self._config.device == "cuda":
                await_ends([place])  # its memory is needed
        return ranks

    def kill(self, rank: int) -> WorkerPlace | None:
        """Kills a rank's process, for fault injection; None where it is not running."""
        place, actor = self.places.get(rank), self._actors.get(rank)
        if place is None or actor is None:
            return None
        if place.node_id == self.own_node:
            return place if kill_process(place) else None
        ray.kill(actor, no_restart=True)
        return place

    def close(self, others: Sequence[WorkerPlace] = ()) -> None:
        """Ends all ranks, and waits until they and the `others`, which were ended, are gone."""
        places = [*self.places.values(), *others]
        for actor in list(self._actors.values()):  # a recovery may be under way
            with contextlib.suppress(Exception):
                ray.kill(actor, no_restart=True)
        local = [place for place in places if place.node_id == self.own_node]
        for place in local:
            kill_process(place)  # one that is stopped does not hear Ray
        await_ends(local)
        self._actors, self.places = {}, {}

    def raise_if_closed(self) -> None:
        if self.closed:
            raise EngineError("the engine is being closed")

    # ------------------------------------------------------------------------------------------------ calls

    def begin(self, ranks: Iterable[int], method: str, *arguments: Any) -> dict[int, Any]:
        """Calls the actors' method; the references to its results, by rank."""
        return {rank: getattr(self._actors[rank], method).remote(*arguments) for rank in ranks}

    def call(
        self,
        ranks: Iterable[int],
        method: str,
        *arguments: Any,
        are_up: bool = True,
        on_wait: Callable[[], None] = lambda: None,
    ) -> dict[int, Any]:
        """Every rank's answer; the first failure, or a rank that does not respond, ends the wait. Ranks that are not up
        yet are waited for as long as Ray takes to start them. `on_wait` is called every second.
        """
        refs = self.begin(ranks, method, *arguments)
        pending, quiet_since = list(refs.values()), time.monotonic()
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=_NODE_LOOK_S)
            raise_ended({rank: ref for rank, ref in refs.items() if ref in done}, is_first_load=not self.has_started)
            self.raise_if_closed()
            if done:
                quiet_since = time.monotonic()
                continue
            on_wait()
            waited_for = [rank for rank, ref in refs.items() if ref in pending]
            for rank, reason in self.on_lost_nodes(waited_for).items():
                raise WorkerDiedError(rank, reason)
            if are_up and time.monotonic() - quiet_since >= _QUIET_S:
                timeout_s = _START_ANSWER_TIMEOUT_S if self.has_started else _FIRST_START_ANSWER_TIMEOUT_S
                for rank in self._without_answer(waited_for, timeout_s):
                    raise WorkerDiedError(rank, f"its process did not respond within {timeout_s:g} s")
                quiet_since = time.monotonic()
        return {rank: ray.get(ref) for rank, ref in refs.items()}

    def progress(self, ranks: Sequence[int]) -> tuple[int, int]:
        """Bytes of weights that these ranks have read, and of how many; those that do not answer at once count as
        nothing."""
        calls = [self._actors[rank].progress.options(concurrency_group=_HEALTH).remote() for rank in ranks]
        answered, _ = ray.wait(calls, num_returns=len(calls), timeout=_PROGRESS_TIMEOUT_S)
        numbers = [(0, 0)]
        for call in answered:
            with contextlib.suppress(ray.exceptions.RayError):  # it is found as any other loss
                numbers.append(ray.get(call))
        bytes_read, num_bytes = map(sum, zip(*numbers, strict=True))
        return bytes_read, num_bytes

    def abort(self, ranks: Iterable[int]) -> list[Any]:
        """Has them leave what they wait for their peers in; the calls, to be waited for."""
        return [self._actors[rank].abort.options(concurrency_group=_HEALTH).remote() for rank in ranks]

    def settle(self, runs: dict[int, Any], settle_s: float) -> set[int]:
        """Waits until these survivors' `run` calls have ended; ranks that do not, though aborted after `settle_s`, are
        returned."""
        ranks = {ref: rank for rank, ref in runs.items()}
        _, stuck = ray.wait(list(ranks), num_returns=len(ranks), timeout=settle_s) if ranks else ([], [])
        if stuck:
            self.abort([ranks[ref] for ref in stuck])
            _, stuck = ray.wait(stuck, num_returns=len(stuck), timeout=_ABORTED_SETTLE_S)
        return {ranks[ref] for ref in stuck}

    def release(self, ranks: Sequence[int]) -> set[int]:
        """Aborts what these survivors of a failed start wait for their peers in; those that are not free for another
        start after that are returned."""
        self.abort(ranks)
        calls = self.begin(ranks, "place")  # begins when the call before it has ended
        refs = list(calls.values())
        _, stuck = ray.wait(refs, num_returns=len(refs), timeout=_START_ANSWER_TIMEOUT_S) if refs else ([], [])
        return {rank for rank, ref in calls.items() if ref in stuck}

    def check_links(self) -> str:
        """Has each pair of joined ranks exchange messages; what was measured, in a line. Raises `EngineError`, which
        names the pairs that do not reach each other."""
        links = [link for found in self.call(self.ranks, "check_links").values() for link in found]
        if bad := bad_links(links, self._rank_and_place):
            raise EngineError(
                f"workers do not reach each other: {'; '.join(bad)}. Check cables, switches, firewalls and the "
                "interface that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names; 'rayllm doctor --fabric' checks the "
                "links within a node",
                code="bad_link",
            )
        return summary(links)

    def _rank_and_place(self, rank: int) -> str:
        place = self.places[rank]
        return f"rank {rank} (node {place.node_id[:8]}, host {place.host}, {', '.join(place.devices)})"

    # ------------------------------------------------------------------------------------------------ health

    def silent(self) -> list[int]:
        """Ranks whose process does not respond."""
        if stopped := self.stopped():
            return stopped
        silent = self._without_answer(self.ranks, ANSWER_TIMEOUT_S)
        if not silent:
            return []
        on_lost_nodes = self.on_lost_nodes(silent)
        return list(on_lost_nodes) or self._without_answer(silent, _BUSY_ANSWER_TIMEOUT_S)

    def stopped(self) -> list[int]:
        """Ranks on this node whose process is seen to be stopped."""
        return [rank for rank in self.ranks if self.is_local(rank) and is_stopped(self.places[rank])]

    def is_local(self, rank: int) -> bool:
        place = self.places.get(rank)
        return place is not None and place.node_id == self.own_node

    def share_a_node(self) -> bool:
        """Whether all ranks are on the same node."""
        return len({self.places[rank].node_id for rank in self.ranks}) == 1

    def on_lost_nodes(self, ranks: Iterable[int]) -> dict[int, str]:
        """Those of the ranks whose node is lost, each with the reason."""
        return {} if self.single_node else self._bundles.on_lost_nodes(ranks)

    def leave_lost_nodes(self, ranks: Iterable[int]) -> None:
        """Gives ranks without a process another place where theirs is on a lost node. Raises `NoRoomError`."""
        if lost := self.on_lost_nodes(ranks):
            log.warning("worker ranks %s: %s", sorted(lost), "; ".join(sorted(set(lost.values()))))
            self._bundles.move(sorted(lost))

    def describe(self, rank: int) -> str:
        """Where the rank lives or lived, and the last error in its log; the end of that log goes to this process's."""
        place = self.places.get(rank)
        if place is None:
            return "its process was not placed on a node yet"
        text = f"node {place.node_id}, host {place.host}, {', '.join(place.devices)}"
        tail = log_tail(place) if place.node_id == self.own_node else ""
        error = last_error(tail)
        if not error:
            return text
        log.error("last lines of the log of worker rank %d on %s:\n%s", rank, text, tail)
        return f"{text}; last error in its log: {error}"

    def _without_answer(self, ranks: Sequence[int], timeout_s: float) -> list[int]:
        calls = {rank: self._actors[rank].alive.options(concurrency_group=_HEALTH).remote() for rank in ranks}
        answered, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
        return [rank for rank, ref in calls.items() if ref not in answered]


def _gpus(place: WorkerPlace) -> list[str]:
    """The ids on its node of the GPUs that Ray gave a process."""
    return [device.removeprefix("cuda:") for device in place.devices if device.startswith("cuda:")]
