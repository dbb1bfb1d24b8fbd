"""Settings from a YAML file: whatever is wrong in it is one line that names file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rayllm.config import parse_settings
from rayllm.errors import ConfigError


def read_settings_file(path: str) -> dict[str, Any]:
    """The settings of a YAML file, named as the fields of `EngineConfig` and `ServerConfig` ('-' or '_'), each with a
    value that it takes. `ConfigError` names the file, and the line where that is one."""
    import yaml

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        document = yaml.compose(text, Loader=yaml.SafeLoader)
        settings = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"config file {path!r} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # also bytes that are no text, dates that are none
        raise ConfigError(f"config file {path!r} is not YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"config file {path!r} must hold lines of 'setting: value'")
    lines = _line_numbers(path, document)
    for key, value in settings.items():
        try:
            parse_settings({_name(key): value})
        except ConfigError as error:
            raise ConfigError(f"{path}:{lines.get(_name(key), 1)}: {error}") from None
    return {_name(key): value for key, value in settings.items()}


def _name(key: str) -> str:
    return key.replace("-", "_")


def _line_numbers(path: str, document: Any) -> dict[str, int]:
    """Where each setting stands; YAML itself takes the last of several with one name."""
    lines: dict[str, int] = {}
    for key, _ in document.value:
        name, line = _name(str(key.value)), key.start_mark.line + 1
        if name in lines:
            raise ConfigError(f"{path}:{line}: {name} is given in line {lines[name]} already: leave one out")
        lines[name] = line
    return lines
