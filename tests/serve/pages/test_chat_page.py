"""The chat page in a real browser: what a person does, and what comes of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from serve.pages.browser import PHONE, Browser
from serve.pages.conftest import open_chat
from serve.pages.scripted import LAST_WORD, NUM_WORDS, SHORT, ScriptedServer
from serve.served import KEY

from rayllm.errors import OverloadedError

ENTER, ESCAPE, SHIFT, ALT, UP, TAB = "\ue007", "\ue00c", "\ue008", "\ue00a", "\ue013", "\ue004"
LAST_ANSWER = ".turn:last-child .answer-text"


def ask(chat: Browser, text: str) -> None:
    chat.type("#message", text)
    chat.press(ENTER)


def asked(chat: Browser, text: str, num_turns: int = 1) -> str:
    """Asks, and waits for the whole answer."""
    ask(chat, text)
    ended(chat, num_turns)
    return chat.text(LAST_ANSWER)


def ended(chat: Browser, num_turns: int = 1) -> None:
    chat.wait(
        lambda: len(chat.all(".turn")) == num_turns and not chat.all(".answer.running") and chat.is_shown("#send"),
        f"{num_turns} answered turns",
    )
    chat.drawn()


def test_an_answer_streams_in_with_its_speed_and_the_context_it_takes(chat: Browser, served: ScriptedServer) -> None:
    served.engine.step_s = 0.01
    ask(chat, "a long")
    chat.wait_text(LAST_ANSWER, "word3")
    chat.wait_text(".running .figures", "tokens")
    assert "tokens/s · first token " in chat.text(".figures")
    assert chat.is_shown("#stop")
    assert not chat.is_shown("#send")
    chat.wait_text("#context-text", "of 65,536")
    chat.press(ESCAPE)
    ended(chat)
    assert served.bodies[0]["messages"] == [{"role": "user", "content": "a long"}]
    assert served.bodies[0]["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_stop_ends_the_answer_here_and_in_the_engine(chat: Browser, served: ScriptedServer) -> None:
    served.engine.step_s = 0.01
    ask(chat, "a long")
    chat.wait_text(LAST_ANSWER, "word1")
    chat.click("#stop")
    ended(chat)
    (stream,) = served.engine.streams
    chat.wait(lambda: stream.closed, "the engine was told")
    text = chat.text(LAST_ANSWER)
    assert "word1" in text
    assert "stopped" in chat.text(".figures")
    time.sleep(0.05)
    assert chat.text(LAST_ANSWER) == text


def test_regenerating_keeps_the_answers_before_it_at_hand(chat: Browser, served: ScriptedServer) -> None:
    asked(chat, "first")
    chat.click("[aria-label='Regenerate answer']")
    chat.wait_text(".variant", "2/2")
    chat.click("[aria-label='Earlier answer']")
    chat.wait_text(".variant", "1/2")
    assert [len(body["messages"]) for body in served.bodies] == [1, 1]
    asked(chat, "second", 2)
    assert [message["role"] for message in served.bodies[2]["messages"]] == ["user", "assistant", "user"]


def test_an_edited_message_is_sent_anew_and_what_followed_it_can_be_brought_back(
    chat: Browser, served: ScriptedServer
) -> None:
    asked(chat, "one")
    asked(chat, "two", 2)
    chat.click(".turn:first-child [aria-label='Edit message']")
    chat.run("document.activeElement.value = ''")
    chat.press("other")
    chat.press(ENTER)
    ended(chat)
    assert chat.texts(".bubble") == ["You: other"]
    assert served.bodies[-1]["messages"] == [{"role": "user", "content": "other"}]
    chat.click(".toast .button")
    ended(chat, 2)
    assert chat.texts(".bubble") == ["You: one", "You: two"]
    chat.click(".turn:last-child [aria-label='Delete message and answer']")
    ended(chat, 1)
    assert chat.texts(".bubble") == ["You: one"]


def test_settings_are_sent_and_bad_ones_are_told_before(chat: Browser, served: ScriptedServer) -> None:
    chat.click("#open-settings")
    chat.type("#set-system", "Be brief.")
    chat.type("#set-temperature", "0")
    chat.type("#set-max_tokens", "3x")
    chat.wait_text("#settings-body .problem", "Max tokens must be a whole number")
    chat.press("\ue003")
    chat.type("#set-seed", "7")
    chat.click(".more summary")
    chat.type("#set-top_k", "5")
    chat.type("#set-stop", "END")
    chat.type("#set-extra", '{"logit_bias": {"3": 1}}')
    chat.press(ESCAPE)
    asked(chat, "hello")
    (body,) = served.bodies
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sent = {name: body[name] for name in ("temperature", "max_tokens", "seed", "top_k", "stop", "logit_bias")}
    assert sent == {
        "temperature": 0, "max_tokens": 3, "seed": 7, "top_k": 5, "stop": ["END"], "logit_bias": {"3": 1},
    }  # fmt: skip
    assert "top_p" not in body
    chat.wait_text(".figures", "cut at the token limit")


def test_two_settings_answer_side_by_side(chat: Browser, served: ScriptedServer) -> None:
    chat.click("#compare")
    chat.wait(lambda: len(chat.all(".picker")) == 2)
    chat.click("[aria-label^='Settings of side B']")
    chat.type("#set-temperature", "0.5")
    chat.press(ESCAPE)
    ask(chat, "hello")
    ended(chat)
    assert chat.texts(".answer-text") == [SHORT, SHORT]
    assert sorted(str(body.get("temperature")) for body in served.bodies) == ["0.5", "None"]
    left, right = (node.rect for node in chat.all(".answer"))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]
    chat.click("#compare")
    chat.wait(lambda: len(chat.all(".picker")) == 1)
    assert chat.texts(".answer-text") == [SHORT]


def test_reasoning_is_folded_once_the_answer_begins(chat: Browser, served: ScriptedServer) -> None:
    served.delta_s = 0.15
    ask(chat, "please think")
    chat.wait_text(".reasoning summary", "Thinking")
    chat.wait(lambda: chat.run("return document.querySelector('.reasoning').open"))
    ended(chat)
    served.delta_s = 0.02
    assert chat.text(LAST_ANSWER) == "The answer is 4."
    assert not chat.run("return document.querySelector('.reasoning').open")
    chat.click(".reasoning summary")
    chat.wait_text(".reasoning .md", "First I consider the question.")


def test_tool_calls_are_shown_and_their_results_sent_back(chat: Browser, served: ScriptedServer) -> None:
    ask(chat, "please call")
    ended(chat)
    assert "get_weather" in chat.text(".call-head")
    assert json.loads(chat.text(".call pre")) == {"city": "Oslo"}
    chat.type(".call textarea", "rain and think")
    chat.click(".calls > .button")
    ended(chat, 2)
    user, assistant, tool = served.bodies[-1]["messages"]
    assert user["role"] == "user"
    assert assistant["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city":"Oslo"}'}
    assert tool == {"role": "tool", "tool_call_id": "call_1", "content": "rain and think"}


def test_errors_are_shown_in_the_servers_own_words(chat: Browser, served: ScriptedServer) -> None:
    served.engine.refusal = OverloadedError("the queue is full: 256 requests wait", retry_after_s=2)
    ask(chat, "hello")
    chat.wait_text(".problem", "the queue is full: 256 requests wait")
    assert "HTTP 429 · overloaded" in chat.text(".problem-foot")
    assert "429" in chat.logs()[0]  # the browser's own note of a failed request
    served.engine.refusal = None
    chat.click(".problem .button")
    ended(chat)
    assert (chat.text(LAST_ANSWER), chat.is_shown(".problem"), chat.is_shown(".variant")) == (SHORT, False, False)
    ask(chat, "a fault")
    ended(chat, 2)
    assert chat.text(LAST_ANSWER) == "It began well"
    assert "the engine lost a worker three times" in chat.text(".turn:last-child .problem")


def test_an_api_key_is_asked_for_and_kept_for_the_tab_alone(browser: Browser) -> None:
    served = ScriptedServer(api_keys=[KEY])
    with served.url() as url:
        browser.open(f"{url}/")
        browser.wait_text("#key", "missing or wrong API key")
        assert browser.run("return document.activeElement.id") == "key-input"
        browser.press(KEY)
        browser.press(ENTER)
        browser.wait(lambda: browser.text(".picker select") == "tiny", "the model")
        assert asked(browser, "hello") == SHORT
        stored = browser.run("return JSON.stringify(localStorage) + document.cookie")
        assert KEY not in stored
        assert browser.run("return sessionStorage.length") == 2
        browser.driver.get(f"{url}/dashboard")
        browser.wait_text("#state", "Ready")
        assert all("401" in line for line in browser.logs())
        browser.driver.get("about:blank")


@pytest.mark.parametrize("by", ["cut", "reload"])
def test_an_answer_whose_connection_is_lost_goes_on_where_it_was(
    chat: Browser, served: ScriptedServer, by: str
) -> None:
    served.engine.step_s, served.engine.tokens_a_step = 0.004, 4  # no faster than the page reads and notes its place
    if by == "cut":
        served.cut_after = 60
    ask(chat, "a long")
    chat.wait_text(LAST_ANSWER, "word100")
    if by == "reload":
        chat.wait(lambda: "eventId" in (chat.run("return sessionStorage['rayllm.pending']") or ""), "kept")
        chat.driver.refresh()
    served.engine.tokens_a_step = 40
    chat.wait_text(LAST_ANSWER, LAST_WORD)
    ended(chat)
    assert served.num_resumed == 1
    assert chat.text(LAST_ANSWER).split() == [f"word{i}" for i in range(NUM_WORDS)]
    assert [line for line in chat.logs() if "ERR_INCOMPLETE_CHUNKED_ENCODING" not in line] == []


def test_a_reader_who_scrolls_up_is_left_there(chat: Browser, served: ScriptedServer) -> None:
    served.engine.step_s, served.engine.tokens_a_step = 0.01, 60
    ask(chat, "a long")
    near = "s.scrollTop > 100 && s.scrollHeight - s.scrollTop - s.clientHeight < 60"
    at_end = f"const s = document.getElementById('scroller'); return {near}"
    chat.wait(lambda: chat.run(at_end), "followed to the end")
    chat.run("document.getElementById('scroller').scrollTop = 40")
    chat.wait_shown("#jump")
    chat.wait_text(LAST_ANSWER, LAST_WORD)
    assert chat.run("return document.getElementById('scroller').scrollTop") == 40
    chat.click("#jump")
    chat.wait(lambda: chat.run(at_end), "at the end again")


def test_what_a_model_writes_is_never_run_or_loaded(chat: Browser, served: ScriptedServer) -> None:
    asked(chat, "hostile")
    assert "<script>" in chat.text(LAST_ANSWER)
    assert chat.run("return window.hacked ?? null") is None
    assert chat.all(".answer :is(script, img, svg:not(.icon), iframe, [onerror], [onclick])") == []
    links = chat.run("return [...document.querySelectorAll('.answer a')].map((a) => new URL(a.href).protocol)")
    assert set(links) <= {"https:", "http:", "mailto:"}
    title = "<img src=x onerror=window.hacked=9>"
    chat.click("[aria-label='Rename hostile']")
    chat.press(title)
    chat.press(ENTER)
    chat.wait_text(".conversations .title", title)
    chat.driver.refresh()
    chat.wait_text(".conversations .title", title)
    assert chat.run("return window.hacked ?? null") is None


def test_markdown_becomes_elements(chat: Browser, served: ScriptedServer) -> None:
    asked(chat, "markdown")
    children = "[...document.querySelector('.answer-text').children]"
    shape = chat.run(f"return {children}.map((node) => node.className || node.nodeName)")
    assert shape == ["md-h1", "P", "OL", "table", "code", "BLOCKQUOTE"]
    assert chat.texts(".md strong, .md em, .md p > code, .md a") == ["bold", "slanted", "code", "link"]
    assert chat.texts(".md ol > li > ul > li") == ["nested"]
    assert chat.text(".code pre") == "def f(x):\n    return x  # <b>"


def test_conversations_are_exported_and_imported_whole(chat: Browser, served: ScriptedServer) -> None:
    asked(chat, "hello there")
    chat.click("#open-share")
    chat.click("#export-json")
    chat.click("#open-share")
    chat.click("#export-markdown")
    exported = chat.downloads / "hello-there.json"
    chat.wait(lambda: exported.exists() and (chat.downloads / "hello-there.md").exists(), "two files")
    written = (chat.downloads / "hello-there.md").read_text()
    assert f"## User\n\nhello there\n\n## Assistant (tiny)\n\n{SHORT}" in written
    chat.click(".conversations [aria-label='Delete hello there']")
    chat.wait(lambda: not chat.all(".conversations li"))
    chat.click("#open-share")
    chat.all("#import-file")[0].send_keys(str(exported))
    ended(chat)
    assert (chat.text(LAST_ANSWER), chat.text(".conversations .title")) == (SHORT, "hello there")
    exported.write_text('{"format": "something else"}')
    chat.click("#open-share")
    chat.all("#import-file")[0].send_keys(str(exported))
    chat.wait_text("#import-problem", "not an export of this page")


def test_a_chat_whose_model_is_gone_goes_on_with_the_one_that_is_here(chat: Browser, served: ScriptedServer) -> None:
    asked(chat, "first")
    rename = "localStorage.setItem(key, localStorage.getItem(key).replaceAll('\"tiny\"', '\"gone\"'))"
    chat.run(f"for (const key of Object.keys(localStorage)) {rename}")
    chat.driver.refresh()
    chat.wait(lambda: chat.run("return document.querySelector('.picker select')?.value"), "a model in the picker")
    chat.click("[data-id] .open")
    asked(chat, "second", 2)
    assert served.bodies[-1]["model"] == "tiny"


def test_everything_can_be_done_by_keyboard(chat: Browser, served: ScriptedServer) -> None:
    assert chat.focused() == "Message"
    chat.press("line one")
    chat.press(SHIFT, ENTER)
    chat.press("line two")
    chat.press(ENTER)
    ended(chat)
    assert served.bodies[0]["messages"][0]["content"] == "line one\nline two"
    chat.press(UP)
    assert chat.focused() == "Edit your message"
    chat.press(ESCAPE)
    assert chat.focused() == "Message"
    chat.press(ALT, "r")
    chat.wait_text(".variant", "2/2")
    chat.press(ALT, "s")
    chat.wait_shown("#settings")
    chat.press(ESCAPE)
    chat.press(ALT, "n")
    chat.wait(lambda: not chat.all(".turn"), "a new chat")
    while "Skip" not in chat.focused()[:4]:
        chat.press(TAB)
    seen = [chat.focused()]
    while "Message" not in seen:
        chat.press(TAB)
        seen.append(chat.focused())
        outline = chat.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or seen[-1] == "Message", f"the focus does not show on {seen[-1]}"
    order = ["Skip to the message box", "New chat", "Dashboard", "Model", "Compare side by side", "Settings", "Message"]
    assert [name for name in seen if name in order] == order


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, served: ScriptedServer, url: str) -> None:
    open_chat(browser, url, size=PHONE)
    sideways: Callable[[], bool] = lambda: browser.run(  # noqa: E731
        "return document.documentElement.scrollWidth > innerWidth || "
        "document.getElementById('scroller').scrollWidth > document.getElementById('scroller').clientWidth"
    )
    asked(browser, "markdown")
    assert not sideways()
    assert not browser.is_shown("#new-chat")
    browser.click("#open-sidebar")
    browser.wait_shown("#new-chat")
    assert browser.focused() == "Close the list"
    browser.press(ESCAPE)
    browser.wait(lambda: not browser.is_shown("#new-chat"))
    browser.click("#compare")
    browser.wait(lambda: len(browser.all(".picker")) == 2)
    assert not sideways()
    browser.driver.get(f"{url}/dashboard")
    browser.wait_text("#state", "Ready")
    assert not browser.run("return document.documentElement.scrollWidth > innerWidth")


@pytest.mark.parametrize("dialog", ["share", "help", "settings"])
def test_dialogs_fit_the_smallest_phones(browser: Browser, served: ScriptedServer, url: str, dialog: str) -> None:
    open_chat(browser, url, size=(320, 640))
    browser.run("document.getElementById(arguments[0]).click()", f"open-{dialog}")
    script = """const dialog = document.getElementById(arguments[0]);
    const rights = [...dialog.querySelectorAll('.dialog-body *')].map((node) => node.getBoundingClientRect().right);
    return dialog.getBoundingClientRect().right - Math.max(...rights);"""
    assert browser.run(script, dialog) >= 20


def test_long_answers_do_not_freeze_the_page(chat: Browser, served: ScriptedServer) -> None:
    served.engine.step_s, served.engine.tokens_a_step = 0.002, 80
    chat.run(
        "window.longest = 0; new PerformanceObserver((list) => list.getEntries().forEach((entry) => "
        "{ window.longest = Math.max(window.longest, entry.duration); })).observe({type: 'longtask'});"
        "window.updates = 0; new MutationObserver(() => window.updates++)"
        ".observe(document.getElementById('turns'), {subtree: true, childList: true, characterData: true});"
    )
    asked(chat, "a long")
    assert chat.text(LAST_ANSWER).endswith(LAST_WORD)
    num_chunks = served.engine.streams[0].num_steps
    assert chat.run("return window.updates") < num_chunks * 0.8, "chunks are shown together"
    assert chat.run("return window.longest") < 1000


def test_it_works_where_the_browser_keeps_nothing(chat: Browser, served: ScriptedServer) -> None:
    off = "{get() { throw new DOMException('off', 'SecurityError'); }}"
    refuse = f"for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, {off});"
    script = chat.cdp("Page.addScriptToEvaluateOnNewDocument", source=refuse)
    chat.driver.refresh()
    chat.wait(lambda: chat.text(".picker select") == "tiny", "the model")
    assert asked(chat, "hello") == SHORT
    chat.click("#theme")
    chat.cdp("Page.removeScriptToEvaluateOnNewDocument", **script)
