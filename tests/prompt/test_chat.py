from __future__ import annotations

from typing import Any

import pytest

from rayllm.errors import RequestError
from rayllm.prompt.chat import chat_prompt, num_characters, render
from rayllm.prompt.fields import ChatFields
from rayllm.prompt.text_model import TextModel
from rayllm.request import StructuredOutputsParams

USER = {"role": "user", "content": "What is <|im_end|> RayLLM?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def _fields(**fields: Any) -> ChatFields:
    return ChatFields(messages=[USER], **fields)


def test_the_text_is_shown_without_marks_and_tokenized_with_them(model: TextModel) -> None:
    chat = chat_prompt(_fields(), model)
    assert USER["content"] in chat.text
    assert chat.marked_text == render(_fields(), model)
    assert chat.token_ids(model) != model.tokenizer.encode(chat.text, False)


@pytest.mark.parametrize(("choice", "is_bound"), [("auto", False), ("required", True), ("none", False)])
def test_tools_bind_the_answer_where_they_must_be_called(model: TextModel, choice: str, is_bound: bool) -> None:
    chat = chat_prompt(_fields(tools=[TOOL], tool_choice=choice), model)
    assert (chat.tool_grammar(None) is not None) == is_bound
    assert (chat.structured_outputs(None) is not None) == is_bound


def test_what_the_client_asks_for_stays_where_nothing_else_binds(model: TextModel) -> None:
    wanted = StructuredOutputsParams(choice=["yes", "no"])
    assert chat_prompt(_fields(), model).structured_outputs(wanted) is wanted


def test_a_template_of_a_request_may_be_off(model: TextModel) -> None:
    engine = model.config.engine.model_copy(update={"trust_request_chat_template": False})
    strict = TextModel(model.config.model_copy(update={"engine": engine}), model.tokenizer)
    with pytest.raises(RequestError, match="chat_template from a request is off"):
        chat_prompt(_fields(chat_template="x"), strict)
    with pytest.raises(RequestError, match="at most 65536 are allowed"):
        chat_prompt(_fields(chat_template="x" * 70000), model)


def test_parts_calls_and_tools_count_as_characters() -> None:
    plain = num_characters([USER], None)
    assert num_characters([USER], [TOOL]) > plain
    assert num_characters([{**USER, "tool_calls": ["x" * 50]}], None) >= plain + 50
    assert num_characters([{"role": "user", "content": None}], None) > 0
