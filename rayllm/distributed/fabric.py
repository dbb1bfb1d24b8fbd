"""The check of the links between ranks, before anything waits for them: each pair exchanges two messages."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from rayllm.distributed.exchange import Exchange
from rayllm.distributed.links import Link, opponents

TIMEOUT_S = {"cpu": 5.0, "cuda": 10.0}
"""For a pair. A good link connects and exchanges within some tens of milliseconds, NCCL between nodes within a second
or two."""
_LARGE_BYTES = {"cpu": 2**20, "cuda": 2**25}
_REPEATS = 3
"""The first exchange also connects: the fastest one counts."""

Swap = Callable[[Tensor, int], Tensor]
"""Sends a tensor to a peer and returns, when both are done, what the peer sent: a tensor of the same shape."""


def check_links(exchange: Exchange, swap: Swap, device: torch.device, timeout_s: float | None = None) -> list[Link]:
    """What this rank sees of its links. All ranks call it; in each round those that are not in the same pair do not
    disturb each other. After a round with a bad link there is no other: the group may be unusable."""
    timeout_s = TIMEOUT_S[device.type] if timeout_s is None else timeout_s
    links: list[Link] = []
    for number, peer in enumerate(opponents(exchange.rank, exchange.size)):
        problem = ""
        if peer is not None:
            links.append(_measured(exchange.rank, peer, exchange.size, swap, device, timeout_s))
            problem = links[-1].problem
        if any(exchange.gather(f"links {number}", problem)):
            break
    return links


def swap_in_group(sent: Tensor, peer: int) -> Tensor:
    """A `Swap` by the process's default group. As a batch: NCCL then makes no communicator for each pair."""
    received = torch.empty_like(sent)
    works = dist.batch_isend_irecv([dist.P2POp(dist.isend, sent, peer), dist.P2POp(dist.irecv, received, peer)])
    for work in works:
        work.wait()
    if sent.is_cuda:
        torch.cuda.synchronize(sent.device)
    return received


def _measured(rank: int, peer: int, size: int, swap: Swap, device: torch.device, timeout_s: float) -> Link:
    """In a thread of its own: to connect to a peer that does not answer may block for ever."""
    found: list[Link] = []

    def measure() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            found.append(_exchanged(rank, peer, size, swap, device))
        except Exception as error:
            found.append(Link(rank, peer, problem=f"failed: {' '.join(str(error).split()) or type(error).__name__}"))

    thread = threading.Thread(target=measure, name="link-check", daemon=True)
    thread.start()
    thread.join(timeout_s)
    return found[0] if found else Link(rank, peer, problem=f"got no answer within {timeout_s:g} s")


def _exchanged(rank: int, peer: int, size: int, swap: Swap, device: torch.device) -> Link:
    best_s: list[float] = []
    for num_words in (1, _LARGE_BYTES[device.type] // 8):
        pattern = torch.arange(num_words, device=device) * size
        best_s.append(float("inf"))
        for _ in range(_REPEATS):
            began_s = time.perf_counter()
            received = swap(pattern + rank, peer)
            best_s[-1] = min(best_s[-1], time.perf_counter() - began_s)
            if not torch.equal(received, pattern + peer):
                return Link(rank, peer, problem=f"received other values than were sent ({8 * num_words} bytes)")
    return Link(rank, peer, best_s[0] * 1e6, _LARGE_BYTES[device.type] / best_s[1] / 1e9)
