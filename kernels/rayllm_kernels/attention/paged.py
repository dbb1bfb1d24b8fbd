"""What kernels that read keys and values from pages are given beside the tensors. Shape letters: N lines (sequences) of
a step, M rows of a block table, B blocks of one, H query heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

MIN_PAGE_SIZE = 16
MAX_HEAD_DIM = 256


@dataclass(frozen=True, slots=True, eq=False)
class PagedLines:
    """Some lines of a step, on the device: kernels read lengths and tables there, so that the shapes of a launch follow
    from the shapes here alone."""

    rows_N: Tensor
    """int32: each line's row in `block_table_MB`."""
    kv_lens_N: Tensor
    """int32: keys of the line's last query, itself included. 0 marks a line without keys, which is skipped."""
    block_table_MB: Tensor
    """int32. Entries past a row's own blocks, and those behind its window, are not read."""
    query_starts_N1: Tensor
    """int32, N + 1 offsets. Not read by the kernels for one query a line."""
    first_query: int = 0
    """What of `query_starts_N1` is the first query given."""


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """How scores become weights: softmax(soft_cap(q @ k.T * scale) + bias), where the key is not after the query."""

    scale: float
    window: int | None = None
    """A query sees itself and the `window - 1` keys before it; None: all before it."""
    soft_cap: float | None = None
    """c * tanh(score / c) (Gemma 2)."""
    sinks_H: Tensor | None = None
    """float32: one more score of each head in the softmax's sum, without a value (gpt-oss)."""
    slopes_H: Tensor | None = None
    """float32: slope * (key position - query position) is the bias (Press et al., 2022)."""
    k_scale: float = 1.0
    """Keys are the cache's numbers times this; 1 unless the cache is in float8."""
    v_scale: float = 1.0
    """The same of values."""


def refusal_of_kernels(head_dim: int, page_size: int) -> str:
    """Why the Triton kernels do not take heads so wide, or pages of this size; empty where they do."""
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim={head_dim} is above {MAX_HEAD_DIM}, the widest that RayLLM's kernels take"
    if page_size % MIN_PAGE_SIZE:
        return f"block_size={page_size} is not a multiple of {MIN_PAGE_SIZE}, as RayLLM's kernels need"
    return ""
