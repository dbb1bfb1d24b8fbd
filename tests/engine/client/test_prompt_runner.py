from __future__ import annotations

import pytest

from rayllm.engine.client.prompt_runner import per_prompt
from rayllm.errors import RequestError
from rayllm.request import SamplingParams

ONE, OTHER = SamplingParams(seed=1), SamplingParams(seed=2)


def test_one_set_of_parameters_is_for_each_prompt() -> None:
    assert per_prompt(ONE, 3) == [ONE, ONE, ONE]
    assert per_prompt([ONE, OTHER], 2) == [ONE, OTHER]


@pytest.mark.parametrize(
    ("params", "message"),
    [([ONE], "1 sampling_params for 2 prompts"), ([ONE, {"seed": 1}], "got dict"), ({"seed": 1}, "got dict")],
)
def test_other_numbers_or_types_are_refused(params: object, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        per_prompt(params, 2)  # type: ignore[arg-type]
