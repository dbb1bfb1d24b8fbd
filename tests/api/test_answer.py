"""What completions and chats share: ids, times, chunks and usage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api.fake_engine import EOS_ID, FakeEngine, config
from api.streams import chunks_of, whole_of
from fakes import make_request

from rayllm.api import answer as answer_module
from rayllm.api.answer import ChunkedAnswer, check_stream_options, created_s, new_id
from rayllm.api.choice import Choice
from rayllm.api.protocol import CompletionBody
from rayllm.api.resume_context import ResumeContext, opened_with
from rayllm.api.service import ModelService, ServedModel
from rayllm.config import EngineConfig
from rayllm.errors import RequestError
from rayllm.text.tokenizer import Tokenizer

USAGE = {"include_usage": True}
CONTINUOUS = {"include_usage": True, "continuous_usage_stats": True}


class _Answer(ChunkedAnswer):
    chunk_object = "test.chunk"

    def _entries(self, choice: Choice, text: str) -> Iterator[dict[str, Any]]:
        if text:
            yield {"index": choice.index, "text": text, "finish_reason": None, "stop_reason": None}
        if choice.finish_reason is not None:
            reasons = {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
            yield {"index": choice.index, "text": "", **reasons}

    def _whole(self) -> dict[str, Any]:
        texts = [choice.text.text for choice in self.generation.choices]
        return {**self._head, "texts": texts, **self._closing_fields()}


def body(**fields: Any) -> CompletionBody:
    return CompletionBody.model_validate({"model": "tiny", "prompt": "hi", **fields})


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    """Three tokens of one character each, then the end with the last of them."""
    engine = FakeEngine(lambda request, choice: [*tokenizer.encode("xyz"), EOS_ID])
    engine.num_cached_tokens = 1
    return engine


def model_of(engine: FakeEngine, tokenizer: Tokenizer, **settings: Any) -> ServedModel:
    service = ModelService()
    service.set_ready(config(engine=EngineConfig(**settings)), tokenizer, engine)
    return service.model()


def open_answer(model: ServedModel, num_choices: int = 1, **fields: Any) -> _Answer:
    request = make_request([5, 6], max_tokens=8, n=num_choices)
    return _Answer(model, body(**fields), [request], "test-1")


def test_ids_are_new_unless_the_answer_is_made_again() -> None:
    assert new_id("cmpl-").startswith("cmpl-")
    assert new_id("cmpl-") != new_id("cmpl-")
    with opened_with(ResumeContext("/v1/completions", {}, created_s=1234, answer_id="cmpl-1")):
        assert (new_id("cmpl-"), created_s()) == ("cmpl-1", 1234)
    with opened_with(ResumeContext("/v1/completions", {}, created_s=1234)):
        assert new_id("cmpl-") not in ("cmpl-1", "cmpl-")


def test_an_answer_is_of_the_second_in_which_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_module.time, "time", lambda: 99.9)
    assert created_s() == 99


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stream_options": USAGE}, "stream_options"), ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs")],
)
def test_options_of_the_other_way_of_answering_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_stream_options(body(**fields))
    assert caught.value.param == param
    check_stream_options(body(stream=True, stream_options=USAGE))
    check_stream_options(body(prompt_logprobs=1))


async def test_a_whole_answer_counts_all_choices(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    whole = await whole_of(open_answer(model_of(engine, tokenizer), num_choices=2))
    assert (whole["id"], whole["model"], whole["texts"]) == ("test-1", "tiny", ["xyz", "xyz"])
    assert whole["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 8,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert "metrics" not in whole
    assert engine.streams[0].closed


@pytest.mark.parametrize(("options", "num_more"), [(None, 0), (USAGE, 1)])
async def test_usage_comes_last_and_only_where_it_is_asked_for(
    engine: FakeEngine, tokenizer: Tokenizer, options: dict[str, Any] | None, num_more: int
) -> None:
    chunks = await chunks_of(open_answer(model_of(engine, tokenizer), stream=True, stream_options=options))
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {("test-1", "test.chunk")}
    assert [chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"]] == ["x", "y", "z", ""]
    assert len(chunks) == 4 + num_more
    if options is None:
        assert not any("usage" in chunk for chunk in chunks)
    else:
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
        assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 4)


async def test_where_each_chunk_has_usage_the_end_comes_with_the_last_text(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.tokens_a_step = 2
    asked = open_answer(model_of(engine, tokenizer), stream=True, stream_options=CONTINUOUS)
    forced = open_answer(model_of(engine, tokenizer, enable_force_include_usage=True), stream=True)
    for answer in (asked, forced):
        chunks = await chunks_of(answer)
        entries = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert [(entry["text"], entry["finish_reason"]) for entry in entries] == [("xy", None), ("z", "stop")]
        assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [2, 4, 4]


async def test_metrics_come_with_the_usage_where_the_operator_wants_them(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    model = model_of(engine, tokenizer, enable_per_request_metrics=True)
    whole = await whole_of(open_answer(model))
    assert whole["metrics"]["queue_time_ms"] == 250
    *before, last = await chunks_of(open_answer(model, stream=True, stream_options=USAGE))
    assert last["metrics"]["time_to_first_token_ms"] == 500
    assert not any("metrics" in chunk for chunk in before)


async def test_a_fault_within_a_stream_is_its_last_event(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.fault_at = 1
    first, fault = await chunks_of(open_answer(model_of(engine, tokenizer), stream=True))
    assert first["choices"][0]["text"] == "x"
    assert fault["error"]["code"] == "driver_died"
