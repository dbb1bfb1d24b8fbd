"""Architectures by the name in config.json. Plain Python: no torch is imported to read a spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rayllm.errors import ConfigError, did_you_mean
from rayllm.models.architectures import llama, mistral, opt, qwen2, qwen3
from rayllm.models.config_fields import MAX_POSITIONS, ConfigFields
from rayllm.models.spec import DecoderSpec
from rayllm.weights.config_file import read_config
from rayllm.weights.stored_dtype import stored_dtype

_ARCHITECTURES: dict[str, ModuleType] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "OPTForCausalLM": opt,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
}


def known_architectures() -> list[str]:
    return sorted(_ARCHITECTURES)


def weight_names(architecture: str) -> Mapping[str, str]:
    """Checkpoint names of an architecture's modules, see `weights.mapping.checkpoint_name`."""
    names: Mapping[str, str] = _ARCHITECTURES[architecture].WEIGHT_NAMES
    return names


def read_spec(model_path: str | Path) -> DecoderSpec:
    """The spec of the model in a folder; `ConfigError` names config.json and the field that cannot be served.

    Where config.json says no dtype, or "auto", it is that of the weights' files, as with `transformers`.
    """
    config = read_config(model_path)
    if all(config.get(name) in (None, "auto") for name in ("dtype", "torch_dtype")):
        config = {**config, "dtype": stored_dtype(model_path), "torch_dtype": None}
    try:
        return spec_of(config)
    except ConfigError as error:
        raise ConfigError(f"{Path(model_path) / 'config.json'}: {error}") from None


def spec_of(config: Mapping[str, Any]) -> DecoderSpec:
    """The spec that a Hugging Face config describes."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError(f"architectures={str(names)[:60]!r} must be a list with the name of the model's class")
    if names[0] not in _ARCHITECTURES:
        known = ", ".join(known_architectures())
        near = did_you_mean(names[0], _ARCHITECTURES)
        raise ConfigError(f"architecture {names[0][:60]!r} is not supported{near}; known are {known}")
    module = _ARCHITECTURES[names[0]]
    model_type = config.get("model_type", module.MODEL_TYPES[0])
    if model_type not in module.MODEL_TYPES:
        raise ConfigError(
            f"model_type={str(model_type)[:60]!r} does not fit architecture {names[0]!r}, "
            f"which is {' or '.join(module.MODEL_TYPES)}"
        )
    if config.get("quantization_config") is not None:
        raise ConfigError("quantization_config is not supported: use a checkpoint that is not quantized")
    if config.get("sliding_window") is not None:  # nonsense is refused where the model has no use for it, too
        ConfigFields(config).integer("sliding_window", 1, MAX_POSITIONS)
    spec: DecoderSpec = module.spec(config)
    return spec
