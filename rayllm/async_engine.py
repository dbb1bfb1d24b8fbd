"""A running engine for asyncio programs, whoever runs it: what `AsyncLLM` is, and what `rayllm.remote` uses."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rayllm.config import ResolvedConfig
from rayllm.engine.client.engine_thread import check_not_forked, closed_error
from rayllm.engine.client.journaled_client import JournaledClient
from rayllm.engine.client.outputs import OutputBuilder, raise_failed
from rayllm.engine.owner.generation_config import default_sampling_params
from rayllm.engine.owner.watched import KeepAttached
from rayllm.errors import EngineError
from rayllm.messages import EngineStats
from rayllm.prompt.conversations import ChatPrompts
from rayllm.prompt.prompts import Conversation, PreparedPrompt, Prompt, prepare_prompt, truncated
from rayllm.prompt.requests import derived_seed, program_request
from rayllm.prompt.text_model import TextModel
from rayllm.request import CompletionOutput, RequestOutput, SamplingParams
from rayllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Attachment:
    """An engine as one event loop has it."""

    engine: JournaledClient
    keeper: asyncio.Task[None]

    def end(self) -> None:
        self.engine.end(closed_error())
        self.keeper.cancel()


class AsyncEngine:
    """A running engine for asyncio programs: what `AsyncLLM` is, and what `rayllm.remote` uses.

    `keep_attached(engine)` runs beside the requests of an event loop, attaches a driver to `engine`, and the next one
    where that is lost: open requests go on with it. Any number of threads may use it, each with an event loop of its
    own, and a program may use it in one event loop after another.
    """

    def __init__(self, config: ResolvedConfig, keep_attached: KeepAttached):
        self.config = config
        self._keep_attached = keep_attached
        self._attachments: dict[asyncio.AbstractEventLoop, _Attachment] = {}
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._tokenizer: Tokenizer | None = None
        self._unseeded = itertools.count()
        self._chat_prompts: ChatPrompts | None = None

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """One prompt's output as it grows: each item holds everything so far, the last is `finished`. Leaving the loop
        ends the request. Raises `RequestError` when it does not fit, `EngineError` when the engine is lost or gives a
        choice up."""
        params = sampling_params or self.get_default_sampling_params()
        prepared = await asyncio.to_thread(prepare_prompt, prompt, self._text_model(), params)
        async for builder, _ in self._run(prepared, params, request_id):
            yield builder.output()

    async def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """One conversation's answer as it grows; see `generate`. `options` are those of `LLM.chat`."""
        tokenizer = self.get_tokenizer()
        if self._chat_prompts is None:
            self._chat_prompts = ChatPrompts(self.config, tokenizer)
        chat = await asyncio.to_thread(self._chat_prompts.prepare, messages, **options)
        params = chat.params(sampling_params or self.get_default_sampling_params())
        async for builder, _ in self._run(chat.prompt, params, request_id):
            yield builder.output()

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[CompletionOutput]:
        """One prompt's answer as it comes: each item holds what was added to its choice (`index`)."""
        params = sampling_params or self.get_default_sampling_params()
        prepared = await asyncio.to_thread(prepare_prompt, prompt, self._text_model(), params)
        async for _, added in self._run(prepared, params, request_id):
            for part in added:
                yield part

    def _text_model(self) -> TextModel:
        return TextModel(self.config, self.get_tokenizer())

    async def _run(
        self, prompt: PreparedPrompt, params: SamplingParams, request_id: str | None
    ) -> AsyncIterator[tuple[OutputBuilder, list[CompletionOutput]]]:
        seed = 0
        if params.seed is None and not params.greedy:
            seed = derived_seed(self.config.engine.seed, next(self._unseeded))
        tokenizer, request_id = self.get_tokenizer(), request_id or uuid.uuid4().hex
        prompt = truncated(prompt, params, self.config.max_model_len)
        request = program_request(request_id, prompt.token_ids, params, self.config, tokenizer, seed)
        builder = OutputBuilder(request, prompt, tokenizer)
        deltas = self._attached().submit(request)
        try:
            async for batch in deltas:
                parts = []
                for delta in batch:
                    added, ended_by_text = builder.push(delta.choice, delta)
                    raise_failed(added)
                    if ended_by_text:
                        deltas.abort_choice(delta.choice)
                    if added.token_ids or added.text or added.finish_reason:
                        parts.append(added)
                if parts:
                    yield builder, parts
        finally:
            deltas.close()

    def _attached(self) -> JournaledClient:
        """The engine as the running event loop has it."""
        self._check_usable()
        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._attachments if other.is_closed()]:
                del self._attachments[other]
            if loop not in self._attachments:
                engine = JournaledClient(self.config.engine.driver_wait_s)
                self._attachments[loop] = _Attachment(engine, loop.create_task(self._keep(engine)))
            return self._attachments[loop].engine

    async def _keep(self, engine: JournaledClient) -> None:
        try:
            await self._keep_attached(engine)
        except Exception as error:
            engine.end(error if isinstance(error, EngineError) else EngineError(f"the engine is lost: {error}"))

    def _check_usable(self) -> None:
        """Raises `EngineError` where this engine is closed, or this process is a forked child."""
        check_not_forked(self._pid)
        if self._closed:
            raise closed_error()

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters of a call that brings none: the model's generation_config.json, as `generation_config` and
        `override_generation_config` have it."""
        return default_sampling_params(self.config.generation)

    def get_tokenizer(self) -> Tokenizer:
        self._check_usable()
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_config(self.config)
        return self._tokenizer

    async def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return await (await self._attached().next_driver(None, None)).stats()

    async def reset_prefix_cache(self) -> bool:
        """Requests that come after use nothing that was computed before; open ones go on. True when it is done."""
        await (await self._attached().next_driver(None, None)).reset_prefix_cache()
        return True

    async def close(self) -> None:
        """Ends this client's connections, of all event loops, and their open requests with `EngineError`. Safe to call
        twice, and without effect in a forked child."""
        if os.getpid() != self._pid:
            return
        self._closed = True
        with self._lock:
            attachments, self._attachments = self._attachments, {}
        for loop, attachment in attachments.items():
            if loop is asyncio.get_running_loop():
                attachment.end()
                await asyncio.wait([attachment.keeper])
            else:
                with contextlib.suppress(RuntimeError):  # that loop has ended
                    loop.call_soon_threadsafe(attachment.end)

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
