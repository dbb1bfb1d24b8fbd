from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from rayllm.engine.client.beam_search import BeamSearch, BeamSearchParams, BeamSearchSequence, step_params
from rayllm.errors import ContextLengthError
from rayllm.request import CompletionOutput, Logprob

EOS = 0


def _probabilities(tokens: list[int]) -> dict[int, float]:
    """A made-up model of four tokens whose next token depends on the last two."""
    weights = [1 + (7 * tokens[-1] + 3 * tokens[-2] + 5 * token_id) % 11 for token_id in range(4)]
    return {token_id: weight / sum(weights) for token_id, weight in enumerate(weights)}


def _output(tokens: list[int], num_candidates: int) -> CompletionOutput:
    ranked = sorted(_probabilities(tokens).items(), key=lambda entry: -entry[1])[:num_candidates]
    logprobs = {token_id: Logprob(math.log(p), rank) for rank, (token_id, p) in enumerate(ranked, 1)}
    return CompletionOutput(0, "", [ranked[0][0]], logprobs=[logprobs])


def _search(**settings: Any) -> list[BeamSearchSequence]:
    params = BeamSearchParams(**settings)
    search = BeamSearch([1, 2], params, {EOS}, max_model_len=64)
    while prompts := search.prompts():
        search.advance([_output(tokens, step_params(params).logprobs or 0) for tokens in prompts])
    return search.best()


def _all_answers(max_tokens: int, length_penalty: float) -> list[tuple[float, list[int]]]:
    """Every answer of the made-up model by brute force, the best first."""
    found = []
    for length in range(1, max_tokens + 1):
        for answer in itertools.product(range(4), repeat=length):
            ends = answer[-1] == EOS
            if EOS in answer[:-1] or (length < max_tokens and not ends):
                continue
            tokens, total = [1, 2], 0.0
            for token_id in answer:
                total += math.log(_probabilities(tokens)[token_id])
                tokens.append(token_id)
            found.append((total / (len(tokens) - ends) ** length_penalty, tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_wide_search_finds_the_best_answers_of_all(length_penalty: float) -> None:
    expected = _all_answers(3, length_penalty)
    found = _search(beam_width=9, max_tokens=3, length_penalty=length_penalty)
    assert [beam.tokens for beam in found] == [tokens for _, tokens in expected[:9]]
    for beam in found:
        assert len(beam.logprobs) == len(beam.tokens) - 2
        assert beam.cum_logprob == pytest.approx(sum(e[t].logprob for e, t in zip(beam.logprobs, beam.tokens[2:])))


def test_a_search_of_width_one_is_greedy() -> None:
    [beam] = _search(beam_width=1, max_tokens=5, ignore_eos=True)
    tokens = [1, 2]
    for _ in range(5):
        chances = _probabilities(tokens)
        tokens.append(max(chances, key=chances.__getitem__))
    assert beam.tokens == tokens
    assert beam.finish_reason == "length"


def test_an_end_token_ends_a_beam_unless_it_is_ignored() -> None:
    ended = [beam for beam in _search(beam_width=4, max_tokens=4, length_penalty=0.0) if beam.finish_reason == "stop"]
    assert ended
    for beam in ended:
        assert (beam.tokens[-1], beam.stop_reason) == (EOS, EOS)
        assert EOS not in beam.tokens[2:-1]
    for beam in _search(beam_width=4, max_tokens=4, ignore_eos=True):
        assert (len(beam.tokens), beam.finish_reason, beam.stop_reason) == (6, "length", None)


def test_a_search_without_room_is_refused() -> None:
    with pytest.raises(ContextLengthError, match=r"maximum context length is 8 tokens.*prompt has 3 tokens.*=6 more"):
        BeamSearch([1, 2, 3], BeamSearchParams(beam_width=2, max_tokens=6), {EOS}, max_model_len=8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_width": 0}, r"beam_width=0 is outside \[1, 10\]"),
        ({"beam_width": 11}, r"beam_width=11 is outside \[1, 10\]"),
        ({"beam_width": True}, "beam_width must be an integer, got True"),
        ({"max_tokens": 0}, "max_tokens=0 is outside"),
        ({"temperature": -1}, r"temperature=-1 is outside \[0, 100\]"),
        ({"length_penalty": math.nan}, "length_penalty must be a finite number, got nan"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False, got 1"),
    ],
)
def test_a_bad_parameter_is_named_with_its_limit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **settings})
