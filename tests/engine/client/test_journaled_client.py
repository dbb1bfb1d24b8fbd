from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from fakes import expected_tokens, make_request
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.engine import delta_history
from rayllm.engine.client.journal import MAX_FAULTS
from rayllm.engine.client.journaled_client import JournaledClient, JournaledStream
from rayllm.errors import EngineError
from rayllm.messages import READER_PAUSED, EngineStats, Finish, TokenDelta, TokenLogprobs
from rayllm.request import Request, Retention, pack_ids, unpack_ids

_GONE = EngineError("the engine's driver is gone", code="engine_gone")


class _Driver:
    """Computes as a driver does: a pure function of the request and of what it emitted. It is lost after
    `num_batches` frames, or never."""

    def __init__(self, num_batches: int | None = None, error: EngineError | Finish = _GONE):
        self.num_batches = num_batches
        self.error = error
        self.requests: list[Request] = []
        self.aborted: list[int] = []

    def submit(self, request: Request, max_held_bytes: int | None = None) -> _Stream:
        self.requests.append(request)
        return _Stream(self, request)

    async def adopt(
        self, client_key: str, answer_id: str, takes_over: bool = True, max_held_bytes: int | None = None
    ) -> None:
        raise AssertionError("not asked")

    def forget(self, client_key: str, answer_id: str) -> None:
        raise AssertionError("not asked")

    async def stats(self) -> EngineStats:
        raise AssertionError("not asked")


class _Stream:
    def __init__(self, driver: _Driver, request: Request):
        self._driver = driver
        self._frames = _frames(request)
        self._aborted: set[int] = set()
        self._num_open = request.params.n

    def __aiter__(self) -> _Stream:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        driver = self._driver
        await asyncio.sleep(0)
        while True:
            if driver.num_batches == 0 and isinstance(driver.error, EngineError):
                driver.num_batches = None if driver.error.code == READER_PAUSED else 0
                raise driver.error
            if driver.num_batches == 0 and isinstance(driver.error, Finish):
                driver.num_batches = None
                return [TokenDelta(choice, choice, b"", driver.error) for choice in range(self._num_open)]
            frame = next(self._frames, None)
            if frame is None:
                raise StopAsyncIteration
            deltas = [delta for delta in frame if delta.choice not in self._aborted]
            if deltas:
                if driver.num_batches is not None:
                    driver.num_batches -= 1
                return deltas

    def abort_choice(self, choice: int) -> None:
        self._aborted.add(choice)
        self._driver.aborted.append(choice)

    def close(self) -> None:
        self._aborted |= set(range(self._num_open))


def _frames(request: Request) -> Iterator[list[TokenDelta]]:
    """One frame a step; choice c ends after `max_tokens - c` tokens by a stop, choice 0 by its length."""
    params = request.params
    outputs = [expected_tokens(request, choice)[: request.max_tokens - choice] for choice in range(params.n)]
    starts = [len(unpack_ids(ids)) for ids in request.emitted] or [0] * params.n
    ended = [c for c in range(params.n) if starts[c] == len(outputs[c])]
    if ended:
        yield [TokenDelta(c, c, b"", Finish("stop")) for c in ended]
    for step in range(request.max_tokens):
        frame = []
        for c, (ids, start) in enumerate(zip(outputs, starts, strict=True)):
            if start + step >= len(ids):
                continue
            token, first = ids[start + step], start + step == 0
            finish = Finish("length" if c == 0 else "stop") if start + step + 1 == len(ids) else None
            frame.append(
                TokenDelta(
                    c,
                    c,
                    pack_ids([token]),
                    finish,
                    None if params.logprobs is None else [TokenLogprobs(pack_ids([token]), b"\0\0\0\0", c)],
                    [TokenLogprobs(b"", b"", 7)] if first and c == 0 and params.prompt_logprobs is not None else None,
                    num_cached_tokens=3 if first else 0,
                )
            )
        if frame:
            yield frame


