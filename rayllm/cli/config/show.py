"""`rayllm config show`: every setting that `rayllm serve` would have with the same flags, and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rayllm.cli.flags import Parser
from rayllm.cli.serve import add_serve_flags, settings_from
from rayllm.config import Environment, ResolvedConfig, parse_settings

_FROM_MODEL = ("dtype", "max_model_len", "served_model_name", "tokenizer")
_HIDDEN = ("api_key",)


class Setting(NamedTuple):
    """A setting's name, its value, and its origin: default, file, flag, model, machine or env."""

    name: str
    value: Any
    origin: str


def parser() -> Parser:
    made = Parser(prog="rayllm config show", description="Show the settings that 'rayllm serve' would have.")
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    add_serve_flags(made)
    return made


def run(argv: Sequence[str]) -> int:
    """Prints a line a setting. What is wrong with them is an error, as it is for `serve`."""
    given = parser().parse(argv)
    as_json = given.pop("json", False)
    found = settings(given)
    if as_json:
        print(json.dumps([setting._asdict() for setting in found]))
        return 0

    from rayllm.cli.table import table

    rows = [(setting.name, _shown(setting.value), setting.origin) for setting in found]
    print(table(("setting", "value", "from"), rows))
    return 0


def settings(given: Mapping[str, Any]) -> list[Setting]:
    """All settings, in their configs' order, then the environment variables that are set."""
    from rayllm.engine.owner.resolve import resolve

    in_file, flags = settings_from(given)
    engine, server = parse_settings({**in_file, **flags})
    resolved = resolve(engine, backend="ray")
    found = []
    for config in (engine, server):
        for name in type(config).model_fields:
            value, origin = getattr(config, name), "default"
            if name in flags or name in in_file:
                origin = "flag" if name in flags else "file"
            if value in (None, "auto", ""):
                value, origin = _worked_out(resolved, name, value, origin)
            found.append(Setting(name, "(hidden)" if name in _HIDDEN and value else value, origin))
    return [*found, *(Setting(name, value, "env") for name, value in Environment.given().items())]


def _worked_out(resolved: ResolvedConfig, name: str, value: Any, origin: str) -> tuple[Any, str]:
    """What a setting that was left open is decided to be, and by what."""
    names = {"model": "model_path", "tokenizer": "tokenizer_path", "distributed_executor_backend": "backend"}
    decided = getattr(resolved, names.get(name, name), value)
    if decided == value:
        return value, origin
    if name == "model":
        return decided, origin  # the built-in one
    return decided, "model" if name in _FROM_MODEL else "machine"


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "on" if value else "off"
    return ", ".join(map(str, value)) or "-" if isinstance(value, tuple) else str(value)
