"""The terminal as a conversation sees it: edited lines with a history on a terminal, plain lines in a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING

from rayllm.cli.interrupts import PromptInterrupts
from rayllm.cli.markdown import MarkdownWriter, PlainWriter, WrappedWriter
from rayllm.cli.terminal import is_terminal

if TYPE_CHECKING:
    from rayllm.cli.chat import AnswerWriter

_HISTORY_LINES = 1000


class ChatPrompt:
    """Reads lines and shows text. In a pipe, answers alone go to stdout; all that is said about them to stderr."""

    def __init__(self, commands: Iterable[str], history: Path | None = None):
        self.is_terminal = sys.stdin.isatty() and is_terminal(sys.stdout)
        self._commands = sorted(command.split()[0] for command in commands if command.startswith("/"))
        self._history = history or Path.home() / ".cache" / "rayllm" / "chat_history"
        self._readline = _load_readline() if self.is_terminal else None
        self._interrupts = PromptInterrupts() if self._readline is not None else contextlib.nullcontext()

    def __enter__(self) -> ChatPrompt:
        if self._readline is not None:
            with contextlib.suppress(OSError):
                self._readline.read_history_file(self._history)
            self._readline.set_completer(self._complete)
            self._readline.set_completer_delims(" ")
            self._readline.parse_and_bind("tab: complete")
        self._interrupts.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._interrupts.__exit__(kind, error, trace)
        if self._readline is not None:
            with contextlib.suppress(OSError):
                self._history.parent.mkdir(parents=True, exist_ok=True)
                self._history.touch(mode=0o600)
                os.chmod(self._history, 0o600)
                self._readline.set_history_length(_HISTORY_LINES)
                self._readline.write_history_file(self._history)

    def read_line(self, goes_on: bool) -> str:
        """The next line; `EOFError` at the end of input. `goes_on`: it belongs to the message before."""
        return input(("… " if goes_on else "> ") if self.is_terminal else "")

    def greet(self, text: str) -> None:
        if self.is_terminal:
            print(text, end="", flush=True)

    def write(self, text: str) -> None:
        print(text, end="", flush=True)

    def write_aside(self, text: str) -> None:
        """Dimmed on a terminal; not shown in a pipe, where only answers are wanted."""
        if self.is_terminal:
            print(f"\x1b[2m{text}\x1b[0m", end="", flush=True)

    def open_answer(self) -> AnswerWriter:
        """Shows an answer as it comes: its Markdown on a terminal, in a pipe the text as it is."""
        if not self.is_terminal:
            return PlainWriter(self.write)
        from rich.console import Console

        return MarkdownWriter(Console(file=sys.stdout, highlight=False))

    def open_aside(self) -> AnswerWriter:
        """Shows reasoning as it comes: `write_aside`, broken between words."""
        if not self.is_terminal:
            return PlainWriter(self.write_aside)
        from rich.console import Console

        return WrappedWriter(Console(file=sys.stdout, highlight=False), "dim")

    def note(self, text: str) -> None:
        if self.is_terminal:
            self.write_aside(text)
        else:
            print(text, end="", file=sys.stderr, flush=True)

    def _complete(self, text: str, number: int) -> str | None:
        fitting = [command for command in self._commands if text and command.startswith(text)]
        return fitting[number] if number < len(fitting) else None


def _load_readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:  # a Python without it still reads lines
        return None
    return readline
