"""Code to tokens, by Pygments: what the chat page colours."""

from __future__ import annotations

from itertools import groupby

from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Generic, Keyword, Name, Number, Operator, String, _TokenType
from pygments.util import ClassNotFound

_KINDS: tuple[tuple[_TokenType, str], ...] = (
    (Comment, "c"),
    (Keyword.Constant, "n"),
    (Keyword, "k"),
    (Name.Function, "f"),
    (Name.Class, "t"),
    (Name.Decorator, "d"),
    (Name.Tag, "k"),
    (Name.Attribute, "f"),
    (Name.Builtin, "b"),
    (Name.Exception, "t"),
    (String, "s"),
    (Number, "n"),
    (Operator.Word, "k"),
    (Generic.Inserted, "i"),
    (Generic.Deleted, "x"),
    (Generic.Heading, "t"),
    (Generic.Subheading, "t"),
    (Generic.Prompt, "c"),
    (Generic.Output, "c"),
)
"""The first that holds a token's type is its kind."""

Token = tuple[str, str]
"""Kind (empty for plain text) and text."""


def tokens_of(language: str, code: str) -> list[Token] | None:
    """The tokens of the code, which put together are the code; None for a language that is not known."""
    try:
        lexer = get_lexer_by_name(language, stripnl=False, stripall=False, ensurenl=False)
    except ClassNotFound:
        return None
    kinds = ((_kind(kind), text) for kind, text in lexer.get_tokens(code))
    tokens = [(kind, "".join(text for _, text in group)) for kind, group in groupby(kinds, lambda token: token[0])]
    return tokens if "".join(text for _, text in tokens) == code else None


def _kind(found: _TokenType) -> str:
    return next((kind for parent, kind in _KINDS if found in parent), "")
