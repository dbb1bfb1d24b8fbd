"""Llama 4, text alone, up to the first chunk of its attention: pairs of channels turn except in every fourth layer, and
experts whose scores weigh their inputs stand beside a shared one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.architectures import llama
from rayllm.models.config_fields import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_WIDTH,
    ConfigFields,
    read_activation,
    text_config,
)
from rayllm.models.sparse_fields import read_num_experts, with_sparse_layers
from rayllm.spec import DecoderSpec, ExpertSpec, MlpSpec, NormSpec, RouterSpec, SparseMlpSpec
from rayllm.weights.stored import Ones, Rows, Stored, Tensor, Transposed

MODEL_TYPES = ("llama4_text", "llama4")
EXAMPLES = ("meta-llama/Llama-4-Scout-17B-16E-Instruct",)
LEFT_OUT = ("vision_model.", "multi_modal_projector.")
_DEFAULTS = {
    "attention_chunk_size": 8192,
    "hidden_act": "silu",
    "num_experts_per_tok": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}
_MLP = "model.layers.{}.feed_forward"
logger = logging.getLogger(__name__)


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads Llama 4's config, or its `text_config`."""
    config = {**_DEFAULTS, **text_config(hf_config)}
    fields = ConfigFields(config)
    base = llama.spec(config, default_head_dim=128, default_positions=131_072)
    turns = _layers_that_turn(fields, base.num_layers)
    attention = base.layers[0].attention
    assert attention.rope is not None
    norm = NormSpec("rms", base.layers[0].norm.eps) if fields.flag("use_qk_norm", True) else None
    rope = replace(attention.rope, in_pairs=True)
    activation = read_activation(fields, "hidden_act")
    dense = MlpSpec(fields.integer("intermediate_size_mlp", 1, MAX_WIDTH, default=16_384), activation, gated=True)
    turning, still = (
        replace(llama.with_attention(base.layers[0], rope=rope_of, qk_norm=norm_of), feed_forward=dense)
        for rope_of, norm_of in ((rope, norm), (None, None))
    )
    inner = fields.integer("intermediate_size", 1, MAX_WIDTH)
    sparse = SparseMlpSpec(
        RouterSpec(*read_num_experts(fields, 16), "sigmoid", renormalize=False),
        ExpertSpec(inner, activation),
        MlpSpec(inner, activation, gated=True),
        scores_weigh_inputs=True,
    )
    mixed = with_sparse_layers(
        replace(base, layers=tuple(turning if turn else still for turn in turns)),
        sparse,
        _sparse_layers(fields, base.num_layers),
    )
    name = "Llama4ForConditionalGeneration" if "text_config" in hf_config else "Llama4ForCausalLM"
    return replace(mixed, architecture=name, max_model_len=_context(fields, base.max_model_len, turns))


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules, under a prefix in a model that sees images. Queries' and keys' norms have no weight."""
    prefix = "language_model." if spec.architecture == "Llama4ForConditionalGeneration" else ""
    mixtures = [layer.feed_forward for layer in spec.layers if isinstance(layer.feed_forward, SparseMlpSpec)]
    inner = mixtures[0].expert.intermediate_size if mixtures else 0
    modules: dict[str, str] = {**llama.names(spec), "layers.router": f"{_MLP}.router"}
    for part in ("gate", "up", "down"):
        modules[f"layers.{part}"] = f"{_MLP}.{part}_proj"
        modules[f"layers.shared.{part}"] = f"{_MLP}.shared_expert.{part}_proj"
    gate_up = Transposed(Tensor(f"{prefix}{_MLP}.experts.gate_up_proj"))
    return {
        **{module: prefix + name for module, name in modules.items()},
        "layers.q_norm.weight": Ones(),
        "layers.k_norm.weight": Ones(),
        "layers.experts.gate.weight": Rows(gate_up, (range(inner),), 2 * inner, dim=1),
        "layers.experts.up.weight": Rows(gate_up, (range(inner, 2 * inner),), 2 * inner, dim=1),
        "layers.experts.down.weight": Transposed(Tensor(f"{prefix}{_MLP}.experts.down_proj")),
    }


def _layers_that_turn(fields: ConfigFields, num_layers: int) -> list[bool]:
    flags = fields.get("no_rope_layers")  # 1 where there is a rotation, whatever the name says
    if flags:
        if not isinstance(flags, list) or len(flags) < num_layers or any(flag not in (0, 1) for flag in flags):
            raise ConfigError(f"no_rope_layers={str(flags)[:60]} must be a list of a 0 or 1 for each layer")
        return [bool(flag) for flag in flags[:num_layers]]
    interval = fields.integer("no_rope_layer_interval", 1, MAX_LAYERS, default=4)
    return [(layer + 1) % interval != 0 for layer in range(num_layers)]


def _sparse_layers(fields: ConfigFields, num_layers: int) -> list[bool]:
    step = fields.integer("interleave_moe_layer_step", 1, MAX_LAYERS, default=1)
    named = fields.get("moe_layers")
    if named is None:
        return [(layer + 1) % step == 0 for layer in range(num_layers)]
    if not isinstance(named, list) or any(type(layer) is not int or not 0 <= layer < num_layers for layer in named):
        raise ConfigError(f"moe_layers={str(named)[:60]} must be a list of numbers of layers, 0 to {num_layers - 1}")
    return [layer in named for layer in range(num_layers)]


def _context(fields: ConfigFields, max_positions: int, turns: Sequence[bool]) -> int:
    """Tokens up to which attention is that of one chunk, and scores of layers that turn nothing do not grow."""
    limits = [max_positions]
    if fields.get("attention_chunk_size") is not None:
        limits.append(fields.integer("attention_chunk_size", 1, MAX_POSITIONS))
    if not all(turns) and fields.get("attn_temperature_tuning") in (None, True, 4):  # 4 in the first files
        limits.append(fields.integer("floor_scale", 2, MAX_POSITIONS, default=8192) - 1)
    if min(limits) < max_positions:
        logger.info(
            "the context ends at %d of %d tokens: attention_chunk_size and floor_scale, which change attention beyond "
            "it, are not supported",
            min(limits),
            max_positions,
        )
    return min(limits)
