"""Emphasis, code and links within a line of Markdown that comes piece by piece."""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

Segment = tuple[str, str]
"""Text, and its style in rich's words."""
_MAX_HELD = 400
"""Characters that wait for the end of an emphasis; then they are shown as they are."""
_OPENER = re.compile(
    r"[*`]+(?=\S|$)|(?<!\w)_+(?=\S|$)|~+(?=\S|$)|!?\[[^\]]*(?:\](?:\([^)]*)?)?$|&\w*$|<[\w/!][^>\s]*$|\\$"
)
"""In what was parsed as plain text: the beginning of something whose end may yet come."""
_STYLES = {"strong": "bold", "em": "italic", "s": "strike", "link": "underline"}


@functools.cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("strikethrough")


class InlineMarkdown:
    """`add` and `end` give the segments that can be shown by now: what no later text can change."""

    def __init__(self, style: str = ""):
        self._style = style
        self._raw = ""
        self._shown = ""

    def add(self, text: str) -> list[Segment]:
        self._raw += text
        segments = self._parsed()
        plain = "".join(part for part, _ in segments)
        limit = _first_open(segments)
        if len(plain) - limit > _MAX_HELD:
            return self.end()
        return self._new(segments, limit)

    def end(self) -> list[Segment]:
        """All that is left; what follows is parsed by itself."""
        segments = self._parsed()
        new = self._new(segments, len("".join(part for part, _ in segments)))
        self._raw = self._shown = ""
        return new

    def _new(self, segments: list[Segment], limit: int) -> list[Segment]:
        """Segments up to `limit`, without what was shown."""
        plain = "".join(part for part, _ in segments)
        at = _num_common(plain, self._shown)
        if limit <= at:
            return []
        self._shown = plain[:limit]
        return _cut(segments, at, limit)

    def _parsed(self) -> list[Segment]:
        leading = self._raw[: len(self._raw) - len(self._raw.lstrip(" "))]
        body = self._raw[len(leading) :]
        trailing = body[len(body.rstrip(" ")) :]
        [block] = _parser().parseInline(body.rstrip(" ")) if body else [None]
        segments = [(leading, self._style)] if leading else []
        if block is not None:
            segments += _segments(block.children or [], self._style)
        return [*segments, (trailing, self._style)] if trailing else segments


def _segments(tokens: list[Token], base: str) -> list[Segment]:
    found: list[Segment] = []
    styles, addresses = [base] if base else [], []
    for token in tokens:
        name, _, end = token.type.rpartition("_")
        if end == "open":
            styles.append(_STYLES.get(name, ""))
            addresses += [str(token.attrs.get("href", ""))] if name == "link" else []
        elif end == "close":
            styles.pop()
            if name == "link" and (address := addresses.pop()) and not "".join(t for t, _ in found).endswith(address):
                found.append((f" ({address})", " ".join([*filter(None, styles), "dim"])))
        elif token.type == "code_inline":
            found.append((token.content, " ".join([*filter(None, styles), "cyan"])))
        elif token.type == "image":
            found.append((f"{token.content} ({token.attrs.get('src', '')})", " ".join([*filter(None, styles), "dim"])))
        elif token.type in ("softbreak", "hardbreak"):
            found.append((" ", base))
        else:
            found.append((token.content, " ".join(filter(None, styles))))
    return found


def _first_open(segments: list[Segment]) -> int:
    """Up to where the text is final."""
    at = 0
    for number, (text, style) in enumerate(segments):
        opener = None if "cyan" in style else _OPENER.search(text)
        if opener is not None:
            return at + opener.start()
        at += len(text)
        if number == len(segments) - 1 and "cyan" in style:  # "`a`" may yet become "`a``b`"
            return at
    return at


def _num_common(one: str, other: str) -> int:
    """How many characters both begin with."""
    if one.startswith(other):
        return len(other)
    return next((at for at, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _cut(segments: list[Segment], start: int, end: int) -> list[Segment]:
    cut, at = [], 0
    for text, style in segments:
        part = text[max(0, start - at) : max(0, end - at)]
        at += len(text)
        if part:
            cut.append((part, style))
    return cut
