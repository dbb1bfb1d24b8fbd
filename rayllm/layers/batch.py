"""The tensors of one step. Shape letters: T tokens of the step, R rows (sequences) in it, N positions whose logits
are wanted, B blocks of the longest row's table, L layers, H query heads, K key/value heads, D head width, P block size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input, the same on every rank. Rows with one token come first (`num_decode_rows` of them), then rows
    with more; a row's tokens stand together, in order of position. KV of a row's earlier positions is in its blocks.
    """

    token_ids_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, counted from 0 in the sequence."""
    slots_T: Tensor
    """int64: where the token's K and V go, block * block_size + offset."""
    query_starts: list[int]
    """R + 1 offsets into T, on the host."""
    kv_lens: list[int]
    """R: tokens a row's last query attends to, itself included, on the host."""
    block_table_RB: Tensor
    """int32; entries past a row's own blocks name one that is never written, and must not be read as data."""
    logits_indices_N: Tensor
    """int64 indices into T."""
    num_decode_rows: int
    block_size: int

    @property
    def num_rows(self) -> int:
        return len(self.kv_lens)


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's KV pool on this rank: two tensors `[blocks, K, P, D]`."""

    k: Tensor
    v: Tensor


class KVPool:
    """Every layer's KV on one rank, in one tensor `[L, 2, blocks, K, P, D]`; `layers` are views of it."""

    def __init__(self, pool: Tensor):
        self._pool = pool
        self.layers = [LayerKV(k, v) for k, v in pool]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes these blocks in every layer."""
        self._pool.index_fill_(2, torch.tensor(blocks, device=self._pool.device), 0)


def allocate_kv(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVPool:
    """A pool of `num_blocks` blocks for every layer. What they hold is not known: a block is cleared when it is first
    given away. On CPU the operating system gives memory to those blocks alone that are used."""
    shape = (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)
    return KVPool(torch.empty(shape, dtype=dtype, device=device))
