"""Vocabularies by rank, as tiktoken keeps them: lines of a token's bytes in base64 and its rank, which is its id."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError
from rayllm.vocabulary.cuts import cut_inside

LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} [0-9]+\s*")
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How text is split before tokens are merged: OpenAI's cl100k pattern, which GLM-4 has too."""


def holds_ranks(model: Path) -> bool:
    """Whether the file's first line is a token and its rank."""
    with model.open("rb") as file:
        return LINE.fullmatch(file.readline(4096)) is not None


def read_ranks(model: Path) -> dict[bytes, int]:
    """Raises `ConfigError` that names the line which is wrong."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(model.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        if LINE.fullmatch(line) is None:
            raise ConfigError(f"{model}: line {number} is no token in base64 with its rank: {line[:40]!r}")
        token, rank = line.split()
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ConfigError(f"{model}: line {number}: {error}") from None
    if len(set(ranks.values())) != len(ranks):
        raise ConfigError(f"{model}: two tokens have the same rank")
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise ConfigError(f"{model}: no token for the byte 0x{missing:02X}, so that not every text could be encoded")
    return ranks


def ranks_pipeline(ranks: dict[bytes, int], special_ids: dict[str, int]) -> Any:
    """A byte-level BPE that merges by rank. Two tokens that stand side by side are merged where both together are one,
    the lowest rank first."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    character = _byte_characters()
    written = {token: "".join(map(character.__getitem__, token)) for token in ranks}
    merges = [
        (written[token[:i]], written[token[i:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for i in range(1, len(token))
        if token[:i] in ranks and token[i:] in ranks
    ]
    vocab = {written[token]: rank for token, rank in ranks.items()}
    pipeline = Tokenizer(models.BPE({**vocab, **special_ids}, merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    whole_words = [text for text in special_ids if len(words.pre_tokenize_str(text)) == 1]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pipeline.pre_tokenizer = pre_tokenizers.Sequence([words, *cut_inside(whole_words), as_bytes])
    pipeline.decoder = decoders.ByteLevel()
    return pipeline


def _byte_characters() -> list[str]:
    """GPT-2's character for each byte: a printable one stands for itself, the others are 256, 257, ..."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
