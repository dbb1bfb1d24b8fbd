"""From what a user asks of an answer's text to llguidance's grammar, within limits. No tokenizer, no torch."""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher, LLParserLimits, StructTag, regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from rayllm.errors import RequestError
from rayllm.request import StructuredOutputsParams
from rayllm.structured.schema import plain_schema

MAX_CHARACTERS = 128 * 1024
MAX_DEPTH = 100
"""Brackets inside one another: llguidance reads about 128 levels of JSON, and rules become as many calls."""
MAX_CHOICES = 5000
MAX_REPETITION = 10_000
INVALID_GRAMMAR = "invalid_grammar"

_WHITESPACE = r"[ \t]{1,4}|\r?\n[ \t]{0,48}"
"""Between the parts of JSON. With a bound: else a model that has come to like spaces writes nothing else."""
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ESCAPED = re.compile(r"\\.", re.DOTALL)
_PATTERN = re.compile(r'"pattern"\s*:\s*("(?:[^"\\]|\\.)*")')
_NO_BRACKET = re.compile(r"[^\[\]{}()]+")
_REPETITION = re.compile(r"(?<!\\)\{\s*(\d*)\s*(?:,\s*(\d*)\s*)?\}")
_SCHEMA_INSIDE = re.compile(r"^at \d+\(\d+\): failed to compile JSON schema: ")
_CLEARER_REASONS = (
    (re.compile(r"Unimplemented keys: \[(.*?)\]"), r"unsupported JSON schema keywords: \1"),
    (
        re.compile(r"oneOf constraints are not supported\..*"),
        "oneOf is supported only where its alternatives exclude each other (by type, or by a required property with "
        "different constants): use anyOf",
    ),
    (
        re.compile(r"Resource '(.*?)' is not present in a registry.*"),
        r"$ref '\1' is outside of the schema, and nothing is fetched: put it under $defs",
    ),
    (re.compile(r"lookarounds not supported yet; \w+ in regex"), r"\\b, and ^ or $ inside, are not supported in regex"),
    (re.compile(r"^Pointer '(.*?)' does not exist"), r"$ref '#\1' points at nothing"),
)
"""What llguidance says, in the words of the schema's author."""
_NO_PLAIN_CHARACTER = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~]")


def parser_limits() -> LLParserLimits:
    """Bounds for one grammar and for each of its masks: a few tens of milliseconds, some tens of megabytes. What
    meets one ends in an error."""
    return LLParserLimits(
        initial_lexer_fuel=400_000,
        step_lexer_fuel=60_000,
        step_max_items=20_000,
        max_lexer_states=50_000,
        max_grammar_size=200_000,
        verbose_errors=False,
    )


def refusal(reason: str) -> RequestError:
    """The error for a grammar that cannot be followed."""
    return RequestError(reason, param="structured_outputs", code=INVALID_GRAMMAR)


def check_grammar(params: StructuredOutputsParams) -> None:
    """Compiles the grammar without a model's tokens, for callers whose own time it takes. Raises `RequestError`."""
    if error := LLMatcher.validate_grammar(grammar_of(params), limits=parser_limits()):
        raise refusal(f"{params.kind} cannot be followed: {first_line(error)}")


def first_line(text: str) -> str:
    """llguidance's reason in one line, without what it says of its own state and settings."""
    lines = [line.strip() for line in text.replace("<state>", "\n").splitlines()]
    if _SCHEMA_INSIDE.search(lines[0] if lines else ""):  # then the lines round it are of our own grammar
        lines = [_SCHEMA_INSIDE.sub("", lines[0])]
    reason = " ".join(line for line in lines[:4] if line and not line.startswith(("<non-verbose", "Tokens:")))
    for pattern, clearer in _CLEARER_REASONS:
        reason = pattern.sub(clearer, reason)
    return reason[:300]


def grammar_of(params: StructuredOutputsParams) -> str:
    """llguidance's grammar, not compiled yet. Raises `RequestError` for what is no schema or grammar, or beyond the
    limits."""
    kind, value = params.kind, getattr(params, params.kind)
    if isinstance(value, str) and len(value) > MAX_CHARACTERS:
        raise refusal(f"{kind} has {len(value)} characters, at most {MAX_CHARACTERS} are allowed")
    if kind == "choice":
        return LLMatcher.grammar_from_regex(_choice_regex(value))
    if kind == "regex":
        _check_depth(kind, value)
        _check_repetitions(kind, value)
        # \d, \w and \s mean ASCII, as in JSON schemas: "a digit" is rarely meant to be any of Unicode's 700.
        return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(value, 'dws')}/")
    if kind in ("grammar", "structural_tag"):
        return LLMatcher.grammar_from_lark(lark_of(params))
    return _json_grammar(params)


def lark_of(params: StructuredOutputsParams) -> str:
    """The Lark text of a `grammar` or `structural_tag`; Lark itself stays as it is. Raises `RequestError`."""
    if params.structural_tag is not None:
        return _tags_lark(params.structural_tag)
    assert params.grammar is not None
    text = params.grammar
    _check_depth("grammar", text)
    _check_repetitions("grammar", text)
    try:
        lark: str = any_to_lark(text)
    except Exception as error:  # the converter's own class, RecursionError, IndexError
        raise refusal(f"grammar is neither Lark with a start rule nor GBNF with a root rule: {error}") from None
    return lark


