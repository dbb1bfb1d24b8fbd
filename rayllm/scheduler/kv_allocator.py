"""Allocates rows and KV blocks of the workers to running sequences.

**Why freed rows and blocks can be reused at once.** Steps still in flight may write to the blocks of a sequence
that has ended or was preempted, and read the blocks that one has let go of behind its window. All workers run all plans
in order, so those writes and reads come before anything that a plan made later does with the block, and a new owner
writes each slot before it attends to it. The prefix cache is safe too: such a write goes to a slot after the last one
that was committed, and a block is published only when all its slots are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from collections.abc import Sequence as SequenceOf

from rayllm.kv_layout import KVSpan
from rayllm.scheduler.block_pool import BlockPool
from rayllm.scheduler.prefix_cache import CachedPrefix, PrefixCache
from rayllm.scheduler.sequence import BlockTable, Sequence, Status


class KVAllocator:
    """`num_rows` rows, and `num_blocks` blocks of `block_size` tokens. All are free and empty at first, as they are at
    the workers when an epoch begins.

    A sequence is allocated a row and blocks, grows by blocks, and is freed. It has a block table for each KV group, of
    the blocks that `spans` says; as it grows it lets go of those behind the group's window. Other sequences find the
    blocks that it computed in the prefix cache until those are evicted.
    """

    def __init__(self, *, num_rows: int, num_blocks: int, spans: SequenceOf[KVSpan], enable_prefix_caching: bool):
        self.block_size = spans[0].block_size
        self._spans = spans
        self._windows = [(group, span) for group, span in enumerate(spans) if span.window is not None]
        self._has_one_table = len(spans) == 1 and not self._windows
        """As with most models: growing is quick then."""
        self._num_rows = num_rows
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(self._pool, spans, enabled=enable_prefix_caching)
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
        num_empty = sum(table.end * size - sequence.num_computed for sequence in running for table in sequence.tables)
        return self._pool.num_used * size - num_empty  # shared blocks are full: none is counted as empty twice

    def num_blocks_to_grow(self, num_running: int) -> int:
        """Blocks that no one is admitted to. In each group half a block for each sequence that runs: with fewer they
        are soon preempted, with more blocks lie idle."""
        return (num_running * len(self._spans) + 1) // 2

    def can_allocate(self, num_blocks: int) -> bool:
        """Whether a row is free, and so many blocks."""
        return bool(self._free_rows) and self._pool.num_free >= num_blocks

    def can_allocate_without(self, num_blocks: int, without: list[Sequence]) -> bool:
        """`can_allocate`, if these sequences were preempted first."""
        num_missing = num_blocks - self._pool.num_free
        tables = list(_tables(without))
        return (
            bool(self._free_rows or without)
            and num_missing <= sum(map(len, tables))  # true of nearly all for which the next is, and quick
            and num_missing <= self._pool.num_owned_by_none_but(tables)
        )

    # ------------------------------------------------------------------------------------------- coming and going

    def find_cached(self, sequence: Sequence) -> CachedPrefix | None:
        """The computed prefix that `sequence` can start with; None while a block that it needs next is being computed.
        Valid until the next allocation, or while it is pinned."""
        return self._cache.lookup(sequence)

    def pin(self, prefix: CachedPrefix) -> None:
        """Keeps its blocks from being evicted: they have one more owner."""
        for table in prefix.tables:
            self._pool.share(table.blocks)

    def unpin(self, prefix: CachedPrefix) -> None:
        """Undoes `pin`."""
        for table in prefix.tables:
            self._pool.release(table.blocks)

    def num_blocks_beside(self, prefix: CachedPrefix, sequence: Sequence) -> int:
        """New blocks that `allocate` gives it."""
        return sum(self._num_missing(prefix.tables, len(sequence.tokens)))

    def allocate(self, sequence: Sequence, pinned: CachedPrefix) -> None:
        """Gives it a row, the prefix that was `pinned` for it, and new blocks for the rest of its tokens, or for the
        largest step where a window lets go of some. `can_allocate` must hold."""
        sequence.status = Status.RUNNING
        sequence.row = self._free_rows.pop()
        sequence.tables = pinned.tables
        sequence.num_published = pinned.num_blocks
        sequence.num_computed = pinned.num_blocks * self.block_size
        added = self._extend(sequence, len(sequence.tokens))
        assert added is not None, f"no free KV blocks for {sequence}"
        self._cache.announce(sequence)

    def grow(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, list[int]]] | None:
        """The blocks that it is given beside its own, by group, for its first `num_tokens`; None where fewer are free.
        It lets go of those that it does not need any more."""
        if not self._has_one_table:
            for group, span in self._windows:
                self._free_behind(sequence, sequence.tables[group], span)
            return self._extend(sequence, max(num_tokens, len(sequence.tokens)))
        table = sequence.tables[0]
        blocks = self._pool.allocate(-(-num_tokens // self.block_size) - table.end)
        if blocks is None:
            return None
        table.blocks += blocks
        table.end += len(blocks)
        sequence.num_slots = table.end * self.block_size
        return [(0, blocks)]

    def _free_behind(self, sequence: Sequence, table: BlockTable, span: KVSpan) -> None:
        begin = span.begin(sequence.num_computed)
        if self._cache.enabled:
            begin = min(begin, sequence.num_published)
        if (num_behind := begin - table.first) > 0:
            self._pool.release(table.blocks[:num_behind])
            del table.blocks[:num_behind]

    def _num_missing(self, tables: list[BlockTable], num_tokens: int) -> list[int]:
        return [span.end(table.first, num_tokens) - table.end for span, table in zip(self._spans, tables)]

    def _extend(self, sequence: Sequence, num_tokens: int) -> list[tuple[int, list[int]]] | None:
        missing = self._num_missing(sequence.tables, num_tokens)
        blocks = self._pool.allocate(sum(missing))
        if blocks is None:
            return None
        added = []
        for group, (table, num_blocks) in enumerate(zip(sequence.tables, missing)):
            new_blocks, blocks = blocks[:num_blocks], blocks[num_blocks:]
            table.blocks += new_blocks
            table.end += num_blocks
            added.append((group, new_blocks))
        sequence.num_slots = min(table.end for table in sequence.tables) * self.block_size
        return added

    def free(self, sequence: Sequence) -> None:
        """Frees its row and blocks; the top of this file says why they can be reused at once."""
        assert sequence.row is not None, f"{sequence} has no row to free"
        self._freed_rows.append(sequence.row)
        self._free_rows.append(sequence.row)
        self._cache.withdraw(sequence)
        for table in sequence.tables:
            self._pool.release(table.blocks)
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
        self._pool.check(_tables(running))
        self._cache.check(running)
        rows = [sequence.row for sequence in running if sequence.row is not None]
        assert sorted([*rows, *self._free_rows]) == list(range(self._num_rows)), "a row is lost or allocated twice"
        for sequence in running:
            assert sequence.status is Status.RUNNING
            assert sequence.num_computed <= sequence.num_slots, f"{sequence} lacks a block"
            assert sequence.num_published <= sequence.num_computed // self.block_size
            for span, table in zip(self._spans, sequence.tables, strict=True):
                assert sequence.num_slots <= table.end * self.block_size, f"{sequence} lacks a block"
                assert table.first <= span.begin(sequence.num_computed), f"{sequence} lacks a block that it sees"
                assert span.window is None or len(table.blocks) <= span.max_blocks, f"{sequence} keeps what it must not"


def _tables(sequences: Iterable[Sequence]) -> Iterator[list[int]]:
    return (table.blocks for sequence in sequences for table in sequence.tables)
