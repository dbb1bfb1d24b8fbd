from __future__ import annotations

import pytest

from rayllm.config import ResolvedConfig
from rayllm.errors import ContextLengthError, RequestError
from rayllm.prompt.requests import build_request, derived_seed, named_as, program_request, resolve_params
from rayllm.prompt.text_model import TextModel
from rayllm.request import SamplingParams, StructuredOutputsParams

IDS = [5, 6, 7]


def test_max_tokens_is_what_was_asked_for_within_the_bounds(config: ResolvedConfig) -> None:
    def granted(asked: int | None, default: int | None = None, limit: int | None = None) -> int:
        params = SamplingParams(max_tokens=asked)
        request = build_request(
            "id", IDS, params, config, default_seed=0, default_max_tokens=default, max_tokens_limit=limit
        )
        return request.max_tokens

    assert granted(9) == 9
    assert granted(9, default=5) == 9
    assert granted(9, limit=4) == 4
    assert granted(None) == config.max_model_len - len(IDS)
    assert granted(None, default=5) == 5
    assert granted(None, default=5, limit=4) == 4
    with pytest.raises(ContextLengthError, match="maximum context length"):
        granted(config.max_model_len)


def test_a_seed_of_the_parameters_goes_before_the_default(config: ResolvedConfig) -> None:
    seeds = [build_request("id", IDS, SamplingParams(seed=s), config, default_seed=3).seed for s in (None, 8)]
    assert seeds == [3, 8]


def test_ids_that_do_not_fit_are_refused(config: ResolvedConfig) -> None:
    with pytest.raises(RequestError, match="a prompt token id does not fit 32 bits"):
        build_request("id", [2**40], SamplingParams(), config, default_seed=0)


def test_parameters_become_the_models(model: TextModel) -> None:
    params = resolve_params(SamplingParams(bad_words=["rain"]), model.config, model.tokenizer)
    assert params.bad_words_token_ids
    assert not params.bad_words
    with pytest.raises(RequestError, match="logprobs=1000 is outside"):
        resolve_params(SamplingParams(logprobs=1000), model.config, model.tokenizer)


def test_a_programs_grammar_is_checked(model: TextModel) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="("))
    with pytest.raises(RequestError):
        program_request("id", IDS, params, model.config, model.tokenizer, 0)


def test_derived_seeds_are_the_same_in_every_run_and_differ() -> None:
    assert derived_seed(1, 2) == derived_seed(1, 2)
    assert len({derived_seed(seed, number) for seed in range(3) for number in range(3)}) == 9


def test_errors_name_the_clients_fields() -> None:
    with pytest.raises(RequestError, match="messages is empty") as found, named_as({"prompt": "messages"}):
        raise RequestError("prompt is empty", param="prompt")
    assert found.value.param == "messages"
