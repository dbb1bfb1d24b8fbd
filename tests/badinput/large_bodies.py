"""Bodies that are large, or hold much: the route that each is for, its bytes, and the status of the answer."""

from __future__ import annotations

import json
from typing import Any

from rayllm.api.body import MAX_CONTAINERS, MAX_NAMES, MAX_STRINGS, MAX_VALUES

MODEL = "tiny"
"""The model that they name."""
_BYTES = 2_000_000
_HEAD = b'{"model":"tiny","prompt":"hi","x":'


def _filled(unit: bytes) -> bytes:
    return unit * (_BYTES // len(unit))


def body_of(**fields: Any) -> bytes:
    """A body with that model and these fields."""
    return json.dumps({"model": MODEL, **fields}).encode()


def naming(body: bytes, model: str) -> bytes:
    """The same body for another model."""
    return body.replace(json.dumps(MODEL).encode(), json.dumps(model).encode(), 1)


MESSAGE = {"role": "user", "content": "hi"}
_PARTS = {"role": "user", "content": [{"type": "text", "text": "x" * 60}]}
_ITEM = {"role": "user", "content": [{"type": "input_text", "text": "hi"}]}
_PARAMETERS = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(100)}}
_TOOLS = [
    {"type": "function", "function": {"name": f"f{i}", "parameters": _PARAMETERS, "strict": True}} for i in range(100)
]
_NAMES = [str(i) for i in range(MAX_NAMES - 16)]
LARGE_BODIES: dict[str, tuple[str, bytes, int]] = {
    "31 MB of lists": ("/v1/completions", _HEAD + b"[" + b"[]," * 10_300_000 + b"[]]}", 413),
    "lists": ("/v1/completions", _HEAD + b"[" + _filled(b"[],") + b"[]]}", 413),
    "objects": ("/v1/completions", _HEAD + b"[" + _filled(b'{"a":1},') + b"[]]}", 413),
    "nested lists": ("/v1/completions", _HEAD + b"[[" * 50_000 + b"]]" * 50_000 + b"}", 400),
    "texts": ("/v1/completions", _HEAD + b"[" + _filled(b'"",') + b"1]}", 413),
    "numbers": ("/detokenize", b'{"tokens":[' + _filled(b"5,") + b"5]}", 413),
    "as many lists as may be": ("/v1/completions", _HEAD + b"[" + b"[]," * (MAX_CONTAINERS - 3) + b"1]}", 400),
    "as many names as may be": (
        "/v1/completions",
        body_of(logit_bias={str(i): 1 for i in range(39_900)}, prompt="h"),
        400,
    ),
    "unknown names": ("/v1/chat/completions", body_of(messages=[MESSAGE], **{f"k{i}": 1 for i in range(39_900)}), 400),
    "as many texts as may be": ("/v1/completions", body_of(prompt="hi", stop=["ab"] * (MAX_STRINGS - 8)), 400),
    "100,000 prompts": ("/v1/completions", body_of(prompt=["ab"] * 100_000), 400),
    "ids": ("/v1/completions", body_of(prompt=[5] * (MAX_VALUES - 8)), 400),
    "ids to text": ("/detokenize", body_of(tokens=[5] * (MAX_VALUES - 8)), 200),
    "escaped text": ("/v1/completions", b'{"model":"tiny","prompt":"' + _filled(b"\\u00e9\\n") + b'"}', 400),
    "brackets in a text": ("/v1/completions", b'{"model":"tiny","prompt":"' + _filled(b'[{\\",:') + b'"}', 400),
    "a long text": ("/v1/completions", body_of(prompt="hello you " * 200_000), 400),
    "parts": ("/v1/chat/completions", body_of(messages=[_PARTS] * 8000), 400),
    "tools": ("/v1/chat/completions", body_of(messages=[MESSAGE], tools=_TOOLS, tool_choice="required"), 400),
    "items": ("/v1/responses", body_of(input=[_ITEM] * 9000), 400),
    "blocks": ("/v1/messages", body_of(max_tokens=2, messages=[{**_ITEM, "content": "hi"}] * 9000), 400),
    "documents": ("/v1/rerank", body_of(query="q", documents=["x" * 20] * 100_000), 400),
}
