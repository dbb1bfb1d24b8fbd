"""JSON files of a model folder, config.json first. Plain Python."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError, did_you_mean

_MAX_JSON_BYTES = 64 * 2**20


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


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder."""
    folder = Path(folder)
    if not folder.is_dir():
        near = did_you_mean(folder.name, _names_beside(folder))
        raise ConfigError(f"model folder {str(folder)!r} does not exist{near}")
    return read_json(folder / "config.json")


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
