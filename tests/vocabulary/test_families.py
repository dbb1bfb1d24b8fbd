"""Which family a folder's tokenizer.model is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayllm.vocabulary.families import FAMILIES, OTHER, find_family


@pytest.mark.parametrize(
    ("settings", "config", "form", "name"),
    [
        ({"tokenizer_class": "ChatGLM4Tokenizer"}, {}, "ranks", "glm4"),
        ({"tokenizer_class": "ChatGLM4Tokenizer"}, {}, "sentencepiece", "other"),
        ({"tokenizer_class": "ChatGLMTokenizer"}, {}, "sentencepiece", "chatglm2"),
        ({"tokenizer_class": "ChatGLMTokenizer", "chat_template": "<|user|>"}, {}, "sentencepiece", "chatglm3"),
        ({"tokenizer_class": "ChatGLMTokenizer"}, {"_name_or_path": "x/chatglm3-6b"}, "sentencepiece", "chatglm3"),
        ({"tokenizer_class": "InternLM2Tokenizer"}, {}, "sentencepiece", "internlm2"),
        ({"tokenizer_class": "BaiChuanTokenizer"}, {"vocab_size": 64000}, "sentencepiece", "baichuan"),
        ({"tokenizer_class": "BaichuanTokenizer"}, {"vocab_size": 125696}, "sentencepiece", "baichuan2"),
        ({}, {"model_type": "chatglm"}, "ranks", "glm4"),
        ({}, {"model_type": "chatglm"}, "sentencepiece", "chatglm2"),
        ({}, {"model_type": "kimi"}, "ranks", None),
        ({"tokenizer_class": "Unknown"}, {"model_type": "chatglm"}, "ranks", None),
    ],
)
def test_class_model_and_form_tell_the_family(
    tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], form: str, name: str | None
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = find_family(tmp_path, settings, form)
    assert (None if found is None else found.name) == name


def test_special_tokens_hold_the_prefix_and_the_turns() -> None:
    for family in FAMILIES:
        assert {*family.prefix, *(family.turns or ())} <= {*family.special_tokens}, family.name
    assert not OTHER.special_tokens
