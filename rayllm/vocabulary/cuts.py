"""Texts of special tokens, where a user wrote them, are cut: no model may find one whole in its vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def cut_inside(texts: Iterable[str]) -> list[Any]:
    """Pre-tokenizers of `tokenizers` (one, or none) that cut each of these texts behind its first character."""
    from tokenizers import Regex, pre_tokenizers

    long = sorted({text for text in texts if len(text) > 1})
    if not long:
        return []
    pattern = "|".join(f"{re.escape(text[0])}(?={re.escape(text[1:])})" for text in long)
    return [pre_tokenizers.Split(Regex(pattern), "isolated")]
