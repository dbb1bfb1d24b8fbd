"""How models write tool calls, as data: markers, and what stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto


class Payload(Enum):
    """What stands between `begin` and `end` of a call."""

    OBJECT = auto()
    """JSON objects `{"name": ..., "arguments": ...}`, one or several, or a list of them."""
    NAMED = auto()
    """The name, `name_end`, the arguments as a JSON object; or, at a `[` or `{`, as with OBJECT."""
    PAIRS = auto()
    """The name, `name_end`, then for each argument its key and its value between markers of their own."""
    PYTHON = auto()
    """A list of calls as Python has them, `[name(key=value, ...), ...]`; or, at a `{`, as with OBJECT."""
    CHANNELS = auto()
    """All of an answer stands in messages, each with a channel in its head and perhaps whom it is to (OpenAI's
    harmony): calls are messages to `functions.NAME`, with the arguments as a JSON object."""


@dataclass(frozen=True)
class Written:
    """How calls are written where the answer is constrained, and where a template has no words for them. Always JSON,
    also for models that write pairs by themselves: only so can a schema be followed."""

    each: tuple[str, str, str]
    """Before the name, between name and arguments, after the arguments."""
    all: tuple[str, str] = ("", "")
    """Before the first call and after the last."""
    joint: str | None = ""
    """Between calls; None: there is only ever one."""
    number_mark: str = ""
    """After the name, before a number that counts the calls; empty where none does."""

    def text(self, calls: Sequence[tuple[str, str]], joint: str = "") -> str:
        """Calls (names and arguments); `joint` stands between where there is only ever one."""
        before, between, after = self.each
        numbers = [f"{self.number_mark}{i}" if self.number_mark else "" for i in range(len(calls))]
        texts = [f"{before}{name}{n}{between}{arguments}{after}" for n, (name, arguments) in zip(numbers, calls)]
        return self.all[0] + (joint if self.joint is None else self.joint).join(texts) + self.all[1]


_HERMES_WRITTEN = Written(('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>"), joint="\n")
_LISTED = ('{"name": "', '", "arguments": ', "}")
_LLAMA_OBJECT = ('{"name": "', '", "parameters": ', "}")
_PYTHON_WRITTEN = Written(_LLAMA_OBJECT, ("[", "]"), ", ")


@dataclass(frozen=True)
class ToolFormat:
    """The format of one family of models. Calls follow the text of an answer.

    One occurrence of `begin` begins one call (for OBJECT: one or several). Markers in `noise` stand round calls and
    mean nothing. `bare` calls may also begin the answer without `begin`; their names must be those of known tools.
    """

    name: str
    payload: Payload
    begin: str
    end: str = ""
    signs: tuple[str, ...] = ()
    """Texts that a chat template with this format holds, all of them."""
    noise: tuple[str, ...] = ()
    bare: bool = False
    name_begin: str = ""
    name_end: tuple[str, ...] = ()
    """Any of them ends the name; the first is the one that a constrained answer uses."""
    id_mark: str = ""
    """An id, which is not used, may stand between the name and the first `name_end`, after this mark."""
    key: tuple[str, str] = ("", "")
    value: tuple[str, str] = ("", "")
    written: Written = field(default_factory=lambda: _HERMES_WRITTEN)
    call_id_length: int | None = None
    """Characters of call ids, where the template insists."""
    shown_id: str = ""
    """Call ids as the template shows them to its model: `{name}` is the call's, `{number}` counts those of a chat."""

    @property
    def frames_text(self) -> bool:
        """Whether text that calls nothing stands in this format too."""
        return self.payload is Payload.CHANNELS

    @property
    def markers(self) -> tuple[str, ...]:
        """What may be special tokens of the model: to be shown to the parser."""
        found = (
            self.begin,
            self.end,
            *self.noise,
            self.name_begin,
            *self.name_end,
            self.id_mark,
            *self.key,
            *self.value,
        )
        return tuple(dict.fromkeys(marker for marker in found if marker.strip()))


_CALL = ("<tool_call>", "</tool_call>")
_DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_KIMI_NOISE = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_DEEPSEEK_NOISE = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

