"""Settings from a YAML file: whatever is wrong in it is one line that names file and line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rayllm.config import parse_settings
from rayllm.errors import ConfigError

Translation = Callable[[str, Any], str | None]
"""Our name of a setting, which may be another engine's; None for one that has no effect. Raises `ConfigError` for one
that cannot be served."""


def read_settings_file(path: str, translate: Translation = lambda name, value: name) -> dict[str, Any]:
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
    ours: dict[str, Any] = {}
    for key, value in settings.items():
        try:
            name = translate(_name(key), value)
            if name is not None:
                parse_settings({name: value})
                ours[name] = value
        except ConfigError as error:
            raise ConfigError(f"{path}:{lines.get(_name(key), 1)}: {error}") from None
    return ours


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
