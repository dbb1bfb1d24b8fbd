"""Ranks on this machine for a check or a measurement: processes that form a group, without an engine or Ray."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from rayllm.distributed.links import Link
from rayllm.errors import EngineError
from rayllm.executor.inproc import one_line
from rayllm.executor.process_group import CUDA_ENVIRONMENT, ProcessGroup
from rayllm.executor.worker_process import LOOPBACK, loopback_interfaces

_TIMEOUT_S = 120.0
"""For all processes to import torch, form their group and do what they were started for."""

Work = Callable[[ProcessGroup, int, int, str], Any]
"""Is given the group that was joined, rank, number of ranks and device (`cpu` or `cuda`); a function of a module."""


def check_local_links(num_ranks: int, device: str) -> list[Link]:
    """What each rank saw of its links; on CPU they are sockets. Raises as `run_local_ranks` does."""
    return [link for links in run_local_ranks(num_ranks, device, _links) for link in links]


def run_local_ranks(num_ranks: int, device: str, work: Work, timeout_s: float = _TIMEOUT_S) -> list[Any]:
    """The result of each rank, in order; GPU i is rank i's. Raises `EngineError` with the rank that failed."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Connection] = []
    processes: list[BaseProcess] = []
    try:
        for rank in range(num_ranks):
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(
                target=_run, args=(theirs, rank, num_ranks, device, work), daemon=True
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        deadline = time.monotonic() + timeout_s
        store = _answer(pipes, 0, deadline)
        for pipe in pipes:
            pipe.send(store)
        return [_answer(pipes, rank, deadline) for rank in range(num_ranks)]
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
                raise EngineError(f"rank {rank} failed: {answer}") from answer
            return answer
    except EOFError:
        raise EngineError(f"rank {rank} died") from None
    raise EngineError(f"rank {rank} did not answer in time")


def _run(pipe: Connection, rank: int, num_ranks: int, device: str, work: Work) -> None:
    try:
        os.environ.update({**CUDA_ENVIRONMENT, **loopback_interfaces()})  # before torch looks at them
        import torch

        torch.set_num_threads(1)
        if device == "cuda":
            torch.cuda.set_device(rank)
        group = ProcessGroup(device, num_ranks)
        if rank == 0:
            pipe.send(group.open_store(LOOPBACK))
        group.join(rank, pipe.recv())
        pipe.send(work(group, rank, num_ranks, device))
    except Exception as error:
        pipe.send(RuntimeError(one_line(error)))


def _links(group: ProcessGroup, rank: int, num_ranks: int, device: str) -> list[Link]:
    import torch

    from rayllm.distributed.fabric import check_links, swap_in_group

    where = torch.device(device, rank) if device == "cuda" else torch.device("cpu")
    return check_links(group.exchange(rank), swap_in_group, where)
