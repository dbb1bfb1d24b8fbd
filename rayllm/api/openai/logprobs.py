"""Log-probabilities in the three shapes of the APIs. Minus infinity, which JSON cannot say, is shown as
-9999."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any

from orjson import Fragment, dumps

from rayllm.messages import TokenLogprobs
from rayllm.request import unpack_ids
from rayllm.text.tokenizer import Tokenizer

_LOWEST = -9999.0
_NUM_OBJECTS = 1024
"""Positions that are given as objects. Those of longer lists are JSON text already: one at a time they are made, freed
and written without keeping the event loop from the interpreter for long."""


def _writer(num_positions: int) -> Callable[[Any], Any]:
    """What becomes of the value of each of so many positions."""
    return (lambda value: value) if num_positions <= _NUM_OBJECTS else (lambda value: Fragment(dumps(value)))


def _unpack(packed: TokenLogprobs) -> list[tuple[int, float]]:
    """(id, log-probability): the token itself, then the most likely in falling order."""
    values = array("f")
    values.frombytes(packed.values)
    return [
        (token_id, value if value >= _LOWEST else _LOWEST)  # NaN too
        for token_id, value in zip(unpack_ids(packed.ids), values, strict=True)
    ]


def own_logprob(packed: TokenLogprobs) -> float:
    """The token's own log-probability."""
    return _unpack(packed)[0][1]


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], *, as_ids: bool = False, shows_own: bool = False
) -> dict[str, Any]:
    """OpenAI's object for chats: an entry a token, with its bytes. `as_ids`: tokens are written as their ids.
    `shows_own`: the token itself is among `top_logprobs` too."""

    def candidate(token_id: int, value: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        text = _id_text(token_id) if as_ids else raw.decode("utf-8", "replace")
        return {"token": text, "logprob": value, "bytes": list(raw)}

    content, written = [], _writer(len(entries))
    for packed in entries:
        own, *top = _unpack(packed)
        if shows_own:
            top = [own, *(entry for entry in top if entry[0] != own[0])]
        content.append(written({**candidate(*own), "top_logprobs": [candidate(*entry) for entry in top]}))
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    offsets: Sequence[int],
    *,
    as_ids: bool = False,
) -> dict[str, Any]:
    """OpenAI's object for completions: four lists, parallel with the tokens. A prompt's first token has no
    entry. `as_ids`: tokens are written as their ids."""

    def text(token_id: int) -> str:
        return _id_text(token_id) if as_ids else _legacy_text(tokenizer, token_id)

    token_logprobs: list[float | None] = []
    top_logprobs: list[Any] = []
    written = _writer(len(entries))
    for packed in entries:
        if packed is None:
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        candidates = _unpack(packed)
        token_logprobs.append(candidates[0][1])
        top_logprobs.append(written({text(token_id): value for token_id, value in candidates}))
    return {
        "tokens": [text(token_id) for token_id in token_ids],
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": list(offsets),
    }


def _id_text(token_id: int) -> str:
    """vLLM's format for a token by its id."""
    return f"token_id:{token_id}"


def _legacy_text(tokenizer: Tokenizer, token_id: int) -> str:
    """OpenAI's format for a token that is no whole character: `bytes:\\xe4\\xb8`."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def prompt_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs] | None) -> list[Any] | None:
    """vLLM's list: nothing for the first token, then for each position an object of its candidates by id."""
    if entries is None:
        return None
    shown: list[Any] = [None]
    written = _writer(len(entries))
    for packed in entries:
        position: dict[str, dict[str, Any]] = {}
        for place, (token_id, value) in enumerate(_unpack(packed)):
            rank = packed.rank if place == 0 else place
            candidate = {"logprob": value, "rank": rank, "decoded_token": tokenizer.token_text(token_id)}
            position.setdefault(str(token_id), candidate)
        shown.append(written(position))
    return shown
