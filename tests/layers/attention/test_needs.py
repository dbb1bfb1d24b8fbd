"""Why the kernels of a library refuse a model."""

from __future__ import annotations

from dataclasses import replace

import attention_libraries
import pytest
import torch
from attention_step import CPU

from rayllm.layers.attention.needs import AttentionNeeds, refusal_of_library
from rayllm.spec import GroupedAttentionSpec, LatentAttentionSpec, NormSpec, RopeSpec

GROUPED = GroupedAttentionSpec(8, 2, 128, 0.1)
LATENT = LatentAttentionSpec(6, 10, 14, 24, 0.2, NormSpec("rms", 1e-6), RopeSpec(1e4, 6))
NEEDS = AttentionNeeds((GROUPED,), 1, 64, torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        (NEEDS, ""),
        (replace(NEEDS, dtype=torch.float32), "it computes in float16 and bfloat16, and the model in float32"),
        (replace(NEEDS, specs=(GROUPED, LATENT)), "the model has latent attention"),
        (replace(NEEDS, specs=(replace(GROUPED, head_dim=96),)), "it has no kernel for head_dim=96"),
        (replace(NEEDS, specs=(replace(GROUPED, has_sinks=True),)), "the model has attention sinks, which"),
        (replace(NEEDS, specs=(replace(GROUPED, alibi_slopes=(0.5,) * 8),)), "the model has ALiBi, which"),
    ],
)
def test_the_reason_is_named(needs: AttentionNeeds, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attention_libraries.install(monkeypatch, "some_attention")
    found = refusal_of_library(needs, "some_attention", "Some Attention", (64, 128))
    assert found.startswith(reason)
    assert bool(found) == bool(reason)


def test_a_library_that_is_missing_is_named() -> None:
    assert refusal_of_library(NEEDS, "no_such_module", "It", (128,)) == "It is not installed (no module no_such_module)"
