"""A backend's attention against float64, token by token: windows, soft caps, sinks, ALiBi, ragged rows, chunks."""

from __future__ import annotations

import contextlib
from itertools import product

import pytest
import torch
from attention_step import CPU, HEAD_DIM, NUM_HEADS, NUM_KV_HEADS, SCALE, SLOPES, Step, expected_THD

from rayllm.layers.attention import AttentionGroup, GatheredBackend, LayerAttention, TritonBackend
from rayllm_kernels.device import interpreted
from rayllm_kernels.rope import HeadNorm, Rotation


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
    torch.testing.assert_close(found_THD.double(), expected_THD(step, layer), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("in_pairs", [None, False, True])
def test_kernels_put_into_pages_and_hand_on_what_the_cpu_does(in_pairs: bool | None, has_norm: bool) -> None:
    weight = torch.rand(NUM_HEADS + NUM_KV_HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(1)) + 0.5
    norm = HeadNorm(weight, 1e-6) if has_norm else None
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
    torch.testing.assert_close(found_THD.double(), expected_THD(step, layer), atol=1e-5, rtol=1e-5)