TOOL_FORMATS: dict[str, ToolFormat] = {
    found.name: found
    for found in (
        ToolFormat(
            "openai",
            Payload.CHANNELS,
            "<|channel|>",
            "<|call|>",
            signs=("<|channel|>",),
            noise=("<|start|>", "<|message|>", "<|constrain|>", "<|end|>", "<|return|>"),
            # The end of a call ends the answer, and is none of its grammar's tokens.
            written=Written(("<|channel|>commentary to=functions.", " <|constrain|>json<|message|>", ""), joint=None),
        ),
        ToolFormat(
            "deepseek_v3",
            Payload.NAMED,
            *_DEEPSEEK_CALL,
            signs=("<｜tool▁sep｜>", "```json"),
            noise=_DEEPSEEK_NOISE,
            name_begin="function<｜tool▁sep｜>",
            name_end=("\n```json\n",),
            written=Written(
                (
                    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
                    "\n```json\n",
                    "\n```<｜tool▁call▁end｜>",
                ),
                _DEEPSEEK_NOISE,
                "\n",
            ),
        ),
        ToolFormat(
            "deepseek_v31",
            Payload.NAMED,
            *_DEEPSEEK_CALL,
            signs=("<｜tool▁sep｜>",),
            noise=_DEEPSEEK_NOISE,
            name_end=("<｜tool▁sep｜>",),
            written=Written((_DEEPSEEK_CALL[0], "<｜tool▁sep｜>", _DEEPSEEK_CALL[1]), _DEEPSEEK_NOISE),
        ),
        ToolFormat(
            "glm45",
            Payload.PAIRS,
            *_CALL,
            signs=("<tool_call>", "<arg_key>"),
            name_end=("\n",),
            key=("<arg_key>", "</arg_key>"),
            value=("<arg_value>", "</arg_value>"),
        ),
        ToolFormat(
            "qwen3_coder",
            Payload.PAIRS,
            *_CALL,
            signs=("<tool_call>", "<function="),
            name_begin="<function=",
            name_end=(">",),
            noise=("</function>",),
            key=("<parameter=", ">"),
            value=("", "</parameter>"),
        ),
        ToolFormat(
            "mistral_v11",
            Payload.NAMED,
            "[TOOL_CALLS]",
            signs=("[TOOL_CALLS]", "[ARGS]"),
            name_end=("[ARGS]",),
            id_mark="[CALL_ID]",
            written=Written(("[TOOL_CALLS]", "[ARGS]", "")),
            call_id_length=9,
        ),
        ToolFormat(
            "mistral",
            Payload.NAMED,
            "[TOOL_CALLS]",
            signs=("[TOOL_CALLS]",),
            name_end=("[ARGS]",),
            id_mark="[CALL_ID]",
            written=Written(_LISTED, ("[TOOL_CALLS][", "]"), ", "),
            call_id_length=9,
        ),
        ToolFormat(
            "granite",
            Payload.OBJECT,
            "<|tool_call|>",
            signs=("<|tool_call|>",),
            written=Written(_LISTED, ("<|tool_call|>[", "]"), ", "),
        ),
        ToolFormat(
            "kimi_k2",
            Payload.NAMED,
            "<|tool_call_begin|>",
            "<|tool_call_end|>",
            signs=("<|tool_calls_section_begin|>",),
            noise=_KIMI_NOISE,
            name_begin="functions.",
            name_end=("<|tool_call_argument_begin|>",),
            id_mark=":",
            written=Written(
                ("<|tool_call_begin|>functions.", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
                _KIMI_NOISE,
                number_mark=":",
            ),
            shown_id="functions.{name}:{number}",
        ),
        ToolFormat(
            "llama4_pythonic",
            Payload.PYTHON,
            "<|python_start|>",
            "<|python_end|>",
            signs=("<|header_start|>",),
            bare=True,
            written=_PYTHON_WRITTEN,
        ),
        ToolFormat(
            "pythonic",
            Payload.PYTHON,
            "",
            signs=("func_name1(params_name1=params_value1",),
            bare=True,
            written=_PYTHON_WRITTEN,
        ),
        ToolFormat("hermes", Payload.OBJECT, *_CALL, signs=("<tool_call>",)),
        ToolFormat(
            "glm4",
            Payload.NAMED,
            "",
            signs=("<|observation|>",),
            bare=True,
            name_end=("\n",),
            written=Written(("", "\n", ""), joint=None),
        ),
        ToolFormat(
            "llama3_json",
            Payload.OBJECT,
            "<|python_tag|>",
            signs=("<|start_header_id|>",),
            bare=True,
            written=Written(_LLAMA_OBJECT, joint="; "),
        ),
    )
}
"""In the order in which a template is looked at."""

HERMES = TOOL_FORMATS["hermes"]


def detect_tool_format(template: str) -> ToolFormat:
    """The format that a chat template shows. Where it shows none, Hermes': the one that most models know."""
    for found in TOOL_FORMATS.values():
        if all(sign in template for sign in found.signs):
            return found
    return HERMES
