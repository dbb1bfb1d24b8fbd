"""vLLM's fields of chats and completions, with a real model where its numbers matter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api.conftest import ANSWER
from api.fake_engine import FakeEngine, config
from api.inproc_engine import InprocClient
from api.streams import chunks_of, whole_of

from rayllm.api.openai.chat import open_chat
from rayllm.api.openai.completions import open_completion
from rayllm.api.protocol import NOT_SUPPORTED, ChatBody, CompletionBody, read_body
from rayllm.api.service import ModelService
from rayllm.config import EngineConfig
from rayllm.errors import RequestError
from rayllm.text.tokenizer import Tokenizer

CONTINUED = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I say "}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "hi", "max_tokens": 100, **fields}


def served(engine: FakeEngine, tokenizer: Tokenizer, **settings: Any) -> ModelService:
    service = ModelService()
    service.set_ready(config(engine=EngineConfig(**settings)), tokenizer, engine)
    return service


@pytest.fixture(scope="module")
def client(llama_path: Path) -> Iterator[InprocClient]:
    client = InprocClient(str(llama_path))
    yield client
    client.engine.close()


@pytest.fixture
def real(client: InprocClient, llama_path: Path) -> ModelService:
    """A real model whose requests may ask for the whole vocabulary."""
    service, tokenizer = ModelService(), Tokenizer.from_path(str(llama_path))
    limits = client.config.engine.model_copy(update={"max_logprobs": -1})
    service.set_ready(client.config.model_copy(update={"engine": limits}), tokenizer, client)
    return service


def named(service: ModelService, body: dict[str, Any]) -> dict[str, Any]:
    return {**body, "model": service.model().name}


async def test_minus_one_is_the_whole_vocabulary(real: ModelService) -> None:
    fields = {"max_tokens": 2, "prompt_logprobs": -1, "return_tokens_as_token_ids": True}
    a_chat = await whole_of(await open_chat(named(real, chat(logprobs=True, top_logprobs=-1, **fields)), real))
    text = await whole_of(await open_completion(named(real, completion(logprobs=-1, **fields)), real))

    size = real.model().vocab_size
    assert [len(entry["top_logprobs"]) for entry in a_chat["choices"][0]["logprobs"]["content"]] == [size, size]
    assert {len(position) for position in a_chat["prompt_logprobs"][1:]} == {size}
    assert [len(top) for top in text["choices"][0]["logprobs"]["top_logprobs"]] == [size, size]
    assert len(text["choices"][0]["prompt_logprobs"][1]) == size


async def test_listed_tokens_are_told_with_the_one_that_was_drawn(real: ModelService) -> None:
    fields = {
        "max_tokens": 1,
        "logprob_token_ids": [9, 7],
        "allowed_token_ids": [5],
        "return_tokens_as_token_ids": True,
    }
    a_chat = await whole_of(await open_chat(named(real, chat(logprobs=True, top_logprobs=3, **fields)), real))
    text = await whole_of(await open_completion(named(real, completion(logprobs=3, **fields)), real))

    [entry] = a_chat["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "token_id:5"
    assert [top["token"] for top in entry["top_logprobs"]] == ["token_id:5", "token_id:9", "token_id:7"]
    [top] = text["choices"][0]["logprobs"]["top_logprobs"]
    assert set(top) == {"token_id:5", "token_id:9", "token_id:7"}


async def test_an_operators_limit_of_logprobs_holds(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    service = served(engine, tokenizer, max_logprobs=25)
    await whole_of(await open_completion(completion(logprobs=25), service))
    for fields, param in (({"logprobs": 26}, "logprobs"), ({"prompt_logprobs": -1}, "prompt_logprobs")):
        with pytest.raises(RequestError, match="--max-logprobs") as caught:
            await open_completion(completion(**fields), service)
        assert caught.value.param == param


@pytest.mark.parametrize(
    "fields",
    [
        {"logprob_token_ids": [3]},
        {"logprobs": 1, "logprob_token_ids": [2**20]},
        {"logprobs": 1, "logprob_token_ids": [-1]},
        {"logprobs": 1, "logprob_token_ids": []},
        {"logprobs": 1, "logprob_token_ids": [3, 3]},
        {"logprobs": 1, "logprob_token_ids": list(range(129))},
    ],
)
async def test_wrong_lists_of_tokens_are_refused(service: ModelService, fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        await open_completion(completion(**fields), service)
    assert caught.value.param == "logprob_token_ids"


async def test_echo_begins_the_answer_with_the_message_that_it_continues(service: ModelService) -> None:
    fields = chat(messages=CONTINUED, echo=True, continue_final_message=True, add_generation_prompt=False)
    whole = await whole_of(await open_chat(fields, service))
    chunks = await chunks_of(await open_chat({**fields, "stream": True}, service))

    assert whole["choices"][0]["message"]["content"] == f"I say {ANSWER}"
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == f"I say {ANSWER}"


async def test_echo_never_begins_with_what_the_user_said(service: ModelService) -> None:
    whole = await whole_of(await open_chat(chat(echo=True), service))
    assert whole["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(("side", "kept"), [("left", [5, 6]), ("right", [3, 4]), (None, [5, 6])])
async def test_the_prompt_is_cut_where_the_client_says(
    service: ModelService, side: str | None, kept: list[int]
) -> None:
    fields = completion(prompt=[3, 4, 5, 6], truncate_prompt_tokens=2, truncation_side=side, return_token_ids=True)
    whole = await whole_of(await open_completion(fields, service))
    assert whole["choices"][0]["prompt_token_ids"] == kept


async def test_tokens_are_written_as_ids_where_the_request_or_the_operator_wants_it(
    service: ModelService, engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    ids = [f"token_id:{token_id}" for token_id in tokenizer.encode(ANSWER)]
    operators = served(engine, tokenizer, return_tokens_as_token_ids=True)
    for where, fields, as_ids in (
        (service, {"return_tokens_as_token_ids": True}, True),
        (operators, {}, True),
        (operators, {"return_tokens_as_token_ids": False}, False),
    ):
        text = await whole_of(await open_completion(completion(logprobs=0, **fields), where))
        a_chat = await whole_of(await open_chat(chat(logprobs=True, **fields), where))
        assert (text["choices"][0]["logprobs"]["tokens"][:-1] == ids) == as_ids
        told = [entry["token"] for entry in a_chat["choices"][0]["logprobs"]["content"]]
        assert (told[:-1] == ids) == as_ids


async def test_metrics_of_a_request_are_told_with_its_usage(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    service = served(engine, tokenizer, enable_per_request_metrics=True, enable_force_include_usage=True)
    whole = await whole_of(await open_chat(chat(), service))
    *before, last = await chunks_of(await open_chat(chat(stream=True), service))
    several = await whole_of(await open_completion(completion(n=2), service))
    one_token = await whole_of(await open_completion(completion(max_tokens=1), service))

    for told in (whole["metrics"], last["metrics"]):
        assert (told["queue_time_ms"], told["time_to_first_token_ms"]) == (250, 500)  # as the fake driver says
        num_tokens = whole["usage"]["completion_tokens"]
        assert told["mean_itl_ms"] == pytest.approx(told["generation_time_ms"] / (num_tokens - 1))
        assert told["tokens_per_second"] == pytest.approx(num_tokens / (0.5 + told["generation_time_ms"] / 1000))
    assert last["usage"]
    assert not any("metrics" in chunk for chunk in before)
    assert all(chunk["usage"]["prompt_tokens"] for chunk in before)  # an operator's wish is for every chunk
    assert several["metrics"] is None
    assert "mean_itl_ms" not in one_token["metrics"]


async def test_no_metrics_are_told_unasked(service: ModelService) -> None:
    assert "metrics" not in await whole_of(await open_chat(chat(), service))


async def test_the_prompt_can_be_shown_as_the_template_wrote_it(service: ModelService, tokenizer: Tokenizer) -> None:
    fields = chat(messages=[{"role": "user", "content": "a <|im_end|> b"}], return_prompt_text=True)
    whole = await whole_of(await open_chat(fields, service))
    first, *rest = await chunks_of(await open_chat({**fields, "stream": True}, service))

    assert whole["prompt_text"] == tokenizer.render_chat(fields["messages"])
    assert first["prompt_text"] == whole["prompt_text"]
    assert not any("prompt_text" in chunk for chunk in rest)


async def test_documents_reach_the_template(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    template = "{% for d in documents %}{{ d.text }};{% endfor %}{{ messages[0].content }}"
    service = served(engine, tokenizer.with_template(template))
    fields = chat(documents=[{"text": "one"}, {"text": "two"}], return_prompt_text=True)
    assert (await whole_of(await open_chat(fields, service)))["prompt_text"] == "one;two;hi"


async def test_reasoning_is_told_unless_the_client_does_not_want_it(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.say = lambda request, choice: [*tokenizer.encode("<think>hm</think>yes"), 2]
    service = served(engine, tokenizer, reasoning_parser="qwen3")
    shown = await whole_of(await open_chat(chat(), service))
    hidden = await whole_of(await open_chat(chat(include_reasoning=False), service))
    chunks = await chunks_of(await open_chat(chat(include_reasoning=False, stream=True), service))

    assert shown["choices"][0]["message"]["reasoning"] == "hm"
    assert "reasoning" not in hidden["choices"][0]["message"]
    assert hidden["choices"][0]["message"]["content"] == "yes"
    assert hidden["usage"] == shown["usage"]
    assert not any("reasoning" in choice["delta"] for chunk in chunks for choice in chunk["choices"])


CHATS = """
    messages model frequency_penalty logit_bias logprobs top_logprobs max_tokens max_completion_tokens n
    presence_penalty response_format seed stop stream stream_options temperature top_p tools tool_choice
    reasoning_effort thinking_token_budget include_reasoning parallel_tool_calls user use_beam_search top_k min_p
    repetition_penalty watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs
    logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens
    documents chat_template chat_template_kwargs media_io_kwargs mm_processor_kwargs structured_outputs priority
    request_id session_id return_tokens_as_token_ids return_token_ids return_weight_versions
    routed_experts_prompt_start return_token_offsets return_prompt_text mm_payload return_mm_kwargs cache_salt
    kv_transfer_params ec_transfer_params vllm_xargs repetition_detection stream_interval
