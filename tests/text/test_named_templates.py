"""A model with several chat templates: `default`, and `tool_use` for chats with tools."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rayllm.errors import ConfigError
from rayllm.text.tokenizer import Tokenizer

DEFAULT, TOOLS = "{{ messages[0].content }}!", "{{ messages[0].content }}{{ tools | length }}"
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def folder(byte_level_path: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(byte_level_path, path)
    (path / "chat_template.jinja").unlink()
    return path


@pytest.mark.parametrize("in_files", [False, True])
def test_the_template_for_tools_is_found_beside_the_default(folder: Path, in_files: bool) -> None:
    if in_files:
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
        (folder / "chat_template.jinja").write_text(DEFAULT)
    else:
        named = [{"name": "tool_use", "template": TOOLS}, {"name": "default", "template": DEFAULT}]
        file = folder / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": named}))

    ours, theirs = Tokenizer.from_path(str(folder)), AutoTokenizer.from_pretrained(folder)

    assert ours.render_chat(MESSAGES) == theirs.apply_chat_template(MESSAGES, tokenize=False) == "hello!"
    assert ours.tool_template is not None
    tools = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
    with_tools = ours.with_template(ours.tool_template).render_chat(MESSAGES, tools=tools)
    assert with_tools == theirs.apply_chat_template(MESSAGES, tools=tools, tokenize=False) == "hello1"


def test_a_given_template_is_the_only_one(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(TOOLS)
    assert Tokenizer.from_path(str(folder), DEFAULT).tool_template is None


@pytest.mark.parametrize("value", [5, [5], [{"name": "default"}], [{"name": "default", "template": 5}]])
def test_what_is_no_template_is_named(folder: Path, value: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": value}))
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template must be text"):
        Tokenizer.from_path(str(folder))


def test_a_template_beside_an_image_processor_is_the_default_where_the_tokenizer_has_none(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": DEFAULT}))
    assert Tokenizer.from_path(str(folder)).render_chat(MESSAGES) == "hello!"
    (folder / "chat_template.jinja").write_text(DEFAULT + "?")
    assert Tokenizer.from_path(str(folder)).render_chat(MESSAGES) == "hello!?"
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"chat_template\.json: chat_template must be text"):
        Tokenizer.from_path(str(folder))
