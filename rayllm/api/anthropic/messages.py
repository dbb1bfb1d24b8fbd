"""`/v1/messages`: Anthropic's bodies to chats, and a chat's answer in Anthropic's blocks and events."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, ClassVar

from pydantic import FailFast

from rayllm.api.anthropic.answer import MessageAnswer
from rayllm.api.anthropic.conversion import chat_messages, chat_tool_choice, chat_tools
from rayllm.api.offload import offload
from rayllm.api.openai.chat import prepare_chat
from rayllm.api.protocol import (
    Body,
    ChatBody,
    Objects,
    SamplingFields,
    StopStrings,
    TextOrObjects,
    check_names,
    read_body,
)
from rayllm.api.service import ModelService
from rayllm.errors import RequestError, shorten
from rayllm.prompt.chat import render
from rayllm.prompt.requests import named_as

_PARAMS = {
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
}
"""A chat's field and the one that it came from."""


class CountTokensBody(Body):
    """What of a message decides about the prompt."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "metadata",
            "service_tier",
            "cache_control",
            "inference_geo",
            "diagnostics",
            "speed",
            "user_profile_id",
            "workspace_id",
        }
    )
    not_supported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "container": ((), "is not supported: this server runs no code"),
        "mcp_servers": (([],), "is not supported: this server calls no others"),
        "context_management": ((), "is not supported"),
        "stop": ((), "is called stop_sequences here"),
        "max_completion_tokens": ((), "is called max_tokens here"),
    }

    model: str
    messages: Annotated[list[dict[str, Any]], FailFast()]
    system: TextOrObjects = None
    tools: Objects = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class MessagesBody(CountTokensBody, SamplingFields):
    max_tokens: int
    stop_sequences: StopStrings = None
    stream: bool | None = None


async def open_message(fields: dict[str, Any], service: ModelService, client_key: str = "") -> MessageAnswer:
    """Checks a body and submits it. Raises `RequestError`, `OverloadedError` or `EngineError`."""
    body = await offload(read_body, fields, MessagesBody)
    model = service.named(body.model)
    if body.max_tokens < 1:
        raise RequestError(f"max_tokens={shorten(body.max_tokens)} must be at least 1", param="max_tokens")
    with named_as(_PARAMS):
        chat = await offload(_chat_body, body)
        prepared = await prepare_chat(chat, model, client_key, "msg_", default_max_tokens=body.max_tokens)
    return MessageAnswer(model, prepared, body.max_tokens)


async def count_tokens(fields: dict[str, Any], service: ModelService) -> dict[str, Any]:
    """How many tokens the prompt of such a message has."""
    body = await offload(read_body, fields, CountTokensBody)
    model = service.named(body.model)
    with named_as(_PARAMS):
        chat = await offload(_chat_body, body)
        text = await asyncio.to_thread(render, chat, model)
        token_ids = await asyncio.to_thread(model.tokenize, text, add_special_tokens=False, param="messages")
    return {"input_tokens": len(token_ids)}


def _chat_body(body: CountTokensBody) -> ChatBody:
    """The same request as a chat. An assistant's message at the end is gone on with."""
    messages = chat_messages(body.messages, body.system)
    fields: dict[str, Any] = {"model": body.model, "messages": messages}
    if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        fields["tools"] = chat_tools(body.tools)
    if body.tool_choice is not None:
        fields |= chat_tool_choice(body.tool_choice)
    fields |= _thinking(body.thinking)
    fields |= _output_config(body.output_config)
    if isinstance(body, MessagesBody):
        fields |= {"stop": body.stop_sequences, **body.sampling_fields()}
    else:
        fields["chat_template_kwargs"] = body.chat_template_kwargs
    return read_body({name: value for name, value in fields.items() if value is not None}, ChatBody)


def _thinking(thinking: dict[str, Any] | None) -> dict[str, Any]:
    """Off is asked of the template; on is what reasoning models do by themselves."""
    if thinking is None:
        return {}
    kind = thinking.get("type")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise RequestError(
            f"thinking.type must be enabled, disabled or adaptive, got {shorten(kind)}", param="thinking"
        )
    check_names("thinking", thinking, ("type", "budget_tokens", "display"), "thinking")
    return {"reasoning_effort": "none"} if kind == "disabled" else {}


def _output_config(config: dict[str, Any] | None) -> dict[str, Any]:
    if config is None:
        return {}
    check_names("output_config", config, ("effort", "format"), "output_config")
    found: dict[str, Any] = {}
    if config.get("effort") is not None:
        found["reasoning_effort"] = config["effort"]
    wanted = config.get("format")
    if wanted is not None:
        if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
            raise RequestError("output_config.format must be of type 'json_schema'", param="output_config")
        schema = {"name": "output", "schema": wanted.get("schema"), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found
