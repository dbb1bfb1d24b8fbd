"""Checked reading of a Hugging Face config.json: every fault is a `ConfigError` that names the field and the limit."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from rayllm.errors import ConfigError, did_you_mean
from rayllm.spec import Activation, RopeSpec

T = TypeVar("T")
logger = logging.getLogger(__name__)

MAX_LAYERS = 1024
MAX_HEADS = 4096
MAX_WIDTH = 2**20
MAX_VOCAB = 2**24
MAX_POSITIONS = 2**27

_DTYPES = ("float32", "bfloat16", "float16")
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class ConfigFields:
    """The fields of one config; a field that is absent or null takes its default, or is an error without one."""

    def __init__(self, config: Mapping[str, Any], where: str = ""):
        self._config = config
        self._where = where

    def get(self, name: str) -> Any:
        """The raw value, None where absent."""
        return self._config.get(name)

    def integer(self, name: str, low: int, high: int, default: int | None = None) -> int:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self._where}{name}={_shown(value)} must be an integer")
        if not low <= value <= high:
            raise ConfigError(f"{self._where}{name}={_shown(value)} is outside [{low}, {high}]")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        value = self._present(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self._where}{name}={_shown(value)} must be a number")
        if not (low <= value <= high):  # NaN fails too
            raise ConfigError(f"{self._where}{name}={_shown(value)} is outside [{low:g}, {high:g}]")
        return float(value)

    def numbers(self, name: str, count: int, low: float, high: float) -> tuple[float, ...]:
        """A list of `count` numbers."""
        value = self._present(name, None)
        if not isinstance(value, list) or len(value) != count:
            raise ConfigError(f"{self._where}{name}={_shown(value)} must be a list of {count} numbers")
        places = ConfigFields({str(place): number for place, number in enumerate(value)}, f"{self._where}{name}.")
        return tuple(places.number(str(place), low, high) for place in range(count))

    def flag(self, name: str, default: bool) -> bool:
        value = self._present(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}{name}={_shown(value)} must be true or false")
        return value

    def choice(self, name: str, choices: Mapping[str, T], default: str | None = None) -> T:
        value = self._present(name, default)
        if not isinstance(value, str) or value not in choices:
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            known = ", ".join(choices)
            raise ConfigError(f"{self._where}{name}={_shown(value)} is not supported{near}; known are {known}")
        return choices[value]

    def section(self, name: str) -> ConfigFields | None:
        """A nested object, None where absent or null."""
        value = self._config.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise ConfigError(f"{self._where}{name}={_shown(value)} must be an object")
        return ConfigFields(value, f"{self._where}{name}.")

    def _present(self, name: str, default: T | None) -> Any:
        value = self._config.get(name)
        if value is None:
            if default is None:
                state = "null" if name in self._config else "missing"
                raise ConfigError(f"{self._where}{name} is {state}")
            return default
        return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What describes the text decoder: `text_config`, where the model has other parts too, with what is said for all
    parts."""
    if ConfigFields(config).section("text_config") is None:
        return config
    names = ("dtype", "torch_dtype", "tie_word_embeddings", "eos_token_id")
    return {**config["text_config"], **{name: config[name] for name in names if config.get(name) is not None}}


def read_dtype(fields: ConfigFields) -> Any:
    """The checkpoint's dtype; transformers 5 writes `dtype`, older ones `torch_dtype`."""
    older = fields.choice("torch_dtype", {dtype: dtype for dtype in _DTYPES}, default="float32")
    return fields.choice("dtype", {dtype: dtype for dtype in _DTYPES}, default=older)


def read_activation(fields: ConfigFields, name: str, default: str | None = None) -> Activation:
    if fields.get(name) is None and default is None:
        raise ConfigError(f"{name} is missing or null")
    return fields.choice(name, _ACTIVATIONS, default)


