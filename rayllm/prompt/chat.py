"""Messages to a prompt: the template, tools, and what the answer's text must follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rayllm.config import EngineConfig
from rayllm.errors import RequestError
from rayllm.parsing.chat_format import ChatFormat
from rayllm.parsing.tool_grammar import Thinking
from rayllm.parsing.tools import ToolPlan, read_tools
from rayllm.prompt.fields import ChatFields
from rayllm.prompt.messages import read_messages
from rayllm.prompt.text_model import TextModel
from rayllm.request import StructuredOutputsParams
from rayllm.structured.grammar import rule_of
from rayllm.text.tokenizer import Tokenizer

MAX_TEMPLATE_CHARACTERS = 2**16
_RESERVED_VARIABLES = frozenset({"self", "messages", "tools", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True)
class ChatPrompt:
    """A chat as the model reads it, and how its answer is read."""

    marked_text: str
    """As the template wrote it; what the client wrote is marked (`Tokenizer.mark`)."""
    form: ChatFormat
    plan: ToolPlan | None
    thinking: Thinking

    @property
    def text(self) -> str:
        return self.form.tokenizer.without_marks(self.marked_text)

    def token_ids(self, model: TextModel, *, add_special_tokens: bool = False) -> list[int]:
        return model.tokenize_chat(self.marked_text, add_special_tokens=add_special_tokens)

    def tool_grammar(self, wanted: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """What the answer's text must be so that calls are made where they must, and follow their schemas; None where
        tools bind nothing. `wanted` binds an answer that calls nothing."""
        plan, form = self.plan, self.form
        if plan is None:
            return None
        arguments = plan, form.tool_format, form.reasoning_format, self.thinking
        if plan.forced:
            return StructuredOutputsParams(grammar=form.writer.forced(*arguments))
        rule = None if wanted is None else rule_of(wanted)
        if rule is not None:
            either = form.writer.either(plan, form.tool_format, rule, form.reasoning_format, self.thinking)
            return StructuredOutputsParams(grammar=either)
        if wanted is not None:
            return None
        grammar = form.writer.free(*arguments) if any(tool.strict for tool in plan.allowed) else None
        return None if grammar is None else StructuredOutputsParams(grammar=grammar)

    def structured_outputs(self, wanted: StructuredOutputsParams | None) -> StructuredOutputsParams | None:
        """What the whole answer follows, where `wanted` is what the client asks of its text: from the tools, or from
        the end of the reasoning on. A grammar of the client's own binds everything by itself."""
        if (bound := self.tool_grammar(wanted)) is not None:
            return bound
        form = self.form
        if wanted is None or form.reasoning_format is None or self.thinking is Thinking.NONE:
            return wanted
        rule = rule_of(wanted)
        if rule is None:
            return wanted
        return StructuredOutputsParams(grammar=form.writer.after_reasoning(rule, form.reasoning_format, self.thinking))


def chat_prompt(fields: ChatFields, model: TextModel) -> ChatPrompt:
    """Raises `RequestError`, which names the field."""
    form = _chat_format(fields, model)
    plan = read_tools(fields.tools, fields.tool_choice, fields.parallel_tool_calls)
    if plan is not None and not plan.forced and not model.config.engine.enable_auto_tool_choice:
        raise RequestError(
            "tool_choice auto is off at this server (--no-enable-auto-tool-choice): ask for required or one tool",
            param="tool_choice",
        )
    contents = (message.get("content") for message in fields.messages)
    model.check_length(sum(len(content) for content in contents if isinstance(content, str)), "messages")
    text = _rendered(fields, form, plan)
    return ChatPrompt(text, form, plan, form.thinking_after(text))


def render(fields: ChatFields, model: TextModel) -> str:
    """The prompt's text alone, marked, whatever the server allows of tools."""
    return _rendered(fields, _chat_format(fields, model), read_tools(fields.tools, fields.tool_choice, None))


def _chat_format(fields: ChatFields, model: TextModel) -> ChatFormat:
    """The model's, or that of the request's own template where the operator lets it bring one."""
    if fields.chat_template is None:
        other = model.tokenizer.tool_template if fields.tools else None
        return model.chat_format if other is None else _format_of(model.tokenizer, model.config.engine, other)
    if not model.config.engine.trust_request_chat_template:
        raise RequestError(
            "chat_template from a request is off; the server's operator sets it with --chat-template, or lets requests "
            "bring their own with --trust-request-chat-template",
            param="chat_template",
            code="unsupported_parameter",
        )
    if len(fields.chat_template) > MAX_TEMPLATE_CHARACTERS:
        raise RequestError(
            f"chat_template has {len(fields.chat_template)} characters, at most {MAX_TEMPLATE_CHARACTERS} are allowed",
            param="chat_template",
        )
    return _format_of(model.tokenizer, model.config.engine, fields.chat_template)


@lru_cache(maxsize=16)
def _format_of(tokenizer: Tokenizer, config: EngineConfig, template: str) -> ChatFormat:
    return ChatFormat.of(tokenizer.with_template(template), config)


def _rendered(fields: ChatFields, form: ChatFormat, plan: ToolPlan | None) -> str:
    continues = bool(fields.continue_final_message)
    if continues and fields.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    variables: Mapping[str, Any] = fields.chat_template_kwargs or {}
    if taken := _RESERVED_VARIABLES.intersection(variables):
        raise RequestError(
            f"chat_template_kwargs: {min(taken)!r} is set by the request's own fields", param="chat_template_kwargs"
        )
    shown, tools = form.template_messages(read_messages(fields.messages), plan.tools if plan else ())
    if fields.documents is not None:
        variables = {"documents": fields.documents, **variables}
    variables = {**form.thinking_variables(fields.reasoning_effort, fields.verbosity), **variables}
    return form.tokenizer.render_chat(
        shown,
        add_generation_prompt=fields.add_generation_prompt is not False,
        continue_final_message=continues,
        tools=tools,
        **variables,
    )


def num_characters(messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> int:
    """About how long the prompt is; parts and tools are counted generously. Nothing is checked yet: a content may be
    of any type."""
    contents = [message.get("content") for message in messages]
    num_text = sum(len(content) if isinstance(content, str) else len(str(content)) for content in contents)
    num_calls = sum(len(str(message["tool_calls"])) for message in messages if "tool_calls" in message)
    return num_text + num_calls + 64 * len(messages) + sum(len(str(tool)) for tool in tools or ())
