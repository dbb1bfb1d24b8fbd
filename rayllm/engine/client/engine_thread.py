"""One engine for any number of threads: a thread of its own computes and waits, callers get their own tokens.

The engine belongs to that thread alone: no signal (Ctrl-C in the main thread) interrupts a step, and a caller that
stops listening costs the others nothing. It is also made there: OpenMP keeps a team of computing threads for every
thread that ever computed, and where the teams together have more threads than the machine has cores, all of them sleep
between two products and are several times slower. A model that one thread loads and another runs pays for that.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import queue
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from rayllm.engine.client.protocols import BlockingEngineClient
from rayllm.errors import EngineError
from rayllm.messages import EngineStats, TokenDelta
from rayllm.request import Request

log = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0
_T = TypeVar("_T")
_Engine = TypeVar("_Engine", bound=BlockingEngineClient)
_Arrived = queue.SimpleQueue[TokenDelta | EngineError | None]
"""Deltas, then an error where the engine is lost, or None where the caller closed its call."""


def closed_error() -> EngineError:
    """What whoever uses a closed engine is told."""
    return EngineError("this engine is closed: create a new LLM", code="engine_closed")


def check_not_forked(pid: int) -> None:
    """Raises `EngineError` where this process is a forked child of `pid`, in which the engine was made."""
    if os.getpid() != pid:
        raise EngineError(
            f"this engine was made in process {pid} and cannot be used in its forked child, process {os.getpid()}: "
            "create an LLM in the child itself, and start the child with multiprocessing's 'spawn' method",
            code="engine_forked",
        )


class Wake:
    """Readable once `set`, until `clear`. `set` may be called from any thread, and while objects are destroyed."""

    def __init__(self) -> None:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)

    def fileno(self) -> int:
        return self._receiver.fileno()

    def set(self) -> None:
        with contextlib.suppress(OSError):  # full: it is set already; closed: nobody waits any more
            self._sender.send(b"\0")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._receiver.recv(4096):
                pass

    def close(self) -> None:
        self._sender.close()
        self._receiver.close()


class Call:
    """Requests that a caller submitted together. Every method may be called from any thread; garbage is closed."""

    def __init__(self, engine: EngineThread[Any], streams: range, arrived: _Arrived):
        self._engine = engine
        self.streams = streams
        """The numbers of the choices of all its requests, in order."""
        self._arrived = arrived
        self._is_closed = False

    def receive(self) -> list[TokenDelta]:
        """The next deltas, in order; waits for some. Empty once the call is closed. Raises `EngineError` when the
        engine is lost or closed, or in a forked child."""
        self._engine.check_not_forked()
        if self._is_closed:
            return []
        deltas: list[TokenDelta] = []
        arrived = self._arrived.get()
        while isinstance(arrived, TokenDelta):
            deltas.append(arrived)
            if self._arrived.empty():
                return deltas
            arrived = self._arrived.get()
        self._arrived.put(arrived)  # for the next turn, and for other threads that wait for the same
        if deltas or arrived is None:
            return deltas
        raise EngineError(str(arrived), code=arrived.code) from arrived

    def abort(self, stream: int) -> None:
        """Wants no more of the choice with this number (`TokenDelta.stream`)."""
        self._engine.abort(range(stream, stream + 1))

    def close(self) -> None:
        """Aborts what is unfinished; whoever waits in `receive` returns. Idempotent."""
        if not self._is_closed:
            self._is_closed = True
            self._arrived.put(None)
            self._engine.abort(self.streams)

    def __del__(self) -> None:
        self.close()


class EngineThread(Generic[_Engine]):
    """Makes an engine on a thread of its own and runs it there, from the constructor until `close`, which also closes
    the engine."""

    def __init__(self, make: Callable[[], _Engine]):
        self._make = make
        self._made: Future[_Engine] = Future()
        self._pid = os.getpid()
        self._wake = Wake()
        self._inbox: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()
        self._next_stream = 0
        self._open: dict[int, _Arrived] = {}
        self._closing = False
        self._ended: EngineError | None = None
        self._thread = threading.Thread(target=self._run, name="rayllm-engine", daemon=True)
        self._thread.start()

    def wait_until_made(self) -> _Engine:
        """Waits for the engine, which belongs to its thread alone. Raises what `make` raised."""
        return self._made.result()

    def open(self, requests: Sequence[Request]) -> Call:
        """Submits requests. Raises `EngineError` when the engine is lost or closed, or in a forked child."""
        arrived: _Arrived = queue.SimpleQueue()
        self._check()
        with self._lock:
            first = self._next_stream
            self._next_stream += sum(request.params.n for request in requests)
            self._post(functools.partial(self._submit, first, requests, arrived))
        return Call(self, range(first, self._next_stream), arrived)

    def ask(self, question: Callable[[_Engine], _T]) -> _T:
        """What `question` returns for the engine, on its thread. Raises what it raises, and as `open` does."""
        answer: Future[_T] = Future()
        self._check()
        with self._lock:
            self._post(functools.partial(self._answer, question, answer))
        return answer.result()

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self.ask(lambda engine: engine.stats())

    def abort(self, streams: range) -> None:
        """Wants no more of these choices. Takes no lock: it is also called where objects are destroyed."""
        if os.getpid() == self._pid:
            self._inbox.append(functools.partial(self._abort, streams))
            self._wake.set()

    def close(self) -> None:
        """Has the thread end: every open call fails. Returns at once; `join` waits. Idempotent."""
        if os.getpid() == self._pid:
            self._closing = True
            self._wake.set()

    def join(self) -> None:
        """Waits until the thread has ended, after `close`."""
        if os.getpid() != self._pid or threading.current_thread() is self._thread:
            return
        self._thread.join(_JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            log.warning("the engine's thread did not end within %g s", _JOIN_TIMEOUT_S)

    # ---------------------------------------------------------------------------------------- on the engine's thread

    def _run(self) -> None:
        try:
            engine = self._make()
        except BaseException as failure:
            self._end(failure if isinstance(failure, EngineError) else _failed(failure))
            self._made.set_exception(failure)
            return
        self._made.set_result(engine)
        error = closed_error()
        try:
            while True:
                self._wake.clear()  # before anything is looked at: what comes meanwhile sets it again
                if self._closing:
                    break
                self._take_inbox()
                for delta in engine.receive(self._wake):
                    self._deliver(delta)
        except EngineError as failure:
            error = failure
        except BaseException as failure:
            log.exception("the engine's thread failed")
            error = _failed(failure)
        self._end(closed_error() if self._closing else error)
        with contextlib.suppress(Exception):  # it may be lost already
            engine.close()

    def _end(self, error: EngineError) -> None:
        with self._lock:
            self._ended = error
        for arrived in {id(arrived): arrived for arrived in self._open.values()}.values():
            arrived.put(error)
        self._open.clear()
        self._take_inbox()
        self._wake.close()

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    def _submit(self, first: int, requests: Sequence[Request], arrived: _Arrived) -> None:
        if self._ended is not None:
            arrived.put(self._ended)
            return
        for request in requests:
            self._open.update(dict.fromkeys(range(first, first + request.params.n), arrived))
            self._made.result().submit(first, request)
            first += request.params.n

    def _abort(self, streams: range) -> None:
        for stream in streams:
            if self._open.pop(stream, None) is not None:
                self._made.result().abort(stream)

    def _answer(self, question: Callable[[_Engine], _T], answer: Future[_T]) -> None:
        try:
            if self._ended is not None:
                raise self._ended
            answer.set_result(question(self._made.result()))
        except BaseException as error:
            answer.set_exception(error)

    def _deliver(self, delta: TokenDelta) -> None:
        arrived = self._open.get(delta.stream)
        if arrived is None:
            return  # aborted: this was on its way
        if delta.finish is not None:
            del self._open[delta.stream]
        arrived.put(delta)

    # -------------------------------------------------------------------------------------------- on callers' threads

    def check_not_forked(self) -> None:
        """Raises `EngineError` in a forked child."""
        check_not_forked(self._pid)

    def _check(self) -> None:
        self.check_not_forked()
        if self._closing:
            raise closed_error()

    def _post(self, command: Callable[[], None]) -> None:
        """With the lock held: a command that is posted before the end is carried out, or answered with the error."""
        if self._ended is not None:
            raise EngineError(str(self._ended), code=self._ended.code)
        self._inbox.append(command)
        self._wake.set()


def _failed(failure: BaseException) -> EngineError:
    return EngineError(f"the engine's thread failed: {type(failure).__name__}: {failure}")
