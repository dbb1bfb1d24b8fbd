"""An answer as OpenAI's response: items of output, and the events that report their growth."""

from __future__ import annotations

import hashlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from rayllm.api.choice import Choice
from rayllm.api.errors import answer_for
from rayllm.api.event_answer import EventAnswer
from rayllm.api.openai.chat import PreparedChat
from rayllm.api.openai.logprobs import chat_logprobs
from rayllm.api.service import ServedModel
from rayllm.api.sse import EventWriter, log_fault
from rayllm.parsing.events import Event, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd

_Event = dict[str, Any]
_UNFINISHED = ("queued", "in_progress")


class OutputItems:
    """The output of one response as it grows, and the events that report it. What began as a call and turned out to be
    none stays an incomplete call in a stream, which has sent it, and is a message else."""

    def __init__(self, response_id: str, is_streamed: bool = False) -> None:
        self._response_id = response_id
        self._is_streamed = is_streamed
        self.items: list[dict[str, Any]] = []
        self.logprobs: list[dict[str, Any]] = []
        """Of tokens whose text was not sent yet."""
        self._open: dict[str, Any] | None = None

    def take(self, event: Event) -> Iterator[_Event]:
        if isinstance(event, Text):
            yield from self._add_text("message", event.text)
        elif isinstance(event, Reasoning):
            yield from self._add_text("reasoning", event.text)
        elif isinstance(event, ToolCallBegin):
            yield from self._begin({"type": "function_call", "call_id": event.id, "name": event.name, "arguments": ""})
        elif isinstance(event, ToolCallArguments):
            self.items[-1]["arguments"] += event.text
            yield self._at_item("response.function_call_arguments.delta", {"delta": event.text})
        elif isinstance(event, ToolCallEnd):
            yield from self.end("completed" if event.unread is None else "incomplete")
            if event.unread is not None and not self._is_streamed:
                self.items.pop()
                yield from self._add_text("message", event.unread.lstrip())

    def end(self, status: str = "completed") -> Iterator[_Event]:
        """Ends the item that is open, with that status."""
        item, self._open = self._open, None
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield self._at_item("response.function_call_arguments.done", done)
        else:
            part = item["content"][0]
            done = {"text": part["text"]}
            if item["type"] == "message":
                part["logprobs"] += self._taken_logprobs()
                done["logprobs"] = part["logprobs"]
            yield self._at_part(f"response.{part['type']}.done", done)
            yield self._at_part("response.content_part.done", {"part": part})
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    def _add_text(self, kind: str, text: str) -> Iterator[_Event]:
        if self._open is None or self._open["type"] != kind:
            yield from self._begin_text(kind)
        part = self.items[-1]["content"][0]
        part["text"] += text
        delta: _Event = {"delta": text}
        if kind == "message":
            delta["logprobs"] = self._taken_logprobs()
            part["logprobs"] += delta["logprobs"]
        yield self._at_part(f"response.{part['type']}.delta", delta)

    def _taken_logprobs(self) -> list[dict[str, Any]]:
        taken, self.logprobs = self.logprobs, []
        return taken

    def _begin_text(self, kind: str) -> Iterator[_Event]:
        if kind == "message":
            part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield from self._begin({"type": kind, "role": "assistant", "content": []})
        else:
            part = {"type": "reasoning_text", "text": ""}
            yield from self._begin({"type": kind, "summary": [], "content": []})
        self.items[-1]["content"].append(part)
        yield self._at_part("response.content_part.added", {"part": dict(part)})

    def _begin(self, fields: dict[str, Any]) -> Iterator[_Event]:
        yield from self.end()
        prefix = {"message": "msg_", "function_call": "fc_"}.get(fields["type"], "rs_")
        item = {"id": f"{prefix}{self._id_of(len(self.items))}", "status": "in_progress", **fields}
        self.items.append(item)
        self._open = item
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown}

    def _id_of(self, number: int) -> str:
        """The same again where the response is made again."""
        return hashlib.blake2b(f"{self._response_id}/{number}".encode(), digest_size=16).hexdigest()

    def _at_item(self, kind: str, fields: _Event) -> _Event:
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, **fields}

    def _at_part(self, kind: str, fields: _Event) -> _Event:
        return self._at_item(kind, {"content_index": 0, **fields})


def raw_message(text: str, token_ids: Sequence[int]) -> dict[str, Any]:
    """What the model read or wrote, in vLLM's shape."""
    return {"type": "raw_message_tokens", "message": text, "tokens": list(token_ids)}


