"""Each kernel reference against a naive float64 computation: odd shapes, poisoned buffers, untouched slots."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rayllm_kernels.activation import ACTIVATIONS, silu_mul
from rayllm_kernels.attention import paged_decode, paged_prefill, prompt_attention
from rayllm_kernels.kv_cache import page_rows, write_kv
from rayllm_kernels.norm import add_rms_norm, layer_norm, rms_norm
from rayllm_kernels.rope import rope

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
BLOCK_SIZE = 4


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; NaN anywhere makes it NaN, which no bound accepts."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (5, 7, 24)])
def test_rms_norm_divides_by_the_root_mean_square(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = _random(*shape, dtype=dtype), _random(shape[-1], dtype=dtype, seed=1)
    wide = x.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert _error(rms_norm(x, weight, 1e-5), expected) < DTYPES[dtype]


def test_rms_norm_takes_a_weight_for_each_head() -> None:
    x, weight = _random(5, 3, 8), _random(3, 8, seed=1)
    each = [rms_norm(x[:, head], weight[head], 1e-5) for head in range(3)]
    assert _error(rms_norm(x, weight, 1e-5), torch.stack(each, dim=1).double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_returns_the_sum_as_the_next_residual(dtype: torch.dtype) -> None:
    x, residual, weight = (_random(3, 33, dtype=dtype, seed=i) for i in range(3))
    wide = x.double() + residual.double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight[0].double()
    normed, total = add_rms_norm(x, residual, weight[0], 1e-6)
    assert total.data_ptr() == residual.data_ptr()
    assert _error(total, wide) < DTYPES[dtype]
    assert _error(normed, expected) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
def test_layer_norm_centres_and_scales(biased: bool, dtype: torch.dtype) -> None:
    x, weight, bias = (_random(5, 37, dtype=dtype, seed=i) for i in range(3))
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight[0].double()
    if biased:
        expected = expected + bias[0].double()
    assert _error(layer_norm(x, weight[0], bias[0] if biased else None, 1e-5), expected) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotary_dim", [8, 24])
def test_rope_turns_each_pair_and_leaves_the_channels_past_the_rotary_width(
    rotary_dim: int, dtype: torch.dtype
) -> None:
    x = _random(7, 3, 24, dtype=dtype)
    angles = torch.rand(7, rotary_dim // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
    cos, sin = (torch.cat((f(angles),) * 2, dim=-1).to(dtype) for f in (torch.cos, torch.sin))
    expected = x.double().clone()
    half = rotary_dim // 2
    for token in range(7):
        for pair in range(half):
            turn = complex(cos[token, pair], sin[token, pair])
            for head in range(3):
                z = complex(x[token, head, pair], x[token, head, pair + half]) * turn
                expected[token, head, pair], expected[token, head, pair + half] = z.real, z.imag
    before = x.clone()
    found = rope(x, cos, sin)
    assert _error(found, expected) < DTYPES[dtype]
    assert torch.equal(found[..., rotary_dim:], x[..., rotary_dim:])
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul_gates_the_right_half_by_the_left(dtype: torch.dtype) -> None:
    x = _random(3, 2 * 13, dtype=dtype)
    gate, up = x.double().chunk(2, dim=-1)
    assert _error(silu_mul(x), gate * torch.sigmoid(gate) * up) < DTYPES[dtype]


def test_activations_follow_their_definitions() -> None:
    x = _random(3, 17)
    wide = x.double()
    expected = {
        "silu": wide * torch.sigmoid(wide),
        "relu": wide.clamp(min=0),
        "gelu": wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2))),
        "gelu_tanh": wide * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))),
    }
    assert ACTIVATIONS.keys() == expected.keys()
    for name, values in expected.items():
        assert _error(ACTIVATIONS[name](x), values) < 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_write_kv_fills_its_slots_and_leaves_all_others_bit_for_bit(dtype: torch.dtype) -> None:
    cache = _random(6, 3, BLOCK_SIZE, 5, dtype=dtype)
    k_cache, v_cache = cache.clone(), cache.clone() + 1
    k, v = _random(4, 3, 5, dtype=dtype, seed=1), _random(4, 3, 5, dtype=dtype, seed=2)
    slots = torch.tensor([9, 0, 23, 10])
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for token, slot in enumerate(slots.tolist()):
        expected_k[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = k[token]
        expected_v[slot // BLOCK_SIZE, :, slot % BLOCK_SIZE] = v[token]
    strided_v = torch.cat((v, v), dim=1)[:, :3]
    write_kv(k, strided_v, k_cache, v_cache, slots)
    assert torch.equal(k_cache, expected_k)
    assert torch.equal(v_cache, expected_v)


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
        self.keys = [_random(n, num_kv_heads, head_dim, dtype=dtype, seed=10 + i) for i, n in enumerate(lens)]
        self.values = [_random(n, num_kv_heads, head_dim, dtype=dtype, seed=20 + i) for i, n in enumerate(lens)]
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(6, 2, 8), (4, 4, 24), (7, 1, 16)])
@pytest.mark.parametrize("lens", [[13, 6], [5, 5], [1, 16]])
def test_paged_decode_attends_to_each_rows_own_keys(
    lens: list[int], num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    pages = _Pages(lens, num_kv_heads, head_dim, dtype)
    q = _random(2, num_heads, head_dim, dtype=dtype)
    width = -(-max(lens) // BLOCK_SIZE) * BLOCK_SIZE
    mask = torch.full((2, num_kv_heads, width), -math.inf, dtype=dtype)
    for row, length in enumerate(lens):
        mask[row, :, :length] = 0
    index, workspace = pages.index([0, 1]), _workspace(dtype)
    found = paged_decode(q, pages.k_cache, pages.v_cache, index, mask.view(-1, 1, width), 0.3, workspace)
    group = num_heads // num_kv_heads
    for row, length in enumerate(lens):
        for head in range(num_heads):
            k, v = (x[row][:, head // group] for x in (pages.keys, pages.values))
            expected = _naive(q[row, head].unsqueeze(0), k, v, length - 1, 0.3)[0]
            assert _error(found[row, head], expected) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 3])
def test_paged_prefill_is_causal_from_the_chunks_offset(window: int | None, dtype: torch.dtype) -> None:
    pages = _Pages([14, 3], 2, 8, dtype)
    q = _random(5, 6, 8, dtype=dtype)
    positions = torch.arange(9, 14).unsqueeze(1)
    allowed = torch.arange(14) <= positions
    if window is not None:
        allowed &= torch.arange(14) > positions - window
    mask = torch.zeros(5, 14, dtype=dtype).masked_fill_(~allowed, -math.inf)
    found = paged_prefill(q, pages.k_cache, pages.v_cache, pages.index([0]), 14, mask, 0.3, _workspace(dtype))
    for head in range(6):
        k, v = (x[0][:, head // 3] for x in (pages.keys, pages.values))
        assert _error(found[:, head], _naive(q[:, head], k, v, 9, 0.3, window)) < 2 * DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (3, 3), (5, 1)])
def test_prompt_attention_keeps_prompts_apart(num_heads: int, num_kv_heads: int, dtype: torch.dtype) -> None:
    length, rows = 7, 3
    q = _random(rows * length, num_heads, 8, dtype=dtype)
    k, v = (_random(rows * length, num_kv_heads, 8, dtype=dtype, seed=i) for i in (1, 2))
    found = prompt_attention(q, k, v, rows, None, 0.3)
    for row in range(rows):
        span = slice(row * length, (row + 1) * length)
        for head in range(num_heads):
            kv_head = head // (num_heads // num_kv_heads)
            expected = _naive(q[span, head], k[span, kv_head], v[span, kv_head], 0, 0.3)
            assert _error(found[span, head], expected) < 2 * DTYPES[dtype]


def test_page_rows_place_a_token_and_head_in_the_flat_cache() -> None:
    cache = torch.arange(3 * 2 * BLOCK_SIZE).view(3, 2, BLOCK_SIZE)
    rows = page_rows(torch.tensor([5, 8]), 2, BLOCK_SIZE)
    assert cache.flatten()[rows].tolist() == [int(cache[b, h, o]) for b, o in ((1, 1), (2, 0)) for h in (0, 1)]
