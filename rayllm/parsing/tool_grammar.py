"""What a constrained answer with calls looks like, as a grammar in llguidance's form of Lark.

A marker that is one token of the model's is written by its id: special tokens are no text, and text in the grammar
never matches them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Any

from rayllm.parsing.reasoning import ReasoningFormat
from rayllm.parsing.tool_formats import Payload, ToolFormat
from rayllm.parsing.tools import Tool, ToolPlan
from rayllm.structured.schema import plain_schema

_ANY_TEXT = r"/(.|\n)*/"
_BLANK = r"[ \t\r\n]*"
"""What the parser skips."""
_AFTER_REASONING = r"[ \t\r\n]{0,8}"
"""JSON's own white space, which parsers of JSON skip too; with a bound: a model could write nothing else."""
_WRITING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_CLOSABLE = frozenset({"type", "properties", "required", "title", "description", "$defs", "definitions", "$schema"})
"""Where a schema says no more than this, other members may be left out without changing what it means."""


class Thinking(Enum):
    """What the prompt leaves to think."""

    OPEN = auto()
    """The prompt began the reasoning; it must be ended first."""
    POSSIBLE = auto()
    NONE = auto()


class GrammarWriter:
    """Writes grammars for one model. `atoms`: texts that are one special token of it, and their ids."""

    def __init__(self, atoms: Mapping[str, int]):
        self._atoms = atoms
        self._atom = re.compile("|".join(map(re.escape, sorted(atoms, key=len, reverse=True))) or r"(?!)")

    def forced(self, plan: ToolPlan, form: ToolFormat, reasoning: ReasoningFormat | None, thinking: Thinking) -> str:
        """One call or more, and nothing else but reasoning before."""
        return self._grammar(
            [
                f"start: {self._prefix(reasoning, thinking)}{self._group(form)}",
                *self._thought(reasoning, thinking),
                *self._calls(plan, form),
            ]
        )

    def free(
        self, plan: ToolPlan, form: ToolFormat, reasoning: ReasoningFormat | None, thinking: Thinking
    ) -> str | None:
        """Any text, and calls in which the arguments of strict tools follow their schemas. None where a model writes
        calls as Python, which no schema says anything of."""
        if form.payload is Payload.PYTHON:
            return None
        if form.payload is Payload.CHANNELS:
            return self._free_channels(plan, form, reasoning, thinking)
        opening = form.written.all[0] or form.written.each[0]
        first = self._atom.match(opening)
        mark = form.begin if form.begin and opening.startswith(form.begin) else opening
        if not mark:
            return self._free_unmarked(plan, form, reasoning, thinking)
        prefix = self._prefix(reasoning, thinking)
        repeat = "*" if plan.parallel else "?"
        if first:
            start = f"start: {prefix}text ({self._group(form)} text){repeat}"
            lead = []
        else:
            start = f"start: {prefix}(lead {self._group(form, mark)}){repeat} text"
            lead = [f"lead[suffix={_quoted(mark)}]: {_ANY_TEXT}"]
        rules = [f"text: {_ANY_TEXT}", *lead, *self._thought(reasoning, thinking)]
        return self._grammar([start, *rules, *self._calls(plan, form, shown_before="" if first else mark, free=True)])

    def _free_channels(
        self, plan: ToolPlan, form: ToolFormat, reasoning: ReasoningFormat | None, thinking: Thinking
    ) -> str | None:
        """Words to the user, perhaps, then a call or the final answer. None where the marks are no tokens: text would
        hold them too."""
        if not all(mark in self._atoms for mark in ("<|channel|>", "<|message|>", "<|start|>", "<|end|>")):
            return None
        thoughts = "thought* " if self._prefix(reasoning, thinking) else ""
        preamble = self.literal("<|channel|>commentary<|message|>"), self.literal("<|end|><|start|>assistant")
        final = self.literal("<|channel|>final<|message|>")
        return self._grammar(
            [
                f"start: {thoughts}({preamble[0]} text {preamble[1]} {thoughts})? (calls | {final} text)",
                f"text: {_ANY_TEXT}",
                *self._thought(reasoning, thinking),
                *self._calls(plan, form, free=True),
            ]
        )

    def _free_unmarked(
        self, plan: ToolPlan, form: ToolFormat, reasoning: ReasoningFormat | None, thinking: Thinking
    ) -> str:
        """Where only the name of a known tool, first in the answer, begins a call: that, or a text that begins with
        none, and with no reasoning either."""
        names = [_escaped(tool.name + form.written.each[1]) for tool in plan.allowed]
        schemas = [_schema(tool, any_object=not tool.strict) for tool in plan.allowed]
        begins = names
        if reasoning is not None and thinking is Thinking.POSSIBLE:
            begins = names + [_escaped(mark) for mark in reasoning.begin if mark not in self._atoms]
        # One terminal up to the arguments: of several that match, the longest counts.
        calls = [f"/{_BLANK}{name}/ %json {schema}" for name, schema in zip(names, schemas)]
        return self._grammar(
            [
                f"start: {self._prefix(reasoning, thinking)}({' | '.join(calls)} | OTHER)",
                f"OTHER: {_ANY_TEXT} & ~/{_BLANK}({'|'.join(begins)})(.|\\n)*/",
                *self._thought(reasoning, thinking),
            ]
        )

    def either(
        self, plan: ToolPlan, form: ToolFormat, body: str, reasoning: ReasoningFormat | None, thinking: Thinking
    ) -> str:
        """Calls, or what `body` (a rule's right side) says; after reasoning."""
        start = f"start: {self._prefix(reasoning, thinking)}({self._group(form)} | {self._answer(reasoning)}body)"
        rules = [f"body: {body}", *self._thought(reasoning, thinking), *self._calls(plan, form)]
        return self._grammar([start, *rules])

    def after_reasoning(self, body: str, reasoning: ReasoningFormat, thinking: Thinking) -> str:
        """What `body` (a rule's right side) says, after reasoning."""
        start = f"start: {self._prefix(reasoning, thinking)}{self._answer(reasoning)}body"
        return self._grammar([start, f"body: {body}", *self._thought(reasoning, thinking)])

    def _grammar(self, lines: Sequence[str]) -> str:
        return "%llguidance {}\n" + "\n".join(lines) + "\n"

    def literal(self, text: str) -> str:
        """The text as terminals."""
        parts: list[str] = []
        end = 0
        for found in self._atom.finditer(text):
            parts += [_quoted(text[end : found.start()])] if found.start() > end else []
            parts.append(f"<[{self._atoms[found.group()]}]>")
            end = found.end()
        parts += [_quoted(text[end:])] if end < len(text) else []
        return " ".join(parts)

    # -------------------------------------------------------------------------------------------------- reasoning

    def _prefix(self, reasoning: ReasoningFormat | None, thinking: Thinking) -> str:
        if reasoning is None or thinking is Thinking.NONE:
            return ""
        return "thought " if thinking is Thinking.OPEN else "thought? "

    def _answer(self, reasoning: ReasoningFormat | None) -> str:
        return f"{self.literal(reasoning.answer)} " if reasoning is not None and reasoning.answer else ""

    def _thought(self, reasoning: ReasoningFormat | None, thinking: Thinking) -> list[str]:
        if reasoning is None or thinking is Thinking.NONE:
            return []
        begin = ""
        if thinking is Thinking.POSSIBLE:
            begin = "(" + " | ".join(map(self.literal, reasoning.begin)) + ") "
        if all(self._atom.match(end) for end in reasoning.end):
            ends = " | ".join(map(self.literal, reasoning.end))
            return [f"thought: {begin}thinking ({ends}) /{_AFTER_REASONING}/", f"thinking: {_ANY_TEXT}"]
        ends = "|".join(map(_escaped, reasoning.end))
        return [f"thought: {begin}thinking /{_AFTER_REASONING}/", f"thinking[suffix=/{ends}/]: {_ANY_TEXT}"]

    # ------------------------------------------------------------------------------------------------------ calls

    def _group(self, form: ToolFormat, shown_before: str = "") -> str:
        """All calls; `shown_before` is what of their beginning is there already."""
        opening = form.written.all[0].removeprefix(shown_before)
        return " ".join(filter(None, (self.literal(opening), "calls", self.literal(form.written.all[1]))))

    def _calls(self, plan: ToolPlan, form: ToolFormat, shown_before: str = "", free: bool = False) -> list[str]:
        """The rules `calls` and `call`. In free text, calls that do not stand in a list are joined by any text."""
        written = form.written
        before, between, after = written.each
        if not written.all[0]:
            before = before.removeprefix(shown_before)
        joint = "" if written.joint is None else self.literal(written.joint)
        repeats = plan.parallel and written.joint is not None and not (free and not written.all[0])
        rules = [
            f"calls: call ({joint} call)*" if repeats else "calls: call",
            "call: " + " | ".join(f"call_{i}" for i in range(len(plan.allowed))),
        ]
        for i, tool in enumerate(plan.allowed):
            schema = _schema(tool, any_object=free and not tool.strict)
            head, tail = self.literal(before + tool.name + (written.number_mark or between)), self.literal(after)
            if written.number_mark:
                head += f" /[0-9]{{1,4}}/ {self.literal(between)}"
            rules.append(f"call_{i}: {head} %json {schema} {tail}".rstrip())
        return rules


def _escaped(text: str) -> str:
    """The text inside a regex of the grammar."""
    return re.escape(text).replace("\n", "n").replace("/", "\\/")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(tool: Tool, any_object: bool) -> str:
    """The schema that arguments follow, on one line. What the grammar cannot check of a tool that is not strict is let
    pass."""
    schema: dict[str, Any] = {"type": "object"} if any_object else {**_parameters(tool), "type": "object"}
    if schema.get("properties") is not None and _CLOSABLE.issuperset(schema):
        schema["additionalProperties"] = False
    guidance = {**_WRITING, "lenient": True} if not tool.strict else _WRITING
    return json.dumps({"x-guidance": guidance, **schema}, ensure_ascii=False)


def _parameters(tool: Tool) -> dict[str, Any]:
    schema = plain_schema(tool.parameters)
    return schema if isinstance(schema, dict) else tool.parameters
