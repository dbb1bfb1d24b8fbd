"""Tokenizers by the files that a folder has: too few are an error, a `tokenizer.model` alone works, and without any an
engine works in token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from text.tokenizers_made import make_sentencepiece_model
from tiny import make_checkpoint
from transformers import AutoTokenizer

from rayllm import LLM, SamplingParams
from rayllm.errors import ConfigError, RequestError
from rayllm.structured.vocabulary import Vocabulary
from rayllm.text.tokenizer import Tokenizer

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "opt": {"model_type": "opt", "architectures": ["OPTForCausalLM"]},
}
EMPTY = {
    "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
    "decoder": None, "model": {"type": "BPE", "vocab": {}, "merges": []},
}  # fmt: skip
SOME_FILES: list[tuple[dict[str, Any], str]] = [
    ({}, "holds no tokenizer .*--tokenizer FOLDER.*--skip-tokenizer-init"),
    ({"tokenizer_config.json": {"tokenizer_class": "Qwen2Tokenizer"}}, "holds no tokenizer"),
    ({"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer"}}, "holds no tokenizer"),
    ({"special_tokens_map.json": {"eos_token": "</s>"}, "added_tokens.json": {"</s>": 2}}, "holds no tokenizer"),
    ({"vocab.json": {"a": 0, "b": 1}}, "holds no tokenizer"),
    ({"merges.txt": "#version: 0.2\na b\n"}, "holds no tokenizer"),
    ({"tokenizer.json": EMPTY}, "without a vocabulary"),
    ({"tokenizer.model": "garbage"}, r"tokenizer\.model: not a sentencepiece model"),
    ({"tokenizer.model": ""}, r"tokenizer\.model"),
]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(("files", "words"), SOME_FILES)
def test_a_folder_that_lacks_files_is_refused_in_one_line(
    tmp_path: Path, kind: str, files: dict[str, Any], words: str
) -> None:
    for name, content in {"config.json": CONFIGS[kind], **files}.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))

    with pytest.raises(ConfigError, match=words) as caught:
        Tokenizer.from_path(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- sentencepiece alone

TEXTS = ["hello world", " two  spaces ", "naïve 你好 🎉", "the answer is 42.", "line\nbreak\ttab", "", "é", "y otra"]
LLAMA_2 = {
    "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": True},
    "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": True},
    "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": True},
}  # fmt: skip


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    size = 320 if request.param == "bpe" else 290
    folder = tmp_path_factory.mktemp(request.param)
    return make_sentencepiece_model(folder, model_type=request.param, vocab_size=size) / "tokenizer.model"


@pytest.mark.parametrize("settings", [None, LLAMA_2])
def test_a_sentencepiece_model_alone_gives_the_ids_of_its_own_library(
    model_file: Path, tmp_path: Path, settings: dict[str, Any] | None
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    ours, theirs = Tokenizer.from_path(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)

    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        if settings is None or not text.startswith(" "):  # where the class of `transformers` has a rule of its own
            assert ids == processor.encode(text)
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
        assert b"".join(map(ours.token_bytes, ids)).decode().lstrip(" ") == text.lstrip(" ")
    assert ours.encode("hello")[0] == 1 or settings is None
    assert ours.eos_token_id == processor.eos_id() == 2
    assert ours.vocab_size == processor.get_piece_size()


def test_a_sentencepiece_model_alone_serves_text_chats_and_grammars(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tokenizer=False, vocab_size=320)
    make_sentencepiece_model(path)
    (path / "tokenizer_config.json").write_text(
        json.dumps({**LLAMA_2, "chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    )
    assert Vocabulary.load(str(path), 320, (2,)).end_ids == (2,)
    with LLM(str(path), device="cpu", max_model_len=64) as llm:
        params = SamplingParams(max_tokens=8, structured_outputs={"regex": "(ab){2}"})  # type: ignore[arg-type]
        [output] = llm.generate("hello world", params)
        assert output.outputs[0].text == "abab"
        [output] = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=4))
        assert output.finished


# ------------------------------------------------------------------------------------------------------ token ids only


def test_without_a_tokenizer_ids_work_and_text_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tokenizer=False)
    with pytest.raises(ConfigError, match="--skip-tokenizer-init"):
        LLM(str(path), device="cpu")
    with LLM(str(path), device="cpu", skip_tokenizer_init=True) as llm:
        params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, logprobs=1, detokenize=False)
        for prompt in ([5, 6, 7], {"prompt_token_ids": [5, 6, 7]}):
            for used in (params, params.with_(detokenize=True)):
                [output] = llm.generate(prompt, used)
                assert len(output.outputs[0].token_ids) == 5
                assert output.outputs[0].text == ""
                assert output.prompt_token_ids == [5, 6, 7]
        for call in (
            lambda: llm.generate("hello"),
            lambda: llm.chat([{"role": "user", "content": "hi"}]),
            lambda: llm.generate([5], SamplingParams(stop="a")),
            lambda: llm.generate([5], SamplingParams(bad_words=["a"])),
            lambda: llm.generate([5], SamplingParams(structured_outputs={"regex": "a"})),  # type: ignore[arg-type]
        ):
            with pytest.raises(RequestError, match="skip_tokenizer_init"):
                call()
        assert len(llm.generate([[5], [6]], SamplingParams(max_tokens=2, ignore_eos=True))) == 2
