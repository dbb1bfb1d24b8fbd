from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayllm.parsing.events import Event, Reasoning, Text, ToolCallArguments, ToolCallBegin, ToolCallEnd, joined
from rayllm.parsing.output_parser import OutputParser
from rayllm.parsing.reasoning import REASONING_FORMATS
from rayllm.parsing.tool_formats import TOOL_FORMATS

TOOLS: dict[str, Any] = {
    "weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]}},
    },
    "now": {"type": "object", "properties": {}},
}
ARGUMENTS = '{"city": "Zürich \\"</tool_call>\\" {[", "days": 3}'
_DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
_V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
_V31 = "<｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜>"
_HERMES = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
_KIMI = "<|tool_calls_section_begin|>{}<|tool_calls_section_end|>"
_K2 = "<|tool_call_begin|>{}<|tool_call_argument_begin|>{}<|tool_call_end|>"
_PYTHON = "[weather(city='Zürich \"</tool_call>\" {[', days=3), now()]"

# format, text with the calls weather(ARGUMENTS) and now({})
TWO_CALLS = [
    ("hermes", f"{_HERMES.format('weather', ARGUMENTS)}\n{_HERMES.format('now', '{}')}"),
    (
        "llama3_json",
        f'{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"type": "function", "name": "now", "parameters": {{}}}}',
    ),
    ("llama3_json", f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}};{{"name": "now"}}'),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]',
    ),
    ("mistral", f'[TOOL_CALLS][{{"arguments": {ARGUMENTS}, "name": "weather", "id": "abc"}}, {{"name": "now"}}]'),
    ("mistral", f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}"),
    ("mistral", f"[TOOL_CALLS]weather{ARGUMENTS}[TOOL_CALLS]now{{}}"),
    ("deepseek_v3", _DEEPSEEK.format(_V3.format("weather", ARGUMENTS) + "\n" + _V3.format("now", "{}"))),
    ("deepseek_v31", _DEEPSEEK.format(_V31.format("weather", ARGUMENTS) + _V31.format("now", "{}"))),
    (
        "granite",
        f'<|tool_call|>[{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]',
    ),
    (
        "kimi_k2",
        _KIMI.format(_K2.format("functions.weather:0", ARGUMENTS) + _K2.format("functions.now:1", "{}")),
    ),
    ("kimi_k2", _KIMI.format(_K2.format("weather", ARGUMENTS) + _K2.format("functions.now:12 ", " {}"))),
    ("llama4_pythonic", f"<|python_start|>{_PYTHON}<|python_end|>"),
    ("llama4_pythonic", _PYTHON),
    (
        "llama4_pythonic",
        f'<|python_start|>{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "now"}}<|python_end|>',
    ),
    ("llama4_pythonic", f'[{{"name": "weather", "parameters": {ARGUMENTS}}}, {{"name": "now", "parameters": {{}}}}]'),
    ("pythonic", '[ weather( city = "Zürich \\"</tool_call>\\" {[" ,days=3, ),\nnow( ) , ]'),
]


def events_of(parser: OutputParser, pieces: list[str]) -> list[Event]:
    found = [event for piece in pieces for event in parser.push(piece)]
    return joined([*found, *parser.finish()])


def parse(name: str, text: str, **options: Any) -> list[Event]:
    return events_of(OutputParser(TOOL_FORMATS[name], tools=TOOLS, **options), [text])


def calls_of(events: list[Event]) -> list[tuple[str, str]]:
    """Names and arguments, with everything else in place."""
    found: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCallBegin):
            assert (event.index, event.id) == (len(found), f"call_{len(found)}")
            found.append((event.name, ""))
        elif isinstance(event, ToolCallArguments):
            assert event.index == len(found) - 1
            found[-1] = (found[-1][0], found[-1][1] + event.text)
    assert [event.index for event in events if isinstance(event, ToolCallEnd)] == list(range(len(found)))
    return found


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


