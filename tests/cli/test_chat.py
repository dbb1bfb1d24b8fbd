import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cli.on_terminal import OnTerminal

from rayllm.cli.answer import Piece, ServerError, Timing
from rayllm.cli.chat import Conversation, converse, handle, read_message
from rayllm.cli.client import ApiClient
from rayllm.cli.flags import UsageError
from rayllm.cli.main import main
from rayllm.errors import EngineUnreachableError


class Echo:
    """Answers the last message with itself, a word at a time; remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[dict[str, str]], dict[str, Any]]] = []
        self.interrupt_after: int | None = None

    def __call__(self, messages: list[dict[str, str]], params: dict[str, Any], timing: Timing) -> Iterator[Piece]:
        self.asked.append(([dict(message) for message in messages], dict(params)))
        for count, word in enumerate(messages[-1]["content"].split()):
            if count == self.interrupt_after:
                raise KeyboardInterrupt
            timing.note(1)
            yield Piece(word + " ", is_reasoning=word.startswith("hmm"))


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def chat(echo: Echo) -> Conversation:
    written: list[str] = []
    aside: list[str] = []
    conversation = Conversation(echo, written.append, aside.append, written.append)
    conversation.aside = aside  # type: ignore[attr-defined]
    conversation.written = written  # type: ignore[attr-defined]
    return conversation


def written(chat: Conversation) -> str:
    return "".join(chat.written)  # type: ignore[attr-defined]


def test_history_and_system_prompt_go_with_each_message(chat: Conversation, echo: Echo) -> None:
    for line in ("/system be brief", "hello there", "and again"):
        assert handle(chat, line)
    assert [message["role"] for message in echo.asked[-1][0]] == ["system", "user", "assistant", "user"]
    assert chat.turns[-1] == {"role": "assistant", "content": "and again "}


def test_regen_asks_the_same_again(chat: Conversation, echo: Echo) -> None:
    handle(chat, "hello")
    handle(chat, "/regen")
    assert echo.asked[0] == echo.asked[1]
    assert len(chat.turns) == 2


def test_regen_without_a_question_is_refused(chat: Conversation) -> None:
    with pytest.raises(UsageError, match="no response to regenerate"):
        handle(chat, "/regen")


def test_reset_keeps_the_system_prompt(chat: Conversation) -> None:
    for line in ("/system be brief", "hello", "/reset"):
        handle(chat, line)
    assert chat.messages == [{"role": "system", "content": "be brief"}]


def test_interrupt_stops_one_answer_and_keeps_what_came(chat: Conversation, echo: Echo) -> None:
    echo.interrupt_after = 2
    handle(chat, "one two three four")
    assert chat.turns[-1] == {"role": "assistant", "content": "one two "}
    assert "stopped" in written(chat)


def test_params_are_checked_and_sent(chat: Conversation, echo: Echo) -> None:
    handle(chat, "/params temperature=0.5 max_tokens=7")
    handle(chat, "/params temperature=")
    handle(chat, "hello")
    assert echo.asked[-1][1] == {"max_tokens": 7}
    with pytest.raises(UsageError, match="did you mean 'temperature'"):
        handle(chat, "/params temprature=1")
    with pytest.raises(UsageError, match="did you mean 'top_p'"):
        handle(chat, "/params topp=")
    with pytest.raises(UsageError, match="must be an integer"):
        handle(chat, "/params max_tokens=many")


def test_saved_conversations_come_back(chat: Conversation, echo: Echo, tmp_path: Path) -> None:
    for line in ("/system be brief", "/params seed=3", "hello", f"/save {tmp_path}/c.json"):
        handle(chat, line)
    other = Conversation(echo, *[lambda text: None] * 3)
    handle(other, f"/load {tmp_path}/c.json")
    assert (other.messages, other.params) == (chat.messages, chat.params)


def test_a_file_that_holds_no_conversation_changes_none(chat: Conversation, tmp_path: Path) -> None:
    handle(chat, "hello")
    (tmp_path / "c.json").write_text('{"messages": [], "params": 3}')
    with pytest.raises(UsageError, match="is not a saved conversation"):
        handle(chat, f"/load {tmp_path}/c.json")
    assert len(chat.turns) == 2


def test_mistakes_are_told_and_the_conversation_goes_on(chat: Conversation) -> None:
    lines = iter(["/regn", "/load /nowhere", "hello", "/exit", "never read"])
    assert not converse(chat, lambda goes_on: next(lines))
    assert "did you mean '/regen'" in written(chat)
    assert chat.turns[-1]["content"] == "hello "
    assert next(lines) == "never read"


def from_lines(*lines: str) -> Callable[[bool], str]:
    left = iter(lines)

    def read_line(goes_on: bool) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        if line == "^C":
            raise KeyboardInterrupt
        return line

    return read_line


def test_a_second_ctrl_c_leaves_also_while_the_first_is_answered(chat: Conversation) -> None:
    def interrupted(text: str) -> None:
        raise KeyboardInterrupt

    chat.note = interrupted
    assert converse(chat, from_lines("^C"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["one"], "one"),
        (["one\\", "two\\", "three"], "one\ntwo\nthree"),
        (['"""one', "", 'two"""'], "one\n\ntwo"),
        (['"""', "one", "two", '"""'], "one\ntwo"),
        (['"""one"""'], "one"),
    ],
)
def test_a_message_may_have_several_lines(lines: list[str], message: str) -> None:
    assert read_message(from_lines(*lines)) == message


def test_a_second_interrupt_leaves_and_a_first_does_not(chat: Conversation, echo: Echo) -> None:
    assert converse(chat, from_lines("^C", "hello", "^C", "^C", "never read"))
    assert [turn["content"] for turn in chat.turns] == ["hello", "hello "]
    assert "Ctrl-C again or type /exit" in written(chat)


def test_an_interrupt_while_an_answers_figures_are_shown_keeps_the_answer(chat: Conversation, echo: Echo) -> None:
    def note(text: str) -> None:
        if text.startswith("["):
            raise KeyboardInterrupt

    chat.note = note
    for line in ("hello", "/regen"):
        with pytest.raises(KeyboardInterrupt):
            handle(chat, line)
        assert [turn["content"] for turn in chat.turns] == ["hello", "hello "]


def test_an_answer_that_breaks_off_ends_its_line(chat: Conversation) -> None:
    def fail(messages: Any, params: Any, timing: Timing) -> Iterator[Piece]:
        yield Piece("so far")
        raise ServerError("worker died")

    chat.stream = fail
    assert not converse(chat, from_lines("hello"))
    assert written(chat) == "so far\n! worker died\n"


def test_reasoning_is_shown_aside_and_not_kept(chat: Conversation) -> None:
    handle(chat, "hmm1 hmm2 yes")
    assert "".join(chat.aside) == "hmm1 hmm2 \n\n"  # type: ignore[attr-defined]
    assert chat.turns[-1]["content"] == "yes "
    assert "hmm" not in written(chat)


def test_the_answer_after_reasoning_that_was_stopped_begins_at_once(chat: Conversation, echo: Echo) -> None:
    echo.interrupt_after = 1
    handle(chat, "hmm1 hmm2")
    echo.interrupt_after = None
    handle(chat, "yes")
    assert "".join(chat.aside) == "hmm1 "  # type: ignore[attr-defined]


def test_a_refused_message_is_not_kept(chat: Conversation) -> None:
    def refuse(messages: Any, params: Any, timing: Timing) -> Iterator[Piece]:
        raise ServerError("400: too long")
        yield Piece("")

    chat.stream = refuse
    with pytest.raises(ServerError):
        chat.say("hello")
    assert chat.turns == []


# ---------------------------------------------------------------------------------------------------- the client


MARKDOWN = """# Heading

