"""The journal for one thread that blocks: what `journaled_client.JournaledClient` is for an asyncio
program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from rayllm.engine.client.journal import Journal, is_fault
from rayllm.engine.client.protocols import BlockingEngineClient
from rayllm.errors import EngineError
from rayllm.executor.executor import Selectable
from rayllm.messages import EngineStats, Finish, TokenDelta
from rayllm.request import Request


@dataclass(slots=True)
class _Line:
    """A request and the number of its first stream."""

    first_stream: int
    journal: Journal


class BlockingJournaledClient:
    """A `BlockingEngineClient` over as many drivers as it takes.

    `next_driver(reason)` returns a connection to the driver that follows the one lost for `reason`; it raises
    `EngineError` where there will be none, and so does then whichever method met the loss.
    """

    def __init__(self, driver: BlockingEngineClient, next_driver: Callable[[str], BlockingEngineClient]):
        self._driver = driver
        self._next_driver = next_driver
        self._lines: dict[int, _Line] = {}  # by stream, as long as its choice is open
        self._refusals: list[TokenDelta] = []

    def submit(self, stream: int, request: Request) -> None:
        line = _Line(stream, Journal(request))
        for choice in range(request.params.n):
            self._lines[stream + choice] = line
        with contextlib.suppress(EngineError):  # lost: `receive` meets it too, and submits again
            self._driver.submit(stream, request)

    def abort(self, stream: int) -> None:
        """Wants no more of the choice with this number."""
        line = self._lines.pop(stream, None)
        if line is not None:
            line.journal.choices[stream - line.first_stream].wanted = False
            with contextlib.suppress(EngineError):
                self._driver.abort(stream)

    def receive(self, wake: Selectable | None = None) -> list[TokenDelta]:
        """The next deltas; waits for some, or until `wake` is readable."""
        while True:
            if self._refusals:
                refusals, self._refusals = self._refusals, []
                return refusals
            try:
                deltas = self._driver.receive(wake)
            except EngineError as error:
                self._continue(error)
                continue
            fault = next((delta.finish for delta in deltas if is_fault(delta.finish)), None)
            news = [delta for delta in deltas if self._append(delta)]
            if fault is not None:
                self._continue(EngineError(fault.message or "the engine failed", code=fault.code or "engine_error"))
            if news or (wake is not None and not deltas):
                return news

    def stats(self) -> EngineStats:
        try:
            return self._driver.stats()
        except EngineError as error:
            self._continue(error)
            return self._driver.stats()

    def reset_prefix_cache(self) -> None:
        try:
            self._driver.reset_prefix_cache()
        except EngineError as error:  # the next driver begins with an empty one
            self._continue(error)

    def close(self) -> None:
        self._lines.clear()
        self._driver.close()

    def _append(self, delta: TokenDelta) -> bool:
        """Writes it down; whether it is to be passed on."""
        line = self._lines.get(delta.stream)
        if line is None or is_fault(delta.finish):
            return False
        news = line.journal.append([delta])
        if delta.finish is not None:
            del self._lines[delta.stream]
        return bool(news)

    def _continue(self, error: EngineError) -> None:
        """Submits all that is open to the next driver."""
        self._driver.close()
        self._driver = self._next_driver(str(error))
        for line in {id(line): line for line in self._lines.values()}.values():
            try:
                line.journal.note_fault(error)
            except EngineError as poison:
                self._refuse(line, Finish("error", code=poison.code, message=str(poison)))
                continue
            with contextlib.suppress(EngineError):  # this one is lost as well: `receive` meets it too
                self._driver.submit(line.first_stream, line.journal.continuation())
                for number, choice in enumerate(line.journal.choices):
                    if not choice.open:
                        self._driver.abort(line.first_stream + number)

    def _refuse(self, line: _Line, finish: Finish) -> None:
        for number, choice in enumerate(line.journal.choices):
            if choice.open:
                choice.finish = finish
                del self._lines[line.first_stream + number]
                self._refusals.append(TokenDelta(line.first_stream + number, number, b"", finish))
