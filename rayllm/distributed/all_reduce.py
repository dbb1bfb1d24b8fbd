"""All-reduce by RayLLM's own kernels where ranks reach each other's GPU memory, chosen by the size of the message."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rayllm.distributed.cuda_memory import CudaPeerMemory, PeerMemory
from rayllm.distributed.exchange import Exchange
from rayllm.distributed.nvlink import has_nvlink
from rayllm_kernels.all_reduce import Peers, one_shot, shared_bytes, two_shot

log = logging.getLogger(__name__)

_KIB, _MIB = 2**10, 2**20
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TRIAL_TIMEOUT_S = 30.0
"""For the first sums, which ranks may compile for at their own pace."""


@dataclass(frozen=True)
class SizeLimits:
    """The longest message that each kernel takes; longer ones go by NCCL."""

    one_shot_bytes: int
    two_shot_bytes: int

    def __str__(self) -> str:
        return (
            f"up to {self.one_shot_bytes // _KIB} KiB by the one-shot kernel, up to {self.two_shot_bytes // _KIB} KiB "
            "by the two-shot kernel, longer ones by NCCL"
        )


SIZE_LIMITS = {
    (8, 2): SizeLimits(512 * _KIB, 2 * _MIB),
    (8, 4): SizeLimits(512 * _KIB, 4 * _MIB),
    (8, 8): SizeLimits(256 * _KIB, 4 * _MIB),
    (9, 2): SizeLimits(512 * _KIB, 4 * _MIB),
    (9, 4): SizeLimits(512 * _KIB, 4 * _MIB),
    (9, 8): SizeLimits(256 * _KIB, 2 * _MIB),
    (10, 2): SizeLimits(512 * _KIB, 4 * _MIB),
    (10, 4): SizeLimits(512 * _KIB, 4 * _MIB),
    (10, 8): SizeLimits(512 * _KIB, 4 * _MIB),
}
"""By compute capability (major) and ranks. Not measured by RayLLM yet: they follow what is published of machines with
NVLink. One-shot wins up to 256 or 512 KiB (the thresholds of PyTorch's symmetric memory and of vLLM's custom
all-reduce); from some MiB on NCCL is as fast, on Hopper with 8 ranks earlier, because it sums in the switch (NVLS; vLLM
#44079)."""


def size_limits(device: torch.device, size: int) -> SizeLimits | None:
    """Those of this GPU and so many ranks; None where it is better or the only way that NCCL sums everything."""
    return SIZE_LIMITS.get((torch.cuda.get_device_capability(device)[0], size))


class CustomAllReduce:
    """One rank's part. It is connected after the ranks have formed a group and closed before they leave it; the memory
    they share belongs to that one group.

    All ranks take the same way for every message: each stage of `connect` is agreed upon.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        limits: SizeLimits | None,
        *,
        disabled: bool = False,
        make_memory: Callable[[], PeerMemory] | None = None,
    ):
        self._rank, self._size, self._device, self._limits = rank, size, device, limits
        self._disabled, self._one_node = disabled, False
        self._make_memory = make_memory or (lambda: CudaPeerMemory(device.index))
        self._memory: PeerMemory | None = None
        self._addresses: list[int] = []
        self._fds: dict[int, int] = {}
        self._peers: Peers | None = None

    def connect(self, exchange: Exchange, *, one_node: bool) -> None:
        """Maps the peers' memory and tries it out. Where any rank cannot, NCCL sums everything; a line in rank 0's log
        says which sizes go which way, or why."""
        self.close()
        self._one_node = one_node
        stages = (self._check, self._reach, self._allocate, self._share, self._map, self._try)
        for number, stage in enumerate(stages):
            if problem := _agreed_problem(exchange, number, stage):
                self.close()
                self._log(f"messages of all sizes by NCCL: {problem}")
                return
        self._log(str(self._limits))

    def reduce(self, x: Tensor) -> bool:
        """Sums `x` over all ranks, in place, or returns False where that is NCCL's task."""
        if self._peers is None or self._limits is None or not x.is_contiguous() or x.dtype not in _DTYPES:
            return False
        if x.nbytes > self._limits.two_shot_bytes:
            return False
        (one_shot if x.nbytes <= self._limits.one_shot_bytes else two_shot)(x, self._peers)
        return True

    def abort(self) -> None:
        """Ends the wait of kernels whose peers are gone; called by any thread."""
        if (peers := self._peers) is not None:
            peers.abort.fill_(1)

    def close(self) -> None:
        """Gives the shared memory back when no kernel uses it any more. Called by the thread that computes."""
        self.abort()
        memory, self._memory, self._peers = self._memory, None, None
        while self._fds:
            os.close(self._fds.popitem()[1])
        if memory is not None:
            self._synchronize()
            memory.close()

    # ------------------------------------------------------------------------------------------ the stages of connect

    def _check(self, exchange: Exchange) -> None:
        if self._disabled:
            raise RuntimeError("disable_custom_all_reduce is set")
        if not self._one_node:
            raise RuntimeError("the ranks are on several nodes")
        if self._limits is None:
            raise RuntimeError(f"there are no size limits for {self._size} ranks on GPUs of this kind")

    def _reach(self, exchange: Exchange) -> None:
        gpus = [int(index) for index in exchange.gather("gpu", str(self._device.index or 0))]
        if len({*exchange.gather("limits", str(self._limits))}) > 1:
            raise RuntimeError("the ranks' GPUs are of different kinds")
        if self._device.type == "cpu":
            return
        if len({*gpus}) < len(gpus):
            raise RuntimeError(f"ranks are on the same GPUs: {gpus}")
        own = self._device.index
        for gpu in gpus:
            if gpu == own:
                continue
            if not torch.cuda.can_device_access_peer(own, gpu):
                raise RuntimeError(f"GPU {own} has no peer-to-peer access to GPU {gpu}")
            # The kernels write their flags by atomic operations, which GPUs do not carry out over PCIe.
            if not has_nvlink(_uuid(own), _uuid(gpu)):
                raise RuntimeError(f"GPU {own} and GPU {gpu} are not linked by NVLink")

    def _allocate(self, exchange: Exchange) -> None:
        self._memory = self._make_memory()
        address, fd = self._memory.allocate(self._num_bytes())
        self._addresses, self._fds = [address] * self._size, {self._rank: fd}

    def _share(self, exchange: Exchange) -> None:
        self._fds |= exchange.share_fd("memory", self._fds[self._rank])

    def _map(self, exchange: Exchange) -> None:
        assert self._memory is not None
        os.close(self._fds.pop(self._rank))
        while self._fds:
            rank, fd = self._fds.popitem()
            self._addresses[rank] = self._memory.map(fd, self._num_bytes())

    def _try(self, exchange: Exchange) -> None:
        assert self._limits is not None
        on_gpu = self._device.type == "cuda"
        self._peers = Peers(
            self._rank,
            self._size,
            self._limits.two_shot_bytes,
            torch.tensor(self._addresses, dtype=torch.int64, device=self._device),
            torch.zeros(2, dtype=torch.int64, device=self._device),
            torch.zeros(1, dtype=torch.int32, pin_memory=on_gpu),
        )
        timer = threading.Timer(_TRIAL_TIMEOUT_S, self.abort)
        timer.start()
        try:
            for kernel in (one_shot, two_shot):
                x = torch.full((2000,), self._rank + 1.0, device=self._device)
                kernel(x, self._peers)
                self._synchronize()
                if self._peers.abort.item():
                    raise RuntimeError(f"peers did not meet in a kernel within {_TRIAL_TIMEOUT_S:g} s")
                if (x != self._size * (self._size + 1) / 2).any():
                    raise RuntimeError("peers' memory does not hold what they wrote")
        finally:
            timer.cancel()

    def _num_bytes(self) -> int:
        assert self._limits is not None
        return shared_bytes(self._size, self._limits.two_shot_bytes)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _log(self, text: str) -> None:
        if self._rank == 0:
            log.info("all-reduce over %d ranks: %s", self._size, text)


def _uuid(gpu: int) -> str:
    return f"GPU-{torch.cuda.get_device_properties(gpu).uuid}"


def _agreed_problem(exchange: Exchange, number: int, stage: Callable[[Exchange], None]) -> str:
    """What kept the first rank that failed from the stage; empty where none did."""
    problem = ""
    try:
        stage(exchange)
    except Exception as error:  # of the driver, of Triton's compiler, of a socket
        problem = " ".join(str(error).split()) or type(error).__name__
    problems = exchange.gather(f"stage {number}", problem)
    return next((f"{problem} (rank {rank})" for rank, problem in enumerate(problems) if problem), "")
