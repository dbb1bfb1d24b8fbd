"""Runs a command on a terminal of its own (a pty), so that a test sees what a person would."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\x1b\][^\x07]*\x07")


class OnTerminal:
    """`python ARGV` on a terminal `columns` wide. Use as a context manager: it is killed at the end."""

    def __init__(self, argv: Sequence[str], *, columns: int = 100, **environment: str):
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**_without_a_size(os.environ), "TERM": "xterm-256color", **environment},
            preexec_fn=_own_terminal,
        )
        os.close(slave)
        self.seen = ""

    def send(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, text: str, timeout_s: float = 30.0) -> str:
        """All that was seen, without colours and cursor moves, once `text` is in it."""
        deadline = time.monotonic() + timeout_s
        while text not in self.plain():
            if not self._read(deadline - time.monotonic()):
                raise AssertionError(f"{text!r} did not come; seen: {self.plain()!r}")
        return self.plain()

    def read_all(self, timeout_s: float = 30.0) -> str:
        """Like `read_until`, to the command's end."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline - time.monotonic()):
            pass
        self.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        return self.plain()

    def plain(self) -> str:
        return _CODES.sub("", self.seen).replace("\r\n", "\n")

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self._master], [], [], max(0.0, timeout_s))[0]:
            return False
        try:
            data = os.read(self._master, 65536)
        except OSError:  # the other side is closed
            return False
        self.seen += data.decode(errors="replace")
        return bool(data)

    def __enter__(self) -> OnTerminal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _without_a_size(environment: Mapping[str, str]) -> dict[str, str]:
    """The pty's own size is the one that counts; pytest's processes are told another."""
    return {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}


def _own_terminal() -> None:
    """In the child: a session whose terminal is the pty, so that Ctrl-C reaches it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
