from __future__ import annotations

import msgspec
from scheduler.simulated_worker import make_sequence

from rayllm.scheduler.quarantine import Quarantine
from rayllm.scheduler.sequence import Sequence


def _sequence(request_id: str) -> Sequence:
    sequence = make_sequence([1])
    sequence.request = msgspec.structs.replace(sequence.request, request_id=request_id)
    return sequence


def test_two_requests_in_quarantine_do_not_run_together() -> None:
    quarantine, a, b, other = Quarantine(["a", "b"]), _sequence("a"), _sequence("b"), _sequence("c")
    assert quarantine.holds_back(a, [b])
    assert not quarantine.holds_back(a, [other])
    assert not quarantine.holds_back(other, [a, b]), "all others may run beside them"


def test_choices_of_one_request_run_together() -> None:
    assert not Quarantine(["a", "b"]).holds_back(_sequence("a"), [_sequence("a")])


def test_a_released_request_runs_beside_the_others() -> None:
    quarantine, a, b = Quarantine(["a", "b"]), _sequence("a"), _sequence("b")
    quarantine.release("b")
    quarantine.release("unknown")
    assert ("a" in quarantine, "b" in quarantine) == (True, False)
    assert not quarantine.holds_back(a, [b])
    assert not quarantine.holds_back(b, [a])
