"""Work of large requests, beside the event loop on which all others are answered.

Whoever reads a request's body says that it is large (`large_request`); what checks and prepares the request calls its
longer steps by `offload`, without passing that on. A thread is enough: steps are Python, which lets the loop in between
its lines, or calls into C that are short for what `api.body` lets through, or that release the interpreter's lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

MAX_LARGE_AT_ONCE = 2
SWITCH_INTERVAL_S = 0.0005
"""How long a thread may keep the interpreter from the event loop (`sys.setswitchinterval`). With Python's 5 ms, ten
streams that are written to beside one busy thread wait 50."""
_P = ParamSpec("_P")
_T = TypeVar("_T")

_ENDED = object()
_open_tasks: set[asyncio.Task[None]] = set()
_is_large: ContextVar[bool] = ContextVar("large_request", default=False)
_threads = ThreadPoolExecutor(MAX_LARGE_AT_ONCE, "large-request")


def is_large() -> bool:
    """Whether the request that is being opened is large."""
    return _is_large.get()


def share_interpreter() -> None:
    """Sets this process up so that its event loop is kept waiting by nothing for long: neither by threads nor by the
    collection of garbage, which from now on leaves out what is there already (libraries, the tokenizer)."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a batch of one text needs no threads of its own
    gc.collect()
    gc.freeze()


@contextlib.contextmanager
def large_request() -> Iterator[None]:
    """The request that is opened inside is large."""
    token = _is_large.set(True)
    try:
        yield
    finally:
        _is_large.reset(token)


async def offload(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """The function's result: from a thread where the request is large, else called at once."""
    if not _is_large.get():
        return function(*args, **kwargs)
    call = functools.partial(contextvars.copy_context().run, function, *args, **kwargs)
    return await asyncio.get_running_loop().run_in_executor(_threads, call)


async def offload_unless(is_short: bool, function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """The same, where also work of a request that is not large may be long."""
    if is_short or _is_large.get():
        return await offload(function, *args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)


def in_turns(steps: Iterator[None]) -> None:
    """Does the first step at once, and each further one in a turn of the event loop of its own."""
    if next(steps, _ENDED) is _ENDED:
        return
    task = asyncio.get_running_loop().create_task(_finish(steps))
    _open_tasks.add(task)  # the loop itself holds tasks weakly
    task.add_done_callback(_open_tasks.discard)


async def _finish(steps: Iterator[None]) -> None:
    await asyncio.sleep(0)
    for _ in steps:
        await asyncio.sleep(0)