def read_heads(fields: ConfigFields, hidden_size: int, default_head_dim: int | None = None) -> tuple[int, int, int]:
    """(query heads, key/value heads, head width)."""
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, default=num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}")
    if fields.get("head_dim") is None and default_head_dim is None and hidden_size % num_heads:
        raise ConfigError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}")
    head_dim = fields.integer("head_dim", 1, MAX_WIDTH, default=default_head_dim or hidden_size // num_heads)
    return num_heads, num_kv_heads, head_dim


LAYER_TYPES = ("full_attention", "sliding_attention")


def read_layer_types(fields: ConfigFields, num_layers: int, default: Sequence[str]) -> Sequence[str]:
    """Each layer's kind of attention, one of `LAYER_TYPES`."""
    found = fields.get("layer_types")
    if found is None:
        return default
    if not isinstance(found, list) or len(found) != num_layers:
        raise ConfigError(f"layer_types must be a list of num_hidden_layers={num_layers} names")
    for kind in found:
        if kind not in LAYER_TYPES:
            raise ConfigError(f"layer_types holds {_shown(kind)}; known are {', '.join(LAYER_TYPES)}")
    return found


_ROPE_KINDS = {
    "default": "default",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",  # its name in the first checkpoints
    "proportional": "proportional",
}


def read_rope(
    fields: ConfigFields,
    head_dim: int,
    max_positions: int,
    default_theta: float = 10_000.0,
    sections: Sequence[str] = ("rope_parameters", "rope_scaling"),
) -> RopeSpec:
    """Rotary embedding from `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before): the first
    of `sections` that is there.

    "dynamic" scaling (NTK by the length so far) changes nothing up to `max_position_embeddings`, which is where
    `max_model_len` ends, so it is read as the default. Beyond it each token would change the rotation of all keys.
    """
    section = next((found for found in map(fields.section, sections) if found is not None), ConfigFields({}))
    theta = section.number("rope_theta", 1.0, 1e12, fields.number("rope_theta", 1.0, 1e12, default_theta))
    partial = section.number(
        "partial_rotary_factor", 0.0, 1.0, fields.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    )
    kind = _rope_kind(section)
    rotary_dim = head_dim if kind == "proportional" else int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(f"head_dim={head_dim} gives a rotary width of {rotary_dim}; it must be even and at least 2")
    if kind == "default":
        return RopeSpec(theta, rotary_dim)
    if kind == "dynamic":
        logger.info(
            "rope_type='dynamic' is read as 'default': it changes nothing up to max_position_embeddings=%d, where the "
            "context ends",
            max_positions,
        )
        return RopeSpec(theta, rotary_dim)
    if kind == "linear":
        return RopeSpec(theta, rotary_dim, "linear", factor=section.number("factor", 1e-3, 1e6))
    if kind == "proportional":
        factor, num_turning_pairs = section.number("factor", 1e-3, 1e6, 1.0), int(partial * head_dim // 2)
        return RopeSpec(theta, rotary_dim, "proportional", factor=factor, num_turning_pairs=num_turning_pairs)
    name = "original_max_position_embeddings"
    original = fields.integer(name, 2, MAX_POSITIONS, section.integer(name, 2, MAX_POSITIONS, max_positions))
    if kind == "llama3":
        return _llama3(section, theta, rotary_dim, original)
    if kind == "longrope":
        return _longrope(section, theta, rotary_dim, original, max_positions)
    return _yarn(section, theta, rotary_dim, original, max_positions)


def _rope_kind(section: ConfigFields) -> str:
    for layer_type in LAYER_TYPES:
        if section.get(layer_type) is not None:
            raise ConfigError(f"rope_parameters.{layer_type}: this architecture has one embedding for all layers")
    type_name = "rope_type" if section.get("rope_type") is not None else "type"
    kind = section.choice(type_name, _ROPE_KINDS, default="default")
    is_longrope = kind == "yarn" and section.get("long_factor") is not None  # so called in some early checkpoints
    return "longrope" if is_longrope else kind


def scaled_context(rope: RopeSpec, max_positions: int) -> int:
    """Tokens of context: what the scaling stretches the pretrained context to, where the config tells only that."""
    if rope.scaling == "linear":
        return max(max_positions, int(max_positions * rope.factor))
    if rope.scaling == "yarn":
        return max(max_positions, int(rope.original_max_positions * rope.factor))
    return max_positions


def latent_score_scale(fields: ConfigFields, rope: RopeSpec) -> float:
    """What scores of latent attention are multiplied by for a longer context: mscale_all_dim's factor, for queries and
    for keys."""
    section = fields.section("rope_parameters") or fields.section("rope_scaling") or ConfigFields({})
    mscale_all_dim = section.number("mscale_all_dim", 0, 1e3, 0.0)
    factor = section.number("factor", 1e-3, 1e6, default=rope.factor)
    return _mscale(factor, mscale_all_dim) ** 2 if mscale_all_dim else 1.0


def _llama3(section: ConfigFields, theta: float, rotary_dim: int, original: int) -> RopeSpec:
    low = section.number("low_freq_factor", 1e-6, 1e6)
    high = section.number("high_freq_factor", 1e-6, 1e6)
    if high < low:
        raise ConfigError(f"rope high_freq_factor={high:g} must not be less than low_freq_factor={low:g}")
    return RopeSpec(
        theta,
        rotary_dim,
        "llama3",
        factor=section.number("factor", 1e-3, 1e6),
        original_max_positions=original,
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(section: ConfigFields, theta: float, rotary_dim: int, original: int, max_positions: int) -> RopeSpec:
    factor = section.number("factor", 1e-3, 1e6, default=max_positions / original)
    mscale, mscale_all_dim = (section.number(name, 0, 1e3, 0.0) for name in ("mscale", "mscale_all_dim"))
    if mscale and mscale_all_dim:
        inferred = _mscale(factor, mscale) / _mscale(factor, mscale_all_dim)
    else:
        inferred = _mscale(factor, 1.0)
    return RopeSpec(
        theta,
        rotary_dim,
        "yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=section.number("beta_fast", 0, 1e6, 0.0) or 32.0,
        beta_slow=section.number("beta_slow", 0, 1e6, 0.0) or 1.0,
        truncate=section.flag("truncate", True),
        attention_factor=section.number("attention_factor", 0, 1e6, default=inferred),
    )


def _longrope(section: ConfigFields, theta: float, rotary_dim: int, original: int, max_positions: int) -> RopeSpec:
    factor = section.number("factor", 1e-3, 1e6, default=max_positions / original)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention_factor = section.number("attention_factor", 0, 1e6, default=inferred)
    short, long = (
        RopeSpec(
            theta,
            rotary_dim,
            "longrope",
            original_max_positions=original,
            attention_factor=section.number(f"{name}_mscale", 0, 1e6, default=attention_factor),
            pair_factors=section.numbers(f"{name}_factor", rotary_dim // 2, 1e-6, 1e6),
        )
        for name in ("short", "long")
    )
    return replace(short, beyond=long)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
