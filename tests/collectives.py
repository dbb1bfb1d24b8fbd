"""What the ranks of a pool run to show a collective's result."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any

import torch
import torch.distributed
from peer_memory import HostPeerMemory

from rayllm.distributed import all_reduce
from rayllm.distributed.all_reduce import CustomAllReduce, SizeLimits
from rayllm.distributed.exchange import Exchange
from rayllm.distributed.fabric import check_links, swap_in_group
from rayllm.distributed.groups import TensorParallel
from rayllm.distributed.links import Link


def reduce_ranks(tp: TensorParallel) -> tuple[list[float], bool]:
    """The reduced values, and whether they were written in place."""
    x = torch.full((2,), float(tp.rank + 1))
    return tp.all_reduce(x).tolist(), x.tolist() == [3.0, 3.0]


def gather_ranks(tp: TensorParallel) -> list[list[float]]:
    x = torch.arange(4.0).view(2, 2) + 100 * tp.rank
    return tp.all_gather_last(x).tolist()


# ------------------------------------------------------------------------------- the custom all-reduce, interpreted

LIMITS = SizeLimits(one_shot_bytes=8 << 10, two_shot_bytes=40 << 10)


def _connected(
    tp: TensorParallel, folder: str, epoch: int, custom: CustomAllReduce | None = None, **given: Any
) -> CustomAllReduce:
    """A custom all-reduce, new or of an earlier epoch, that has met its peers in this one."""
    make_memory = given.pop("make_memory", HostPeerMemory)
    made = custom or CustomAllReduce(tp.rank, tp.size, torch.device("cpu"), LIMITS, make_memory=make_memory, **given)
    store = torch.distributed.FileStore(f"{folder}/{epoch}", tp.size)
    made.connect(Exchange(store, tp.rank, tp.size), one_node=True)
    return made


def sum_by_kernels(tp: TensorParallel, folder: str) -> list[str]:
    """Sums of many sizes one after another, by ranks of which now one and now the other comes late; what was wrong."""
    custom = _connected(tp, folder, 0)
    joined = dataclasses.replace(tp, custom=custom)
    wrong = []
    for call, numel in enumerate((5, 2048, 2049, 9000, 1, 10240, 1025, 3000, 10241, 7)):
        x = torch.arange(numel, dtype=torch.float32) + 1000 * tp.rank + call
        if (call + tp.rank) % 3 == 0:
            time.sleep(0.05)
        by_kernels = joined.custom is not None and x.nbytes <= LIMITS.two_shot_bytes
        calls = custom._peers.calls[0].item()
        found = joined.all_reduce(x)
        if not torch.equal(found, 2 * torch.arange(numel, dtype=torch.float32) + 1000 + 2 * call):
            wrong.append(f"call {call}: wrong sum of {numel}")
        if (custom._peers.calls[0].item() == calls + 1) != by_kernels:
            wrong.append(f"call {call}: {numel} went the wrong way")
    custom.close()
    return wrong


def sum_after_loss(tp: TensorParallel, folder: str) -> tuple[bool, list[float]]:
    """Rank 1 is lost while rank 0 waits for it in a kernel; then rank 0 meets a rank 1 that is new."""
    custom: CustomAllReduce | None = _connected(tp, folder, 1)
    assert custom is not None
    ended = True
    if tp.rank == 0:
        thread = threading.Thread(target=custom.reduce, args=(torch.ones(10),), daemon=True)
        thread.start()
        thread.join(0.3)
        ended = thread.is_alive()
        custom.abort()
        thread.join(20.0)
        ended = ended and not thread.is_alive()
    else:
        custom.close()
        custom = None
    custom = _connected(tp, folder, 2, custom)
    x = torch.full((3,), tp.rank + 1.0)
    assert custom.reduce(x)
    custom.close()
    return ended, x.tolist()


def fall_back(tp: TensorParallel, folder: str, make_memory: Any) -> tuple[bool, list[str]]:
    """With a rank 1 whose memory is faulty: whether its kernels are used, and rank 0's log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("rayllm.distributed.all_reduce")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    patience_s, all_reduce._TRIAL_TIMEOUT_S = all_reduce._TRIAL_TIMEOUT_S, 1.0
    try:
        custom = _connected(tp, folder, 3, make_memory=make_memory if tp.rank else HostPeerMemory)
        return custom.reduce(torch.ones(4)), lines
    finally:
        all_reduce._TRIAL_TIMEOUT_S = patience_s
        log.removeHandler(handler)


def check_link(tp: TensorParallel, folder: str, timeout_s: float, hangs: bool) -> tuple[list[Link], float]:
    """This rank's links over gloo, where rank 1 `hangs` in place of sending anything; and seconds."""

    def swap(sent: torch.Tensor, peer: int) -> torch.Tensor:
        if hangs and tp.rank == 1:
            time.sleep(60.0)
        return swap_in_group(sent, peer)

    exchange = Exchange(torch.distributed.FileStore(folder, tp.size), tp.rank, tp.size)
    exchange.gather("begin", "")
    began_s = time.perf_counter()
    return check_links(exchange, swap, torch.device("cpu"), timeout_s), time.perf_counter() - began_s
