"""Allocates rows and KV blocks of the workers to running sequences.

**Why freed rows and blocks can be reused at once.** Steps still in flight may write to the blocks of a sequence
that has ended or was preempted. All workers run all plans in order, so those writes come before anything that a plan
made later does with the block, and a new owner writes each slot before it attends to it. The prefix cache is safe too:
such a write goes to a slot after the last one that was committed, and a block is published only when all its slots are.
"""

from __future__ import annotations

from collections.abc import Iterable

from rayllm.scheduler.block_pool import BlockPool
from rayllm.scheduler.prefix_cache import PrefixCache
from rayllm.scheduler.sequence import Sequence, Status


class KVAllocator:
    """`num_rows` rows, and `num_blocks` blocks of `block_size` tokens. All are free and empty at first, as they are at
    the workers when an epoch begins.

    A sequence is allocated a row and blocks, grows by blocks, and is freed. Other sequences find the blocks that it
    computed in the prefix cache until those are evicted.
    """

    def __init__(self, *, num_rows: int, num_blocks: int, block_size: int, enable_prefix_caching: bool):
        self.block_size = block_size
        self._num_rows = num_rows
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(self._pool, block_size, enabled=enable_prefix_caching)
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._freed_rows: list[int] = []

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def num_free_blocks(self) -> int:
        """Cached ones without an owner are free."""
        return self._pool.num_free

    @property
    def num_used_blocks(self) -> int:
        return self._pool.num_used

    def num_slots_filled(self, running: Iterable[Sequence]) -> int:
        """Slots with KV (planned or computed) in the used blocks, which are those of `running`."""
        size = self.block_size
        num_empty = sum(len(sequence.blocks) * size - sequence.num_computed for sequence in running)
        return self._pool.num_used * size - num_empty  # shared blocks are full: none is counted as empty twice

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether a row is free, and so many blocks."""
        return bool(self._free_rows) and self._pool.num_free >= num_blocks

    def can_allocate_without(self, num_blocks: int, without: list[Sequence]) -> bool:
        """`can_allocate`, if these sequences were preempted first."""
        num_missing = num_blocks - self._pool.num_free
        tables = [sequence.blocks for sequence in without]
        return (
            bool(self._free_rows or without)
            and num_missing <= sum(map(len, tables))  # true of nearly all for which the next is, and quick
            and num_missing <= self._pool.num_owned_by_none_but(tables)
        )

    # ------------------------------------------------------------------------------------------- coming and going

    def find_cached(self, sequence: Sequence) -> list[int] | None:
        """Computed blocks that `sequence` can start with; None while one that it needs next is being computed. Valid
        until the next allocation, or while they are pinned."""
        return self._cache.lookup(sequence)

    def pin(self, blocks: list[int]) -> None:
        """Keeps found blocks from being evicted: they have one more owner."""
        self._pool.share(blocks)

    def unpin(self, blocks: list[int]) -> None:
        """Undoes `pin`."""
        self._pool.release(blocks)

    def allocate(self, sequence: Sequence, pinned: list[int]) -> None:
        """Gives it a row, the cached blocks that were `pinned` for it, and new ones for the rest of its tokens.
        `can_allocate` must hold."""
        new_blocks = self._pool.allocate(self.num_blocks_for(len(sequence.tokens)) - len(pinned))
        assert new_blocks is not None, f"no free KV blocks for {sequence}"
        sequence.status = Status.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.blocks = pinned + new_blocks
        sequence.num_published = len(pinned)
        sequence.num_computed = len(pinned) * self.block_size
        self._cache.announce(sequence)

    def grow(self, sequence: Sequence, num_tokens: int) -> list[int] | None:
        """The blocks that it is given beside its own, for its first `num_tokens`; None where fewer are free."""
        blocks = self._pool.allocate(self.num_blocks_for(num_tokens) - len(sequence.blocks))
        if blocks is not None:
            sequence.blocks += blocks
        return blocks

    def free(self, sequence: Sequence) -> None:
        """Frees its row and blocks; the top of this file says why they can be reused at once."""
        assert sequence.row is not None, f"{sequence} has no row to free"
        self._freed_rows.append(sequence.row)
        self._free_rows.append(sequence.row)
        self._cache.withdraw(sequence)
        self._pool.release(sequence.blocks)
        sequence.release()

    def take_freed_rows(self) -> list[int]:
        """Rows freed since the last call, for workers to clear."""
        rows, self._freed_rows = self._freed_rows, []
        return rows

    # --------------------------------------------------------------------------------------------- what is computed

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """The KV of its first `num_tokens` is computed, and the step committed: others may find the full blocks."""
        self._cache.publish(sequence, num_tokens // self.block_size)

    def reset_prefix_cache(self) -> None:
        """Empties the prefix cache; running sequences keep their blocks."""
        self._cache.reset()

    def invalidate(self, sequence: Sequence) -> None:
        """Removes what it has computed from the prefix cache, whether it is still running or not."""
        self._cache.invalidate(sequence)

    def check(self, running: list[Sequence]) -> None:
        """`AssertionError` unless rows and blocks are those of `running`, or free."""
        self._pool.check(sequence.blocks for sequence in running)
        self._cache.check(running)
        rows = [sequence.row for sequence in running if sequence.row is not None]
        assert sorted([*rows, *self._free_rows]) == list(range(self._num_rows)), "a row is lost or allocated twice"
        for sequence in running:
            assert sequence.status is Status.RUNNING
            assert sequence.num_computed <= len(sequence.blocks) * self.block_size, f"{sequence} lacks a block"
            assert sequence.num_published <= sequence.num_computed // self.block_size


def num_blocks_to_grow(num_running: int) -> int:
    """Blocks that no one is admitted to. Half a block for each that runs: with fewer they are soon preempted, with more
    blocks lie idle."""
    return (num_running + 1) // 2
