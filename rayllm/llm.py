"""RayLLM from Python: `LLM` (blocking), `AsyncLLM` (asyncio) and `get_engine` (a running engine, from any Ray job)."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from rayllm.config import DEFAULT_ENGINE_NAME, EngineConfig, ResolvedConfig
from rayllm.engine.local import BlockingEngine, LocalEngine
from rayllm.engine.outputs import OutputBuilder, PreparedPrompt, Prompt, build_request, derived_seed, prepare_prompt
from rayllm.engine.resolve import resolve
from rayllm.errors import RequestError, did_you_mean
from rayllm.messages import EngineStats
from rayllm.request import CompletionOutput, Request, RequestOutput, SamplingParams
from rayllm.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
Conversation = Sequence[Message]


def _engine_config(model: str, settings: dict[str, Any]) -> EngineConfig:
    unknown = [name for name in settings if name not in EngineConfig.model_fields]
    if unknown:
        near = did_you_mean(unknown[0], EngineConfig.model_fields)
        raise TypeError(f"LLM() got an unexpected keyword argument {unknown[0]!r}{near}")
    config: EngineConfig = EngineConfig.parse({"model": str(model), **settings})
    return config


def _ray_is_initialized() -> bool:
    import sys

    ray = sys.modules.get("ray")
    return bool(ray is not None and ray.is_initialized())


def _resolve(config: EngineConfig) -> ResolvedConfig:
    """With a Ray at hand, its cluster's devices count, and it carries the engine."""
    if config.distributed_executor_backend == "inproc" or not _ray_is_initialized():
        return resolve(config)
    from rayllm.executor.placement import cluster_devices

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
        self._tokenizer = Tokenizer.from_path(self.config.tokenizer_path, config.chat_template)
        self._engine = _open_engine(self.config)
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

        Raises `RequestError` (nothing is started) when a prompt does not fit, `EngineError` when the engine is lost.
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
        """Answers one conversation or several, rendered by the model's chat template."""
        conversations: Any = [messages] if _is_conversation(messages) else messages
        return self._run(
            [
                _render(self._tokenizer, conversation, add_generation_prompt, chat_template_kwargs)
                for conversation in conversations
            ],
            sampling_params,
            use_tqdm,
        )

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[CompletionOutput]:
        """One prompt's answer as it comes: each item holds what was added to its choice (`index`). Leaving the loop
        ends the request."""
        [builder], first = self._submit([prepare_prompt(prompt, self._tokenizer)], [sampling_params or SamplingParams()])
        try:
            while not builder.finished:
                for delta in self._engine.receive():
                    added, ended_by_text = builder.push(delta.stream - first, delta)
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
        return [builder.output() for builder in builders]

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
        return build_request(uuid.uuid4().hex, prompt.token_ids, params, self.config, seed)

    def _abort(self, streams: range) -> None:
        for stream in streams:
            self._engine.abort(stream)

    # ------------------------------------------------------------------------------------------------ the engine

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def stats(self) -> EngineStats:
        """The engine's counters and gauges."""
        return self._engine.stats()

    def close(self) -> None:
        """Ends the engine and every process it started; safe to call twice."""
        self._engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """One prompt (text, ids, mapping) or a list of them -> a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]
    return listed


def _per_prompt(params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(f"{len(params)} sampling_params for {num_prompts} prompts: give one, or one for each")
    return params


def _render(
    tokenizer: Tokenizer, conversation: Conversation, add_generation_prompt: bool, kwargs: dict[str, Any] | None
) -> PreparedPrompt:
    text = tokenizer.render_chat(list(conversation), add_generation_prompt=add_generation_prompt, **(kwargs or {}))
    return PreparedPrompt(text, tokenizer.encode(text, add_special_tokens=False))


def _progress(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="Processed prompts", disable=None if shown else True, dynamic_ncols=True)
