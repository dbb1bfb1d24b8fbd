from __future__ import annotations

from array import array
from typing import Any

import pytest
from api.conftest import ANSWER
from api.fake_engine import EOS_ID, MAX_MODEL_LEN, VOCAB_SIZE, FakeEngine
from api.streams import chunks_of, whole_of
from openai.types import Completion

from rayllm.api.openai.completions import open_completion
from rayllm.api.service import ModelService
from rayllm.errors import EngineError, RequestError
from rayllm.messages import Finish, TokenDelta, TokenLogprobs
from rayllm.request import pack_ids, unpack_ids
from rayllm.text.tokenizer import Tokenizer


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", "max_tokens": 100, **fields}


async def whole(service: ModelService, **fields: Any) -> dict[str, Any]:
    return await whole_of(await open_completion(body(**fields), service))


async def chunks(service: ModelService, **fields: Any) -> list[dict[str, Any]]:
    return await chunks_of(await open_completion(body(**fields, stream=True), service))


def texts(entries: list[dict[str, Any]]) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in entries:
        found[entry["index"]] = found.get(entry["index"], "") + entry["text"]
    return found


def entries_of(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for chunk in chunks for entry in chunk["choices"]]


@pytest.mark.parametrize(
    "fields", [{}, {"logprobs": 2, "n": 2}, {"best_of": 3, "prompt": ["a", "b"]}, {"echo": True, "stop": "and"}]
)
async def test_openais_own_types_find_every_member(service: ModelService, fields: dict[str, Any]) -> None:
    Completion.model_validate(await whole(service, **fields), strict=True)
    if "best_of" in fields:
        return
    options = {"include_usage": True}
    for chunk in await chunks(service, **fields, stream_options=options):
        for entry in chunk["choices"]:  # the types know no entry that has not ended, which OpenAI sends with null
            assert "finish_reason" in entry
            entry["finish_reason"] = entry["finish_reason"] or "stop"
        Completion.model_validate(chunk, strict=True)


async def test_an_answer_has_openais_shape(service: ModelService, tokenizer: Tokenizer) -> None:
    answer = await whole(service)

    num_answer = len(tokenizer.encode(ANSWER)) + 1
    assert answer.pop("id").startswith("cmpl-")
    assert answer.pop("created") > 1_600_000_000
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "object": "text_completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": ANSWER,
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
                "token_ids": None,
                "prompt_token_ids": None,
                "prompt_logprobs": None,
            }
        ],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": num_answer,
            "total_tokens": 2 + num_answer,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_stream_gives_the_same_text_and_ends_with_the_reason(service: ModelService) -> None:
    streamed = await chunks(service, stream_options={"include_usage": True})

    entries = entries_of(streamed)
    assert texts(entries) == {0: ANSWER}
    assert [entry["finish_reason"] for entry in entries[-2:]] == [None, "stop"]
    assert entries[-1]["text"] == ""
    assert {chunk["object"] for chunk in streamed} == {"text_completion"}
    assert streamed[-1]["usage"] == (await whole(service))["usage"]


async def test_sixteen_tokens_are_the_default_as_far_as_there_is_room(
    service: ModelService, engine: FakeEngine
) -> None:
    await whole(service, max_tokens=None)
    await whole(service, max_tokens=None, prompt=[5] * (MAX_MODEL_LEN - 3))

    assert [request.max_tokens for request in engine.requests] == [16, 3]


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("hi", ["hi"]),
        (["hi", "you", "a"], ["hi", "you", "a"]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["same", "same"], ["same", "same"]),
    ],
)
async def test_prompts_are_text_or_ids_one_or_many(
    service: ModelService, engine: FakeEngine, tokenizer: Tokenizer, prompt: Any, sent: list[Any]
) -> None:
    answer = await whole(service, prompt=prompt)

    expected = [tokenizer.encode(p) if isinstance(p, str) else p for p in sent]
    assert [list(request.prompt_token_ids) for request in engine.requests] == expected
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(sent)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert len({request.request_id for request in engine.requests}) == len(sent)


