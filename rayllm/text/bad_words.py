"""Words that shall not be written, as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.request import SamplingParams
from rayllm.text.tokenizer import Tokenizer


def with_bad_word_ids(params: SamplingParams, tokenizer: Tokenizer, vocab_size: int) -> SamplingParams:
    """The same parameters, with `bad_words` as `bad_words_token_ids`: all that an engine takes.

    `vocab_size`: that of the model. Raises `RequestError` for text that the tokenizer cannot read.
    """
    if not params.bad_words:
        return params
    found = [ids for ids in bad_word_ids(params.bad_words, tokenizer) if max(ids) < vocab_size]
    return params.with_(bad_words=(), bad_words_token_ids=(*params.bad_words_token_ids, *found))


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """Each word as it is written at the start of a text and after a space, once each. A word that is all white space
    stands as it is."""
    texts = [text for word in words for text in _as_written(word)]
    found = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return list(dict.fromkeys(filter(None, found)))


def _as_written(word: str) -> tuple[str, ...]:
    bare = word.lstrip()
    return (bare, f" {bare}") if bare else (word,)
