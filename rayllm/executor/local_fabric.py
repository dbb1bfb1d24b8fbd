"""The check of the links between devices of this machine, by processes of its own: no engine, no Ray."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from rayllm.distributed.links import Link
from rayllm.errors import EngineError
from rayllm.executor.inproc import one_line
from rayllm.executor.process_group import CUDA_ENVIRONMENT, ProcessGroup
from rayllm.executor.worker_process import LOOPBACK, loopback_interfaces

_START_TIMEOUT_S = 120.0
"""For all processes to import torch, form their group and check."""


def check_local_links(num_ranks: int, device: str) -> list[Link]:
    """What each rank saw of its links: GPU i is rank i's, on CPU the links are sockets. Raises `EngineError` with the
    rank that failed to take part."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_check, args=(theirs, rank, num_ranks, device), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline = time.monotonic() + _START_TIMEOUT_S
        store = _answer(pipes, 0, deadline)
        for pipe in pipes:
            pipe.send(store)
        return [link for rank in range(num_ranks) for link in _answer(pipes, rank, deadline)]
    finally:
        for process in processes:
            process.kill()  # one may hang in its exchange
            process.join()


def _answer(pipes: Sequence[Connection], rank: int, deadline: float) -> Any:
    """What a rank says next."""
    try:
        if pipes[rank].poll(max(0.0, deadline - time.monotonic())):
            answer = pipes[rank].recv()
            if isinstance(answer, Exception):
                raise EngineError(f"rank {rank} could not check its links: {one_line(answer)}") from answer
            return answer
    except EOFError:
        raise EngineError(f"rank {rank} died before it had checked its links") from None
    raise EngineError(f"rank {rank} had not checked its links after {_START_TIMEOUT_S:g} s")


def _check(pipe: Connection, rank: int, num_ranks: int, device: str) -> None:
    try:
        # Before torch is imported.
        os.environ.update({**CUDA_ENVIRONMENT, **loopback_interfaces()})
        pipe.send(_links(pipe, rank, num_ranks, device))
    except Exception as error:
        pipe.send(RuntimeError(one_line(error)))


def _links(pipe: Connection, rank: int, num_ranks: int, device: str) -> list[Link]:
    import torch

    from rayllm.distributed.exchange import Exchange
    from rayllm.distributed.fabric import check_links, swap_in_group

    torch.set_num_threads(1)
    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    if device == "cuda":
        torch.cuda.set_device(where)
    group = ProcessGroup(device, num_ranks)
    if rank == 0:
        pipe.send(group.open_store(LOOPBACK))
    group.join(rank, pipe.recv())
    return check_links(Exchange(group.store, rank, num_ranks), swap_in_group, where)
