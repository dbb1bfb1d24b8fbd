"""GPT-2: learned positions, layer norms, biases everywhere, matrices stored as [inputs, outputs]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.config_fields import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    ConfigFields,
    read_activation,
    read_dtype,
)
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec, PositionsSpec
from rayllm.weights.stored import Stored, Tensor, Transposed, split_rows

MODEL_TYPES = ("gpt2",)
EXAMPLES = ("openai-community/gpt2",)
_LAYER = "transformer.h.{}"
_NAMES: dict[str, str | Stored] = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "layers.attention_norm": f"{_LAYER}.ln_1",
    "layers.out": Transposed(Tensor(f"{_LAYER}.attn.c_proj")),
    "layers.mlp_norm": f"{_LAYER}.ln_2",
    "layers.up": Transposed(Tensor(f"{_LAYER}.mlp.c_fc")),
    "layers.down": Transposed(Tensor(f"{_LAYER}.mlp.c_proj")),
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
}


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads GPT-2's config. `reorder_and_upcast_attn` guards training in float16 against overflow: it changes no
    result, and scores are scaled before they are rounded here, so there is nothing to do for it."""
    fields = ConfigFields(hf_config)
    fields.flag("reorder_and_upcast_attn", False)
    if fields.flag("add_cross_attention", False):
        raise ConfigError("add_cross_attention=True is not supported: there is no encoder to attend to")
    hidden_size = fields.integer("n_embd", 1, MAX_WIDTH)
    num_heads = fields.integer("n_head", 1, MAX_HEADS)
    if hidden_size % num_heads:
        raise ConfigError(f"n_embd={hidden_size} is not a multiple of n_head={num_heads}")
    num_layers = fields.integer("n_layer", 1, MAX_LAYERS)
    num_positions = fields.integer("n_positions", 1, MAX_POSITIONS, default=1024)
    head_dim = hidden_size // num_heads
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    by_layer = fields.flag("scale_attn_by_inverse_layer_idx", False)
    attentions = [
        GroupedAttentionSpec(
            num_heads,
            num_heads,
            head_dim,
            scale=scale / (layer + 1) if by_layer else scale,
            qkv_bias=True,
            out_bias=True,
        )
        for layer in range(num_layers)
    ]
    mlp = MlpSpec(
        fields.integer("n_inner", 1, MAX_WIDTH, default=4 * hidden_size),
        read_activation(fields, "activation_function", default="gelu_new"),
        gated=False,
        bias=True,
    )
    norm = NormSpec("layer", fields.number("layer_norm_epsilon", 0, 1, default=1e-5))
    return DecoderSpec(
        architecture="GPT2LMHeadModel",
        dtype=read_dtype(fields),
        vocab_size=fields.integer("vocab_size", 1, MAX_VOCAB),
        hidden_size=hidden_size,
        layers=tuple(LayerSpec(attention, mlp, norm) for attention in attentions),
        final_norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings", True),
        max_model_len=num_positions,
        positions=PositionsSpec(num_positions, offset=0),
    )


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    width = spec.hidden_size
    parts = split_rows(Transposed(Tensor(f"{_LAYER}.attn.c_attn")), width, width, width)
    return {**_NAMES, **{f"layers.{name}": part for name, part in zip("qkv", parts, strict=True)}}