@pytest.mark.parametrize(("name", "text"), TWO_CALLS)
def test_calls_are_read_in_the_notation_of_each_family(name: str, text: str) -> None:
    events = parse(name, text)

    assert calls_of(events) == [("weather", ARGUMENTS), ("now", "{}")]
    assert text_of(events) == ""


@pytest.mark.parametrize(
    ("name", "text"), [case for case in TWO_CALLS if not case[1].startswith(("{", "[ w", "[w", "[{"))]
)
def test_text_before_calls_is_kept_without_the_space_between(name: str, text: str) -> None:
    events = parse(name, f"I look it up.\n\n{text}\n")

    assert events[0] == Text("I look it up.")
    assert [name for name, _ in calls_of(events)] == ["weather", "now"]
    assert text_of(events) == "I look it up."


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "glm45",
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>3</arg_value>\n<arg_key>unit</arg_key><arg_value>C</arg_value></tool_call>"
            "<tool_call>now</tool_call>",
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\n12\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
            "<parameter=unit>\nC\n</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n"
            "</tool_call>",
        ),
    ],
)
def test_pairs_become_json_by_the_schemas_types(name: str, text: str) -> None:
    (_, arguments), (_, none) = calls_of(parse(name, text))

    assert json.loads(arguments) == {"city": "12", "days": 3, "unit": "C"}
    assert none == "{}"


def test_what_a_model_writes_is_read_and_never_run() -> None:
    attack = "__import__('os').system('touch /tmp/never')"
    text = f"<tool_call><function=weather><parameter=days>{attack}</parameter></function></tool_call>"

    assert calls_of(parse("qwen3_coder", text)) == [("weather", json.dumps({"days": attack}))]


def test_expressions_of_python_are_read_and_never_run() -> None:
    events = parse("pythonic", "[weather(city=__import__('os').system('touch /tmp/never'))]")

    assert calls_of(events) == [("weather", json.dumps({"city": "__import__('os'"}))]
    assert text_of(events) == ".system('touch /tmp/never'))]"


@pytest.mark.parametrize(
    ("text", "arguments", "rest"),
    [
        ("[weather(city='Zü", '{"city": "Zü', ""),
        ("[weather(city='Ulm', da", '{"city": "Ulm"', ""),
        ("[weather(city='Ulm' and more)]", '{"city": "Ulm"', "and more)]"),
        ("[weather(city='Ulm'), 5] ok", '{"city": "Ulm"}', ", 5] ok"),
        (f"[weather(city={'[' * 200}", '{"city": ' + "[" * 100, "[" * 100),
    ],
)
def test_what_cannot_be_read_of_a_python_call_ends_it(text: str, arguments: str, rest: str) -> None:
    events = parse("pythonic", text)

    assert calls_of(events) == [("weather", arguments)]
    assert text_of(events) == rest


def test_arguments_of_a_python_call_are_told_while_they_are_written() -> None:
    parser = OutputParser(TOOL_FORMATS["llama4_pythonic"], tools=TOOLS)

    assert parser.push("<|python_start|>[weather(city") == []
    assert parser.push("='Zü") == [ToolCallBegin(0, "call_0", "weather"), ToolCallArguments(0, '{"city": "Zü')]
    assert parser.push("rich") == [ToolCallArguments(0, "rich")]
    assert parser.push('"\\') == [ToolCallArguments(0, '\\"')]
    assert parser.push("n', days=3)") == [ToolCallArguments(0, '\\n", "days": 3}'), ToolCallEnd(0)]
    assert parser.finish() == []


# ----------------------------------------------------------------------------------------------------------- channels

_ANALYSIS = "<|channel|>analysis<|message|>hm, hm<|end|><|start|>assistant"
_FINAL = "<|channel|>final<|message|>So: yes"
_CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"


def parse_channels(text: str, tools: Any = TOOLS, reasons: bool = True) -> list[Event]:
    reasoning = REASONING_FORMATS["openai_gptoss"] if reasons else None
    return events_of(OutputParser(TOOL_FORMATS["openai"], reasoning, tools=tools), [text])


