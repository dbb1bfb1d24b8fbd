"""GLM-4 in the layout of `transformers`: Llama that turns neighbouring channels of half of each head, with gate and up
fused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama
from rayllm.spec import DecoderSpec, MlpSpec
from rayllm.weights.stored import Stored, split_rows

MODEL_TYPES = ("glm",)
EXAMPLES = ("zai-org/glm-4-9b-chat-hf",)
_DEFAULTS = {
    "num_key_value_heads": 2,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1.5625e-7,
    "hidden_act": "silu",
    "attention_bias": True,
}
"""Of the config classes of `transformers`, where they are not Llama's."""


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads GLM's config."""
    base = llama.spec({**_DEFAULTS, **hf_config, "mlp_bias": False}, default_head_dim=128, default_positions=131_072)
    rope = base.layers[0].attention.rope
    assert rope is not None
    layer = llama.with_attention(base.layers[0], rope=replace(rope, in_pairs=True), out_bias=False)
    return replace(base, architecture="GlmForCausalLM", layers=(layer,) * base.num_layers)


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules: Llama's, with the rows of gate and up one after another."""
    mlp = spec.layers[0].feed_forward
    assert isinstance(mlp, MlpSpec)
    gate, up = split_rows("model.layers.{}.mlp.gate_up_proj", mlp.intermediate_size, mlp.intermediate_size)
    return {**llama.names(spec), "layers.gate": gate, "layers.up": up}
