"""The pipeline made of a sentencepiece model gives the ids of sentencepiece itself."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from rayllm.errors import ConfigError
from rayllm.vocabulary.sentencepiece import named_pieces, read_sentencepiece, sentencepiece_pipeline

LINES = ["hello world, how are you today?", "the answer to the question is 42.", "你好世界，今天怎么样？"] * 20
FORMS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe", "vocab_size": 340},
    "unigram": {"model_type": "unigram", "vocab_size": 294},
    "unigram, user-defined pieces": {
        "model_type": "unigram",
        "vocab_size": 297,
        "user_defined_symbols": ["[A]", "[AB]", "hel"],
    },
    "user-defined pieces": {"model_type": "bpe", "vocab_size": 345, "user_defined_symbols": ["[A]", "[AB]", "hel"]},
    "no dummy prefix": {"model_type": "bpe", "vocab_size": 340, "add_dummy_prefix": False},
    "spaces removed": {"model_type": "bpe", "vocab_size": 340, "remove_extra_whitespaces": True},
    "normalized": {"model_type": "bpe", "vocab_size": 340, "normalization_rule_name": "nmt_nfkc"},
    "no bytes": {"model_type": "bpe", "vocab_size": 80, "byte_fallback": False},
}


PARTS = [*"  \n\ta▁heloworldéｱ你好界42,<", "hello", " world", "[A]", "[AB]", "🎉", "今天", "</s>", "<0x0A>"]


def train(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    defaults: dict[str, Any] = {"byte_fallback": True, "normalization_rule_name": "identity"}
    defaults |= {"remove_extra_whitespaces": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, **{**defaults, **options}
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module", params=FORMS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    path = train(tmp_path_factory.mktemp("model") / "tokenizer.model", **FORMS[request.param])
    pipeline = sentencepiece_pipeline(read_sentencepiece(path), {})
    return sentencepiece.SentencePieceProcessor(model_file=str(path)), pipeline


def test_ids_and_text_are_those_of_sentencepiece(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choices(PARTS, k=draw.randrange(8)))
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False).ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids).replace(" \u2047 ", "<unk>"), text


def test_special_tokens_stand_behind_the_pieces_or_name_them_anew(tmp_path: Path) -> None:
    path = train(tmp_path / "tokenizer.model", **FORMS["user-defined pieces"])
    proto = read_sentencepiece(path)
    pipeline = sentencepiece_pipeline(proto, {"<|user|>": 3, "<|end|>": 400})

    assert (pipeline.token_to_id("<|user|>"), pipeline.token_to_id("<|end|>")) == (3, 400)
    assert pipeline.token_to_id("[A]") is None
    assert 3 not in pipeline.encode("[A]<|user|>").ids
    assert named_pieces(proto) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize("form", FORMS)
def test_no_text_is_a_special_token(tmp_path: Path, form: str) -> None:
    special = {"<s>": 1, "</s>": 2, "<|end|>": 5}
    if "unigram" not in form:
        special["<|new|>"] = 400
    pipeline = sentencepiece_pipeline(read_sentencepiece(train(tmp_path / "tokenizer.model", **FORMS[form])), special)
    for text in special:
        for around in ("", "[A]", "hel", "▁"):
            found = pipeline.encode(around + text + around, add_special_tokens=False).ids
            assert not {*found} & {*special.values()}, (text, around)


def test_added_tokens_of_a_unigram_model_must_follow_it(tmp_path: Path) -> None:
    proto = read_sentencepiece(train(tmp_path / "tokenizer.model", **FORMS["unigram"]))
    with pytest.raises(ConfigError, match=r"ids \[400\]: they must follow the 294"):
        sentencepiece_pipeline(proto, {"<|end|>": 400})


def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    for content in (b"garbage", b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"tokenizer\.model: not a sentencepiece model"):
            read_sentencepiece(path)
    train(path, model_type="char", vocab_size=60, byte_fallback=False)
    with pytest.raises(ConfigError, match="model_type=4 is not supported"):
        read_sentencepiece(path)
    train(path, model_type="bpe", vocab_size=340, treat_whitespace_as_suffix=True)
    with pytest.raises(ConfigError, match="treat_whitespace_as_suffix"):
        read_sentencepiece(path)
