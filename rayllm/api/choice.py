"""One choice of an answer while it grows: its tokens, its text, and what is parsed from that."""

from __future__ import annotations

from typing import Protocol

from rayllm.api.errors import error_of
from rayllm.messages import TokenDelta, TokenLogprobs
from rayllm.parsing.events import Event, Reasoning, Text, joined
from rayllm.parsing.output_parser import OutputParser
from rayllm.request import Request, unpack_ids
from rayllm.text.detokenizer import ChoiceText
from rayllm.text.tokenizer import Tokenizer


class Choice:
    """One answer as far as it has come."""

    __slots__ = (
        "_events",
        "finish_reason",
        "first_token_s",
        "index",
        "last_token_s",
        "logprobs",
        "num_reasoning_tokens",
        "num_sent",
        "parser",
        "prefill_s",
        "prompt_index",
        "queued_s",
        "reasoning_end",
        "shows_reasoning",
        "stop_reason",
        "text",
        "token_ids",
    )

    def __init__(self, index: int, prompt_index: int, text: ChoiceText, parser: OutputParser | None = None):
        self.index = index
        self.prompt_index = prompt_index
        self.text = text
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.num_sent = 0
        """Tokens that chunks have spoken of."""
        self.first_token_s: float | None = None
        self.last_token_s = 0.0
        self.prefill_s = 0.0
        self.queued_s = 0.0
        self.parser = parser
        """None where the text is only text."""
        self.shows_reasoning = True
        self.num_reasoning_tokens = 0
        self.reasoning_end = 0
        """Tokens from the first on up to the last of the reasoning, with all that marks it."""
        self._events: list[Event] = []

    def take(self, delta: TokenDelta) -> str:
        """Adds a delta and returns the new text. Raises what the engine says went wrong."""
        finish = delta.finish
        if finish is not None and finish.reason == "error":
            raise error_of(finish)
        token_ids = unpack_ids(delta.token_ids)
        text = self.text.push(token_ids, stop_token=finish is not None and finish.has_stop_token)
        num_new = self.text.num_tokens_used - len(self.token_ids)
        self.token_ids += token_ids[:num_new]
        if delta.logprobs:
            self.logprobs += delta.logprobs[:num_new]
        if finish is not None and self.text.stop_reason is None:
            text += self.text.finish()
            self.finish_reason, self.stop_reason = finish.reason, finish.stop_reason
        if self.text.stop_reason is not None:
            self.finish_reason, self.stop_reason = "stop", self.text.stop_reason
        if self.parser is not None:
            self._parse(self.parser, text, num_new)
        return text

    def take_events(self, text: str) -> list[Event]:
        """What came since the last call, as events. `text` is that in plain: all there is where nothing is parsed."""
        if self.parser is None:
            return [Text(text)] if text else []
        events, self._events = self._events, []
        if not self.shows_reasoning:
            events = [event for event in events if not isinstance(event, Reasoning)]
        return joined(events) if len(events) > 1 else events

    def _parse(self, parser: OutputParser, text: str, num_tokens: int) -> None:
        if parser.in_reasoning:
            self.num_reasoning_tokens += num_tokens
            self.reasoning_end = len(self.token_ids)
        if text:
            self._events += parser.push(text)
        if parser.is_done and self.finish_reason is None:
            self.finish_reason = "stop"
        if self.finish_reason is not None:
            self._events += parser.finish()


class Parsing(Protocol):
    """How the choices of a chat are parsed."""

    @property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that the parsers want to see."""

    @property
    def shows_reasoning(self) -> bool:
        """Whether the client wants to see what the model thought."""

    def parser(self, choice: int) -> OutputParser | None: ...


def new_choice(
    index: int, prompt_index: int, tokenizer: Tokenizer, request: Request, parsing: Parsing | None
) -> Choice:
    parser = parsing.parser(index) if parsing is not None else None
    shown_ids = parsing.shown_ids if parsing is not None and parser is not None else frozenset[int]()
    text = ChoiceText(tokenizer, request.params, request.prompt_token_ids, shown_ids)
    choice = Choice(index, prompt_index, text, parser)
    choice.shows_reasoning = parsing is None or parsing.shows_reasoning
    return choice
