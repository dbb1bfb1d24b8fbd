from __future__ import annotations

from typing import Any, get_args

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from openai.types.shared import ReasoningEffort

from rayllm.api.openai.responses import ResponsesBody
from rayllm.api.protocol import NOT_SUPPORTED, WITHOUT_EFFECT, Body, ChatBody, CompletionBody, read_body
from rayllm.errors import RequestError

COMPLETION = {"model": "m", "prompt": "hi"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


@pytest.mark.parametrize(
    ("name", "near"), [("max_token", "max_tokens"), ("temprature", "temperature"), ("userr", "user"), ("tols", "tools")]
)
def test_an_unknown_field_is_named_with_the_nearest_known_one(name: str, near: str) -> None:
    with pytest.raises(RequestError, match=f"did you mean '{near}'") as caught:
        read_body({**COMPLETION, name: 1}, CompletionBody)
    assert (caught.value.param, caught.value.code) == (name, "unknown_parameter")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("extra_body", "at the top level"),
        ("sampling_params", "at the top level"),
        ("enable_thinking", "chat_template_kwargs"),
        ("thinking", "reasoning_effort"),
        ("do_sample", "temperature=0"),
        ("num_beams", "use_beam_search"),
    ],
)
def test_a_field_of_other_engines_says_what_is_meant_here(name: str, says: str) -> None:
    with pytest.raises(RequestError, match=f"unknown field '{name}': .*{says}"):
        read_body({"model": "m", "messages": [], name: {}}, ChatBody)


def test_a_field_of_the_other_endpoint_is_unknown() -> None:
    with pytest.raises(RequestError, match="'best_of'"):
        read_body({**CHAT, "best_of": 2}, ChatBody)


def test_a_huge_name_is_shown_in_part() -> None:
    with pytest.raises(RequestError) as caught:
        read_body({**COMPLETION, "k" * 1_000_000: 1}, CompletionBody)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("body", "params"),
    [
        (CompletionBody, completion_create_params.CompletionCreateParamsBase),
        (ChatBody, chat_create_params.CompletionCreateParamsBase),
        (ResponsesBody, response_create_params.ResponseCreateParamsBase),
    ],
)
def test_no_field_of_openais_is_unknown(body: type[Body], params: Any) -> None:
    known = {*body.model_fields, *body.without_effect, *body.not_supported}
    assert sorted(params.__annotations__.keys() - known) == []


def test_every_effort_of_openais_can_be_asked_for() -> None:
    for effort in get_args(get_args(ReasoningEffort)[0]):
        assert read_body({**CHAT, "reasoning_effort": effort}, ChatBody).reasoning_effort == effort


@pytest.mark.parametrize("name", sorted(WITHOUT_EFFECT))
def test_openais_fields_without_effect_are_accepted(name: str) -> None:
    assert read_body({**COMPLETION, name: {"any": "thing"}}, CompletionBody).prompt == "hi"


@pytest.mark.parametrize("name", sorted(NOT_SUPPORTED))
def test_a_field_that_is_not_supported_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    for neutral in (None, *NOT_SUPPORTED[name][0]):
        read_body({**COMPLETION, name: neutral}, CompletionBody)
    with pytest.raises(RequestError, match=name) as caught:
        read_body({**COMPLETION, name: {"type": "something"}}, CompletionBody)
    assert (caught.value.param, caught.value.code) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "abc"),
        ("temperature", []),
        ("temperature", True),
        ("n", 1.5),
        ("n", True),
        ("n", "1"),
        ("stream", "yes"),
        ("stream", 1),
        ("stop", 1),
        ("stop", {}),
        ("stop", ["a", 1]),
        ("stop_token_ids", "x"),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", [True]),
        ("bad_words", "word"),
        ("bad_words", [1]),
        ("logit_bias", [1]),
        ("logit_bias", {"1": None}),
        ("stream_options", {"include_usage": "maybe"}),
        ("stream_options", {"includeUsage": True}),
        ("logprobs", []),
        ("model", None),
        ("model", []),
        ("cache_salt", 5),
    ],
)
def test_a_value_of_the_wrong_type_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"^{field}: .*, got ") as caught:
        read_body({**COMPLETION, field: value}, CompletionBody)
    assert caught.value.param == field


def test_null_means_not_given() -> None:
    fields = {name: None for name in CompletionBody.model_fields if name not in COMPLETION}

    assert read_body({**COMPLETION, **fields}, CompletionBody) == read_body(COMPLETION, CompletionBody)


def test_a_missing_field_is_named() -> None:
    for body, missing in (({"prompt": "x"}, "model"), ({"model": "m"}, "prompt")):
        with pytest.raises(RequestError, match=f"^{missing} is required$") as caught:
            read_body(body, CompletionBody)
        assert caught.value.param == missing


SHARED_FIELDS = {
    "add_special_tokens", "allowed_token_ids", "bad_words", "cache_salt", "frequency_penalty", "guided_choice",
    "guided_grammar", "guided_json", "guided_regex", "ignore_eos", "include_stop_str_in_output", "length_penalty",
    "logit_bias", "logprob_token_ids", "max_tokens", "min_p", "min_tokens", "model", "n", "presence_penalty",
    "priority", "prompt_logprobs", "repetition_penalty", "response_format", "return_token_ids",
    "return_tokens_as_token_ids", "seed", "skip_special_tokens", "stop", "stop_token_ids", "stream", "stream_options",
    "structured_outputs", "temperature", "timeout", "top_k", "top_p", "truncate_prompt_tokens", "truncation_side",
    "use_beam_search",
}  # fmt: skip
CHAT_FIELDS = {
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message", "documents", "echo",
    "include_reasoning", "logprobs",
    "max_completion_tokens", "messages", "parallel_tool_calls", "reasoning_effort", "tool_choice", "tools",
    "return_prompt_text", "top_logprobs", "verbosity",
}  # fmt: skip


def test_the_fields_are_these() -> None:
    """Frozen lists: a new name is a decision."""
    assert set(CompletionBody.model_fields) == SHARED_FIELDS | {"best_of", "echo", "logprobs", "prompt"}
    assert set(ChatBody.model_fields) == SHARED_FIELDS | CHAT_FIELDS
