"""Who owns which KV block. Only numbers: the memory itself is the workers'."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable


class BlockPool:
    """`num_blocks` blocks, each of them free, owned by one or more sequences, or cached: owned by none, with
    KV worth keeping. Cached blocks count as free and are evicted, the longest unused first, once no others
    are left.

    Every operation takes O(1) for each block it touches.
    """

    def __init__(self, num_blocks: int):
        self.num_blocks = num_blocks
        self.on_evict: Callable[[int], None] = lambda block: None
        """Called with a block that is kept no longer."""
        self._num_owners = [0] * num_blocks
        self.kept: set[int] = set()
        """Blocks whose KV is worth keeping, owned or cached."""
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that have an owner."""
        return self.num_blocks - self.num_free

    def num_owned_by_none_but(self, tables: Iterable[Iterable[int]]) -> int:
        """Blocks that would be free, were all of `tables` released."""
        num_released = Counter(block for table in tables for block in table)
        return sum(self._num_owners[block] == num for block, num in num_released.items())

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Blocks for one new owner, or None (and nothing changed) where fewer are free."""
        if num_blocks == 1 and self._free:  # the most frequent call
            block = self._free.pop()
            self._num_owners[block] = 1
            return [block]
        if num_blocks > self.num_free:
            return None
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """One more owner for blocks that are owned or cached."""
        for block in blocks:
            if not self._num_owners[block]:
                del self._cached[block]
            self._num_owners[block] += 1

    def release(self, blocks: list[int]) -> None:
        """One owner less for each. Later blocks become evictable before earlier ones: a tail is of no use
        without its head."""
        for block in reversed(blocks):
            assert self._num_owners[block], f"block {block} has no owner to release it"
            self._num_owners[block] -= 1
            if not self._num_owners[block]:
                if block in self.kept:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """Marks an owned block as worth keeping: once released it is cached until it is evicted."""
        assert self._num_owners[block], f"block {block} has no owner"
        self.kept.add(block)

    def forget(self, block: int) -> None:
        """A kept block is not worth keeping after all."""
        self.kept.remove(block)
        if not self._num_owners[block]:
            del self._cached[block]
            self._free.append(block)
        self.on_evict(block)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self.kept.remove(block)
        self.on_evict(block)
        return block

    def check(self, tables: Iterable[Iterable[int]] = ()) -> None:
        """`AssertionError` unless every block is exactly one of free, cached and owned, and the owners are
        `tables`."""
        num_owners = [0] * self.num_blocks
        for table in tables:
            for block in table:
                num_owners[block] += 1
        assert num_owners == self._num_owners, "owners and block tables differ"
        unowned = [block for block in range(self.num_blocks) if not num_owners[block]]
        assert sorted([*self._free, *self._cached]) == unowned, "a block is lost, or in two places"
        assert self.kept.issuperset(self._cached), "a cached block is not marked as kept"
        assert self.kept.isdisjoint(self._free), "a free block is marked as kept"
