"""What all configs share: frozen, and a `ConfigError` of one line for whatever is invalid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from rayllm.errors import ConfigError, did_you_mean


def unknown_setting(name: str, known: Iterable[str]) -> ConfigError:
    return ConfigError(f"unknown setting {name!r}{did_you_mean(name, known)}")


class BaseConfig(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, hide_input_in_errors=False, defer_build=True
    )  # built at the first use: a typo on the command line is answered before

    @classmethod
    def parse(cls, settings: Mapping[str, Any]) -> Any:
        """Builds the config from plain settings; an invalid setting becomes one line of `ConfigError` that says how to
        fix it."""
        unknown = [name for name in settings if name not in cls.model_fields]
        if unknown:
            raise unknown_setting(unknown[0], cls.model_fields)
        try:
            return cls(**settings)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "config"
            reason = first["msg"].removeprefix("Value error, ")
            raise ConfigError(f"{where}={first['input']!r}: {reason}") from None
