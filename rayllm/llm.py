"""RayLLM from Python: `LLM` (blocking) and `AsyncLLM` (asyncio). For running engines see `rayllm.remote`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rayllm.config import EngineConfig, ResolvedConfig, not_supported_yet
from rayllm.engine.client import EngineConnection, connect
from rayllm.engine.continued import ContinuedEngine
from rayllm.engine.driver import Driver
from rayllm.engine.generation_config import default_sampling_params
from rayllm.engine.journal import JournaledEngine
from rayllm.engine.local import BlockingEngine, LocalEngine
from rayllm.engine.outputs import (
    Conversation,
    OutputBuilder,
    PreparedPrompt,
    Prompt,
    build_request,
    derived_seed,
    prepare_chat,
    prepare_prompt,
    raise_failed,
    settle,
)
from rayllm.engine.owner import OwnedEngine
from rayllm.engine.resolve import resolve
from rayllm.errors import EngineError, RequestError, did_you_mean
from rayllm.executor.inproc import InprocExecutor
from rayllm.executor.placement import cluster_devices
from rayllm.executor.ray_cluster import connected_ray, ray_is_initialized
from rayllm.messages import EngineStats
from rayllm.request import CompletionOutput, Request, RequestOutput, SamplingParams
from rayllm.text.tokenizer import Tokenizer
from rayllm.weights.hub import bring_here


def _engine_config(model: str, settings: dict[str, Any]) -> EngineConfig:
    unknown = [name for name in settings if name not in EngineConfig.model_fields]
    if unknown:
        near = did_you_mean(unknown[0], EngineConfig.model_fields)
        lacking = not_supported_yet(unknown[0], f"{unknown[0]}=")
        raise TypeError(lacking or f"LLM() got an unexpected keyword argument {unknown[0]!r}{near}")
    name = f"llm-{uuid.uuid4().hex[:8]}"  # so that a program may have several
    no_limits = {"max_queued_requests": None, "max_queued_tokens": None}  # a program gives all that it has at once
    config: EngineConfig = EngineConfig.parse({"model": str(model), "name": name, **no_limits, **settings})
    return config


def _resolve(config: EngineConfig) -> ResolvedConfig:
    """With a Ray at hand, its cluster's devices count, and it carries the engine. A model that is named by its hub's
    name and not on this machine is downloaded first."""
    bring_here(config)
    if config.distributed_executor_backend == "inproc" or not ray_is_initialized():
        return resolve(config)
    num_gpus, num_cores = cluster_devices()
    return resolve(config, num_gpus=num_gpus, num_cores=num_cores, backend="ray")


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
        self._cleanup = contextlib.ExitStack()
        with self._cleanup as cleanup:
            self._engine = _open_engine(self.config, cleanup)
            self._cleanup = cleanup.pop_all()
        self._next_stream = 0
        self._num_unseeded = 0

    # ------------------------------------------------------------------------------------------------ requests

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Completes every prompt; outputs in the order of the prompts.

        An answer that the engine gives up (its logits are no numbers, its grammar leaves no token, ...) has the
        `finish_reason` `"error"`, says why in `error`, and costs the others nothing. Raises `RequestError` (nothing is
        started) when a prompt does not fit, `EngineError` when the engine is lost, or gave every answer up.
        """
        return self._run([prepare_prompt(p, self._tokenizer) for p in _as_prompts(prompts)], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or several, rendered by the model's chat template. Errors are as in `generate`."""
        conversations: Any = [messages] if _is_conversation(messages) else messages
        return self._run(
            [
                prepare_chat(self._tokenizer, conversation, add_generation_prompt, chat_template_kwargs)
                for conversation in conversations
            ],
            sampling_params,
            use_tqdm,
        )

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[CompletionOutput]:
        """One prompt's answer as it comes: each item holds what was added to its choice (`index`). Leaving the loop
        ends the request. Raises `EngineError` when the engine is lost or gives a choice up."""
        [builder], first = self._submit(
            [prepare_prompt(prompt, self._tokenizer)], [sampling_params or self.get_default_sampling_params()]
        )
        try:
            while not builder.finished:
                for delta in self._engine.receive():
                    added, ended_by_text = builder.push(delta.stream - first, delta)
                    raise_failed(added)
                    if ended_by_text:
                        self._engine.abort(delta.stream)
                    if added.token_ids or added.text or added.finish_reason:
                        yield added
        finally:
            self._abort(range(first, first + builder.request.params.n))

    def _run(
        self,
        prompts: list[PreparedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        sampling_params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        builders, first = self._submit(prompts, _per_prompt(sampling_params, len(prompts)))
        owners = [(builder, choice) for builder in builders for choice in range(builder.request.params.n)]
        progress = _progress(len(builders), use_tqdm)
        num_open = len(builders)
        try:
            while num_open:
                for delta in self._engine.receive():
                    if not first <= delta.stream < first + len(owners):
                        continue
                    builder, choice = owners[delta.stream - first]
                    was_finished = builder.finished
                    _, ended_by_text = builder.push(choice, delta)
                    if ended_by_text:
                        self._engine.abort(delta.stream)
                    if builder.finished and not was_finished:
                        num_open -= 1
                        progress.update(1)
        finally:
            progress.close()
            if num_open:
                self._abort(range(first, first + len(owners)))
        outputs = [builder.output() for builder in builders]
        settle(outputs)
        return outputs

    def _submit(
        self, prompts: list[PreparedPrompt], params: Sequence[SamplingParams]
    ) -> tuple[list[OutputBuilder], int]:
        """Builds all requests, then submits them: a fault in one starts none. Returns the first stream's number."""
        requests = [self._request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
        builders = [OutputBuilder(r, p, self._tokenizer) for r, p in zip(requests, prompts, strict=True)]
        first = self._next_stream
        for request in requests:
            self._engine.submit(self._next_stream, request)
            self._next_stream += request.params.n
        return builders, first

    def _request(self, prompt: PreparedPrompt, params: SamplingParams) -> Request:
        seed = 0
        if params.seed is None and not params.greedy:
            seed = derived_seed(self.config.engine.seed, self._num_unseeded)
            self._num_unseeded += 1
        return build_request(uuid.uuid4().hex, prompt.token_ids, params, self.config, self._tokenizer, seed)

    def _abort(self, streams: range) -> None:
        for stream in streams:
            self._engine.abort(stream)

    # ------------------------------------------------------------------------------------------------ the engine

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters of a call that brings none: the model's generation_config.json, as `generation_config` and
        `override_generation_config` have it."""
        return default_sampling_params(self.config.generation)

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self._engine.stats()

    def close(self) -> None:
        """Ends the engine and every process it started; safe to call twice."""
        self._cleanup.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """One prompt (text, ids, mapping) or a list of them -> a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]
    return listed


def _per_prompt(params: SamplingParams | Sequence[SamplingParams], num_prompts: int) -> Sequence[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(f"{len(params)} sampling_params for {num_prompts} prompts: give one, or one for each")
    return params


def _progress(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="Processed prompts", disable=None if shown else True, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------- where it runs


def _open_engine(config: ResolvedConfig, cleanup: contextlib.ExitStack) -> BlockingEngine:
    """The engine as one thread sees it; `cleanup` gets what ends it."""
    if config.backend == "inproc":
        engine = LocalEngine(config, InprocExecutor.load(config))
        cleanup.callback(engine.close)
        return engine
    owned = _start_owned(config, cleanup)
    continued = ContinuedEngine(owned.connect(), owned.reconnect)
    cleanup.callback(continued.close)
    return continued


def _start_owned(config: ResolvedConfig, cleanup: contextlib.ExitStack) -> OwnedEngine:
    """A driver actor with its workers, ready, in this process's Ray or in one of its own."""
    cleanup.enter_context(connected_ray(num_cpus=1 + config.engine.tensor_parallel_size))
    owned = OwnedEngine(config)
    cleanup.callback(owned.close)
    owned.start()
    return owned


def _this_node() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


# ------------------------------------------------------------------------------------------------------------ async


class AsyncEngine:
    """A running engine for asyncio programs: what `AsyncLLM` is, and what `rayllm.remote` uses.

    `keep_attached(engine)` runs beside the requests, attaches a driver to `engine`, and the next one where that is
    lost: open requests go on with it. Use one event loop.
    """

    def __init__(self, config: ResolvedConfig, keep_attached: Callable[[JournaledEngine], Awaitable[None]]):
        self.config = config
        self._engine = JournaledEngine(config.engine.driver_wait_s)
        self._keep_attached = keep_attached
        self._keeper: asyncio.Task[None] | None = None
        self._tokenizer: Tokenizer | None = None
        self._num_unseeded = 0

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
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """One conversation's answer as it grows; see `generate`."""
        prepared = prepare_chat(self.get_tokenizer(), messages, add_generation_prompt, chat_template_kwargs)
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
            seed = derived_seed(self.config.engine.seed, self._num_unseeded)
            self._num_unseeded += 1
        tokenizer, request_id = self.get_tokenizer(), request_id or uuid.uuid4().hex
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
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep())
        return self._engine

    async def _keep(self) -> None:
        try:
            await self._keep_attached(self._engine)
        except Exception as error:
            self._engine.end(error if isinstance(error, EngineError) else EngineError(f"the engine is lost: {error}"))

    def get_default_sampling_params(self) -> SamplingParams:
        """Parameters of a call that brings none: the model's generation_config.json, as `generation_config` and
        `override_generation_config` have it."""
        return default_sampling_params(self.config.generation)

    def get_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = Tokenizer.from_config(self.config)
        return self._tokenizer

    async def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return await (await self._attached().next_driver(None, None)).stats()

    async def close(self) -> None:
        """Ends this client's connection, and its open requests with it."""
        self._engine.end(EngineError("the engine was closed", code="engine_gone"))
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])

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
                super().__init__(config, _OwnedDrivers(_start_owned(config, cleanup)).keep_attached)
            else:
                local = Driver(lambda config, on_stage: InprocExecutor.load(config))
                local.start(config)
                cleanup.callback(local.close)
                super().__init__(config, functools.partial(_attach_local, local))
            self.get_tokenizer()
            self._cleanup = cleanup.pop_all()

    async def close(self) -> None:
        await super().close()
        await asyncio.to_thread(self._cleanup.close)


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
        if self._was_lost and (failure := await asyncio.to_thread(owned.failure)) is not None:
            await asyncio.to_thread(owned.replace, failure)
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


async def _attach_local(local: Driver, engine: JournaledEngine) -> None:
    """Attaches the driver in this process; when it fails, there is no other."""
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[str] = loop.create_future()

    def on_failed(reason: str) -> None:
        with contextlib.suppress(RuntimeError):  # the program has left its event loop
            loop.call_soon_threadsafe(failed.set_result, reason)

    local.on_failed = on_failed
    async with await connect(local.address()) as connection:
        engine.attach(connection)
        raise EngineError(local.failure or await failed)
