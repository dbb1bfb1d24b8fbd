"""`/v1/responses`: bodies to chats, and what is kept of them for later requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, FiniteFloat, WithJsonSchema

from rayllm.api import resume_context
from rayllm.api.answer import created_s
from rayllm.api.offload import offload
from rayllm.api.openai.chat import PreparedChat, prepare_chat
from rayllm.api.openai.response_store import ResponseStore, StoredResponse
from rayllm.api.openai.responses_answer import ResponseAnswer, raw_message
from rayllm.api.openai.responses_items import chat_messages, chat_tool_choice, chat_tools, read_input, read_tools
from rayllm.api.protocol import (
    NOT_SUPPORTED,
    ChatBody,
    Objects,
    SamplingFields,
    StopStrings,
    StreamOptions,
    TokenIds,
    check_names,
    read_body,
)
from rayllm.api.service import ModelService, ServedModel
from rayllm.errors import ContextLengthError, RequestError, shorten
from rayllm.prompt.requests import named_as
from rayllm.request import SamplingParams
from rayllm.request.checks import resolve_logprobs

MAX_METADATA = 16
_LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = (
    _LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
"""The first is given where it is asked for; of the others there is nothing to give."""
_ECHOED = ("user", "safety_identifier", "prompt_cache_key")
"""Fields that are given back, where they were given."""
_AS_IN_A_CHAT = (
    "stop",
    "structured_outputs",
    "logit_bias",
    "include_stop_str_in_output",
    "skip_special_tokens",
    "allowed_token_ids",
    "truncate_prompt_tokens",
    "truncation_side",
    "add_special_tokens",
    "include_reasoning",
    "documents",
)
"""vLLM's fields that a chat has under the same name."""
_PARAMS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "verbosity": "text.verbosity",
}
"""A chat's field and the one that it came from."""


def _input(value: Any) -> Any:
    if isinstance(value, (str, list)):
        return value
    raise ValueError("Input should be text or a list of items")


def _tool_choice(value: Any) -> Any:
    if value is None or isinstance(value, (str, dict)):
        return value
    raise ValueError("Input should be none, auto, required or an object")


_NOT_IN_A_CHAT = (
    "spaces_between_special_tokens",
    "thinking_token_budget",
    "watermarking",
    "request_id",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
)
"""vLLM's fields that a chat refuses too, by the same words."""


class ResponsesBody(SamplingFields):
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "service_tier",
            "prompt_cache_options",
            "prompt_cache_retention",
            "max_tool_calls",  # of tools that a server runs
            # vLLM's
            "session_id",
            "mm_payload",
            "return_mm_kwargs",
        }
    )
    not_supported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "conversation": ((), "is not supported; give previous_response_id, or all items as input"),
        "prompt": ((), "is not supported: this server keeps no prompt templates"),
        "context_management": (([],), "is not supported"),
        "moderation": ((), "is not supported"),
        "access_programs": ((), "is not supported"),
        "background_options": ((), "is not supported"),
        "image": ((), "is not supported: this server writes text"),
        "messages": ((), "is called input here"),
        "max_tokens": ((), "is called max_output_tokens here"),
        "response_format": ((), "is called text.format here"),
        "reasoning_effort": ((), "is called reasoning.effort here"),
        "n": ((1,), "can only be 1: a response has one answer"),
        "previous_input_messages": ((), "is not supported; give previous_response_id, or all items as input"),
        **{name: NOT_SUPPORTED[name] for name in _NOT_IN_A_CHAT},
    }

    model: str | None = None
    """OpenAI needs none where a prompt template names one; here it is the one that is served."""
    input: Annotated[
        Any,
        AfterValidator(_input),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}),
    ]
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    include: Annotated[list[str] | None, WithJsonSchema({"anyOf": [{"type": "array"}, {"type": "null"}]})] = None
    truncation: str | None = None
    metadata: dict[str, str] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    tools: Objects = None
    tool_choice: Annotated[
        Any, AfterValidator(_tool_choice), WithJsonSchema({"type": ["string", "object", "null"]})
    ] = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # vLLM's, as in a chat
    stop: StopStrings = None
    structured_outputs: dict[str, Any] | None = None
    logit_bias: dict[str, FiniteFloat] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: TokenIds = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool | None = None
    include_reasoning: bool | None = None
    documents: Objects = None
    enable_response_messages: bool | None = None
    """The response holds the prompt and the answer as the model saw and wrote them, text and token ids."""


