"""The files of a tokenizer's folder that are plain text. Every fault is a `ConfigError` that names the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError
from rayllm.vocabulary.ranks import holds_ranks
from rayllm.weights.tokenizer_names import has_vocabulary_files

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
SENTENCEPIECE_FILE = "tokenizer.model"


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or nothing where there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{file}: not readable as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: must hold a JSON object, not {type(value).__name__}")
    return value


def read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except (ValueError, OSError) as error:
        raise ConfigError(f"{file}: not readable as text: {error}") from None


def token_content(value: Any) -> str | None:
    """The text of a token: as it stands, or an object's `content`."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def named_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that the folder names by a role. `settings`: its tokenizer_config.json."""
    named: dict[str, str] = {}
    for source in (read_json(folder / "special_tokens_map.json"), settings):
        for name in NAMED_TOKENS:
            if (content := token_content(source.get(name))) is not None:
                named[name] = content
    return named


def check_vocabulary_files(folder: Path) -> None:
    """`ConfigError` where the folder holds no vocabulary, or a tokenizer.model that is none."""
    names = [entry.name for entry in folder.iterdir() if entry.is_file()]
    if not has_vocabulary_files(names):
        raise ConfigError(
            f"tokenizer: {folder} holds no tokenizer (tokenizer.json, {SENTENCEPIECE_FILE}, or vocab.json with "
            "merges.txt): copy its files there, give --tokenizer FOLDER, or --skip-tokenizer-init to work with token "
            "ids"
        )
    model = folder / SENTENCEPIECE_FILE
    if SENTENCEPIECE_FILE in names and "tokenizer.json" not in names and not holds_ranks(model):
        sentencepiece_processor(model)


def sentencepiece_processor(model: Path) -> Any:
    """The model as its own library reads it. Raises `ConfigError`."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model))
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{model}: not a sentencepiece model: {reason}") from None
