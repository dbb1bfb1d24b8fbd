"""The tensors of one step. Shape letters: T tokens of the step, R rows (sequences) in it, N positions whose logits
are wanted, B blocks of the longest row's table, S KV groups (layers that share a block table).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """A step's rows for kernels that read lengths and tables on the device, with shapes that may be padded: M rows that
    the worker has, R rows (or more lines, for a CUDA graph of a fixed size) in the step. A padding line has
    `kv_lens_R` 0 and no tokens."""

    rows_R: Tensor
    """int32: each line's row in `block_table_SMB`."""
    query_starts_R1: Tensor
    """int32, R + 1 offsets into T."""
    kv_lens_R: Tensor
    """int32: tokens a line's last query attends to, itself included."""
    block_table_SMB: Tensor
    """int32, by KV group: the tables of all rows of the worker. Entries past a row's own blocks mean nothing."""
    num_decode_lines: int
    """The first lines, with one token each (or padding)."""
    max_query_len: int
    """Tokens of the longest line."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's input, the same on every rank. Rows with one token come first (`num_decode_rows` of them), then rows
    with more; a row's tokens stand together, in order of position. KV of a row's earlier positions is in its blocks.
    """

    token_ids_T: Tensor
    """int64."""
    positions_T: Tensor
    """int64, counted from 0 in the sequence."""
    slots_ST: Tensor
    """int64: where the token's K and V go in the layers of each KV group, block * block_size + offset."""
    query_starts: list[int]
    """R + 1 offsets into T, on the host."""
    kv_lens: list[int]
    """R: tokens a row's last query attends to, itself included, on the host."""
    block_table_SRB: Tensor | None
    """int32, by KV group. Entries past a row's own blocks name one that is never written, and must not be read as data;
    blocks behind the group's window may be another row's, and must not be read at all. None for backends that read
    `device_rows`."""
    logits_indices_N: Tensor
    """int64 indices into T."""
    num_decode_rows: int
    block_size: int
    beyond_T: Tensor | None = None
    """bool: whether the token's sequence, as far as it is known, is longer than `DecoderSpec.rope_boundary`; None for a
    model without one."""
    device_rows: DeviceRows | None = None
    """For attention backends that need no host (`AttentionBackend.uses_device_rows`)."""

    @property
    def num_rows(self) -> int:
        return len(self.kv_lens)

    def with_device_rows(self) -> Batch:
        """The same step with `device_rows` made of what the host knows: copies, for a step by itself. Line r is row r
        of `block_table_SRB`."""
        starts, device = self.query_starts, self.positions_T.device
        assert self.block_table_SRB is not None, "only the device knows the tables"
        rows = DeviceRows(
            rows_R=torch.arange(self.num_rows, dtype=torch.int32, device=device),
            query_starts_R1=torch.tensor(starts, dtype=torch.int32, device=device),
            kv_lens_R=torch.tensor(self.kv_lens, dtype=torch.int32, device=device),
            block_table_SMB=self.block_table_SRB,
            num_decode_lines=self.num_decode_rows,
            max_query_len=max((end - begin for begin, end in pairwise(starts)), default=0),
        )
        return replace(self, device_rows=rows)
