"""Prompts and chunks by FlashAttention 3, whose module is a fake."""

from __future__ import annotations

import attention_libraries
import pytest
import torch
from attention_step import CPU, HEAD_DIM, NUM_KV_HEADS, SCALE, Step, expected_THD

from rayllm.layers.attention import AttentionGroup, AttentionNeeds, LayerAttention
from rayllm.layers.attention.flash_attention import FlashAttentionBackend
from rayllm.spec import GroupedAttentionSpec


@pytest.fixture
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = attention_libraries.flash_attn_with_kvcache
    attention_libraries.install(monkeypatch, "flash_attn_interface", flash_attn_with_kvcache=attend)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (12, None), (None, 0.7)])
def test_a_step_of_all_kinds_of_lines_equals_float64(window: int | None, soft_cap: float | None) -> None:
    step = Step(torch.float32)
    layer = LayerAttention(AttentionGroup(NUM_KV_HEADS, HEAD_DIM, window), SCALE, soft_cap)
    backend = FlashAttentionBackend([[layer.group]], torch.float32, CPU)
    [metadata], kv = backend.prepare(step.batch().with_device_rows()), step.pool.layers[0]
    k_TKD, v_TKD = step.new(step.keys), step.new(step.values)
    backend.write(k_TKD, v_TKD, kv, metadata, layer)
    found_THD = backend.forward(step.q_THD, k_TKD, v_TKD, kv, metadata, layer)
    torch.testing.assert_close(found_THD.double(), expected_THD(step, layer), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_library")
def test_what_it_cannot_compute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GroupedAttentionSpec(8, 2, 128, 0.1)
    monkeypatch.setattr(AttentionNeeds, "capability", lambda _: (9, 0))
    assert FlashAttentionBackend.refusal(AttentionNeeds((spec,), 1, 64, torch.bfloat16, CPU)) == ""
    monkeypatch.setattr(AttentionNeeds, "capability", lambda _: (10, 0))
    reason = FlashAttentionBackend.refusal(AttentionNeeds((spec,), 1, 64, torch.bfloat16, CPU))
    assert reason == "its kernels are for compute capability 9.0, and this GPU has 10.0"
