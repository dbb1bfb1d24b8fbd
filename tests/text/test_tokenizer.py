from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rayllm.errors import ConfigError, RequestError
from rayllm.text.tokenizer import Tokenizer

TEXTS = [
    "hello world",
    " two  spaces ",
    "naïve 你好 🎉👩‍👩‍👧",
    "line\nbreak\ttab",
    "",
    "<|im_end|> in a text",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level_path", "sentencepiece_path"])
def test_ids_and_text_are_those_of_transformers(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    path = str(request.getfixturevalue(kind))
    ours, theirs = Tokenizer.from_path(path), AutoTokenizer.from_pretrained(path)

    for special in (True, False):
        ids = ours.encode(text, add_special_tokens=special)
        assert ids == theirs.encode(text, add_special_tokens=special)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.vocab_size == len(theirs)


@given(text=st.text())
def test_bytes_of_the_tokens_are_the_bytes_of_the_text(byte_level: Tokenizer, text: str) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)

    assert b"".join(map(byte_level.token_bytes, ids)) == text.encode()


def test_a_piece_has_its_space_and_a_byte_token_its_byte(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("hello world é", add_special_tokens=False)

    assert [sentencepiece.token_bytes(i) for i in ids] == [b" hello", b" world", b" ", b"\xc3", b"\xa9"]
    assert sentencepiece.token_text(ids[3]) == "\ufffd"


def test_an_id_outside_the_vocabulary_has_no_bytes(byte_level: Tokenizer) -> None:
    assert byte_level.token_bytes(byte_level.vocab_size) == b""
    assert byte_level.token_bytes(-1) == b""


def test_a_class_that_adds_its_own_tokens_is_loaded_by_transformers(sentencepiece_path: Path, tmp_path: Path) -> None:
    shutil.copytree(sentencepiece_path, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))

    ours = Tokenizer.from_path(str(tmp_path / "model"))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")

    assert ours.encode("hello é world") == theirs.encode("hello é world")
    assert ours.eos_token_id == theirs.eos_token_id == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"not json"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer_config.json", b"["),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b"[" * 100_000),
    ],
)
def test_a_broken_file_is_named_in_one_line(byte_level_path: Path, tmp_path: Path, name: str, content: bytes) -> None:
    shutil.copytree(byte_level_path, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    (tmp_path / "model" / name).write_bytes(content)

    with pytest.raises(ConfigError, match=name) as caught:
        Tokenizer.from_path(str(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)) as caught:
        Tokenizer.from_path(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="not a folder"):
        Tokenizer.from_path(str(tmp_path / "missing"))


def test_a_chat_is_rendered_as_transformers_renders_it(byte_level_path: Path) -> None:
    ours, theirs = (
        Tokenizer.from_path(str(byte_level_path)),
        AutoTokenizer.from_pretrained(byte_level_path),
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes "}]

    for options in (
        {"add_generation_prompt": True},
        {"add_generation_prompt": False},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        assert ours.render_chat(messages, **options) == theirs.apply_chat_template(messages, tokenize=False, **options)


def test_a_given_template_takes_the_place_of_the_models(byte_level_path: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}!")

    assert Tokenizer.from_path(str(byte_level_path), str(file)).render_chat([{"content": "hi"}]) == "hi!"
    with pytest.raises(ConfigError, match=r"nowhere\.jinja"):
        Tokenizer.from_path(str(byte_level_path), str(tmp_path / "nowhere.jinja"))


def test_a_model_without_a_template_refuses_chats(sentencepiece: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        sentencepiece.render_chat([{"role": "user", "content": "hi"}])
    assert (caught.value.param, caught.value.code) == ("messages", "no_chat_template")


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_marked_special_tokens_are_text_and_unmarked_ones_special(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    special = tokenizer.decode([tokenizer.eos_token_id or 0], skip_special_tokens=False)

    ids = tokenizer.encode_marked(f"{special}a{tokenizer.mark(f'b{special}c')}d")

    assert ids.count(tokenizer.eos_token_id or 0) == 1
    assert ids[0] == tokenizer.eos_token_id
    assert b"".join(map(tokenizer.token_bytes, ids)).decode().replace(" ", "") == f"{special}ab{special}cd"


def test_text_without_special_tokens_is_encoded_as_ever(byte_level: Tokenizer) -> None:
    assert byte_level.mark("plain") == "plain"
    assert byte_level.encode_marked(byte_level.mark("plain")) == byte_level.encode("plain")


def test_a_user_cannot_write_the_marks(byte_level: Tokenizer) -> None:
    ids = byte_level.encode_marked(byte_level.mark("\ufdd1<|im_end|>\ufdd0"))

    assert byte_level.eos_token_id not in ids
    assert byte_level.decode(ids) == "\ufffd<|im_end|>\ufffd"


def test_what_a_tokenizer_trips_over_is_the_requests_fault(byte_level: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot read this text") as caught:
        byte_level.encode("\ud800")
    assert caught.value.param == "prompt"

    pipeline = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    endless = tokenizers.Regex("(a+)+$")
    pipeline.pre_tokenizer = tokenizers.pre_tokenizers.Split(endless, "isolated")
    pipeline.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RequestError, match=r"cannot read this text: .*retry-limit"):
        Tokenizer.from_path(str(tmp_path)).encode("a" * 40 + "b")
