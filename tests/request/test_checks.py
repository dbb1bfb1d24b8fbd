from __future__ import annotations

import pytest

from rayllm.errors import ContextLengthError
from rayllm.request.checks import resolve_max_tokens


def test_max_tokens_is_all_that_the_context_leaves_unless_asked() -> None:
    assert resolve_max_tokens(10, None, 16) == 6
    assert resolve_max_tokens(10, 6, 16) == 6


@pytest.mark.parametrize(("num_prompt", "asked", "param"), [(16, None, "prompt"), (10, 7, "max_tokens")])
def test_what_does_not_fit_names_the_field(num_prompt: int, asked: int | None, param: str) -> None:
    with pytest.raises(ContextLengthError, match="maximum context length is 16 tokens") as found:
        resolve_max_tokens(num_prompt, asked, 16)
    assert found.value.param == param
