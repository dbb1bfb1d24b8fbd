"""Requests that outlive their client: the retained_requests by itself, and in the step loop."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import msgspec
import pytest
from fakes import FakeExecutor, expected_tokens, fake_config, make_request
from hypothesis import given
from hypothesis import strategies as st

from rayllm.engine import delta_history
from rayllm.engine.delta_history import DeltaHistory
from rayllm.engine.driver.loop import EngineLoop
from rayllm.engine.driver.retained_requests import HOLD_S, RetainedRequest, RetainedRequests
from rayllm.engine.owner.local import build_scheduler
from rayllm.messages import (
    ADOPTED_BY_ANOTHER,
    READER_PAUSED,
    Abort,
    Adopt,
    Adopted,
    Deltas,
    Finish,
    Forget,
    Submit,
    TokenDelta,
    TokenLogprobs,
    single_tokens,
)
from rayllm.request import Request, Retention, pack_ids, unpack_ids


def _by_name(prompt: list[int], answer_id: str = "a", **fields: Any) -> Request:
    request = make_request(prompt, **fields)
    return msgspec.structs.replace(request, client_key="me", retention=Retention(answer_id, b"how"))


class _Engine:
    """A loop over a fake executor, its clock, and what each client was sent."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sent: dict[Hashable, list[Any]] = {}
        executor = FakeExecutor()
        scheduler = build_scheduler(fake_config(), executor.num_blocks)
        self.loop = EngineLoop(fake_config(), scheduler, executor, self._send, clock=lambda: self.now)

    def _send(self, client: Hashable, message: Any) -> None:
        self.sent.setdefault(client, []).append(message)

    def run(self) -> None:
        while self.loop.step():
            pass

    def deltas(self, client: str) -> list[TokenDelta]:
        messages = self.sent.get(client, [])
        return [delta for message in messages if isinstance(message, Deltas) for delta in message.deltas]

    def tokens(self, client: str, stream: int) -> list[int]:
        return [t for delta in self.deltas(client) if delta.stream == stream for t in unpack_ids(delta.token_ids)]

    def adopted(self, client: str) -> Request | None:
        [answer] = [message for message in self.sent[client] if isinstance(message, Adopted)]
        return answer.request


# ------------------------------------------------------------------------------------------------------ in the loop


@pytest.mark.parametrize("num_steps", [0, 1, 3, 8, 30])
def test_a_kept_request_goes_on_without_its_client_and_another_gets_all_of_it(num_steps: int) -> None:
    engine = _Engine()
    request = _by_name([5, 6, 7], max_tokens=12, n=2)
    engine.loop.submit("first", Submit(7, request))
    for _ in range(num_steps):
        engine.loop.step()
    engine.loop.client_gone("first")
    for _ in range(2):
        engine.loop.step()
    engine.loop.submit("second", Adopt(100, "me", "a"))
    engine.run()
    for choice in range(2):
        assert engine.tokens("second", 100 + choice) == expected_tokens(request, choice)
    adopted = engine.adopted("second")
    assert adopted is not None
    assert (adopted.prompt, adopted.seed, adopted.retention) == (request.prompt, request.seed, request.retention)
    assert [delta.finish for delta in engine.deltas("second") if delta.finish] == [Finish("length")] * 2
    assert not engine.loop._open


def test_who_had_it_is_told_and_gets_no_more() -> None:
    engine = _Engine()
    request = _by_name([5, 6, 7], max_tokens=12)
    engine.loop.submit("first", Submit(0, request))
    for _ in range(6):
        engine.loop.step()
    engine.loop.submit("second", Adopt(0, "me", "a"))
    num_before = len(engine.tokens("first", 0))
    assert 0 < num_before < 12
    engine.loop.submit("first", Abort(0))  # crossed the news on its way
    engine.run()
    [last] = [delta.finish for delta in engine.deltas("first") if delta.finish]
    assert (last.reason, last.code) == ("error", ADOPTED_BY_ANOTHER)
    assert len(engine.tokens("first", 0)) == num_before
    assert engine.tokens("second", 0) == expected_tokens(request)


def test_a_client_that_is_served_keeps_its_request_from_one_that_only_looks() -> None:
    engine = _Engine()
    request = _by_name([5, 6, 7], max_tokens=12)
    engine.loop.submit("first", Submit(0, request))
    engine.loop.step()
    engine.loop.submit("looker", Adopt(0, "me", "a", takes_over=False))
    assert engine.adopted("looker") is None
    engine.run()
    assert engine.tokens("first", 0) == expected_tokens(request)
    engine.loop.submit("later", Adopt(0, "me", "a", takes_over=False))
    assert engine.tokens("later", 0) == expected_tokens(request), "it has ended: all may read it"