"""
COMPLETIONS = """
    model prompt echo suffix prompt_embeds frequency_penalty logit_bias logprobs max_tokens n presence_penalty seed stop
    stream stream_options temperature top_p user thinking_token_budget use_beam_search truncation_side session_id
"""


@pytest.mark.parametrize(("names", "model"), [(CHATS, ChatBody), (COMPLETIONS, CompletionBody)])
def test_every_field_of_vllms_is_followed_without_effect_or_refused_in_words(names: str, model: Any) -> None:
    for name in names.split():
        known = name in model.model_fields or name in model.without_effect
        assert known != (name in NOT_SUPPORTED and name not in model.model_fields), name


@pytest.mark.parametrize("name", ["watermarking", "request_id", "kv_transfer_params", "stream_interval"])
def test_a_field_that_is_not_supported_is_refused_but_for_what_asks_for_nothing(name: str) -> None:
    for neutral in (None, *NOT_SUPPORTED[name][0]):
        read_body(chat(**{name: neutral}), ChatBody)
    with pytest.raises(RequestError) as caught:
        read_body(chat(**{name: "something"}), ChatBody)
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


def test_all_names_of_a_model_are_its_own(service: ModelService) -> None:
    model = replace(service.model(), config=config(served_model_aliases=("second",)))
    assert model.names == ("tiny", "second")


async def test_usage_that_goes_with_each_chunk_begins_with_no_token(service: ModelService) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    first, second, *_ = await chunks_of(await open_chat(chat(stream=True, stream_options=options), service))
    counts = [chunk["usage"]["completion_tokens"] for chunk in (first, second)]
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert counts == [0, 1]
    assert first["usage"]["total_tokens"] == first["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize("opens", [open_chat, open_completion])
async def test_where_each_chunk_has_usage_each_counts_more_tokens(service: ModelService, opens: Any) -> None:
    body = (chat if opens is open_chat else completion)(max_tokens=3, stream=True)
    counted = {"include_usage": True, "continuous_usage_stats": True}
    *told, closing = await chunks_of(await opens({**body, "stream_options": counted}, service))
    counts = [chunk["usage"]["completion_tokens"] for chunk in told]
    assert counts == sorted(set(counts))
    assert closing["usage"]["completion_tokens"] == counts[-1] == 3
    last = told[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("length", None)
    assert last["delta"]["content"] if opens is open_chat else last["text"]

    *_, alone = await chunks_of(await opens(body, service))
    last = alone["choices"][0]
    assert (last["finish_reason"], last.get("delta", {}), last.get("text", "")) == ("length", {}, "")


async def test_where_each_chunk_has_usage_an_answer_without_text_still_ends(
    engine: FakeEngine, tokenizer: Tokenizer
) -> None:
    engine.say = lambda request, choice: [tokenizer.eos_token_id or 0]
    service = served(engine, tokenizer, enable_force_include_usage=True)
    role, end, closing = await chunks_of(await open_chat(chat(stream=True), service))
    assert role["choices"][0]["delta"]["role"] == "assistant"
    assert end["choices"][0]["finish_reason"] == "stop"
    assert [chunk["usage"]["completion_tokens"] for chunk in (role, end, closing)] == [0, 1, 1]
