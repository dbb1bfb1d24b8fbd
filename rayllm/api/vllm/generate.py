"""`/generate`, as vLLM's demo server has it: prompt and completion as one text; and its stream as events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson

from rayllm.api.answer import Answer, new_id
from rayllm.api.errors import answer_for
from rayllm.api.offload import offload, offload_unless
from rayllm.api.openai.completions import default_max_tokens, read_prompt
from rayllm.api.protocol import GenerateBody, read_body
from rayllm.api.sampling import num_further_characters, request_of_body, sampling_params
from rayllm.api.service import ModelService, ServedModel
from rayllm.api.sse import DONE, error_event, log_fault
from rayllm.api.structured import structured_field, tried
from rayllm.errors import RequestError, shorten
from rayllm.prompt.prompts import PreparedPrompt
from rayllm.request import Request

_NOT_SHOWN = (
    "stream_options",
    "prompt_logprobs",
    "return_token_ids",
    "logprob_token_ids",
    "return_tokens_as_token_ids",
    "use_beam_search",
)
"""Fields that ask for more than text, for which this answer has no place."""


async def open_generate(fields: dict[str, Any], service: ModelService, client_key: str = "") -> GenerateAnswer:
    """Checks a body and submits it. Raises `RequestError`, `OverloadedError` or `EngineError`."""
    return GenerateAnswer(*await _read(fields, service, client_key))


async def open_generate_stream(fields: dict[str, Any], service: ModelService, client_key: str = "") -> GenerateAnswer:
    """The same, whose stream is of server-sent events."""
    return GenerateEvents(*await _read(fields, service, client_key))


async def _read(
    fields: dict[str, Any], service: ModelService, client_key: str
) -> tuple[ServedModel, PreparedPrompt, Request]:
    body = await offload(read_body, fields, GenerateBody)
    model = service.named(body.model)
    for name in _NOT_SHOWN:
        if getattr(body, name):
            raise RequestError(f"{name} has no place in this answer: use /v1/completions", param=name)
    if not isinstance(body.prompt, (str, list)) or (not body.prompt and body.prompt != ""):
        raise RequestError(f"prompt must be text or token ids, got {shorten(body.prompt)}", param="prompt")
    if isinstance(body.prompt, list) and not await offload(_are_ids, body.prompt):
        raise RequestError("prompt must be one text or the token ids of one", param="prompt")
    is_short = model.prepares_inline(len(body.prompt) + num_further_characters(body), is_chat=False)
    prompt, request = await offload_unless(is_short, _prepare, body, model, client_key)
    return model, prompt, await tried(request, model, structured_field(body))


def _are_ids(prompt: list[Any]) -> bool:
    return all(type(token_id) is int for token_id in prompt)


def _prepare(body: GenerateBody, model: ServedModel, client_key: str) -> tuple[PreparedPrompt, Request]:
    params = sampling_params(body, model, max_tokens=body.max_tokens)
    prompt = read_prompt(body, body.prompt, model)
    request = request_of_body(
        new_id("gen-"), prompt.token_ids, params, body, model.config, default_max_tokens(model.config), client_key
    )
    return prompt, request


class GenerateAnswer(Answer):
    """`{"text": [prompt + completion, ...]}`; its stream is a line of that for each step, each longer than the
    last."""

    media_type = "application/x-ndjson"

    def __init__(self, model: ServedModel, prompt: PreparedPrompt, request: Request):
        super().__init__(model, [request], request.request_id)
        text = model.tokenizer.decode(prompt.token_ids, True) if prompt.text is None else prompt.text
        self._texts = [text] * self.generation.num_choices

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            async for body in self._grown():
                yield body + b"\n"
        except Exception as error:
            log_fault(error)
            yield orjson.dumps(answer_for(error).body) + b"\n"

    async def _grown(self) -> AsyncIterator[bytes]:
        async for news in self.generation.batches():
            for choice, text in news:
                self._texts[choice.index] += text
            yield orjson.dumps({"text": self._texts})

    def _whole(self) -> dict[str, Any]:
        choices = self.generation.choices
        return {"text": [text + choice.text.text for text, choice in zip(self._texts, choices, strict=True)]}


class GenerateEvents(GenerateAnswer):
    """The same lines as events, then `[DONE]`."""

    media_type = "text/event-stream"

    async def stream(self) -> AsyncIterator[bytes]:
        number = 0
        try:
            async for body in self._grown():
                number += 1
                yield b"data: " + body + f"\nid: {self.id}:{number}\n\n".encode()
        except Exception as error:
            yield error_event(error)
        yield DONE
