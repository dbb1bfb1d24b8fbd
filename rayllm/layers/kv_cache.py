"""A rank's paged KV cache: for each layer the tensors that its kind of attention keeps of every token.

Shape letters: H heads that the cache holds, P block size, W width of what is kept of a token and head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LayerKV = tuple[Tensor, ...]
"""One layer's cache, `[blocks, H, P, W]` for each of its `KVSpec.widths`: keys and values, say."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """What one layer keeps of a token on one rank: for each of `num_heads` heads, a vector of each of `widths`.

    Grouped attention keeps a key and a value for each key/value head; latent attention one compressed vector for all
    heads; a layer without a cache has no widths.
    """

    num_heads: int
    widths: tuple[int, ...]

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        return self.num_heads * sum(self.widths) * dtype.itemsize


class KVPool:
    """`num_blocks` blocks of as many parts as there are `specs`; tensors of one shape are in one allocation. Layer i
    uses part `part_of_layer[i]`, or part i: layers of different KV groups share a part, and never have the same block.

    What blocks hold at first is not known. On CPU, where the operating system gives memory only to blocks that are
    used, a block is cleared when it is first given away; on a GPU all are at the start, or none where the attention
    backend reads no slot that was not written.
    """

    def __init__(
        self,
        specs: Sequence[KVSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        part_of_layer: Sequence[int] | None = None,
    ):
        shapes = [(spec.num_heads, width) for spec in specs for width in spec.widths]
        self._pools = {
            (heads, width): torch.empty((number, num_blocks, heads, block_size, width), dtype=dtype, device=device)
            for (heads, width), number in Counter(shapes).items()
        }
        unused = {shape: iter(pool.unbind()) for shape, pool in self._pools.items()}
        parts = [tuple(next(unused[spec.num_heads, width]) for width in spec.widths) for spec in specs]
        self.layers: list[LayerKV] = parts if part_of_layer is None else [parts[part] for part in part_of_layer]

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes these blocks in every part."""
        for pool in self._pools.values():
            pool.index_fill_(1, torch.tensor(blocks, device=pool.device), 0)

    def clear_all(self) -> None:
        """Zeroes every block, without waiting for the device."""
        for pool in self._pools.values():
            pool.zero_()
