"""`litellm`: as an OpenAI-compatible server, whole, streamed, with tools, and as Anthropic's."""

from __future__ import annotations

import json
import os
from typing import Any

import litellm
import pytest

URL, KEY, MODEL = os.environ["CONFORMANCE_URL"], os.environ["CONFORMANCE_KEY"], os.environ["CONFORMANCE_MODEL"]
OPENAI: Any = {"model": f"hosted_vllm/{MODEL}", "api_base": f"{URL}/v1", "api_key": KEY}
MESSAGES: Any = [{"role": "user", "content": "Say hello."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "pick",
        "parameters": {"type": "object", "properties": {"side": {"enum": ["left", "right"]}}, "required": ["side"]},
    },
}


@pytest.mark.parametrize("provider", ["hosted_vllm", "openai"])
def test_completion(provider: str) -> None:
    answer = litellm.completion(**{**OPENAI, "model": f"{provider}/{MODEL}"}, messages=MESSAGES, max_tokens=8, n=2)
    assert len(answer.choices) == 2
    assert answer.usage.completion_tokens > 0


def test_stream_says_what_the_whole_says() -> None:
    fields: Any = {**OPENAI, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    stream = litellm.completion(**fields, stream=True, stream_options={"include_usage": True})
    rebuilt = litellm.stream_chunk_builder(list(stream), messages=MESSAGES)
    whole = litellm.completion(**fields)
    assert (rebuilt.choices[0].message.content or "") == (whole.choices[0].message.content or "")
    # As it came: what litellm hands on is a count of its own.
    [usage] = [chunk.usage for chunk in stream.chunks if getattr(chunk, "usage", None)]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_tools_and_json() -> None:
    answer = litellm.completion(**OPENAI, messages=MESSAGES, tools=[TOOL], tool_choice="required")
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments)["side"] in ("left", "right")
    schema = {"type": "json_schema", "json_schema": {"name": "pick", "schema": TOOL["function"]["parameters"]}}
    answer = litellm.completion(**OPENAI, messages=MESSAGES, response_format=schema)
    assert json.loads(answer.choices[0].message.content)["side"] in ("left", "right")


def test_anthropics_shape() -> None:
    answer = litellm.completion(model=f"anthropic/{MODEL}", api_base=URL, api_key=KEY, messages=MESSAGES, max_tokens=8)
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_errors() -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**OPENAI, messages=MESSAGES, temperature=9)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**OPENAI, "api_key": "wrong"}, messages=MESSAGES)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**OPENAI, messages=MESSAGES, max_tokens=10**6)
