"""Plain settings, as a command line or a YAML file gives them, sorted into the configs that take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayllm.config.base import unknown_setting
from rayllm.config.engine import EngineConfig
from rayllm.config.server import ServerConfig


def parse_settings(settings: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig]:
    """Sorts plain settings into the two configs; an unknown one is a `ConfigError` that names the nearest of both."""
    engine, server = EngineConfig.model_fields, ServerConfig.model_fields
    unknown = [name for name in settings if name not in engine and name not in server]
    if unknown:
        raise unknown_setting(unknown[0], [*engine, *server])
    return (
        EngineConfig.parse({name: value for name, value in settings.items() if name in engine}),
        ServerConfig.parse({name: value for name, value in settings.items() if name in server}),
    )
