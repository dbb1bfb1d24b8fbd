"""`/v1/completions`: text or token ids in, text out; batches of prompts, echo, best_of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from rayllm.api.answer import ChunkedAnswer, check_stream_options, new_id
from rayllm.api.beam import with_beam_search
from rayllm.api.choice import Choice
from rayllm.api.offload import offload, offload_unless
from rayllm.api.openai.logprobs import completion_logprobs, own_logprob, prompt_logprobs
from rayllm.api.protocol import MAX_CHOICES_IN_ALL, MAX_PROMPTS, CompletionBody, GenerationBody, read_body
from rayllm.api.sampling import num_further_characters, request_of_body, sampling_params, truncate_ids
from rayllm.api.service import ModelService, ServedModel
from rayllm.api.structured import structured_field, tried
from rayllm.config import ResolvedConfig
from rayllm.errors import RequestError, shorten
from rayllm.prompt.prompts import PreparedPrompt
from rayllm.request import MAX_CHOICES, Request, SamplingParams
from rayllm.text.detokenizer import ChoiceText

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's, where the model has no default of its own."""
_PROMPT_CHARACTERS = 256
"""A prompt takes as long as so many characters, besides its own."""


def default_max_tokens(config: ResolvedConfig) -> int:
    """New tokens of a completion that asks for no number."""
    return config.generation.max_tokens or _DEFAULT_MAX_TOKENS


async def open_completion(fields: dict[str, Any], service: ModelService, client_key: str = "") -> CompletionAnswer:
    """Checks a body and submits it. Raises `RequestError`, `OverloadedError` or `EngineError`."""
    body = await offload(read_body, fields, CompletionBody)
    model = service.named(body.model)
    check_stream_options(body)
    raw_prompts = await offload(_prompt_list, body.prompt)
    num_characters = sum(_PROMPT_CHARACTERS + len(prompt) for prompt in raw_prompts) + num_further_characters(body)
    is_short = model.prepares_inline(num_characters, is_chat=False)
    prompts, requests = await offload_unless(is_short, _prepare, body, raw_prompts, model, client_key)
    params = (await tried(requests[0], model, structured_field(body))).params  # which all of them share
    if params is not requests[0].params:
        requests = [msgspec.structs.replace(request, params=params) for request in requests]
    return CompletionAnswer(with_beam_search(model, body, params), body, prompts, requests)