- one **bold** item that is long enough to be broken

```python
def f(): pass
```"""


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, "application/json", json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = (body.get("messages") or [{"content": body.get("prompt")}])[-1]["content"]
        if asked == "refuse":
            return self._send(400, "application/json", json.dumps({"error": {"message": "no such thing"}}))
        events: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}], "usage": _usage(0)}]
        events += [
            {"choices": [{"delta": {"content": word}, "text": word}], "usage": _usage(count)}
            for count, word in enumerate(["a", "b", "c"], 1)
        ]
        if asked == "markdown":
            events = [
                {"choices": [{"delta": {"content": part}}]} for part in re.findall(r".{1,5}", MARKDOWN, re.DOTALL)
            ]
            events[-1]["usage"] = _usage(9)
        if asked == "think":
            events.insert(1, {"choices": [{"delta": {"reasoning_content": "let me see"}}], "usage": _usage(0)})
        if asked == "slow":
            return self._send_slowly()
        if asked == "fail":
            events.append({"error": {"message": "worker died"}})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        if asked != "cut":
            lines.append("data: [DONE]\n\n")
        return self._send(200, "text/event-stream", "".join(lines))

    def _send_slowly(self) -> None:
        """The beginning of an answer, and then nothing until the client goes."""
        self.send_response(200)
        self.end_headers()
        event = {"choices": [{"delta": {"content": "wait for it"}}], "usage": _usage(1)}
        self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.flush()
        self.connection.settimeout(20)
        self.connection.recv(1)
        self.close_connection = True

    def _send(self, status: int, kind: str, text: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


def _usage(count: int) -> dict[str, int]:
    return {"prompt_tokens": 2, "completion_tokens": count, "total_tokens": 2 + count}


@pytest.fixture
def client() -> Iterator[ApiClient]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        client = ApiClient(f"http://127.0.0.1:{server.server_address[1]}/v1")
        yield client
        client.close()
        server.shutdown()
        thread.join()


def ask(client: ApiClient, text: str) -> tuple[str, Timing]:
    timing = Timing()
    messages = [{"role": "user", "content": text}]
    return "".join(piece.text for piece in client.stream_chat(messages, {}, timing)), timing


def test_client_streams_text_and_counts_tokens(client: ApiClient) -> None:
    text, timing = ask(client, "hello")
    assert (text, timing.num_tokens, timing.num_prompt_tokens) == ("abc", 3, 2)
    assert timing.first_token_s is not None
    assert client.model() == "m"
    assert "".join(client.stream_completion("x", {}, Timing())) == "abc"


@pytest.mark.parametrize(
    ("text", "expected"), [("refuse", "no such thing"), ("fail", "worker died"), ("cut", "closed the stream before")]
)
def test_what_the_server_says_went_wrong_is_an_error(client: ApiClient, text: str, expected: str) -> None:
    with pytest.raises(ServerError, match=expected):
        ask(client, text)


def test_chat_in_a_pipe_prints_answers_alone(client: ApiClient) -> None:
    command = [sys.executable, "-m", "rayllm", "chat", "--url", client.url]
    said = 'hello\n"""two\nlines"""\nrefuse\n'
    done = subprocess.run(command, input=said, capture_output=True, text=True, timeout=60)
    assert done.stdout == "abc\nabc\n"
    assert done.stderr.count("[3 tokens") == 2
    assert "no such thing" in done.stderr
    assert done.returncode == 1


def test_chat_on_a_terminal_completes_commands_and_stops_an_answer(client: ApiClient, tmp_path: Path) -> None:
    with OnTerminal(["-m", "rayllm", "chat", "--url", client.url], HOME=str(tmp_path)) as terminal:
        terminal.read_until("> ")
        terminal.send("think\n")
        terminal.read_until("[3 tokens")
        assert "\x1b[2mlet me see" in terminal.seen
        terminal.send("/he\t\n")
        terminal.read_until("what can be typed")
        terminal.send("slow\n")
        terminal.read_until("wait for it")
        terminal.send("\x03")
        terminal.read_until("stopped]")
        terminal.send("\x03")
        terminal.read_until("Ctrl-C again or type /exit to exit)\n> ")
        terminal.send("\x03")
        terminal.read_all()
    assert terminal.process.returncode == 0
    history = tmp_path / ".cache" / "rayllm" / "chat_history"
    assert "slow" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


def test_complete_reads_its_prompt_from_a_pipe(client: ApiClient) -> None:
    command = [sys.executable, "-m", "rayllm", "complete", "--url", client.url, "--echo", "--stats"]
    done = subprocess.run(command, input="once\n", capture_output=True, text=True, timeout=60)
    assert done.stdout == "onceabc\n"
    assert done.stderr.startswith("3 tokens")


def test_a_continuation_that_breaks_off_ends_its_line(client: ApiClient, capsys: pytest.CaptureFixture[str]) -> None:
    for prompt, shown in (("fail", "abc\n"), ("refuse", "")):
        assert main(["complete", prompt, "--url", client.url]) == 1
        assert capsys.readouterr().out == shown


def test_no_server_is_unreachable() -> None:
    client = ApiClient("http://127.0.0.1:1")
    with pytest.raises(EngineUnreachableError, match="rayllm serve"):
        client.model()
    client.close()


def test_speed_counts_from_the_first_token() -> None:
    timing = Timing(first_token_s=1.0, last_token_s=3.0, num_tokens=11)
    assert timing.tokens_per_s == pytest.approx(5.0)
    assert Timing(first_token_s=1.0, last_token_s=1.0, num_tokens=1).tokens_per_s is None


def test_params_out_of_range_are_refused_when_typed(chat: Conversation) -> None:
    chat.max_model_len = 512
    handle(chat, "/params top_p=0.5")
    for typed, said in {
        "temperature=-1": r"temperature=-1.0 is outside \[0, 100\]",
        "temperature=nan": "temperature=nan is outside",
        "temperature=warm": "must be a number",
        "top_p=0": r"top_p=0.0 is outside \(0, 1\]",
        "top_k=-2": "top_k=-2 is outside",
        "min_p=1.5": "min_p=1.5 is outside",
        "presence_penalty=3": r"outside \[-2, 2\]",
        "repetition_penalty=0": r"outside \[0.01, 100\]",
        "seed=99999999999999999999": "seed=99999999999999999999 is outside",
        "max_tokens=0": "max_tokens=0 is outside",
        "max_tokens=513": "more than the model's context of 512 tokens",
        "temprature": "did you mean 'temperature'",
        "temperature": "temperature=VALUE sets it",
        "top_k=5 max_tokens=0": "max_tokens=0",
    }.items():
        with pytest.raises(UsageError, match=said):
            handle(chat, f"/params {typed}")
    assert chat.params == {"top_p": 0.5}


def test_params_of_a_loaded_conversation_and_of_flags_are_checked_too(chat: Conversation, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"messages": [], "params": {"temperature": -1}}))
    with pytest.raises(UsageError, match="temperature=-1 is outside"):
        handle(chat, f"/load {tmp_path}/c.json")
    assert chat.params == {}
    assert main(["chat", "--url", "http://127.0.0.1:1", "--top-p", "7"]) == 2
    assert main(["complete", "x", "--url", "http://127.0.0.1:1", "--min-p", "-1"]) == 2


def test_chat_on_a_terminal_shows_markdown_and_breaks_lines_between_words(client: ApiClient, tmp_path: Path) -> None:
    command = ["-m", "rayllm", "chat", "--url", client.url]
    with OnTerminal(command, columns=40, HOME=str(tmp_path)) as terminal:
        terminal.read_until("> ")
        terminal.send("markdown\n")
        seen = terminal.read_until("tokens/s]")
        answer = seen.partition("> markdown\n")[2].rpartition("[")[0]
        assert all(len(line) <= 40 for line in answer.splitlines())
        assert "Heading\n\n• one bold item that is long enough to\n  be broken\n" in answer
        assert "def f(): pass\n" in answer
        terminal.send("/exit\n")
        terminal.read_all()
    done = subprocess.run([sys.executable, *command], input="markdown\n", capture_output=True, text=True, timeout=60)
    assert done.stdout == MARKDOWN + "\n"  # in a pipe, as the model wrote it
