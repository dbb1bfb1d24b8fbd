"""vLLM's plain generation."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from api.conftest import ANSWER
from api.fake_engine import FakeEngine
from api.streams import whole_of

from rayllm.api.service import ModelService
from rayllm.api.vllm.generate import open_generate, open_generate_stream
from rayllm.errors import RequestError


async def test_prompt_and_completion_are_one_text(service: ModelService, engine: FakeEngine) -> None:
    fields = {"prompt": "Say: ", "n": 2, "max_tokens": 100, "top_k": 5}
    assert await whole_of(await open_generate(fields, service)) == {"text": [f"Say: {ANSWER}", f"Say: {ANSWER}1"]}
    assert engine.requests[0].params.top_k == 5

    ids = service.model().tokenizer.encode("Say: ")
    answer = await whole_of(await open_generate({"prompt": ids, "model": "tiny"}, service))
    assert answer["text"][0].startswith("Say: Hello")
    assert engine.requests[1].max_tokens == 16


@pytest.mark.parametrize("as_events", [False, True])
async def test_a_stream_is_lines_that_grow(service: ModelService, as_events: bool) -> None:
    answer = await (open_generate_stream if as_events else open_generate)({"prompt": "a", "max_tokens": 100}, service)
    sent = b"".join([piece async for piece in answer.stream()])
    answer.close()

    if as_events:
        *events, done, rest = sent.decode().split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        lines = [event.split("\n")[0].removeprefix("data: ") for event in events]
    else:
        lines = sent.decode().splitlines()
    texts = [json.loads(line)["text"][0] for line in lines]
    assert texts[-1] == f"a{ANSWER}"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert len(texts) > 5


@pytest.mark.parametrize("as_events", [False, True])
async def test_a_fault_inside_a_stream_is_told(service: ModelService, engine: FakeEngine, as_events: bool) -> None:
    engine.fault_at = 3
    answer = await (open_generate_stream if as_events else open_generate)({"prompt": "a"}, service)
    sent = b"".join([piece async for piece in answer.stream()])
    answer.close()
    assert b'"code":"driver_died"' in sent


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [999999]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "model": "other"}, "model"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "use_beam_search": True}, "use_beam_search"),
        ({"prompt": "a", "return_token_ids": True}, "return_token_ids"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
    ],
)
async def test_what_cannot_be_served_names_its_field(service: ModelService, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        await open_generate(fields, service)
    assert caught.value.param == param
