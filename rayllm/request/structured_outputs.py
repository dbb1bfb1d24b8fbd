"""What the text of an answer must be, as a request asks for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

STRUCTURED_KINDS = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")


@dataclass(frozen=True, kw_only=True, slots=True)
class StructuredOutputsParams:
    """What the text of an answer must be: exactly one of the kinds is set. Fields carry vLLM's names and meanings.

    Checked at construction for shape alone (`ValueError`); whether a schema, regex or grammar can be followed is found
    by `rayllm.structured`.
    """

    json: str | None = None
    """A JSON schema as JSON text. A dict or a pydantic model class is written as text, its order kept."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """The whole text matches it."""
    choice: tuple[str, ...] | None = None
    """The text is one of these."""
    grammar: str | None = None
    """In llguidance's form of Lark, or GBNF."""
    structural_tag: str | None = None
    """Free text with tags whose contents follow schemas, as JSON text: `{"structures": [{"begin", "schema", "end"}],
    "triggers": [...]}`. A dict is written as text."""
    disable_any_whitespace: bool = False
    """JSON without whitespace between its parts; else a little is allowed."""

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "json", _json_text("json", self.json))
        set_field(self, "structural_tag", _json_text("structural_tag", self.structural_tag))
        if isinstance(self.choice, (list, tuple)):
            set_field(self, "choice", tuple(self.choice))
        for name in ("json_object", "disable_any_whitespace"):
            value = getattr(self, name)
            if not isinstance(value, (bool, type(None))):
                raise ValueError(f"{name} must be true or false, got {value!r}")
            set_field(self, name, bool(value))
        given = [name for name in STRUCTURED_KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs: {' and '.join(given) or 'nothing'} given; give exactly one of "
                + ", ".join(STRUCTURED_KINDS)
            )
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            if text is not None and (not isinstance(text, str) or not text):
                raise ValueError(f"{name} must be a text of at least one character, got {text!r}")
        if self.choice is not None:
            self._check_choice(self.choice)

    def _check_choice(self, choice: Any) -> None:
        if not isinstance(choice, tuple) or not choice:
            raise ValueError("choice must be a list of at least one text")
        for text in choice:
            if not isinstance(text, str) or not text:
                raise ValueError(f"choice must hold texts of at least one character, got {text!r}")

    @property
    def kind(self) -> str:
        """Which of `STRUCTURED_KINDS` is set."""
        return next(name for name in STRUCTURED_KINDS if getattr(self, name) not in (None, False))


def _json_text(name: str, value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if callable(schema_of := getattr(value, "model_json_schema", None)):
        value = schema_of()
    if not isinstance(value, (dict, bool)):
        raise ValueError(f"{name} must be a JSON schema (an object, or its text), got {type(value).__name__}")
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} cannot be written as JSON: {error}") from None
