from __future__ import annotations

import pytest
from scheduler.simulated_worker import make_sequence

from rayllm.engine.delta_history import DeltaHistory
from rayllm.engine.driver.open_requests import OpenRequest, OpenRequests
from rayllm.engine.driver.retained_requests import RetainedRequest
from rayllm.messages import Deltas, DriverMessage, Finish, Times, TokenDelta
from rayllm.request import pack_ids


class _Open:
    """Open requests, and what clients were sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[object, DriverMessage]] = []
        self.requests = OpenRequests(lambda client, message: self.sent.append((client, message)))

    def add(self, client: str, first_stream: int, num_choices: int = 1, **fields: object) -> OpenRequest:
        sequences = {choice: make_sequence([1, 2]) for choice in range(num_choices)}
        settings = {"deadline_s": None, "arrived_at": 1.0, "log_id": "x"} | fields
        name = f"{client}/{first_stream}"
        request = OpenRequest(name, client, first_stream, sequences, **settings)  # type: ignore[arg-type]
        self.requests.add(request)
        self.requests.check()
        return request

    def close(self, request: OpenRequest, choice: int, now: float = 9.0) -> None:
        self.requests.close_choice(request, choice, now)
        self.requests.check()


def _delta(stream: int, token: int, choice: int = 0) -> TokenDelta:
    return TokenDelta(stream, choice, pack_ids([token]))


def test_a_choice_is_found_by_its_clients_number_until_it_is_closed() -> None:
    open_ = _Open()
    mine, others = open_.add("a", 3, num_choices=2), open_.add("b", 3)
    assert open_.requests.find("a", 4) == (mine, 1)
    assert open_.requests.find("b", 3) == (others, 0)
    assert open_.requests.find("b", 4) is None
    open_.close(mine, 1)
    assert open_.requests.find("a", 4) is None
    assert open_.requests.get("a/3") is mine, "its other choice goes on"
    open_.close(mine, 0)
    assert open_.requests.get("a/3") is None
    assert list(open_.requests) == open_.requests.of_client("b") == [others]


def test_a_moved_request_is_known_by_its_new_clients_numbers() -> None:
    open_ = _Open()
    request = open_.add("a", 0, num_choices=3)
    open_.close(request, 1)
    open_.requests.move(request, "b", 70)
    open_.requests.check()
    assert [open_.requests.find("b", 70 + choice) for choice in range(3)] == [(request, 0), None, (request, 2)]
    assert open_.requests.find("a", 0) is None
    assert (open_.requests.of_client("a"), open_.requests.of_client("b")) == ([], [request])


def test_one_message_a_client_carries_all_it_is_told() -> None:
    open_ = _Open()
    first, second, others = open_.add("a", 0), open_.add("a", 1), open_.add("b", 0)
    for number, request in enumerate([first, others, second, first]):
        open_.requests.send(request, 0, _delta(request.stream(0), number))
    assert open_.sent == []
    open_.requests.flush()
    assert open_.sent == [("a", Deltas([_delta(0, 0), _delta(1, 2), _delta(0, 3)])), ("b", Deltas([_delta(0, 1)]))]
    open_.requests.flush()
    assert len(open_.sent) == 2, "sent once"


def test_what_is_kept_of_a_request_has_all_it_was_told_and_knows_when_it_was_over() -> None:
    open_ = _Open()
    retained = RetainedRequest(make_sequence([1]).request, DeltaHistory(), "a/5")
    request = open_.add("a", 5, num_choices=2, retained=retained)
    open_.requests.send(request, 1, _delta(6, 8, choice=1))
    open_.requests.send(request, 1, TokenDelta(6, 1, b"", Finish("length")))
    assert retained.history.deltas() == [_delta(1, 8, choice=1), TokenDelta(1, 1, b"", Finish("length"))]
    open_.close(request, 1, now=20.0)
    assert retained.detached_since is None
    open_.close(request, 0, now=30.0)
    assert retained.detached_since == 30.0


def test_requests_with_a_deadline_are_known_until_they_are_over() -> None:
    open_ = _Open()
    open_.add("a", 0)
    request = open_.add("a", 1, deadline_s=5.0)
    assert open_.requests.with_deadline() == [request]
    open_.close(request, 0)
    assert open_.requests.with_deadline() == []


def test_a_choices_times_are_said_once() -> None:
    request = _Open().add("a", 0, arrived_at=10.0)
    assert request.take_times(0, 11.0) is None, "it has not started"
    request.note_started(0, 12.0)
    assert request.take_times(0, 15.0) == Times(queued_s=2.0, prefill_s=3.0)
    assert request.take_times(0, 16.0) is None


def test_a_request_is_queued_until_something_of_it_was_computed() -> None:
    request = _Open().add("a", 0, num_choices=2)
    assert request.is_queued
    request.sequences[1].row = 0
    assert not request.is_queued
    request.sequences[1].row = None
    request.sequences[1].tokens.append(7)
    assert not request.is_queued, "it was preempted"


def test_check_sees_a_stream_of_no_request() -> None:
    open_ = _Open()
    request = open_.add("a", 0)
    request.unfinished.clear()
    with pytest.raises(AssertionError, match="streams and unfinished choices differ"):
        open_.requests.check()
