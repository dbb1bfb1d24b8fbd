"""The times that are reported of one answer."""

from __future__ import annotations

import pytest

from rayllm.api.choice import Choice
from rayllm.api.request_metrics import request_metrics
from rayllm.request import SamplingParams
from rayllm.text.detokenizer import ChoiceText
from rayllm.text.tokenizer import Tokenizer


@pytest.fixture
def choice(tokenizer: Tokenizer) -> Choice:
    """Five tokens: queued for 0.25 s, the first 0.5 s later, the others in 1.5 s."""
    made = Choice(0, 0, ChoiceText(tokenizer, SamplingParams(), [], frozenset()))
    made.token_ids = [5, 6, 7, 8, 9]
    made.queued_s, made.prefill_s, made.first_token_s, made.last_token_s = 0.25, 0.5, 10.0, 11.5
    return made


def test_times_are_milliseconds_of_each_phase(choice: Choice) -> None:
    assert request_metrics([choice]) == {
        "queue_time_ms": 250,
        "time_to_first_token_ms": 500,
        "generation_time_ms": 1500,
        "mean_itl_ms": 375,
        "tokens_per_second": 2.5,
    }


def test_one_token_has_no_time_between_tokens(choice: Choice) -> None:
    choice.token_ids, choice.last_token_s = [5], 10.0
    found = request_metrics([choice])
    assert found is not None
    assert "mean_itl_ms" not in found
    assert (found["generation_time_ms"], found["tokens_per_second"]) == (0, 2)


def test_no_time_at_all_has_no_speed(choice: Choice) -> None:
    choice.last_token_s, choice.prefill_s = 10.0, 0.0
    found = request_metrics([choice])
    assert found is not None
    assert "tokens_per_second" not in found


def test_without_a_token_or_with_several_choices_nothing_is_said(choice: Choice) -> None:
    assert request_metrics([choice, choice]) is None
    choice.first_token_s = None
    assert request_metrics([choice]) == {}
