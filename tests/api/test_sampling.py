"""Fields of a body as `SamplingParams` and `Request`, refused in the client's names."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from api.fake_engine import MAX_MODEL_LEN, VOCAB_SIZE, config

from rayllm.api import sampling
from rayllm.api.protocol import CompletionBody
from rayllm.api.sampling import (
    MAX_TIMEOUT_S,
    num_further_characters,
    request_of_body,
    sampling_params,
    truncate_ids,
)
from rayllm.api.service import ModelService, ServedModel
from rayllm.config import GenerationDefaults
from rayllm.errors import RequestError
from rayllm.request import Request, SamplingParams


@pytest.fixture
def model(service: ModelService) -> ServedModel:
    return service.model()


def body(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"model": "tiny", "prompt": "hi", **fields})


def request_of(model: ServedModel, default_max_tokens: int | None = None, **fields: Any) -> Request:
    made = body(**fields)
    params = sampling_params(made, model, max_tokens=made.max_tokens)
    return request_of_body("r", [5, 6, 7], params, made, model.config, default_max_tokens, client_key="me")


def test_a_field_holds_more_than_the_models_default_and_null_less(model: ServedModel) -> None:
    defaults = GenerationDefaults(temperature=0.6, top_k=20)
    model = replace(model, config=config(generation=defaults))
    params = sampling_params(body(temperature=None, top_k=0, seed=3), model)
    assert (params.temperature, params.top_k, params.seed) == (0.6, 0, 3)
    assert params.top_p == SamplingParams().top_p


def test_what_an_endpoint_worked_out_holds_most(model: ServedModel) -> None:
    assert sampling_params(body(n=2, logprobs=5), model, n=1, logprobs=3).n == 1
    assert sampling_params(body(), model, logprobs=3).logprobs == 3


def test_token_ids_of_a_logit_bias_become_numbers(model: ServedModel) -> None:
    assert sampling_params(body(logit_bias={"5": 1.5, "0007": -2}), model).logit_bias == {5: 1.5, 7: -2.0}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 2.1}, "temperature", "temperature=2.1 is outside [0, 2]; 0 is greedy"),
        ({"repetition_penalty": 0.001}, "repetition_penalty", "repetition_penalty=0.001 is less than 0.01; 1 is off"),
        ({"top_p": 1.5}, "top_p", "top_p=1.5 is outside"),
        ({"stop": ["a", "b" * 1025]}, "stop", "a string of 1025 characters is longer than 1024"),
        ({"bad_words": ["x" * 9000] * 2}, "bad_words", "18000 characters in all, at most 16384"),
        ({"stop_token_ids": [3, VOCAB_SIZE]}, "stop_token_ids", "288 is out of vocabulary, which has 288 tokens"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "-1 is out of vocabulary"),
        ({"logprob_token_ids": [1] * 1025}, "logprob_token_ids", "holds 1025 ids, at most 1024"),
        ({"allowed_token_ids": [1] * (VOCAB_SIZE + 1)}, "allowed_token_ids", "holds 289 ids, at most 288"),
        ({"logit_bias": {"bad1": 1, "3": 1, "bad2": 1}}, "logit_bias", "'bad1', 'bad2' are not token ids"),
        ({"logit_bias": {"٥": 1, "288": 1}}, "logit_bias", "is not a token id; '288' is out of vocabulary"),
        ({"logit_bias": {f"x{i}": 1 for i in range(12)}}, "logit_bias", "'x9' and 2 more are not token ids"),
    ],
)
def test_a_wrong_value_is_refused_with_its_field_and_limit(
    model: ServedModel, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        sampling_params(body(**fields), model)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, [3, 4, 5, 6]),
        ({"truncate_prompt_tokens": 2}, [5, 6]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, [3, 4]),
        ({"truncate_prompt_tokens": 128}, [3, 4, 5, 6]),
    ],
)
def test_a_prompt_is_cut_on_the_side_that_the_client_says(fields: dict[str, Any], kept: list[int]) -> None:
    assert truncate_ids([3, 4, 5, 6], body(**fields), MAX_MODEL_LEN) == kept


def test_minus_one_cuts_a_prompt_to_the_context() -> None:
    ids = list(range(10))
    assert truncate_ids(ids, body(truncate_prompt_tokens=-1), 4) == [6, 7, 8, 9]
    for num_tokens in (0, -2, 5):
        with pytest.raises(RequestError, match=rf"={num_tokens} is outside \[1, 4\]; -1 means 4") as caught:
            truncate_ids(ids, body(truncate_prompt_tokens=num_tokens), 4)
        assert caught.value.param == "truncate_prompt_tokens"


def test_a_request_has_all_that_the_engine_asks(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling.time, "time", lambda: 1000.0)
    request = request_of(model, max_tokens=9, priority=-3, cache_salt="salt", timeout=2.5, seed=11)
    assert list(request.prompt_token_ids) == [5, 6, 7]
    assert (request.max_tokens, request.priority, request.cache_salt, request.seed) == (9, -3, "salt", 11)
    assert (request.deadline_s, request.client_key) == (1002.5, "me")


def test_what_a_request_leaves_out_has_defaults(model: ServedModel) -> None:
    request = request_of(model, default_max_tokens=16)
    assert (request.max_tokens, request.priority, request.cache_salt, request.deadline_s) == (16, 0, "", None)
    assert request_of(model).max_tokens == MAX_MODEL_LEN - 3
    assert request_of(model, default_max_tokens=10 * MAX_MODEL_LEN).max_tokens == MAX_MODEL_LEN - 3


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"priority": 2**31}, "priority", "does not fit 32 bits"),
        ({"timeout": 0}, "timeout", f"timeout=0 is outside (0, {MAX_TIMEOUT_S}] seconds"),
        ({"timeout": MAX_TIMEOUT_S + 1}, "timeout", "is outside"),
        ({"cache_salt": ""}, "cache_salt", "cache_salt has 0 characters, 1 to 1024 are allowed"),
        ({"cache_salt": "x" * 1025}, "cache_salt", "cache_salt has 1025 characters"),
    ],
)
def test_a_wrong_value_of_a_request_is_refused(
    model: ServedModel, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        request_of(model, **fields)
    assert caught.value.param == param


def test_bad_words_count_as_text_to_tokenize() -> None:
    assert num_further_characters(body()) == 0
    assert num_further_characters(body(bad_words=["x" * 1000, "y"])) > 2 * 1001