@pytest.mark.parametrize(("client_key", "answer_id"), [("you", "a"), ("me", "b"), ("", "a")])
def test_nobody_else_can_adopt_it(client_key: str, answer_id: str) -> None:
    engine = _Engine()
    engine.loop.submit("first", Submit(0, _by_name([5, 6, 7])))
    engine.loop.submit("second", Adopt(0, client_key, answer_id))
    assert engine.adopted("second") is None
    engine.run()
    assert engine.tokens("first", 0)


def test_a_request_that_no_client_comes_for_is_ended_and_forgotten() -> None:
    engine = _Engine()
    engine.loop.submit("first", Submit(0, _by_name([5, 6, 7], max_tokens=100)))
    engine.loop.step()
    engine.loop.client_gone("first")
    engine.now = HOLD_S - 1
    engine.loop.step()
    assert engine.loop.stats().num_running == 1
    engine.now = HOLD_S
    engine.loop.step()
    engine.run()
    assert (engine.loop.stats().num_running, engine.loop.stats().num_blocks_used) == (0, 0)
    assert not engine.loop._open
    engine.now += HOLD_S
    engine.loop.step()
    engine.loop.submit("second", Adopt(0, "me", "a"))
    assert engine.adopted("second") is None


def test_what_its_client_ended_stays_ended() -> None:
    engine = _Engine()
    engine.loop.submit("first", Submit(0, _by_name([5, 6, 7], max_tokens=100, n=2)))
    for _ in range(4):
        engine.loop.step()
    engine.loop.submit("first", Abort(1))
    engine.loop.submit("first", Abort(0))
    engine.loop.submit("second", Adopt(0, "me", "a"))
    assert [delta.finish for delta in engine.deltas("second") if delta.finish] == [Finish("abort")] * 2
    engine.loop.submit("first", Forget("me", "a"))
    engine.loop.submit("third", Adopt(0, "me", "a"))
    assert engine.adopted("third") is None


def test_a_paused_request_is_submitted_again_by_who_adopts_it() -> None:
    engine = _Engine()
    engine.loop.submit("first", Submit(0, _by_name([5, 6, 7], max_tokens=100)))
    for _ in range(4):
        engine.loop.step()
    engine.loop.submit("first", Abort(0, pauses=True))
    engine.loop.submit("second", Adopt(0, "me", "a"))
    *tokens, last = engine.deltas("second")
    assert [t for delta in tokens for t in unpack_ids(delta.token_ids)] == engine.tokens("first", 0)
    assert (last.token_ids, last.finish and last.finish.code) == (b"", READER_PAUSED)


def test_a_request_that_nothing_keeps_ends_with_its_client() -> None:
    engine = _Engine()
    engine.loop.submit("first", Submit(0, make_request([5, 6, 7], max_tokens=100)))
    engine.loop.step()
    engine.loop.client_gone("first")
    assert not engine.loop._open


def test_a_request_that_goes_on_alone_ends_when_its_client_submits_it_again() -> None:
    engine = _Engine()
    request = _by_name([5, 6, 7], max_tokens=40)
    engine.loop.submit("first", Submit(0, request))
    for _ in range(4):
        engine.loop.step()
    engine.loop.client_gone("first")
    engine.loop.submit("first again", Submit(0, request))
    stats = engine.loop.stats()
    assert (stats.num_running + stats.num_waiting, len(engine.loop._open)) == (1, 1)
    engine.run()
    assert engine.tokens("first again", 0) == expected_tokens(request)


def test_a_request_that_goes_on_alone_ends_when_it_is_forgotten() -> None:
    engine = _Engine()
    engine.loop.submit("first", Submit(0, _by_name([5, 6, 7], max_tokens=40)))
    engine.loop.step()
    engine.loop.client_gone("first")
    engine.loop.submit("second", Forget("me", "a"))
    assert not engine.loop._open
    assert engine.loop.stats().num_blocks_used == 0


def test_a_request_that_is_served_goes_on_when_it_is_forgotten() -> None:
    engine = _Engine()
    request = _by_name([5, 6, 7], max_tokens=12)
    engine.loop.submit("first", Submit(0, request))
    engine.loop.step()
    engine.loop.submit("first", Forget("me", "a"))
    engine.run()
    assert engine.tokens("first", 0) == expected_tokens(request)


