from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text.test_stop import expected

from rayllm.request import SamplingParams
from rayllm.text.detokenizer import ChoiceText
from rayllm.text.tokenizer import Tokenizer

IDS = st.lists(st.integers(0, 287), max_size=40)
"""Every token of the byte-level tokenizer: half characters and special tokens too."""
TEXT = st.text(st.sampled_from("ab é中🎉\n"), max_size=12)


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    places = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[a:b] for a, b in itertools.pairwise(places)]


def read(tokenizer: Tokenizer, deltas: list[list[int]], params: SamplingParams) -> ChoiceText:
    """Feeds the deltas as the API does and checks that what is shown adds up."""
    choice = ChoiceText(tokenizer, params)
    shown = ""
    for delta in deltas:
        shown += choice.push(delta)
        assert shown == choice.text
    assert shown + choice.finish() == choice.text
    return choice


@given(ids=IDS, cuts=st.lists(st.integers(0, 1000)), skip=st.booleans())
def test_any_split_gives_the_text_of_the_whole(
    byte_level: Tokenizer, ids: list[int], cuts: list[int], skip: bool
) -> None:
    choice = read(byte_level, split(ids, cuts), SamplingParams(skip_special_tokens=skip))

    assert choice.text == byte_level.decode(ids, skip_special_tokens=skip)
    assert choice.num_tokens_used == len(ids)
    assert choice.stop_reason is None


@given(
    text=TEXT,
    stops=st.lists(TEXT.filter(bool), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 1000)),
    include=st.booleans(),
)
def test_any_split_is_cut_at_the_same_stop_string(
    byte_level: Tokenizer, text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    ids = byte_level.encode(text, add_special_tokens=False)
    params = SamplingParams(stop=tuple(stops), include_stop_str_in_output=include)

    choice = read(byte_level, split(ids, cuts), params)

    assert (choice.text, choice.stop_reason) == expected(text, stops, include)
    one_by_one = read(byte_level, [[i] for i in ids], params)
    assert choice.num_tokens_used == one_by_one.num_tokens_used == len(choice.offsets)


@pytest.mark.parametrize("text", ["naïve", "你好，世界", "🎉👩‍👩‍👧 done"])
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_a_character_is_never_split(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    choice = ChoiceText(tokenizer, SamplingParams())

    pieces = [choice.push([token_id]) for token_id in ids]

    assert "".join(pieces).strip() == text
    assert "\ufffd" not in "".join(pieces)
    assert choice.finish() == ""


def test_the_first_word_keeps_its_space_after_a_prompt(sentencepiece: Tokenizer) -> None:
    prompt = sentencepiece.encode("hello")
    ids = sentencepiece.encode("world", add_special_tokens=False)

    assert ChoiceText(sentencepiece, SamplingParams(), prompt).push(ids) == " world"


def test_a_character_that_the_prompt_began_is_finished(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("中", add_special_tokens=False)
    assert len(ids) == 3

    choice = ChoiceText(byte_level, SamplingParams(), ids[:2])

    assert choice.push(ids[2:]) == "中"


def test_an_unfinished_character_is_shown_at_the_end(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a中", add_special_tokens=False)
    choice = ChoiceText(byte_level, SamplingParams())

    assert choice.push(ids[:-1]) == "a"
    assert choice.finish() == "\ufffd"
    assert choice.text == "a\ufffd"


def test_the_token_that_ended_the_choice_counts_but_has_no_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ab.", add_special_tokens=False)

    for include, text in ((False, "ab"), (True, "ab.")):
        choice = ChoiceText(byte_level, SamplingParams(include_stop_str_in_output=include))
        assert choice.push(ids, stop_token=True) == text
        assert choice.num_tokens_used == 3


def test_a_stop_string_within_the_first_min_tokens_does_not_stop(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("x.y.z", add_special_tokens=False)
    assert len(ids) == 5

    choice = ChoiceText(byte_level, SamplingParams(stop=(".",), min_tokens=2))

    assert choice.push(ids) == "x.y"
    assert choice.num_tokens_used == 4


def test_offsets_say_where_each_token_begins(byte_level: Tokenizer) -> None:
    choice = ChoiceText(byte_level, SamplingParams())

    choice.push(byte_level.encode("a中b", add_special_tokens=False))

    assert choice.offsets == [0, 1, 1, 1, 2]
