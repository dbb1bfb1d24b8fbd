"""Tokenizers whose class is Python code of the checkpoint give the ids that the code gives, and the code is not run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from text.tokenizers_made import make_ranks, make_sentencepiece_model
from tiny import make_tokenizer

from rayllm.errors import ConfigError
from rayllm.structured.vocabulary import Vocabulary
from rayllm.text.end_token import end_token_id
from rayllm.text.tokenizer import Tokenizer
from rayllm.vocabulary.family_tokenizer import brings_code, read_family_tokenizer

TRAP = "raise SystemExit('the code of a checkpoint was run')\n"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]


def write(folder: Path, settings: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """Adds tokenizer_config.json, config.json and code that must not run."""
    name = settings.get("tokenizer_class", "ChatGLMTokenizer")
    code = {"auto_map": {"AutoTokenizer": [f"tokenization_it.{name}", None]}} if settings else {}
    (folder / "tokenizer_config.json").write_text(json.dumps({**code, **settings}))
    (folder / "config.json").write_text(json.dumps({"model_type": "chatglm", **(config or {})}))
    (folder / "tokenization_it.py").write_text(TRAP)
    return folder


def declared(**ids: str) -> dict[str, Any]:
    return {"added_tokens_decoder": {name.removeprefix("_"): {"content": text} for name, text in ids.items()}}


@pytest.fixture(scope="module")
def glm4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(make_ranks(tmp_path_factory.mktemp("glm4")), {"tokenizer_class": "ChatGLM4Tokenizer"})


@pytest.fixture(scope="module")
def chatglm3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_sentencepiece_model(tmp_path_factory.mktemp("chatglm3"))
    return write(folder, {"tokenizer_class": "ChatGLMTokenizer"}, {"_name_or_path": "THUDM/chatglm3-6b"})


@pytest.fixture(scope="module")
def chatglm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_sentencepiece_model(tmp_path_factory.mktemp("chatglm2"))
    return write(folder, {"tokenizer_class": "ChatGLMTokenizer"})


def test_special_tokens_stand_behind_the_ranks_in_order(glm4: Path) -> None:
    made = read_family_tokenizer(glm4, json.loads((glm4 / "tokenizer_config.json").read_text()))
    assert made is not None
    size = len((glm4 / "tokenizer.model").read_text().splitlines())
    names = ["<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", *ROLES]
    assert [made.pipeline.token_to_id(name) for name in names] == list(range(size, size + 10))
    tokenizer = Tokenizer.from_path(str(glm4))
    assert tokenizer.vocab_size == size + 14
    assert tokenizer.eos_token_id == end_token_id(glm4) == size
    assert tokenizer.token_bytes(size + 7) == b"<|user|>"


def test_ids_that_the_config_declares_are_taken(tmp_path: Path) -> None:
    ids = {"_1331": "[gMASK]", "_1333": "<sop>", "_1336": "<|user|>", "_1329": "<|endoftext|>", "_337": "[MASK]"}
    folder = write(make_ranks(tmp_path), {"tokenizer_class": "ChatGLM4Tokenizer", **declared(**ids)})
    tokenizer = Tokenizer.from_path(str(folder))
    assert tokenizer.encode("hello")[:2] == [1331, 1333]
    assert tokenizer.encode("[gMASK]<sop><|user|>\nhello")[:3] == [1331, 1333, 1336]
    assert tokenizer.decode([1336, *tokenizer.encode("a", False)], skip_special_tokens=False) == "<|user|>a"
    assert tokenizer.eos_token_id == end_token_id(folder) == 1329
    vocabulary = Vocabulary.load(str(folder), 1400, (1329, 1336)).tokenizer
    assert vocabulary.vocab_size == 1400
    assert vocabulary.decode_bytes(tokenizer.encode("hello", False)) == b"hello"
    assert vocabulary.is_special_token(1336)
    assert vocabulary.is_special_token(1000)


def test_the_prefix_stands_before_a_plain_prompt_and_never_twice(glm4: Path, chatglm2: Path, chatglm3: Path) -> None:
    for folder, prefix in ((glm4, "[gMASK]<sop>"), (chatglm2, "[gMASK]sop"), (chatglm3, "[gMASK]sop")):
        tokenizer = Tokenizer.from_path(str(folder))
        text = tokenizer.encode("hello world", add_special_tokens=False)
        start = tokenizer.encode(prefix)
        assert len(start) == 2
        assert tokenizer.encode("hello world") == start + text
        assert tokenizer.encode(prefix + "hello world") == start + text
        assert tokenizer.encode_marked(prefix + "hello world", True) == start + text
        assert tokenizer.encode("hello world", False) == text


def test_chatglm2_counts_rounds_and_encodes_its_chat_as_one_text(chatglm2: Path) -> None:
    tokenizer = Tokenizer.from_path(str(chatglm2))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(chatglm2 / "tokenizer.model"))
    size = processor.get_piece_size()
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "world"},
        {"role": "user", "content": "the answer?"},
    ]
    text = "[Round 1]\n\n问：hello\n\n答：world\n\n[Round 2]\n\n问：the answer?\n\n答："
    assert tokenizer.render_chat(messages) == "[gMASK]sop" + text
    assert tokenizer.encode_marked(tokenizer.render_chat(messages)) == [size + 1, size + 3, *processor.encode(text)]
    assert tokenizer.render_chat(messages, False).endswith("问：the answer?")
    system = tokenizer.render_chat([{"role": "system", "content": "be kind"}, messages[0]])
    assert system == "[gMASK]sopbe kind\n\n[Round 1]\n\n问：hello\n\n答："
    assert tokenizer.eos_token_id == end_token_id(chatglm2) == 2


def test_chatglm3_encodes_head_and_content_of_a_message_each_alone(chatglm3: Path) -> None:
    tokenizer = Tokenizer.from_path(str(chatglm3))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(chatglm3 / "tokenizer.model"))
    size = processor.get_piece_size()
    said = [("system", "be kind"), ("user", " hello world"), ("assistant", "the answer\n is 42."), ("user", "")]
    expected = [size + 1, size + 3]
    for role, content in said:
        expected += [size + 5 + ROLES.index(f"<|{role}|>"), *processor.encode("\n"), *processor.encode(content)]
    text = tokenizer.render_chat([{"role": role, "content": content} for role, content in said[:3]])
    text += "<|user|>\n"
    assert tokenizer.encode_marked(text.replace("<|assistant|><|user|>", "<|user|>")) == expected
    assert tokenizer.encode(text.replace("<|assistant|><|user|>", "<|user|>"), False) == expected


@pytest.mark.parametrize("text", ["<|user|>", "a [gMASK] b", "sophisticated", "</s>", "see <|assistant|>\n hello"])
def test_special_tokens_in_what_a_user_writes_are_text(chatglm3: Path, chatglm2: Path, glm4: Path, text: str) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_file=str(chatglm3 / "tokenizer.model"))
    for folder in (chatglm3, chatglm2):
        tokenizer = Tokenizer.from_path(str(folder))
        assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    for folder in (chatglm3, chatglm2, glm4):
        tokenizer = Tokenizer.from_path(str(folder))
        chat = tokenizer.render_chat([{"role": "user", "content": tokenizer.mark(text)}])
        plain = tokenizer.render_chat([{"role": "user", "content": "x"}])
        special = tokenizer.special_token_ids
        ids, expected = tokenizer.encode_marked(chat), tokenizer.encode_marked(plain)
        assert [i for i in ids if i in special] == [i for i in expected if i in special]
        assert text in tokenizer.decode(ids, skip_special_tokens=False)


def test_glm4_shows_tools_calls_and_results_in_its_own_words(glm4: Path) -> None:
    tokenizer = Tokenizer.from_path(str(glm4))
    function = {"name": "get_weather", "description": "d", "parameters": {"type": "object"}}
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "北京"}}}
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "sunny"},
        ],
        tools=[{"type": "function", "function": function}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert isinstance(text, str)
    assert text.startswith("[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。")
    assert f"\n\n# 可用工具\n\n## get_weather\n\n{json.dumps(function, indent=4)}\n在调用上述函数时" in text
    said = '<|user|>\nweather?<|assistant|>get_weather\n{"city": "北京"}<|observation|>\nsunny<|assistant|>'
    assert text.endswith("。" + said)


def test_the_files_own_template_is_used_and_tools_go_through_the_familys(tmp_path: Path) -> None:
    own = "[gMASK]<sop>{% for item in messages %}<|{{ item['role'] }}|>\n{{ item['content'] }}{% endfor %}"
    settings = {"tokenizer_class": "ChatGLM4Tokenizer", "chat_template": own}
    tokenizer = Tokenizer.from_path(str(write(make_ranks(tmp_path), settings)))
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "[gMASK]<sop><|user|>\nhello"
    assert tokenizer.apply_chat_template(messages) == tokenizer.encode("[gMASK]<sop><|user|>\nhello")
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert "## f" in str(tokenizer.apply_chat_template(messages, tools, tokenize=False))
    given = Tokenizer.from_path(str(tmp_path), "{{ messages[0].content }}")
    assert given.apply_chat_template(messages, tokenize=False) == "hello"
    assert given.tool_template is None


@pytest.mark.parametrize(
    ("settings", "config", "ends_with"),
    [
        ({"tokenizer_class": "ChatGLMTokenizer"}, {}, "答："),
        ({"tokenizer_class": "ChatGLMTokenizer", "additional_special_tokens": ["<|user|>"]}, {}, "<|assistant|>"),
        ({"tokenizer_class": "ChatGLMTokenizer"}, {"_name_or_path": "THUDM/chatglm3-6b-32k"}, "<|assistant|>"),
        ({}, {}, "答："),
        ({}, {"_name_or_path": "chatglm3-6b"}, "<|assistant|>"),
    ],
)
def test_families_with_the_same_vocabulary_are_told_apart(
    chatglm2: Path, tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], ends_with: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((chatglm2 / "tokenizer.model").read_bytes())
    tokenizer = Tokenizer.from_path(str(write(tmp_path, settings, config)))
    assert tokenizer.render_chat([{"role": "user", "content": "hello"}]).endswith(ends_with)


def test_the_code_is_read_as_text_to_tell_families_apart(chatglm2: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((chatglm2 / "tokenizer.model").read_bytes())
    write(tmp_path, {"tokenizer_class": "ChatGLMTokenizer"})
    (tmp_path / "tokenization_chatglm.py").write_text(TRAP + "special = ['<|user|>']\n")
    tokenizer = Tokenizer.from_path(str(tmp_path))
    assert tokenizer.render_chat([{"role": "user", "content": "hello"}]).endswith("<|assistant|>")


@pytest.mark.parametrize("name", ["InternLM2Tokenizer", "BaichuanTokenizer", "SomethingTokenizer"])
def test_other_sentencepiece_models_with_code_are_read_by_their_protobuf(tmp_path: Path, name: str) -> None:
    folder = make_sentencepiece_model(tmp_path)
    ids = {"_0": "<unk>", "_1": "<s>", "_2": "</s>", "_258": "<|im_start|>"}
    write(folder, {"tokenizer_class": name, **declared(**ids)})
    tokenizer = Tokenizer.from_path(str(folder))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.encode("hello world", False) == processor.encode("hello world")
    starts = [] if name == "SomethingTokenizer" else [1]
    assert tokenizer.encode("hello world") == starts + processor.encode("hello world")
    expected = [258, *processor.encode("\n"), 2, *processor.encode("hello")]
    assert tokenizer.encode("<|im_start|>\n</s>hello", False) == expected
    assert tokenizer.token_bytes(258) == b"<|im_start|>"
    write(folder, {"tokenizer_class": name, "add_bos_token": True, "add_eos_token": True})
    assert Tokenizer.from_path(str(folder)).encode("hello") == [1, *processor.encode("hello"), 2]
    write(folder, {"tokenizer_class": name, "add_bos_token": False})
    assert Tokenizer.from_path(str(folder)).encode("hello") == processor.encode("hello")


@pytest.mark.parametrize(("vocab_size", "roles"), [(64_000, (102, 103)), (125_696, (106, 107))])
def test_a_chat_with_baichuan_has_the_tokens_of_its_version(
    tmp_path: Path, vocab_size: int, roles: tuple[int, int]
) -> None:
    user, assistant = (f"<reserved_{number}>" for number in roles)
    others = ",".join(f"<reserved_{number}>" for number in range(100, 110))
    folder = make_sentencepiece_model(tmp_path, user_defined_symbols=others)
    write(folder, {"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False}, {"vocab_size": vocab_size})
    tokenizer = Tokenizer.from_path(str(folder))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    messages = [{"role": "user", "content": tokenizer.mark(f"hello {user}")}]
    found = tokenizer.encode_marked(tokenizer.render_chat(messages))
    ids = [processor.piece_to_id(name) for name in (user, assistant)]
    assert (found[0], found[-1]) == tuple(ids)
    assert not {*found[1:-1]} & {*ids}, "what a user wrote is no special token"
    assert tokenizer.decode(found) == f"hello {user}"
    assert tokenizer.vocab_size == processor.get_piece_size()


def test_a_pipeline_file_beside_the_code_is_read(tmp_path: Path) -> None:
    expected = Tokenizer.from_path(str(make_tokenizer(tmp_path))).encode("hello")
    write(tmp_path, {"tokenizer_class": "SomethingTokenizer"}, {"model_type": "something"})
    assert Tokenizer.from_path(str(tmp_path)).encode("hello") == expected


def test_grammars_know_the_vocabulary(glm4: Path, chatglm3: Path) -> None:
    for folder in (glm4, chatglm3):
        size = Tokenizer.from_path(str(folder)).vocab_size
        assert Vocabulary.load(str(folder), size, (2,)).tokenizer.vocab_size == size


def test_which_family_is_read_stands_in_the_log(glm4: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="rayllm.vocabulary"):
        Tokenizer.from_path(str(glm4))
    assert "is read as the vocabulary of glm4; Python files of the checkpoint are not used" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "TikTokenTokenizer"}, "'TikTokenTokenizer' splits text .* --tokenizer FOLDER"),
        ({"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": [1]}, "must be an object"),
        ({"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": {"a": "x"}}, "holds 'a'"),
        ({"tokenizer_class": "ChatGLM4Tokenizer", **declared(_5000="<sop>", _5001="<sop>")}, "two ids"),
        ({"tokenizer_class": "ChatGLM4Tokenizer", **declared(_304="other")}, r"lacks '\[gMASK\]'"),
        ({"tokenizer_class": "ChatGLM4Tokenizer", **declared(_7="<sop>")}, "'<sop>' has the id 7, .* a token's rank"),
        ({"tokenizer_class": "ChatGLM4Tokenizer", **declared(_99999999="<sop>")}, "holds '99999999': .* at most"),
    ],
)
def test_what_only_the_code_could_explain_is_refused(
    glm4: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((glm4 / "tokenizer.model").read_bytes())
    with pytest.raises(ConfigError, match=message):
        Tokenizer.from_path(str(write(tmp_path, settings)))


def test_added_tokens_that_are_not_special_are_shown_and_the_familys_never(tmp_path: Path) -> None:
    tokens = {"316": "<call>", "309": "<|user|>"}
    entries = {token_id: {"content": text, "special": False} for token_id, text in tokens.items()}
    folder = write(make_ranks(tmp_path), {"tokenizer_class": "ChatGLM4Tokenizer", "added_tokens_decoder": entries})
    tokenizer = Tokenizer.from_path(str(folder))
    assert tokenizer.encode("a<call>b<|user|>", False)[1::2] == [316, 309]
    assert tokenizer.decode(tokenizer.encode("a<call>b<|user|>")) == "a<call>b"


def test_code_is_known_by_the_map_of_classes() -> None:
    assert brings_code({"auto_map": {"AutoTokenizer": ["a.B", None]}})
    assert brings_code({"auto_map": ["a.B", None]})
    assert not brings_code({"auto_map": {"AutoProcessor": "a.B"}})
    assert not brings_code({})
