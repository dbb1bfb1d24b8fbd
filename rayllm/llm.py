"""`LLM`: a model for one program, blocking. For asyncio see `rayllm.async_llm`, for running engines `rayllm.remote`."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rayllm.config import ContentFormat
from rayllm.engine.client.beam_search import BeamSearchOutput, BeamSearchParams
from rayllm.engine.client.engine_thread import check_not_forked, closed_error
from rayllm.engine.client.prompt_runner import AnswerStream, PromptRunner, ShowsProgress, per_prompt
from rayllm.engine.owner.generation_config import default_sampling_params
from rayllm.engine.owner.program import finalizer, open_engine, program_config, resolve_for_program
from rayllm.errors import RequestError
from rayllm.messages import EngineStats
from rayllm.prompt.conversations import ChatPrompts
from rayllm.prompt.prompts import Conversation, Prompt, prepare_prompt
from rayllm.prompt.text_model import TextModel
from rayllm.request import RequestOutput, SamplingParams
from rayllm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


def _is_conversation(messages: Conversation | Sequence[Conversation]) -> bool:
    return bool(messages) and isinstance(messages[0], Mapping)


class LLM:
    """A model for one program. Settings are `EngineConfig`'s; an unknown one is a `TypeError` with the nearest name.

    Without a model, the built-in one. One worker runs in this process; more than one, or a program that has started
    Ray, gets worker actors. Use it as a context manager, or call `close`: no process is left behind.
    """

    def __init__(self, model: str = "", **settings: Any):
        config = resolve_for_program(program_config(model, settings))
        self._tokenizer = Tokenizer.from_config(config)
        self._pid = os.getpid()
        with contextlib.ExitStack() as cleanup:
            engine, self.config = open_engine(config, cleanup)
            self._text_model = TextModel(self.config, self._tokenizer)
            self._client = PromptRunner(engine, self.config, self._tokenizer)
            self._ends = finalizer(self, cleanup.pop_all())

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
        listed = _as_prompts(prompts)
        params = self._params(sampling_params, len(listed))
        prepared = [prepare_prompt(prompt, self._text_model, p) for prompt, p in zip(listed, params, strict=True)]
        return client.run(prepared, params, use_tqdm)

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
        options have the meaning of its fields (`options`: `ChatPrompts.prepare`). `add_generation_prompt`: begin the
        assistant's turn; default: unless `continue_final_message`. Errors are as in `generate`."""
        client = self._usable()
        conversations: Any = [messages] if _is_conversation(messages) else messages
        chats = [
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
        params = self._params(sampling_params, len(chats))
        bound = [chat.params(given) for chat, given in zip(chats, params, strict=True)]
        return client.run([chat.prompt for chat in chats], bound, use_tqdm)

    @functools.cached_property
    def _chat_prompts(self) -> ChatPrompts:
        return ChatPrompts(self.config, self._tokenizer)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> AnswerStream:
        """One prompt's answer as it comes: each item holds what was added to its choice (`index`). Leaving the loop
        ends the request. Raises as `generate` does, and `EngineError` when the engine gives a choice up."""
        client = self._usable()
        [params] = self._params(sampling_params, 1)
        return client.stream(prepare_prompt(prompt, self._text_model, params), params)

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
        prepared = [prepare_prompt(prompt, self._text_model) for prompt in _as_prompts(prompts)]
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

    def _usable(self) -> PromptRunner:
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


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Any]:
    """One prompt (text, ids, mapping) or a list of them -> a list."""
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    listed: list[Any] = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]
    return listed
