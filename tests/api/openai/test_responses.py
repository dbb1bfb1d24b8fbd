"""OpenAI's responses: bodies, items, events, what is kept. All that is said is checked against the client's types."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api.conftest import ANSWER
from api.fake_engine import FakeEngine
from api.streams import typed_events
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from rayllm.api.openai.response_store import ResponseStore, StoredResponse
from rayllm.api.openai.responses import OpenedResponse, open_response
from rayllm.api.openai.responses_answer import OutputItems
from rayllm.api.openai.responses_items import chat_messages, chat_tool_choice, chat_tools, read_input, read_tools
from rayllm.api.openai.stored_responses import cancelled, deleted, input_items, starting_after
from rayllm.api.service import ModelService
from rayllm.errors import RequestError
from rayllm.parsing.events import Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
def store() -> ResponseStore:
    return ResponseStore()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "input": "hi", **fields}


async def whole_of(opened: OpenedResponse) -> dict[str, Any]:
    try:
        whole = json.loads(json.dumps(await opened.answer.whole()))
    finally:
        opened.answer.close()
    Response.model_validate(whole)
    return dict(whole)


async def events_of(opened: OpenedResponse) -> list[dict[str, Any]]:
    """The events, each as the client's types want it, numbered from 0."""
    try:
        events = typed_events(b"".join([piece async for piece in opened.answer.stream()]))
    finally:
        opened.answer.close()
    for number, event in enumerate(events):
        EVENT.validate_python(event)
        assert event["sequence_number"] == number
    return events


def prompt_of(service: ModelService, engine: FakeEngine) -> str:
    return service.model().tokenizer.decode(engine.requests[-1].prompt_token_ids, False)


async def test_an_answer_is_whole(service: ModelService, engine: FakeEngine, store: ResponseStore) -> None:
    engine.num_cached_tokens = 8
    fields = body(instructions="be brief", temperature=0.5, top_k=3, max_output_tokens=50, metadata={"a": "b"})
    fields["bad_words"] = ["never"]
    whole = await whole_of(await open_response(fields, service, store))

    assert whole["id"].startswith("resp_")
    assert whole["status"] == "completed"
    assert whole["output"][0]["content"][0]["text"] == ANSWER
    assert (whole["temperature"], whole["top_p"], whole["metadata"]) == (0.5, 1.0, {"a": "b"})
    assert (whole["tool_choice"], whole["tools"], whole["parallel_tool_calls"]) == ("auto", [], True)
    usage, num_prompt = whole["usage"], len(engine.requests[0].prompt_token_ids)
    assert usage["input_tokens"] == num_prompt
    assert usage["input_tokens_details"]["cached_tokens"] == 8
    assert usage["total_tokens"] == num_prompt + usage["output_tokens"]
    assert "be brief" in prompt_of(service, engine)
    assert len(engine.requests[0].params.bad_words_token_ids) == 2
    assert store.get("", whole["id"]).response["output"] == whole["output"]


async def test_a_stream_has_openais_events_in_their_order(service: ModelService, store: ResponseStore) -> None:
    events = await events_of(await open_response(body(stream=True), service, store))

    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert "".join(event["delta"] for event in events[4:-4]) == ANSWER == events[-4]["text"]
    assert events[0]["response"]["status"] == "in_progress"
    assert events[0]["response"]["output"] == []
    assert events[-1]["response"]["output"] == [events[-2]["item"]]


async def test_a_limit_makes_it_incomplete(service: ModelService, store: ResponseStore) -> None:
    whole = await whole_of(await open_response(body(max_output_tokens=2), service, store))
    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert whole["output"][0]["status"] == "incomplete"

    events = await events_of(await open_response(body(max_output_tokens=2, stream=True), service, store))
    assert events[-1]["type"] == "response.incomplete"


async def test_logprobs_are_given_where_they_are_asked_for(service: ModelService, store: ResponseStore) -> None:
    fields = body(include=["message.output_text.logprobs"], top_logprobs=2)
    whole = await whole_of(await open_response(fields, service, store))
    events = await events_of(await open_response({**fields, "stream": True}, service, store))

    logprobs = whole["output"][0]["content"][0]["logprobs"]
    assert len(logprobs) == whole["usage"]["output_tokens"]
    assert len(logprobs[0]["top_logprobs"]) == 2
    told = [entry for event in events if event["type"].endswith("text.delta") for entry in event["logprobs"]]
    assert told == logprobs[:-1]  # the end of sequence has no text
    assert events[-1]["response"]["output"][0]["content"] == whole["output"][0]["content"]


async def test_a_fault_inside_a_stream_is_told_and_kept(
    service: ModelService, engine: FakeEngine, store: ResponseStore
) -> None:
    engine.fault_at = 3
    events = await events_of(await open_response(body(stream=True), service, store))

    assert [event["type"] for event in events[-2:]] == ["error", "response.failed"]
    response = events[-1]["response"]
    assert response["error"]["code"] == "server_error"
    assert response["output"][0]["status"] == "incomplete"
    assert store.get("", response["id"]).response["status"] == "failed"


