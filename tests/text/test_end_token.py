"""The end token's id is read from each form in which tokenizers are saved, as `transformers` reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text.tokenizers_made import make_sentencepiece_model
from tiny import make_checkpoint
from transformers import AutoTokenizer

from rayllm.config import EngineConfig
from rayllm.engine.owner.resolve import resolve
from rayllm.text.end_token import end_token_id
from rayllm.text.tokenizer import Tokenizer

_ADDED = [{"id": 7, "content": "<e>"}]
_UNIGRAM = [["", 0.0]] * 7 + [["b", 0.0]]


@pytest.mark.parametrize("kind", ["byte_level_path", "sentencepiece_path"])
def test_the_id_is_that_of_the_loaded_tokenizer(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)

    assert end_token_id(path) == Tokenizer.from_path(str(path)).eos_token_id
    assert end_token_id(path) == AutoTokenizer.from_pretrained(path).eos_token_id is not None


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "<e>", "added_tokens_decoder": {"7": {"content": "<e>"}}}},
        {"tokenizer_config.json": {"eos_token": {"content": "<e>"}}, "added_tokens.json": {"<e>": 7}},
        {"special_tokens_map.json": {"eos_token": "<e>"}, "tokenizer.json": {"added_tokens": _ADDED}},
        {"tokenizer_config.json": {"eos_token": "<e>"}, "tokenizer.json": {"model": {"vocab": {"a": 0, "<e>": 7}}}},
        {"tokenizer_config.json": {"eos_token": "b"}, "tokenizer.json": {"model": {"vocab": _UNIGRAM}}},
        {"tokenizer_config.json": {"eos_token": "<e>"}, "vocab.json": {"<e>": 7}},
        {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}, "vocab.json": {"<|endoftext|>": 7}},
        {"tokenizer_config.json": {"tokenizer_class": "Qwen2TokenizerFast"}, "vocab.json": {"<|endoftext|>": 7}},
    ],
)  # fmt: skip
def test_the_id_is_found_in_every_file_that_may_hold_it(tmp_path: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))

    assert end_token_id(tmp_path) == 7


def test_a_sentencepiece_model_alone_tells_its_own(tmp_path: Path) -> None:
    path = make_sentencepiece_model(tmp_path)
    assert end_token_id(path) == 2
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<s>"}))
    assert end_token_id(path) == 1


@pytest.mark.parametrize("settings", [{}, {"eos_token": None}, {"eos_token": "nowhere"}, {"tokenizer_class": "Other"}])
def test_a_tokenizer_without_an_end_token_has_none(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert end_token_id(tmp_path) is None


def test_end_tokens_are_those_of_tokenizer_generation_config_and_config(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", eos_token_id=0)  # its tokenizer ends with <|im_end|>, which is 2
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 0]}))

    def ends(**fields: object) -> tuple[int, ...]:
        config: EngineConfig = EngineConfig.parse({"model": str(path), **fields})
        return resolve(config, num_gpus=0, num_cores=1).shape.eos_token_ids

    assert ends() == (2, 5, 0)
    (path / "generation_config.json").unlink()
    assert ends() == (2, 0)

    other = tmp_path / "other"
    other.mkdir()
    (other / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<e>"}))
    (other / "added_tokens.json").write_text(json.dumps({"<e>": 9}))
    assert ends(tokenizer=str(other)) == (9, 0)
    (other / "added_tokens.json").write_text(json.dumps({"<e>": 100_000}))  # the model cannot write it
    assert ends(tokenizer=str(other)) == (0,)
