from __future__ import annotations

from rayllm.request import SamplingParams
from rayllm.text.bad_words import bad_word_ids, with_bad_word_ids
from rayllm.text.tokenizer import Tokenizer


def test_a_word_stands_at_the_start_of_a_text_or_after_a_space(byte_level: Tokenizer) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(byte_level.encode(text, add_special_tokens=False))

    assert bad_word_ids(["hello", "  world", "hello"], byte_level) == [
        ids("hello"),
        ids(" hello"),
        ids("world"),
        ids(" world"),
    ]
    assert bad_word_ids(["\n\n"], byte_level) == [ids("\n\n")]


def test_no_special_token_is_added_to_a_word(sentencepiece: Tokenizer) -> None:
    start = sentencepiece.encode("")[0]
    found = bad_word_ids(["hello", "中"], sentencepiece)
    assert (sentencepiece.encode("hello", add_special_tokens=False)[0],) in found
    assert not any(start in ids for ids in found)


def test_parameters_travel_with_ids_of_the_model_alone(byte_level: Tokenizer) -> None:
    free = SamplingParams()
    assert with_bad_word_ids(free, byte_level, 300) is free
    params = SamplingParams(bad_words=["az"], bad_words_token_ids=[[7]])  # type: ignore[arg-type]
    (a, z) = byte_level.encode("az", add_special_tokens=False)
    found = with_bad_word_ids(params, byte_level, byte_level.vocab_size)
    assert found.bad_words == ()
    assert found.bad_words_token_ids[:2] == ((7,), (a, z))
    assert with_bad_word_ids(params, byte_level, max(a, z)).bad_words_token_ids == ((7,),)
