"""What Anthropic's messages and OpenAI's responses share: one choice, sent as blocks or items."""

from __future__ import annotations

from collections.abc import Sequence

from rayllm.api.answer import Answer
from rayllm.api.choice import Choice
from rayllm.api.openai.chat import PreparedChat
from rayllm.api.service import ServedModel
from rayllm.parsing.events import Event


class EventAnswer(Answer):
    """An answer of one choice, whose text is read as events."""

    def __init__(self, model: ServedModel, chat: PreparedChat):
        super().__init__(model, [chat.request], chat.request.request_id, chat)

    def _events_of(self, choice: Choice, text: str) -> Sequence[Event]:
        """What new text of the choice, or its end, means."""
        return choice.take_events(text)
