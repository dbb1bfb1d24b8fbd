"""A model's Markdown on a terminal, as it streams: headings, lists, quotes, code in colours, tables.

Lines are shown word by word as they come, and nothing is written twice. A heading's mark, a code block's line and a
table are held until they are whole. Line ends stay where the model put them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from rayllm.cli.inline_markdown import InlineMarkdown
from rayllm.cli.word_wrap import MIN_COLUMNS, WordWrap, printable

if TYPE_CHECKING:
    from rich.console import Console

_FENCE = re.compile(r"^(\s*)(`{3,}|~{3,})\s*([^`\s]*)[^`]*$")
_HEADING = re.compile(r"^ {0,3}(#{1,6})\s+(.*)$", re.DOTALL)
_RULE = re.compile(r"^ {0,3}([-*_])\s*(?:\1\s*){2,}$")
_QUOTE = re.compile(r"^ {0,3}>\s?(.*)$", re.DOTALL)
_ITEM = re.compile(r"^(\s*)([-*+]|\d{1,9}[.)])\s+(?:\[([ xX])\]\s+)?(\S.*)$", re.DOTALL)
_UNDECIDED = re.compile(
    r"^\s*(?:#{0,6}\s*|>|[`~]{0,2}|[`~]{3,}.*|\|.*|[-*_\s]*|(?:[-+*]|\d{1,9}[.)]?)\s*(?:\[[ xX]?\]?\s*)?)$",
    re.DOTALL,
)
"""A beginning that may yet become a heading, a list's item, a rule, a fence or a row of a table."""
_DELIMITER_ROW = re.compile(r"^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$")
_MAX_COLOURED_LINES = 400
_MAX_COLOURED_CHARACTERS = 500
_HEADING_STYLES = {1: "bold underline", 2: "bold", 3: "bold"}


class PlainWriter:
    """Shows text as it comes: for a pipe."""

    def __init__(self, write: Callable[[str], None]):
        self.write = write

    def end(self) -> None:
        """The answer is over."""


class WrappedWriter:
    """Plain text in one style, broken between words."""

    def __init__(self, console: Console, style: str = ""):
        self._wrap = WordWrap(lambda text, style: _show(console, text, style), lambda: console.width)
        self._style = style

    def write(self, text: str) -> None:
        self._wrap.add(printable(text), self._style)

    def end(self) -> None:
        self._wrap.flush()


