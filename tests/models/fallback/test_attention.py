"""Masks and arguments of attention, as `transformers` passes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import WINDOW, foreign_checkpoint
from golden import check_against_transformers
from ranks import RankPool
from torch import nn
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_causal_mask_function,
)

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.layers.attention import AttentionGroup, GatheredBackend
from rayllm.models.fallback.attention import CausalMask, ModelAttention, OtherMask, causal_mask, paged_attention
from rayllm.spec import GroupedAttentionSpec

MODELS: dict[str, dict[str, Any]] = {
    "olmo3": WINDOW,
    "cohere2": {**WINDOW, "logit_scale": 0.5},
    "exaone4": {**WINDOW, "head_dim": 16},
    "starcoder2": {"sliding_window": 7, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_decoders_with_windows_equal_transformers(model_type: str, tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(foreign_checkpoint(tmp_path, model_type, **MODELS[model_type]), two_ranks)


def test_a_mask_is_known_by_what_it_allows() -> None:
    window = sliding_window_causal_mask_function(5)
    assert causal_mask(mask_function=causal_mask_function, batch_size=1) == CausalMask(None)
    assert causal_mask(mask_function=window, local_size=5) == CausalMask(5)
    chunks = and_masks(lambda b, h, q, k: q // 5 == k // 5, causal_mask_function)
    for other in (bidirectional_mask_function, chunks, sliding_window_causal_mask_function(6)):
        assert isinstance(causal_mask(mask_function=other, local_size=5), OtherMask)


class Layer(nn.Module):
    layer_idx = 0


def calls(**fields: Any) -> tuple[ModelAttention, Layer]:
    spec = GroupedAttentionSpec(num_heads=2, num_kv_heads=1, head_dim=4, scale=0.5, **fields)
    group = AttentionGroup(1, 4, spec.window)
    backend = GatheredBackend([[group]], torch.float32, torch.device("cpu"))
    attention, layer = ModelAttention("XForCausalLM", [spec], [group], TensorParallel(), backend), Layer()
    attention.bind(layer)
    attention.begin([], [])
    return attention, layer


def attend(layer: Layer, mask: Any = CausalMask(None), heads: int = 2, **arguments: Any) -> None:  # noqa: B008
    q, k = torch.zeros(1, heads, 3, 4), torch.zeros(1, 1, 3, 4)
    paged_attention(layer, q, k, k, mask, scaling=0.5, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_bias": torch.zeros(1)}, "XForCausalLM cannot be served.*Layer passes position_bias"),
        ({"is_causal": False}, "passes is_causal=False"),
        ({"dropout": 0.1}, "passes dropout"),
        ({"mask": None}, "layer 0 attends with no mask"),
        ({"mask": torch.zeros(1)}, "a mask that the model computes itself"),
        ({"mask": OtherMask("chunks")}, r"a mask \(chunks\) that is neither causal nor"),
        ({"mask": CausalMask(3)}, "window 3, but its config.json means None"),
        ({"sliding_window": 3}, "passes sliding_window=3 and masks with window None"),
        ({"heads": 3}, "attends with 3 heads, 1 key/value heads"),
    ],
)
def test_what_would_change_the_result_unseen_is_refused(arguments: dict[str, Any], message: str) -> None:
    _, layer = calls()
    with pytest.raises(ConfigError, match=message):
        attend(layer, **arguments)


def test_layers_that_do_not_call_and_layers_that_call_twice_are_refused() -> None:
    attention, layer = calls()
    with pytest.raises(ConfigError, match="1 of its 1 layers compute attention by themselves"):
        attention.end()
    attention.called(layer)
    attention.end()
    with pytest.raises(ConfigError, match="layer 0 attends more than once"):
        attention.called(layer)


def test_a_layer_needs_a_number() -> None:
    attention, layer = calls()
    layer.layer_idx = 1
    with pytest.raises(ConfigError, match="layer_idx=1 is not the number of a layer"):
        attention.called(layer)
