"""The process that marks up: lexers and parsers of others, on texts of anybody, with little time and memory.

It reads a JSON object a line, `{"language", "code"}` or `{"latex", "display"}`, and answers each with a line: tokens,
a tree, or null where nothing came of it.
"""

from __future__ import annotations

import contextlib
import resource
import signal
import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any, BinaryIO

import orjson

CPU_LIMIT_S = 0.5
_MAX_MEMORY_BYTES = 256 * 2**20
"""Beyond what it holds when it is ready."""


class _TooSlowError(BaseException):
    """Not an `Exception`: what is interrupted may catch those."""


def main(requests: Iterable[bytes], answers: BinaryIO) -> None:
    """Answers what comes until nothing more does."""
    import rayllm.serve.markup.code
    import rayllm.serve.markup.formulas  # noqa: F401

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the server
    signal.signal(signal.SIGPROF, _interrupt)
    _limit_memory()
    for line in requests:
        answers.write(orjson.dumps(_marked_up(orjson.loads(line))) + b"\n")
        answers.flush()


def _marked_up(request: dict[str, Any]) -> Any:
    from rayllm.serve.markup.code import tokens_of
    from rayllm.serve.markup.formulas import tree_of

    try:
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S, CPU_LIMIT_S)
        if "code" in request:
            return tokens_of(request["language"], request["code"])
        return tree_of(request["latex"], is_display=request["display"])
    except (_TooSlowError, RecursionError, MemoryError):
        return None
    except Exception:  # a lexer that fails on this text
        return None
    finally:
        with contextlib.suppress(_TooSlowError):
            signal.setitimer(signal.ITIMER_PROF, 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _TooSlowError


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm", encoding="ascii") as sizes:
            held = int(sizes.read().split()[0]) * resource.getpagesize()
    except OSError:  # no Linux
        return
    resource.setrlimit(resource.RLIMIT_AS, (held + _MAX_MEMORY_BYTES, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