async def _read(
    engine: JournaledClient, request: Request, drivers: list[_Driver], stops: dict[int, int] | None = None
) -> dict[int, list[TokenDelta]]:
    """All deltas by choice; a new driver is there as soon as one is lost. `stops`: choice to the number of tokens
    after which the reader wants no more of it."""
    seen: dict[int, list[TokenDelta]] = {choice: [] for choice in range(request.params.n)}

    async def supply() -> None:
        for driver in drivers:
            engine.attach(driver)
            while driver.num_batches != 0:
                await asyncio.sleep(0)
            engine.detach("lost")

    supplier = asyncio.create_task(supply())
    stream = engine.submit(request)
    async for deltas in stream:
        for delta in deltas:
            seen[delta.choice].append(delta)
            if len(seen[delta.choice]) == (stops or {}).get(delta.choice):
                stream.abort_choice(delta.choice)
    supplier.cancel()
    await asyncio.gather(supplier, return_exceptions=True)
    return seen


@settings(max_examples=150)
@given(
    cuts=st.lists(st.integers(0, 9), max_size=MAX_FAULTS - 1),
    n=st.integers(1, 3),
    max_tokens=st.integers(3, 7),
    with_logprobs=st.booleans(),
    stops=st.dictionaries(st.integers(0, 2), st.integers(1, 4)),
)
def test_wherever_drivers_are_lost_the_client_sees_the_undisturbed_stream(
    cuts: list[int], n: int, max_tokens: int, with_logprobs: bool, stops: dict[int, int]
) -> None:
    k = 0 if with_logprobs else None
    request = make_request([1, 2, 3], max_tokens=max_tokens, n=n, logprobs=k, prompt_logprobs=k)

    def run(drivers: list[_Driver]) -> dict[int, list[TokenDelta]]:
        async def read() -> dict[int, list[TokenDelta]]:
            return await asyncio.wait_for(_read(JournaledClient(), request, drivers, stops), 10)

        return asyncio.run(read())

    assert run([*map(_Driver, cuts), _Driver()]) == run([_Driver()])