@pytest.mark.parametrize("end", ["", "<|return|>", "<|end|>", "<|end|>\n"])
def test_channels_tell_reasoning_from_the_answer(end: str) -> None:
    expected = [Reasoning("hm, hm"), Text("So: yes")]
    for tools in (TOOLS, None):
        assert parse_channels(_ANALYSIS + _FINAL + end, tools) == expected
        assert parse_channels(_FINAL + end, tools) == expected[1:]
        assert parse_channels(f"So: yes{end}", tools) == expected[1:]
    assert parse_channels(_ANALYSIS + _FINAL + end, reasons=False) == [Text("hm, hm\n\nSo: yes")]


@pytest.mark.parametrize(
    "head",
    [
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.weather<|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.weather json<|message|>",
        "<|channel|>commentary to=functions.weather<|message|>",
        " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>",
    ],
)
@pytest.mark.parametrize("end", ["", "<|call|>"])
def test_messages_to_functions_are_calls(head: str, end: str) -> None:
    assert calls_of(parse_channels(head + ARGUMENTS + end)) == [("weather", ARGUMENTS)]

    events = parse_channels(f"{_ANALYSIS}{head}{ARGUMENTS}<|call|><|start|>assistant{_CALL}{{}}{end}")
    assert events[0] == Reasoning("hm, hm")
    assert calls_of(events) == [("weather", ARGUMENTS), ("weather", "{}")]


def test_words_before_a_call_are_text_and_messages_of_a_kind_are_joined_by_an_empty_line() -> None:
    preamble = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
    events = parse_channels(f"{_ANALYSIS}{preamble}{_ANALYSIS}{_CALL}{{}}<|call|><|start|>assistant{_FINAL}<|return|>")

    assert events[:3] == [Reasoning("hm, hm"), Text("I look it up."), Reasoning("\n\nhm, hm")]
    assert events[3:] == [
        ToolCallBegin(0, "call_0", "weather"),
        ToolCallArguments(0, "{}"),
        ToolCallEnd(0),
        Text("\n\nSo: yes"),
    ]


def test_without_tools_there_are_no_calls() -> None:
    assert parse_channels(f"{_CALL}{ARGUMENTS}<|call|>", tools=None) == [Text(ARGUMENTS)]


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("<|channel|>", []),
        ("<|channel|>analy", []),
        ("<|channel|>commentary to=functions.wea", []),
        (_CALL[:-11], []),
        (_ANALYSIS, [Reasoning("hm, hm")]),
        ("<|channel|>final Hello, you", [Text("<|channel|>final Hello, you")]),
        ("<|channel|>" + "x" * 600 + "<|message|>y", [Text("<|channel|>" + "x" * 600 + "\n\ny")]),
        ("to=day, then", [Text("to=day, then")]),
    ],
)
def test_a_head_that_is_cut_means_nothing_and_what_is_none_is_text(text: str, events: list[Event]) -> None:
    assert parse_channels(text) == events


def test_the_answer_in_a_channel_is_told_while_it_is_written() -> None:
    parser = OutputParser(TOOL_FORMATS["openai"], REASONING_FORMATS["openai_gptoss"], tools=TOOLS)

    assert parser.push("<|channel|>analysis") == []
    assert parser.push("<|message|>hm") == [Reasoning("hm")]
    assert parser.in_reasoning
    assert parser.push(", hm") == [Reasoning(", hm")]
    assert parser.push("<|end|><|start|>assistant") == []
    assert parser.push(_CALL) == [ToolCallBegin(0, "call_0", "weather")]
    assert parser.push('{"ci') == [ToolCallArguments(0, '{"ci')]
    assert parser.push('ty": 1}') == [ToolCallArguments(0, 'ty": 1}'), ToolCallEnd(0)]
    assert parser.push("<|call|>") == []
    assert parser.finish() == []


# ------------------------------------------------------------------------------------------------------- other names


