"""What the offline benchmarks generate from: random prompts, or conversations of a file in ShareGPT's form."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError

_FIRST_PLAIN_ID = 4
"""Lower ids are special in the random models."""
_MIN_TOKENS = 4
_MAX_PROMPT_TOKENS = 1024
_MAX_TOKENS = 2048
"""Conversations with fewer or more tokens are left out, as by vLLM's benchmark."""


@dataclass(frozen=True)
class Workload:
    """`prompts` are token ids; each is continued, `num_samples` times, by exactly so many tokens of `output_lens`."""

    prompts: list[list[int]]
    output_lens: list[int]
    num_samples: int = 1

    @property
    def num_output_tokens(self) -> int:
        return sum(self.output_lens) * self.num_samples

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + self.num_output_tokens


def random_workload(*, num_prompts: int, input_len: int, output_len: int, vocab_size: int, seed: int) -> Workload:
    """Prompts of random ids; the same arguments give the same prompts."""
    ids = random.Random(seed)
    prompts = [[ids.randrange(_FIRST_PLAIN_ID, vocab_size) for _ in range(input_len)] for _ in range(num_prompts)]
    return Workload(prompts, [output_len] * num_prompts)


def read_sharegpt(
    path: str,
    encode: Callable[[str], list[int]],
    *,
    num_prompts: int,
    output_len: int | None,
    seed: int,
    max_model_len: int,
) -> Workload:
    """The first two turns of conversations drawn from a file in ShareGPT's form: a prompt, and an answer whose length
    is generated, unless `output_len` says another. Raises `ConfigError` for a file of another form, or without any that
    fit."""
    pairs = list(_pairs(path))
    random.Random(seed).shuffle(pairs)
    prompts: list[list[int]] = []
    output_lens: list[int] = []
    for question, answer in pairs:
        if len(prompts) == num_prompts:
            break
        prompt = encode(question)
        length = output_len or len(encode(answer))
        num_tokens = len(prompt) + length
        if min(len(prompt), length) < _MIN_TOKENS or len(prompt) > _MAX_PROMPT_TOKENS:
            continue
        if num_tokens <= min(_MAX_TOKENS, max_model_len):
            prompts.append(prompt)
            output_lens.append(length)
    if not prompts:
        raise ConfigError(
            f"dataset {path!r} has no conversation of {_MIN_TOKENS} to {_MAX_PROMPT_TOKENS} prompt tokens that fits "
            f"max_model_len={max_model_len}"
        )
    return Workload(prompts, output_lens)


def _pairs(path: str) -> Iterator[tuple[str, str]]:
    form = 'a JSON list of {"conversations": [{"value": TEXT}, {"value": TEXT}, …]}'
    try:
        entries: Any = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"dataset {path!r} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"dataset {path!r} is not JSON ({error}): give {form}") from None
    if not isinstance(entries, list):
        raise ConfigError(f"dataset {path!r} holds a {type(entries).__name__}: give {form}")
    for entry in entries:
        turns = entry.get("conversations", entry.get("conversation")) if isinstance(entry, dict) else None
        if not isinstance(turns, list) or len(turns) < 2:
            continue
        values = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        if isinstance(values[0], str) and isinstance(values[1], str):
            yield values[0], values[1]
