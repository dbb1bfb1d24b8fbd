"""Vocabularies by rank: ids are those of merging by rank, as tiktoken does it."""

from __future__ import annotations

import base64
import itertools
import random
from pathlib import Path

import pytest
import regex
from text.tokenizers_made import make_ranks, make_sentencepiece_model

from rayllm.errors import ConfigError
from rayllm.vocabulary.ranks import WORDS, holds_ranks, ranks_pipeline, read_ranks

PARTS = [*" \n\t'sehlowrd,?123你好世é🎉<|", "hello", " world", "get_weather", "\r\n"]


def _merged(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """A word's ids: of all neighbours that are one token together, those of the lowest rank are merged, again and
    again."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ranks(tmp_path_factory.mktemp("ranks")) / "tokenizer.model"


def test_ids_are_those_of_merging_by_rank(model: Path) -> None:
    ranks = read_ranks(model)
    pipeline = ranks_pipeline(ranks, {"<end>": len(ranks) + 5})
    draw = random.Random(1)
    for _ in range(2000):
        text = "".join(draw.choices(PARTS, k=draw.randrange(12)))
        expected = [token_id for word in regex.findall(WORDS, text) for token_id in _merged(word.encode(), ranks)]
        assert pipeline.encode(text, add_special_tokens=False).ids == expected, text
        assert pipeline.decode(expected) == text


def test_no_text_is_a_special_token(model: Path) -> None:
    ranks = read_ranks(model)
    special = {"hello": 400, "END": 401, "<|end|>": 402}
    pipeline = ranks_pipeline({token: rank for token, rank in ranks.items() if token != b"hello"}, special)
    for text in special:
        for around in ("", " ", "a", "\n"):
            ids = pipeline.encode(around + text + around, add_special_tokens=False).ids
            assert not {*ids} & {*special.values()}, (text, around)
            assert pipeline.decode(ids) == around + text + around


def test_the_form_is_told_by_the_first_line(model: Path, tmp_path: Path) -> None:
    assert holds_ranks(model)
    assert not holds_ranks(make_sentencepiece_model(tmp_path) / "tokenizer.model")
    (tmp_path / "empty").write_text("")
    assert not holds_ranks(tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [*lines, "AA=="], "line 303 is no token"),
        (lambda lines: [*lines, "!!!! 400"], "line 303 is no token"),
        (lambda lines: [*lines, "AAAAA 400"], "line 303: "),
        (lambda lines: [*lines, "AAAAAAAA 5"], "two tokens have the same rank"),
        (lambda lines: [line for line in lines if line.split()[0] != base64.b64encode(b"a").decode()], "byte 0x61"),
    ],
)
def test_a_broken_file_is_refused(model: Path, tmp_path: Path, change: object, message: str) -> None:
    broken = tmp_path / "tokenizer.model"
    broken.write_text("\n".join(change(model.read_text().splitlines())))  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message) as caught:
        read_ranks(broken)
    assert str(broken) in str(caught.value)
