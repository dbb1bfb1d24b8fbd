"""Bodies in which one value has another type: every field that a route declares, and every place inside a whole body.

Built from `/openapi.json`, so that a new field is tried without a line here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    5,
    -1,
    1.5,
    10**30,
    "",
    "\U0001f389\ufdd0\x00",
    [],
    {},
    [None],
    [5, "x"],
    [[]],
    [{}],
    {"type": []},
    {"type": 5, "name": 5},
    [{"type": "text", "text": 5}],
    {"": None},
)
RAW_VALUES = (b"NaN", b"-Infinity", b"1e999", b'"\\ud800"', b'["\\udc00"]', b"[" * 2000 + b"]" * 2000)
"""What Python's own parser takes and is no JSON, or no text."""

_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": _SCHEMA, "strict": False}}
_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BASES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "prompt": ["hi", "there"],
        "logit_bias": {"5": 1.0},
        "structured_outputs": {"choice": ["a", "b"]},
        "stream_options": {"include_usage": True},
        "stream": True,
    },
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "n"},
            {"role": "assistant", "content": "c", "reasoning_content": "r", "refusal": None, "tool_calls": [_CALL]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
            {"role": "user", "content": "hi"},
        ],
        "tools": [_TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "chat_template_kwargs": {"enable_thinking": True},
    },
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
            {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "x"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "x"},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "t"}]},
        ],
        "tools": [{"type": "function", "name": "f", "parameters": _SCHEMA}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "reasoning": {"effort": "low", "summary": "auto"},
        "metadata": {"a": "b"},
        "include": ["message.output_text.logprobs"],
    },
    "/v1/messages": {
        "max_tokens": 4,
        "system": [{"type": "text", "text": "s"}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "x"},
                    {"type": "thinking", "thinking": "t", "signature": "s"},
                    {"type": "tool_use", "id": "1", "name": "f", "input": {"a": "b"}},
                ],
            },
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "x"}]}],
            },
        ],
        "tools": [{"name": "f", "description": "d", "input_schema": _SCHEMA}],
        "tool_choice": {"type": "tool", "name": "f"},
        "thinking": {"type": "disabled"},
        "stop_sequences": ["x"],
    },
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}], "system": "s"},
    "/generate": {"prompt": "hi"},
    "/generate_stream": {"prompt": [5, 6]},
    "/tokenize": {"messages": [{"role": "user", "content": "hi"}], "tools": [_TOOL]},
    "/detokenize": {"tokens": [5, 6]},
    "/v1/embeddings": {"input": ["hi", "there"]},
    "/pooling": {"messages": [{"role": "user", "content": "hi"}]},
    "/classify": {"input": [[5, 6]]},
    "/v1/score": {"text_1": "a", "text_2": ["b"]},
    "/v1/rerank": {"query": "q", "documents": ["a", {"text": "b"}], "rank_fields": ["text"]},
}
"""A whole body of each route, without its model."""

_SCHEMA_OF_ITS_OWN = {
    "type": "object",
    "properties": {"a": {"type": ["string", "null"], "enum": ["x"]}, "b": {"$ref": "#/$defs/B"}},
    "$defs": {"B": {"anyOf": [{"type": "integer", "minimum": 0}, {"const": None}]}},
    "required": ["a"],
}
BOUND_BASES: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": _SCHEMA_OF_ITS_OWN}},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "hi"}],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": _SCHEMA_OF_ITS_OWN, "strict": True}}
            ],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
            },
        },
    ),
    (
        "/v1/completions",
        {
            "prompt": "hi",
            "structured_outputs": {
                "structural_tag": {
                    "structures": [{"begin": "<f>", "schema": _SCHEMA, "end": "</f>"}],
                    "triggers": ["<f>"],
                }
            },
        },
    ),
)
"""Bodies whose answers are bound, by schemas and tags."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where a value can be put inside of this one."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in entries:
        yield from places(inner, (*path, name))


_SHORT = {"max_tokens": 2, "max_output_tokens": 16}
"""What keeps answers short, where the route has it."""


def some_bodies(spec: dict[str, Any], route: str, model: str, num_values: int) -> Iterator[dict[str, Any]]:
    """Bodies of the route in which each place and each field that it declares has `num_values` of the values, in turn:
    those that come to a field differ from those of the next."""
    fields = fields_of(spec, route)
    base = {"model": model, **BASES[route], **{name: value for name, value in _SHORT.items() if name in fields}}
    further = [(name,) for name in fields if name not in base]
    for number, path in enumerate((*places(base), *further)):
        for turn in range(num_values):
            value = VALUES[(number + turn * len(VALUES) // num_values) % len(VALUES)]
            yield replaced(base, path, value)


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same value with another one at that place; a field that was not there is added."""
    if not path:
        return new
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    inner = changed.get(path[0]) if isinstance(changed, dict) else changed[path[0]]
    changed[path[0]] = replaced(inner, path[1:], new)
    return changed


def fields_of(spec: dict[str, Any], route: str) -> list[str]:
    """The fields that the route declares."""
    schema = spec["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
    while "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return list(schema["properties"])
