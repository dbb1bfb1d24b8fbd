"""Architectures by the name in config.json. Plain Python: no torch is imported to read a spec.

An architecture is a module with

    MODEL_TYPES                               the `model_type`s of config.json that it reads
    spec(config) -> DecoderSpec               what config.json says, checked
    names(spec) -> Mapping[str, str | Stored] where its parameters stand in a checkpoint, see `weights.stored`
    EXAMPLES                                  optional: checkpoints by their names on Hugging Face
    QUANTIZATION_METHODS                      optional: values of `quant_method` whose tensors `names` finds
    LEFT_OUT                                  optional: how names of tensors begin that are not read

Packages outside add theirs by `register_architecture`, or by an entry point of the group `rayllm.architectures` whose
name is the architecture's and whose value is the module: that one is found in every process by itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rayllm.errors import ConfigError, did_you_mean
from rayllm.models.config_fields import MAX_POSITIONS, ConfigFields
from rayllm.spec import DecoderSpec
from rayllm.weights.config_file import read_config
from rayllm.weights.stored_dtype import stored_dtype

if TYPE_CHECKING:
    from rayllm.weights.stored import Stored

ENTRY_POINT_GROUP = "rayllm.architectures"

_PACKAGE = "rayllm.models.architectures"
_modules: dict[str, str] = {
    "BaiChuanForCausalLM": f"{_PACKAGE}.baichuan",
    "BaichuanForCausalLM": f"{_PACKAGE}.baichuan",
    "ChatGLMForConditionalGeneration": f"{_PACKAGE}.chatglm",
    "ChatGLMModel": f"{_PACKAGE}.chatglm",
    "DeepseekV2ForCausalLM": f"{_PACKAGE}.deepseek_v2",
    "DeepseekV3ForCausalLM": f"{_PACKAGE}.deepseek_v3",
    "GPT2LMHeadModel": f"{_PACKAGE}.gpt2",
    "GPTNeoXForCausalLM": f"{_PACKAGE}.gpt_neox",
    "Gemma2ForCausalLM": f"{_PACKAGE}.gemma2",
    "Gemma3ForCausalLM": f"{_PACKAGE}.gemma3",
    "Gemma3ForConditionalGeneration": f"{_PACKAGE}.gemma3",
    "GemmaForCausalLM": f"{_PACKAGE}.gemma",
    "Glm4ForCausalLM": f"{_PACKAGE}.glm4",
    "Glm4MoeForCausalLM": f"{_PACKAGE}.glm4_moe",
    "GlmForCausalLM": f"{_PACKAGE}.glm",
    "GptOssForCausalLM": f"{_PACKAGE}.gpt_oss",
    "InternLM2ForCausalLM": f"{_PACKAGE}.internlm2",
    "Llama4ForCausalLM": f"{_PACKAGE}.llama4",
    "Llama4ForConditionalGeneration": f"{_PACKAGE}.llama4",
    "LlamaForCausalLM": f"{_PACKAGE}.llama",
    "MistralForCausalLM": f"{_PACKAGE}.mistral",
    "MixtralForCausalLM": f"{_PACKAGE}.mixtral",
    "OPTForCausalLM": f"{_PACKAGE}.opt",
    "Phi3ForCausalLM": f"{_PACKAGE}.phi3",
    "Qwen2ForCausalLM": f"{_PACKAGE}.qwen2",
    "Qwen2MoeForCausalLM": f"{_PACKAGE}.qwen2_moe",
    "Qwen3ForCausalLM": f"{_PACKAGE}.qwen3",
    "Qwen3MoeForCausalLM": f"{_PACKAGE}.qwen3_moe",
}
"""The module of each architecture, by its import path."""


def register_architecture(name: str, module: ModuleType | str) -> None:
    """Serves checkpoints whose config.json names the architecture `name` by a module (or its import path) as described
    above, in place of a built-in one of that name. Worker processes import the module by its path.

    Raises `ConfigError` where the module cannot be imported or lacks something.
    """
    path = module if isinstance(module, str) else module.__name__
    _check_module(name, path)
    _modules[name] = path


def known_architectures() -> list[str]:
    return sorted({*_modules, *_entry_points()})


def outside_module(name: str) -> str:
    """The import path of an architecture's module, for processes that do not know it; empty for RayLLM's own."""
    path = architecture_module(name) or ""
    return "" if path.startswith(f"{_PACKAGE}.") else path


def architecture_module(name: str) -> str | None:
    """The import path of an architecture's module; None where there is none."""
    return _modules.get(name) or _entry_points().get(name)


def imported_module(name: str) -> ModuleType:
    """The module of a known architecture; `ConfigError` where it cannot be imported or lacks something."""
    path = architecture_module(name)
    assert path is not None, name
    return _check_module(name, path)


def weight_names(spec: DecoderSpec, module: str = "") -> Mapping[str, str | Stored]:
    """Where the parameters of a model with this spec stand in its checkpoint, by the architecture's `outside_module`,
    if given."""
    names: Mapping[str, str | Stored] = _module_of(spec, module).names(spec)
    return names


