"""Formulas, code colours and the rest of an answer's markup in a real browser."""

from __future__ import annotations

import pytest
from serve.pages.browser import PHONE, Browser
from serve.pages.conftest import open_chat
from serve.pages.scripted import ANSWERS, ScriptedServer
from serve.pages.test_chat_page import LAST_ANSWER, ask, asked, ended

from rayllm.errors import ContextLengthError

FORMULAS = r"""Inline $E = mc^2$, \(a_1 + b_1\) and $\frac{1}{2}$.

\[ \int_0^1 x^2\,dx = \frac{1}{3} \]

$$
\begin{aligned} a &= b_1 * c_1 \\ c &= d \end{aligned}
$$

- in an item: \(x_1*y_1*z_1\)

It costs $5 to $10, or $3 for one and 4$ for two, and $HOME is no formula. A \*star\*.

Unknown: $\nosuchcommand{x}$ stays.
"""
CODE = "Look:\n\n```python\ndef f(x):\n    return '<b>' # why\n```\n\n```nosuchlanguage\nplain\n```\n\nDone."
WIDE = "```text\n" + "wide " * 100 + "\n```\n\n$$\n" + " + ".join(f"x_{{{i}}}" for i in range(80)) + "\n$$"
NOTES = """Press <kbd>Ctrl</kbd>+<kbd>C</kbd>, H<sub>2</sub>O, <b onclick=x>no</b>, a<br>b.

A claim.[^one] Another,[^2] and [^absent]; a class `[^abc]`.

[^one]: The *first* note.
[^2]: The second note
"""
ANSWERS.update({"formulas": FORMULAS, "code": CODE, "wide": WIDE, "notes": NOTES})


def html(browser: Browser, selector: str) -> str:
    return str(browser.run("return document.querySelector(arguments[0])?.outerHTML ?? ''", selector))


def test_formulas_are_drawn_and_prices_are_none(chat: Browser) -> None:
    asked(chat, "show formulas")
    chat.wait(lambda: len(chat.all(f"{LAST_ANSWER} math")) == 6, "six formulas drawn")
    spaces = set(chat.run("return [...document.querySelectorAll('math')].map((n) => n.namespaceURI)"))
    assert spaces == {"http://www.w3.org/1998/Math/MathML"}
    assert len(chat.all(f"{LAST_ANSWER} math[display=block]")) == 2
    assert len(chat.all(f"{LAST_ANSWER} .formula.block mtr")) == 2
    assert len(chat.all(f"{LAST_ANSWER} li math")) == 1
    text = chat.text(LAST_ANSWER)
    assert "It costs $5 to $10, or $3 for one and 4$ for two, and $HOME is no formula. A *star*." in text
    assert r"$\nosuchcommand{x}$" in text
    labels = chat.run("return [...document.querySelectorAll('math')].map((n) => n.getAttribute('aria-label'))")
    assert r"\(a_1 + b_1\)" in labels  # what a screen reader reads, and whoever looks for the source


def test_a_formula_is_drawn_while_the_rest_still_comes(chat: Browser, served: ScriptedServer) -> None:
    ANSWERS["early"] = "First $a^2$ here. " + "more words " * 300
    served.engine.step_s = 0.01
    ask(chat, "a formula early")
    chat.wait(lambda: chat.all(f"{LAST_ANSWER} math"), "the formula")
    assert chat.all(".answer.running")
    chat.click("#stop")
    ended(chat)


def test_code_is_coloured_once_it_is_whole_and_copied_as_it_was(chat: Browser) -> None:
    asked(chat, "show code")
    chat.wait(lambda: chat.all(".code .code-k"), "colours")
    assert chat.texts(".code-k") == ["def", "return"]
    assert chat.texts(".code-s") == ["'<b>'"]
    codes = chat.run("return [...document.querySelectorAll('pre code')].map((n) => n.textContent)")
    assert codes == ["def f(x):\n    return '<b>' # why", "plain"]
    assert chat.run("return document.querySelectorAll('.code b').length") == 0
    chat.run("navigator.clipboard.writeText = (text) => { window.copied = text; return Promise.resolve(); }")
    chat.click("[aria-label='Copy code']")
    assert chat.run("return window.copied") == codes[0]


