"""`rayllm chat`: a conversation in the terminal, over HTTP, with a running server or one started for a model."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rayllm.cli.answer import Piece, ServerError, Timing
from rayllm.cli.connect import add_server_flags, connected
from rayllm.cli.flags import Parser, UsageError, add_config_flags
from rayllm.cli.markdown import PlainWriter
from rayllm.cli.sampling_flags import PARAMS, add_param_flags, checked_param, param_name, params_of, parse_param
from rayllm.config import EngineConfig, parse_settings

if TYPE_CHECKING:
    from rayllm.cli.client import ApiClient

COMMANDS = {
    "/help": "what can be typed",
    "/reset": "clear the conversation (the system prompt stays)",
    "/regen": "regenerate the last response",
    "/system [TEXT]": "set the system prompt; without TEXT, remove it",
    "/params [NAME=VALUE …]": "show or set sampling parameters; NAME= resets one",
    "/save FILE": "save the conversation as JSON",
    "/load FILE": "load a saved conversation",
    "/exit": "exit (also Ctrl-D)",
    '"""': "begins and ends a message of several lines; so does \\ at the end of a line",
}
_BLOCK = '"""'


class Streamer(Protocol):
    """What a conversation asks of a server: `ApiClient.stream_chat`."""

    def __call__(self, messages: list[dict[str, str]], params: dict[str, Any], timing: Timing) -> Iterator[Piece]: ...


class AnswerWriter(Protocol):
    """Shows one answer, or its reasoning, as it comes."""

    def write(self, text: str) -> None: ...

    def end(self) -> None: ...


@dataclass
class Conversation:
    """Messages so far and how to sample. Knows nothing of terminals but three ways to show text as it comes: `write`
    what was answered or asked for, `write_aside` reasoning, and `note` all that is said about an answer. Where
    `open_answer` and `open_aside` are given, they make what shows each answer and each reasoning instead."""

    stream: Streamer
    write: Callable[[str], None]
    write_aside: Callable[[str], None]
    note: Callable[[str], None]
    params: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    open_answer: Callable[[], AnswerWriter] | None = None
    open_aside: Callable[[], AnswerWriter] | None = None
    max_model_len: int | None = None
    """The model's context in tokens, where it is known."""
    _reasoned: bool = False
    """Reasoning was shown, and nothing of the answer yet."""

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def say(self, text: str) -> None:
        """Adds the user's message and answers it. A server's refusal takes the message back."""
        self.turns.append({"role": "user", "content": text})
        try:
            self._answer()
        except BaseException:
            if not self._was_answered():
                self.turns.pop()
            raise

    def regenerate(self) -> None:
        """Drops the last answer and asks for another. `UsageError` when nothing was asked yet."""
        if not any(turn["role"] == "user" for turn in self.turns):
            raise UsageError("there is no response to regenerate yet")
        dropped = self.turns.pop() if self.turns[-1]["role"] == "assistant" else None
        try:
            self._answer()
        except BaseException:
            if dropped is not None and not self._was_answered():
                self.turns.append(dropped)
            raise

    def _was_answered(self) -> bool:
        """Whether the last message has its response, even if Ctrl-C came while its figures were shown."""
        return self.turns[-1]["role"] == "assistant"

    def _answer(self) -> None:
        """Ctrl-C ends the answer, and what came of it is kept. Reasoning is shown and not kept."""
        parts: list[str] = []
        timing = Timing()
        stopped = self._reasoned = False
        shown = self.open_answer() if self.open_answer else PlainWriter(self.write)
        aside = self.open_aside() if self.open_aside else PlainWriter(self.write_aside)
        answer = self.stream(self.messages, self.params, timing)
        try:
            for piece in answer:
                self._show(piece, aside if piece.is_reasoning else shown, aside, first=not parts)
                parts += [] if piece.is_reasoning else [piece.text]
            _end(aside if self._reasoned else shown)
        except KeyboardInterrupt:
            stopped = True
            _end(aside if self._reasoned else shown)
        except Exception:
            if parts or self._reasoned:  # what went wrong gets a line of its own
                _end(aside if self._reasoned else shown)
                self.write("\n")
            raise
        finally:
            close = getattr(answer, "close", None)
            if close:
                close()
        self.turns.append({"role": "assistant", "content": "".join(parts)})
        self.write("\n")
        ending = ", stopped" if stopped else ", cut at max_tokens" if timing.finish_reason == "length" else ""
        self.note(f"[{timing}{ending}]\n")

    def _show(self, piece: Piece, writer: AnswerWriter, aside: AnswerWriter, *, first: bool) -> None:
        if first and self._reasoned and not piece.is_reasoning:
            aside.end()
            self.write_aside("\n\n")
        self._reasoned = piece.is_reasoning
        writer.write(piece.text)

    def save(self, path: str) -> None:
        content = {"system": self.system, "params": self.params, "messages": self.turns}
        Path(path).expanduser().write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")

    def load(self, path: str) -> None:
        """`UsageError` for a file that holds no conversation."""
        try:
            content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
            turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in content["messages"]]
            given = {name: v for name, v in content.get("params", {}).items() if name in PARAMS}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{path!r} is not a saved conversation") from None
        params = {name: checked_param(name, value) for name, value in given.items()}
        self.system, self.turns = content.get("system"), turns
        self.params.update(params)

    def set_params(self, words: Sequence[str]) -> None:
        """All that the words say, or nothing: `UsageError` for a wrong one."""
        params = dict(self.params)
        for word in words:
            given, equals, value = word.partition("=")
            name = param_name(given)
            if not equals:
                raise UsageError(f"give NAME=VALUE, not {word!r}: {name}=VALUE sets it, {name}= resets it")
            if value:
                params[name] = parse_param(name, value)
            else:
                params.pop(name, None)
        if self.max_model_len is not None and params.get("max_tokens", 0) > self.max_model_len:
            raise UsageError(
                f"max_tokens={params['max_tokens']} is more than the model's context of {self.max_model_len} tokens"
            )
        self.params = params
        shown = {name: value for name, value in self.params.items() if name in PARAMS}
        self.write((json.dumps(shown) if shown else "all parameters are the server's defaults") + "\n")


