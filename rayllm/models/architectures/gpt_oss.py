"""gpt-oss: attention with sinks and a window on every second layer, biases everywhere, and experts with a clamped
activation, in MXFP4 or in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.models.architectures import llama, qwen2
from rayllm.models.config_fields import MAX_LAYERS, MAX_WIDTH, ConfigFields
from rayllm.models.sparse_fields import read_num_experts, with_sparse_layers
from rayllm.spec import ClampedSwiglu, DecoderSpec, ExpertSpec, RouterSpec, SparseMlpSpec
from rayllm.weights.mxfp4 import Mxfp4
from rayllm.weights.stored import FirstOf, Rows, Stored, Tensor, Transposed

MODEL_TYPES = ("gpt_oss",)
EXAMPLES = ("openai/gpt-oss-20b",)
QUANTIZATION_METHODS = ("mxfp4",)
_YARN = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
_DEFAULTS = {
    "attention_bias": True,
    "hidden_act": "silu",
    "num_experts_per_tok": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150_000.0,
    "sliding_window": 128,
}
_MLP = "model.layers.{}.mlp"


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads gpt-oss's config."""
    config = {**_DEFAULTS, **hf_config}
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        config["rope_scaling"] = _YARN
    fields = ConfigFields(config)
    base = llama.spec(config, default_head_dim=64, default_positions=131072)
    layers = tuple(
        llama.with_attention(layer, window=window, has_sinks=True)
        for layer, window in zip(base.layers, _layer_windows(config), strict=True)
    )
    num_experts, top_k = read_num_experts(fields, default=128)
    activation = ClampedSwiglu(
        fields.number("swiglu_alpha", 0, 1e6, default=1.702), fields.number("swiglu_limit", 0, 1e6, default=7.0)
    )
    sparse = SparseMlpSpec(
        RouterSpec(num_experts, top_k, "softmax", renormalize=True, bias=True),
        ExpertSpec(fields.integer("intermediate_size", 1, MAX_WIDTH), activation, bias=True),
    )
    mixed = with_sparse_layers(replace(base, layers=layers), sparse, [True] * base.num_layers)
    return replace(mixed, architecture="GptOssForCausalLM")


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules. Rows of gate and up take turns."""
    sparse = spec.layers[0].feed_forward
    assert isinstance(sparse, SparseMlpSpec)
    inner = sparse.expert.intermediate_size
    parts = {
        "gate": ("gate_up_proj", range(0, 2 * inner, 2)),
        "up": ("gate_up_proj", range(1, 2 * inner, 2)),
        "down": ("down_proj", range(spec.hidden_size)),
    }
    experts: dict[str, str | Stored] = {}
    for part, (name, rows) in parts.items():
        stem, num_rows = f"{_MLP}.experts.{name}", spec.hidden_size if part == "down" else 2 * inner
        blocks, scales, bias = (
            Rows(Tensor(f"{stem}_{kind}"), (rows,), num_rows, dim=1) for kind in ("blocks", "scales", "bias")
        )
        plain = Rows(Transposed(Tensor(stem)), (rows,), num_rows, dim=1)
        experts[f"layers.experts.{part}.weight"] = FirstOf((Mxfp4(blocks, scales), plain))
        experts[f"layers.experts.{part}.bias"] = bias
    others = {"layers.router": f"{_MLP}.router", "layers.sinks": "model.layers.{}.self_attn.sinks"}
    return {**llama.names(spec), **experts, **others}


def _layer_windows(config: Mapping[str, Any]) -> list[int | None]:
    num_layers = ConfigFields(config).integer("num_hidden_layers", 1, MAX_LAYERS)
    kinds = ("sliding_attention", "full_attention")
    layer_types = config.get("layer_types") or [kinds[layer % 2] for layer in range(num_layers)]
    return qwen2.layer_windows({**config, "use_sliding_window": True, "layer_types": layer_types}, num_layers)
