"""Text that comes piece by piece, broken between words at the terminal's width. Only ever appends: nothing that was
shown is written again, so that scrollback, copies and slow lines show what was said."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

Show = Callable[[str, str], None]
"""Shows text in a style, in rich's words (`bold cyan`; empty for none)."""
MIN_COLUMNS = 20
_LONG_WORD, _SHORT_WORD = 24, 8
"""Columns that a word may still grow by; and, on a narrow terminal, that are left beside them."""
_PIECES = re.compile(r"\n|[ \t]+|[^ \t\n]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Without the characters that would move the cursor, change colours or turn the writing direction: a model's text
    has no business with the terminal."""
    return _CONTROL.sub("", text)


def cell_len(text: str) -> int:
    """How many columns the text takes."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)


class WordWrap:
    """`columns` is asked at each word: terminals are resized. Near the line's end, a word is held until it is known to
    be whole; elsewhere it is shown as it comes."""

    def __init__(self, show: Show, columns: Callable[[], int]):
        self._show_now = show
        self._unshown: list[tuple[str, str]] = []
        self._columns = columns
        self._hanging: tuple[str, str] = ("", "")
        self._column = 0
        self._word: list[tuple[str, str]] = []
        self._space: tuple[str, str] = ("", "")
        """Before the word, where both come on one line."""
        self._is_begun = False
        """The word's beginning was shown: it stays on this line."""

    def begin_line(self, prefix: str = "", hanging: str | None = None, style: str = "") -> None:
        """A line that begins with `prefix`; what is broken off it begins with `hanging`, by default as much space."""
        self._hanging = (" " * cell_len(prefix) if hanging is None else hanging, style)
        self._show(prefix, style)
        self._column = cell_len(prefix)
        self._is_begun = False

    def add(self, text: str, style: str = "") -> None:
        """Text of the line; a line end in it begins the next."""
        for piece in _PIECES.findall(text):
            if piece == "\n":
                self._end_line()
                self.begin_line("", "")
            elif piece[0] in " \t":
                self._end_word()
                self._space = (piece.expandtabs(4), style)
            elif cell_len(piece) > 1:  # scripts without spaces break at any character
                self._end_word()
                self._word.append((piece, style))
                self._end_word()
            else:
                self._word.append((piece, style))
        width, columns = self._width(), max(self._columns(), MIN_COLUMNS)
        if width and self._column + len(self._space[0]) + width + min(_LONG_WORD, columns - _SHORT_WORD) <= columns:
            self._place_word()
            self._is_begun = True
        self._show_all()

    def flush(self) -> None:
        """Shows all that is held."""
        self._end_word()
        self._show_all()

    def end_line(self) -> None:
        """Shows all that is held, and begins no new line yet."""
        self._end_line()
        self._show_all()

    def _width(self) -> int:
        return cell_len("".join(text for text, _ in self._word))

    def _end_word(self) -> None:
        self._place_word()
        self._is_begun = False

    def _place_word(self) -> None:
        """The held word comes on this line where it fits, else on the next."""
        if not self._word:
            return
        width, columns = self._width(), max(self._columns(), MIN_COLUMNS)
        space, indent = self._space, cell_len(self._hanging[0])
        is_too_long = self._column + len(space[0]) + width > columns
        if is_too_long and not self._is_begun and self._column > indent:
            self._break()
        elif space[0]:
            self._show(*space)
            self._column += len(space[0])
        for text, style in _joined(self._word):
            for part in self._fitting(text, columns):
                self._show(part, style)
        self._word, self._space = [], ("", "")

    def _end_line(self) -> None:
        self._end_word()
        self._space = ("", "")
        self._show("\n", "")
        self._column = 0

    def _show(self, text: str, style: str) -> None:
        self._unshown.append((text, style))

    def _show_all(self) -> None:
        """What came together is shown together."""
        for text, style in _joined(self._unshown):
            self._show_now(text, style)
        self._unshown = []

    def _fitting(self, text: str, columns: int) -> Iterable[str]:
        """The text in parts that fit the line; one by one for a word that no line holds."""
        while text:
            room = columns - self._column
            if room <= 0:
                self._break()
                continue
            part = text[:room]
            while cell_len(part) > room and len(part) > 1:
                part = part[:-1]
            self._column += cell_len(part)
            text = text[len(part) :]
            yield part

    def _break(self) -> None:
        self._show("\n", "")
        self._show(*self._hanging)
        self._column = cell_len(self._hanging[0])


def _joined(pieces: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Neighbours of one style as one text."""
    joined: list[tuple[str, str]] = []
    for text, style in pieces:
        if joined and joined[-1][1] == style:
            joined[-1] = (joined[-1][0] + text, style)
        else:
            joined.append((text, style))
    return joined