def _end(writer: AnswerWriter) -> None:
    """Ctrl-C once more while the last words are shown changes nothing."""
    with contextlib.suppress(KeyboardInterrupt):
        writer.end()


def handle(conversation: Conversation, line: str) -> bool:
    """Does one line of input; False when the user is done."""
    from rayllm.errors import did_you_mean

    if not line.startswith("/"):
        if line.strip():
            conversation.say(line)
        return True
    command, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if command in ("/exit", "/quit", "/bye"):
        return False
    if command == "/help":
        width = max(map(len, COMMANDS))
        conversation.write("".join(f"{name:<{width}}  {text}\n" for name, text in COMMANDS.items()))
    elif command == "/reset":
        conversation.turns.clear()
    elif command == "/regen":
        conversation.regenerate()
    elif command == "/system":
        conversation.system = rest or None
    elif command == "/params":
        conversation.set_params(rest.split())
    elif command in ("/save", "/load"):
        if not rest:
            raise UsageError(f"give a file: {command} FILE")
        (conversation.save if command == "/save" else conversation.load)(rest)
    else:
        known = [name.split()[0] for name in COMMANDS]
        raise UsageError(f"unknown command {command!r}{did_you_mean(command, known)} (/help lists them)")
    return True


def read_message(read_line: Callable[[bool], str]) -> str:
    """One message or command: a line, lines joined by a backslash at their ends, or a block between `\"\"\"`.
    `read_line` is told whether it goes on with a message. `EOFError` at the end of input."""
    line = read_line(False)
    if line.lstrip().startswith(_BLOCK):
        return _read_block(line.lstrip().removeprefix(_BLOCK), read_line)
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(True))
    return "\n".join(lines)


