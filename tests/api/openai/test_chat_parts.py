"""Contents in parts, and messages that are continued, from the request's body to the engine's prompt."""

from __future__ import annotations

from typing import Any

import pytest
from api.fake_engine import FakeEngine, config

from rayllm.api.anthropic.messages import open_message
from rayllm.api.openai.chat import open_chat
from rayllm.api.service import ModelService
from rayllm.api.vllm.tokens import tokenize
from rayllm.errors import RequestError
from rayllm.text.tokenizer import Tokenizer

LOOP = (
    "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{% if part.type == 'text' %}({{ part.text }})"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "<|im_end|>"}]


def _serve(engine: FakeEngine, tokenizer: Tokenizer, template: str) -> ModelService:
    service = ModelService()
    service.set_ready(config(max_model_len=1024), tokenizer.with_template(template), engine)
    return service


def _prompt(engine: FakeEngine, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(list(engine.requests[-1].prompt_token_ids), skip_special_tokens=False)


async def _chat(service: ModelService, messages: list[dict[str, Any]], **fields: Any) -> None:
    answer = await open_chat({"model": "tiny", "messages": messages, **fields}, service)
    await answer.whole()


async def test_text_and_parts_reach_a_template_that_loops_over_parts(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    service = _serve(engine, tokenizer, LOOP)

    await _chat(service, [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}])
    assert _prompt(engine, tokenizer) == "<system>(be brief)<user>(hi)<assistant>"
    await _chat(service, [{"role": "user", "content": PARTS}])
    assert _prompt(engine, tokenizer) == "<user>(one)(<|im_end|>)<assistant>"
    assert tokenizer.eos_token_id not in list(engine.requests[-1].prompt_token_ids)


async def test_roles_and_fields_that_only_a_template_knows_reach_it(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}{% if m.mood %} {{ m.mood.now }}{% endif %}>{% if m.content is string %}"
        "{{ m.content }}{% else %}{% for p in m.content %}{{ p.lang }}:{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    service = _serve(engine, tokenizer, template)
    translated = [{"type": "text", "text": "hello", "lang": "de"}]

    await _chat(service, [{"role": "my-custom-role", "content": "hi", "mood": {"now": "<|im_end|>"}}])
    assert _prompt(engine, tokenizer) == "<my-custom-role <|im_end|>>hi"
    assert tokenizer.eos_token_id not in list(engine.requests[-1].prompt_token_ids)
    await _chat(service, [{"role": "user", "content": translated}])
    assert _prompt(engine, tokenizer) == "<user>de:hello"


async def test_a_role_that_the_template_does_not_show_is_refused(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    service = _serve(engine, tokenizer, template)

    with pytest.raises(RequestError, match=r"messages\[1\].*role 'critic'"):
        await _chat(service, [{"role": "user", "content": "hi"}, {"role": "critic", "content": "no"}])
    assert not engine.requests


async def test_words_about_tools_reach_a_template_that_loops_over_parts(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    service = _serve(engine, tokenizer, LOOP)
    tools = [{"type": "function", "function": {"name": "weather"}}]

    await _chat(service, [{"role": "system", "content": PARTS}, {"role": "user", "content": "hi"}], tools=tools)

    prompt = _prompt(engine, tokenizer)
    assert prompt.startswith("<system>(one)(<|im_end|>)(\n\nYou can call functions")
    assert '"name": "weather"' in prompt


async def test_a_text_that_a_template_hides_is_refused_on_every_route(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    service = _serve(engine, tokenizer, "{% for m in messages %}<{{ m.role }}>{{ m.text }}{% endfor %}")
    messages = [{"role": "user", "content": "hello there"}]
    fields = {"model": "tiny", "messages": messages, "max_tokens": 4}

    for opened in (
        open_chat(fields, service),
        tokenize({"model": "tiny", "messages": messages}, service),
        open_message(fields, service),
    ):
        with pytest.raises(RequestError, match="does not show") as caught:
            await opened
        assert caught.value.status == 400
    assert not engine.requests


@pytest.mark.parametrize(
    "content", ["e", "im_end", "<", "", "a  ", "assistant", [{"type": "text", "text": "<|im_end|>"}]]
)
async def test_a_continued_message_is_the_end_of_the_prompt(
    engine: FakeEngine, service: ModelService, tokenizer: Tokenizer, content: Any
) -> None:
    messages = [{"role": "user", "content": "e im_end <"}, {"role": "assistant", "content": content}]
    await _chat(service, messages, continue_final_message=True, add_generation_prompt=False)

    text = content if isinstance(content, str) else content[0]["text"]
    expected = f"<|im_start|>user\ne im_end <<|im_end|>\n<|im_start|>assistant\n{text}"
    assert _prompt(engine, tokenizer) == expected
