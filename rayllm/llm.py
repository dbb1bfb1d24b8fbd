"""RayLLM from Python: `LLM` (blocking) and `AsyncLLM` (asyncio). For running engines see `rayllm.remote`."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import itertools
import logging
import os
import threading
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rayllm.compatibility import notes
from rayllm.config import ContentFormat, EngineConfig, ResolvedConfig
from rayllm.engine.client.beam_search import BeamSearchOutput, BeamSearchParams
from rayllm.engine.client.blocking import AnswerStream, BlockingClient, ShowsProgress, per_prompt
from rayllm.engine.client.connection import EngineConnection, connect
from rayllm.engine.client.continued import ContinuedEngine
from rayllm.engine.client.engine_thread import EngineThread, check_not_forked, closed_error
from rayllm.engine.client.journal import JournaledEngine
from rayllm.engine.client.outputs import (
    Conversation,
    OutputBuilder,
    PreparedPrompt,
    Prompt,
    build_request,
    derived_seed,
    prepare_prompt,
    raise_failed,
    truncated,
)
from rayllm.engine.driver.actor import Driver
from rayllm.engine.owner.generation_config import default_sampling_params
from rayllm.engine.owner.local import LocalEngine
from rayllm.engine.owner.owner import OwnedEngine
from rayllm.engine.owner.resolve import resolve
from rayllm.engine.owner.watched import KeepAttached, WatchedEngine, while_ray_lives
from rayllm.errors import EngineError, RequestError, did_you_mean
from rayllm.executor.inproc import InprocExecutor
from rayllm.executor.placement import cluster_devices
from rayllm.executor.ray_cluster import connected_ray
from rayllm.executor.ray_connection import ray_is_initialized
from rayllm.messages import EngineStats
from rayllm.request import CompletionOutput, RequestOutput, SamplingParams
from rayllm.text.tokenizer import Tokenizer
from rayllm.weights.hub import ensure_downloaded

if TYPE_CHECKING:
    from rayllm.api.chat_prompt import ChatPrompts

log = logging.getLogger(__name__)


def _engine_config(model: str, settings: dict[str, Any]) -> EngineConfig:
    unknown = [name for name in settings if name not in EngineConfig.model_fields]
    if unknown:
        near = did_you_mean(unknown[0], EngineConfig.model_fields)
        raise TypeError(f"LLM() got an unexpected keyword argument {unknown[0]!r}{near}")
    name = f"llm-{uuid.uuid4().hex[:8]}"  # so that a program may have several
    no_limits = {"max_queued_requests": None, "max_queued_tokens": None}  # a program gives all that it has at once
    config: EngineConfig = EngineConfig.parse({"model": str(model), "name": name, **no_limits, **settings})
    return config


def _resolve(config: EngineConfig) -> ResolvedConfig:
    """With a Ray at hand, its cluster's devices count, and it carries the engine. A model that is named by its hub's
    name and not on this machine is downloaded first."""
    ensure_downloaded(config)
    if config.distributed_executor_backend == "inproc" or not ray_is_initialized():
        resolved = resolve(config)
    else:
        num_gpus, num_cores = cluster_devices()
        resolved = resolve(config, num_gpus=num_gpus, num_cores=num_cores, backend="ray")
    for line in notes(config, resolved.device):
        log.warning("%s", line)
    return resolved


def _is_conversation(messages: Conversation | Sequence[Conversation]) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping)


class LLM:
    """A model for one program. Settings are `EngineConfig`'s; an unknown one is a `TypeError` with the nearest name.

    Without a model, the built-in one. One worker runs in this process; more than one, or a program that has started
    Ray, gets worker actors. Use it as a context manager, or call `close`: no process is left behind.
    """

    def __init__(self, model: str = "", **settings: Any):
        config = _engine_config(model, settings)
        self.config = _resolve(config)
        self._tokenizer = Tokenizer.from_config(self.config)
        self._pid = os.getpid()
        with contextlib.ExitStack() as cleanup:
            self._client = BlockingClient(_open_engine(self.config, cleanup), self.config, self._tokenizer)
            self._ends = _ending(self, cleanup.pop_all())

    # ------------------------------------------------------------------------------------------------ requests

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: ShowsProgress = False,
    ) -> list[RequestOutput]:
        """Completes every prompt; outputs in the order of the prompts.

        An answer that the engine gives up (its logits are no numbers, its grammar leaves no token, ...) has the
        `finish_reason` `"error"`, says why in `error`, and costs the others nothing. Raises `RequestError` (nothing is
        started) when a prompt does not fit, `EngineError` when the engine is lost, or gave every answer up.
        """
        client = self._usable()
        prepared = [prepare_prompt(prompt, self._tokenizer) for prompt in _as_prompts(prompts)]
        return client.run(prepared, self._params(sampling_params, len(prepared)), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: ShowsProgress = False,
        *,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered as a server's `/v1/chat/completions` renders them: messages and
        options have the meaning of its fields (`options`: see `api.chat_prompt`). `add_generation_prompt`: begin the
        assistant's turn; default: unless `continue_final_message`. Errors are as in `generate`."""
        client = self._usable()
        conversations: Any = [messages] if _is_conversation(messages) else messages
        prepared = [
            self._chat_prompts.prepare(
                conversation,
                chat_template=chat_template,
                chat_template_content_format=chat_template_content_format,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                **options,
            )
            for conversation in conversations
        ]
        return client.run(prepared, self._params(sampling_params, len(prepared)), use_tqdm)

    @functools.cached_property
    def _chat_prompts(self) -> ChatPrompts:
        return _chat_prompts(self.config, self._tokenizer)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AnswerStream:
        """One prompt's answer as it comes: each item holds what was added to its choice (`index`). Leaving the loop
        ends the request. Raises as `generate` does, and `EngineError` when the engine gives a choice up."""
        client = self._usable()
        [params] = self._params(sampling_params, 1)
        return client.stream(prepare_prompt(prompt, self._tokenizer), params)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: ShowsProgress = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The `beam_width` best sequences of each prompt, prompts included, the best first. `concurrency_limit`: how
        many prompts are searched at a time. Errors are as in `generate`."""
        client = self._usable()
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"beam_search needs BeamSearchParams, got {type(params).__name__}", param="params")
        prepared = [prepare_prompt(prompt, self._tokenizer) for prompt in _as_prompts(prompts)]
        return client.beam_search(prepared, params, use_tqdm, concurrency_limit)

    # ------------------------------------------------------------------------------------------------ the engine

    def get_tokenizer(self) -> Tokenizer:
        self._usable()
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters of a call that brings none: the model's generation_config.json, as `generation_config` and
        `override_generation_config` have it."""
        self._usable()
        return default_sampling_params(self.config.generation)

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self._usable().engine.stats()

    def reset_prefix_cache(self) -> bool:
        """Requests that come after use nothing that was computed before; open ones go on. True when it is done."""
        self._usable().engine.ask(lambda engine: engine.reset_prefix_cache())
        return True

    def close(self) -> None:
        """Ends the engine and every process it started; open calls of other threads end with `EngineError`. Safe to
        call twice, and without effect in a forked child."""
        self._ends()

    def _params(
        self, given: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
    ) -> Sequence[SamplingParams]:
        return per_prompt(self.get_default_sampling_params() if given is None else given, num_prompts)

    def _usable(self) -> BlockingClient:
        """Raises `EngineError` where this LLM is closed, or this process is a forked child."""
        check_not_forked(self._pid)
        if not self._ends.alive:
            raise closed_error()
        return self._client

    def __enter__(self) -> LLM:
        self._usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _chat_prompts(config: ResolvedConfig, tokenizer: Tokenizer) -> ChatPrompts:
    from rayllm.api.chat_prompt import ChatPrompts  # what serves chats takes a second to import

    return ChatPrompts(config, tokenizer)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """One prompt (text, ids, mapping) or a list of them -> a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]
    return listed


# ---------------------------------------------------------------------------------------------------- where it runs


def _open_engine(config: ResolvedConfig, cleanup: contextlib.ExitStack) -> EngineThread:
    """The engine for all threads of this program; `cleanup` gets what ends it."""
    if config.backend == "inproc":
        thread = EngineThread(LocalEngine(config, InprocExecutor.load(config)))
        cleanup.callback(thread.join)
    else:
        cleanup.enter_context(connected_ray(num_cpus=1 + config.engine.layout.num_ranks))
        joined = cleanup.enter_context(contextlib.ExitStack())
        watched = _start_watched(config, cleanup)
        thread = EngineThread(ContinuedEngine(watched.connect(), watched.reconnect))
        joined.callback(thread.join)  # after `watched.close`, by which a replacement fails, and before Ray ends
    cleanup.callback(thread.close)
    return thread


def _ending(owner: Any, cleanup: contextlib.ExitStack) -> weakref.finalize[..., Any]:
    """What ends an engine, once: called by its owner's `close`, when the owner is garbage, or at the program's end,
    before Ray's own end, which was registered earlier. Without effect in forked children."""
    ends = weakref.finalize(owner, _close, cleanup, os.getpid())
    ends.atexit = False
    atexit.register(ends)
    return ends


