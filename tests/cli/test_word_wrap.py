"""Text that arrives in pieces is broken between words and only ever appended to."""

from __future__ import annotations

import pytest

from rayllm.cli.word_wrap import WordWrap, cell_len, printable


def wrapped(text: str, columns: int, piece: int, prefix: str = "") -> str:
    """What a terminal of `columns` shows of `text` that arrives `piece` characters at a time."""
    shown: list[str] = []
    wrap = WordWrap(lambda part, _style: shown.append(part), lambda: columns)
    wrap.begin_line(prefix)
    for at in range(0, len(text), piece):
        wrap.add(text[at : at + piece])
    wrap.flush()
    return "".join(shown)


@pytest.mark.parametrize("piece", [1, 3, 1000])
def test_lines_break_between_words_however_the_text_arrives(piece: int) -> None:
    text = "the quick brown fox jumps over the lazy dog"
    assert wrapped(text, 20, piece).split("\n") == ["the quick brown fox", "jumps over the lazy", "dog"]


def test_broken_lines_are_indented_by_the_prefix() -> None:
    assert wrapped("one two three four five", 20, 4, prefix="- ") == "- one two three four\n  five"


def test_a_word_longer_than_the_line_is_cut_at_the_columns() -> None:
    assert wrapped("x" * 45, 20, 45).split("\n") == ["x" * 20, "x" * 20, "x" * 5]


def test_wide_characters_take_two_columns_and_break_anywhere() -> None:
    assert cell_len("日本") == 4
    assert wrapped("日" * 15, 20, 1).split("\n") == ["日" * 10, "日" * 5]


def test_characters_that_control_the_terminal_are_left_out() -> None:
    assert printable("a\x1b[31mb\u202ec\r\n\td") == "a[31mbc\n\td"