@pytest.mark.parametrize("cut", range(1, 6))
async def test_ended_choices_are_not_asked_for_again(cut: int) -> None:
    request = make_request([1], max_tokens=5, n=3, prompt_logprobs=0)
    first, second = _Driver(cut), _Driver()

    seen = await _read(JournaledClient(), request, [first, second])

    assert [sum(len(d.token_ids) // 4 for d in seen[c]) for c in range(3)] == [5, 4, 3]
    if cut < 5:
        [again] = second.requests
        assert [len(ids) // 4 for ids in again.emitted] == [min(cut, 5 - c) for c in range(3)]
        assert second.aborted == [c for c in range(3) if cut >= 5 - c]
        assert (again.seed, again.prompt, again.max_tokens) == (request.seed, request.prompt, request.max_tokens)
        assert again.params.prompt_logprobs is None
    else:
        assert not second.requests


async def test_a_driver_that_says_it_failed_is_lost_too_but_a_refusal_is_final() -> None:
    request = make_request([1], max_tokens=4)
    failing = _Driver(2, Finish("error", code="worker_died", message="worker rank 1 failed"))
    engine = JournaledClient()
    engine.attach(failing)
    reading = asyncio.create_task(_collect(engine.submit(request)))
    await asyncio.sleep(0.01)
    assert not reading.done()
    engine.detach("closed")
    engine.attach(_Driver())
    assert await reading == expected_tokens(request)

    engine.attach(_Driver(1, Finish("error", code="deadline_exceeded", message="too late")))
    deltas = [delta async for batch in engine.submit(request) for delta in batch]
    assert deltas[-1].finish == Finish("error", code="deadline_exceeded", message="too late")


async def test_a_request_that_ran_at_three_faults_is_refused_alone() -> None:
    poison, other = make_request([1], max_tokens=6), make_request([2], max_tokens=6)
    engine = JournaledClient()
    drivers = [_Driver(1) for _ in range(MAX_FAULTS)]
    with pytest.raises(EngineError, match="failed 3 times") as caught:
        await _read(engine, poison, drivers)
    assert caught.value.code == "poison_request"
    assert await _read(engine, other, [_Driver()])


@pytest.mark.parametrize(
    ("error", "is_refused"), [(_GONE, False), (EngineError("the step loop failed", code="engine_error"), True)]
)
async def test_a_request_that_only_waited_when_drivers_were_lost_is_not_refused(
    error: EngineError, is_refused: bool
) -> None:
    request, engine = make_request([1], max_tokens=6), JournaledClient()
    stream = engine.submit(request)
    reading = asyncio.create_task(_collect(stream))
    for driver in [*(_Driver(0, error) for _ in range(2 * MAX_FAULTS)), _Driver()]:
        engine.attach(driver)
        while not driver.requests and not reading.done():
            await asyncio.sleep(0)
    if is_refused:
        with pytest.raises(EngineError, match="failed 3 times"):
            await reading
    else:
        await reading
        assert list(stream.journal.choices[0].token_ids) == expected_tokens(request)


@pytest.mark.parametrize("max_bytes", [150, 1500])
async def test_a_history_too_long_to_be_sent_again_is_not(monkeypatch: pytest.MonkeyPatch, max_bytes: int) -> None:
    monkeypatch.setattr(delta_history, "MAX_HISTORY_BYTES", max_bytes)
    engine, first, second = JournaledClient(), _Driver(num_batches=2), _Driver()
    engine.attach(first)
    request = msgspec.structs.replace(make_request([1, 2], max_tokens=5), retention=Retention("a", b""))
    stream = engine.submit(request)
    reading = asyncio.create_task(_collect(stream))
    await asyncio.sleep(0.01)
    engine.attach(second)
    await reading
    assert list(stream.journal.choices[0].token_ids) == expected_tokens(request)
    assert first.requests[0].retention is not None
    assert (second.requests[0].retention is None) == (max_bytes == 150)


async def test_a_request_waits_for_a_driver_only_so_long() -> None:
    engine = JournaledClient(driver_wait_s=0.02)
    with pytest.raises(EngineError, match=r"after waiting 0.02 s \(driver_wait_s=0.02\): no driver has started yet"):
        await _collect(engine.submit(make_request([1])))

    patient = JournaledClient(driver_wait_s=60)
    late = msgspec.structs.replace(make_request([1]), deadline_s=time.time() + 0.02)
    with pytest.raises(EngineError) as caught:
        await _collect(patient.submit(late))
    assert caught.value.code == "deadline_exceeded"


async def test_when_no_driver_will_do_any_more_requests_end_at_their_drivers_loss() -> None:
    engine, driver = JournaledClient(), _Driver(1)
    waiting = asyncio.create_task(_collect(engine.submit(make_request([1]))))
    await asyncio.sleep(0)
    engine.end(EngineError("the server stops", code="shutting_down"))
    with pytest.raises(EngineError, match="the server stops"):
        await waiting
    engine.attach(driver)
    with pytest.raises(EngineError, match="the server stops"):
        await _collect(engine.submit(make_request([1])))
    assert len(driver.requests) == 1


async def test_a_request_that_met_no_driver_starts_with_the_first() -> None:
    engine, driver = JournaledClient(), _Driver()
    request = make_request([1])
    reading = asyncio.create_task(_collect(engine.submit(request)))
    await asyncio.sleep(0)
    engine.attach(driver)
    assert await reading == expected_tokens(request)
    assert driver.requests == [request]


async def test_a_paused_reader_goes_on_at_the_same_driver_and_no_fault_is_counted() -> None:
    request, driver = make_request([1], max_tokens=4), _Driver(2, EngineError("slow", code=READER_PAUSED))
    engine = JournaledClient()
    engine.attach(driver)
    stream = engine.submit(request)
    assert await _collect(stream) == expected_tokens(request)
    assert len(driver.requests) == 2
    assert stream.journal.num_faults == 0


async def test_gaps_and_recomputed_tokens_are_told(caplog: pytest.LogCaptureFixture) -> None:
    told: list[tuple[float, int]] = []
    engine = JournaledClient(on_replay=lambda gap_s, num_tokens: told.append((gap_s, num_tokens)))
    request = msgspec.structs.replace(make_request([1, 2, 3], max_tokens=5), log_id="job-7")
    await _read(engine, request, [_Driver(2), _Driver()])
    assert [vars(record)["request_id"] for record in caplog.records] == ["job-7", "job-7"]
    [(gap_s, num_tokens)] = told
    assert gap_s >= 0
    assert num_tokens == 3 + 2


async def test_closing_aborts_and_ends_the_stream() -> None:
    engine, driver = JournaledClient(), _Driver()
    engine.attach(driver)
    stream = engine.submit(make_request([1], n=2))
    await anext(stream)
    stream.close()
    stream.close()
    assert await _collect(stream) == []


async def _collect(stream: JournaledStream) -> list[Any]:
    return [token async for deltas in stream for delta in deltas for token in unpack_ids(delta.token_ids)]
