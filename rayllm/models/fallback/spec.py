"""config.json -> `DecoderSpec` of a model that `transformers` computes, or the reason why it cannot be served.

`transformers` (and with it torch) is imported inside functions: only processes that resolve such a model need it. Code
of a checkpoint is never run here; such a model's config.json is read as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rayllm.errors import ConfigError
from rayllm.models.config_fields import (
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCAB,
    MAX_WIDTH,
    ConfigFields,
    read_dtype,
)
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, NormSpec, OpaqueSpec, TransformersSpec

_OTHER_NAMES = {
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "multi_query_group_num"),
    "hidden_size": ("n_embd", "d_model", "model_dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx"),
    "intermediate_size": ("ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim"),
    "sliding_window": (),
}
"""Names that classes give to the same thing, after the usual one."""
_ATTENDING = {"full_attention": False, "sliding_attention": True}
"""Kinds of layers that can be served, by `layer_types`: whether they have the window."""
_INSTEAD = (
    "Serve a decoder whose layers all attend to earlier tokens (rayllm models lists RayLLM's own), or run this one "
    "with transformers itself"
)


def fallback_spec(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> DecoderSpec | None:
    """The spec of a config.json whose `architectures` is a list with a name; None where neither `transformers` nor the
    checkpoint has such a model. `ConfigError` says what cannot be served, and what would do instead."""
    config = _decoded(config)
    name = config["architectures"][0]
    code_files = _code_files(config)
    known = _read_known(config, name)
    if known is None:
        if not code_files:
            return None
        if any("--" in file for file in code_files):
            raise _refusal(name, f"auto_map names code of another repository ({', '.join(code_files)})")
        if not trust_remote_code:
            raise ConfigError(
                f"architecture {name[:60]!r} is the checkpoint's own Python code ({', '.join(code_files)}), which is "
                "not run: give trust_remote_code (--trust-remote-code) if you trust it"
            )
        fields = ConfigFields(config)
        return _spec(
            name, config, fields, TransformersSpec(json.dumps(config), code_files, "its code declares no plan")
        )
    fields = ConfigFields({**known.fields, **_dtypes(config)})
    return _spec(
        name, config, fields, TransformersSpec(json.dumps(dict(config)), (), known.unsplittable, known.num_parameters)
    )


@dataclass(frozen=True, slots=True)
class _Known:
    """A model that `transformers` has."""

    fields: dict[str, Any]
    """Of its config, defaults included, by the usual names."""
    unsplittable: str
    num_parameters: int


def _read_known(config: Mapping[str, Any], name: str) -> _Known | None:
    """None where `transformers` has no such model; `ConfigError` where it has, and it cannot be served."""
    import transformers
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or not hasattr(transformers, name):
        return None
    kind = CONFIG_MAPPING[model_type]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    try:
        hf_config = kind.from_dict({key: value for key, value in config.items() if key != "model_type"})
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[kind] if causal == name else None
    except Exception as error:  # its own validation, and libraries that a model needs
        raise ConfigError(f"transformers cannot read the config of {name[:60]}: {one_line(error)}") from None
    _check_config(name, hf_config)
    if causal is None:
        raise _refusal(name, f"model_type={model_type!r} has no causal language model in transformers")
    if model_class is None:
        raise _refusal(name, f"the causal language model of model_type={model_type!r} is {causal}")
    _check_class(name, model_class)
    fields = {**hf_config.to_dict(), **_usual_names(hf_config)}
    plan = {**(getattr(hf_config, "base_model_tp_plan", None) or {}), **(getattr(model_class, "_tp_plan", None) or {})}
    has_plan = bool(getattr(hf_config, "base_model_tp_plan", None))
    unsplittable = _unsplittable(plan) if has_plan else "transformers has no tensor-parallel plan for it"
    return _Known(fields, unsplittable, _num_parameters(name, model_class, hf_config))


def _num_parameters(name: str, model_class: Any, hf_config: Any) -> int:
    """The model is made without memory."""
    import torch

    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in model_class(hf_config).parameters())
    except Exception as error:
        raise ConfigError(f"transformers cannot make {name} of this config: {one_line(error)}") from None


def _unsplittable(plan: Mapping[str, str]) -> str:
    from rayllm.models.fallback.parallel import KNOWN_WORDS

    unknown = sorted(f"{word!r} for {name}" for name, word in plan.items() if word not in KNOWN_WORDS)
    return f"its tensor-parallel plan has {unknown[0]}, which is not supported" if unknown else ""


def _check_config(name: str, hf_config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    sections = [each for each in ("text_config", "vision_config", "audio_config") if getattr(hf_config, each, None)]
    if sections:
        raise _refusal(name, f"it reads more than text (config.json has {sections[0]})")
    if getattr(hf_config, "is_encoder_decoder", False):
        raise _refusal(name, "it is an encoder-decoder: its decoder attends to an encoder's output")
    if getattr(hf_config, "add_cross_attention", False):
        raise _refusal(name, "add_cross_attention=true: its layers attend to an encoder's output")
    if getattr(hf_config, "is_decoder", True) is False and hf_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise _refusal(name, "is_decoder=false: an encoder, whose tokens attend to later ones")


def _check_class(name: str, model_class: Any) -> None:
    if getattr(model_class, "_is_stateful", False):
        raise _refusal(name, "its layers keep a state (state-space or linear attention) in place of keys and values")
    if not getattr(model_class, "_supports_attention_backend", False):
        raise _refusal(name, "its class does not call attention through AttentionInterface")


def _usual_names(hf_config: Any) -> dict[str, Any]:
    """Fields by the usual name, whatever the class calls them."""
    found = {}
    for usual in (*_OTHER_NAMES, "head_dim", "vocab_size", "layer_types"):
        value = _value(hf_config, usual)
        if value is not None:
            found[usual] = value
    return found


def _value(hf_config: Any, name: str) -> Any:
    """A field's value; a list, one for each layer, where layers differ and the class refuses to say one for all."""
    try:
        return getattr(hf_config, name, None)
    except RuntimeError:
        layers = hf_config.per_layer_config
        return [getattr(layers[index], name, None) for index in range(len(layers))]


def _spec(name: str, config: Mapping[str, Any], fields: ConfigFields, made: TransformersSpec) -> DecoderSpec:
    width = _integer(fields, "hidden_size", MAX_WIDTH)
    num_layers = _integer(fields, "num_hidden_layers", MAX_LAYERS)
    inner = _integer(fields, "intermediate_size", MAX_WIDTH, 4 * width)
    norm = NormSpec("rms", 0.0)
    windows = _windows(name, fields, num_layers)
    layers = tuple(
        LayerSpec(_attention(fields, width, index, windows[index]), OpaqueSpec(inner), norm)
        for index in range(num_layers)
    )
    return DecoderSpec(
        architecture=name,
        dtype=read_dtype(fields),
        vocab_size=_integer(fields, "vocab_size", MAX_VOCAB),
        hidden_size=width,
        layers=layers,
        final_norm=None,
        tied_embeddings=fields.flag("tie_word_embeddings", False),
        max_model_len=_context(fields),
        transformers=made,
    )


def _attention(fields: ConfigFields, width: int, index: int, window: int | None) -> GroupedAttentionSpec:
    heads = _integer(fields, "num_attention_heads", MAX_HEADS, index=index)
    latent_width = (fields.get("qk_nope_head_dim") or 0) + (fields.get("qk_rope_head_dim") or 0)
    if latent_width and fields.get("kv_lora_rank"):  # latent attention, expanded: a key for each query head
        return GroupedAttentionSpec(heads, heads, latent_width, latent_width**-0.5, window=window)
    kv_heads = _integer(fields, "num_key_value_heads", MAX_HEADS, heads, index=index)
    if fields.get("multi_query") is True and not fields.get("new_decoder_architecture"):
        kv_heads = 1
    head_dim = _integer(fields, "head_dim", MAX_WIDTH, max(1, width // heads), index=index)
    return GroupedAttentionSpec(heads, kv_heads, head_dim, head_dim**-0.5, window=window)


def _windows(name: str, fields: ConfigFields, num_layers: int) -> list[int | None]:
    kinds = fields.get("layer_types")
    window = None
    if fields.get("sliding_window") not in (None, 0, -1):  # what some classes write for none
        window = fields.integer("sliding_window", 1, MAX_POSITIONS)
    if kinds is None:
        return [window] * num_layers
    if not isinstance(kinds, list) or len(kinds) < num_layers:
        raise ConfigError(f"layer_types={str(kinds)[:60]} must be a list of num_hidden_layers={num_layers} names")
    unknown = [kind for kind in kinds if kind not in _ATTENDING]
    if unknown:
        raise _refusal(
            name, f"layer_types has {str(unknown[0])[:60]!r}, which is not attention to all earlier tokens or a window"
        )
    return [window if _ATTENDING[kind] else None for kind in kinds[:num_layers]]


def _context(fields: ConfigFields) -> int:
    """Tokens of context. A class whose rotary frequencies follow from the longest sequence of a batch (longrope) would
    give each sequence what the others need: its context ends where they do not change."""
    limit = _integer(fields, "max_position_embeddings", MAX_POSITIONS)
    found = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    sections = [found, *found.values()] if isinstance(found, dict) else []
    for section in sections:
        if isinstance(section, dict) and (section.get("rope_type") or section.get("type")) == "longrope":
            original = section.get("original_max_position_embeddings") or fields.get("original_max_position_embeddings")
            limit = min(limit, original if isinstance(original, int) and original > 0 else limit)
    return limit


def _integer(fields: ConfigFields, name: str, high: int, default: int | None = None, index: int = 0) -> int:
    """A field by any of its names; of a list, the layer's own."""
    for each in (name, *_OTHER_NAMES.get(name, ())):
        value = fields.get(each)
        if isinstance(value, list) and len(value) > index:
            return ConfigFields({each: value[index]}).integer(each, 1, high)
        if value is not None:
            return fields.integer(each, 1, high)
    return fields.integer(name, 1, high, default)


def _code_files(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Python files of the checkpoint that `auto_map` names for a causal model, and its config's."""
    names = config.get("auto_map")
    if not isinstance(names, dict) or not isinstance(names.get("AutoModelForCausalLM"), str):
        return ()
    classes = [names.get("AutoConfig"), names["AutoModelForCausalLM"]]
    return tuple(dict.fromkeys(f"{each.rpartition('.')[0]}.py" for each in classes if isinstance(each, str)))


def _decoded(value: Any) -> Any:
    """Infinity and NaN are no JSON: transformers writes them as `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {name: _decoded(each) for name, each in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


def _dtypes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: config.get(name) for name in ("dtype", "torch_dtype")}


def _refusal(name: str, why: str) -> ConfigError:
    return ConfigError(f"architecture {name[:60]!r} cannot be served: {why}. {_INSTEAD}")


def one_line(error: Exception) -> str:
    """What a library's error says, for a message of ours."""
    return " ".join(str(error).split())[:300]
