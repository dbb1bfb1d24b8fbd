from __future__ import annotations

import pytest

import rayllm.text.chat_template as chat_template
from rayllm.errors import RequestError
from rayllm.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.x.y }}", "no attribute"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% for", "broken"),
    ],
)
def test_a_fault_of_the_template_is_the_requests_error(source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        ChatTemplate(source).render(MESSAGES)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set xs = range(9999)|list %}{% for i in xs %}{% for j in xs %}{% for k in xs %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_an_endless_template_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "RENDER_TIME_LIMIT_S", 0.05)

    with pytest.raises(RequestError, match="longer than"):
        ChatTemplate(source).render(MESSAGES)


def test_a_template_that_writes_without_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARACTERS", 10_000)

    with pytest.raises(RequestError, match="10000 characters"):
        ChatTemplate("{% for i in range(99999) %}{{ 'ab' }}{% endfor %}").render(MESSAGES)


def test_names_of_the_server_cannot_be_set_by_a_request() -> None:
    template = ChatTemplate("{{ messages[0].content }}{{ style }}", {"bos_token": "<s>"})

    assert template.render(MESSAGES, style="!") == "hi!"
    for name in ("bos_token", "raise_exception", "_rayllm_tick"):
        with pytest.raises(RequestError, match=name):
            template.render(MESSAGES, **{name: "x"})
    with pytest.raises(RequestError, match="100 are too many"):
        template.render(MESSAGES, **{f"k{i}": i for i in range(100)})


def test_loop_controls_json_dates_and_training_marks_are_known() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
        "{{ strftime_now('%Y')|length }}"
    )

    assert ChatTemplate(source).render([{"content": "<ü>"}, {}]) == '{"content": "<ü>"}4'
