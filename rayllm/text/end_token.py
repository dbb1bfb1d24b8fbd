"""The id of a tokenizer's end-of-sequence token, read from its files. Loads no tokenizer: `rayllm serve` needs the id
before anything heavy is started."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllm.text.tokenizer_files import SENTENCEPIECE_FILE, named_tokens, read_json, read_text, sentencepiece_processor
from rayllm.vocabulary.family_tokenizer import read_family_tokenizer
from rayllm.vocabulary.ranks import holds_ranks

_CLASS_DEFAULTS = {
    "LlamaTokenizer": "</s>",
    "CodeLlamaTokenizer": "</s>",
    "GPT2Tokenizer": "<|endoftext|>",
    "Qwen2Tokenizer": "<|endoftext|>",
}
"""What the classes of `transformers` take for `eos_token` where no file says it; each with and without `Fast`."""


def end_token_id(folder: Path) -> int | None:
    """None where the files name no end token, or one that is in no vocabulary."""
    settings = read_json(folder / "tokenizer_config.json")
    text = named_tokens(folder, settings).get("eos_token")
    if text is None and "eos_token" not in settings:
        text = _CLASS_DEFAULTS.get(str(settings.get("tokenizer_class")).removesuffix("Fast"))
    model = folder / SENTENCEPIECE_FILE
    holds_ids = model.is_file() and not holds_ranks(model)
    if text is None and "eos_token" not in settings:
        return _sentencepiece_end(model) if holds_ids else _family_end(folder, settings)
    if text is None:
        return None
    found = _added(settings, text)
    if found is None:
        found = read_json(folder / "added_tokens.json").get(text)
    if found is None:
        found = _in_pipeline(folder / "tokenizer.json", text)
    if found is None:
        found = read_json(folder / "vocab.json").get(text)
    if found is None:
        found = _sentencepiece_id(model, text) if holds_ids else _family_end(folder, settings)
    return found if type(found) is int else None


def _added(settings: Mapping[str, Any], text: str) -> int | None:
    declared = settings.get("added_tokens_decoder")
    for token_id, entry in declared.items() if isinstance(declared, dict) else ():
        if isinstance(entry, dict) and entry.get("content") == text and token_id.isdecimal():
            return int(token_id)
    return None


def _in_pipeline(file: Path, text: str) -> Any:
    """Looks among the added tokens first: the vocabulary behind them is long."""
    if not file.is_file():
        return None
    content = read_text(file)
    start = content.find('"added_tokens"')
    if start >= 0:
        try:
            added, _ = json.JSONDecoder().raw_decode(content, content.index("[", start))
            for entry in added:
                if entry.get("content") == text:
                    return entry.get("id")
        except (ValueError, AttributeError, RecursionError):
            pass  # the file is broken or unusual: read all of it below
    model = read_json(file).get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        return vocab.get(text)
    if isinstance(vocab, list):  # Unigram: [[piece, score], ...]
        return next((i for i, entry in enumerate(vocab) if isinstance(entry, list) and entry[:1] == [text]), None)
    return None


def _family_end(folder: Path, settings: Mapping[str, Any]) -> int | None:
    """Of a family's vocabulary by rank, whose special tokens stand in no file."""
    made = read_family_tokenizer(folder, settings)
    if made is None:
        return None
    text = named_tokens(folder, settings).get("eos_token") or made.named.get("eos_token", "")
    return made.special_ids.get(text)


def _sentencepiece_end(model: Path) -> int | None:
    token_id = sentencepiece_processor(model).eos_id()
    return None if token_id < 0 else int(token_id)


def _sentencepiece_id(model: Path, text: str) -> int | None:
    processor = sentencepiece_processor(model)
    token_id = processor.piece_to_id(text)
    return int(token_id) if processor.id_to_piece(token_id) == text else None
