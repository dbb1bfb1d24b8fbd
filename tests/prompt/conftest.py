from __future__ import annotations

import pytest

from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.engine.owner.resolve import resolve
from rayllm.prompt.text_model import TextModel
from rayllm.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def config() -> ResolvedConfig:
    """The built-in model's, of a server that lets requests bring templates."""
    return resolve(EngineConfig(trust_request_chat_template=True, device="cpu"))


@pytest.fixture(scope="module")
def model(config: ResolvedConfig) -> TextModel:
    return TextModel(config, Tokenizer.from_config(config))