@dataclass(frozen=True)
class OpenedResponse:
    answer: ResponseAnswer
    stored: StoredResponse | None
    background: bool


async def open_response(
    fields: dict[str, Any], service: ModelService, store: ResponseStore, client_key: str = ""
) -> OpenedResponse:
    """Checks a body and submits it. Raises `RequestError`, `OverloadedError` or `EngineError`."""
    body = await offload(read_body, fields, ResponsesBody)
    model = service.named(body.model)
    _check(body)
    items = await offload(_with_references, body.input, store, client_key)
    continued = resume_context.current()
    if continued is not None and continued.adopted is not None:
        context = await offload(read_input, items)  # all of it was written down
    else:
        context = [*_previous_items(body, store, client_key), *await offload(read_input, items)]
        if continued is not None:
            continued.fields = {**fields, "input": context}
    tools = await offload(read_tools, body.tools or ())
    with named_as(_PARAMS):
        chat = await _prepare(body, context, tools, model, client_key)
    response = _new_response(chat.request.request_id, model, body, tools)
    if body.enable_response_messages:
        response["input_messages"] = [raw_message(chat.prompt_text, chat.request.prompt_token_ids)]
        response["output_messages"] = []
    stored = StoredResponse(client_key, response, context) if body.store is not False else None

    def on_change() -> None:
        if stored is not None:
            (store.forget if answer.is_adopted_by_another else store.weigh)(stored)

    answer = ResponseAnswer(
        model,
        chat,
        response,
        shows_logprobs=_LOGPROBS in (body.include or ()),
        on_change=on_change,
        is_streamed=bool(body.stream),
    )
    if stored is not None:
        store.add(stored)
    return OpenedResponse(answer, stored, bool(body.background))


def _check(body: ResponsesBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    if body.background and body.store is False:
        raise RequestError(
            "background can only be used when `store` is true: its answer is fetched later", param="background"
        )
    if body.truncation not in (None, "auto", "disabled"):
        raise RequestError(f"truncation must be auto or disabled, got {shorten(body.truncation)}", param="truncation")
    for name in body.include or ():
        if name not in INCLUDABLE:
            raise RequestError(
                f"include: {shorten(name)} is unknown; there are {', '.join(INCLUDABLE)}", param="include"
            )
    if body.max_output_tokens is not None and body.max_output_tokens < 1:
        raise RequestError(
            f"max_output_tokens={shorten(body.max_output_tokens)} must be at least 1", param="max_output_tokens"
        )
    metadata = body.metadata or {}
    if len(metadata) > MAX_METADATA or any(len(k) > 64 or len(v) > 512 for k, v in metadata.items()):
        raise RequestError(
            f"metadata can hold {MAX_METADATA} pairs: names to 64 characters, values to 512", param="metadata"
        )


def _with_references(given: Any, store: ResponseStore, client_key: str) -> Any:
    """The input, with the stored item in the place of each `item_reference`."""
    if isinstance(given, str):
        return given
    found = []
    for i, item in enumerate(given):
        if isinstance(item, dict) and item.get("type") == "item_reference":
            stored = store.item(client_key, str(item.get("id")))
            if stored is None:
                raise RequestError(
                    f"input[{i}]: no item {shorten(item.get('id'))} is stored here; send the item itself",
                    param="input",
                )
            item = stored
        found.append(item)
    return found


def _previous_items(body: ResponsesBody, store: ResponseStore, client_key: str) -> list[dict[str, Any]]:
    if body.previous_response_id is None:
        return []
    try:
        stored = store.get(client_key, body.previous_response_id)
    except RequestError as error:
        raise RequestError(error.message, param="previous_response_id", code="previous_response_not_found") from None
    if not stored.ended:
        raise RequestError(
            f"the response {body.previous_response_id!r} has not ended: wait for it or cancel it",
            param="previous_response_id",
        )
    return [*stored.context, *stored.response["output"]]


async def _prepare(
    body: ResponsesBody,
    context: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    model: ServedModel,
    client_key: str,
) -> PreparedChat:
    """The request. With truncation=auto, as many of the oldest turns are left out as do not fit."""

    async def prepared(items: list[dict[str, Any]]) -> PreparedChat:
        chat = await offload(_chat_body, body, items, tools, model)
        return await prepare_chat(chat, model, client_key, "resp_")

    try:
        return await prepared(context)
    except ContextLengthError as error:
        if body.truncation != "auto":
            raise
        too_long = error
    starts = [i for i, item in enumerate(context) if i and item.get("role") == "user"]
    found: PreparedChat | None = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        system = [item for item in context[: starts[middle]] if item.get("role") in ("system", "developer")]
        try:
            found = await prepared([*system, *context[starts[middle] :]])
            high = middle
        except ContextLengthError as error:
            too_long, low = error, middle + 1
    if found is None:
        raise too_long
    return found


def _chat_body(
    body: ResponsesBody, items: list[dict[str, Any]], tools: list[dict[str, Any]], model: ServedModel
) -> ChatBody:
    fields: dict[str, Any] = {
        "model": model.name,
        "messages": chat_messages(body.instructions, items),
        "max_tokens": body.max_output_tokens,
        "user": body.user,
        **{name: getattr(body, name) for name in _AS_IN_A_CHAT},
        **body.sampling_fields(),
        **_text(body.text),
        **_reasoning(body.reasoning),
    }
    if _LOGPROBS in (body.include or ()):
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs or 0}
    elif body.top_logprobs is not None:
        _check_unshown_logprobs(body.top_logprobs, model)
    if tools:
        fields |= {"tools": chat_tools(tools), "parallel_tool_calls": body.parallel_tool_calls}
    if body.tool_choice is not None and (tools or body.tool_choice != "auto"):
        fields["tool_choice"] = chat_tool_choice(body.tool_choice)
    return read_body({name: value for name, value in fields.items() if value is not None}, ChatBody)


