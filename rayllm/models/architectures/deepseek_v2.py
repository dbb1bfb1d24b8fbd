"""DeepSeek-V2: Llama with latent attention, and after the first layers a mixture of experts with shared ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.architectures import llama
from rayllm.models.config_fields import MAX_HEADS, MAX_WIDTH, ConfigFields, latent_score_scale
from rayllm.models.sparse_fields import read_grouped_router, shared_expert_names, with_shared_experts
from rayllm.spec import DecoderSpec, LatentAttentionSpec, NormSpec
from rayllm.weights.stored import Stored, interleaved_rows

MODEL_TYPES = ("deepseek_v2",)
EXAMPLES = ("deepseek-ai/DeepSeek-V2-Lite-Chat", "deepseek-ai/DeepSeek-V2.5")
_ATTENTION = "model.layers.{}.self_attn"
_DEFAULTS = {"first_k_dense_replace": 0, "hidden_act": "silu", "moe_intermediate_size": 1407, "n_shared_experts": 2}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads DeepSeek-V2's config."""
    config = {**_DEFAULTS, **hf_config}
    fields = ConfigFields(config)
    fields.choice("scoring_func", {"softmax": "softmax"}, default="softmax")
    if fields.flag("norm_topk_prob", False):
        raise ConfigError("norm_topk_prob=True is not supported: its meaning in this architecture is not settled")
    if not fields.choice("topk_method", {"greedy": False, "group_limited_greedy": True}, default="greedy"):
        fields = ConfigFields({**config, "n_group": 1, "topk_group": 1})
    router = read_grouped_router(fields, 64, scoring="softmax", renormalize=False, float32=True)
    mixed = with_shared_experts(with_latent_attention(config, default_positions=2048), fields, router)
    return replace(mixed, architecture="DeepseekV2ForCausalLM")


def with_latent_attention(
    hf_config: Mapping[str, Any], *, default_positions: int, in_pairs: bool = True
) -> DecoderSpec:
    """Llama's spec with latent attention, from the fields that all DeepSeek models have. The norms of latents do not
    take `rms_norm_eps`: theirs is fixed."""
    fields = ConfigFields(hf_config)
    fields.integer("moe_layer_freq", 1, 1, default=1)
    rope_dim = fields.integer("qk_rope_head_dim", 2, MAX_WIDTH, default=64)
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    fields.integer("num_key_value_heads", num_heads, num_heads, default=num_heads)
    base = llama.spec({**hf_config, "head_dim": rope_dim}, default_positions=default_positions)
    rope = base.layers[0].attention.rope
    assert rope is not None
    nope_dim = fields.integer("qk_nope_head_dim", 1, MAX_WIDTH, default=128)
    has_q_latent = fields.get("q_lora_rank") is not None or "q_lora_rank" not in hf_config
    bias = fields.flag("attention_bias", False)
    attention = LatentAttentionSpec(
        num_heads,
        nope_dim,
        value_dim=fields.integer("v_head_dim", 1, MAX_WIDTH, default=128),
        latent_dim=fields.integer("kv_lora_rank", 1, MAX_WIDTH, default=512),
        scale=(nope_dim + rope_dim) ** -0.5 * latent_score_scale(fields, rope),
        norm=NormSpec("rms", 1e-6),
        rope=replace(rope, in_pairs=in_pairs),
        q_latent_dim=fields.integer("q_lora_rank", 1, MAX_WIDTH, default=1536) if has_q_latent else None,
        latent_bias=bias,
        out_bias=bias,
    )
    return replace(base, layers=tuple(replace(layer, attention=attention) for layer in base.layers))


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttentionSpec)
    k_up, v_up = interleaved_rows(
        f"{_ATTENTION}.kv_b_proj", attention.num_heads, attention.nope_dim, attention.value_dim
    )
    return {
        **llama.names(spec),
        **shared_expert_names("model.layers.{}.mlp"),
        "layers.q": f"{_ATTENTION}.{'q_proj' if attention.q_latent_dim is None else 'q_b_proj'}",
        "layers.q_down": f"{_ATTENTION}.q_a_proj",
        "layers.q_latent_norm": f"{_ATTENTION}.q_a_layernorm",
        "layers.kv_down": f"{_ATTENTION}.kv_a_proj_with_mqa",
        "layers.kv_latent_norm": f"{_ATTENTION}.kv_a_layernorm",
        "layers.k_up": k_up,
        "layers.v_up": v_up,
    }