async def test_choices_are_numbered_prompt_by_prompt(service: ModelService) -> None:
    expected = {0: ANSWER, 1: ANSWER + "1", 2: ANSWER, 3: ANSWER + "1"}

    assert texts((await whole(service, prompt=["a", "b"], n=2))["choices"]) == expected
    assert texts(entries_of(await chunks(service, prompt=["a", "b"], n=2))) == expected


async def test_an_echo_puts_the_prompt_before_the_answer(service: ModelService, tokenizer: Tokenizer) -> None:
    assert (await whole(service, echo=True))["choices"][0]["text"] == "hi" + ANSWER
    ids = tokenizer.encode("hé")
    assert (await whole(service, echo=True, prompt=ids))["choices"][0]["text"] == "hé" + ANSWER
    streamed = entries_of(await chunks(service, echo=True, prompt=["hi", "you"]))
    assert texts(streamed) == {0: "hi" + ANSWER, 1: "you" + ANSWER}


async def test_logprobs_are_parallel_lists_with_text_offsets(service: ModelService, tokenizer: Tokenizer) -> None:
    answer = (await whole(service, logprobs=1, max_tokens=9))["choices"][0]
    streamed = entries_of(await chunks(service, logprobs=1, max_tokens=9))

    ids = tokenizer.encode(ANSWER)[:9]
    logprobs = answer["logprobs"]
    assert logprobs["tokens"] == ["H", "e", "ll", "o", " w", "bytes:\\xc3", "bytes:\\xb6", "r", "l"]
    assert logprobs["text_offset"] == [0, 1, 2, 4, 5, 7, 7, 8, 9]
    assert logprobs["token_logprobs"] == [-0.5] * 9
    assert logprobs["top_logprobs"][0] == {"H": -0.5, tokenizer.token_text(ids[0] + 1): -0.25}
    for name in logprobs:
        assert [v for entry in streamed for v in (entry["logprobs"] or {name: []})[name]] == logprobs[name]