def _prompt_list(prompt: Any) -> list[str | list[int]]:
    """The prompts, one or many. Token ids are checked later, against the vocabulary."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if len(prompt) > MAX_PROMPTS and isinstance(prompt[0], (str, list)):
            raise RequestError(f"prompt holds {len(prompt)} prompts, at most {MAX_PROMPTS} are allowed", param="prompt")
        if all(isinstance(entry, str) for entry in prompt) or all(_is_ids(entry) for entry in prompt):
            return prompt
        if _is_ids(prompt):
            return [prompt]
    raise RequestError(f"prompt must be text, token ids, or a list of either, got {shorten(prompt)}", param="prompt")


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(entry) is int for entry in value)


def _prepare(
    body: CompletionBody, raw_prompts: Sequence[str | list[int]], model: ServedModel, client_key: str
) -> tuple[list[PreparedPrompt], list[Request]]:
    params = sampling_params(body, model, **_settled(body))
    if len(raw_prompts) * params.n > MAX_CHOICES_IN_ALL:
        raise RequestError(
            f"{len(raw_prompts)} prompts with {params.n} choices each are more than {MAX_CHOICES_IN_ALL} in all",
            param="n",
        )
    prompts = [read_prompt(body, prompt, model) for prompt in raw_prompts]
    answer_id, num_tokens = new_id("cmpl-"), default_max_tokens(model.config)
    requests = [
        request_of_body(f"{answer_id}-{i}", prompt.token_ids, params, body, model.config, num_tokens, client_key)
        for i, prompt in enumerate(prompts)
    ]
    return prompts, requests


def _settled(body: CompletionBody) -> dict[str, Any]:
    """The parameters that depend on others of the body."""
    num_choices = _num_generated_choices(body)
    ranks = num_choices > (body.n or 1)
    settled: dict[str, Any] = {
        "n": 1 if body.n is None else body.n,
        "logprobs": 0 if body.logprobs is None and ranks else body.logprobs,
        "max_tokens": body.max_tokens,
    }
    if ranks:
        settled["n"] = num_choices
    if body.echo and body.max_tokens == 0:
        settled["max_tokens"] = 1  # the engine always draws a token; it is not shown
    if body.logprob_token_ids is not None:
        if body.logprobs is None:
            raise RequestError("logprob_token_ids needs logprobs", param="logprob_token_ids")
        if body.echo and body.max_tokens == 0:
            raise RequestError("logprob_token_ids say nothing with max_tokens=0: no token is drawn", param="max_tokens")
        settled["logprobs"] = None
    if body.echo and body.logprobs is not None:
        if body.stream and num_choices > 1:
            raise RequestError("echo with logprobs is streamed for n=1 only", param="echo")
        asked = (body.logprobs, body.prompt_logprobs or 0)
        settled["prompt_logprobs"] = -1 if -1 in asked else max(asked)
    return settled


def _num_generated_choices(body: CompletionBody) -> int:
    num_choices = 1 if body.n is None else body.n
    if body.best_of is None:
        return num_choices
    if not 1 <= body.best_of <= MAX_CHOICES or body.best_of < num_choices:
        raise RequestError(
            f"best_of={shorten(body.best_of)} must be from n={num_choices} to {MAX_CHOICES}", param="best_of"
        )
    if body.stream and body.best_of > num_choices:
        raise RequestError("best_of cannot be streamed: the best is known at the end", param="best_of")
    return body.best_of


def read_prompt(body: GenerationBody, prompt: str | list[int], model: ServedModel) -> PreparedPrompt:
    """The ids of a prompt, cut where the body says so."""
    if isinstance(prompt, str):
        adds = body.add_special_tokens is not False
        ids = model.tokenize(prompt, add_special_tokens=adds, param="prompt")
        text: str | None = prompt
    else:
        ids, text = prompt, None
        if min(ids) < 0 or max(ids) >= model.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < model.vocab_size)
            raise RequestError(
                f"prompt: token id {shorten(wrong)} is out of vocabulary, which has {model.vocab_size} tokens",
                param="prompt",
            )
    kept = truncate_ids(ids, body, model.config.max_model_len)
    return PreparedPrompt(text if len(kept) == len(ids) else None, kept)


class CompletionAnswer(ChunkedAnswer):
    """An answer in OpenAI's completion shapes."""

    chunk_object = "text_completion"
    _body: CompletionBody

    def __init__(
        self, model: ServedModel, body: CompletionBody, prompts: Sequence[PreparedPrompt], requests: Sequence[Request]
    ):
        self._prompts = prompts
        self._only_scores = bool(body.echo) and body.max_tokens == 0
        super().__init__(model, body, requests, requests[0].request_id.rsplit("-", 1)[0])

    def _num_generated(self) -> int:
        return 0 if self._only_scores else super()._num_generated()

    def _entries(self, choice: Choice, text: str) -> Iterator[dict[str, Any]]:
        start, end = choice.num_sent, len(choice.token_ids)
        choice.num_sent = end
        if self._only_scores:
            text, end = "", start
        echoes = bool(self._body.echo) and start == 0
        has_tokens = end > start and (self._body.logprobs is not None or self._body.return_token_ids)
        if text or echoes or has_tokens:
            yield self._entry(choice, text, start, end, echoes)
        if choice.finish_reason is not None:
            yield {
                **self._entry(choice, "", end, end, False),
                "logprobs": None,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
            }

    def _entry(self, choice: Choice, text: str, start: int, end: int, echoes: bool) -> dict[str, Any]:
        """The tokens from `start` to `end`, after the prompt where it is echoed."""
        entry: dict[str, Any] = {"index": choice.index, "text": text, "logprobs": None, "finish_reason": None}
        if echoes:
            entry["text"] = self._echoed_text(choice.prompt_index) + text
        if self._body.logprobs is not None:
            entry["logprobs"] = self._logprobs(choice, start, end, echoes)
        if self._body.return_token_ids:
            entry["token_ids"] = choice.token_ids[start:end]
            entry["prompt_token_ids"] = self._prompts[choice.prompt_index].token_ids if start == 0 else None
        return entry

    def _echoed_text(self, prompt_index: int) -> str:
        prompt = self._prompts[prompt_index]
        if prompt.text is not None:
            return prompt.text
        return self._model.tokenizer.decode(prompt.token_ids, self._body.skip_special_tokens is not False)

    def _logprobs(self, choice: Choice, start: int, end: int, echoes: bool) -> dict[str, Any]:
        tokenizer = self._model.tokenizer
        base = len(self._echoed_text(choice.prompt_index)) if self._body.echo else 0
        ids, entries = choice.token_ids[start:end], list(choice.logprobs[start:end])
        offsets = [base + offset for offset in choice.text.offsets[start:end]]
        if not echoes:
            return completion_logprobs(tokenizer, ids, entries, offsets, as_ids=self._shows_ids)
        prompt_ids = self._prompts[choice.prompt_index].token_ids
        skips = self._body.skip_special_tokens is not False
        prompt_text = ChoiceText(tokenizer, SamplingParams(skip_special_tokens=skips))
        prompt_text.push(prompt_ids)
        scored = [None, *(self.generation.prompt_logprobs[choice.prompt_index] or [])]
        return completion_logprobs(
            tokenizer,
            [*prompt_ids, *ids],
            [*scored, *entries],
            [*prompt_text.offsets, *offsets],
            as_ids=self._shows_ids,
        )

    def _whole(self) -> dict[str, Any]:
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(self._best_choices())]
        return {**self._head, "object": "text_completion", "choices": choices, **self._closing_fields()}

    def _best_choices(self) -> list[Choice]:
        """For each prompt the n choices of the highest log-probability a token, where more than n were
        drawn."""
        num_shown, num_drawn = self._body.n or 1, self.generation.num_choices
        if num_shown == num_drawn:
            return self.generation.choices
        best: list[Choice] = []
        for start in range(0, len(self.generation.choices), num_drawn):
            drawn = self.generation.choices[start : start + num_drawn]
            best += sorted(drawn, key=_mean_logprob, reverse=True)[:num_shown]
        return best

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text, end = ("", 0) if self._only_scores else (choice.text.text, len(choice.token_ids))
        entry = {
            **self._entry(choice, text, 0, end, bool(self._body.echo)),
            "index": index,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            "prompt_logprobs": None,
        }
        for name in ("token_ids", "prompt_token_ids"):
            entry.setdefault(name, None)
        if self._body.prompt_logprobs is not None:
            entries = self.generation.prompt_logprobs[choice.prompt_index]
            entry["prompt_logprobs"] = prompt_logprobs(self._model.tokenizer, entries)
        return entry


def _mean_logprob(choice: Choice) -> float:
    values = [own_logprob(packed) for packed in choice.logprobs]
    return sum(values) / max(1, len(values))
