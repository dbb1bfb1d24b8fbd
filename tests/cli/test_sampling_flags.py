"""Sampling parameters as flags: they reach the API under its own names, and only within their range."""

from __future__ import annotations

import pytest

from rayllm.cli.flags import Parser, UsageError
from rayllm.cli.sampling_flags import PARAMS, add_param_flags, param_name, params_of, parse_param


def _given(*argv: str) -> dict[str, object]:
    parser = Parser(prog="rayllm complete")
    add_param_flags(parser)
    return parser.parse(list(argv))


def test_flags_become_parameters_of_the_api_and_what_is_not_given_is_not_sent() -> None:
    assert params_of(_given("--top-p", "0.5", "--max-tokens", "7")) == {"top_p": 0.5, "max_tokens": 7}
    assert params_of(_given()) == {}


BAD_VALUES = [("temperature", "-1"), ("top_p", "2"), ("max_tokens", "-3"), ("min_p", "5")]


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_value_out_of_range_is_refused_with_its_name(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name):
        params_of(_given(f"--{name.replace('_', '-')}={value}"))


def test_what_is_no_number_is_refused_with_the_kind_that_is_wanted() -> None:
    with pytest.raises(UsageError, match=r"seed='x' must be an integer"):
        parse_param("seed", "x")
    with pytest.raises(UsageError, match=r"temperature='warm' must be a number"):
        parse_param("temperature", "warm")
    assert parse_param("top_k", "5") == 5


def test_a_name_may_have_hyphens_and_a_typo_gets_the_nearest_name() -> None:
    assert param_name("top-p") == "top_p"
    with pytest.raises(UsageError, match="temperature"):
        param_name("temprature")
    assert set(PARAMS) >= {"temperature", "top_p", "top_k", "seed"}
