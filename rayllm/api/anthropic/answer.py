"""An answer in Anthropic's blocks and events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

from rayllm.api.choice import Choice
from rayllm.api.errors import answer_for, anthropic_envelope
from rayllm.api.event_answer import EventAnswer
from rayllm.api.openai.chat import PreparedChat
from rayllm.api.service import ServedModel
from rayllm.api.sse import EventWriter, log_fault
from rayllm.parsing.events import Event, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd

_NEW_BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"type": "text", "text": ""},
    "thinking": {"type": "thinking", "thinking": "", "signature": ""},
}


class Blocks:
    """The content of one message as it grows, and the events that report it."""

    def __init__(self) -> None:
        self.content: list[dict[str, Any]] = []
        self._open = False
        self._arguments: list[str] = []

    def take(self, event: Event) -> Iterator[dict[str, Any]]:
        if isinstance(event, Text):
            yield from self._add("text", "text", "text_delta", event.text)
        elif isinstance(event, Reasoning):
            yield from self._add("thinking", "thinking", "thinking_delta", event.text)
        elif isinstance(event, ToolCallBegin):
            yield from self.end()
            self._arguments = []
            yield self._begin({"type": "tool_use", "id": event.id, "name": event.name, "input": {}})
        elif isinstance(event, ToolCallArguments):
            self._arguments.append(event.text)
            yield self._delta({"type": "input_json_delta", "partial_json": event.text})
        elif isinstance(event, ToolCallEnd):
            yield from self.end()
            if event.unread is not None:  # a stream has sent it; a whole message says what it is
                self.content[-1] = {"type": "text", "text": event.unread.lstrip()}

    def end(self) -> Iterator[dict[str, Any]]:
        """Ends the block that is open."""
        if not self._open:
            return
        block = self.content[-1]
        if block["type"] == "thinking":
            yield self._delta({"type": "signature_delta", "signature": ""})
        elif block["type"] == "tool_use":
            block["input"] = _read_input("".join(self._arguments))
        self._open = False
        yield {"type": "content_block_stop", "index": len(self.content) - 1}

    def _add(self, kind: str, name: str, delta: str, text: str) -> Iterator[dict[str, Any]]:
        if not self._open or self.content[-1]["type"] != kind:
            yield from self.end()
            yield self._begin(dict(_NEW_BLOCKS[kind]))
        self.content[-1][name] += text
        yield self._delta({"type": delta, name: text})

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self.content.append(block)
        self._open = True
        return {"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def _read_input(arguments: str) -> dict[str, Any]:
    """The arguments as an object. What is none is given in the wrapping that Anthropic's own documents propose."""
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else {"INVALID_JSON": arguments}


class MessageAnswer(EventAnswer):
    """`max_tokens` is what was asked for; the request may have less where the context ends before."""

    def __init__(self, model: ServedModel, chat: PreparedChat, max_tokens: int):
        self._max_tokens = max_tokens
        self._blocks = Blocks()
        super().__init__(model, chat)

    async def stream(self) -> AsyncIterator[bytes]:
        """The stream of events; a fault is one too."""
        writer = EventWriter(self.id)
        try:
            async for piece in self._written(writer):
                yield piece
        except Exception as error:
            log_fault(error)
            yield writer.event(anthropic_envelope(answer_for(error)))

    async def _written(self, writer: EventWriter) -> AsyncIterator[bytes]:
        begun = pinged = False
        async for news in self.generation.batches():
            written = b"" if begun else writer.event({"type": "message_start", "message": self._begun()})
            begun = True
            for choice, text in news:
                for event in self._block_events(choice, text):
                    written += writer.event(event)
                    if not pinged:
                        pinged = True
                        written += writer.event({"type": "ping"})
                if choice.finish_reason is not None:
                    written += self._last_events(writer, choice)
            yield written

    def _begun(self) -> dict[str, Any]:
        """The message before any token of it. As in vLLM its usage counts the whole prompt as input; how much of that
        was cached is in the usage of the end, which replaces this one."""
        message = self._message([])
        counts = {"input_tokens": self.generation.num_prompt_tokens, "cache_read_input_tokens": 0, "output_tokens": 0}
        return {**message, "usage": {**message["usage"], **counts}}

    def _block_events(self, choice: Choice, text: str) -> Iterator[dict[str, Any]]:
        for event in self._events_of(choice, text):
            yield from self._blocks.take(event)
        if choice.finish_reason is not None:
            yield from self._blocks.end()

    def _last_events(self, writer: EventWriter, choice: Choice) -> bytes:
        event = {"type": "message_delta", "delta": self._stop(choice), "usage": self._usage()}
        return writer.event(event) + writer.event({"type": "message_stop"})

    def _whole(self) -> dict[str, Any]:
        [choice] = self.generation.choices
        for _ in self._block_events(choice, choice.text.text):
            pass
        return {**self._message(self._blocks.content), **self._stop(choice)}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _stop(self, choice: Choice) -> dict[str, Any]:
        reason, sequence = "end_turn", None
        if any(block["type"] == "tool_use" for block in self._blocks.content):
            reason = "tool_use"
        if choice.finish_reason == "length":
            reason = "max_tokens" if len(choice.token_ids) >= self._max_tokens else "model_context_window_exceeded"
        elif isinstance(choice.stop_reason, str):
            reason, sequence = "stop_sequence", choice.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts cached tokens beside the others, not among them, and writes to the cache only for requests
        with `cache_control`, which is without effect here."""
        num_cached = self.generation.num_cached_tokens
        return {
            "input_tokens": self.generation.num_prompt_tokens - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": self.generation.num_generated_tokens,
        }
