"""A result may bring a row several tokens, as speculation does: the sequence takes them up to the one that ends it."""

from __future__ import annotations

from scheduler.simulated_worker import make_request, make_scheduler, say

from rayllm.messages import Finish, StepResult
from rayllm.request import pack_ids
from rayllm.scheduler.sequence import SequenceUpdate


def _commit(token_ids: list[int], *, ends: Finish | None = None, **params: object) -> SequenceUpdate:
    scheduler = make_scheduler()
    [_] = scheduler.add(make_request("r", [5, 6, 7], **params))
    plan = scheduler.plan()
    assert plan is not None
    row = plan.new_rows[0].row
    result = StepResult(
        plan.step, plan.epoch, pack_ids([row]), pack_ids(token_ids),
        {row: [say(position, token) for position, token in enumerate(token_ids)]}, {}, 0.0,
        ends={} if ends is None else {row: ends}, counts=pack_ids([len(token_ids)]),
    )  # fmt: skip
    [update] = scheduler.commit(result)
    assert list(update.sequence.tokens[3:]) == update.token_ids
    assert len(update.logprobs or ()) == len(update.token_ids)
    assert update.sequence.num_pending == 0
    return update


def test_all_tokens_are_taken_where_none_ends_the_sequence() -> None:
    update = _commit([8, 9, 10])
    assert (update.token_ids, update.finish) == ([8, 9, 10], None)


def test_tokens_after_a_stop_token_are_dropped() -> None:
    update = _commit([8, 9, 10, 11], stop_token_ids=[9])
    assert (update.token_ids, update.finish) == ([8, 9], Finish("stop", 9))


def test_tokens_past_the_length_are_dropped() -> None:
    update = _commit([8, 9, 10, 11], max_tokens=3)
    assert (update.token_ids, update.finish) == ([8, 9, 10], Finish("length"))


def test_an_end_that_the_worker_reports_comes_with_the_last_token() -> None:
    complete = Finish("stop", is_complete=True)
    update = _commit([8, 9], ends=complete)
    assert (update.token_ids, update.finish) == ([8, 9], complete)
