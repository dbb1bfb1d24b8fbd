"""Latent attention by a backend, absorbed and expanded, against float64 token by token."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rayllm.layers.attention import (
    GatheredBackend,
    LatentAttention,
    LatentLayerAttention,
    TritonBackend,
    gathered_latent,
)
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import KVPool, KVSpec
from rayllm.linear import PerHeadLinear
from rayllm.spec import LatentAttentionSpec, NormSpec, RopeSpec

CPU = torch.device("cpu")
BLOCK_SIZE = 4
SPEC = LatentAttentionSpec(6, 10, 14, 24, 0.2, NormSpec("rms", 1e-6), RopeSpec(1e4, 6))
ROWS = [(9, 1), (0, 1), (30, 1), (5, 7), (21, 2), (0, 6), (0, 6), (0, 11)]
"""(tokens with KV, new tokens): decode rows of several lengths, chunks, whole prompts of equal and of other length."""


class Step:
    """One step of `ROWS` over a pool that holds the latents of the tokens before it."""

    def __init__(self, dtype: torch.dtype, spec: LatentAttentionSpec = SPEC) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(dtype)

        self.latents = [normal(done + new, spec.kv_dim) for done, new in ROWS]
        self.q_THD = normal(sum(new for _, new in ROWS), spec.num_heads, spec.qk_dim)
        self.k_up, self.v_up = (normal(spec.num_heads, n, spec.latent_dim) / 4 for n in (spec.nope_dim, spec.value_dim))
        self.layer = LatentLayerAttention(
            LatentAttention.group(spec, 0, 1),
            spec,
            PerHeadLinear(self.k_up.transpose(1, 2)),
            PerHeadLinear(self.k_up),
            PerHeadLinear(self.v_up),
        )
        num_blocks = [-(-len(row) // BLOCK_SIZE) for row in self.latents]
        blocks = list(range(sum(num_blocks)))
        random.Random(1).shuffle(blocks)
        self.tables = [[blocks.pop() for _ in range(count)] for count in num_blocks]
        self.pool = KVPool([KVSpec(*spec.kv_shape(1))], sum(num_blocks) + 1, BLOCK_SIZE, dtype, CPU)
        self.pool.clear(range(sum(num_blocks) + 1))
        (self.cache,) = self.pool.layers[0]
        for (done, _), table, row in zip(ROWS, self.tables, self.latents, strict=True):
            for position in range(done):
                self.cache[table[position // BLOCK_SIZE], 0, position % BLOCK_SIZE] = row[position]

    def batch(self) -> Batch:
        slots = [
            table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for (done, new), table in zip(ROWS, self.tables, strict=True)
            for position in range(done, done + new)
        ]
        starts = [sum(new for _, new in ROWS[:row]) for row in range(len(ROWS) + 1)]
        width = max(map(len, self.tables))
        table = [row + [len(self.cache) - 1] * (width - len(row)) for row in self.tables]
        return Batch(
            token_ids_T=torch.zeros(starts[-1], dtype=torch.int64),
            positions_T=torch.zeros(starts[-1], dtype=torch.int64),
            slots_ST=torch.tensor([slots]),
            query_starts=starts,
            kv_lens=[done + new for done, new in ROWS],
            block_table_SRB=torch.tensor([table], dtype=torch.int32),
            logits_indices_N=torch.tensor([], dtype=torch.int64),
            num_decode_rows=sum(new == 1 for _, new in ROWS),
            block_size=BLOCK_SIZE,
        )

    def new_latents(self) -> Tensor:
        return torch.cat([row[done:] for (done, _), row in zip(ROWS, self.latents, strict=True)])

    def expected(self) -> Tensor:
        """Each token by itself, its keys and values expanded, in float64."""
        spec, outputs, token = self.layer.spec, [], 0
        for (done, new), latents in zip(ROWS, self.latents, strict=True):
            latent_LC, key_LR = latents.double().split((spec.latent_dim, spec.rope.rotary_dim), dim=-1)
            k_HLN, v_HLV = (latent_LC @ up.double().transpose(1, 2) for up in (self.k_up, self.v_up))
            k_HLD = torch.cat((k_HLN, key_LR.expand(spec.num_heads, -1, -1)), dim=-1)
            for end in range(done + 1, done + new + 1):
                scores_HL = (k_HLD[:, :end] @ self.q_THD[token].double().unsqueeze(2)).squeeze(2) * spec.scale
                outputs.append((scores_HL.softmax(-1).unsqueeze(1) @ v_HLV[:, :end]).squeeze(1))
                token += 1
        return torch.stack(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value_dim", [14, 20])
@pytest.mark.parametrize("expands", [True, False, None])
def test_attention_equals_float64_absorbed_or_expanded(
    expands: bool | None, value_dim: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values narrower than keys and wider; chunks in both forms, and in that which is chosen."""
    if expands is not None:
        monkeypatch.setattr(gathered_latent, "expanding_is_cheaper", lambda *_: expands)
    step = Step(dtype, replace(SPEC, value_dim=value_dim))
    layer = step.layer
    backend = GatheredBackend([[layer.group]], dtype, CPU)
    [metadata], kv = backend.prepare(step.batch()), step.pool.layers[0]
    backend.write_latent(step.new_latents(), kv, metadata, layer)
    found_THV = backend.forward_latent(step.q_THD, step.new_latents(), kv, metadata, layer)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found_THV.double(), step.expected(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_backend_equals_float64(dtype: torch.dtype) -> None:
    """By their references here."""
    step = Step(dtype)
    backend = TritonBackend([[step.layer.group]], dtype, CPU)
    [metadata], kv = backend.prepare(step.batch().with_device_rows()), step.pool.layers[0]
    backend.write_latent(step.new_latents(), kv, metadata, step.layer)
    found_THV = backend.forward_latent(step.q_THD, step.new_latents(), kv, metadata, step.layer)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found_THV.double(), step.expected(), atol=tolerance, rtol=tolerance)


def test_every_rank_keeps_one_latent_and_one_key_whatever_the_number_of_heads() -> None:
    assert [SPEC.kv_shape(size) for size in (1, 2, 8)] == [(1, (30,))] * 3
    assert LatentAttention.group(SPEC, 1, 2) == LatentAttention.group(SPEC, 0, 1)
