"""The check of links: many ranks as threads whose messages go through queues, and two processes over gloo."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import collectives
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor

from rayllm.distributed import fabric
from rayllm.distributed.exchange import Exchange
from rayllm.distributed.fabric import check_links
from rayllm.distributed.links import Link

Fault = Callable[[int, int, Tensor], Tensor]
"""What becomes of a message from one rank to another."""


def _checked(size: int, fault: Fault = lambda sender, receiver, x: x, timeout_s: float = 20.0) -> list[list[Link]]:
    """Each rank's links."""
    mail: dict[tuple[int, int], queue.Queue[Tensor]] = defaultdict(queue.Queue)
    for pair in ((a, b) for a in range(size) for b in range(size)):
        mail[pair] = queue.Queue()
    store = dist.HashStore()

    def check(rank: int) -> list[Link]:
        def swap(sent: Tensor, peer: int) -> Tensor:
            mail[rank, peer].put(fault(rank, peer, sent))
            return mail[peer, rank].get()

        return check_links(Exchange(store, rank, size), swap, torch.device("cpu"), timeout_s)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(check, range(size)))


@pytest.fixture(autouse=True)
def _small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fabric._LARGE_BYTES, "cpu", 4096)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_every_rank_measures_its_link_to_every_other(size: int) -> None:
    for rank, links in enumerate(_checked(size)):
        assert sorted(link.peer for link in links) == [peer for peer in range(size) if peer != rank]
        for link in links:
            assert (link.rank, link.problem) == (rank, "")
            assert 0 < link.latency_us < 1e6
            assert link.gigabytes_per_s > 0


def _problems(ranks: list[list[Link]]) -> dict[tuple[int, int], str]:
    return {(link.rank, link.peer): link.problem for links in ranks for link in links if link.problem}


def test_a_pair_that_hangs_is_found_by_both_ends_and_no_other_pair_is_blamed() -> None:
    forever = threading.Event()

    def hang(sender: int, receiver: int, x: Tensor) -> Tensor:
        if {sender, receiver} == {1, 2}:
            forever.wait(30.0)
        return x

    found = _problems(_checked(4, hang, timeout_s=2.5))
    forever.set()
    assert found == dict.fromkeys([(1, 2), (2, 1)], "got no answer within 2.5 s")


@pytest.mark.parametrize(("num_words", "num_bytes"), [(1, 8), (512, 4096)])
def test_a_link_that_changes_what_it_carries_is_found(num_words: int, num_bytes: int) -> None:
    def corrupt(sender: int, receiver: int, x: Tensor) -> Tensor:
        broken = (sender, receiver) == (3, 0) and len(x) == num_words
        return x.index_fill(0, torch.tensor([num_words - 1]), -1) if broken else x

    found = _problems(_checked(4, corrupt, timeout_s=3.0))
    assert found[0, 3] == f"received other values than were sent ({num_bytes} bytes)"
    assert set(found) <= {(0, 3), (3, 0)}  # rank 3 may see that rank 0 has stopped


def test_a_link_that_fails_at_once_is_told_with_its_error() -> None:
    def refuse(sender: int, receiver: int, x: Tensor) -> Tensor:
        raise RuntimeError("Connection refused\nby peer")

    assert _problems(_checked(2, refuse)) == {
        (0, 1): "failed: Connection refused by peer", (1, 0): "failed: Connection refused by peer",
    }  # fmt: skip


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


def test_processes_check_their_links_over_gloo_and_find_a_peer_that_hangs(two_ranks: RankPool, tmp_path: Path) -> None:
    [[ours], [theirs]], seconds = zip(*two_ranks.run(collectives.check_link, str(tmp_path / "good"), 5.0, False))
    assert (ours.problem, theirs.problem) == ("", "")
    assert ours.gigabytes_per_s > 0.01
    assert min(seconds) < 2.0  # 0.05 s on an idle machine
    [[ours], [theirs]], _ = zip(*two_ranks.run(collectives.check_link, str(tmp_path / "bad"), 1.0, True))
    assert ours.problem == "got no answer within 1 s"
    assert theirs.problem == "got no answer within 1 s"
