"""What becomes of Ray calls to ranks: whose failed, and why."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from rayllm.errors import RayLLMError, WorkerDiedError
from rayllm.executor.bundles import Bundles
from rayllm.executor.fanout import WorkerLinks
from rayllm.executor.inproc import one_line
from rayllm.executor.worker_process import death_reason

_NODE_LOOK_S = 1.0


def raise_ended(refs: Mapping[int, Any], *, is_first_load: bool = False) -> None:
    """Raises the failure of any of the calls that has ended with one, under its rank. What a model's first load finds
    wrong is no rank's fault, and raised as it is."""
    ranks = {ref: rank for rank, ref in refs.items()}
    for ref in ray.wait(list(ranks), num_returns=len(ranks), timeout=0)[0] if ranks else []:
        try:
            ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, WorkerDiedError) or (is_first_load and isinstance(cause, RayLLMError)):
                raise cause from None
            raise WorkerDiedError(ranks[ref], one_line(cause)) from error
        except ray.exceptions.RayError as error:
            raise WorkerDiedError(ranks[ref], death_reason(error)) from error


def start_watches(run_refs: Mapping[int, Any], links: WorkerLinks, bundles: Bundles | None) -> threading.Thread:
    """Reports ranks whose `run` ends to `links`, and with `bundles` those whose node is lost. Returns the thread that
    watches the runs."""
    if bundles is not None:
        threading.Thread(
            target=watch_nodes, args=(bundles, list(run_refs), links), name="node-watch", daemon=True
        ).start()
    watcher = threading.Thread(target=watch_runs, args=(run_refs, links), name="worker-watch", daemon=True)
    watcher.start()
    return watcher


def watch_nodes(bundles: Bundles, ranks: Sequence[int], links: WorkerLinks) -> None:
    """Until a rank is lost or the links are closed: the connections to a node that froze, or cannot be reached, do not
    end."""
    while not links.is_closed:
        with contextlib.suppress(Exception):  # Ray does not answer just now
            if lost := bundles.on_lost_nodes(ranks):
                for rank, reason in lost.items():
                    links.report_loss(rank, reason)
                return
        time.sleep(_NODE_LOOK_S)


def watch_runs(run_refs: Mapping[int, Any], links: WorkerLinks) -> None:
    """Waits for any `run` to return: none does while all is well. Ends when all have."""
    ranks = {ref: rank for rank, ref in run_refs.items()}
    while ranks:
        try:
            done, _ = ray.wait(list(ranks), num_returns=1)
        except Exception:  # Ray itself was shut down, the workers with it
            for rank in ranks.values():
                links.report_loss(rank, "Ray was shut down")
            return
        for ref in done:
            _report_end(ranks.pop(ref), ref, links)


def _report_end(rank: int, ref: Any, links: WorkerLinks) -> None:
    try:
        links.report_loss(rank, ray.get(ref) or "its step loop ended", died=False)
    except ray.exceptions.RayTaskError as error:
        links.report_loss(rank, one_line(error.cause), died=False)
    except Exception as error:
        links.report_loss(rank, death_reason(error))
