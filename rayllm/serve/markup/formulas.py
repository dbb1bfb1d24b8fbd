"""Formulas of LaTeX to MathML, by latex2mathml, as plain data: a tree of allowed elements and attributes alone.

`[tag, {attribute: value}, [children]]`, where a child is such a list or a text. What is not allowed is left out, with
its children kept; no link, script, style or name of a handler passes.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element

MAX_NODES = 5000
MAX_DEPTH = 60
_TAGS = frozenset(
    re.findall(
        r"\w+",
        """
    math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd
    mstyle mpadded mphantom mmultiscripts mprescripts none menclose
    """,
    )
)
_ATTRIBUTES = frozenset(
    re.findall(
        r"\w+",
        """
    display mathvariant displaystyle scriptlevel stretchy fence separator form lspace rspace accent accentunder
    linethickness columnalign rowalign rowspacing columnspacing columnlines rowlines frame minsize maxsize
    symmetric largeop movablelimits width height depth voffset mathcolor notation
    """,
    )
)
_ENVIRONMENTS = (
    (re.compile(r"\\(begin|end)\{(?:aligned|align|eqnarray)\*?\}"), "split"),
    (re.compile(r"\\(begin)\{align(?:ed)?at\*?\}\{\d+\}"), "split"),
    (re.compile(r"\\(end)\{align(?:ed)?at\*?\}"), "split"),
    (re.compile(r"\\(begin|end)\{(?:gathered|gather|multlined?)\*?\}"), "matrix"),
    (re.compile(r"\\(begin|end)\{[dr]cases\*?\}"), "cases"),
)
_LIMITS_BELOW = frozenset(
    ["lim", "max", "min", "sup", "inf", *"\u22c3\u22c2\u2a01\u2a02\u2a00\u2a06\u2a04\u22c1\u22c0\u2210"]
)
"""Operators whose limits latex2mathml sets beside them, where TeX has them below in a display. It marks others."""
_BELOW = {"msub": "munder", "msubsup": "munderover"}
_REFERENCE = re.compile(r"&#x([0-9A-Fa-f]{1,6});")
_VALUE = re.compile(r"[\w#.%+\- ]{1,60}")

Tree = list[Any]


def tree_of(latex: str, *, is_display: bool) -> Tree | None:
    """The formula's tree; None for what is no formula, or too large a one."""
    try:
        element = convert_to_element(_in_its_words(latex), display="block" if is_display else "inline")
        if _has_what_is_unknown(element):
            return None
        [tree] = _nodes(element, 0, [MAX_NODES])
    except Exception:  # it raises whatever its parser meets
        return None
    return tree if tree[0] == "math" else None


def _in_its_words(latex: str) -> str:
    """The environments that latex2mathml knows in place of those that mean the same."""
    for pattern, known in _ENVIRONMENTS:
        latex = pattern.sub(rf"\\\1{{{known}}}", latex)
    if r"\\" in latex and r"\begin" not in latex:  # lines without an environment
        known = "split" if "&" in latex else "matrix"
        latex = rf"\begin{{{known}}}{latex}\end{{{known}}}"
    return latex


def _has_what_is_unknown(element: Element) -> bool:
    """latex2mathml shows a command that it does not know as an identifier with its backslash, and the columns of an
    environment that it does not know as ampersands."""
    texts = [node.text or "" for node in element.iter() if node.tag != "mtext"]
    return any(text == "&" or (text.startswith("\\") and len(text) > 1) for text in texts)


def _nodes(element: Element, depth: int, num_left: list[int]) -> list[Any]:
    """The element as a list of one node; where its tag is not allowed, its children."""
    num_left[0] -= 1
    if depth > MAX_DEPTH or num_left[0] < 0:
        raise ValueError("the formula is too large")
    text = _REFERENCE.sub(lambda found: chr(int(found[1], 16)), element.text or "")
    children: list[Any] = [text] if text.strip() or (text and element.tag == "mtext") else []
    for child in element:
        children += _nodes(child, depth + 1, num_left)
    tag = element.tag.rpartition("}")[2]
    if tag not in _TAGS:
        return children
    attributes = {name: value for name, value in element.attrib.items() if name in _ATTRIBUTES and _is_plain(value)}
    if tag in _BELOW and children and _takes_limits(children[0]):
        tag = _BELOW[tag]  # in a line of text they stay beside it: the operator says that they are movable
        children[0] = ["mo", {**children[0][1], "movablelimits": "true"}, children[0][2]]
    return [[tag, attributes, children]]


def _takes_limits(operator: Any) -> bool:
    if not isinstance(operator, list) or operator[0] not in ("mo", "mi"):
        return False
    _, attributes, texts = operator
    return attributes.get("movablelimits") == "true" or (len(texts) == 1 and texts[0] in _LIMITS_BELOW)


def _is_plain(value: str) -> bool:
    return _VALUE.fullmatch(value) is not None