def test_where_the_server_does_not_mark_up_the_source_stays(chat: Browser) -> None:
    fails = "(path, o) => String(path).includes('markup') ? Promise.reject(new TypeError('gone')) : real(path, o)"
    chat.run(f"const real = fetch; window.fetch = {fails}")
    asked(chat, "show code")
    asked(chat, "show formulas", 2)
    assert "def f(x):" in chat.text(".code pre")
    assert r"\(a_1 + b_1\)" in chat.text(LAST_ANSWER)
    assert not chat.all("math")


@pytest.mark.parametrize("size", [(1280, 800), PHONE])
def test_what_is_wider_than_its_place_shows_that_it_scrolls(
    browser: Browser, served: ScriptedServer, url: str, size: tuple[int, int]
) -> None:
    open_chat(browser, url, size=size)
    asked(browser, "something wide")
    browser.wait(lambda: browser.all(".code pre.more-after:not(.more-before)"), "more at the right")
    browser.wait(lambda: browser.all(".formula.block.more-after math"), "the formula too")
    assert "gradient" in browser.run("return getComputedStyle(document.querySelector('.code pre')).maskImage")
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.run("document.querySelector('.code pre').scrollLeft = 100")
    browser.wait(lambda: browser.all(".code pre.more-after.more-before"), "more at both sides")
    browser.run("document.querySelector('.code pre').scrollLeft = 1e6")
    browser.wait(lambda: browser.all(".code pre.more-before:not(.more-after)"), "more at the left")


def test_footnotes_and_simple_tags(chat: Browser) -> None:
    asked(chat, "show notes")
    assert chat.texts(f"{LAST_ANSWER} kbd") == ["Ctrl", "C"]
    assert chat.texts(f"{LAST_ANSWER} sub") == ["2"]
    assert "<b onclick=x>no</b>" in chat.text(LAST_ANSWER)
    assert chat.texts(f"{LAST_ANSWER} .footnote-mark") == ["1", "2", "[^absent]"]
    assert chat.texts(f"{LAST_ANSWER} .footnote") == ["1. The first note.", "2. The second note"]
    assert "[^abc]" in chat.texts(f"{LAST_ANSWER} code")
    chat.click(".footnote-mark")
    assert chat.run("return document.activeElement.dataset.note") == "one"


def test_a_conversation_that_is_too_long_has_a_way_out(chat: Browser, served: ScriptedServer) -> None:
    for number in range(4):
        asked(chat, f"question {number}", number + 1)
    served.engine.refusal = ContextLengthError("the prompt is longer than the context", param="messages")
    ask(chat, "and now?")
    ended(chat, 5)
    assert chat.texts(".problem button") == [
        "Leave out the oldest turns",
        "Shorten the message",
        "Start a new chat with it",
    ]
    served.engine.refusal = None
    chat.click(".problem button")
    ended(chat, 5)
    sent = [m["content"] for m in served.bodies[-1]["messages"] if m["role"] == "user"]
    assert sent == ["question 2", "question 3", "and now?"]
    assert "not sent any more" in chat.text(".turn:nth-child(3) .not-sent")
    asked(chat, "next", 6)
    assert served.bodies[-1]["messages"][0]["content"] == "question 2"
    chat.logs()  # the refusal, as the browser tells it


def test_a_message_that_is_too_long_alone_can_be_shortened_or_begun_anew(chat: Browser, served: ScriptedServer) -> None:
    served.engine.refusal = ContextLengthError("the prompt is longer than the context", param="messages")
    asked(chat, "much too long")
    assert chat.texts(".problem button") == ["Shorten the message", "Start a new chat with it"]
    chat.click(".problem button")
    assert chat.run("return document.querySelector('.editor textarea').value") == "much too long"
    chat.press("\ue00c")
    chat.click(".problem button:nth-child(2)")
    assert chat.run("return document.getElementById('message').value") == "much too long"
    assert not chat.all(".turn")
    chat.logs()