async def test_an_echo_with_logprobs_scores_the_prompt(service: ModelService) -> None:
    answer = (await whole(service, echo=True, logprobs=0, max_tokens=2))["choices"][0]
    streamed = entries_of(await chunks(service, echo=True, logprobs=0, max_tokens=2))

    assert answer["text"] == "hiHe"
    assert answer["logprobs"]["tokens"] == ["h", "i", "H", "e"]
    assert answer["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert answer["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert [t for entry in streamed for t in (entry["logprobs"] or {"tokens": []})["tokens"]] == ["h", "i", "H", "e"]
    assert [o for e in streamed for o in (e["logprobs"] or {"text_offset": []})["text_offset"]] == [0, 1, 2, 3]


async def test_no_new_tokens_only_score_the_prompt(service: ModelService) -> None:
    answer = await whole(service, echo=True, logprobs=1, max_tokens=0)
    streamed = entries_of(await chunks(service, echo=True, max_tokens=0))

    assert answer["choices"][0]["text"] == "hi"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["h", "i"]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0
    assert texts(streamed) == {0: "hi"}


async def test_the_best_of_several_are_given(
    service: ModelService, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(request: Any, choice: int) -> list[int]:
        return [50 + choice, EOS_ID]

    engine.say = scored
    values = {50: -3.0, 51: -0.1, 52: -2.0}

    def score(packed: Any) -> float:
        return values.get(unpack_ids(packed.ids)[0], 0.0)

    monkeypatch.setattr("rayllm.api.openai.completions.own_logprob", score)
    answer = await whole(service, best_of=3, n=2, return_token_ids=True)

    assert engine.requests[0].params.n == 3
    assert [choice["token_ids"][0] for choice in answer["choices"]] == [51, 52]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["completion_tokens"] == 6


async def test_token_ids_are_given_where_asked(service: ModelService, tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode(ANSWER), EOS_ID]

    answer = (await whole(service, return_token_ids=True, prompt_logprobs=0))["choices"][0]
    streamed = entries_of(await chunks(service, return_token_ids=True))

    assert (answer["prompt_token_ids"], answer["token_ids"]) == (tokenizer.encode("hi"), ids)
    assert answer["prompt_logprobs"][1] == {
        str(tokenizer.encode("hi")[1]): {"logprob": -0.5, "rank": 2, "decoded_token": "i"}
    }
    assert [i for entry in streamed for i in entry["token_ids"]] == ids


async def test_what_no_number_says_is_shown_as_minus_9999(service: ModelService, engine: FakeEngine) -> None:
    packed = TokenLogprobs(pack_ids([50, 51]), array("f", [float("-inf"), float("nan")]).tobytes(), 1)

    class Stream:
        async def deltas(self) -> Any:
            yield [TokenDelta(0, 0, pack_ids([50]), Finish("length"), [packed])]

        def __aiter__(self) -> Any:
            return self.deltas()

        def close(self) -> None: ...

        def abort_choice(self, choice: int) -> None: ...

    engine.submit = lambda request: Stream()  # type: ignore[method-assign,assignment,return-value]

    logprobs = (await whole(service, logprobs=1))["choices"][0]["logprobs"]

    assert logprobs["token_logprobs"] == [-9999.0]
    assert list(logprobs["top_logprobs"][0].values()) == [-9999.0, -9999.0]


async def test_the_sampling_fields_reach_the_engine(service: ModelService, engine: FakeEngine) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.1,
        "stop_token_ids": [7],
        "ignore_eos": True,
        "min_tokens": 2,
        "allowed_token_ids": [50, 51],
    }
    await whole(service, **fields, logit_bias={"5": 1.5, "0007": -2}, priority=3, cache_salt="s", stop="x")

    (request,) = engine.requests
    for name, value in fields.items():
        found = getattr(request.params, name)
        assert (list(found) if isinstance(found, tuple) else found) == value
    assert request.params.logit_bias == {5: 1.5, 7: -2.0}
    assert request.params.stop == ("x",)
    assert (request.priority, request.cache_salt, request.max_tokens) == (3, "s", 100)


async def test_bad_words_travel_as_token_ids(service: ModelService, engine: FakeEngine, tokenizer: Tokenizer) -> None:
    await whole(service, bad_words=["more", " Hello"])

    (request,) = engine.requests
    expected = [tokenizer.encode(text, add_special_tokens=False) for text in ("more", " more", "Hello", " Hello")]
    assert list(map(list, request.params.bad_words_token_ids)) == expected
    assert request.params.bad_words == ()


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"prompt": None}, "prompt", "must be text"),
        ({"prompt": []}, "prompt", "must be text"),
        ({"prompt": [[]]}, "prompt", "must be text"),
        ({"prompt": {}}, "prompt", "must be text"),
        ({"prompt": [None]}, "prompt", "must be text"),
        ({"prompt": [[1], "a"]}, "prompt", "must be text"),
        ({"prompt": ["a", 1]}, "prompt", "must be text"),
        ({"prompt": [1.5]}, "prompt", "must be text"),
        ({"prompt": [True]}, "prompt", "must be text"),
        ({"prompt": ""}, "prompt", "prompt is empty"),
        ({"prompt": [-1]}, "prompt", "-1 is out of vocabulary, which has 288 tokens"),
        ({"prompt": [VOCAB_SIZE]}, "prompt", "288 is out of vocabulary, which has 288 tokens"),
        ({"prompt": [2**63]}, "prompt", "out of vocabulary"),
        ({"prompt": ["a"] * 10_000}, "prompt", "at most 2048"),
        ({"prompt": ["a"] * 100, "n": 100}, "n", "more than 4096 in all"),
        ({"prompt": [5] * (MAX_MODEL_LEN + 1)}, "prompt", "^This model's maximum context length is 128 tokens"),
        ({"prompt": "a" * 4_000_000}, "prompt", "^This model's maximum context length is 128 tokens"),
        ({"max_tokens": MAX_MODEL_LEN + 1}, "max_tokens", "^This model's maximum context length is 128 tokens"),
        ({"max_tokens": 2**31}, "max_tokens", "max_tokens"),
        ({"max_tokens": 0}, "max_tokens", "outside"),
        ({"min_tokens": 101}, "min_tokens", "more than max_tokens"),
        ({"n": 0}, "n", "outside"),
        ({"n": 100_000}, "n", "outside"),
        ({"best_of": 0}, "best_of", "from n=1"),
        ({"best_of": 2**70}, "best_of", "to 128"),
        ({"best_of": 1, "n": 2}, "best_of", "from n=2"),
        ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
        ({"echo": True, "logprobs": 1, "n": 2, "stream": True}, "echo", "n=1 only"),
        ({"temperature": -0.1}, "temperature", "outside"),
        ({"temperature": 2.1}, "temperature", "temperature=2.1 is outside"),
        ({"top_p": 1.1}, "top_p", "outside"),
        ({"top_k": -2}, "top_k", "outside"),
        ({"seed": 2**64}, "seed", "outside"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty", "less than 0.01"),
        ({"logprobs": -1}, "logprobs", "outside"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "outside"),
        ({"stop": ["a"] * 65}, "stop", "at most 64"),
        ({"stop": "a" * 1025}, "stop", "longer than 1024"),
        ({"stop": [""]}, "stop", "non-empty"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "out of vocabulary"),
        ({"stop_token_ids": [2**70]}, "stop_token_ids", "out of vocabulary"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024"),
        ({"bad_words": [""]}, "bad_words", "non-empty"),
        ({"bad_words": ["x"] * 1025}, "bad_words", "at most 1024"),
        ({"bad_words": ["x" * 9000] * 2}, "bad_words", "18000 characters in all, at most 16384"),
        ({"bad_words": ["\ud800"]}, "bad_words", "cannot read"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "out of vocabulary"),
        ({"logit_bias": {"abc": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {" 5 ": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"1_0": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"٥": 1}}, "logit_bias", "not a token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "out of vocabulary"),
        (
            {"logit_bias": {"5": 1, "a": 1, "": 1, "288": 1, "289": 1}},
            "logit_bias",
            "logit_bias: 'a', '' are not token ids; '288', '289' are out of vocabulary, which has 288 tokens",
        ),
        ({"logit_bias": {f"x{i}": 1 for i in range(15)}}, "logit_bias", "'x9' and 5 more are not token ids"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "outside"),
        ({"logit_bias": {str(i): 1 for i in range(2000)}}, "logit_bias", "at most 1024"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "outside"),
        ({"truncate_prompt_tokens": MAX_MODEL_LEN + 1}, "truncate_prompt_tokens", "outside"),
        ({"suffix": "x"}, "suffix", "no infill"),
    ],
)
async def test_what_cannot_be_served_is_refused_by_name(
    service: ModelService, engine: FakeEngine, fields: dict[str, Any], param: str, reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        await whole(service, **fields)
    assert caught.value.param == param
    assert engine.requests == []


async def test_a_prompt_is_cut_from_the_front_where_asked(service: ModelService, engine: FakeEngine) -> None:
    answer = await whole(service, prompt=list(range(3, 23)), truncate_prompt_tokens=4, echo=True, return_token_ids=True)

    assert list(engine.requests[0].prompt_token_ids) == [19, 20, 21, 22]
    assert answer["choices"][0]["prompt_token_ids"] == [19, 20, 21, 22]


async def test_one_prompts_fault_ends_the_whole_batch(service: ModelService, engine: FakeEngine) -> None:
    engine.fault_at = 2

    with pytest.raises(EngineError, match="gone"):
        await whole(service, prompt=["a", "b"])

    assert [stream.closed for stream in engine.streams] == [True, True]


async def test_a_refused_prompt_of_a_batch_closes_the_others(service: ModelService, engine: FakeEngine) -> None:
    submit, count = engine.submit, iter(range(9))

    def second_fails(request: Any) -> Any:
        if next(count) == 1:
            raise EngineError("gone")
        return submit(request)

    engine.submit = second_fails  # type: ignore[method-assign]

    with pytest.raises(EngineError):
        await whole(service, prompt=["a", "b", "c"])

    assert [stream.closed for stream in engine.streams] == [True]
    assert service.metrics is not None
    assert service.metrics.num_open == 0
