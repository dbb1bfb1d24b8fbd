from __future__ import annotations

import pytest

from rayllm.errors import ContextLengthError
from rayllm.prompt.text_model import TextModel


def test_a_prompt_that_no_tokenizing_could_make_fit_is_refused(model: TextModel) -> None:
    limit = model.config.max_model_len * max(model.tokenizer.longest_token, 16)
    model.check_length(limit, "messages")
    with pytest.raises(ContextLengthError, match=f"has {limit + 1} characters") as found:
        model.check_length(limit + 1, "messages")
    assert found.value.param == "messages"


def test_text_is_tokenized_with_or_without_start_tokens(model: TextModel) -> None:
    ids = model.tokenize("Hello", add_special_tokens=False, param="prompt")
    assert model.tokenizer.decode(ids) == "Hello"
