"""Bodies of embeddings, scores and classes: checked whole, then refused for what the model lacks."""

from __future__ import annotations

from typing import Any

import pytest

from rayllm.api.openai import pooling
from rayllm.api.service import ModelService
from rayllm.errors import RequestError

EMBED = {"model": "tiny", "input": "a"}
RERANK = {"model": "tiny", "query": "q", "documents": ["a", {"text": "b"}]}
SCORE = {"model": "tiny", "text_1": "a", "text_2": ["b", "c"]}


@pytest.mark.parametrize(
    ("work", "body"),
    [
        (pooling.embeddings, {**EMBED, "encoding_format": "base64", "dimensions": 8, "user": "u"}),
        (pooling.embeddings, {**EMBED, "input": ["a", "b"]}),
        (pooling.embeddings, {**EMBED, "input": [1, 2]}),
        (pooling.embeddings, {**EMBED, "input": [[1], [2, 3]]}),
        (pooling.pooling, EMBED),
        (pooling.classify, EMBED),
        (pooling.rerank, {**RERANK, "top_n": 1, "return_documents": True}),
        (pooling.score, SCORE),
    ],
)
async def test_a_right_body_meets_a_model_that_cannot(service: ModelService, work: Any, body: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=r"the model 'tiny' cannot .*: that needs .*; it serves: generate") as caught:
        await work(body, service)
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "unsupported_model", "model")


@pytest.mark.parametrize(
    ("work", "body", "param"),
    [
        (pooling.embeddings, {"model": "tiny"}, "input"),
        (pooling.embeddings, {**EMBED, "input": ""}, "input"),
        (pooling.embeddings, {**EMBED, "input": []}, "input"),
        (pooling.embeddings, {**EMBED, "input": ["a", 1]}, "input"),
        (pooling.embeddings, {**EMBED, "input": [[]]}, "input"),
        (pooling.embeddings, {**EMBED, "input": [True]}, "input"),
        (pooling.embeddings, {**EMBED, "input": [288]}, "input"),
        (pooling.embeddings, {**EMBED, "input": ["a"] * 2049}, "input"),
        (pooling.embeddings, {**EMBED, "encoding_format": "int8"}, "encoding_format"),
        (pooling.embeddings, {**EMBED, "dimensions": 0}, "dimensions"),
        (pooling.embeddings, {**EMBED, "dimension": 1}, "dimension"),
        (pooling.embeddings, {**EMBED, "truncate_prompt_tokens": 129}, "truncate_prompt_tokens"),
        (pooling.embeddings, {**EMBED, "model": "other"}, "model"),
        (pooling.rerank, {**RERANK, "documents": []}, "documents"),
        (pooling.rerank, {**RERANK, "documents": "a"}, "documents"),
        (pooling.rerank, {**RERANK, "documents": [{"txt": "a"}]}, "documents"),
        (pooling.rerank, {**RERANK, "top_n": 0}, "top_n"),
        (pooling.rerank, {**RERANK, "query": None}, "query"),
        (pooling.score, {**SCORE, "text_1": ["a", "b", "c"]}, "text_2"),
        (pooling.score, {**SCORE, "text_2": [1]}, "text_2"),
        (pooling.score, {**SCORE, "text_2": []}, "text_2"),
    ],
)
async def test_a_wrong_body_names_its_field(service: ModelService, work: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await work(body, service)
    assert caught.value.param == param
    assert caught.value.code != "unsupported_model"
