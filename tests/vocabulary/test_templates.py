"""Templates of families write what the models were trained with."""

from __future__ import annotations

import pytest

from rayllm.text.chat_template import ChatTemplate
from rayllm.vocabulary import templates

MESSAGES = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "v"},
]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (templates.GLM4, "[gMASK]<sop><|system|>\ns<|user|>\nu<|assistant|>\na<|user|>\nv<|assistant|>"),
        (templates.CHATGLM3, "[gMASK]sop<|system|>\n s<|user|>\n u<|assistant|>\n a<|user|>\n v<|assistant|>"),
        (templates.CHATGLM2, "[gMASK]sops\n\n[Round 1]\n\n问：u\n\n答：a\n\n[Round 2]\n\n问：v\n\n答："),
        (templates.BAICHUAN, "s<reserved_102>u<reserved_103>a</s><reserved_102>v<reserved_103>"),
        (templates.BAICHUAN2, "s<reserved_106>u<reserved_107>a<reserved_106>v<reserved_107>"),
    ],
)
def test_a_chat_is_written_as_the_model_knows_it(source: str, expected: str) -> None:
    assert ChatTemplate(source).render(MESSAGES) == expected


def test_the_tool_of_an_assistants_message_stands_in_its_head() -> None:
    message = {"role": "assistant", "metadata": "get_weather", "content": "x"}
    assert ChatTemplate(templates.GLM4).render([message]).startswith("[gMASK]<sop><|assistant|>get_weather\nx")
    assert ChatTemplate(templates.CHATGLM3).render([message]).startswith("[gMASK]sop<|assistant|>get_weather\n x")


def test_two_questions_in_a_row_are_two_rounds() -> None:
    text = ChatTemplate(templates.CHATGLM2).render([{"role": "user", "content": "u"}] * 2)
    assert text == "[gMASK]sop[Round 1]\n\n问：u\n\n答：\n\n[Round 2]\n\n问：u\n\n答："
