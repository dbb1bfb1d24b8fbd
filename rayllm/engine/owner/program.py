"""The engine of a program's own: from keyword settings to a started engine, and its end with the program."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import uuid
import weakref
from typing import Any

from rayllm.compatibility import notes
from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.engine.client.blocking_journaled_client import BlockingJournaledClient
from rayllm.engine.client.engine_thread import EngineThread
from rayllm.engine.owner.local import LocalEngine
from rayllm.engine.owner.resolve import resolve
from rayllm.engine.owner.watched import WatchedEngine
from rayllm.errors import did_you_mean
from rayllm.executor.inproc import InprocExecutor
from rayllm.executor.placement import cluster_devices
from rayllm.executor.ray_cluster import connected_ray
from rayllm.executor.ray_connection import ray_is_initialized
from rayllm.weights.hub import ensure_downloaded
from rayllm.weights.progress import LoadProgress

log = logging.getLogger(__name__)


def program_config(model: str, settings: dict[str, Any]) -> EngineConfig:
    unknown = [name for name in settings if name not in EngineConfig.model_fields]
    if unknown:
        near = did_you_mean(unknown[0], EngineConfig.model_fields)
        raise TypeError(f"LLM() got an unexpected keyword argument {unknown[0]!r}{near}")
    name = f"llm-{uuid.uuid4().hex[:8]}"  # so that a program may have several
    no_limits = {"max_queued_requests": None, "max_queued_tokens": None}  # a program gives all that it has at once
    config: EngineConfig = EngineConfig.parse({"model": str(model), "name": name, **no_limits, **settings})
    return config


def resolve_for_program(config: EngineConfig) -> ResolvedConfig:
    """With a Ray at hand, its cluster's devices count, and it carries the engine. A model that is named by its hub's
    name and not on this machine is downloaded first."""
    ensure_downloaded(config)
    if config.distributed_executor_backend == "inproc" or not ray_is_initialized():
        resolved = resolve(config)
    else:
        num_gpus, num_cores = cluster_devices()
        resolved = resolve(config, num_gpus=num_gpus, num_cores=num_cores, backend="ray")
    for line in [*notes(config, resolved.device, runs_code=resolved.spec.runs_code), *resolved.spec.notes()]:
        log.warning("%s", line)
    return resolved


def open_engine(config: ResolvedConfig, cleanup: contextlib.ExitStack) -> tuple[EngineThread[Any], ResolvedConfig]:
    """The engine for all threads of this program, and its config with the context that fits; `cleanup` gets what ends
    it."""
    if config.backend == "inproc":
        progress = LoadProgress()
        local = EngineThread(lambda: LocalEngine(config, InprocExecutor.load(config, progress)))
        cleanup.callback(local.join)
        cleanup.callback(local.close)
        cleanup.callback(progress.cancel)
        return local, local.wait_until_made().config
    cleanup.enter_context(connected_ray(num_cpus=1 + config.engine.layout.num_ranks))
    joined = cleanup.enter_context(contextlib.ExitStack())
    watched = start_watched(config, cleanup)
    thread = EngineThread(lambda: BlockingJournaledClient(watched.connect(), watched.reconnect))
    joined.callback(thread.join)  # after `watched.close`, by which a replacement fails, and before Ray ends
    cleanup.callback(thread.close)
    thread.wait_until_made()
    return thread, watched.owned.config


def finalizer(owner: Any, cleanup: contextlib.ExitStack) -> weakref.finalize[..., Any]:
    """What ends an engine, once: called by its owner's `close`, when the owner is garbage, or at the program's end,
    before Ray's own end, which was registered earlier. Without effect in forked children."""
    ends = weakref.finalize(owner, _close, cleanup, os.getpid())
    ends.atexit = False
    atexit.register(ends)
    return ends


def _close(cleanup: contextlib.ExitStack, pid: int) -> None:
    if os.getpid() == pid:
        cleanup.close()


def start_watched(config: ResolvedConfig, cleanup: contextlib.ExitStack) -> WatchedEngine:
    """A driver actor with its workers, ready, in this process's Ray."""
    watched = WatchedEngine(config)
    cleanup.callback(watched.close)
    watched.start()
    return watched
