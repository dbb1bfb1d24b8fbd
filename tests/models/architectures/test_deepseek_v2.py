from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import check_against_transformers
from mixtures import make_mixture
from ranks import RankPool
from transformers import DeepseekV2Config

from rayllm.errors import ConfigError
from rayllm.layers.kv_cache import KVPool
from rayllm.models.architectures import deepseek_v2
from rayllm.models.decoder import kv_specs
from rayllm.models.memory_plan import kv_bytes_per_token
from rayllm.spec import ExpertSpec, LatentAttentionSpec, MlpSpec, NormSpec, RopeSpec, RouterSpec, SparseMlpSpec

TINY: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 96,
    "num_hidden_layers": 2, "vocab_size": 288, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1,
    "kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 20,
    "first_k_dense_replace": 1, "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 16.0, "original_max_position_embeddings": 32,
    "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 0.5,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "queries of a latent, groups": {
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0,
    },
    "plain queries, yarn": {"q_lora_rank": None, "rope_parameters": YARN},
    "dense, biases, wide values": {
        "attention_bias": True, "mlp_bias": True, "v_head_dim": 28, "first_k_dense_replace": 2,
    },
}  # fmt: skip
LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "torch_dtype": "bfloat16",
    "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "first_k_dense_replace": 1, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "norm_topk_prob": False, "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27,
    "num_key_value_heads": 16, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
    "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128, "vocab_size": 102400,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip
"""Of DeepSeek-V2-Lite."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_equal_transformers(variant: str, tmp_path: Path, two_ranks: RankPool) -> None:
    config = DeepseekV2Config(**{**TINY, **VARIANTS[variant]})
    check_against_transformers(make_mixture(tmp_path, config), two_ranks, expert_parallel=True)


@pytest.mark.parametrize("tp_size", [1, 2, 8])
def test_the_kv_of_a_token_is_compressed(tp_size: int) -> None:
    """DeepSeek-V2-Lite's: each rank keeps a latent and a rotary key, whatever heads it has."""
    spec = deepseek_v2.spec(LITE)
    for dtype in (torch.bfloat16, torch.float32):
        expected = 27 * (512 + 64) * dtype.itemsize
        assert kv_bytes_per_token(spec, tp_size, dtype.itemsize) == expected
        pool = KVPool(kv_specs(spec, tp_size), 2, 16, dtype, torch.device("cpu"))
        assert sum(cache.nbytes for layer in pool.layers for cache in layer) == 2 * 16 * expected


def test_the_config_of_v2_lite_is_read() -> None:
    spec = deepseek_v2.spec(LITE)
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttentionSpec)
    mscale = 0.1 * 0.707 * math.log(40) + 1
    assert attention.scale == pytest.approx(192**-0.5 * mscale**2)
    assert attention.rope.attention_factor == 1.0
    assert (attention.q_latent_dim, attention.rope.in_pairs, attention.rope.rotary_dim) == (None, True, 64)
    assert spec.max_model_len == 163_840
    assert [layer.feed_forward.kind for layer in spec.layers] == ["dense"] + ["sparse"] * 26


def test_what_the_config_leaves_out_is_as_the_config_class_has_it() -> None:
    said = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "num_experts_per_tok")
    layer = deepseek_v2.spec({**{name: LITE[name] for name in said}, "intermediate_size": 8}).layers[0]
    router = RouterSpec(64, 6, "softmax", renormalize=False, float32=True)
    shared = MlpSpec(2 * 1407, "silu", gated=True)
    assert layer.feed_forward == SparseMlpSpec(router, ExpertSpec(1407, "silu"), shared)
    assert layer.attention == LatentAttentionSpec(
        16, 128, 128, 512, 192**-0.5, NormSpec("rms", 1e-6), RopeSpec(1e4, 64, in_pairs=True), q_latent_dim=1536
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_key_value_heads": 8}, r"num_key_value_heads=8 is outside \[16, 16\]"),
        ({"kv_lora_rank": 0}, r"kv_lora_rank=0 is outside"),
        ({"qk_rope_head_dim": 7}, r"rotary width of 7; it must be even"),
        ({"q_lora_rank": "1536"}, r"q_lora_rank='1536' must be an integer"),
        ({"norm_topk_prob": True}, r"norm_topk_prob=True is not supported"),
        ({"topk_method": "noaux_tc"}, r"topk_method='noaux_tc' is not supported"),
        ({"scoring_func": "sigmoid"}, r"scoring_func='sigmoid' is not supported"),
        ({"moe_layer_freq": 2}, r"moe_layer_freq=2 is outside"),
        ({"rope_scaling": {**YARN, "mscale_all_dim": "1"}}, r"mscale_all_dim='1' must be a number"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepseek_v2.spec({**LITE, **fields})