def _close(cleanup: contextlib.ExitStack, pid: int) -> None:
    if os.getpid() == pid:
        cleanup.close()


def _start_watched(config: ResolvedConfig, cleanup: contextlib.ExitStack) -> WatchedEngine:
    """A driver actor with its workers, ready, in this process's Ray."""
    watched = WatchedEngine(config)
    cleanup.callback(watched.close)
    watched.start()
    return watched


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


# ------------------------------------------------------------------------------------------------------------ async


@dataclass(frozen=True)
class _Attachment:
    """An engine as one event loop has it."""

    engine: JournaledEngine
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
        prepared = await asyncio.to_thread(prepare_prompt, prompt, self.get_tokenizer())
        async for builder, _ in self._run(prepared, sampling_params or self.get_default_sampling_params(), request_id):
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
            self._chat_prompts = _chat_prompts(self.config, tokenizer)
        prepared = await asyncio.to_thread(self._chat_prompts.prepare, messages, **options)
        async for builder, _ in self._run(prepared, sampling_params or self.get_default_sampling_params(), request_id):
            yield builder.output()

    async def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[CompletionOutput]:
        """One prompt's answer as it comes: each item holds what was added to its choice (`index`)."""
        prepared = await asyncio.to_thread(prepare_prompt, prompt, self.get_tokenizer())
        async for _, added in self._run(prepared, sampling_params or self.get_default_sampling_params(), request_id):
            for part in added:
                yield part

    async def _run(
        self, prompt: PreparedPrompt, params: SamplingParams, request_id: str | None
    ) -> AsyncIterator[tuple[OutputBuilder, list[CompletionOutput]]]:
        seed = 0
        if params.seed is None and not params.greedy:
            seed = derived_seed(self.config.engine.seed, next(self._unseeded))
        tokenizer, request_id = self.get_tokenizer(), request_id or uuid.uuid4().hex
        prompt = truncated(prompt, params, self.config.max_model_len)
        request = build_request(request_id, prompt.token_ids, params, self.config, tokenizer, seed)
        builder = OutputBuilder(request, prompt, tokenizer)
        deltas = self._attached().submit(request)
        try:
            async for batch in deltas:
                parts = []
                for delta in batch:
                    added, ended_by_text = builder.push(delta.stream, delta)
                    raise_failed(added)
                    if ended_by_text:
                        deltas.abort_choice(delta.stream)
                    if added.token_ids or added.text or added.finish_reason:
                        parts.append(added)
                if parts:
                    yield builder, parts
        finally:
            deltas.close()

    def _attached(self) -> JournaledEngine:
        """The engine as the running event loop has it."""
        self._check_usable()
        loop = asyncio.get_running_loop()
        with self._lock:
            for other in [other for other in self._attachments if other.is_closed()]:
                del self._attachments[other]
            if loop not in self._attachments:
                engine = JournaledEngine(self.config.engine.driver_wait_s)
                self._attachments[loop] = _Attachment(engine, loop.create_task(self._keep(engine)))
            return self._attachments[loop].engine

    async def _keep(self, engine: JournaledEngine) -> None:
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


