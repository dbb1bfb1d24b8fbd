"""What a user writes reaches the prompt whichever form of content a template takes, and a template that hides it is
named; a message that is continued ends the prompt, whatever it holds."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tiny import CHATML

from rayllm.config import ContentFormat
from rayllm.errors import RequestError
from rayllm.text.tokenizer import Tokenizer

_LOOP = "{% for message in messages %}<{{ message['role'] }}>"
_PARTS = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
_END = "<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

STRING = _LOOP + "{{ message['content'] }}" + _END
PARTS = _LOOP + _PARTS + _END
BOTH = (
    _LOOP
    + "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    + "{% for part in message['content'] %}[{{ part['text'] | trim }}]{% endfor %}{% endif %}"
    + _END
)
STRING_SYSTEM = (  # like Llama 3.2's: system as text, what others say in either form
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}<system>{{ system }}<end>" + BOTH
)
GUARD = (  # like Llama Guard 3's
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{% if message['role'] == 'user' %}User: {{ part['text'] | trim }}{% else %}Agent: {{ part['text'] | trim }}"
    "{% endif %}\n{% endif %}{% endfor %}{% endfor %}"
)
PIECES = _LOOP + "{% for part in message.content %}{{ part.get('text', '') }}{% endfor %}" + _END
TEMPLATES = {
    "string": STRING,
    "parts": PARTS,
    "both": BOTH,
    "string system": STRING_SYSTEM,
    "guard": GUARD,
    "pieces": PIECES,
    "trim": _LOOP + "{{ message['content'] | trim }}" + _END,
    "spaced": _LOOP + " {{ message['content'] | trim }} " + _END,
    "json": _LOOP + "{{ message['content'] | tojson }}" + _END,
    "upper": _LOOP + "{{ message['content'] | upper }}" + _END,
    "escaped": _LOOP + "{{ message['content'] | e }}" + _END,
    "chatml": CHATML,
}
TEXT = 'what is "this"?\n<b>1 \\ 2</b>'


def _tokenizer(byte_level: Tokenizer, template: str, content_format: ContentFormat = "auto") -> Tokenizer:
    tokenizer = byte_level.with_template(template)
    tokenizer.content_format = content_format
    return tokenizer


def _parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _letters(text: str) -> str:
    return "".join(filter(str.isalpha, text.lower()))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", [TEXT, _parts(TEXT), _parts("first words", TEXT)])
def test_what_the_user_says_is_in_the_prompt(byte_level: Tokenizer, name: str, content: Any) -> None:
    tokenizer = _tokenizer(byte_level, TEMPLATES[name])
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": content},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": content},
    ]

    for prompt in (tokenizer.render_chat(messages), tokenizer.render_chat(messages[1:2])):
        assert "what is" in prompt.lower()
        assert "'type'" not in prompt
        assert "'text'" not in prompt
        assert isinstance(content, str) or len(content) == 1 or "first words" in prompt.lower()
    assert "be brief" in tokenizer.render_chat(messages).lower()


def test_text_and_parts_give_one_prompt_where_both_mean_the_same(byte_level: Tokenizer) -> None:
    for name in TEMPLATES:
        tokenizer = _tokenizer(byte_level, TEMPLATES[name])
        text, parts = ([{"role": "user", "content": content}] for content in ("hello", _parts("hello")))
        if name not in ("both", "string system"):  # these write brackets round parts, to tell them apart
            assert tokenizer.render_chat(text) == tokenizer.render_chat(parts)
    both = _tokenizer(byte_level, BOTH)
    assert both.render_chat([{"role": "user", "content": _parts("a", "b")}]) == "<user>[a][b]<end><assistant>"
    assert both.render_chat([{"role": "user", "content": "a"}]) == "<user>a<end><assistant>"


def test_the_operator_says_the_form_where_trying_fails(byte_level: Tokenizer) -> None:
    odd = "{% if messages|length < 3 %}{{ raise_exception('short') }}{% endif %}" + PARTS
    messages = [{"role": "user", "content": "hello there"}] * 3

    with pytest.raises(RequestError, match=r"messages\[2\].*--chat-template-content-format"):
        _tokenizer(byte_level, odd).render_chat(messages)
    assert "hello there" in _tokenizer(byte_level, odd, "openai").render_chat(messages)
    with pytest.raises(RequestError, match="does not show"):
        _tokenizer(byte_level, PARTS, "string").render_chat(messages)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.text }}<|im_end|>{% endfor %}<|im_start|>assistant\n",
        "{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}user hello there",
        "constant",
        "{{ messages[0].content }}",
    ],
)
@pytest.mark.parametrize("text", ["hello there", "user", "e", "<"])
def test_a_template_that_hides_what_the_user_says_is_named(byte_level: Tokenizer, template: str, text: str) -> None:
    tokenizer = _tokenizer(byte_level, template)
    first = {"role": "user" if "[0]" in template else "system", "content": "be brief"}

    with pytest.raises(RequestError, match=r"messages\[1\].*does not show") as caught:
        tokenizer.render_chat([first, {"role": "user", "content": text}])
    assert (caught.value.param, caught.value.code) == ("messages", "chat_template_error")


def test_a_hidden_system_message_or_result_is_named_and_one_that_is_shown_elsewhere_is_not(
    byte_level: Tokenizer,
) -> None:
    only_users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    user = {"role": "user", "content": "hello"}
    for role in ("system", "tool"):
        with pytest.raises(RequestError, match=f"role '{role}'"):
            _tokenizer(byte_level, only_users).render_chat([{"role": role, "content": "secret"}, user])
    assert _tokenizer(byte_level, only_users).render_chat([{"role": "system", "content": " "}, user]) == "hello"

    with_last_user = (  # Mistral's: the system prompt stands in the last user message, and nowhere after a result
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if loop.last and m.role == 'user' and system %}{{ system }}\n{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    mistral = _tokenizer(byte_level, with_last_user)
    system = {"role": "system", "content": "be brief"}
    assert mistral.render_chat([system, user]) == "be brief\nhello"
    assert mistral.render_chat([system, user, {"role": "assistant", "content": "1"}]) == "hello1"


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content[:12] }}{% endfor %}",
        "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}{% endfor %}",
        "{% for m in messages %}{{ m.content | replace('a', 'b') }}{% endfor %}",
        "{{ messages | tojson }}",
        "{{ messages[-1].content }}",
    ],
)
def test_templates_that_cut_or_change_a_text_are_not_refused(byte_level: Tokenizer, template: str) -> None:
    tokenizer = _tokenizer(byte_level, template)
    for text in ('a long text with "quotes" \n that is cut', "<think>x</think> a", "é", "  a  ", "", " \n"):
        tokenizer.render_chat([{"role": "user", "content": text}])


# -------------------------------------------------------------------------------------- the last message is continued

CONTENTS = ["e", "im_end", "<", "|", "assistant", "\n", "<|im_end|>", "a b", "Zü", 'a "b" \\', "{{ x }}", "user\nuser"]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["chatml", "parts", "both", "guard", "trim", "spaced", "string system"])
def test_a_continued_prompt_ends_with_the_content(byte_level: Tokenizer, name: str, content: str) -> None:
    tokenizer = _tokenizer(byte_level, TEMPLATES[name])
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)

    prompt = tokenizer.render_chat(messages, add_generation_prompt=False, continue_final_message=True)

    assert whole.startswith(prompt)
    assert prompt.count(content.strip()) == whole.count(content.strip()) - _in_end(whole[len(prompt) :], content)
    assert "<end>" not in whole[: len(prompt)][len(whole) - len("<end>") :]
    assert prompt.endswith(content.strip())
    assert whole[len(prompt) :].strip() in ("<end>", "<|im_end|>", "")


def _in_end(rest: str, content: str) -> int:
    return rest.count(content.strip()) if content.strip() else len(rest)


def test_white_space_and_nothing_at_all_are_continued_as_the_template_shows_them(byte_level: Tokenizer) -> None:
    def prompt(name: str, content: Any) -> str:
        tokenizer = _tokenizer(byte_level, TEMPLATES[name])
        messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
        return tokenizer.render_chat(messages, continue_final_message=True).rpartition("assistant")[2]

    assert prompt("chatml", "") == "\n"
    assert prompt("chatml", "  so far \n ") == "\n  so far \n "
    assert prompt("trim", "") == ">"
    assert prompt("trim", "   ") == ">"
    assert prompt("trim", "  so far \n ") == ">so far"
    assert prompt("spaced", " so far  ") == "> so far"
    assert prompt("parts", _parts("so ", "far ")) == ">so far "
    assert prompt("string", _parts("so ", "far ")) == ">so \nfar "
    assert prompt("json", "so 'far") == ">\"so 'far"


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"content": None}, "its content is no text"),
        ({"content": []}, "its content is no text"),
        ({"content": "x", "tool_calls": [{}]}, "it makes tool calls"),
    ],
)
def test_what_cannot_be_continued_is_refused(byte_level: Tokenizer, message: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        byte_level.render_chat([{"role": "assistant", **message}], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_a_template_that_hides_the_end_of_the_last_message_is_named(byte_level: Tokenizer) -> None:
    tokenizer = _tokenizer(byte_level, "{% for m in messages %}{{ m.content[:5] }}{% endfor %}")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a long answer"}]
    with pytest.raises(RequestError, match="does not show the end"):
        tokenizer.render_chat(messages, continue_final_message=True)


def test_probes_of_a_slow_template_end(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayllm.text.chat_content._PROBE_LIMIT_S", 0.0)
    tokenizer = _tokenizer(byte_level, STRING)
    assert "hi" in tokenizer.render_chat([{"role": "user", "content": "hi"}])


def test_all_forms_are_json_like_for_a_caller(byte_level: Tokenizer) -> None:
    messages = json.loads(json.dumps([{"role": "user", "content": _parts("hi")}]))
    before = json.dumps(messages)
    _tokenizer(byte_level, STRING).render_chat(messages)
    assert json.dumps(messages) == before
