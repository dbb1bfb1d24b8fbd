"""What the registry holds, for people: architectures with their model types and example checkpoints. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from rayllm.errors import ConfigError
from rayllm.models.registry import architecture_module, imported_module, known_architectures


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture."""

    architecture: str
    """The class in config.json."""
    model_types: tuple[str, ...]
    examples: tuple[str, ...]
    """Checkpoints, by their names on Hugging Face."""
    module: str
    """Import path of the file."""
    fault: str = ""
    """Why the module cannot be used, where it cannot: the package of an entry point may be broken."""


def catalog() -> list[Entry]:
    """Every architecture, sorted by name."""
    return [_entry(name) for name in sorted(known_architectures(), key=str.lower)]


def _entry(name: str) -> Entry:
    path = architecture_module(name) or ""
    try:
        module = imported_module(name)
    except ConfigError as error:
        return Entry(name, (), (), path, fault=str(error))
    return Entry(name, tuple(module.MODEL_TYPES), tuple(getattr(module, "EXAMPLES", ())), path)
