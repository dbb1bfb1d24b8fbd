"""What a conversation reads and shows, in a pipe and on a terminal."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from cli.on_terminal import OnTerminal

from rayllm.cli.prompt import ChatPrompt

_ON_TERMINAL = """
import sys
from pathlib import Path
from rayllm.cli.prompt import ChatPrompt

with ChatPrompt(["/help", "/reset [X]", "no command"], Path(sys.argv[1])) as prompt:
    print("terminal:", prompt.is_terminal, flush=True)
    prompt.greet("hello\\n")
    print("read", repr(prompt.read_line(False)), flush=True)
    print("read", repr(prompt.read_line(True)), flush=True)
    prompt.write_aside("aside")
"""


def test_in_a_pipe_answers_alone_are_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    with ChatPrompt(["/help"], tmp_path / "history") as prompt:
        assert not prompt.is_terminal
        assert [prompt.read_line(False), prompt.read_line(True)] == ["one", "two"]
        with pytest.raises(EOFError):
            prompt.read_line(False)
        prompt.greet("never shown")
        prompt.write("answer")
        prompt.write_aside("never shown")
        prompt.note("said about it")
        answer = prompt.open_answer()
        answer.write(" **as it is**")
        answer.end()
    shown = capsys.readouterr()
    assert shown.out == "answer **as it is**"
    assert shown.err == "said about it"
    assert not (tmp_path / "history").exists()


def test_a_terminal_has_prompts_a_history_and_commands_to_complete(tmp_path: Path) -> None:
    history = tmp_path / "folder" / "history"
    with OnTerminal(["-c", _ON_TERMINAL, str(history)]) as terminal:
        terminal.read_until("> ")
        terminal.send("/res\t\n")
        terminal.read_until("read '/reset'")
        terminal.read_until("… ")
        terminal.send("more\n")
        terminal.read_until("read 'more'")
        terminal.read_all()
    assert "terminal: True\nhello" in terminal.plain()
    assert "\x1b[2maside\x1b[0m" in terminal.seen
    assert history.read_text().splitlines()[-2:] == ["/reset", "more"]
    assert history.stat().st_mode & 0o777 == 0o600
