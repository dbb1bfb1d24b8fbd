from __future__ import annotations

from pathlib import Path

import pytest

from rayllm.errors import RequestError
from rayllm.request import StructuredOutputsParams
from rayllm.structured.matcher import new_matcher, no_token_reason
from rayllm.structured.vocabulary import Vocabulary
from rayllm.text.tokenizer import Tokenizer

VOCAB_SIZE, END_ID = 320, 2


@pytest.fixture(scope="module")
def vocabulary(llama_path: Path) -> Vocabulary:
    return Vocabulary.load(str(llama_path), VOCAB_SIZE, (END_ID,))


def test_a_matcher_takes_the_tokens_of_a_text_that_follows_and_then_its_end(
    vocabulary: Vocabulary, llama_path: Path
) -> None:
    matcher = new_matcher(StructuredOutputsParams(choice=("hello", "help")), vocabulary)
    assert matcher.consume_tokens(Tokenizer.from_path(str(llama_path)).encode("help", add_special_tokens=False))
    assert matcher.is_accepting()
    assert not matcher.is_error()


def test_a_grammar_that_cannot_be_compiled_is_refused_with_its_kind(vocabulary: Vocabulary) -> None:
    with pytest.raises(RequestError, match="regex cannot be followed: "):
        new_matcher(StructuredOutputsParams(regex="(a"), vocabulary)


def test_a_token_that_does_not_follow_has_a_reason_in_one_line(vocabulary: Vocabulary) -> None:
    matcher = new_matcher(StructuredOutputsParams(regex="a"), vocabulary)
    assert not matcher.consume_token(END_ID)
    assert matcher.is_error()
    assert no_token_reason(matcher).startswith("the grammar cannot be followed: ")
    assert "\n" not in no_token_reason(matcher)
