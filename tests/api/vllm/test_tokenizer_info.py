"""The settings of a served tokenizer, from its tokenizer_config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from api.fake_engine import config

from rayllm.api.service import ModelService, ServedModel
from rayllm.api.vllm.tokenizer_info import tokenizer_info
from rayllm.config import EngineConfig
from rayllm.errors import RequestError

ON = EngineConfig(enable_tokenizer_info_endpoint=True)


def model_at(service: ModelService, folder: Path, settings: dict[str, Any] | None) -> ServedModel:
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return replace(service.model(), config=config(engine=ON, tokenizer_path=str(folder)))


def test_it_is_not_found_unless_the_operator_asked_for_it(service: ModelService) -> None:
    with pytest.raises(RequestError, match="--enable-tokenizer-info-endpoint") as caught:
        tokenizer_info(service.model())
    assert (caught.value.status, caught.value.code) == (404, "path_not_found")


def test_tokens_are_shown_as_their_texts_wherever_they_stand(service: ModelService, tmp_path: Path) -> None:
    settings = {
        "bos_token": {"content": "<s>", "special": True},
        "added_tokens_decoder": {"0": {"content": "<s>"}, "1": {"content": "</s>"}},
        "extra": [{"content": "<x>"}, 1, None],
    }
    info = tokenizer_info(model_at(service, tmp_path, settings))
    assert info["bos_token"] == "<s>"
    assert info["added_tokens_decoder"] == {"0": "<s>", "1": "</s>"}
    assert info["extra"] == ["<x>", 1, None]


def test_files_of_this_machine_are_left_out_and_huge_numbers_bounded(service: ModelService, tmp_path: Path) -> None:
    settings = {"vocab_file": "/a", "name_or_path": "/b", "model_max_length": 10**30, "add_bos_token": True, "n": 5}
    info = tokenizer_info(model_at(service, tmp_path, settings))
    assert not info.keys() & {"vocab_file", "name_or_path"}
    assert info["model_max_length"] == 2**53 - 1
    assert (info["add_bos_token"], info["n"]) == (True, 5)


def test_the_class_and_the_template_in_use_are_always_there(service: ModelService, tmp_path: Path) -> None:
    template = service.model().tokenizer.chat_template
    assert template is not None
    info = tokenizer_info(model_at(service, tmp_path, None))
    assert info == {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template.source}
    settings = {"tokenizer_class": "LlamaTokenizer", "chat_template": "another"}
    info = tokenizer_info(model_at(service, tmp_path, settings))
    assert info == {"tokenizer_class": "LlamaTokenizer", "chat_template": template.source}
