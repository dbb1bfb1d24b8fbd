"""A choice while it grows: tokens, text, ends, and what is parsed of it."""

from __future__ import annotations

from typing import Any

import pytest
from api.fake_engine import EOS_ID, logprobs_of

from rayllm.api.choice import Choice
from rayllm.errors import EngineError
from rayllm.messages import Finish, TokenDelta
from rayllm.parsing.events import Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from rayllm.parsing.output_parser import OutputParser
from rayllm.parsing.reasoning import REASONING_FORMATS
from rayllm.parsing.tool_formats import HERMES
from rayllm.request import SamplingParams, pack_ids
from rayllm.text.detokenizer import ChoiceText
from rayllm.text.tokenizer import Tokenizer


def choice_of(tokenizer: Tokenizer, parser: OutputParser | None = None, **params: Any) -> Choice:
    return Choice(0, 0, ChoiceText(tokenizer, SamplingParams(**params), [], frozenset()), parser)


def delta(ids: list[int], finish: Finish | None = None, **fields: Any) -> TokenDelta:
    return TokenDelta(0, 0, pack_ids(ids), finish, **fields)


def test_deltas_become_text_and_the_end_has_a_reason(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer)
    first, last = tokenizer.encode("Hello"), tokenizer.encode(" wörld")
    assert choice.take(delta(first)) == "Hello"
    assert choice.finish_reason is None
    assert choice.take(delta([*last, EOS_ID], Finish("stop", None))) == " wörld"
    assert choice.token_ids == [*first, *last, EOS_ID]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", None)


def test_tokens_after_a_stop_string_do_not_count(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer, stop=["END"])
    ids, more = tokenizer.encode("Hello END"), tokenizer.encode(" and more")
    scored = [logprobs_of(token_id, 1) for token_id in (*ids, *more)]
    assert choice.take(delta([*ids, *more], logprobs=scored)) == "Hello "
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "END")
    assert choice.token_ids == ids
    assert choice.logprobs == scored[: len(ids)]


def test_the_beginning_of_a_stop_string_is_shown_where_the_answer_ends_in_it(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer, stop=["END"])
    assert choice.take(delta(tokenizer.encode("Hello EN"))) == "Hello "
    assert choice.take(delta([], Finish("length"))) == "EN"
    assert choice.finish_reason == "length"


def test_what_the_engine_says_went_wrong_is_raised(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer)
    with pytest.raises(EngineError, match="the driver is gone") as caught:
        choice.take(delta([5], Finish("error", code="driver_died", message="the driver is gone")))
    assert caught.value.code == "driver_died"
    assert choice.token_ids == []


def test_text_that_nothing_parses_is_one_event(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer)
    assert choice.take_events("Hello") == [Text("Hello")]
    assert choice.take_events("") == []


@pytest.mark.parametrize("shows_reasoning", [True, False])
def test_reasoning_is_counted_whether_or_not_it_is_shown(tokenizer: Tokenizer, shows_reasoning: bool) -> None:
    choice = choice_of(tokenizer, OutputParser(None, REASONING_FORMATS["qwen3"]))
    choice.shows_reasoning = shows_reasoning
    thought, said = tokenizer.encode("<think>hm</think>"), tokenizer.encode("Hello")
    for token_id in [*thought, *said]:
        choice.take(delta([token_id]))
    assert choice.take_events("") == [*([Reasoning("hm")] if shows_reasoning else []), Text("Hello")]
    assert choice.take_events("") == []
    assert choice.reasoning_end == len(thought)
    assert 0 < choice.num_reasoning_tokens <= len(thought)


def test_a_call_is_finished_with_the_choice(tokenizer: Tokenizer) -> None:
    choice = choice_of(tokenizer, OutputParser(HERMES, tools={"now": {}}))
    choice.take(delta(tokenizer.encode('<tool_call>{"name": "now", "arguments": {}')))
    assert choice.take_events("") == [ToolCallBegin(0, "call_0", "now"), ToolCallArguments(0, "{}")]
    choice.take(delta([], Finish("length")))
    assert choice.take_events("") == [ToolCallEnd(0)]