def _check_unshown_logprobs(num_logprobs: int, model: ServedModel) -> None:
    """`top_logprobs` is checked also where `include` does not ask to see them."""
    with named_as({"logprobs": "top_logprobs"}):
        try:
            resolve_logprobs(SamplingParams(logprobs=num_logprobs), model.config)
        except ValueError as error:
            raise RequestError(str(error), param="logprobs") from None


def _text(text: dict[str, Any] | None) -> dict[str, Any]:
    """`text.format` is a chat's `response_format`, flat."""
    if not text:
        return {}
    check_names("text", text, ("format", "verbosity"), "text")
    found: dict[str, Any] = {"verbosity": text.get("verbosity")}
    form = text.get("format")
    if form is not None:
        if not isinstance(form, dict):
            raise RequestError(f"text.format must be an object, got {shorten(form)}", param="text")
        inner = {name: value for name, value in form.items() if name != "type" and value is not None}
        found["response_format"] = {"type": form.get("type"), **({"json_schema": inner} if inner else {})}
    return found


def _reasoning(reasoning: dict[str, Any] | None) -> dict[str, Any]:
    if not reasoning:
        return {}
    check_names("reasoning", reasoning, ("effort", "summary", "generate_summary"), "reasoning")
    return {"reasoning_effort": reasoning.get("effort")}


def _new_response(
    response_id: str, model: ServedModel, body: ResponsesBody, tools: list[dict[str, Any]]
) -> dict[str, Any]:
    """The response before anything is said: what was asked for, with what OpenAI puts in the place of nothing."""
    text, reasoning, defaults = body.text or {}, body.reasoning or {}, model.config.generation
    return {
        "id": response_id,
        "object": "response",
        "created_at": created_s(),
        "completed_at": None,
        "status": "queued" if body.background else "in_progress",
        "background": bool(body.background),
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "model": model.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": _first_given(body.temperature, defaults.temperature),
        "text": {"format": text.get("format") or {"type": "text"}, "verbosity": text.get("verbosity") or "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": _first_given(body.top_p, defaults.top_p),
        "truncation": body.truncation or "disabled",
        "usage": None,
        "metadata": body.metadata or {},
        **{name: value for name in _ECHOED if (value := getattr(body, name)) is not None},
    }


def _first_given(asked: float | None, default: float | None) -> float:
    return next((value for value in (asked, default) if value is not None), 1.0)