class MarkdownWriter:
    """Shows one answer on a terminal."""

    def __init__(self, console: Console):
        self._console = console
        self._wrap = WordWrap(self._show, lambda: console.width)
        self._head: str | None = ""
        """A line's beginning, as long as it may become several things; None within a line that is known."""
        self._inline = InlineMarkdown()
        self._table: list[str] = []
        self._code: _CodeBlock | None = None
        self._was_blank = True

    def write(self, text: str) -> None:
        for part in re.split(r"(\n)", printable(text.replace("\r\n", "\n"))):
            if part == "\n":
                self._end_line()
            elif part:
                self._add(part)

    def end(self) -> None:
        """Shows what is held; the cursor stays behind the last line."""
        if self._head is not None:
            if self._head:
                self._open_line(self._head, is_whole=True)
                self._finish_inline()
        else:
            self._finish_inline()
        self._end_table()
        if self._code is not None:
            self._rule()
            self._code = None

    # ---------------------------------------------------------------------------------------------------- lines

    def _add(self, part: str) -> None:
        if self._head is None:
            self._show_inline(self._inline.add(part))
            return
        self._head += part
        if self._code is None and not _UNDECIDED.match(self._head):
            self._open_line(self._head, is_whole=False)

    def _end_line(self) -> None:
        if self._head is None:
            self._finish_inline()
            self._wrap.end_line()
        elif self._code is None and not self._head.strip():
            self._end_table()
            if not self._was_blank:  # one blank line says as much as three
                self._show("\n", "")
            self._was_blank = True
        else:
            self._open_line(self._head, is_whole=True)
            if self._head is None:
                self._finish_inline()
                self._wrap.end_line()
        self._head = ""

    def _open_line(self, line: str, *, is_whole: bool) -> None:
        """Shows the beginning of a line. Afterwards `_head` is None where more of its text may follow."""
        if self._code is not None:
            self._code_line(line)
            return
        self._was_blank = False
        if is_whole and line.lstrip().startswith("|"):
            self._table.append(line)
            self._head = ""
            return
        self._end_table()
        fence = _FENCE.match(line) if is_whole else None
        if fence is not None:
            self._code = _CodeBlock(len(fence[1]), fence[2], fence[3])
            self._rule(fence[3])
            self._head = ""
        elif is_whole and _RULE.match(line):
            self._rule()
            self._head = ""
        else:
            self._head = None
            self._open_text(line)

    def _open_text(self, line: str) -> None:
        prefix, style = "", ""
        while (quote := _QUOTE.match(line)) is not None:
            prefix, line, style = prefix + "│ ", quote[1], "dim"
        heading, item = _HEADING.match(line), _ITEM.match(line)
        hanging = prefix
        if heading is not None:
            style = _HEADING_STYLES.get(len(heading[1]), "bold")
            line = heading[2]
        elif item is not None:
            mark = item[2] if item[2][0].isdigit() else "•"
            box = {None: "", " ": "☐ "}.get(item[3], "☑ ")
            indent = item[1].expandtabs(4)
            prefix, hanging = f"{prefix}{indent}{mark} {box}", hanging + " " * len(f"{indent}{mark} ")
            line = item[4]
        else:
            indent = re.match(r"\s*", line)[0].expandtabs(4)[:12]  # type: ignore[index]  # it always matches
            prefix, hanging, line = prefix + indent, hanging + indent, line.lstrip()
        self._wrap.begin_line(prefix, hanging, "dim" if "│" in prefix else "")
        self._inline = InlineMarkdown(style)
        self._show_inline(self._inline.add(line))

    def _finish_inline(self) -> None:
        self._show_inline(self._inline.end())
        self._wrap.flush()

    def _show_inline(self, segments: list[tuple[str, str]]) -> None:
        for text, style in segments:
            self._wrap.add(text, style)

    # --------------------------------------------------------------------------------------------- code and tables

    def _code_line(self, line: str) -> None:
        assert self._code is not None
        self._head = ""
        if self._code.is_end(line):
            self._code = None
            self._rule()
            return
        self._console.print(self._code.coloured(line), soft_wrap=True, highlight=False)

    def _rule(self, title: str = "") -> None:
        """Above and below code, whose own lines have no frame: they can be copied."""
        width = min(max(self._console.width, MIN_COLUMNS), 60)
        line = f"── {title} " if title else ""
        self._show(line + "─" * max(3, width - len(line)) + "\n", "dim")

    def _end_table(self) -> None:
        lines, self._table = self._table, []
        if len(lines) > 1 and _DELIMITER_ROW.match(lines[1]):
            from rich.markdown import Markdown
            from rich.text import Text

            table = Markdown("\n".join(line.replace("<br>", " ") for line in lines))
            for row in self._console.render_lines(table, pad=False):
                if any(segment.text.strip() for segment in row):
                    self._console.print(Text.assemble(*((part.text, part.style or "") for part in row)), soft_wrap=True)
            return
        for line in lines:
            self._open_text(line)
            self._finish_inline()
            self._wrap.end_line()

    def _show(self, text: str, style: str) -> None:
        _show(self._console, text, style)


def _show(console: Console, text: str, style: str) -> None:
    from rich.text import Text

    if text:
        console.print(Text(text, style or ""), end="", soft_wrap=True, highlight=False)
        console.file.flush()


class _CodeBlock:
    """A fenced block whose lines come one by one."""

    def __init__(self, indent: int, fence: str, language: str):
        self._indent = indent
        self._fence = fence
        self._language = language.lower()
        self._lines: list[str] = []

    def is_end(self, line: str) -> bool:
        mark = line.strip()
        return len(mark) >= len(self._fence) and set(mark) == {self._fence[0]}

    def coloured(self, line: str) -> object:
        """The line in the terminal's own colours, lexed together with the lines before it."""
        from rich.text import Text

        margin = len(line) - len(line.lstrip(" "))
        self._lines.append(line[min(self._indent, margin) :].expandtabs(4))
        is_plain = not self._language or len(self._lines) > _MAX_COLOURED_LINES
        if is_plain or len(line) > _MAX_COLOURED_CHARACTERS:
            return Text(self._lines[-1])
        from rich.syntax import Syntax

        code = "\n".join(self._lines)
        lines = Syntax(code, self._language, theme="ansi_dark").highlight(code).split("\n", allow_blank=True)
        return lines[len(self._lines) - 1] if len(lines) >= len(self._lines) else Text(self._lines[-1])