class AsyncLLM(AsyncEngine):
    """`LLM` for asyncio programs: many requests at once, each an async iterator. Settings are the same.

    The constructor returns when the engine is ready; `await close()` ends it with every process it started.
    """

    def __init__(self, model: str = "", **settings: Any):
        config = _resolve(_engine_config(model, settings))
        with contextlib.ExitStack() as cleanup:
            if config.backend == "ray":
                cleanup.enter_context(connected_ray(num_cpus=1 + config.engine.layout.num_ranks))
                owned = _start_watched(config, cleanup).owned
                super().__init__(config, while_ray_lives(lambda engine: _OwnedDrivers(owned).keep_attached(engine)))
            else:
                local = _LocalDriver(config)
                cleanup.callback(local.driver.close)
                super().__init__(config, local.keep_attached)
            self.get_tokenizer()
            self._ends = _ending(self, cleanup.pop_all())

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._ends)


class _OwnedDrivers:
    """Keeps an engine attached to drivers of this process's own making."""

    def __init__(self, owned: OwnedEngine):
        self._owned = owned
        self._was_lost = False
        self._watch: asyncio.Task[None] | None = None

    async def keep_attached(self, engine: JournaledEngine) -> None:
        try:
            await engine.keep_attached(self._connect, self._on_unreachable, on_lost=self._on_lost)
        finally:
            self._on_lost("")

    async def _connect(self) -> EngineConnection:
        owned = self._owned
        if self._was_lost:
            await asyncio.to_thread(owned.replace_if_failed)
        connection = await connect(await owned.driver.address.remote(_this_node()))
        self._watch = asyncio.create_task(self._close_when_failed(connection))
        return connection

    async def _close_when_failed(self, connection: EngineConnection) -> None:
        await self._owned.wait_failed()
        connection.close()

    async def _on_unreachable(self, error: Exception) -> None:
        self._on_lost("")
        if self._owned.has_given_up:
            raise error

    def _on_lost(self, reason: str) -> None:
        self._was_lost = True
        if self._watch is not None:
            self._watch.cancel()


class _LocalDriver:
    """Keeps an engine attached to the driver in this process; when that fails, there is no other."""

    def __init__(self, config: ResolvedConfig):
        self.driver = Driver(lambda config, on_stage: InprocExecutor.load(config))
        self._listeners: set[Callable[[str], None]] = set()
        self.driver.on_failed = self._tell
        self.driver.start(config)

    def _tell(self, reason: str) -> None:
        for listener in list(self._listeners):
            with contextlib.suppress(RuntimeError):  # the program has left that event loop
                listener(reason)

    async def keep_attached(self, engine: JournaledEngine) -> None:
        loop = asyncio.get_running_loop()
        failed: asyncio.Future[str] = loop.create_future()

        def listener(reason: str) -> None:
            loop.call_soon_threadsafe(failed.set_result, reason)

        self._listeners.add(listener)
        try:
            async with await connect(self.driver.address()) as connection:
                engine.attach(connection)
                raise EngineError(self.driver.failure or await failed)
        finally:
            self._listeners.discard(listener)
