"""A step of attention for the tests of backends, and what it gives in float64, token by token."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from rayllm.layers.attention import LayerAttention
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import KVPool, KVSpec

CPU = torch.device("cpu")
BLOCK_SIZE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, SCALE = 4, 6, 2, 16, 0.3
ROWS = [(9, 1), (0, 1), (30, 1), (5, 7), (0, 6), (0, 6), (0, 11)]
"""(tokens with KV, new tokens): decode rows of several lengths, a chunk, whole prompts of equal and of other length."""
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


def expected_THD(step: Step, layer: LayerAttention) -> Tensor:
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
