"""A model's tokens as llguidance knows them: the bytes of each, and which of them end a text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLTokenizer

from rayllm.errors import ConfigError
from rayllm.vocabulary.family_tokenizer import read_family_tokenizer
from rayllm.weights.config_file import read_json

_NO_END = "<|rayllm: no end of text|>"


@dataclass(frozen=True)
class Vocabulary:
    """Masks have a bit for each of `tokenizer.vocab_size` ids, which may be more than the model has."""

    tokenizer: LLTokenizer
    num_words: int
    """32-bit words of a mask."""
    end_ids: tuple[int, ...]
    """Ids that end a text, of those the model has."""
    phantom_id: int | None
    """Where the model has no end of text: an id that stands for it, and that no model may give."""

    @classmethod
    def load(cls, tokenizer_path: str, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Vocabulary:
        """Reads the folder's tokenizer for a model of `vocab_size` ids. Takes about a second for 128,000 tokens.

        Raises `ConfigError` where the folder holds no tokenizer that llguidance can follow.
        """
        text = _pipeline_text(Path(tokenizer_path))
        try:
            size = LLTokenizer(text).vocab_size
            end_ids = tuple(token_id for token_id in eos_token_ids if 0 <= token_id < vocab_size)
            phantom_id = None
            if not end_ids:
                text, phantom_id, size = _with_phantom(text, size), size, size + 1
            tokenizer = LLTokenizer(text, n_vocab=max(size, vocab_size), eos_token=list(end_ids) or phantom_id)
        except ValueError as error:
            raise ConfigError(f"the tokenizer in {tokenizer_path} does not allow structured outputs: {error}") from None
        return cls(tokenizer, -(-tokenizer.vocab_size // 32), end_ids, phantom_id)


def _pipeline_text(folder: Path) -> str:
    """tokenizer.json, or what is made of an older form."""
    file = folder / "tokenizer.json"
    if file.is_file():
        return file.read_text("utf-8")
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    made = read_family_tokenizer(folder, settings)
    if made is not None:
        return _without_gaps(made.pipeline.to_str())
    import transformers

    try:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        text: str = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # whatever the folder lacks
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"structured outputs need a tokenizer: {reason}") from None
    return text


def _without_gaps(text: str) -> str:
    """Ids below the largest that have no token get a special one: llguidance counts tokens, and takes that for the
    number of ids."""
    pipeline = json.loads(text)
    vocab = pipeline["model"]["vocab"]
    if not isinstance(vocab, dict):  # a list: its places are the ids
        return text
    known = set(vocab.values())
    gaps = {f"<|no token {i}|>": i for i in range(max(known)) if i not in known}
    if not gaps:
        return text
    vocab |= gaps
    pipeline["added_tokens"] += [_special(token_id, name) for name, token_id in gaps.items()]
    return json.dumps(pipeline)


def _with_phantom(text: str, size: int) -> str:
    pipeline = json.loads(text)
    added = [*(pipeline.get("added_tokens") or []), _special(size, _NO_END)]
    return json.dumps({**pipeline, "added_tokens": added})


def _special(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}
