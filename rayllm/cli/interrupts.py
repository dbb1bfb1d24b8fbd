"""Ctrl-C at a prompt that readline shows."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_NUDGES_S = (0.02, 0.1, 0.5)
"""Seconds after a Ctrl-C at which the main thread is interrupted once more."""


class PromptInterrupts:
    """While it is open, no Ctrl-C is lost. To be opened by the main thread of a program that reads lines by `input`.

    A SIGINT that comes after the interpreter's last look for signals and before readline waits for input is noted, but
    `KeyboardInterrupt` is raised only when something else ends the wait (CPython's `readline_until_enter_or_signal`
    checks for signals only when `select` was interrupted). A thread sees each SIGINT through the wake-up descriptor
    and interrupts the main thread's system call again shortly after, by a signal that does nothing else.
    """

    def __init__(self) -> None:
        self._main = threading.main_thread().ident
        self._before: Any = None
        self._wakeup_before = -1

    def __enter__(self) -> PromptInterrupts:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._before = signal.signal(signal.SIGURG, _do_nothing)
        self._wakeup_before = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="ctrl-c", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._write_fd)
        self._thread.join()
        os.close(self._read_fd)
        signal.signal(signal.SIGURG, self._before)

    def _watch(self) -> None:
        while numbers := os.read(self._read_fd, 4096):  # a byte for each signal
            if signal.SIGINT not in numbers:
                continue
            began_s = time.monotonic()
            for after_s in _NUDGES_S:
                time.sleep(max(0.0, began_s + after_s - time.monotonic()))
                signal.pthread_kill(self._main or 0, signal.SIGURG)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass
