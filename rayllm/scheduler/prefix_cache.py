"""Full KV blocks, found again by what they hold."""

from __future__ import annotations

from hashlib import sha256

from rayllm.scheduler.block_pool import BlockPool
from rayllm.scheduler.sequence import Sequence


def _root(cache_salt: str, is_beyond: bool) -> bytes:
    # The words keep a salt from posing as a block: no block's parent begins with them.
    words = b"rayllm prefix cache beyond the rope boundary: " if is_beyond else b"rayllm prefix cache: "
    return sha256(words + cache_salt.encode("utf-8", "surrogatepass")).digest()


class PrefixCache:
    """Knows a full block by a hash over its tokens and the hash of the block before it, so that equal hashes
    mean equal prefixes; the first block's parent is a hash of the request's salt and of
    what else the KV depends on. sha256, because a collision
    would show one user another's text.

    A block is *announced* when a sequence that will compute it starts to run, and *published* once a
    committed step did compute it. Sequences that need an announced block wait for it, so that a prefix that
    many share is computed once.
    """

    def __init__(self, pool: BlockPool, block_size: int, *, enabled: bool = True):
        self.enabled = enabled
        self._pool = pool
        self._block_size = block_size
        self._published: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._announced: dict[bytes, Sequence] = {}
        pool.on_evict = self._forget

    def lookup(self, sequence: Sequence) -> list[int] | None:
        """The published blocks that `sequence` can start with; None while a running sequence, of no lower
        priority, computes the one that comes next.

        Its last token is never covered: there must be logits to sample from. Changes no owner.
        """
        if not self.enabled or sequence.prompt_logprobs is not None:  # those need every position computed
            return []
        if sequence.awaited is not None and self._is_coming(sequence.awaited, sequence):
            return None
        sequence.awaited = None
        limit = (len(sequence.tokens) - 1) // self._block_size
        hits: list[int] = []
        for block_hash in self._hashes(sequence, limit)[:limit]:
            block = self._published.get(block_hash)
            if block is None:
                if self._is_coming(block_hash, sequence):
                    sequence.awaited = block_hash
                    return None
                break
            hits.append(block)
        return hits

    def announce(self, sequence: Sequence) -> None:
        """`sequence` has begun to run and will compute the blocks of its known tokens that no one has yet."""
        if self.enabled:
            for block_hash in self._hashes(sequence, len(sequence.tokens) // self._block_size):
                if block_hash not in self._published:
                    self._announced.setdefault(block_hash, sequence)

    def publish(self, sequence: Sequence, num_blocks: int) -> None:
        """The KV of the first `num_blocks` blocks of `sequence` is computed, and the step committed.

        Where an equal block is known already, that one stays and this one remains private to its sequence.
        """
        hashes = self._hashes(sequence, num_blocks)
        for index in range(sequence.num_published, num_blocks):
            block_hash, block = hashes[index], sequence.blocks[index]
            if block_hash not in self._published:
                self._published[block_hash] = block
                self._hash_of[block] = block_hash
                self._pool.keep(block)
            if self._announced.get(block_hash) is sequence:
                del self._announced[block_hash]
        sequence.num_published = num_blocks

    def withdraw(self, sequence: Sequence) -> None:
        """`sequence` stops: what it announced and did not publish, no one need wait for."""
        for block_hash in (sequence.block_hashes or [])[sequence.num_published :]:
            if self._announced.get(block_hash) is sequence:
                del self._announced[block_hash]

    def invalidate(self, sequence: Sequence) -> None:
        """KV of the prefixes of `sequence` is not to be used again, whoever has it."""
        for block_hash in sequence.block_hashes or ():
            if block_hash in self._published:
                self._pool.forget(self._published[block_hash])

    def reset(self) -> None:
        """Nothing that is published so far is found any more; sequences keep the blocks that they hold."""
        for block in list(self._hash_of):
            self._pool.forget(block)

    def _is_coming(self, block_hash: bytes, sequence: Sequence) -> bool:
        """Whether `sequence` can expect the block from another that runs."""
        owner = self._announced.get(block_hash)
        # Behind an owner of lower priority it could wait long: better to compute the block twice.
        return owner is not None and owner.priority <= sequence.priority

    def _forget(self, block: int) -> None:
        del self._published[self._hash_of.pop(block)]

    def _hashes(self, sequence: Sequence, num_blocks: int) -> list[bytes]:
        """At least the first `num_blocks` hashes of `sequence`; each is worked out once."""
        if sequence.block_hashes is None:
            self._extend(sequence.prompt_hashes, sequence, sequence.num_prompt_tokens // self._block_size)
            sequence.block_hashes = sequence.prompt_hashes.copy()
        self._extend(sequence.block_hashes, sequence, num_blocks)
        return sequence.block_hashes

    def _extend(self, hashes: list[bytes], sequence: Sequence, num_blocks: int) -> None:
        if len(hashes) >= num_blocks:
            return
        parent = hashes[-1] if hashes else _root(sequence.request.cache_salt, sequence.is_beyond)
        for start in range(len(hashes) * self._block_size, num_blocks * self._block_size, self._block_size):
            tokens = sequence.tokens[start : start + self._block_size]
            parent = sha256(parent + tokens.tobytes()).digest()
            hashes.append(parent)

    def check(self, running: list[Sequence]) -> None:
        """`AssertionError` unless published blocks are kept ones and announcements are those of `running`."""
        assert self._hash_of == {block: block_hash for block_hash, block in self._published.items()}
        assert self._hash_of.keys() == self._pool.kept, "kept blocks and published blocks differ"
        for block_hash, owner in self._announced.items():
            assert any(owner is sequence for sequence in running), f"{owner} announced a block and does not run"
            assert block_hash in (owner.block_hashes or [])[owner.num_published :], "a stale announcement"
