"""`/v1/chat/completions`: messages to a prompt, deltas to OpenAI's chunks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rayllm.api.answer import ChunkedAnswer, check_stream_options, new_id
from rayllm.api.beam import with_beam_search
from rayllm.api.choice import Choice
from rayllm.api.offload import is_large, offload, offload_unless
from rayllm.api.openai.logprobs import chat_logprobs, prompt_logprobs
from rayllm.api.protocol import ChatBody, read_body
from rayllm.api.sampling import num_further_characters, request_of_body, sampling_params, truncate_ids
from rayllm.api.service import ModelService, ServedModel
from rayllm.api.structured import structured_field, structured_outputs, tried
from rayllm.errors import RequestError
from rayllm.parsing.chat_format import ChatFormat
from rayllm.parsing.events import Event, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd
from rayllm.parsing.output_parser import OutputParser
from rayllm.parsing.tool_grammar import Thinking
from rayllm.parsing.tools import ToolPlan
from rayllm.prompt.chat import chat_prompt, num_characters
from rayllm.prompt.messages import read_messages
from rayllm.prompt.requests import named_as
from rayllm.request import Request


async def open_chat(fields: dict[str, Any], service: ModelService, client_key: str = "") -> ChatAnswer:
    """Checks a body and submits it. Raises `RequestError`, `OverloadedError` or `EngineError`."""
    body = await offload(read_body, fields, ChatBody)
    model = service.named(body.model)
    check_stream_options(body)
    chat = await prepare_chat(body, model, client_key, "chatcmpl-")
    return ChatAnswer(with_beam_search(model, body, chat.request.params), body, chat)


@dataclass(frozen=True)
class PreparedChat:
    """A chat's request, and how its answer is read."""

    request: Request
    form: ChatFormat
    plan: ToolPlan | None
    thinking: Thinking
    calls_are_bound: bool = False
    """Whether the answer's grammar comes from its tools."""
    prompt_text: str = ""
    """The prompt as the template wrote it."""
    shows_reasoning: bool = True

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the parsers want to see."""
        return self.form.shown_ids

    def parser(self, choice: int) -> OutputParser | None:
        """A parser for one choice; None where its text is only text."""
        reasoning = None if self.thinking is Thinking.NONE else self.form.reasoning_format
        tool_format = self.form.tool_format if self.plan or self.form.tool_format.frames_text else None
        if tool_format is None and reasoning is None:
            return None
        return OutputParser(
            tool_format,
            reasoning,
            tools={tool.name: tool.parameters for tool in self.plan.tools} if self.plan else None,
            opened=self.thinking is Thinking.OPEN,
            call_id=lambda call: self.form.call_id(f"{self.request.request_id}:{choice}:{call}"),
            only_one=self.plan is not None and not self.plan.parallel,
        )


async def prepare_chat(
    body: ChatBody, model: ServedModel, client_key: str, id_prefix: str, default_max_tokens: int | None = None
) -> PreparedChat:
    """The request of a chat, whichever endpoint it came to; rendered in a thread where that takes long.
    `default_max_tokens` holds where the body gives no number, as far as there is room."""
    is_short = not is_large() and body.chat_template is None
    if is_short:
        num_prompt_characters = num_characters(body.messages, body.tools) + num_further_characters(body)
        is_short = model.prepares_inline(num_prompt_characters, is_chat=True)
    chat = await offload_unless(is_short, _prepare, body, model, client_key, id_prefix, default_max_tokens)
    field = "tools" if chat.calls_are_bound else structured_field(body)
    return replace(chat, request=await tried(chat.request, model, field))


def _prepare(
    body: ChatBody, model: ServedModel, client_key: str, id_prefix: str, default_max_tokens: int | None
) -> PreparedChat:
    limit_name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    names = {"prompt": "messages", "max_tokens": limit_name, "logprobs": "top_logprobs"}
    if field := structured_field(body):
        names["structured_outputs"] = field
    with named_as(names):
        prompt = chat_prompt(body, model)
        settled: dict[str, Any] = {"max_tokens": getattr(body, limit_name), "logprobs": _num_logprobs(body)}
        wanted = structured_outputs(body)
        settled["structured_outputs"] = prompt.structured_outputs(wanted)
        params = sampling_params(body, model, **settled)
        token_ids = prompt.token_ids(model, add_special_tokens=bool(body.add_special_tokens))
        token_ids = truncate_ids(token_ids, body, model.config.max_model_len)
        request = request_of_body(
            new_id(id_prefix), token_ids, params, body, model.config, default_max_tokens, client_key
        )
        return PreparedChat(
            request,
            prompt.form,
            prompt.plan,
            prompt.thinking,
            calls_are_bound=prompt.tool_grammar(wanted) is not None,
            prompt_text=prompt.text,
            shows_reasoning=body.include_reasoning is not False,
        )


def _num_logprobs(body: ChatBody) -> int | None:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    if body.logprob_token_ids is not None:
        if not body.logprobs:
            raise RequestError("logprob_token_ids needs logprobs=true", param="logprob_token_ids")
        return None  # they are given in place of the most likely tokens
    return (body.top_logprobs or 0) if body.logprobs else None


class ChatAnswer(ChunkedAnswer):
    """An answer in OpenAI's chat shapes."""

    chunk_object = "chat.completion.chunk"
    _body: ChatBody

    def __init__(self, model: ServedModel, body: ChatBody, chat: PreparedChat):
        self._chat = chat
        self._echoed_text = _echoed_text(body)
        super().__init__(model, body, [chat.request], chat.request.request_id, chat)
        self._head["service_tier"] = "default"

    def _entries(self, choice: Choice, text: str) -> Iterator[dict[str, Any]]:
        start, end = choice.num_sent, len(choice.token_ids)
        sends_tokens = end > start and bool(self._body.logprobs or self._body.return_token_ids)
        if choice.parser is None:
            deltas = [{"content": text}] if text else []
        else:
            deltas = [delta for event in choice.take_events(text) if (delta := _delta(event)) is not None]
            if not deltas and choice.finish_reason is None:
                return  # the parser holds the text back; its tokens are sent with what it becomes
        if start == 0:
            calls_first = bool(deltas) and "tool_calls" in deltas[0]
            yield self._entry(choice, {"role": "assistant", "content": None if calls_first else ""})
            if self._echoed_text:
                yield self._entry(choice, {"content": self._echoed_text})
        choice.num_sent = end
        for i, delta in enumerate(deltas or [{"content": ""}] * sends_tokens):
            entry = self._entry(choice, delta)
            if sends_tokens and i == 0:
                self._add_tokens(entry, choice, start, end)
            yield entry
        if choice.finish_reason is not None:
            yield {
                **self._entry(choice, {}),
                "finish_reason": self._finish_reason(choice),
                "stop_reason": choice.stop_reason,
            }

    def _finish_reason(self, choice: Choice) -> str | None:
        """OpenAI says `stop` where the call was the client's choice. So do streams that sent a call which turned out
        to be none: `tool_calls` says that all of them can be made."""
        plan, parser = self._chat.plan, choice.parser
        if choice.finish_reason == "stop" and parser is not None and parser.num_whole_calls:
            sent_broken_call = bool(self._body.stream) and parser.has_unread_calls
            return "tool_calls" if plan is not None and plan.mode != "named" and not sent_broken_call else "stop"
        return choice.finish_reason

    def _entry(self, choice: Choice, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _chunk_fields(self, choice: Choice, entry: dict[str, Any]) -> dict[str, Any] | None:
        fields = super()._chunk_fields(choice, entry)
        if "role" not in entry["delta"]:
            return fields
        if fields and fields["usage"] and len(self.generation.choices) == 1:  # it is sent before any token
            fields["usage"] |= {"completion_tokens": 0, "total_tokens": fields["usage"]["prompt_tokens"]}
        return {**(fields or {}), **self._prompt_fields()}

    def _prompt_fields(self) -> dict[str, Any]:
        """What is sent about the prompt, once."""
        fields: dict[str, Any] = {}
        if self._body.return_token_ids:
            fields["prompt_token_ids"] = self.generation.prompt_ids[0]
        if self._body.return_prompt_text:
            fields["prompt_text"] = self._chat.prompt_text
        return fields

    def _add_tokens(self, entry: dict[str, Any], choice: Choice, start: int, end: int | None) -> None:
        if self._body.logprobs:
            entry["logprobs"] = chat_logprobs(
                self._model.tokenizer,
                choice.logprobs[start:end],
                as_ids=self._shows_ids,
                shows_own=self._body.logprob_token_ids is not None,
            )
        if self._body.return_token_ids:
            entry["token_ids"] = choice.token_ids[start:end]

    def _usage(self) -> dict[str, Any]:
        details = {"reasoning_tokens": self.generation.num_reasoning_tokens}
        return {**super()._usage(), "completion_tokens_details": details}

    def _whole(self) -> dict[str, Any]:
        choices = []
        for choice in self.generation.choices:
            entry = {
                "index": choice.index,
                "message": self._message(choice),
                "logprobs": None,
                "finish_reason": self._finish_reason(choice),
                "stop_reason": choice.stop_reason,
                "token_ids": None,
            }
            self._add_tokens(entry, choice, 0, None)
            choices.append(entry)
        whole: dict[str, Any] = {**self._head, "object": "chat.completion", "choices": choices}
        whole |= {**self._closing_fields(), "prompt_logprobs": None, "prompt_token_ids": None}
        if self._body.prompt_logprobs is not None:
            entries = self.generation.prompt_logprobs[0]
            whole["prompt_logprobs"] = prompt_logprobs(self._model.tokenizer, entries)
        return {**whole, **self._prompt_fields()}

    def _message(self, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None, "annotations": []}
        if choice.parser is None:
            return {**message, "content": self._echoed_text + choice.text.text}
        texts: list[str] = [self._echoed_text]
        thoughts: list[str] = []
        calls: list[dict[str, Any]] = []
        for event in choice.take_events(""):
            if isinstance(event, Text):
                texts.append(event.text)
            elif isinstance(event, Reasoning):
                thoughts.append(event.text)
            elif isinstance(event, ToolCallBegin):
                calls.append(_call(event))
            elif isinstance(event, ToolCallArguments):
                calls[-1]["function"]["arguments"] += event.text
            elif isinstance(event, ToolCallEnd) and event.unread is not None:
                calls.pop()
                texts.append(event.unread if texts else event.unread.lstrip())
        message["content"] = "".join(texts) or (None if calls else "")
        if thoughts:
            message["reasoning"] = message["reasoning_content"] = "".join(thoughts)
        if calls:
            message["tool_calls"] = calls
        return message


def _echoed_text(body: ChatBody) -> str:
    """The text of the last message, where `echo` asks for it and the answer is of the same role."""
    last = body.messages[-1]
    if not body.echo or (last.get("role") != "assistant" and body.add_generation_prompt is not False):
        return ""
    return str(read_messages([last])[0]["content"])


def _call(event: ToolCallBegin) -> dict[str, Any]:
    return {"id": event.id, "type": "function", "function": {"name": event.name, "arguments": ""}}


def _delta(event: Event) -> dict[str, Any] | None:
    """The event as a chunk shows it; None for what a chunk does not show."""
    if isinstance(event, Text):
        return {"content": event.text}
    if isinstance(event, ToolCallArguments):
        return {"tool_calls": [{"index": event.index, "function": {"arguments": event.text}}]}
    if isinstance(event, Reasoning):
        return {"reasoning": event.text, "reasoning_content": event.text}
    if isinstance(event, ToolCallBegin):
        return {"tool_calls": [{"index": event.index, **_call(event)}]}
    return None
