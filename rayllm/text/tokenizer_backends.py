"""What tokenizes: a `tokenizers` pipeline, a tokenizer written in Python, or nothing at all."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rayllm.errors import RequestError
from rayllm.vocabulary.family_tokenizer import FamilyTokenizer

_LONG_TEXT = 8192
"""Characters, or ids."""


class Backend(Protocol):
    """What differs between a `tokenizers` pipeline and a tokenizer written in Python."""

    special_ids: frozenset[int]
    added_text: Mapping[int, str]
    is_byte_level: bool

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...
    def encode_as_text(self, text: str) -> list[int]: ...
    def encode_parts(self, parts: Sequence[tuple[str, bool]], add_special_tokens: bool) -> list[int]:
        """A text in parts, in which special tokens count, or (True) are text that a user wrote."""
        ids: list[int] = []
        for text, is_written in parts:
            if text:
                ids += self.encode_as_text(text) if is_written else self.encode(text, add_special_tokens)
                add_special_tokens = False
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str: ...
    def piece(self, token_id: int) -> str | None: ...
    def vocab(self) -> dict[str, int]: ...


class Pipeline(Backend):
    """A tokenizer.json, or what `transformers` made of one."""

    def __init__(self, pipeline: Any):
        pipeline.no_truncation()
        pipeline.no_padding()
        self._pipeline = pipeline
        self._blind_pipeline: Any = None
        added = pipeline.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.added_text = {token_id: token.content for token_id, token in added.items()}
        decoder = pipeline.decoder
        self.is_byte_level = decoder is not None and '"ByteLevel"' in decoder.__getstate__().decode()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = _encoding(self._pipeline, text, add_special_tokens).ids
        return ids

    def encode_as_text(self, text: str) -> list[int]:
        if self._blind_pipeline is None:
            blind = type(self._pipeline).from_str(self._pipeline.to_str())
            blind.encode_special_tokens = True
            self._blind_pipeline = blind
        ids: list[int] = _encoding(self._blind_pipeline, text, False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        if len(ids) > _LONG_TEXT:
            return str(self._pipeline.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])
        text: str = self._pipeline.decode(ids, skip_special_tokens=skip_special_tokens)
        return text

    def piece(self, token_id: int) -> str | None:
        piece: str | None = self._pipeline.id_to_token(token_id)
        return piece

    def vocab(self) -> dict[str, int]:
        vocab: dict[str, int] = self._pipeline.get_vocab(with_added_tokens=True)
        return vocab


class FamilyPipeline(Pipeline):
    """A pipeline whose special tokens are found here: each text between two of them is encoded as one of its own,
    whoever wrote which part of it."""

    def __init__(self, made: FamilyTokenizer):
        super().__init__(made.pipeline)
        self._prefix, self._suffix = list(made.prefix), list(made.suffix)
        # A plain prompt that begins otherwise is a text in which no special token counts.
        self._chat_start = "" if made.family.turns is None else "".join(made.family.prefix)
        self._counted_ids = made.counted
        longest_first = sorted(made.counted, key=len, reverse=True)
        self._counted = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.encode_parts([(text, not text.startswith(self._chat_start))], add_special_tokens)

    def encode_as_text(self, text: str) -> list[int]:
        ids: list[int] = _encoding(self._pipeline, text, False).ids
        return ids

    def encode_parts(self, parts: Sequence[tuple[str, bool]], add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        text = ""
        for part, is_written in parts:
            start = 0
            for found in () if is_written else self._counted.finditer(part):
                text += part[start : found.start()]
                if text:
                    ids += self.encode_as_text(text)
                ids += self._counted_ids[found.group()]
                text, start = "", found.end()
            text += part[start:]
        if text:
            ids += self.encode_as_text(text)
        if not add_special_tokens:
            return ids
        begins = ids[: len(self._prefix)] == self._prefix
        return (ids if begins else self._prefix + ids) + self._suffix


def _encoding(pipeline: Any, text: str, add_special_tokens: bool) -> Any:
    """A long text is a batch of one: only for batches does the library release the interpreter's lock, without which a
    megabyte keeps every other thread waiting for a second and more."""
    if len(text) > _LONG_TEXT:
        return pipeline.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0]
    return pipeline.encode(text, add_special_tokens=add_special_tokens)


class PythonTokenizer(Backend):
    """A `transformers` tokenizer without a `tokenizers` pipeline."""

    is_byte_level = False

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.added_text = {token_id: str(token) for token_id, token in tokenizer.added_tokens_decoder.items()}

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_as_text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
            )
        )

    def piece(self, token_id: int) -> str | None:
        if not 0 <= token_id < len(self._tokenizer):
            return None
        piece: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return piece

    def vocab(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())


class NoTokenizer(Backend):
    """For engines that are asked in token ids alone: ids have no text, and text is an error."""

    special_ids: frozenset[int] = frozenset()
    added_text: Mapping[int, str] = {}
    is_byte_level = True

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise no_text("text prompts")

    def encode_as_text(self, text: str) -> list[int]:
        raise no_text("text prompts")

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        return ""

    def piece(self, token_id: int) -> str | None:
        return None

    def vocab(self) -> dict[str, int]:
        return {}


def no_text(what: str, param: str = "prompt") -> RequestError:
    """The error for what needs a tokenizer where there is none."""
    return RequestError(
        f"{what}: this engine was started with skip_tokenizer_init and has no tokenizer; send prompts as token ids, or "
        "start it without that setting",
        param=param,
        code="no_tokenizer",
    )
