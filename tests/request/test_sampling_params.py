from __future__ import annotations

import math

import pytest

from rayllm.request import SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 129),
        ("n", True),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("seed", 2**63),
        ("stop", [""]),
        ("stop_token_ids", [-1]),
        ("bad_words", [""]),
        ("bad_words", [5]),
        ("bad_words", "word"),
        ("bad_words", ["word"] * 1025),
        ("bad_words_token_ids", [[]]),
        ("bad_words_token_ids", [[3, -1]]),
        ("allowed_token_ids", []),
        ("logit_bias", {1: 101.0}),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -2),
        ("prompt_logprobs", -2),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", True),
        ("truncate_prompt_tokens", 1.5),
        ("priority", 2**31),
        ("priority", None),
        ("best_of", 2),
        ("spaces_between_special_tokens", False),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_min_tokens_above_max_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens=5 is more than max_tokens=4"):
        SamplingParams(max_tokens=4, min_tokens=5)


def test_normal_forms() -> None:
    params = SamplingParams(stop="end", top_k=-1, logit_bias={"7": 1})  # type: ignore[dict-item, arg-type]
    assert (params.stop, params.top_k, params.logit_bias) == (("end",), 0, {7: 1.0})
    assert SamplingParams(temperature=0).greedy
