"""Beam search over HTTP: what it answers, and what it does not follow."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from api.fake_engine import EOS_ID, VOCAB_SIZE, FakeEngine, config, logprobs_of
from api.streams import chunks_of, whole_of

from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.completions import open_completion
from rayllm.api.openai.logprobs import _unpack
from rayllm.api.service import ModelService
from rayllm.errors import RequestError
from rayllm.messages import Finish
from rayllm.text.tokenizer import Tokenizer

PROMPT = [40, 50]


def following(token_id: int) -> dict[int, float]:
    """What the fake model says may come after a token: id -> log-probability."""
    return dict(_unpack(logprobs_of((token_id * 7 + 3) % VOCAB_SIZE, 4)))


@pytest.fixture
def searched(tokenizer: Tokenizer) -> ModelService:
    engine = FakeEngine(lambda request, choice: [(request.prompt_token_ids[-1] * 7 + 3) % VOCAB_SIZE])
    service = ModelService()
    service.set_ready(config(), tokenizer, engine)
    return service


def body(**fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": PROMPT,
        "n": 2,
        "max_tokens": 3,
        "temperature": 0,
        "use_beam_search": True,
        "return_token_ids": True,
        **fields,
    }


def scores_of_all(num_tokens: int) -> dict[tuple[int, ...], float]:
    """The log-probability of every sequence that the fake model can say."""
    scores: dict[tuple[int, ...], float] = {}
    for places in itertools.product(range(5), repeat=num_tokens):
        ids, score = [PROMPT[-1]], 0.0
        for place in places:
            token_id, value = list(following(ids[-1]).items())[place]
            ids.append(token_id)
            score += value
        assert EOS_ID not in ids
        scores[tuple(ids[1:])] = score
    return scores


async def test_choices_are_the_best_sequences_of_the_model_the_best_first(searched: ModelService) -> None:
    answer = await whole_of(await open_completion(body(logprobs=1), searched))

    scores = scores_of_all(3)
    found = [scores[tuple(choice["token_ids"])] for choice in answer["choices"]]
    assert found == sorted(scores.values(), reverse=True)[:2]
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length", "length"]
    assert answer["usage"]["completion_tokens"] == 6
    ids = answer["choices"][0]["token_ids"]
    own = [following(before)[after] for before, after in zip([PROMPT[-1], *ids], ids)]
    assert answer["choices"][0]["logprobs"]["token_logprobs"] == own


async def test_a_stream_and_every_prompt_get_the_same_beams(searched: ModelService) -> None:
    answer = await whole_of(await open_completion(body(prompt=[PROMPT, PROMPT]), searched))
    chunks = await chunks_of(await open_completion(body(stream=True), searched))

    texts = [choice["text"] for choice in answer["choices"]]
    assert texts[:2] == texts[2:]
    streamed = ["", ""]
    for entry in (entry for chunk in chunks for entry in chunk["choices"]):
        streamed[entry["index"]] += entry["text"]
    assert streamed == texts[:2]


async def test_a_chat_is_searched_too(searched: ModelService) -> None:
    fields = body(messages=[{"role": "user", "content": "hi"}])
    del fields["prompt"]
    answer = await whole_of(await open_chat(fields, searched))
    assert len({choice["message"]["content"] for choice in answer["choices"]}) == 2


async def test_an_error_of_a_step_is_the_answers(searched: ModelService) -> None:
    searched.model().engine.error = Finish("error", code="poison_request", message="no more")  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="no more"):
        await whole_of(await open_completion(body(), searched))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stop": "x"}, "stop"),
        ({"top_p": 0.5}, "top_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"logprobs": 1, "logprob_token_ids": [3]}, "logprob_token_ids"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"guided_regex": "a+"}, "structured_outputs"),
        ({"n": 11}, "n"),
        ({"n": 1, "logprobs": 5}, "logprobs"),
        ({"best_of": 5}, "best_of"),
        ({"length_penalty": 1000}, "length_penalty"),
        ({"use_beam_search": False, "length_penalty": 0.5}, "length_penalty"),
    ],
)
async def test_what_a_search_does_not_follow_is_refused_by_name(
    searched: ModelService, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        await open_completion(body(**fields), searched)
    assert caught.value.param == param, json.dumps(caught.value.message)
