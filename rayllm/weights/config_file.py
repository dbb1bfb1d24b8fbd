"""JSON files of a model folder, config.json first. Plain Python."""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError, did_you_mean

log = logging.getLogger(__name__)

_MAX_JSON_BYTES = 64 * 2**20
_IN_ROPE_PARAMETERS = ("rope_theta", "partial_rotary_factor", "rope_scaling")
"""Fields that `transformers` 5 has moved into `rope_parameters`, where they count more than at their old place."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; `ConfigError` names the file if it is missing, no regular file, or no JSON object."""
    check_regular_file(path)
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ConfigError(f"{path} has {path.stat().st_size} bytes, more than {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply") from None
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def read_config(folder: str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """config.json of a model folder, with `overrides` in place of its fields; see `with_overrides`."""
    folder = Path(folder)
    if not folder.is_dir():
        near = did_you_mean(folder.name, _names_beside(folder))
        raise ConfigError(f"model folder {str(folder)!r} does not exist{near}")
    return with_overrides(read_json(folder / "config.json"), overrides or {})


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A config with other values: objects are merged field by field, everything else is replaced."""
    if added := [name for name in overrides if name not in config and name not in _IN_ROPE_PARAMETERS]:
        log.warning("hf_overrides adds fields that config.json does not have: %s", ", ".join(added))
    merged = _merged(config, overrides)
    rope, moved = config.get("rope_parameters"), [name for name in _IN_ROPE_PARAMETERS if name in overrides]
    if moved and isinstance(rope, dict):
        if any(isinstance(value, dict) for value in rope.values()):
            raise ConfigError(
                f"hf_overrides.{moved[0]}: config.json has rope_parameters for {', '.join(rope)}: "
                "give hf_overrides.rope_parameters in the same form"
            )
        merged["rope_parameters"] = {**merged["rope_parameters"], **_rope_parameters(overrides)}
    return merged


def _rope_parameters(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What stands at the old places, by today's names."""
    found = {name: overrides[name] for name in _IN_ROPE_PARAMETERS if name in overrides}
    scaling = found.pop("rope_scaling", None) or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"hf_overrides.rope_scaling={scaling!r} must be an object")
    return {**found, **scaling, **({"rope_type": scaling["type"]} if "type" in scaling else {})}


def _merged(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for name, value in overrides.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _names_beside(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        return []


def check_regular_file(path: Path) -> None:
    """`ConfigError` where `path` is missing or no regular file."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
        raise ConfigError(f"{path} is not a regular file")
