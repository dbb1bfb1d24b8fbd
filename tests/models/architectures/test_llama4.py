from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import check_against_transformers
from mixtures import make_mixture
from ranks import RankPool
from safetensors.torch import load_file, save_file
from teacher import load
from transformers import Llama4TextConfig

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models.architectures import llama4
from rayllm.models.registry import spec_of
from rayllm.spec import MlpSpec, SparseMlpSpec

TINY: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "intermediate_size_mlp": 96, "num_hidden_layers": 4, "num_local_experts": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "as Scout": {"rope_parameters": SCALED},
    "as Maverick, two experts": {"interleave_moe_layer_step": 2, "use_qk_norm": False, "num_experts_per_tok": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_equal_transformers(variant: str, tmp_path: Path, two_ranks: RankPool) -> None:
    path = make_mixture(tmp_path, Llama4TextConfig(**TINY, **VARIANTS[variant]))
    check_against_transformers(path, two_ranks, expert_parallel=True)


def test_every_fourth_layer_turns_nothing_and_has_no_norm() -> None:
    spec = llama4.spec(TINY)
    attentions = [layer.attention for layer in spec.layers]
    assert [each.rope is not None for each in attentions] == [True, True, True, False]
    assert [each.qk_norm is not None for each in attentions] == [True, True, True, False]
    assert all(each.rope is None or each.rope.in_pairs for each in attentions)
    named = llama4.spec({**TINY, "no_rope_layers": [0, 1, 1, 0, 1], "moe_layers": [2]})
    assert [layer.attention.rope is not None for layer in named.layers] == [False, True, True, False]
    assert [isinstance(layer.feed_forward, SparseMlpSpec) for layer in named.layers] == [False, False, True, False]
    assert named.layers[0].feed_forward == MlpSpec(96, "silu", gated=True)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 8191),
        ({"attn_temperature_tuning": False}, 8192),
        ({"attention_chunk_size": 64}, 64),
        ({"attention_chunk_size": None, "attn_temperature_tuning": False}, 131_072),
    ],
    ids=str,
)
def test_the_context_ends_where_attention_would_change(
    fields: dict[str, Any], context: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        spec = llama4.spec({**TINY, "max_position_embeddings": 131_072, **fields})
    assert spec.max_model_len == context
    assert (f"ends at {context} of 131072 tokens" in caplog.text) == (context < 131_072)


def test_the_text_part_of_a_model_with_images_is_read(tmp_path: Path) -> None:
    path = make_mixture(tmp_path, Llama4TextConfig(**TINY))
    config = {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "dtype": "float32"}
    config["text_config"] = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config))
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file({**tensors, "vision_model.x": torch.zeros(1)}, path / "model.safetensors")
    assert load(TensorParallel(), path).decoder.spec.architecture == "Llama4ForConditionalGeneration"


@pytest.mark.parametrize(
    "fields",
    [{"no_rope_layers": [1, 2, 1, 1]}, {"no_rope_layers": [1]}, {"moe_layers": [4]}, {"moe_layers": 3}],
    ids=str,
)
def test_lists_that_do_not_fit_are_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        spec_of({**TINY, "architectures": ["Llama4ForCausalLM"], **fields})