def test_glm4_calls_begin_with_the_name_of_a_known_tool() -> None:
    assert calls_of(parse("glm4", f"\nweather\n{ARGUMENTS}")) == [("weather", ARGUMENTS)]
    assert parse("glm4", "weather is fine\n{}") == [Text("weather is fine\n{}")]
    assert parse("glm4", 'other\n{"a": 1}') == [Text('other\n{"a": 1}')]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", '{"title": "an answer in JSON", "name": "weather"}'),
        ("llama3_json", '{"name": "Alice", "parameters": {}}'),
        ("llama3_json", "[1, 2, 3]"),
        ("llama3_json", "<|python_tag|>print('hi')"),
        ("hermes", "<tool_call>\nno JSON at all\n</tool_call>"),
        ("hermes", '<tool_call>{"nome": "weather"}</tool_call>'),
        ("hermes", "a < b and <tool_cal"),
        ("hermes", "<tool_call>"),
        ("hermes", "so \n<tool_call>\n5"),
        ("mistral", "[TOOL_CALLS]" + "x" * 300 + "[ARGS]{}"),
        ("glm45", "<tool_call>two words\n</tool_call>"),
        ("pythonic", "[1, 2, 3]"),
        ("pythonic", "[weather]"),
        ("pythonic", "[weather(see below)]"),
        ("pythonic", "[weather('Ulm')]"),
        ("pythonic", "[other(city='Ulm')]"),
        ("pythonic", "weather(city='Ulm')"),
        ("pythonic", "[weather(ci"),
        ("pythonic", '[{"city": "Ulm"}]'),
    ],
)
def test_what_is_no_call_stays_text(name: str, text: str) -> None:
    assert parse(name, text) == [Text(text)]


def test_arguments_in_a_string_are_unpacked_and_none_is_an_empty_object() -> None:
    written = json.dumps(ARGUMENTS)
    assert calls_of(parse("hermes", _HERMES.format("weather", written))) == [("weather", ARGUMENTS)]
    assert calls_of(parse("hermes", _HERMES.format("now", "null"))) == [("now", "{}")]


def test_a_call_that_is_cut_keeps_what_was_written_of_it() -> None:
    assert calls_of(parse("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Zü')) == [
        ("weather", '{"city": "Zü')
    ]
    assert calls_of(parse("llama3_json", '{"name": "weather", "param')) == [("weather", "")]
    assert calls_of(parse("glm45", "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Zü")) == [
        ("weather", '{"city": "Zü')
    ]


@pytest.mark.parametrize("cut", ["\n</tool_c", "</tool_call>\n<tool_"])
def test_a_mark_after_a_call_that_the_end_cuts_is_no_text(cut: str) -> None:
    whole = _HERMES.format("weather", ARGUMENTS)

    events = parse("hermes", whole.removesuffix("\n</tool_call>") + cut)

    assert calls_of(events) == [("weather", ARGUMENTS)]
    assert text_of(events) == ""


def test_text_after_a_call_that_is_no_mark_stays() -> None:
    assert text_of(parse("hermes", f"{_HERMES.format('now', '{}')} is 1 <")) == "is 1 <"


def test_malformed_arguments_end_where_the_call_ends() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": 1</tool_call> and more'

    events = parse("hermes", text)

    assert calls_of(events) == [("weather", '{"city": 1')]
    assert text_of(events) == "and more"


def test_a_call_is_told_while_it_is_written() -> None:
    parser = OutputParser(TOOL_FORMATS["hermes"], tools=TOOLS)

    assert parser.push("Yes") == [Text("Yes")]
    assert parser.push(" \n<tool") == []
    assert parser.push('_call>{"name": "weather"') == [ToolCallBegin(0, "call_0", "weather")]
    assert parser.push(', "arguments": {"ci') == [ToolCallArguments(0, '{"ci')]
    assert parser.push("ty") == [ToolCallArguments(0, "ty")]
    assert parser.push('": 1}}') == [ToolCallArguments(0, '": 1}'), ToolCallEnd(0)]
    assert parser.finish() == []


# ---------------------------------------------------------------------------------------------------------- reasoning


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("qwen3", "<think>", "</think>"),
        ("mistral", "[THINK]", "[/THINK]"),
        ("granite", "Here is my thought process:", "Here is my response:"),
    ],
)
def test_reasoning_is_split_off(name: str, begin: str, end: str) -> None:
    def parsed(text: str, opened: bool = False) -> list[Event]:
        return events_of(OutputParser(None, REASONING_FORMATS[name], opened=opened), [text])

    expected = [Reasoning("hm, hm"), Text("So: yes")]
    assert parsed(f"\n{begin}\nhm, hm\n{end}\n\nSo: yes") == expected
    assert parsed(f"hm, hm\n{end}\n\nSo: yes", opened=True) == expected
    assert parsed(f"{begin}hm, h") == [Reasoning("hm, h")]
    assert parsed("  So: yes") == [Text("  So: yes")]
    assert parsed(f"So: {begin} yes") == [Text(f"So: {begin} yes")]
    assert parsed(f"{begin}\n\n{end}\n\nSo: yes") == [Text("So: yes")]


