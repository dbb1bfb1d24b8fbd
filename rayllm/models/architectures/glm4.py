"""GLM-4-0414: GLM with norms on the outputs of attention and feed-forward too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import glm
from rayllm.spec import DecoderSpec
from rayllm.weights.stored import Stored

MODEL_TYPES = ("glm4",)
EXAMPLES = ("zai-org/GLM-4-9B-0414",)
_OUTPUT_NORMS = {
    "layers.attention_output_norm": "model.layers.{}.post_self_attn_layernorm",
    "layers.mlp_output_norm": "model.layers.{}.post_mlp_layernorm",
}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads GLM-4-0414's config."""
    base = glm.spec(hf_config)
    layers = tuple(replace(layer, norm_placement="input_and_output") for layer in base.layers)
    return replace(base, architecture="Glm4ForCausalLM", layers=layers)


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    return {**glm.names(spec), **_OUTPUT_NORMS}
