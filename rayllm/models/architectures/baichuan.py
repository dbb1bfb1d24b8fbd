"""Baichuan 1 and 2: Llama with queries, keys and values fused. The 13B models have ALiBi in place of rotary positions;
Baichuan 2's output head has rows of length one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.architectures import llama
from rayllm.models.config_fields import MAX_POSITIONS, ConfigFields
from rayllm.spec import DecoderSpec
from rayllm.weights.stored import Stored, Tensor, UnitRows, split_rows

MODEL_TYPES = ("baichuan",)
EXAMPLES = ("baichuan-inc/Baichuan-7B", "baichuan-inc/Baichuan2-13B-Chat")
_ROTARY_WIDTHS = {4096: True, 5120: False}
"""Whether the published models, 7B and 13B, have rotary positions. No field says so; of other widths, those of the 7B
code have a `max_position_embeddings`."""
_NORMALIZED_VOCAB_SIZE = 125_696
"""Baichuan 2's, by which its head is known: no field says so."""


def spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """Reads the config of both sizes of both versions."""
    positions = ConfigFields(hf_config).integer("model_max_length", 1, MAX_POSITIONS, default=4096)
    fixed = {"attention_bias": False, "mlp_bias": False, "num_key_value_heads": None, "head_dim": None}
    base = llama.spec({"hidden_act": "silu", **hf_config, **fixed}, default_positions=positions)
    if base.tied_embeddings and base.vocab_size == _NORMALIZED_VOCAB_SIZE:
        raise ConfigError(
            f"tie_word_embeddings=True is not supported with vocab_size={base.vocab_size}, whose head is normalized"
        )
    has_positions = hf_config.get("max_position_embeddings") is not None
    if _ROTARY_WIDTHS.get(base.hidden_size, has_positions):
        return replace(base, architecture="BaichuanForCausalLM")
    slopes = alibi_slopes(base.layers[0].attention.num_heads)
    layer = llama.with_attention(base.layers[0], rope=None, alibi_slopes=slopes)
    return replace(base, architecture="BaichuanForCausalLM", layers=(layer,) * base.num_layers)


def alibi_slopes(num_heads: int) -> tuple[float, ...]:
    """2^(-8i/n) for head i of n, a power of two; heads beyond one take every other slope of the next power (Press et
    al., 2022)."""
    power = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)]
    exponents += [4 * i / power for i in range(1, 2 * (num_heads - power), 2)]
    return tuple(2.0**-exponent for exponent in exponents)


def names(spec: DecoderSpec) -> Mapping[str, str | Stored]:
    """The checkpoint's modules."""
    width = spec.hidden_size
    parts = split_rows("model.layers.{}.self_attn.W_pack", width, width, width)
    modules: dict[str, str | Stored] = {
        **llama.names(spec),
        **{f"layers.{name}": rows for name, rows in zip("qkv", parts, strict=True)},
    }
    if spec.vocab_size == _NORMALIZED_VOCAB_SIZE:
        modules["lm_head"] = UnitRows(Tensor("lm_head"), width)
    return modules