def test_calls_after_reasoning_count_and_calls_in_it_do_not() -> None:
    call = _HERMES.format("now", "{}")
    parser = OutputParser(TOOL_FORMATS["hermes"], REASONING_FORMATS["qwen3"], tools=TOOLS)

    events = events_of(parser, [f"<think>Should I {call}?</think>\n{call}"])

    assert events[0] == Reasoning(f"Should I {call}?")
    assert calls_of(events) == [("now", "{}")]


def test_a_prompt_may_have_opened_the_reasoning() -> None:
    form = REASONING_FORMATS["qwen3"]

    assert form.opened_by("<|im_start|>assistant\n<think>\n")
    assert not form.opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")


# ----------------------------------------------------------------------------------------------------- any splitting

_PIECES = [
    *(text for _, text in TWO_CALLS),
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>a\nb</arg_value>\n</tool_call>",
    "<think>", "</think>", "<tool_call>", "</tool_call>", '{"name": "weather", ', '"arguments": {"a": "\\', '"}}',
    "[TOOL_CALLS]", "[ARGS]", "weather\n", "<arg_key>", "<function=now>", "\n ", "🎉", "{", "}", "[", "]",
    '"', "\\", ";", "Hello <", "`", "```json\n", "<|python_start|>", "[weather(", "city='a\\",
    "n', days=", "3)", "now()]", "<|tool_call_begin|>", "functions.now:1", "<|tool_call_argument_begin|>",
    "(", ")", "=", ", ", "'", "x41", "u00", "<|channel|>analysis<|message|>", "<|channel|>commentary to=functions.now",
    "<|message|>", "<|end|>", "<|start|>assistant", "<|channel|>final", " to=", "<|call|>", "x" * 500,
]  # fmt: skip
_FORMATS = [None, *TOOL_FORMATS]


@settings(max_examples=200)
@given(data=st.data())
def test_events_do_not_depend_on_how_the_text_was_cut(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(_FORMATS))
    text = "".join(data.draw(st.lists(st.sampled_from(_PIECES), min_size=1, max_size=5)))
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    reasoning = REASONING_FORMATS["qwen3"] if data.draw(st.booleans()) else None
    opened = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))

    def parser() -> OutputParser:
        return OutputParser(name and TOOL_FORMATS[name], reasoning, tools=TOOLS, opened=opened)

    expected = events_of(parser(), [text])
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert events_of(parser(), pieces) == expected
    assert events_of(parser(), list(text)) == expected
    calls_of(expected)
    noise = TOOL_FORMATS[name].noise if name else ()
    has_calls = any(isinstance(event, ToolCallBegin) for event in expected)
    if name != "openai" and reasoning is None and not has_calls and not any(mark in text for mark in noise):
        assert expected == ([Text(text)] if text else [])


def test_a_long_answer_costs_little() -> None:
    parser = OutputParser(TOOL_FORMATS["hermes"], REASONING_FORMATS["qwen3"], tools=TOOLS)
    started_s = time.process_time()

    for _ in range(5000):
        parser.push(" word")
    parser.push("<tool_call>" + '{"name": "weather", "arguments": {"city": "')
    for _ in range(5000):
        parser.push(' word\\"')

    assert (time.process_time() - started_s) / 10_000 < 30e-6
