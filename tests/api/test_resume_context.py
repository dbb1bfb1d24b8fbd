"""What is kept of an answer that outlives its ingress, and how it is made again."""

from __future__ import annotations

import contextlib

import pytest
from api.fake_engine import FakeEngine, FakeStream
from fakes import make_request
from msgspec.structs import replace

from rayllm.api.resume_context import MAX_BODY_BYTES, ResumeContext, adopted, current, kept_name, opened_with

BODY = {"model": "tiny", "prompt": "Zürich", "stream": True}


def test_an_answer_is_made_again_from_the_same_body_at_the_same_time() -> None:
    retention = ResumeContext("/v1/completions", BODY, in_background=True, created_s=1234).keep("cmpl-1")
    assert retention is not None
    assert retention.answer_id == kept_name("/v1/completions", "cmpl-1") == "/v1/completions:cmpl-1"
    assert retention.in_background
    request = replace(make_request([1, 2]), retention=retention)
    stream = FakeStream(FakeEngine(lambda request, choice: []), request)

    again = adopted("/v1/completions", "cmpl-1", stream)

    assert again == ResumeContext("/v1/completions", BODY, True, 1234, "cmpl-1", stream)


@pytest.mark.parametrize(("num_more", "is_kept"), [(0, True), (1, False)])
def test_a_body_that_is_too_large_is_not_kept(num_more: int, is_kept: bool) -> None:
    text = "x" * (MAX_BODY_BYTES - len('{"prompt":""}') + num_more)
    assert (ResumeContext("/v1/completions", {"prompt": text}).keep("cmpl-1") is not None) == is_kept


def test_answers_are_opened_with_it_inside_the_block_alone() -> None:
    outer, inner = ResumeContext("/a", {}), ResumeContext("/b", {})
    assert current() is None
    with opened_with(outer):
        with contextlib.suppress(KeyError), opened_with(inner):
            assert current() is inner
            raise KeyError
        assert current() is outer
        with opened_with(None):
            assert current() is None
    assert current() is None
