"""InternLM2: Llama with queries, keys and values fused by key/value head, and names of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama
from rayllm.models.config_fields import ConfigFields
from rayllm.spec import DecoderSpec, GroupedAttentionSpec
from rayllm.weights.stored import Stored, interleaved_rows

MODEL_TYPES = ("internlm2", "internlm")
"""The first published files have the type of the model before."""
EXAMPLES = ("internlm/internlm2-chat-7b",)
_LAYER = "model.layers.{}"
_NAMES = {
    "embedding": "model.tok_embeddings",
    "layers.attention_norm": f"{_LAYER}.attention_norm",
    "layers.out": f"{_LAYER}.attention.wo",
    "layers.mlp_norm": f"{_LAYER}.ffn_norm",
    "layers.gate": f"{_LAYER}.feed_forward.w1",
    "layers.up": f"{_LAYER}.feed_forward.w3",
    "layers.down": f"{_LAYER}.feed_forward.w2",
    "final_norm": "model.norm",
    "lm_head": "output",
}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads InternLM2's config, where `bias` is that of attention."""
    bias = ConfigFields(hf_config).flag("bias", True)
    base = llama.spec({"hidden_act": "silu", **hf_config, "attention_bias": bias, "mlp_bias": False})
    return replace(base, architecture="InternLM2ForCausalLM")


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules: for each key/value head the rows of its queries, then the key's and the value's."""
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttentionSpec)
    sizes = (attention.num_heads // attention.num_kv_heads * attention.head_dim, attention.head_dim, attention.head_dim)
    parts = interleaved_rows(f"{_LAYER}.attention.wqkv", attention.num_kv_heads, *sizes)
    return {**_NAMES, **{f"layers.{name}": rows for name, rows in zip("qkv", parts, strict=True)}}