def _read_block(first: str, read_line: Callable[[bool], str]) -> str:
    lines = [first]
    while not lines[-1].rstrip().endswith(_BLOCK):
        lines.append(read_line(True))
    lines[-1] = lines[-1].rstrip().removesuffix(_BLOCK)
    return "\n".join(lines).strip("\n")


def converse(conversation: Conversation, read_line: Callable[[bool], str]) -> bool:
    """Reads and answers until /exit, the end of input or a second Ctrl-C; a mistake is told and the conversation goes
    on. Returns whether there was none."""
    ok, interrupted = True, False
    while True:
        try:
            while True:  # within the `try`: Python looks for signals where a loop begins again
                message = read_message(read_line)
                interrupted = False
                if not handle(conversation, message):
                    return ok
        except EOFError:
            return ok
        except KeyboardInterrupt:
            if interrupted or not _hint_at_exit(conversation):
                return ok
            interrupted = True
        except (UsageError, ServerError, OSError) as error:
            ok = False
            conversation.note(f"! {error}\n")


def _hint_at_exit(conversation: Conversation) -> bool:
    """Whether it was said without Ctrl-C pressed again meanwhile."""
    try:
        conversation.note("\n(press Ctrl-C again or type /exit to exit)\n")
    except KeyboardInterrupt:
        return False
    return True


def parser() -> Parser:
    made = Parser(prog="rayllm chat", description="Chat with a server or a model.")
    made.add_argument(
        "model_folder", metavar="MODEL", nargs="?", help="a checkpoint folder or hub name: start a server for this chat"
    )
    add_server_flags(made)
    made.add_argument("--system", metavar="TEXT", help="system prompt")
    add_param_flags(made)
    add_config_flags(made, EngineConfig, only=("tensor_parallel_size", "dtype", "device", "max_model_len"))
    return made


def run(argv: Sequence[str]) -> int:
    """Talks to the server at --url, or starts one for MODEL and ends it afterwards."""
    given = parser().parse(argv)
    if "model_folder" not in given:
        engine_flags = [name for name in EngineConfig.model_fields if name in given and name != "served_model_name"]
        if engine_flags:
            raise UsageError(f"{engine_flags[0]} needs a MODEL to start: a running server has its own settings")
        with connected(given) as client:
            status = chat(client, given)
            if sys.stdin.isatty():  # it ends as it was asked to: one Ctrl-C more is no failure
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return status
    if "url" in given:
        raise UsageError("give --url of a running server or a MODEL to start, not both")
    with _server_for(given) as url, connected({**given, "url": url}) as client:
        return chat(client, given)


def chat(client: ApiClient, given: dict[str, Any]) -> int:
    """A conversation with the model that the flags name, until the user leaves."""
    from rayllm.cli.prompt import ChatPrompt

    params = params_of(given)
    model = given.get("served_model_name") or client.model()

    def stream(messages: list[dict[str, str]], params: dict[str, Any], timing: Timing) -> Iterator[Piece]:
        return client.stream_chat(messages, {"model": model, **params}, timing)

    prompt = ChatPrompt(COMMANDS)
    conversation = Conversation(
        stream,
        prompt.write,
        prompt.write_aside,
        prompt.note,
        params,
        given.get("system"),
        open_answer=prompt.open_answer,
        open_aside=prompt.open_aside,
        max_model_len=client.max_model_len(model),
    )
    with prompt:
        prompt.greet(f"{model} at {client.url}. /help lists commands, Ctrl-C stops a response, /exit exits.\n")
        ok = converse(conversation, prompt.read_line)
    return 0 if ok or prompt.is_terminal else 1


@contextlib.contextmanager
def _server_for(given: dict[str, Any]) -> Iterator[str]:
    """The URL of a server for `MODEL` on a free port of this machine."""
    from rayllm.cli.serving import background_server, check_before_start

    settings = {name: given[name] for name in EngineConfig.model_fields if name in given}
    engine, server = parse_settings({**settings, "model": given["model_folder"], "port": 0})
    check_before_start(engine, server)
    with background_server("chat", engine, server) as running:
        yield running.url