def test_what_a_former_driver_sent_is_part_of_it() -> None:
    engine = _Engine()
    request = _by_name([5, 6, 7], max_tokens=10, n=2)
    answers = [expected_tokens(request, choice) for choice in range(2)]
    sent = [TokenDelta(1, 1, pack_ids(answers[1][:2])), TokenDelta(0, 0, pack_ids(answers[0][:1]))]
    sent.append(TokenDelta(1, 1, pack_ids(answers[1][2:3])))
    assert request.retention is not None
    keep = msgspec.structs.replace(request.retention, history=DeltaHistory(sent).encode())
    emitted = (pack_ids(answers[0][:1]), pack_ids(answers[1][:3]))
    engine.loop.submit("first", Submit(0, msgspec.structs.replace(request, emitted=emitted, retention=keep)))
    engine.run()
    engine.loop.submit("second", Adopt(0, "me", "a"))
    assert [engine.tokens("second", choice) for choice in range(2)] == answers
    assert [delta.stream for delta in engine.deltas("second")][:3] == [1, 0, 1]
    adopted = engine.adopted("second")
    assert adopted is not None
    assert not adopted.emitted


# ------------------------------------------------------------------------------------------------------- by itself


@st.composite
def _deltas(draw: st.DrawFn) -> list[TokenDelta]:
    """What two choices of a request may bring, each with at most one end."""
    with_logprobs = draw(st.booleans())
    ended: set[int] = set()
    deltas = []
    for _ in range(draw(st.integers(0, 12))):
        choice, num_tokens = draw(st.integers(0, 1)), draw(st.integers(0, 3))
        if choice in ended:
            continue
        finish = draw(st.sampled_from([None, None, None, Finish("stop")]))
        if finish is not None:
            ended.add(choice)
        ids = [draw(st.integers(0, 99)) for _ in range(num_tokens)]
        logprobs = [TokenLogprobs(pack_ids([i]), b"\0\0\0\0", 1) for i in ids] if with_logprobs else None
        if ids or finish:
            deltas.append(TokenDelta(choice, choice, pack_ids(ids), finish, logprobs))
    return deltas


@given(_deltas())
def test_token_by_token_a_history_is_what_was_sent(deltas: list[TokenDelta]) -> None:
    history = DeltaHistory.decode(DeltaHistory(deltas).encode())
    assert [one for delta in history.deltas() for one in single_tokens(delta)] == [
        one for delta in deltas for one in single_tokens(delta)
    ]


def test_long_answers_take_little_more_than_their_tokens() -> None:
    history = DeltaHistory()
    for token in range(10_000):
        history.append(0, TokenDelta(0, 0, pack_ids([token])))
    assert len(history.deltas()) == 1
    assert history.num_bytes < 45_000


def test_a_history_that_grows_too_long_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_history, "MAX_HISTORY_BYTES", 230)
    history = DeltaHistory()
    for token in range(100):
        history.append(0, TokenDelta(0, 0, pack_ids([token])))
        assert history.is_too_long == (token > 6)
    assert (history.deltas(), history.num_bytes) == ([], 0)


def test_an_answer_too_long_to_be_sent_again_ends_with_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta_history, "MAX_HISTORY_BYTES", 210)
    engine = _Engine()
    engine.loop.submit("first", Submit(0, _by_name([5, 6, 7], max_tokens=40)))
    for _ in range(4):
        engine.loop.step()
    engine.loop.submit("second", Adopt(0, "me", "a"))
    assert engine.adopted("second") is None
    engine.loop.client_gone("first")
    assert not engine.loop._open


def test_the_oldest_that_nobody_waits_for_is_let_go_first() -> None:
    let_go: list[RetainedRequest] = []
    retained_requests = RetainedRequests(let_go.append, max_bytes=3000)
    prompt = list(range(200))  # 800 bytes
    kept = [retained_requests.add(_by_name(prompt, answer_id), answer_id) for answer_id in "abc"]
    kept[1].detached_since = 0.0
    retained_requests.add(_by_name(prompt, "d"), "d")
    assert [retained_requests.find("me", answer_id) is not None for answer_id in "abcd"] == [True, False, True, True]
    retained_requests.add(_by_name(prompt, "e"), "e")
    assert retained_requests.find("me", "a") is None
    assert not retained_requests.holds(kept[0])
    assert let_go == [kept[1], kept[0]]