def left_out(spec: DecoderSpec, module: str = "") -> Sequence[str]:
    """How names of tensors begin that a checkpoint of this architecture may hold and that are not read; `{}` in
    `LEFT_OUT` is the number of layers, so that of the one after the last."""
    prefixes: Sequence[str] = getattr(_module_of(spec, module), "LEFT_OUT", ())
    return [prefix.replace("{}", str(spec.num_layers)) for prefix in prefixes]


def _module_of(spec: DecoderSpec, module: str) -> ModuleType:
    path = module or architecture_module(spec.architecture)
    assert path is not None, spec.architecture
    return _check_module(spec.architecture, path)


def read_spec(
    model_path: str | Path,
    implementation: str = "auto",
    *,
    trust_remote_code: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> DecoderSpec:
    """The spec of the model in a folder, with `overrides` in place of fields of config.json; further arguments are
    those of `spec_of`. `ConfigError` names config.json and the field that cannot be served.

    Where config.json says no dtype, or "auto", it is that of the weights' files, as with `transformers`.
    """
    config = read_config(model_path, overrides)
    if all(config.get(name) in (None, "auto") for name in ("dtype", "torch_dtype")):
        config = {**config, "dtype": stored_dtype(model_path), "torch_dtype": None}
    try:
        return spec_of(config, implementation, trust_remote_code=trust_remote_code)
    except ConfigError as error:
        changed = f" with hf_overrides of {', '.join(overrides)}" if overrides else ""
        raise ConfigError(f"{Path(model_path) / 'config.json'}{changed}: {error}") from None


def spec_of(config: Mapping[str, Any], implementation: str = "auto", *, trust_remote_code: bool = False) -> DecoderSpec:
    """The spec that a Hugging Face config describes.

    `implementation`: "native" (RayLLM's own), "transformers" (see `models.fallback`), or "auto": the first that has it.
    `trust_remote_code`: whether workers may run a checkpoint's own Python code, where nothing else has the model.
    """
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ConfigError(f"architectures={str(names)[:60]!r} must be a list with the name of the model's class")
    name = names[0]
    path = architecture_module(name) if implementation != "transformers" else None
    if path is None:
        return _without_module(config, name, implementation, trust_remote_code)
    module = _check_module(name, path)
    model_type = config.get("model_type", module.MODEL_TYPES[0])
    if model_type not in module.MODEL_TYPES:
        raise ConfigError(
            f"model_type={str(model_type)[:60]!r} does not fit architecture {name!r}, "
            f"which is {' or '.join(module.MODEL_TYPES)}"
        )
    _check_quantization(config, getattr(module, "QUANTIZATION_METHODS", ()))
    if config.get("sliding_window") is not None:  # nonsense is refused where the model has no use for it, too
        least = 0 if config.get("use_sliding_window") is False else 1  # transformers writes 0 for none, then
        ConfigFields(config).integer("sliding_window", least, MAX_POSITIONS)
    spec: DecoderSpec = module.spec(config)
    if len(boundaries := spec.rope_boundaries()) > 1:
        raise ConfigError(
            f"original_max_position_embeddings of longrope is {' and '.join(map(str, sorted(boundaries)))} "
            f"in different layers; it must be the same in all"
        )
    return spec


def _without_module(config: Mapping[str, Any], name: str, implementation: str, trust_remote_code: bool) -> DecoderSpec:
    """The spec of a model that RayLLM has no architecture for, or is not to use it for."""
    if implementation == "native":
        raise ConfigError(
            f"RayLLM has no implementation of {name[:60]!r} of its own (model_impl='native'): give model_impl='auto'"
        )
    from rayllm.models.fallback.spec import fallback_spec

    _check_quantization(config, ())
    found = fallback_spec(config, trust_remote_code=trust_remote_code)
    if found is None:
        known = known_architectures()
        near = did_you_mean(name, known)
        raise ConfigError(f"architecture {name[:60]!r} is not supported{near}; known are {', '.join(known)}")
    return found


def _check_quantization(config: Mapping[str, Any], methods: Sequence[str]) -> None:
    if config.get("quantization_config") is None:
        return
    quantization = ConfigFields(config).section("quantization_config")
    method = None if quantization is None else quantization.get("quant_method")
    if method not in methods:
        also = f" or quantized by {' or '.join(methods)}" if methods else ""
        raise ConfigError(
            f"quantization_config is not supported with quant_method={str(method)[:60]!r}: use a checkpoint that is "
            f"not quantized{also}"
        )


def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINT_GROUP)}


def _check_module(name: str, path: str) -> ModuleType:
    try:
        module = importlib.import_module(path)
    except ImportError as error:
        raise ConfigError(f"architecture {name!r}: its module {path!r} cannot be imported: {error}") from None
    missing = [part for part in ("MODEL_TYPES", "spec", "names") if not hasattr(module, part)]
    if missing:
        raise ConfigError(f"architecture {name!r}: its module {path!r} has no {' and no '.join(missing)}")
    return module
