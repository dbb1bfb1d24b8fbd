"""Grammars are tried in a child process: what is wrong with each is said, and nothing it does is felt outside."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import END_ID

from rayllm.errors import OverloadedError, RequestError
from rayllm.request import StructuredOutputsParams as Structured
from rayllm.structured import trial
from rayllm.structured.grammar import MAX_CHARACTERS, MAX_DEPTH
from rayllm.structured.trial import GrammarTrials


@pytest.fixture(scope="module")
def trials(llama_path: Path) -> Iterator[GrammarTrials]:
    trials = GrammarTrials(str(llama_path), 288, (END_ID,))
    yield trials
    trials.close()


def _nested(depth: int) -> str:
    return '{"properties":{"a":' * depth + "{}" + "}}" * depth


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"json": {"properties": {"r": {"type": "stsring"}}}}, "Invalid type: stsring"),
        ({"json": '"x"'}, "Expecting object schema"),
        ({"json": "{"}, "json is not a JSON schema"),
        ({"json": False}, "schema false"),
        ({"json": {"enum": []}}, "Unsatisfiable"),
        ({"json": {"type": "string", "pattern": "((("}}, "unclosed group"),
        ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "minLength .5. is greater than maxLength"),
        ({"json": {"type": "array", "uniqueItems": True}}, "unsupported JSON schema keywords"),
        ({"json": {"$ref": "#"}}, "no end, or allows no text"),
        ({"json": {"$ref": "http://127.0.0.1:9/x"}}, "nothing is fetched"),
        ({"json": _nested(MAX_DEPTH)}, f"deeper than {MAX_DEPTH}"),
        ({"json": _nested(5000)}, f"deeper than {MAX_DEPTH}"),
        ({"json": {"const": "x" * MAX_CHARACTERS}}, f"at most {MAX_CHARACTERS}"),
        ({"choice": [str(i) for i in range(6000)]}, "at most 5000"),
        ({"regex": "((("}, "unclosed group"),
        ({"regex": "x{100000000}"}, "repeats a part 100000000 times, at most 10000"),
        ({"regex": "(" * 200 + ")" * 200}, f"deeper than {MAX_DEPTH}"),
        ({"grammar": "root ::= foo"}, "Rule 'foo' not found"),
        ({"grammar": "start: foo"}, "unknown name"),
        ({"grammar": "root ::= a\na ::= b\nb ::= a"}, "no end, or allows no text"),
        ({"grammar": "root ::= " + "(" * 30_000 + '"a"'}, f"deeper than {MAX_DEPTH}"),
        ({"grammar": "hello"}, "neither Lark"),
        ({"structural_tag": {"structures": []}}, "'triggers' is missing"),
        ({"structural_tag": {"structures": [{"begin": "a", "schema": {}, "end": ""}], "triggers": ["b"]}}, "triggers"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_cannot_be_followed_is_refused_with_the_reason(
    trials: GrammarTrials, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        await trials.check(Structured(**fields))
    assert caught.value.code == "invalid_grammar"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "fields",
    [
        {"json": True},
        {"json": {"type": "array", "items": {"type": "string"}, "minItems": 1_000_000}},
        {"json": {"type": "string", "pattern": "(a{1,1000}){1,1000}"}},
        {"json": {"description": "of }}}{{{ and x{99999} brackets", "type": "integer"}},
        {"regex": "(.*a.{20})"},
        {"choice": [f"choice {i}" for i in range(3000)]},
        {"grammar": 'root ::= root "a" | "a"'},
    ],
    ids=lambda value: str(value)[:40],
)
async def test_what_looks_costly_and_is_not_is_taken(trials: GrammarTrials, fields: dict[str, Any]) -> None:
    structured = Structured(**fields)
    checked = await trials.check(structured)
    assert checked == structured or checked.grammar is not None


async def test_gbnf_comes_back_as_lark_so_that_workers_need_not_convert_it(trials: GrammarTrials) -> None:
    checked = await trials.check(Structured(grammar='root ::= "a" | "b"'))
    assert checked.grammar is not None
    assert "start:" in checked.grammar
    assert await trials.check(checked) is checked


async def test_a_grammar_that_was_tried_is_not_tried_again(trials: GrammarTrials) -> None:
    known, unknown = Structured(regex="known"), Structured(regex="un{99999}known")
    await trials.check(known)
    with pytest.raises(RequestError):
        await trials.check(unknown)
    trials._thread.submit(time.sleep, 1)  # the thread that talks to the child is busy
    await asyncio.wait_for(trials.check(known), 0.5)
    with pytest.raises(RequestError):
        await asyncio.wait_for(trials.check(unknown), 0.5)


@pytest.fixture
def ready(trials: GrammarTrials) -> GrammarTrials:
    """With a child that waits for a grammar."""
    trials._thread.submit(trials._warm_child).result()
    return trials


async def test_a_grammar_that_takes_too_long_is_ended_and_the_next_is_answered(
    ready: GrammarTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = ready._child
    assert child is not None

    def nothing_comes(timeout_s: float) -> None:
        time.sleep(timeout_s)
        child._cpu_s = lambda: 1e9  # type: ignore[method-assign, union-attr]  # as if it computed all the time
        raise TimeoutError

    monkeypatch.setattr(trial, "TIMEOUT_S", 0.05)
    monkeypatch.setattr(child, "_receive", nothing_comes)
    ticks = asyncio.create_task(asyncio.sleep(0.01))
    with pytest.raises(RequestError, match=r"regex takes longer than 0\.05 s"):
        await ready.check(Structured(regex="slow"))
    assert ticks.done(), "the loop went on meanwhile"
    assert child._process.returncode == -signal.SIGKILL
    monkeypatch.undo()
    await ready.check(Structured(regex="next"))


async def test_a_child_that_is_killed_while_nothing_is_tried_is_replaced(ready: GrammarTrials) -> None:
    assert ready._child is not None
    ready._child._process.kill()
    ready._child._process.wait()
    await ready.check(Structured(regex="after"))


async def test_a_child_that_is_killed_over_a_grammar_is_replaced_and_asked_again(ready: GrammarTrials) -> None:
    child = ready._child
    assert child is not None
    os.kill(child._process.pid, signal.SIGSTOP)  # so that it is surely killed before it has answered
    asyncio.get_running_loop().call_later(0.2, child._process.send_signal, signal.SIGKILL)
    structured = Structured(regex="asked twice")
    assert await ready.check(structured) == structured
    assert child._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_what_cannot_be_tried_is_not_held_against_the_grammar(
    ready: GrammarTrials, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    ask, structured = trial._Child.ask, Structured(regex=f"sound{number}")

    def ask_after_signal(child: Any, params: Structured) -> Any:
        child._process.send_signal(number)
        return ask(child, params)

    with monkeypatch.context() as patched:
        patched.setattr(trial._Child, "ask", ask_after_signal)
        patched.setattr(trial, "TIMEOUT_S", 0.3)
        with pytest.raises(OverloadedError, match="could not be tried"):
            await ready.check(structured)
    assert await ready.check(structured) == structured


async def test_a_child_that_dies_of_a_grammar_makes_it_refused(
    ready: GrammarTrials, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = ready._child
    assert child is not None
    os.kill(child._process.pid, signal.SIGABRT)
    with monkeypatch.context() as patched:
        patched.setattr(trial._Child, "is_alive", True)
        with pytest.raises(RequestError, match="takes more than 512 MiB to compile, or cannot be compiled"):
            await ready.check(Structured(regex="deadly"))
    with pytest.raises(RequestError, match="cannot be compiled"):
        await ready.check(Structured(regex="deadly"))


async def test_a_tokenizer_that_cannot_be_followed_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    trials = GrammarTrials(str(tmp_path), 288, (END_ID,))
    try:
        with pytest.raises(RequestError, match="does not allow structured outputs"):
            await trials.check(Structured(regex="a"))
    finally:
        trials.close()


async def test_what_is_tried_when_trials_end_starts_no_other_child(llama_path: Path) -> None:
    trials = GrammarTrials(str(llama_path), 288, (END_ID,))
    await trials.check(Structured(regex="warm"))
    child = trials._child
    assert child is not None
    os.kill(child._process.pid, signal.SIGSTOP)
    asyncio.get_running_loop().call_later(0.1, trials.close)
    with pytest.raises(OverloadedError, match="the server stops"):
        await trials.check(Structured(regex="sound"))
    assert trials._child is child
    assert not child.is_alive
