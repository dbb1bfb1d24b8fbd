"""Checked reading of a Hugging Face config.json: every fault is a `ConfigError` that names the field and the limit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from rayllm.errors import ConfigError, did_you_mean
from rayllm.spec import Activation, RopeSpec

T = TypeVar("T")

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
    "gelu_new": "gelu_tanh",
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


def read_rope(fields: ConfigFields, head_dim: int, max_positions: int, default_theta: float = 10_000.0) -> RopeSpec:
    """Rotary embedding from `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (before).

    "dynamic" scaling changes nothing up to `max_position_embeddings`, which is where `max_model_len` ends, so it is
    read as the default.
    """
    section = fields.section("rope_parameters") or fields.section("rope_scaling") or ConfigFields({})
    theta = section.number("rope_theta", 1.0, 1e12, fields.number("rope_theta", 1.0, 1e12, default_theta))
    partial = section.number(
        "partial_rotary_factor", 0.0, 1.0, fields.number("partial_rotary_factor", 0.0, 1.0, default=1.0)
    )
    rotary_dim = int(head_dim * partial)
    if rotary_dim < 2 or rotary_dim % 2:
        raise ConfigError(f"head_dim={head_dim} gives a rotary width of {rotary_dim}; it must be even and at least 2")
    type_name = "rope_type" if section.get("rope_type") is not None else "type"
    kinds = {kind: kind for kind in ("default", "linear", "dynamic", "llama3", "yarn")}
    kind = section.choice(type_name, kinds, default="default")
    if kind in ("default", "dynamic"):
        return RopeSpec(theta, rotary_dim)
    if kind == "linear":
        return RopeSpec(theta, rotary_dim, "linear", factor=section.number("factor", 1e-3, 1e6))
    pretrained = fields.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default=max_positions)
    original = section.integer("original_max_position_embeddings", 1, MAX_POSITIONS, default=pretrained)
    if kind == "llama3":
        return _llama3(section, theta, rotary_dim, original)
    return _yarn(section, theta, rotary_dim, original, max_positions)


def scaled_context(rope: RopeSpec, max_positions: int) -> int:
    """Tokens of context: what the scaling stretches the pretrained context to, where the config tells only that."""
    if rope.scaling == "linear":
        return max(max_positions, int(max_positions * rope.factor))
    if rope.scaling == "yarn":
        return max(max_positions, int(rope.original_max_positions * rope.factor))
    return max_positions


def _llama3(section: ConfigFields, theta: float, rotary_dim: int, original: int) -> RopeSpec:
    low = section.number("low_freq_factor", 1e-6, 1e6)
    high = section.number("high_freq_factor", 1e-6, 1e6)
    if high <= low:
        raise ConfigError(f"rope high_freq_factor={high:g} must be more than low_freq_factor={low:g}")
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


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
