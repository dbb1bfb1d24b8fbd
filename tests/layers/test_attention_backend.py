"""A backend's attention against float64, token by token: windows, soft caps, sinks, ALiBi, ragged rows, chunks."""

from __future__ import annotations

import contextlib
import random
from itertools import product

import pytest
import torch
from torch import Tensor

from rayllm.layers.attention import AttentionGroup, GatheredBackend, LayerAttention, TritonBackend, choose_backend
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import KVPool, KVSpec
from rayllm_kernels.device import interpreted
from rayllm_kernels.rope import HeadNorm, Rotation

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SCALE = 4, 6, 2, 16, 0.3
ROWS = [(9, 1), (0, 1), (30, 1), (5, 7), (0, 6), (0, 6), (0, 11)]
"""(tokens with KV, new tokens): decode rows of several lengths, a chunk, whole prompts of equal and of other length."""
KINDS = list(product([None, 3, 12], [None, 0.7], [False, True], [False, True]))
SLOPES = tuple(2.0 ** -(head + 1) for head in range(NUM_HEADS))


class Step:
    """One step of `ROWS` over a pool that holds the keys and values of the tokens before it."""

    def __init__(self, dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        draw = torch.Generator().manual_seed(0)
        self.keys, self.values = (
            [torch.randn(done + new, NUM_KV_HEADS, HEAD_DIM, generator=draw).to(dtype) for done, new in ROWS]
            for _ in range(2)
        )
        num_tokens = sum(new for _, new in ROWS)
        self.q_THD = torch.randn(num_tokens, NUM_HEADS, HEAD_DIM, generator=draw).to(dtype)
        num_blocks = [-(-(done + new) // self.block_size) for done, new in ROWS]
        blocks = list(range(sum(num_blocks)))
        random.Random(1).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in num_blocks]
        self.pool = KVPool(
            [KVSpec(NUM_KV_HEADS, (HEAD_DIM, HEAD_DIM))], sum(num_blocks) + 1, self.block_size, dtype, CPU
        )
        self.pool.clear(range(sum(num_blocks) + 1))
        for (done, _), table, row_keys, row_values in zip(ROWS, self.tables, self.keys, self.values):
            for position in range(done):
                for cache, row in zip(self.pool.layers[0], (row_keys, row_values)):
                    cache[table[position // self.block_size], :, position % self.block_size] = row[position]

    def batch(self) -> Batch:
        positions = [list(range(done, done + new)) for done, new in ROWS]
        slots = [
            table[position // self.block_size] * self.block_size + position % self.block_size
            for table, row in zip(self.tables, positions)
            for position in row
        ]
        starts = [sum(map(len, positions[:i])) for i in range(len(ROWS) + 1)]
        width = max(map(len, self.tables))
        no_block = self.pool.layers[0][0].shape[0] - 1
        table = [row + [no_block] * (width - len(row)) for row in self.tables]
        return Batch(
            token_ids_T=torch.zeros(starts[-1], dtype=torch.int64),
            positions_T=torch.tensor([position for row in positions for position in row]),
            slots_ST=torch.tensor([slots]),
            query_starts=starts,
            kv_lens=[done + new for done, new in ROWS],
            block_table_SRB=torch.tensor([table], dtype=torch.int32),
            logits_indices_N=torch.tensor([], dtype=torch.int64),
            num_decode_rows=sum(new == 1 for _, new in ROWS),
            block_size=self.block_size,
        )

    def spoil_unwritten_slots(self) -> None:
        written = torch.zeros(len(self.pool.layers[0][0]), self.block_size, dtype=torch.bool)
        for (done, _), table in zip(ROWS, self.tables):
            for position in range(done):
                written[table[position // self.block_size], position % self.block_size] = True
        for cache in self.pool.layers[0]:
            cache.transpose(1, 2)[~written] = torch.nan

    def new(self, rows: list[Tensor]) -> Tensor:
        return torch.cat([row[done:] for (done, _), row in zip(ROWS, rows)])


def _expected(step: Step, layer: LayerAttention) -> Tensor:
    """Each token and head by itself, in float64."""
    group, outputs, token = layer.group, [], 0
    for (done, new), keys, values in zip(ROWS, step.keys, step.values):
        for position in range(done, done + new):
            heads = []
            for head in range(NUM_HEADS):
                first = 0 if group.window is None else max(0, position - group.window + 1)
                k, v = (x[first : position + 1, head * NUM_KV_HEADS // NUM_HEADS].double() for x in (keys, values))
                scores = k @ step.q_THD[token, head].double() * layer.scale
                if layer.soft_cap is not None:
                    scores = layer.soft_cap * (scores / layer.soft_cap).tanh()
                if group.alibi_slopes:
                    scores = scores + group.alibi_slopes[head] * (torch.arange(first, position + 1) - position)
                mass = scores.exp().sum() + (0 if layer.sinks_H is None else layer.sinks_H[head].double().exp())
                heads.append((scores.exp() / mass) @ v)
            outputs.append(torch.stack(heads))
            token += 1
    return torch.stack(outputs)


def test_the_cpu_gathers_and_kernels_read_pages() -> None:
    groups = [[AttentionGroup(NUM_KV_HEADS, HEAD_DIM)]]
    assert isinstance(choose_backend(groups, torch.float32, CPU), GatheredBackend)
    with interpreted():
        assert isinstance(choose_backend(groups, torch.float32, CPU), TritonBackend)


@pytest.mark.parametrize("backend_class", [GatheredBackend, TritonBackend])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("window", "soft_cap", "has_sinks", "has_alibi"),
    list(product([None, 3, 12], [None, 0.7], [False, True], [False, True])),
)
def test_attention_equals_float64(
    window: int | None,
    soft_cap: float | None,
    has_sinks: bool,
    has_alibi: bool,
    dtype: torch.dtype,
    backend_class: type[GatheredBackend] | type[TritonBackend],
) -> None:
    """The kernels' backend by their references here."""
    step = Step(dtype)
    group = AttentionGroup(NUM_KV_HEADS, HEAD_DIM, window, SLOPES if has_alibi else ())
    sinks_H = torch.linspace(-1, 2, NUM_HEADS) if has_sinks else None
    layer = LayerAttention(group, SCALE, soft_cap, sinks_H)
    backend = backend_class([[group]], dtype, CPU)
    [metadata], kv = backend.prepare(step.batch().with_device_rows()), step.pool.layers[0]
    if not backend.reads_unwritten_slots:
        step.spoil_unwritten_slots()
    k_TKD, v_TKD = step.new(step.keys), step.new(step.values)
    backend.write(k_TKD, v_TKD, kv, metadata, layer)
    found_THD = backend.forward(step.q_THD, k_TKD, v_TKD, kv, metadata, layer)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found_THD.double(), _expected(step, layer), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("norm", [None, HeadNorm(torch.rand(NUM_HEADS + NUM_KV_HEADS, HEAD_DIM) + 0.5, 1e-6)], ids=str)
@pytest.mark.parametrize("in_pairs", [None, False, True])
def test_kernels_put_into_pages_and_hand_on_what_the_cpu_does(in_pairs: bool | None, norm: HeadNorm | None) -> None:
    step = Step(torch.float32)
    num_tokens, group = len(step.q_THD), AttentionGroup(NUM_KV_HEADS, HEAD_DIM)
    layer = LayerAttention(group, SCALE)
    qkv = torch.randn(num_tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(2))
    cos, sin = (f(torch.rand(num_tokens, 5)).repeat(1, 2) for f in (torch.cos, torch.sin))
    rotation = None if in_pairs is None else Rotation(cos, sin, in_pairs)
    found = []
    for backend_class in (GatheredBackend, TritonBackend):
        kv = tuple(cache.clone() for cache in step.pool.layers[0])
        with interpreted() if backend_class is TritonBackend else contextlib.nullcontext():
            backend = backend_class([[group]], torch.float32, CPU)
            (metadata,) = backend.prepare(step.batch().with_device_rows())
            q_THD, *_ = backend.rotate_and_write(qkv, rotation, norm, kv, metadata, layer)
        found.append((q_THD, *kv))
    for expected, each in zip(*found, strict=True):
        torch.testing.assert_close(each, expected, atol=1e-6, rtol=1e-5)
    assert not torch.equal(found[0][1], step.pool.layers[0][0])


@pytest.mark.parametrize("has_alibi", [False, True])
def test_kernels_that_read_pages_equal_float64(has_alibi: bool, interpreted_kernels: None) -> None:
    step = Step(torch.float32, block_size=16)
    step.spoil_unwritten_slots()
    layer = LayerAttention(AttentionGroup(NUM_KV_HEADS, HEAD_DIM, 12, SLOPES if has_alibi else ()), SCALE, 0.7)
    backend = TritonBackend([[layer.group]], torch.float32, CPU)
    [metadata], kv = backend.prepare(step.batch().with_device_rows()), step.pool.layers[0]
    k_TKD, v_TKD = step.new(step.keys), step.new(step.values)
    backend.write(k_TKD, v_TKD, kv, metadata, layer)
    found_THD = backend.forward(step.q_THD, k_TKD, v_TKD, kv, metadata, layer)
    torch.testing.assert_close(found_THD.double(), _expected(step, layer), atol=1e-5, rtol=1e-5)
