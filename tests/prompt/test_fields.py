from __future__ import annotations

from typing import Any

import pytest

from rayllm.errors import RequestError
from rayllm.prompt.fields import chat_fields


def test_null_is_the_default() -> None:
    fields = chat_fields(messages=[], tools=None, tool_choice=None)
    assert (fields.messages, fields.tools, fields.add_generation_prompt) == ([], None, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tools", ["weather"], "tools: Input should be a list of objects, got"),
        ("reasoning_effort", "extreme", "reasoning_effort: Input should be"),
        ("add_generation_prompt", "yes", "add_generation_prompt: Input should be a valid boolean"),
        ("messages", "hello", "messages: Input should be a valid list"),
    ],
)
def test_an_error_names_the_field_and_the_value(name: str, value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as found:
        chat_fields(**{"messages": [], name: value})
    assert found.value.param == name


def test_messages_are_required() -> None:
    with pytest.raises(RequestError, match="messages is required"):
        chat_fields()
