"""A model's chat template: Jinja in a sandbox, under a time limit and an output limit."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rayllm.config import ContentFormat
from rayllm.errors import RequestError
from rayllm.text.chat_content import ContentForms

RENDER_TIME_LIMIT_S = 2.0
MAX_RENDERED_CHARACTERS = 32 * 2**20
MAX_TEMPLATE_KWARGS = 64
_TICK = "_rayllm_tick"
_RESERVED = frozenset({"messages", "raise_exception", "strftime_now", "bos_token", "eos_token", "chat_template", _TICK})


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's tokens for training; for serving its body is all that
    matters."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Deadline:
    """Raises when a rendering takes too long; called on each turn of a loop and each call of a template."""

    def __init__(self, limit_s: float):
        self._end_s = time.monotonic() + limit_s

    def __call__(self) -> str:
        if time.monotonic() > self._end_s:
            raise jinja2.TemplateError(f"rendering took longer than {RENDER_TIME_LIMIT_S:g} s")
        return ""


class ChatTemplate:
    """A compiled template. One that does not compile is kept: it refuses chats, and completions still
    work."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        self._template: jinja2.Template | None = None
        self.fault: str | None = None
        self.variables: frozenset[str] = frozenset()
        """Names that the template asks for."""
        self._forms: dict[ContentFormat, ContentForms] = {}
        try:
            self._template, self.variables = _compile(source)
        except (jinja2.TemplateError, RecursionError) as error:
            self.fault = f"the model's chat template is broken: {str(error) or type(error).__name__}"

    def content_forms(self, wanted: ContentFormat = "auto") -> ContentForms:
        """The forms in which it takes contents; `auto` finds them by trying."""
        found = self._forms.get(wanted)
        if found is None:
            found = self._forms[wanted] = ContentForms.of(self.render, wanted)
        return found

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text. Raises `RequestError` (param `messages`) for what the template refuses or cannot
        do."""
        if self._template is None:
            raise RequestError(str(self.fault), param="messages", code="chat_template_error")
        reserved = _RESERVED.intersection(variables)
        if reserved or len(variables) > MAX_TEMPLATE_KWARGS:
            what = f"{min(reserved)!r} is set by the server" if reserved else f"{len(variables)} are too many"
            raise RequestError(
                f"chat_template_kwargs: {what}; give at most {MAX_TEMPLATE_KWARGS} of the template's own",
                param="chat_template_kwargs",
            )
        deadline = _Deadline(RENDER_TIME_LIMIT_S)
        context = {
            "tools": None,
            "documents": None,
            **self._special_tokens,
            **variables,
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
            _TICK: deadline,
        }
        try:
            return _render_bounded(self._template, context, deadline)
        except jinja2.TemplateError as error:
            raise _refusal(str(error)) from None
        except Exception as error:  # a template is a program: what it trips over is the request's fault, or its own
            raise _refusal(f"{type(error).__name__}: {error}") from None


def _refusal(reason: str) -> RequestError:
    return RequestError(
        f"the model's chat template cannot render these messages: {reason}",
        param="messages",
        code="chat_template_error",
    )


def _render_bounded(template: jinja2.Template, context: dict[str, Any], deadline: _Deadline) -> str:
    parts, num_characters = [], 0
    for part in template.generate(context):
        deadline()
        num_characters += len(part)
        if num_characters > MAX_RENDERED_CHARACTERS:
            raise jinja2.TemplateError(f"the text is longer than {MAX_RENDERED_CHARACTERS} characters")
        parts.append(part)
    return "".join(parts)


def _compile(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    tree = environment.parse(source)
    variables = frozenset(meta.find_undeclared_variables(tree))
    for block in tree.find_all((nodes.For, nodes.Macro)):
        assert isinstance(block, (nodes.For, nodes.Macro))
        tick = nodes.ExprStmt(nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None), lineno=block.lineno)
        block.body.insert(0, tick)
    template = environment.from_string(tree)
    template.globals = dict(template.globals)  # Jinja's chain of dicts is slow to read
    return template, variables


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
