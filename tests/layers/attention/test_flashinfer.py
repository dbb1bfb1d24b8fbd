"""Prompts and chunks by FlashInfer, whose module is a fake."""

from __future__ import annotations

import attention_libraries
import pytest
import torch
from attention_libraries import BatchPrefillWithPagedKVCacheWrapper
from attention_step import CPU, HEAD_DIM, NUM_KV_HEADS, SCALE, Step, expected_THD

from rayllm.layers.attention import AttentionGroup, AttentionNeeds, LayerAttention
from rayllm.layers.attention.flashinfer import FlashInferBackend
from rayllm.spec import GroupedAttentionSpec


@pytest.fixture
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setattr(wrapper, "num_planned", 0)
    attention_libraries.install(monkeypatch, "flashinfer", BatchPrefillWithPagedKVCacheWrapper=wrapper)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(("window", "soft_cap"), [(None, None), (12, None), (None, 0.7)])
def test_steps_of_all_kinds_of_lines_equal_float64(window: int | None, soft_cap: float | None) -> None:
    step = Step(torch.float32)
    layer = LayerAttention(AttentionGroup(NUM_KV_HEADS, HEAD_DIM, window), SCALE, soft_cap)
    backend = FlashInferBackend([[layer.group]], torch.float32, CPU)
    for _ in range(3):
        [metadata], kv = backend.prepare(step.batch().with_device_rows()), step.pool.layers[0]
        k_TKD, v_TKD = step.new(step.keys), step.new(step.values)
        backend.write(k_TKD, v_TKD, kv, metadata, layer)
        for _ in range(2):  # as two layers, which share what is planned
            found_THD = backend.forward(step.q_THD, k_TKD, v_TKD, kv, metadata, layer)
            torch.testing.assert_close(found_THD.double(), expected_THD(step, layer), atol=1e-5, rtol=1e-5)
    assert BatchPrefillWithPagedKVCacheWrapper.num_planned == 3


@pytest.mark.usefixtures("_library")
def test_the_plan_of_a_step_on_its_way_is_left_alone() -> None:
    step = Step(torch.float32)
    layer = LayerAttention(AttentionGroup(NUM_KV_HEADS, HEAD_DIM), SCALE)
    backend, kv = FlashInferBackend([[layer.group]], torch.float32, CPU), step.pool.layers[0]
    planned = []
    for _ in range(3):
        [metadata] = backend.prepare(step.batch().with_device_rows())
        backend.forward(step.q_THD, step.q_THD, step.q_THD, kv, metadata, layer)
        (wrapper,) = metadata.planned.values()
        planned.append(wrapper)
    assert planned[0] is planned[2] is not planned[1]


@pytest.mark.usefixtures("_library")
def test_what_it_cannot_compute_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AttentionNeeds, "capability", lambda _: (7, 5))
    needs = AttentionNeeds((GroupedAttentionSpec(8, 2, 128, 0.1),), 1, 64, torch.bfloat16, CPU)
    assert FlashInferBackend.refusal(needs) == "its kernels need compute capability 8.0, and this GPU has 7.5"
