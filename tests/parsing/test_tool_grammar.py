"""Grammars of calls, held against what the notations write and what the parser reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import llguidance
import pytest
import tokenizers
from parsing.test_output_parser import TOOLS, calls_of, events_of

from rayllm.config import ReasoningParser, ToolCallParser
from rayllm.parsing.output_parser import OutputParser
from rayllm.parsing.reasoning import REASONING_FORMATS
from rayllm.parsing.tool_formats import TOOL_FORMATS, ToolFormat
from rayllm.parsing.tool_grammar import GrammarWriter, Thinking
from rayllm.parsing.tools import read_tools
from rayllm.request import StructuredOutputsParams
from rayllm.structured.grammar import grammar_of, rule_of

QWEN = REASONING_FORMATS["qwen3"]
DEFINED = [
    {"type": "function", "function": {"name": name, "parameters": schema, "strict": True}}
    for name, schema in TOOLS.items()
]
ONE = [("weather", '{"city": "Zürich {[", "days": 3, "unit": "C"}')]
TWO = [*ONE, ("now", "{}")]
CHANNELS = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>"]
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", *CHANNELS]


class Model:
    """A tokenizer, with or without tokens of its own for some marks, and its matcher."""

    def __init__(self, path: Path, has_marks: bool):
        self.tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        if has_marks:
            self.tokenizer.add_special_tokens(MARKS)
        ids = {mark: self.tokenizer.token_to_id(mark) for mark in MARKS}
        self.writer = GrammarWriter({mark: i for mark, i in ids.items() if i is not None})
        self._tokens = llguidance.LLTokenizer(self.tokenizer.to_str(), eos_token=2)

    def accepts(self, grammar: str, text: str) -> bool:
        matcher = llguidance.LLMatcher(self._tokens, grammar)
        assert not matcher.get_error(), matcher.get_error()
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.fixture(scope="module", params=[False, True], ids=["marks are text", "marks are tokens"])
def model(request: pytest.FixtureRequest, tokenizer_path: Path) -> Model:
    return Model(tokenizer_path, request.param)


def written(form: ToolFormat, calls: list[tuple[str, str]]) -> str:
    return form.written.text(calls)


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_required_calls_are_all_there_can_be_and_are_read_back(model: Model, name: str) -> None:
    form = TOOL_FORMATS[name]
    several = model.writer.forced(_plan("required"), form, QWEN, Thinking.POSSIBLE)
    single = model.writer.forced(_plan("required", parallel=False), form, QWEN, Thinking.POSSIBLE)
    has_joint = form.written.joint is not None

    for calls in (ONE, TWO):
        text = written(form, calls)
        for whole in (text, f"<think>hm</think>\n\n{text}"):
            assert model.accepts(several, whole) == (calls is ONE or has_joint)
            assert model.accepts(single, whole) == (calls is ONE)
        if calls is ONE or has_joint:
            assert calls_of(events_of(OutputParser(form, QWEN, tools=TOOLS), [text])) == calls
        assert not model.accepts(several, f"Well: {text}")
    assert not model.accepts(several, written(form, [("weather", '{"city": 5}')]))


@pytest.mark.parametrize("name", sorted(TOOL_FORMATS.keys() - {"glm4", "llama4_pythonic", "pythonic", "openai"}))
def test_strict_calls_in_free_text_follow_their_schemas(model: Model, name: str) -> None:
    form = TOOL_FORMATS[name]
    grammar = model.writer.free(_plan("auto"), form, QWEN, Thinking.POSSIBLE)

    assert grammar is not None
    for text in ("", "Hello", f"Well: {written(form, ONE)}", f"<think>hm</think>{written(form, TWO)}"):
        assert model.accepts(grammar, text)
    assert not model.accepts(grammar, f"Well: {written(form, [('weather', json.dumps({'city': 5}))])}")


def test_strict_calls_that_only_a_name_begins_follow_their_schemas(model: Model) -> None:
    form = TOOL_FORMATS["glm4"]
    grammar = model.writer.free(_plan("auto"), form, QWEN, Thinking.POSSIBLE)

    call, wrong = written(form, ONE), written(form, [("weather", '{"city": 5}')])
    for text in ("", "Hello", "weather is fine", "weather", "the\nnow\n{}", "nower\n", call, f"\n{call}", "\n now\n{}"):
        assert model.accepts(grammar, text), text
        assert model.accepts(grammar, f"<think>hm\nnow\n5</think>\n{text}"), text
    for text in (
        wrong,
        f"\n {wrong}",
        "now\n5",
        "weather\n",
        f"{call} and",
        f"<think>hm</think>\n{wrong}",
        "<think>hm",
    ):
        assert not model.accepts(grammar, text), text
    for text in ("Hello", "weather is fine", call, f"\n{call}"):
        assert bool(calls_of(events_of(OutputParser(form, tools=TOOLS), [text]))) == (call in text)


def test_strict_calls_in_channels_follow_their_schemas(tokenizer_path: Path) -> None:
    form, reasoning = TOOL_FORMATS["openai"], REASONING_FORMATS["openai_gptoss"]
    model = Model(tokenizer_path, has_marks=True)
    grammar = model.writer.free(_plan("auto"), form, reasoning, Thinking.POSSIBLE)
    assert grammar is not None

    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    preamble = "<|channel|>commentary<|message|>Well:<|end|><|start|>assistant"
    call, wrong = written(form, ONE), written(form, [("weather", '{"city": 5}')])
    for before in ("", thought, thought * 2, preamble, thought + preamble + thought):
        for text in (call, "<|channel|>final<|message|>", "<|channel|>final<|message|>Hello"):
            assert model.accepts(grammar, before + text), before + text
        for text in (wrong, "Hello", "<|channel|>analysis<|message|>hm", call + call):
            assert not model.accepts(grammar, before + text), before + text
    assert Model(tokenizer_path, has_marks=False).writer.free(_plan("auto"), form, reasoning, Thinking.NONE) is None


def test_what_binds_an_answer_stands_in_its_channel(tokenizer_path: Path) -> None:
    form, reasoning = TOOL_FORMATS["openai"], REASONING_FORMATS["openai_gptoss"]
    model = Model(tokenizer_path, has_marks=True)
    bound = model.writer.after_reasoning("/[0-9]+/", reasoning, Thinking.POSSIBLE)
    either = model.writer.either(_plan("auto"), form, "/[0-9]+/", reasoning, Thinking.POSSIBLE)

    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
    for grammar in (bound, either):
        for before in ("", thought):
            assert model.accepts(grammar, f"{before}<|channel|>final<|message|>12")
            assert not model.accepts(grammar, f"{before}12")
            assert not model.accepts(grammar, f"{before}<|channel|>final<|message|>x")
            assert model.accepts(grammar, before + written(form, ONE)) == (grammar is either)


def test_reasoning_that_the_prompt_began_must_end_first(model: Model) -> None:
    form = TOOL_FORMATS["hermes"]
    grammar = model.writer.forced(_plan("required"), form, QWEN, Thinking.OPEN)

    assert model.accepts(grammar, f"hm</think>\n{written(form, ONE)}")
    assert not model.accepts(grammar, written(form, ONE))


@pytest.mark.parametrize("thinking", [Thinking.OPEN, Thinking.POSSIBLE])
def test_between_reasoning_and_what_is_bound_stands_a_little_of_jsons_white_space(
    model: Model, thinking: Thinking
) -> None:
    hermes = TOOL_FORMATS["hermes"]
    begin = "" if thinking is Thinking.OPEN else "<think>"
    rule = rule_of(StructuredOutputsParams(json_object=True))
    assert rule is not None
    bound = [
        (model.writer.after_reasoning(rule, QWEN, thinking), '{"a": 1}'),
        (model.writer.forced(_plan("required"), hermes, QWEN, thinking), written(hermes, ONE)),
        (model.writer.either(_plan("auto"), hermes, rule, QWEN, thinking), '{"a": 1}'),
        (model.writer.either(_plan("auto"), hermes, rule, QWEN, thinking), written(hermes, ONE)),
    ]
    for grammar, text in bound:
        for space in ("", "\n", "\n\n", " ", "\r\n\t"):
            assert model.accepts(grammar, f"{begin}hm\u3000\n</think>{space}{text}"), space
        for space in ("\u3000", "\u00a0", "\u2028", "\n\u2003\n", "\v", "\f", "\n" * 9, " " * 64):
            assert not model.accepts(grammar, f"{begin}hm</think>{space}{text}"), space


def test_a_json_answer_has_no_white_space_without_end(model: Model) -> None:
    for params in (StructuredOutputsParams(json_object=True), StructuredOutputsParams(json={"type": "array"})):
        text = "{%s}" if params.json_object else "[%s]"
        grammar = grammar_of(params)
        for space in (" ", "\n", "\n  "):
            assert model.accepts(grammar, text % space)
        for space in ("\n" * 60, " " * 60, "\u00a0", "\n\n\n\n\n"):
            assert not model.accepts(grammar, text % space), space
        assert not model.accepts(grammar, "\n" + text % "")


def test_the_settings_name_every_notation() -> None:
    assert set(get_args(ToolCallParser)) == {"auto", *TOOL_FORMATS}
    assert set(get_args(ReasoningParser)) == {"auto", "none", *REASONING_FORMATS}


def _plan(choice: str, parallel: bool = True) -> Any:
    return read_tools(DEFINED, choice, parallel)
