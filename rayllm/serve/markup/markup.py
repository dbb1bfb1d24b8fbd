"""Marks up code and formulas beside the event loop: in one child process, one text at a time, remembered."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from rayllm.errors import OverloadedError
from rayllm.machine.processes import end_child

_LOG = logging.getLogger("rayllm.serve")
TIMEOUT_S = 3.0
"""For an answer of the child, which gives up by itself after `child.CPU_LIMIT_S`."""
_START_TIMEOUT_S = 20.0
_MAX_QUEUED = 64
_MAX_KNOWN_BYTES = 8 * 2**20
_CHILD_MODULE = "rayllm.serve.markup.child"


class Markup:
    """`of` answers with JSON. The child is started by the first text; it ends with `close`, or with this process."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, bytes] = OrderedDict()
        self._num_known_bytes = 0
        self._thread = ThreadPoolExecutor(1, "markup")
        self._child: _Child | None = None
        self._num_queued = 0

    async def of(self, request: dict[str, Any]) -> bytes:
        """What the child makes of a request, as JSON; `null` where nothing comes of it within the time.

        Raises `OverloadedError` where too many wait."""
        key = orjson.dumps(request)
        found = self._known.get(key)
        if found is not None:
            self._known.move_to_end(key)
            return found
        if self._num_queued >= _MAX_QUEUED:
            raise OverloadedError(f"{self._num_queued} texts wait to be marked up; come back later", TIMEOUT_S)
        self._num_queued += 1
        try:
            answer = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, key)
        finally:
            self._num_queued -= 1
        if answer is None:
            return b"null"
        self._remember(key, answer)
        return answer

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._child is not None:
            self._child.end()

    def _remember(self, key: bytes, answer: bytes) -> None:
        if key not in self._known:
            self._num_known_bytes += len(key) + len(answer)
        self._known[key] = answer
        while self._num_known_bytes > _MAX_KNOWN_BYTES:
            old_key, old = self._known.popitem(last=False)
            self._num_known_bytes -= len(old_key) + len(old)

    def _ask(self, request: bytes) -> bytes | None:
        """On the thread. None where the child died over it or did not answer: another takes its place."""
        try:
            if self._child is None or not self._child.is_alive:
                self._child = _Child()
            return self._child.ask(request)
        except (OSError, ValueError) as error:  # a TimeoutError is an OSError; `close` makes a ValueError
            _LOG.warning("a text of %d bytes was not marked up: %s", len(request), error or type(error).__name__)
            if self._child is not None:
                self._child.end()
            return None


class _Child:
    def __init__(self) -> None:
        path = os.pathsep.join(filter(None, sys.path))
        self._process = subprocess.Popen(
            [sys.executable, "-m", _CHILD_MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",  # whatever lies in the working folder is no module of ours
            env={**os.environ, "PYTHONPATH": path},
        )
        self.end = weakref.finalize(self, end_child, self._process)
        self._timeout_s = _START_TIMEOUT_S
        """The first answer comes after its imports."""

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: bytes) -> bytes:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(request + b"\n")
        self._process.stdin.flush()
        deadline, found = time.monotonic() + self._timeout_s, b""
        while not found.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"no answer within {self._timeout_s:g} s")
            part = os.read(self._process.stdout.fileno(), 2**16)
            if not part:
                raise BrokenPipeError("the process that marks up ended")
            found += part
        self._timeout_s = TIMEOUT_S
        return found[:-1]
