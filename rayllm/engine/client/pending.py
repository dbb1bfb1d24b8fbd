"""Results of work on an event loop of its own thread, for programs with or without asyncio: `await` them or call
`result`, as with the responses of Ray Serve's handles."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class LoopThread:
    """An event loop that runs in a daemon thread until `stop`."""

    def __init__(self, name: str):
        self.loop = asyncio.new_event_loop()
        self._stopped: asyncio.Future[None] = self.loop.create_future()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts `work` there; safe in any thread. Cancelling the future cancels the work."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def stop(self) -> None:
        """Ends the loop, and what is open on it is cancelled. Idempotent; safe in any thread."""
        with contextlib.suppress(RuntimeError):  # it is closed
            self.loop.call_soon_threadsafe(self._note_stop)

    def join(self, timeout_s: float | None = None) -> None:
        """Waits until it has ended; `stop` comes before."""
        self._thread.join(timeout_s)

    def _note_stop(self) -> None:
        if not self._stopped.done():
            self._stopped.set_result(None)

    def _run(self) -> None:
        try:
            self.loop.run_until_complete(self._stopped)
        finally:
            self.loop.run_until_complete(_cancel_all())
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.close()


async def _cancel_all() -> None:
    open_tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in open_tasks:
        task.cancel()
    await asyncio.gather(*open_tasks, return_exceptions=True)


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Runs blocking `work` in a daemon thread, which does not keep the program from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def loop_is_running() -> bool:
    """Whether the calling thread runs an event loop, which must not be blocked."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Pending(Generic[T]):
    """One result to come: `await` it, or call `result` where no event loop runs."""

    def __init__(self, future: Future[T]):
        self._future = future

    def __await__(self) -> Generator[Any, None, T]:
        return asyncio.wrap_future(self._future).__await__()

    def result(self, timeout_s: float | None = None) -> T:
        """The result, or what went wrong. `TimeoutError` after `timeout_s` seconds: it may be asked again."""
        _refuse_in_loop()
        return _wait(self._future, timeout_s)


class PendingOutputs(Generic[T]):
    """Outputs to come, of a request that was sent already. `for` or `async for` takes them one by one; `await` and
    `result` give the last, which is the whole answer where outputs grow (`grows`).

    Where outputs grow, a slow reader gets the latest. When nobody holds it any more, the request ends.
    """

    def __init__(self, thread: LoopThread, outputs: AsyncIterator[T], *, grows: bool):
        self._box: _Box[T] = _Box(grows)
        self._work = thread.submit(_fill(self._box, outputs))

    def __aiter__(self) -> PendingOutputs[T]:
        return self

    async def __anext__(self) -> T:
        while (waiting := self._box.change()) is not None:
            await asyncio.wrap_future(waiting)
        if self._box.outputs:
            return self._box.take()
        self._box.raise_error()
        raise StopAsyncIteration

    def __iter__(self) -> PendingOutputs[T]:
        _refuse_in_loop()
        return self

    def __next__(self) -> T:
        while (waiting := self._box.change()) is not None:
            waiting.result()
        if self._box.outputs:
            return self._box.take()
        self._box.raise_error()
        raise StopIteration

    def __await__(self) -> Generator[Any, None, T]:
        return self._last().__await__()

    async def _last(self) -> T:
        return await asyncio.shield(asyncio.wrap_future(self._box.last))

    def result(self, timeout_s: float | None = None) -> T:
        """The last output, or what went wrong. `TimeoutError` after `timeout_s` seconds: the request goes on."""
        _refuse_in_loop()
        return _wait(self._box.last, timeout_s)

    def cancel(self) -> None:
        """Ends the request; what came stays. Idempotent."""
        self._work.cancel()

    async def aclose(self) -> None:
        """`cancel`, as asynchronous generators have it."""
        self.cancel()

    def __del__(self) -> None:
        work = getattr(self, "_work", None)
        if work is not None and not work.done():
            work.cancel()


class _Box(Generic[T]):
    """What passes from the loop's thread to whoever reads."""

    def __init__(self, grows: bool):
        self.outputs: deque[T] = deque(maxlen=1 if grows else None)
        self.last: Future[T] = Future()
        self._error: BaseException | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._waiting: list[Future[None]] = []

    def change(self) -> Future[None] | None:
        """What is done when there is something new; None where there is something to take, or nothing will come."""
        with self._lock:
            if self.outputs or self._ended:
                return None
            waiting: Future[None] = Future()
            self._waiting.append(waiting)
            return waiting

    def take(self) -> T:
        return self.outputs.popleft()

    def raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def put(self, output: T) -> None:
        with self._lock:
            self.outputs.append(output)
        self._wake()

    def end(self, last: T | None, error: BaseException | None) -> None:
        with self._lock:
            self._ended, self._error = True, error
        if error is not None or last is None:
            self.last.set_exception(error or RuntimeError("the request ended without an output"))
        else:
            self.last.set_result(last)
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_result(None)


async def _fill(box: _Box[T], outputs: AsyncIterator[T]) -> None:
    last: T | None = None
    try:
        async for output in outputs:
            last = output
            box.put(output)
    except asyncio.CancelledError:
        box.end(None, RuntimeError("the request was cancelled"))
        raise
    except Exception as error:
        box.end(None, error)
    else:
        box.end(last, None)
    finally:
        await outputs.aclose()  # type: ignore[attr-defined]  # an asynchronous generator


def _wait(future: Future[T], timeout_s: float | None) -> T:
    try:
        return future.result(timeout_s)
    except FutureTimeoutError:
        if future.done():  # the result itself is such an error
            raise
        raise TimeoutError(f"no result within {timeout_s:g} s") from None


def _refuse_in_loop() -> None:
    if loop_is_running():
        raise RuntimeError("this would block the event loop that runs in this thread: use 'await' or 'async for'")