def rule_of(params: StructuredOutputsParams) -> str | None:
    """The right side of a Lark rule that says the same, to stand inside a larger grammar; None for what is a grammar
    of its own. Raises `RequestError`."""
    if params.kind in ("grammar", "structural_tag"):
        return None
    if params.kind == "choice":
        assert params.choice is not None
        return f"/{regex_to_lark(_choice_regex(params.choice), '')}/"
    if params.regex is not None:
        return f"/{regex_to_lark(params.regex, 'dws')}/"
    text = '{"type":"object"}' if params.json is None else params.json
    _check_depth("json", text)
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise refusal(f"json is not a JSON schema: {error}") from None
    if schema is True:
        schema = {}
    schema = plain_schema(schema)
    if not isinstance(schema, dict):
        raise refusal("json must be an object, where reasoning comes first")
    return "%json " + json.dumps({**schema, "x-guidance": _json_bounds(params)}, ensure_ascii=False)


def _json_grammar(params: StructuredOutputsParams) -> str:
    text = '{"type":"object"}' if params.json is None else params.json
    _check_depth("json", text)
    _check_repetitions("json", text)
    try:
        schema = plain_schema(json.loads(text))
        if schema is False:
            raise refusal("json is the schema false, which nothing follows")
        text = "{}" if schema is True else json.dumps(schema, ensure_ascii=False)
        return LLMatcher.grammar_from_json_schema(text, overrides=_json_bounds(params))  # type: ignore[arg-type]
    except ValueError as error:
        raise refusal(f"json is not a JSON schema: {error}") from None


def _json_bounds(params: StructuredOutputsParams | None = None) -> dict[str, Any]:
    if params is not None and params.disable_any_whitespace:
        return {"lenient": False, "whitespace_flexible": False}
    return {"lenient": False, "whitespace_flexible": True, "whitespace_pattern": _WHITESPACE}


def _choice_regex(choices: tuple[str, ...]) -> str:
    if len(choices) > MAX_CHOICES:
        raise refusal(f"choice has {len(choices)} texts, at most {MAX_CHOICES} are allowed")
    num_characters = sum(map(len, choices))
    if num_characters > MAX_CHARACTERS:
        raise refusal(f"choice has {num_characters} characters in all, at most {MAX_CHARACTERS} are allowed")
    return "|".join(_NO_PLAIN_CHARACTER.sub(r"\\\g<0>", text) for text in choices)


def _tags_lark(text: str) -> str:
    """vLLM's form: `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`."""
    _check_depth("structural_tag", text)
    try:
        given = json.loads(text)
        triggers = [str(trigger) for trigger in given["triggers"]]
        tags = [_tag(structure, triggers) for structure in given["structures"]]
        if not tags:
            raise ValueError("it has no structures")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise refusal(
            'structural_tag must be {"structures": [{"begin", "schema", "end"}], "triggers": [...]}: ' + reason
        ) from None
    return StructTag.to_grammar(tags, assume_special=False)


def _tag(structure: dict[str, Any], triggers: list[str]) -> StructTag:
    begin = str(structure["begin"])
    trigger = next((trigger for trigger in triggers if trigger and begin.startswith(trigger)), None)
    if trigger is None:
        raise ValueError(f"begin {begin[:80]!r} starts with none of the triggers")
    schema = structure["schema"]
    if not isinstance(schema, dict):
        raise ValueError("schema must be an object")
    schema = plain_schema(schema)
    if not isinstance(schema, dict):
        raise ValueError("schema is one that nothing follows")
    grammar = {**schema, "x-guidance": _json_bounds()}
    return StructTag(trigger=trigger, begin=begin, grammar=grammar, end=str(structure["end"]))


def _check_depth(kind: str, text: str) -> None:
    """Nothing that is nested deeper than `MAX_DEPTH` goes into a parser that calls itself."""
    depth = 0
    for bracket in _NO_BRACKET.sub("", _ESCAPED.sub("", text) if kind == "regex" else _STRING.sub("", text)):
        depth += 1 if bracket in "[{(" else -1
        if depth > MAX_DEPTH:
            raise refusal(f"{kind} is nested deeper than {MAX_DEPTH} levels")


def _check_repetitions(kind: str, text: str) -> None:
    """Text that stands in a JSON schema or a grammar may say what it likes, but for patterns."""
    if kind == "json":
        text = " ".join(_PATTERN.findall(text))
    elif kind != "regex":
        text = _STRING.sub("", text)
    for low, high in _REPETITION.findall(text):
        number = max(low.lstrip("0"), high.lstrip("0"), key=lambda digits: (len(digits), digits))
        if len(number) > 9 or int(number or 0) > MAX_REPETITION:
            raise refusal(f"{kind} repeats a part {number[:20]} times, at most {MAX_REPETITION} are allowed")
