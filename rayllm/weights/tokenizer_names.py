"""Which files of a model's folder, by their names, hold the vocabulary of a tokenizer."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

_VOCABULARIES = (
    ("tokenizer.json",),
    ("tokenizer.model",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
    ("vocab.txt",),
    ("tekken.json",),
    ("*.tiktoken",),
)


def has_vocabulary_files(names: Iterable[str]) -> bool:
    """Whether some of these are a vocabulary. Without one, libraries make an empty tokenizer."""
    known = list(names)
    return any(all(fnmatch.filter(known, pattern) for pattern in needed) for needed in _VOCABULARIES)
