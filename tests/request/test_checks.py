from __future__ import annotations

import msgspec
import pytest
from fakes import fake_config, make_request

from rayllm.errors import ContextLengthError, RequestError
from rayllm.request import SamplingParams
from rayllm.request.checks import check_request, resolve_logprobs, resolve_max_tokens

CONFIG = fake_config()
VOCAB_SIZE = CONFIG.shape.vocab_size


def test_a_request_that_fits_is_taken() -> None:
    check_request(make_request([0, VOCAB_SIZE - 1], max_tokens=2), CONFIG)


@pytest.mark.parametrize("prompt", [[], [1, VOCAB_SIZE], [-1]])
def test_a_prompt_without_tokens_or_with_ids_of_no_token_is_refused(prompt: list[int]) -> None:
    with pytest.raises(RequestError, match=r"prompt") as caught:
        check_request(make_request(prompt, max_tokens=2), CONFIG)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logprob_token_ids"])
def test_an_id_that_is_no_token_is_refused_by_its_field(name: str) -> None:
    request = make_request([1], max_tokens=2)
    params = request.params.with_(**{name: (VOCAB_SIZE,)})
    with pytest.raises(RequestError, match=f"{name} holds {VOCAB_SIZE}") as caught:
        check_request(msgspec.structs.replace(request, params=params), CONFIG)
    assert caught.value.param == name


@pytest.mark.parametrize(("asked", "expected"), [(None, 6), (3, 3), (6, 6)])
def test_max_tokens_is_what_was_asked_or_all_that_is_left(asked: int | None, expected: int) -> None:
    assert resolve_max_tokens(4, asked, max_model_len=10) == expected


@pytest.mark.parametrize(
    ("num_prompt", "asked", "param"), [(10, None, "prompt"), (12, 1, "prompt"), (4, 7, "max_tokens")]
)
def test_more_than_the_context_is_refused(num_prompt: int, asked: int | None, param: str) -> None:
    with pytest.raises(ContextLengthError, match="maximum context length is 10 tokens") as caught:
        resolve_max_tokens(num_prompt, asked, max_model_len=10)
    assert caught.value.param == param


def test_more_log_probabilities_than_the_engine_allows_are_refused() -> None:
    limit = CONFIG.engine.max_logprobs
    assert resolve_logprobs(SamplingParams(logprobs=limit), CONFIG).logprobs == limit
    with pytest.raises(RequestError, match=rf"prompt_logprobs={limit + 1} is outside \[0, {limit}\]"):
        resolve_logprobs(SamplingParams(prompt_logprobs=limit + 1), CONFIG)


def test_all_log_probabilities_are_those_of_the_vocabulary() -> None:
    config = fake_config(engine={"max_logprobs": -1})
    assert resolve_logprobs(SamplingParams(logprobs=-1), config).logprobs == VOCAB_SIZE
