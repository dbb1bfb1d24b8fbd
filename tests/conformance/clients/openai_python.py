"""The `openai` package: chats, streams, structured answers, tools, responses, completions, errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

MODEL = os.environ["CONFORMANCE_MODEL"]
MESSAGES: Any = [{"role": "user", "content": "Say hello."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


class Step(BaseModel):
    explanation: str
    output: str


class Solution(BaseModel):
    steps: list[Step]
    answer: int
    mood: Literal["sure", "unsure"]


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    url = os.environ["CONFORMANCE_URL"] + "/v1"
    with openai.OpenAI(base_url=url, api_key=os.environ["CONFORMANCE_KEY"], max_retries=0, timeout=60) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=8, n=2, seed=1, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].bytes is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def test_stream_helper_collects_what_a_whole_answer_says(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": MESSAGES, "max_completion_tokens": 16, "seed": 5}
    whole = client.chat.completions.create(**fields)
    with client.chat.completions.stream(**fields, stream_options={"include_usage": True}) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == (final.choices[0].message.content or "") == (whole.choices[0].message.content or "")
    assert final.choices[0].finish_reason == whole.choices[0].finish_reason
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_parse_gives_an_object_of_the_class(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Solution, seed=2)
    solution = answer.choices[0].message.parsed
    assert isinstance(solution, Solution)
    assert solution.mood in ("sure", "unsure")


def test_json_mode(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, seed=3
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_tool_is_called_with_arguments_of_its_schema(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice=choice, seed=4)
    [call] = answer.choices[0].message.tool_calls[:1]
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert sorted(arguments) == ["city", "unit"]
    assert arguments["unit"] in ("C", "F")

    again = client.chat.completions.create(
        model=MODEL,
        messages=[
            *MESSAGES,
            answer.choices[0].message,
            *({"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in answer.choices[0].message.tool_calls),
        ],
        tools=[WEATHER],
        max_completion_tokens=8,
    )
    assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")


def test_streamed_arguments_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    fields: Any = {"model": MODEL, "messages": MESSAGES, "tools": [WEATHER], "tool_choice": "required", "seed": 6}
    whole = client.chat.completions.create(**fields, parallel_tool_calls=False)
    name, arguments, call_ids = "", "", set()
    for chunk in client.chat.completions.create(**fields, parallel_tool_calls=False, stream=True):
        for choice in chunk.choices:
            for call in choice.delta.tool_calls or ():
                call_ids |= {call.id} - {None}
                name += call.function.name or ""
                arguments += call.function.arguments or ""
    [call] = whole.choices[0].message.tool_calls
    assert (name, arguments, len(call_ids)) == (call.function.name, call.function.arguments, 1)


def test_parsed_tools(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL,
        messages=MESSAGES,
        tools=[openai.pydantic_function_tool(Solution, name="solve")],
        tool_choice="required",
        parallel_tool_calls=False,
        seed=8,
    )
    assert isinstance(answer.choices[0].message.tool_calls[0].function.parsed_arguments, Solution)


def test_responses(client: openai.OpenAI) -> None:
    asked: Any = {"model": MODEL, "instructions": "Be short.", "max_output_tokens": 16}
    answer = client.responses.create(**asked, input="Say hello.")
    assert answer.object == "response"
    assert answer.status in ("completed", "incomplete")
    assert answer.usage.output_tokens > 0
    assert isinstance(answer.output_text, str)

    assert client.responses.retrieve(answer.id).output_text == answer.output_text
    following = client.responses.create(**asked, input="And again.", previous_response_id=answer.id)
    assert following.usage.input_tokens > answer.usage.input_tokens
    client.responses.delete(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_response_events_come_in_order(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=12, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == events[-1].response.output_text


def test_parsed_response(client: openai.OpenAI) -> None:
    answer = client.responses.parse(model=MODEL, input="Solve it.", text_format=Solution)
    assert isinstance(answer.output_parsed, Solution)


def test_response_with_a_tool(client: openai.OpenAI) -> None:
    tool = {"type": "function", "strict": True, **WEATHER["function"]}
    first = client.responses.create(model=MODEL, input="The weather?", tools=[tool], tool_choice="required")
    [call] = [item for item in first.output if item.type == "function_call"][:1]
    assert json.loads(call.arguments)["unit"] in ("C", "F")
    answers = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
        if item.type == "function_call"
    ]
    second = client.responses.create(
        model=MODEL, previous_response_id=first.id, input=answers, tools=[tool], max_output_tokens=8
    )
    assert second.status in ("completed", "incomplete")


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b"], n=2, best_of=3, max_tokens=5, logprobs=2, echo=True, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text.startswith("a")
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs)
    pieces = client.completions.create(model=MODEL, prompt=[3, 4, 5], max_tokens=5, stream=True, seed=1)
    assert sum(len(piece.choices) for piece in pieces) > 0


def test_models(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).object == "model"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_completion_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model=MODEL, input="a text")


async def _collect(client: openai.AsyncOpenAI) -> str:
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=6, seed=1, stream=True)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])


def test_many_asynchronous_streams_agree() -> None:
    import asyncio

    async def ask() -> list[str]:
        url = os.environ["CONFORMANCE_URL"] + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key=os.environ["CONFORMANCE_KEY"]) as client:
            return await asyncio.gather(*(_collect(client) for _ in range(8)))

    assert len(set(asyncio.run(ask()))) == 1
