"""What completions and chats share: an answer's life, its chunks, its usage."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from rayllm.api import resume_context
from rayllm.api.choice import Choice, Parsing
from rayllm.api.generation import Generation
from rayllm.api.offload import is_large, offload_unless
from rayllm.api.protocol import GenerationBody
from rayllm.api.request_metrics import request_metrics
from rayllm.api.service import ServedModel
from rayllm.api.sse import ChunkWriter, whole_stream
from rayllm.errors import RequestError
from rayllm.request import Request


def new_id(prefix: str) -> str:
    """A new answer's id; that of the answer that is made again, where one is."""
    continued = resume_context.current()
    if continued is not None and continued.answer_id is not None:
        return continued.answer_id
    return f"{prefix}{secrets.token_hex(16)}"


def created_s() -> int:
    """When the answer that is being opened was asked for, in Unix time."""
    continued = resume_context.current()
    return int(time.time()) if continued is None else continued.created_s


def check_stream_options(body: GenerationBody) -> None:
    """Refuses what only makes sense the other way of answering."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs are not given with stream=true", param="prompt_logprobs")


class Answer(ABC):
    """One answer under way. Its requests are submitted at construction; `close` must be called in
    `finally`."""

    media_type = "text/event-stream"

    def __init__(self, model: ServedModel, requests: Sequence[Request], answer_id: str, parsing: Parsing | None = None):
        self.id = answer_id
        self._model = model
        self._created = created_s()
        self.generation = Generation(model.engine, model.tokenizer, model.metrics, requests, answer_id, parsing)

    @property
    def is_adopted_by_another(self) -> bool:
        """Whether it goes on elsewhere."""
        return self.generation.is_adopted_by_another

    async def start(self) -> None:
        """Waits for the engine's first word; raises what it refuses."""
        await self.generation.start()

    def close(self) -> None:
        self.generation.close()

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        await self.generation.finished()
        return await offload_unless(not self.generation.is_long, self._whole)

    @abstractmethod
    def stream(self) -> AsyncIterator[bytes]:
        """All that is sent of a stream, one piece of bytes for each step of the engine: a fault is an event too."""

    @abstractmethod
    def _whole(self) -> dict[str, Any]:
        """The body, once every choice has ended."""


class ChunkedAnswer(Answer):
    """An answer of OpenAI's older endpoints: its stream is of chunks, each with entries of `choices`."""

    chunk_object: str

    def __init__(
        self,
        model: ServedModel,
        body: GenerationBody,
        requests: Sequence[Request],
        answer_id: str,
        parsing: Parsing | None = None,
    ):
        self._body = body
        options, engine = body.stream_options, model.config.engine
        forced = engine.enable_force_include_usage
        self._includes_usage = forced or bool(options and options.include_usage)
        self._continuous_usage = forced or (self._includes_usage and bool(options and options.continuous_usage_stats))
        as_ids = body.return_tokens_as_token_ids
        self._shows_ids: bool = engine.return_tokens_as_token_ids if as_ids is None else as_ids
        super().__init__(model, requests, answer_id, parsing)
        self._head = {
            "id": answer_id,
            "created": self._created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }

    def stream(self) -> AsyncIterator[bytes]:
        return whole_stream(self.events())

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks, one piece of bytes for each step of the engine."""
        writer = ChunkWriter({**self._head, "object": self.chunk_object})
        is_first = True  # which may hold the prompt
        async for news in self.generation.batches():
            if is_large() or (is_first and self.generation.is_long):
                yield await offload_unless(False, self._chunks, writer, news)
            else:
                yield self._chunks(writer, news)
            is_first = False
        if self._includes_usage:
            yield writer.chunk(None, self._closing_fields())

    def _chunks(self, writer: ChunkWriter, news: Sequence[tuple[Choice, str]]) -> bytes:
        chunks = [
            writer.chunk(entry, self._chunk_fields(choice, entry))
            for choice, text in news
            for entry in self._entries_of_chunks(choice, text)
        ]
        return b"".join(chunks)

    def _entries_of_chunks(self, choice: Choice, text: str) -> Iterable[dict[str, Any]]:
        """`_entries`. An end has a chunk of its own, as in OpenAI's streams; but where every chunk has usage it comes
        with the last text, as in vLLM: a chunk of its own would count no more tokens than the one before."""
        if not self._continuous_usage or choice.finish_reason is None:
            return self._entries(choice, text)
        entries = list(self._entries(choice, text))
        if len(entries) > 1:
            last_text, end = entries[-2:]
            if "role" not in last_text.get("delta", ()):
                merged = {"finish_reason": end["finish_reason"], "stop_reason": end["stop_reason"]}
                return [*entries[:-2], {**last_text, **merged}]
        return entries

    def _chunk_fields(self, choice: Choice, entry: dict[str, Any]) -> dict[str, Any] | None:
        """Fields beside `choices`."""
        if self._includes_usage:
            return {"usage": self._usage() if self._continuous_usage else None}
        return None

    def _closing_fields(self) -> dict[str, Any]:
        """What a whole answer, or the last chunk of a stream with usage, says of all of it."""
        fields: dict[str, Any] = {"usage": self._usage()}
        if self._model.config.engine.enable_per_request_metrics:
            fields["metrics"] = request_metrics(self.generation.choices)
        return fields

    def _num_generated(self) -> int:
        return self.generation.num_generated_tokens

    def _usage(self) -> dict[str, Any]:
        num_prompt, num_generated = self.generation.num_prompt_tokens, self._num_generated()
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
            "prompt_tokens_details": {"cached_tokens": self.generation.num_cached_tokens},
        }

    @abstractmethod
    def _entries(self, choice: Choice, text: str) -> Iterator[dict[str, Any]]:
        """The `choices` entries, one a chunk, for new text of a choice or its end."""
