from __future__ import annotations

from pathlib import Path

import pytest
from text.tokenizers_made import make_sentencepiece_tokenizer
from tiny import make_tokenizer

from rayllm.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def byte_level_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentencepiece_tokenizer(tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def byte_level(byte_level_path: Path) -> Tokenizer:
    return Tokenizer.from_path(str(byte_level_path))


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_path: Path) -> Tokenizer:
    return Tokenizer.from_path(str(sentencepiece_path))
