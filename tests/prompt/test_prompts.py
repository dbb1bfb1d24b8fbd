from __future__ import annotations

from typing import Any, cast

import pytest

from rayllm.errors import ContextLengthError, RequestError
from rayllm.prompt.prompts import PreparedPrompt, prepare_prompt, truncated
from rayllm.prompt.text_model import TextModel
from rayllm.request import SamplingParams


def test_a_prompt_is_text_or_token_ids(model: TextModel) -> None:
    ids = model.tokenizer.encode("Hello")
    assert prepare_prompt("Hello", model) == PreparedPrompt("Hello", ids)
    assert prepare_prompt(ids, model) == PreparedPrompt(None, ids)
    assert prepare_prompt({"prompt": "Hello"}, model) == PreparedPrompt("Hello", ids)
    assert prepare_prompt({"prompt_token_ids": ids, "prompt": "as shown"}, model) == PreparedPrompt("as shown", ids)


@pytest.mark.parametrize("prompt", [3, ["a"], [True], {}, {"text": "a"}, {"prompt": None}])
def test_anything_else_is_refused(model: TextModel, prompt: Any) -> None:
    with pytest.raises(RequestError, match="prompt"):
        prepare_prompt(cast(Any, prompt), model)


def test_a_text_that_cannot_fit_is_refused_unless_it_is_cut(model: TextModel) -> None:
    text = "x" * (model.config.max_model_len * 1000)
    with pytest.raises(ContextLengthError, match="maximum context length"):
        prepare_prompt(text, model)
    prompt = prepare_prompt("Hello " * 9000, model, SamplingParams(truncate_prompt_tokens=4))
    assert len(truncated(prompt, SamplingParams(truncate_prompt_tokens=4), 100).token_ids) == 4


def test_the_last_tokens_are_kept() -> None:
    prompt = PreparedPrompt(None, list(range(10)))
    assert truncated(prompt, SamplingParams(), 8).token_ids == list(range(10))
    assert truncated(prompt, SamplingParams(truncate_prompt_tokens=3), 8).token_ids == [7, 8, 9]
    assert truncated(prompt, SamplingParams(truncate_prompt_tokens=-1, max_tokens=6), 8).token_ids == [8, 9]
    with pytest.raises(RequestError, match=r"truncate_prompt_tokens=9 is outside \[1, 8\]"):
        truncated(prompt, SamplingParams(truncate_prompt_tokens=9), 8)
