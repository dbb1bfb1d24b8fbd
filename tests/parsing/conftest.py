from __future__ import annotations

from pathlib import Path

import pytest
from tiny import make_tokenizer

from rayllm.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.from_path(str(tokenizer_path))
