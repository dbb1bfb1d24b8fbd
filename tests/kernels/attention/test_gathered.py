"""Paged attention against a naive one in float64; pages of others are NaN."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_accuracy import TOLERANCES, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.attention.gathered import gathered_chunk, gathered_decode, prompt_attention
from rayllm_kernels.kv_cache.reference import write_kv

BLOCK_SIZE = 4


def _naive(q_TD: Tensor, k_LD: Tensor, v_LD: Tensor, first: int, scale: float, window: int | None = None) -> Tensor:
    """float64 attention of one head; query i stands at position first + i."""
    out = []
    for i, q in enumerate(q_TD.double()):
        position = first + i
        begin = 0 if window is None else max(0, position - window + 1)
        k, v = k_LD[begin : position + 1].double(), v_LD[begin : position + 1].double()
        out.append(((k @ q) * scale).softmax(0) @ v)
    return torch.stack(out)


class _Pages:
    """Two rows' keys and values in pages in no order; every page that is not theirs is NaN, every stale slot large."""

    def __init__(self, lens: list[int], num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        self.lens = lens
        self.k_cache = torch.full((12, num_kv_heads, BLOCK_SIZE, head_dim), math.nan, dtype=dtype)
        self.v_cache = self.k_cache.clone()
        self.keys = [random_tensor(n, num_kv_heads, head_dim, dtype=dtype, seed=10 + i) for i, n in enumerate(lens)]
        self.values = [random_tensor(n, num_kv_heads, head_dim, dtype=dtype, seed=20 + i) for i, n in enumerate(lens)]
        blocks = [7, 2, 11, 5, 1, 9, 4, 10]
        self.tables = [[blocks.pop() for _ in range(-(-n // BLOCK_SIZE))] for n in lens]
        for row, table in enumerate(self.tables):
            self.k_cache[table] = 1e3
            self.v_cache[table] = 1e3
            slots = [table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(lens[row])]
            write_kv(self.keys[row], self.values[row], self.k_cache, self.v_cache, torch.tensor(slots))

    def index(self, rows: list[int]) -> Tensor:
        num_kv_heads = self.k_cache.shape[1]
        width = max(len(self.tables[row]) for row in rows)
        index = []
        for row in rows:
            table = self.tables[row] + [self.tables[row][0]] * (width - len(self.tables[row]))
            index += [block * num_kv_heads + head for head in range(num_kv_heads) for block in table]
        return torch.tensor(index)


def _workspace(dtype: torch.dtype) -> Tensor:
    return torch.full((2, 4096), math.nan, dtype=dtype)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 8), (4, 4, 24), (7, 1, 16)])
@pytest.mark.parametrize("lens", [[13, 6], [5, 5], [1, 16]])
def test_gathered_decode_attends_to_each_rows_own_keys(
    lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    pages = _Pages(lens, num_kv_heads, head_dim, dtype)
    q = random_tensor(2, num_heads, head_dim, dtype=dtype)
    width = -(-max(lens) // BLOCK_SIZE) * BLOCK_SIZE
    mask = torch.full((2, num_kv_heads, width), -math.inf, dtype=dtype)
    for row, length in enumerate(lens):
        mask[row, :, :length] = 0
    index, workspace = pages.index([0, 1]), _workspace(dtype)
    found = gathered_decode(q, pages.k_cache, pages.v_cache, index, mask.view(-1, 1, width), 0.3, workspace)
    group = num_heads // num_kv_heads
    for row, length in enumerate(lens):
        for head in range(num_heads):
            k, v = (x[row][:, head // group] for x in (pages.keys, pages.values))
            expected = _naive(q[row, head].unsqueeze(0), k, v, length - 1, 0.3)[0]
            assert relative_error(found[row, head], expected) < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("window", [None, 3])
def test_gathered_chunk_is_causal_from_the_chunks_offset(window: int | None, dtype: torch.dtype) -> None:
    pages = _Pages([14, 3], 2, 8, dtype)
    q = random_tensor(5, 6, 8, dtype=dtype)
    positions = torch.arange(9, 14).unsqueeze(1)
    allowed = torch.arange(14) <= positions
    if window is not None:
        allowed &= torch.arange(14) > positions - window
    mask = torch.zeros(5, 14, dtype=dtype).masked_fill_(~allowed, -math.inf)
    found = gathered_chunk(q, pages.k_cache, pages.v_cache, pages.index([0]), 14, mask, 0.3, _workspace(dtype))
    for head in range(6):
        k, v = (x[0][:, head // 3] for x in (pages.keys, pages.values))
        assert relative_error(found[:, head], _naive(q[:, head], k, v, 9, 0.3, window)) < 2 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 3), (5, 1)])
def test_prompt_attention_keeps_prompts_apart(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    length, rows = 7, 3
    q = random_tensor(rows * length, num_heads, 8, dtype=dtype)
    k, v = (random_tensor(rows * length, num_kv_heads, 8, dtype=dtype, seed=i) for i in (1, 2))
    found = prompt_attention(q, k, v, rows, None, 0.3)
    for row in range(rows):
        span = slice(row * length, (row + 1) * length)
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            expected = _naive(q[span, head], k[span, kv_head], v[span, kv_head], 0, 0.3)
            assert relative_error(found[span, head], expected) < 2 * TOLERANCES[dtype]