async def test_a_response_goes_on_from_the_one_before(
    service: ModelService, engine: FakeEngine, store: ResponseStore
) -> None:
    first = await whole_of(await open_response(body(instructions="once"), service, store))
    second = await whole_of(await open_response(body(input="and?", previous_response_id=first["id"]), service, store))
    prompt = prompt_of(service, engine)
    assert prompt.index("hi") < prompt.index(ANSWER) < prompt.index("and?")
    assert "once" not in prompt
    page = input_items(store, "", second["id"], {"order": "asc", "limit": "2"})
    assert [item["content"][0]["text"] for item in page["data"]] == ["hi", ANSWER]
    assert page["has_more"] is True
    rest = input_items(store, "", second["id"], {"order": "asc", "after": page["last_id"]})
    assert [item["content"][0]["text"] for item in rest["data"]] == ["and?"]

    with pytest.raises(RequestError) as caught:
        await open_response(body(previous_response_id=first["id"]), service, store, "another key")
    assert caught.value.code == "previous_response_not_found"
    assert deleted(store, "", first["id"])["deleted"] is True
    with pytest.raises(RequestError, match=r"Response with id 'resp_.*' not found\."):
        store.get("", first["id"])


async def test_a_stored_item_can_be_referred_to(
    service: ModelService, engine: FakeEngine, store: ResponseStore
) -> None:
    first = await whole_of(await open_response(body(), service, store))
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    await whole_of(await open_response(body(input=[reference, {"role": "user", "content": "go on"}]), service, store))
    assert ANSWER in prompt_of(service, engine)


async def test_what_is_not_to_be_stored_is_not(service: ModelService, store: ResponseStore) -> None:
    whole = await whole_of(await open_response(body(store=False), service, store))
    with pytest.raises(RequestError):
        store.get("", whole["id"])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_holds_the_raw_prompt_and_answer_where_they_are_asked_for(
    service: ModelService, engine: FakeEngine, store: ResponseStore, stream: bool
) -> None:
    opened = await open_response(body(enable_response_messages=True, stream=stream), service, store)
    if stream:
        first, *_, last = await events_of(opened)
        assert first["response"]["output_messages"] == []
        whole = last["response"]
    else:
        whole = await whole_of(opened)

    [read], [written] = whole["input_messages"], whole["output_messages"]
    assert read == {
        "type": "raw_message_tokens",
        "message": prompt_of(service, engine),
        "tokens": list(engine.requests[0].prompt_token_ids),
    }
    assert written["message"].startswith(ANSWER)
    assert len(written["tokens"]) == whole["usage"]["output_tokens"]
    assert "input_messages" not in await whole_of(await open_response(body(), service, store))


async def test_a_response_in_the_background_can_be_cancelled(
    service: ModelService, engine: FakeEngine, store: ResponseStore
) -> None:
    engine.stall_at = 2
    opened = await open_response(body(background=True), service, store)
    assert opened.stored is not None
    assert opened.answer.response["status"] == "queued"
    last: list[bytes] = []
    opened.stored.cancel = lambda: last.append(opened.answer.cancel())

    assert cancelled(store, "", opened.answer.id)["status"] == "cancelled"
    assert engine.streams[0].closed
    assert EVENT.validate_python(typed_events(last[0])[0]).code == "response_cancelled"


async def test_only_background_responses_can_be_cancelled(service: ModelService, store: ResponseStore) -> None:
    whole = await whole_of(await open_response(body(), service, store))
    with pytest.raises(RequestError, match="Cannot cancel a synchronous response"):
        cancelled(store, "", whole["id"])


async def test_truncation_leaves_out_the_oldest_turns(
    service: ModelService, engine: FakeEngine, store: ResponseStore
) -> None:
    turns = [{"role": "system", "content": "RULE"}]
    turns += [{"role": "user", "content": f"turn{i} " + "x" * 20} for i in range(12)]
    with pytest.raises(RequestError) as caught:
        await open_response(body(input=turns, max_output_tokens=5), service, store)
    assert caught.value.code == "context_length_exceeded"

    await whole_of(await open_response(body(input=turns, max_output_tokens=5, truncation="auto"), service, store))
    prompt = prompt_of(service, engine)
    assert "RULE" in prompt
    assert "turn11" in prompt
    assert "turn0 " not in prompt


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "empty"),
        ({"input": 5}, "input", "text or a list"),
        ({"input": [{"type": "web_search_call"}]}, "input", "web_search_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "input_image"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input", "call_id"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "no item 'x'"),
        ({"input": [{"type": ["x"], "role": "user"}]}, "input", "type"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"max_output_token": 5}, "max_output_token", "did you mean 'max_output_tokens'"),
        ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
        ({"max_output_tokens": 10_000}, "max_output_tokens", "maximum context length"),
        ({"temperature": 101}, "temperature", "outside"),
        ({"tools": [{"type": "web_search"}]}, "tools", "web_search"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "file_search"),
        ({"include": ["x"]}, "include", "unknown"),
        ({"truncation": "some"}, "truncation", "auto or disabled"),
        ({"background": True, "store": False}, "background", "background can only be used when `store` is true"),
        ({"conversation": "c"}, "conversation", "previous_response_id"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "512"),
        ({"text": {"format": {"type": "x"}}}, "text.format", "text.format: type must be"),
        ({"text": {"verbosity": "x"}}, "text.verbosity", "text.verbosity: "),
        ({"reasoning": {"effort": "x"}}, "reasoning.effort", "reasoning.effort: "),
        ({"text": {"formats": {}}}, "text", "'format'"),
        ({"reasoning": {"efort": "low"}}, "reasoning", "'effort'"),
        ({"stream_options": {}}, "stream_options", "stream=true"),
        ({"top_logprobs": 21}, "top_logprobs", "20"),
        ({"previous_response_id": "x"}, "previous_response_id", "Response with id 'x' not found."),
    ],
)
async def test_what_cannot_be_served_names_its_field(
    service: ModelService, store: ResponseStore, fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError) as caught:
        await open_response(body(**fields), service, store)
    assert caught.value.param == param
    assert words in caught.value.message


