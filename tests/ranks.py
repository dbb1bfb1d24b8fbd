"""A pool of plain processes joined by gloo, started once for many tests: ranks of a tensor-parallel group."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 120


class RankPool:
    """`run(function, *args)` calls `function(tp, *args)` on every rank and returns the results in order of rank.

    `function` must be importable by name (it lives in a module of its own, not in a test file).
    """

    def __init__(self, size: int):
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = str(Path(self._folder.name) / "store")
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, store), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((function, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT_S} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                self._processes[rank].join(TIMEOUT_S)
                raise AssertionError(f"rank {rank} died: exit code {self._processes[rank].exitcode}") from None
        for ok, answer in answers:
            if not ok:
                raise AssertionError(answer)
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(TIMEOUT_S)
        self._folder.cleanup()


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    from rayllm.distributed.groups import TensorParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    tp = TensorParallel(rank, size, dist.group.WORLD)
    warnings.simplefilter("error")
    while (job := pipe.recv()) is not None:
        function, args = job
        try:
            pipe.send((True, function(tp, *args)))
        except BaseException:
            pipe.send((False, f"rank {rank}: {traceback.format_exc()}"))
    dist.destroy_process_group()
