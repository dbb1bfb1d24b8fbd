"""Command-line flags made from the fields of the configs, so that flags, YAML keys and `LLM(...)` names are one."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rayllm.errors import did_you_mean

ALIASES = {
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
    "enable_expert_parallel": ("-ep",),
    "quantization": ("-q",),
    "shutdown_timeout_s": ("--shutdown-timeout",),
}


class UsageError(Exception):
    """The command line itself is wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
    """argparse whose every complaint is a `UsageError` of one line, with the nearest known flag."""

    def __init__(self, **settings: Any):
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=110),
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def parse(self, argv: Sequence[str]) -> dict[str, Any]:
        """What was given, by field name; what was not given is absent."""
        given, unknown = self.parse_known_args(list(argv))
        if unknown:
            word = unknown[0]
            if not word.startswith("-"):
                raise UsageError(f"unexpected argument {word!r}")
            flag = word.split("=")[0]
            raise UsageError(f"unknown option {flag}{did_you_mean(flag, self.option_names())}")
        return vars(given)

    def option_names(self) -> list[str]:
        return sorted(name for action in self._actions for name in action.option_strings)


def flag_name(field: str) -> str:
    return "--" + field.replace("_", "-")


def add_config_flags(parser: Parser, *configs: type[BaseModel], only: Iterable[str] | None = None) -> None:
    """One flag a field (all of them, or `only` some). Values stay text: the config checks and converts them."""
    for config in configs:
        group = parser.add_argument_group(config.__name__.removesuffix("Config").lower())
        for name, field in config.model_fields.items():
            if only is None or name in only:
                _add_flag(group, name, field)


def _add_flag(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    names = [flag_name(name), *ALIASES.get(name, ())]
    text = (field.description or "").replace("%", "%%")
    if field.annotation is bool:
        text += f" (default: {'on' if field.default else 'off'})"
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        return
    if field.default not in (None, "", ()):
        text += f" (default: {field.default})"
    settings: dict[str, Any] = {"action": "append" if isinstance(field.default, tuple) else "store"}
    if any(get_origin(kind) is tuple for kind in get_args(field.annotation)):  # one value, or several after one flag
        settings["nargs"] = "+"
    group.add_argument(*names, **settings, metavar=_metavar(name, field), help=text)


def _metavar(name: str, field: FieldInfo) -> str:
    """The values where they are few, else the name's last word."""
    for kind in (field.annotation, *get_args(field.annotation)):  # a Literal, or one or None
        if get_origin(kind) is Literal:
            return "{" + ",".join(map(str, get_args(kind))) + "}"
    return name.rsplit("_", 1)[-1].upper()
