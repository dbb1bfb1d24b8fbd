"""Markdown on a terminal, as it streams: the same whatever pieces it comes in, and nothing of it is lost."""

from __future__ import annotations

import io
import itertools
import random
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from rayllm.cli.markdown import MarkdownWriter, PlainWriter, WrappedWriter

_CODES = re.compile(r"\x1b\[[0-9;]*m")


def shown(text: str, *, columns: int = 60, seed: int | None = None, coloured: bool = False) -> str:
    """What the terminal shows of the text, which comes whole, or in pieces of some characters."""
    console = Console(file=io.StringIO(), force_terminal=True, width=columns, color_system="standard", highlight=False)
    writer = MarkdownWriter(console)
    pieces = random.Random(seed)
    at = 0
    while at < len(text):
        size = len(text) if seed is None else pieces.randint(1, 7)
        writer.write(text[at : at + size])
        at += size
    writer.end()
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    return drawn if coloured else _CODES.sub("", drawn)


DOCUMENT = """# A heading with *emphasis*

Some **bold text**, *slanted* and `code with **stars**`, a [link](https://example.org/a_b) and snake_case_name.

1. first item that is long enough to be wrapped at the width of any of these terminals
   - nested item that is also long enough to be wrapped at that width
- [x] done
- [ ] open

| name | size |
|:-----|-----:|
| a    | **1** |

```python
def f(x):
    return "a"  # **not bold**
```

> quoted words that go on for so long that they do not fit

***

2 * 3 * 4 = 24, **never closed
"""


@pytest.mark.parametrize("columns", [30, 50, 80])
def test_it_is_the_same_in_whatever_pieces_it_comes(columns: int) -> None:
    whole = shown(DOCUMENT, columns=columns)
    for seed in range(20):
        assert shown(DOCUMENT, columns=columns, seed=seed) == whole


@pytest.mark.parametrize("columns", [24, 40, 61])
def test_lines_break_between_words_and_fit_the_terminal(columns: int) -> None:
    words = [f"word{'x' * (i % 9)}{i}" for i in range(200)]
    lines = shown(" ".join(words), columns=columns, seed=3).split("\n")
    assert all(cell_len(line) <= columns for line in lines)
    assert " ".join(lines).split() == words
    assert all(cell_len(line) + 1 + cell_len(after.split()[0]) > columns for line, after in itertools.pairwise(lines))


def test_what_the_marks_mean_is_shown_instead_of_them() -> None:
    text = shown(DOCUMENT, columns=100)
    for expected in (
        "A heading with emphasis\n",
        "Some bold text, slanted and code with **stars**, a link (https://example.org/a_b)",
        "snake_case_name.",
        "   • nested item",
        "• ☑ done\n• ☐ open\n",
        "│ quoted words",
        "2 * 3 * 4 = 24, **never closed",
        '    return "a"  # **not bold**\n',
    ):
        assert expected in text
    coloured = shown(DOCUMENT, columns=80, coloured=True)
    assert "\x1b[1mbold" in coloured
    assert "\x1b[3mslanted" in coloured
    assert re.search(r"\x1b\[[0-9;]+mdef", coloured)


def test_broken_lines_of_an_item_stand_below_its_text() -> None:
    assert shown("- one two three four five six", columns=20) == "• one two three four\n  five six"
    assert shown("12. one two three four five", columns=20) == "12. one two three\n    four five"
    assert shown("> one two three four five", columns=20) == "│ one two three four\n│ five"


def test_a_table_is_aligned_and_a_line_of_bars_alone_is_none() -> None:
    rows = [line.split() for line in shown("| a | bb |\n|---|---|\n| 1 | 2 |\n\nafter").splitlines() if line.strip()]
    assert [row for row in rows if row[0][0] != "─"] == [["a", "bb"], ["1", "2"], ["after"]]
    assert shown("| not a table |\nafter") == "| not a table |\nafter"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a * b", "a * b"),
        ("*args and **kwargs", "*args and **kwargs"),
        ("`never closed", "`never closed"),
        ("[never closed", "[never closed"),
        ("a_b_c and _d_", "a_b_c and d"),
        ("AT&T &lt;b&gt; &amp", "AT&T <b> &amp"),
        ("<b>text</b>", "<b>text</b>"),
        ("\\*literal\\*", "*literal*"),
        ("[1] and [2]", "[1] and [2]"),
        ("https://example.org/a_b_c", "https://example.org/a_b_c"),
        ("<https://example.org>", "https://example.org"),
        ("#hashtag", "#hashtag"),
        ("-5 degrees", "-5 degrees"),
        ("1.5 litres", "1.5 litres"),
        ("~~~~", "────────────────────────────────────────────────────────────\n" * 2),
        ("``a`b`` c", "a`b c"),
    ],
)
def test_what_is_no_markup_stays(text: str, expected: str) -> None:
    for seed in (None, *range(8)):
        assert shown(text, seed=seed).rstrip("\n") == expected.rstrip("\n")


def test_an_emphasis_that_does_not_end_is_not_waited_for_for_ever() -> None:
    words = " ".join(f"w{i}" for i in range(400))
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    writer = MarkdownWriter(console)
    writer.write(f"**{words}")
    assert "w50" in console.file.getvalue()  # type: ignore[attr-defined]
    assert " ".join(shown(f"**{words} end", seed=1).split()) == f"**{words} end"


def test_scripts_without_spaces_break_at_the_width() -> None:
    lines = shown("日本語のテキストは空白がない" * 5, columns=30, seed=2).split("\n")
    assert [cell_len(line) for line in lines[:-1]] == [30] * (len(lines) - 1)


def test_a_word_that_no_line_holds_is_whole_when_put_together() -> None:
    assert shown("x" * 130, columns=40, seed=5).replace("\n", "") == "x" * 130


def test_words_are_shown_as_they_come() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    writer = MarkdownWriter(console)
    for piece, expected in (("Wait", "Wait"), (" for", "Wait for"), (" i", "Wait for i"), ("t", "Wait for it")):
        writer.write(piece)
        assert _CODES.sub("", console.file.getvalue()) == expected  # type: ignore[attr-defined]


def test_a_models_text_does_not_reach_the_terminals_controls() -> None:
    hostile = "a\x1b[2Jb\x1b]0;title\x07c\x9b1mD\rE\x08F ‮G"
    for text in (hostile, f"```\n{hostile}\n```", f"| {hostile} |\n|---|\n| {hostile} |"):
        drawn = shown(text, coloured=True)
        assert not re.search(r"[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u202e]", drawn)
        assert "[2J" not in re.findall(r"\x1b\S*", drawn)
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    WrappedWriter(console, "dim").write("a\x1b[2Jb")
    assert "\x1b[2J" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_long_code_stays_on_its_line() -> None:
    """The terminal breaks it, and whoever copies it gets one line."""
    line = "x = " + " + ".join(f"value_{i}" for i in range(40))
    assert line in shown(f"```python\n{line}\n```", columns=40)


def test_in_a_pipe_the_text_is_as_it_is() -> None:
    written: list[str] = []
    writer = PlainWriter(written.append)
    for piece in (DOCUMENT[:100], DOCUMENT[100:]):
        writer.write(piece)
    writer.end()
    assert "".join(written) == DOCUMENT
