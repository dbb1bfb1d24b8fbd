from __future__ import annotations

import signal

from cli.on_terminal import OnTerminal

from rayllm.cli.interrupts import PromptInterrupts

_INTERRUPTED_UNSEEN = """
import ctypes, readline
from rayllm.cli.interrupts import PromptInterrupts

# readline's own hook, called just before it waits: no Python code runs between it and the wait
hook = ctypes.c_void_p.in_dll(ctypes.CDLL(readline.__file__), "rl_pre_input_hook")
with PromptInterrupts():
    for attempt in range(3):
        hook.value = ctypes.cast(ctypes.pythonapi.PyErr_SetInterrupt, ctypes.c_void_p).value
        try:
            input("> ")
        except KeyboardInterrupt:
            print("interrupted", attempt, flush=True)
"""


def test_a_ctrl_c_that_comes_just_before_readline_waits_is_not_lost() -> None:
    with OnTerminal(["-c", _INTERRUPTED_UNSEEN]) as terminal:
        terminal.read_until("interrupted 2")
        terminal.read_all()
    assert terminal.process.returncode == 0


def test_what_was_there_before_is_put_back() -> None:
    handler, wakeup = signal.getsignal(signal.SIGURG), signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    with PromptInterrupts():
        assert signal.getsignal(signal.SIGURG) is not handler
    assert signal.getsignal(signal.SIGURG) is handler
    assert signal.set_wakeup_fd(wakeup) == wakeup
