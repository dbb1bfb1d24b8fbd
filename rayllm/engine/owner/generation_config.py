"""Sampling defaults: a model's generation_config.json and what the operator overrides of it, as vLLM reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllm.config import GENERATION_FIELDS, EngineConfig, GenerationDefaults
from rayllm.errors import ConfigError
from rayllm.request import SamplingParams
from rayllm.weights.config_file import read_json

FILE_NAME = "generation_config.json"
_OVERRIDE = "override_generation_config"


def generation_config_file(config: EngineConfig, model_path: Path) -> Path | None:
    """The file that `generation_config` asks for; None where that is none. Raises `ConfigError` for a folder without
    one."""
    if config.generation_config == "vllm":
        return None
    if config.generation_config == "auto":
        file = model_path / FILE_NAME
        return file if file.is_file() else None
    file = Path(config.generation_config).expanduser() / FILE_NAME
    if not file.is_file():
        raise ConfigError(
            f"generation_config={config.generation_config!r}: {file} does not exist; give auto (the model's own), vllm "
            f"(none), or a folder that holds {FILE_NAME}"
        )
    return file


def generation_defaults(config: EngineConfig, model_path: Path) -> GenerationDefaults:
    """What holds for requests that do not say otherwise. Raises `ConfigError`, which names file and field.

    `max_new_tokens` is the default of `max_tokens`; where the operator gave it (by override, or in a folder of its
    own), it is also the most that any request gets.
    """
    file = generation_config_file(config, model_path)
    in_file = (
        {} if file is None else _checked(read_json(file), str(file), "; --generation-config vllm ignores the file")
    )
    overrides = json.loads(config.override_generation_config or "{}")
    fields = {**in_file, **_checked(overrides, _OVERRIDE)}
    for name, value in overrides.items():
        if value is None:
            fields.pop(name, None)
    limit = overrides.get("max_new_tokens")
    if limit is None and config.generation_config not in ("auto", "vllm"):
        limit = fields.get("max_new_tokens")
    sources = [str(file)] * bool(in_file) + [_OVERRIDE] * bool(overrides)
    max_tokens = fields.pop("max_new_tokens", None)
    return GenerationDefaults(**fields, max_tokens=max_tokens, max_tokens_limit=limit, source=", ".join(sources))


def default_sampling_params(defaults: GenerationDefaults) -> SamplingParams:
    """vLLM's `get_default_sampling_params`."""
    fields = defaults.sampling_fields()
    if defaults.max_tokens is not None:
        fields["max_tokens"] = defaults.max_tokens
    return SamplingParams(**fields)


def _checked(given: Mapping[str, Any], where: str, hint: str = "") -> dict[str, Any]:
    found = {name: given[name] for name in GENERATION_FIELDS if given.get(name) is not None}
    for name, value in found.items():
        try:
            SamplingParams(**{"max_tokens" if name == "max_new_tokens" else name: value})
        except ValueError as error:
            raise ConfigError(f"{where}: {str(error).replace('max_tokens', name)}{hint}") from None
    return found
