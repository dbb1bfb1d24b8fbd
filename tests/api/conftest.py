from __future__ import annotations

from pathlib import Path

import pytest
from api.fake_engine import EOS_ID, FakeEngine, config
from tiny import make_tokenizer

from rayllm.api.service import ModelService
from rayllm.request import Request
from rayllm.text.tokenizer import Tokenizer

ANSWER = "Hello wörld 🎉 and more"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer.from_path(str(tokenizer_path))


@pytest.fixture
def engine(tokenizer: Tokenizer) -> FakeEngine:
    """Says `ANSWER` and the choice's number, then ends."""

    def say(request: Request, choice: int) -> list[int]:
        return [*tokenizer.encode(f"{ANSWER}{choice or ''}"), EOS_ID]

    return FakeEngine(say)


@pytest.fixture
def service(engine: FakeEngine, tokenizer: Tokenizer) -> ModelService:
    service = ModelService()
    service.set_ready(config(), tokenizer, engine)
    return service