class ResponseAnswer(EventAnswer):
    """`response` is the object that grows: what the request settled stands in it from the beginning.
    `on_change` is called when its status changes."""

    def __init__(
        self,
        model: ServedModel,
        chat: PreparedChat,
        response: dict[str, Any],
        *,
        shows_logprobs: bool = False,
        on_change: Callable[[], None] = lambda: None,
        is_streamed: bool = False,
    ):
        self.response = response
        self._shows_logprobs = shows_logprobs
        self._on_change = on_change
        self._output = OutputItems(response["id"], is_streamed)
        super().__init__(model, chat)
        self._writer = EventWriter(self.id)

    def close(self) -> None:
        super().close()
        for _ in self._output.end("incomplete"):
            pass
        self._set("cancelled")

    async def whole(self) -> dict[str, Any]:
        try:
            return await super().whole()
        except Exception as error:
            self._fail(error)
            raise

    async def stream(self) -> AsyncIterator[bytes]:
        written = self._written
        try:
            yield written({"type": "response.created", "response": self.response})
            if self.response["background"]:
                yield written({"type": "response.queued", "response": self.response})
                await self.start()
                self._set("in_progress")
            yield written({"type": "response.in_progress", "response": self.response})
            async for news in self.generation.batches():
                yield b"".join(written(event) for choice, text in news for event in self._output_events(choice, text))
        except Exception as error:
            log_fault(error)
            self._fail(error)
            fault = answer_for(error).body["error"]
            yield written({"type": "error", **{name: fault[name] for name in ("code", "message", "param")}})
            yield written({"type": "response.failed", "response": self.response})

    def cancel(self) -> bytes:
        """Ends the answer at somebody's wish; returns the last event of its stream."""
        self.close()
        error = {"code": "response_cancelled", "message": "the response was cancelled", "param": None}
        return self._written({"type": "error", **error})

    def _written(self, event: _Event) -> bytes:
        return self._writer.event({**event, "sequence_number": self._writer.num_events})

    def _output_events(self, choice: Choice, text: str) -> Iterator[_Event]:
        yield from self._growth(choice, text)
        if choice.finish_reason is not None:
            self._end(choice)
            yield {"type": f"response.{self.response['status']}", "response": self.response}

    def _growth(self, choice: Choice, text: str) -> Iterator[_Event]:
        start, choice.num_sent = choice.num_sent, len(choice.token_ids)
        if self._shows_logprobs:
            if choice.reasoning_end > start:
                self._output.logprobs.clear()  # of what marks the reasoning
            new = choice.logprobs[max(start, choice.reasoning_end) : choice.num_sent]
            as_ids = self._model.config.engine.return_tokens_as_token_ids
            self._output.logprobs += chat_logprobs(self._model.tokenizer, new, as_ids=as_ids)["content"]
        for event in self._events_of(choice, text):
            yield from self._output.take(event)
        if choice.finish_reason is not None:
            yield from self._output.end("incomplete" if choice.finish_reason == "length" else "completed")

    def _whole(self) -> dict[str, Any]:
        [choice] = self.generation.choices
        for _ in self._growth(choice, choice.text.text):
            pass
        self._end(choice)
        return self.response

    def _end(self, choice: Choice) -> None:
        if choice.finish_reason == "length":
            self._set("incomplete", incomplete_details={"reason": "max_output_tokens"})
        else:
            self._set("completed", completed_at=int(time.time()))

    def _fail(self, error: Exception) -> None:
        for _ in self._output.end("incomplete"):
            pass
        fault = answer_for(error)
        code = "rate_limit_exceeded" if fault.status == 429 else "server_error"
        code = "invalid_prompt" if fault.status < 429 else code
        self._set("failed", error={"code": code, "message": fault.body["error"]["message"]})

    def _set(self, status: str, **fields: Any) -> None:
        """Moves on; a response that has ended stays as it is."""
        if self.response["status"] not in _UNFINISHED:
            return
        self.response |= {"status": status, **fields}
        if status not in _UNFINISHED:
            self.response |= {"output": self._output.items, "usage": self._usage()}
            if "output_messages" in self.response:
                token_ids = self.generation.choices[0].token_ids
                text = self._model.tokenizer.decode(token_ids, skip_special_tokens=False)
                self.response["output_messages"] = [raw_message(text, token_ids)]
        self._on_change()

    def _usage(self) -> dict[str, Any]:
        num_prompt, num_generated = self.generation.num_prompt_tokens, self.generation.num_generated_tokens
        return {
            "input_tokens": num_prompt,
            "input_tokens_details": {"cached_tokens": self.generation.num_cached_tokens, "cache_write_tokens": 0},
            "output_tokens": num_generated,
            "output_tokens_details": {"reasoning_tokens": self.generation.num_reasoning_tokens},
            "total_tokens": num_prompt + num_generated,
        }
