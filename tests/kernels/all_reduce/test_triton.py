"""The all-reduce kernels of each rank, whose peers have already come where it will meet them."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.all_reduce import MAX_PROGRAMS, Peers, one_shot, reference, shared_bytes, two_shot
from rayllm_kernels.all_reduce.peers import flags_bytes

CHUNK_BYTES = 4096
Kernel = Callable[[Tensor, Peers], None]


class Ranks:
    """The memory of `size` ranks in one process, and each one's view of it."""

    def __init__(self, size: int, capacity_bytes: int = 1 << 16):
        self.size, self._capacity = size, capacity_bytes
        self.blocks = [torch.zeros(shared_bytes(size, capacity_bytes), dtype=torch.uint8) for _ in range(size)]
        self.calls = [torch.zeros(2, dtype=torch.int64) for _ in range(size)]
        self.abort = torch.zeros(1, dtype=torch.int32)

    def view(self, rank: int) -> Peers:
        addresses = torch.tensor([block.data_ptr() for block in self.blocks])
        return Peers(rank, self.size, self._capacity, addresses, self.calls[rank], self.abort)

    def flags(self, rank: int) -> Tensor:
        whole = self.blocks[rank][: flags_bytes(self.size)].view(torch.int64)
        return whole.view(2, MAX_PROGRAMS, self.size)

    def arrive(self, rank: int, call: int, values: Tensor) -> None:
        """As if this rank had come to the last wait of its call."""
        begin = flags_bytes(self.size) + call % 2 * self._capacity
        self.blocks[rank][begin : begin + values.nbytes] = values.view(torch.uint8)
        for peer in range(self.size):
            self.flags(peer)[:, :, rank] = call


def _arrived(xs: list[Tensor], total: Tensor, kernel: Kernel) -> list[Tensor]:
    """What each rank's memory holds at the last wait: its values, and of a two-shot its share of the sum."""
    held = [x.clone() for x in xs]
    if kernel is two_shot:
        block = CHUNK_BYTES // total.element_size()
        share = -(-len(total) // (block * len(xs))) * block
        for rank, mine in enumerate(held):
            mine[rank * share : (rank + 1) * share] = total[rank * share : (rank + 1) * share]
    return held


@pytest.mark.parametrize("kernel", [one_shot, two_shot])
@pytest.mark.parametrize(
    ("size", "numel", "dtype"),
    [(2, 1, torch.float32), (2, 2100, torch.float16), (3, 4099, torch.bfloat16), (8, 9001, torch.bfloat16)],
)
def test_each_rank_has_the_same_sum_of_all(
    kernel: Kernel, size: int, numel: int, dtype: torch.dtype, buffers: Buffers
) -> None:
    xs = [random_tensor(numel, dtype=dtype, seed=rank) for rank in range(size)]
    total = reference.all_reduce(xs)
    assert relative_error(total, torch.stack(xs).double().sum(0)) < KERNEL_TOLERANCES[dtype]
    ranks = Ranks(size)
    for call in (1, 2):
        for rank in {0, size - 1}:
            for peer, held in enumerate(_arrived(xs, total, kernel)):
                if peer != rank:
                    ranks.arrive(peer, call, held)
            x = buffers.inout(xs[rank])
            kernel(x, ranks.view(rank))
            assert torch.equal(x, total)
            assert ranks.calls[rank].tolist() == [call, 0]


def test_a_rank_tells_each_peer_in_which_call_it_is() -> None:
    ranks = Ranks(3)
    ranks.calls[1][0] = 41
    for peer in (0, 2):
        ranks.arrive(peer, 42, torch.ones(1500))
    one_shot(torch.ones(1500), ranks.view(1))
    for peer in range(3):
        assert ranks.flags(peer)[0, :2, 1].tolist() == [42, 42]
        assert ranks.flags(peer)[0, 2:, 1].unique().tolist() == [0]


@pytest.mark.parametrize("kernel", [one_shot, two_shot])
def test_a_wait_for_a_peer_that_has_died_ends_with_the_abort_word(kernel: Kernel) -> None:
    ranks = Ranks(2)
    x = torch.ones(10)
    thread = threading.Thread(target=kernel, args=(x, ranks.view(0)), daemon=True)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    ranks.abort[0] = 1
    thread.join(20.0)
    assert not thread.is_alive()


def test_a_message_that_does_not_fit_or_is_not_contiguous_is_refused() -> None:
    peers = Ranks(2).view(0)
    with pytest.raises(ValueError, match="65600 bytes is longer than the 65536"):
        two_shot(torch.ones(16400), peers)
    with pytest.raises(ValueError, match="up to 524288 bytes, not 800000"):
        one_shot(torch.ones(200_000), dataclasses.replace(peers, capacity_bytes=1 << 20))
    with pytest.raises(ValueError, match="contiguous"):
        one_shot(torch.ones(4, 4).t(), peers)
