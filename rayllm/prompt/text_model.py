"""The text side of a model: its tokenizer, its chat format, and how long a prompt may be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from rayllm.config import ResolvedConfig
from rayllm.errors import ContextLengthError
from rayllm.parsing.chat_format import ChatFormat
from rayllm.text.tokenizer import Tokenizer

_MIN_TOKEN_CHARACTERS = 16


@dataclass(frozen=True)
class TextModel:
    """What prompts need of a model."""

    config: ResolvedConfig
    tokenizer: Tokenizer

    @cached_property
    def chat_format(self) -> ChatFormat:
        return ChatFormat.of(self.tokenizer, self.config.engine)

    def tokenize(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a plain prompt. A text that no tokenizing could make fit is refused before it is tokenized."""
        self.check_length(len(text), param)
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def tokenize_chat(self, marked_text: str, *, add_special_tokens: bool = False) -> list[int]:
        """As `tokenize`, of a chat's text as the template wrote it, with marks (`Tokenizer.mark`)."""
        self.check_length(len(marked_text), "messages")
        return self.tokenizer.encode_marked(marked_text, add_special_tokens=add_special_tokens)

    def check_length(self, num_characters: int, param: str) -> None:
        """Refuses a prompt of so many characters that no tokenizing could make it fit."""
        limit = self.config.max_model_len * max(self.tokenizer.longest_token, _MIN_TOKEN_CHARACTERS)
        if num_characters > limit:
            raise ContextLengthError(
                f"This model's maximum context length is {self.config.max_model_len} tokens. The prompt has "
                f"{num_characters} characters, and no {limit} fit: shorten it",
                param=param,
            )
