"""Code and formulas as data: what the chat page asks for, and what hostile texts may cost."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from serve.served import KEY, Served

from rayllm.serve.markup import child
from rayllm.serve.markup import markup as markup_module
from rayllm.serve.markup.code import tokens_of
from rayllm.serve.markup.formulas import tree_of
from rayllm.serve.markup.markup import Markup


@contextlib.asynccontextmanager
async def asking(**options: Any) -> AsyncIterator[httpx.AsyncClient]:
    served = Served(**options)
    try:
        async with served.client() as client:
            yield client
    finally:
        served.app.state.markup.close()


def names(tree: Any) -> set[str]:
    """Every tag and attribute of a tree."""
    if isinstance(tree, str):
        return set()
    tag, attributes, children = tree
    return {tag, *attributes}.union(*map(names, children))


def text_of(tree: Any) -> str:
    return tree if isinstance(tree, str) else "".join(map(text_of, tree[2]))


async def test_code_comes_as_tokens_and_formulas_as_trees() -> None:
    formulas = [{"latex": r"\frac{a}{b}", "display": True}, {"latex": r"\nonsense{a}", "display": False}]
    async with asking() as client:
        code = await client.post("/markup/code", json={"language": "python", "code": "def f():\n\treturn '<b>'\n"})
        unknown = await client.post("/markup/code", json={"language": "no-such", "code": "x"})
        found = (await client.post("/markup/formulas", json={"formulas": formulas})).json()["formulas"]
    tokens = code.json()["tokens"]
    assert ["k", "def"] in tokens
    assert ["s", "'<b>'"] in tokens
    assert "".join(text for _, text in tokens) == "def f():\n\treturn '<b>'\n"
    assert unknown.json() == {"tokens": None}
    assert (found[0][0], found[0][1]["display"], found[1]) == ("math", "block", None)
    assert "mfrac" in names(found[0])


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("code", {"language": "python"}, "code is required"),
        ("code", {"language": 5, "code": "x"}, "language must be a text"),
        ("code", {"language": "python", "code": ""}, "at least one character"),
        ("code", {"language": "x" * 31, "code": "x"}, "language has 31 characters, at most 30"),
        ("code", {"language": "python", "code": "x" * 65537}, "code has 65537 characters, at most 65536"),
        ("code", {"language": "python", "code": "x", "style": "a"}, "unknown field 'style'"),
        ("formulas", {"formulas": []}, "1 to 64"),
        ("formulas", {"formulas": "x"}, "1 to 64"),
        ("formulas", {"formulas": ["x"]}, "must be an object"),
        ("formulas", {"formulas": [{"latex": "x"}]}, "display is required"),
        ("formulas", {"formulas": [{"latex": "x", "display": 1}]}, "true or false"),
        ("formulas", {"formulas": [{"latex": "x" * 4001, "display": True}]}, "latex has 4001 characters"),
        ("formulas", {"formulas": [{"latex": "x", "display": True}] * 65}, "1 to 64"),
    ],
)
async def test_what_is_too_much_or_something_else_is_refused(path: str, body: Any, said: str) -> None:
    async with asking() as client:
        refused = await client.post(f"/markup/{path}", json=body)
    assert refused.status_code == 400
    assert said in refused.json()["error"]["message"]


async def test_it_asks_for_the_key_and_bounds_the_body() -> None:
    async with asking(api_keys=[KEY]) as client:
        body = {"language": "python", "code": "x"}
        assert (await client.post("/markup/code", json=body)).status_code == 401
        assert (await client.post("/markup/formulas", json={})).status_code == 401
        headers = {"authorization": f"Bearer {KEY}"}
        assert (await client.post("/markup/code", json=body, headers=headers)).status_code == 200
        large = await client.post("/markup/code", content=b" " * 300_000, headers=headers)
        assert large.status_code == 413


HOSTILE_FORMULAS = [
    r"\href{javascript:alert(1)}{x}",
    r"\style{background:url(//evil.example)}{x}",
    r"\class{a}{x}",
    r"\id{a}{x}",
    r"\text{<script>alert(1)</script>}",
    r"\color{red;background:url(x)}x",
    r"\mathrel{\href{x}{y}}",
    r"x<img src=x onerror=alert(1)>",
]


@pytest.mark.parametrize("latex", HOSTILE_FORMULAS)
def test_a_formulas_tree_holds_nothing_but_mathematics(latex: str) -> None:
    tree = tree_of(latex, is_display=False)
    if tree is None:
        return
    allowed = {
        "math",
        "mrow",
        "mi",
        "mn",
        "mo",
        "mtext",
        "mstyle",
        "display",
        "mathcolor",
        "mspace",
        "width",
        "stretchy",
    }
    assert names(tree) <= allowed
    assert "url" not in str(list(_values(tree)))


def _values(tree: Any) -> Iterator[str]:
    if not isinstance(tree, str):
        yield from tree[1].values()
        for child in tree[2]:
            yield from _values(child)


def test_text_of_a_formula_stays_text() -> None:
    assert text_of(tree_of(r"\text{<b>if</b> }x<y", is_display=False)).replace("\xa0", " ") == "<b>if</b> x<y"


@pytest.mark.parametrize(
    "latex",
    [
        r"\begin{aligned}a&=b\\c&=d\end{aligned}",
        r"\begin{align}a&=b\\c&=d\end{align}",
        r"\begin{align*}a&=b\\c&=d\end{align*}",
        r"\begin{alignat}{2}a&=b\\c&=d\end{alignat}",
        r"\begin{eqnarray}a&=&b\\c&=&d\end{eqnarray}",
        r"\begin{gather*}a=b\\c=d\end{gather*}",
        r"a&=b\\c&=d",
        r"a=b\\c=d",
    ],
)
def test_several_lines_are_a_table(latex: str) -> None:
    tree = tree_of(latex, is_display=True)
    assert tree is not None
    assert str(tree).count("'mtr'") == 2
    assert text_of(tree) == "a=bc=d"


@pytest.mark.parametrize(
    ("latex", "tag"),
    [
        (r"\lim_{n\to\infty} x", "munder"),
        (r"\limsup_x y", "munder"),
        (r"\max_x y", "munder"),
        (r"\operatorname*{argmax}_x y", "munder"),
        (r"\bigcup_i^n A", "munderover"),
        (r"\bigoplus_i A", "munder"),
        (r"\coprod_i A", "munder"),
        (r"\operatorname{rank}_x y", "msub"),
        (r"\int_0^1 x", "msubsup"),
        (r"x_i^2", "msubsup"),
        (r"\log_2 x", "msub"),
    ],
)
def test_limits_stand_below_the_operators_that_take_them(latex: str, tag: str) -> None:
    for is_display in (True, False):
        tree = tree_of(latex, is_display=is_display)
        assert tree is not None
        [found] = [node for node in _all_nodes(tree) if node[0] in ("msub", "msubsup", "munder", "munderover")]
        assert found[0] == tag
        assert (found[2][0][1].get("movablelimits") == "true") == tag.startswith("munder")


def _all_nodes(tree: Any) -> list[Any]:
    return [tree, *(node for child in tree[2] if isinstance(child, list) for node in _all_nodes(child))]


@pytest.mark.parametrize("latex", [r"\foo", r"{{{", r"\begin{foo}a&b\end{foo}", r"\left(x", r"\sqrt"])
def test_what_is_no_formula_gives_no_tree(latex: str) -> None:
    assert tree_of(latex, is_display=False) is None


def test_depth_and_size_of_a_tree_are_bounded() -> None:
    assert tree_of("{" * 400 + "x" + "}" * 400, is_display=False) is None
    assert tree_of("+".join("x" * 4000), is_display=False) is None


@pytest.mark.parametrize("language", ["html", "js", "css", "bash", "sql", "json", "c++", "rust", "diff", "console"])
def test_tokens_put_together_are_the_code(language: str) -> None:
    code = "\n\n<a href='x'>\t// \"unclosed\n#include <x>\n+ added\n- gone\n$ ls é 🎉\n\n"
    tokens = tokens_of(language, code)
    assert tokens is not None
    assert "".join(text for _, text in tokens) == code
    assert {kind for kind, _ in tokens} <= set("cknftdbsix") | {""}


async def test_a_slow_text_is_given_up_and_the_loop_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markup_module, "_CHILD_MODULE", "serve.slow_markup_child")
    monkeypatch.setattr(markup_module, "TIMEOUT_S", 0.3)
    markup = Markup()
    try:
        assert await markup.of({"code": "quick"}) == b'"quick"'
        ticks, began = 0, time.monotonic()
        asked = asyncio.ensure_future(markup.of({"code": "hang"}))
        while not asked.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert await asked == b"null"
        assert time.monotonic() - began >= 0.3
        assert ticks >= 5
        assert await markup.of({"code": "die"}) == b"null"
        assert await markup.of({"code": "again"}) == b'"again"'
    finally:
        markup.close()


async def test_what_is_known_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    markup = Markup()
    asked: list[bytes] = []

    def answer(request: bytes) -> bytes:
        asked.append(request)
        return b'"' + b"x" * 3_000_000 + b'"'

    monkeypatch.setattr(markup, "_ask", answer)
    for number in (1, 1, 2, 3, 1):
        await markup.of({"code": str(number)})
    assert len(asked) == 4  # the first was forgotten: what is kept has a bound
    markup.close()


def test_the_child_gives_up_what_takes_too_much_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(language: str, code: str) -> None:
        while True:
            re.search("(a+)+b", "a" * 22)

    monkeypatch.setattr("rayllm.serve.markup.code.tokens_of", spin)
    monkeypatch.setattr(child, "CPU_LIMIT_S", 0.05)
    before = signal.signal(signal.SIGPROF, child._interrupt)
    try:
        assert child._marked_up({"language": "x", "code": "x"}) is None
        assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    finally:
        signal.signal(signal.SIGPROF, before)
