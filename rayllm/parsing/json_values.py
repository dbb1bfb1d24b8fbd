"""Values and arguments as JSON, as models write them."""

from __future__ import annotations

import json
from typing import Any


def loaded(text: str) -> Any:
    """A JSON value; None for what is none."""
    try:
        return json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return None


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return False
    return True


def _no_json(text: str) -> None:
    raise ValueError(text)


def arguments_text(text: str) -> str:
    """Arguments that are no object: some models write them as JSON text in a string, and null for none."""
    if text in ("", "null"):
        return "{}"
    inner = loaded(text)
    return inner if isinstance(inner, str) and inner.lstrip().startswith("{") else text


def pair_value(raw: str, schema: Any, is_whole: bool) -> str:
    """JSON of a value that stands as plain text: by the schema's type, else as JSON where it is JSON."""
    text = raw.removeprefix("\n").removesuffix("\n")
    kind = schema.get("type") if isinstance(schema, dict) else None
    is_text = kind == "string" or (kind is None and _is_choice_of_texts(schema))
    if not is_text and is_whole and text.strip() and (text.strip() == "null" or loaded(text) is not None):
        return text.strip()
    written = json.dumps(text, ensure_ascii=False)
    return written if is_whole else written[:-1]


def _is_choice_of_texts(schema: Any) -> bool:
    values = schema.get("enum") if isinstance(schema, dict) else None
    return isinstance(values, list) and all(isinstance(value, str) for value in values)
