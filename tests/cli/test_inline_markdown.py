"""Markdown within a line is shown once no later text can change it."""

from __future__ import annotations

import pytest

from rayllm.cli.inline_markdown import InlineMarkdown


def merged(segments: list[tuple[str, str]]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for text, style in segments:
        if found and found[-1][1] == style:
            found[-1] = (found[-1][0] + text, style)
        else:
            found.append((text, style))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a **bold** word", [("a ", ""), ("bold", "bold"), (" word", "")]),
        ("*one* `two`", [("one", "italic"), (" ", ""), ("two", "cyan")]),
        ("see [here](http://x.org)!", [("see ", ""), ("here", "underline"), (" (http://x.org)", "dim"), ("!", "")]),
        ("2 * 3 * 4", [("2 * 3 * 4", "")]),
    ],
)
@pytest.mark.parametrize("piece", [1, 100])
def test_styles_do_not_depend_on_how_the_text_arrives(text: str, expected: list[tuple[str, str]], piece: int) -> None:
    markdown = InlineMarkdown()
    segments = [part for at in range(0, len(text), piece) for part in markdown.add(text[at : at + piece])]
    assert merged([*segments, *markdown.end()]) == expected


def test_an_open_emphasis_is_held_until_it_is_closed() -> None:
    markdown = InlineMarkdown()
    assert markdown.add("so **very") == [("so ", "")]
    assert merged([*markdown.add("** nice"), *markdown.end()]) == [("very", "bold"), (" nice", "")]


def test_an_emphasis_that_never_closes_is_shown_as_it_is() -> None:
    markdown = InlineMarkdown()
    assert merged(markdown.add("*" + "x" * 500)) == [("*" + "x" * 500, "")]
