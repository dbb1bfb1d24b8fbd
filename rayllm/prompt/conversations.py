"""From conversations to prompts for Python programs, on the very path of a server's `/v1/chat/completions`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rayllm.config import ContentFormat, ResolvedConfig
from rayllm.errors import RequestError
from rayllm.prompt.chat import ChatPrompt, chat_prompt
from rayllm.prompt.fields import chat_fields
from rayllm.prompt.prompts import Conversation, PreparedPrompt
from rayllm.prompt.text_model import TextModel
from rayllm.request import SamplingParams
from rayllm.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class PreparedChat:
    prompt: PreparedPrompt
    chat: ChatPrompt

    def params(self, given: SamplingParams) -> SamplingParams:
        """The parameters with what the answer must follow: the tools' grammar, or what was given, after reasoning."""
        structured = self.chat.structured_outputs(given.structured_outputs)
        return given if structured is given.structured_outputs else given.with_(structured_outputs=structured)


class ChatPrompts:
    """Prompts of one model's chats. A program is trusted with templates of its own."""

    def __init__(self, config: ResolvedConfig, tokenizer: Tokenizer):
        engine = config.engine.model_copy(update={"trust_request_chat_template": True})
        self._config = config.model_copy(update={"engine": engine})
        self._models = {tokenizer.content_format: TextModel(self._config, tokenizer)}
        self._tokenizer = tokenizer

    def prepare(
        self,
        conversation: Conversation,
        *,
        chat_template: str | None = None,
        chat_template_content_format: ContentFormat | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool | None = None,
        reasoning_effort: str | None = None,
        verbosity: str | None = None,
    ) -> PreparedChat:
        """The prompt of a conversation. Options have the meaning of the fields of `/v1/chat/completions`;
        `chat_template` is a template's text, or a file of it. Raises `RequestError` as the server answers 400."""
        model = self._model(chat_template_content_format)
        fields = chat_fields(
            messages=_plain(conversation),
            chat_template=_template_text(chat_template),
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=None if tools is None else _plain(tools),
            tool_choice=dict(tool_choice) if isinstance(tool_choice, Mapping) else tool_choice,
            parallel_tool_calls=parallel_tool_calls,
            chat_template_kwargs=None if chat_template_kwargs is None else dict(chat_template_kwargs),
            documents=None if documents is None else _plain(documents),
            reasoning_effort=reasoning_effort,
            verbosity=verbosity,
        )
        chat = chat_prompt(fields, model)
        return PreparedChat(PreparedPrompt(chat.text, chat.token_ids(model)), chat)

    def _model(self, content_format: ContentFormat | None) -> TextModel:
        """The model's text side, with its template taking contents in this form."""
        if content_format is None:
            content_format = self._tokenizer.content_format
        if content_format not in get_args(ContentFormat):
            known = ", ".join(get_args(ContentFormat))
            raise RequestError(
                f"chat_template_content_format={content_format!r} is not one of {known}", param="messages"
            )
        if content_format not in self._models:
            tokenizer = copy.copy(self._tokenizer)
            tokenizer.content_format = content_format
            self._models[content_format] = TextModel(self._config, tokenizer)
        return self._models[content_format]


def _plain(entries: Sequence[Mapping[str, Any]]) -> list[Any]:
    """A list of dicts where it is made of mappings; what is none is left for the check of the body."""
    if isinstance(entries, (str, bytes)) or not isinstance(entries, Sequence):
        raise RequestError(f"messages must be a list of messages, got {type(entries).__name__}", param="messages")
    return [dict(entry) if isinstance(entry, Mapping) else entry for entry in entries]


def _template_text(given: str | None) -> str | None:
    """The template's text, read from its file where it is none."""
    if given is None or "{{" in given or "{%" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = f"chat_template {given[:200]!r} is neither a template nor a file that can be read: {error}"
        raise RequestError(reason, param="chat_template") from None