def test_items_become_the_messages_of_a_chat() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}", "status": "completed"}
    items = read_input(
        [
            {"role": "developer", "content": [{"type": "input_text", "text": "be kind"}]},
            {"role": "user", "content": "weather?"},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {
                "type": "message",
                "id": "m1",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "I look."}],
            },
            call,
            {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "rain"}]},
        ]
    )
    assert all(item["id"] for item in items)

    function = {"name": "look", "arguments": "{}"}
    assert chat_messages("be brief", items) == [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": "weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
    ]


def test_tools_and_choices_become_those_of_a_chat() -> None:
    tools = read_tools([{"type": "function", "name": "f", "parameters": {"type": "object"}}])
    assert chat_tools(tools) == [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    named = {"type": "function", "function": {"name": "f"}}
    assert chat_tool_choice({"type": "function", "name": "f"}) == named
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    assert chat_tool_choice(allowed) == {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [named]},
    }


def test_thoughts_text_and_calls_become_items() -> None:
    output = OutputItems("resp_x")
    pieces = [
        Reasoning("h"),
        Reasoning("m"),
        Text("so"),
        ToolCallBegin(0, "c1", "look"),
        ToolCallArguments(0, '{"a":'),
        ToolCallArguments(0, "1}"),
        ToolCallEnd(0),
    ]
    events = [event for piece in pieces for event in output.take(piece)]
    for number, event in enumerate(events):
        EVENT.validate_python({**json.loads(json.dumps(event)), "sequence_number": number})

    assert [(event["output_index"], event["type"].removeprefix("response.")) for event in events] == [
        (0, "output_item.added"),
        (0, "content_part.added"),
        (0, "reasoning_text.delta"),
        (0, "reasoning_text.delta"),
        (0, "reasoning_text.done"),
        (0, "content_part.done"),
        (0, "output_item.done"),
        (1, "output_item.added"),
        (1, "content_part.added"),
        (1, "output_text.delta"),
        (1, "output_text.done"),
        (1, "content_part.done"),
        (1, "output_item.done"),
        (2, "output_item.added"),
        (2, "function_call_arguments.delta"),
        (2, "function_call_arguments.delta"),
        (2, "function_call_arguments.done"),
        (2, "output_item.done"),
    ]
    assert [item["type"] for item in output.items] == ["reasoning", "message", "function_call"]
    assert output.items[2]["arguments"] == '{"a":1}'


def stored(number: int, status: str = "completed", text: str = "") -> StoredResponse:
    return StoredResponse("", {"id": f"r{number}", "status": status, "output": [], "text": text}, [])


def test_the_oldest_that_have_ended_are_let_go() -> None:
    gone: list[str] = []
    store = ResponseStore(lambda found: gone.append(found.key[1]), max_responses=2, max_bytes=10_000)
    for found in (stored(0, "in_progress"), stored(1), stored(2)):
        store.add(found)
    assert gone == ["r1"]
    store.add(stored(3, text="x" * 9990))
    assert gone == ["r1", "r2", "r3"]

    old = ResponseStore(max_age_s=0)
    old.add(stored(1))
    with pytest.raises(RequestError):
        old.get("", "r1")


@pytest.mark.parametrize(("text", "num_seen"), [(None, 0), ("0", 1), ("41", 42)])
def test_events_already_seen_are_counted(text: str | None, num_seen: int) -> None:
    assert starting_after({} if text is None else {"starting_after": text}) == num_seen


@pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "x"}, {"order": "up"}, {"after": "x"}])
def test_pages_are_asked_for_rightly(query: dict[str, str]) -> None:
    store = ResponseStore()
    store.add(stored(1))
    with pytest.raises(RequestError):
        input_items(store, "", "r1", query)
