"""Entries of JSON values as flags of their own, as vLLM takes them: `--override-generation-config.temperature 0.5`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from rayllm.cli.flags import UsageError

_DOTTED = re.compile(r"(--[a-z][a-z0-9-]*|-[A-Z])((?:\.[^.=\s]+)+)(?:=(.*))?", re.DOTALL)


def join_dotted(words: Sequence[str]) -> list[str]:
    """The same words, in which all dotted entries of a flag are one JSON object behind it: `--a.b 1 --a.c x` is
    `--a '{"b": 1, "c": "x"}'`. They are added to an object that the flag is given whole; of an entry that is given
    twice the last counts; a value that is no JSON is text. Raises `UsageError` for an entry without a value."""
    entries: dict[str, dict[str, Any]] = {}
    others: list[str] = []
    remaining = iter(words)
    for word in remaining:
        found = _DOTTED.fullmatch(word)
        if found is None:
            others.append(word)
            continue
        flag, path, value = found.groups()
        if value is None and (value := next(remaining, None)) is None:
            raise UsageError(f"argument {word}: expected one argument")
        _put(entries.setdefault(flag, {}), path[1:].split("."), _read(value), word)
    for flag, given in entries.items():
        others = _with_object(others, flag, given)
    return others


def _read(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _put(value: dict[str, Any], path: list[str], entry: Any, word: str) -> None:
    for name in path[:-1]:
        value = value.setdefault(name, {})
        if not isinstance(value, dict):
            raise UsageError(f"argument {word}: {name!r} already has a value")
    value[path[-1]] = entry


def _with_object(words: list[str], flag: str, given: dict[str, Any]) -> list[str]:
    """The words with that object as the flag's value, in its place where it has one."""
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name != flag:
            continue
        end = index + 1 if equals else index + 2
        if not equals:
            value = words[index + 1] if end <= len(words) else ""
        whole = _read(value)
        if not isinstance(whole, dict):
            raise UsageError(f"argument {flag}: {value!r} is not a JSON object, which {flag}.NAME needs")
        return [*words[:index], flag, json.dumps({**whole, **given}), *words[end:]]
    return [*words, flag, json.dumps(given)]
