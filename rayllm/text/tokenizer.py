"""A model's tokenizer: text to ids, ids to text and bytes, chats to text. No torch, no remote code."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rayllm.config import ContentFormat, ResolvedConfig
from rayllm.errors import ConfigError, RequestError
from rayllm.request import SamplingParams
from rayllm.text.chat_content import cut_at_end_mark, with_end_mark
from rayllm.text.chat_template import ChatTemplate
from rayllm.text.tokenizer_backends import Backend, FamilyPipeline, NoTokenizer, Pipeline, PythonTokenizer, no_text
from rayllm.text.tokenizer_files import (
    NAMED_TOKENS,
    check_vocabulary_files,
    named_tokens,
    read_json,
    read_text,
    token_content,
)
from rayllm.vocabulary.families import OTHER, TokenizerFamily
from rayllm.vocabulary.family_tokenizer import brings_code, read_family_tokenizer

_GENERIC_CLASSES = frozenset({None, "PreTrainedTokenizerFast", "TokenizersBackend"})
"""Classes that add nothing to tokenizer.json."""
_PROBE_TOOL = "probe_tool_5e21"
_SENTENCEPIECE_SPACE = "▁"
_OPEN_MARK, _CLOSE_MARK = "\ufdd0", "\ufdd1"
_MARKS = re.compile(f"({_OPEN_MARK}|{_CLOSE_MARK})")


class Tokenizer:
    """Text to ids and back. Made by `from_path`."""

    def __init__(
        self,
        backend: Backend,
        named_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
        content_format: ContentFormat = "auto",
    ):
        self._backend = backend
        self.content_format = content_format
        self.tool_template: str | None = None
        """The model's own template for chats with tools, where it is another one."""
        self._bytes: dict[int, bytes] = {}
        self._anchor: tuple[int, str] | None = None
        named = dict(named_tokens or {})
        vocab = backend.vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        """One more than the largest id."""
        self.longest_token = max(map(len, vocab), default=1)
        """Characters in the longest token: no text of n tokens is much longer than n times this."""
        self.eos_token_id: int | None = vocab.get(named.get("eos_token", ""))
        self.special_token_ids = backend.special_ids
        self.added_tokens = {text: token_id for token_id, text in backend.added_text.items()}
        """Texts that are one token wherever they stand, and its id."""
        self._special_text = _any_of([backend.added_text.get(i, "") for i in backend.special_ids])
        self._named_tokens = named
        self.chat_template = None if chat_template is None else ChatTemplate(chat_template, named)

    @classmethod
    def from_config(cls, config: ResolvedConfig) -> Tokenizer:
        """The tokenizer of an engine. Raises as `from_path`."""
        engine = config.engine
        if engine.skip_tokenizer_init:
            return cls(NoTokenizer())
        return cls.from_path(config.tokenizer_path, engine.chat_template, engine.chat_template_content_format)

    @classmethod
    def from_path(
        cls, path: str, chat_template: str | None = None, content_format: ContentFormat = "auto"
    ) -> Tokenizer:
        """Reads the tokenizer of a folder. `chat_template`: a file (or a template's text) in place of the
        model's. `content_format`: in which form that takes contents.

        Raises `ConfigError`, one line that names the file, for what is missing or cannot be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigError(f"tokenizer: {path} is not a folder")
        settings = read_json(folder / "tokenizer_config.json")
        if chat_template is None:
            named_templates = _read_templates(folder, settings)
        else:
            named_templates = {"default": _given_template(chat_template)}
        check_vocabulary_files(folder)
        backend, named, family = _load(folder, settings)
        if not backend.vocab().keys() - backend.added_text.values():
            raise ConfigError(f"tokenizer: {folder} holds a tokenizer without a vocabulary: bring its files here again")
        template = named_templates.get("default") or next(iter(named_templates.values()), family.chat_template)
        made = cls(backend, named, template, content_format)
        made.tool_template = named_templates.get("tool_use")
        if chat_template is None and family.tool_template is not None and not made.shows_tools():
            made.tool_template = made.tool_template or family.tool_template
        return made

    @property
    def is_missing(self) -> bool:
        """Whether the engine has none: prompts are token ids, and answers have no text."""
        return isinstance(self._backend, NoTokenizer)

    def require_text(self, what: str, param: str) -> None:
        """Raises `RequestError` where there is no tokenizer, which `what` needs."""
        if self.is_missing:
            raise no_text(what, param)

    def check_params(self, params: SamplingParams) -> None:
        """Raises `RequestError` for parameters about text, where there is no tokenizer."""
        for name in ("stop", "bad_words", "structured_outputs"):
            if getattr(params, name):
                self.require_text(f"{name} of a request", name)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` adds what the model's own tokenizer adds (a start token, say).

        Raises `RequestError` for what is no text (half a character), or too much for the tokenizer's own patterns.
        """
        with _refusing_text():
            return self._backend.encode(text, add_special_tokens)

    def mark(self, content: str) -> str:
        """What a user wrote, with marks round whatever reads like a special token; for `encode_marked`."""
        if _OPEN_MARK in content or _CLOSE_MARK in content:
            content = _MARKS.sub("\ufffd", content)  # no characters: Unicode keeps them free for uses like this
        if self._special_text is None:
            return content
        return self._special_text.sub(lambda found: f"{_OPEN_MARK}{found.group()}{_CLOSE_MARK}", content)

    @staticmethod
    def without_marks(text: str) -> str:
        """A text as people read it."""
        return _MARKS.sub("", text)

    def encode_marked(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a chat, in which special tokens count outside the marks alone: a user cannot write them."""
        parts: list[tuple[str, bool]] = []
        is_written = False
        for part in _MARKS.split(text):
            if part in (_OPEN_MARK, _CLOSE_MARK):
                is_written = part == _OPEN_MARK
            elif part:
                parts.append((part, is_written))
        with _refusing_text():
            return self._backend.encode_parts(parts, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence. For text that grows, `detokenizer.ChoiceText`."""
        return self._backend.decode(ids, skip_special_tokens)

    def with_template(self, source: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        changed = copy.copy(self)
        changed.chat_template = ChatTemplate(source, self._named_tokens)
        changed.tool_template = None
        return changed

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt of a chat; `kwargs` are variables of the template. `encode` it without special tokens.

        A message's content is text, or a list of text parts. `continue_final_message=True` leaves the last message
        open, for the model to go on with. Raises `RequestError`, also where the template does not show what the last
        user message says.
        """
        self.require_text("chats", "messages")
        if self.chat_template is None:
            raise RequestError(
                "this model has no chat template: use /v1/completions, or start with --chat-template FILE",
                param="messages",
                code="no_chat_template",
            )
        continues = bool(kwargs.pop("continue_final_message", False))
        template = self.chat_template

        def render(messages: Sequence[Mapping[str, Any]]) -> str:
            return template.render(messages, add_generation_prompt=add_generation_prompt and not continues, **kwargs)

        forms = template.content_forms(self.content_format)
        shaped = forms.shaped(with_end_mark(messages) if continues else messages)
        text = render(shaped)
        forms.check_shown(shaped, text, render)
        return cut_at_end_mark(text, messages) if continues else text

    def shows_tools(self) -> bool:
        """Whether the chat template writes what its variable `tools` holds."""
        template = self.chat_template
        if template is None or "tools" not in template.variables:
            return False
        function = {"name": _PROBE_TOOL, "description": "", "parameters": {"type": "object", "properties": {}}}
        chat, tools = [{"role": "user", "content": "hello"}], [{"type": "function", "function": function}]
        try:
            return _PROBE_TOOL in template.render(chat, tools=tools)
        except RequestError:  # it may want chats in another form
            return True

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str | list[int]:
        """`transformers`' method: a chat's text, or its token ids. Raises as `render_chat`."""
        tokenizer = self if chat_template is None else self.with_template(chat_template)
        if chat_template is None and tools and self.tool_template is not None:
            tokenizer = self.with_template(self.tool_template)
        text = tokenizer.render_chat(conversation, add_generation_prompt, tools=tools, **variables)
        return self.encode_marked(text) if tokenize else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, within a text; empty for an id that is no token."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """A token for people to read: bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        """A token as it is written in the vocabulary; empty where there is none of that id."""
        return self._backend.piece(token_id) or ""

    def _compute_bytes(self, token_id: int) -> bytes:
        piece = self._backend.piece(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        added = self._backend.added_text.get(token_id)
        if added is not None:
            return added.encode("utf-8", "replace")
        if self._backend.is_byte_level:
            return _byte_level_bytes(piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return self._decoded_after_anchor(token_id, piece).encode("utf-8", "replace")

    def _decoded_after_anchor(self, token_id: int, piece: str) -> str:
        """What the tokenizer's own decoder makes of the token inside a text: after another token, not
        first."""
        if self._anchor is None:
            ordinary = [i for i in self._backend.encode("a", False) if i not in self._backend.special_ids]
            self._anchor = (ordinary[-1], self._backend.decode(ordinary[-1:], False)) if ordinary else (-1, "")
        anchor_id, anchor_text = self._anchor
        if anchor_text:
            text = self._backend.decode([anchor_id, token_id], False)
            if text.startswith(anchor_text):
                return text[len(anchor_text) :]
        return piece.replace(_SENTENCEPIECE_SPACE, " ")


@contextmanager
def _refusing_text() -> Iterator[None]:
    """What a tokenizer trips over is the text's fault. Its worst faults are panics, which are no `Exception`."""
    try:
        yield
    except RequestError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"the tokenizer cannot read this text: {reason}", param="prompt") from None


def _any_of(texts: list[str]) -> re.Pattern[str] | None:
    """Finds any of the texts, the longest first."""
    found = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found))) if found else None


def _byte_table() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones stand for themselves, the others for 256, 257, ..."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    table = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(byte for byte in range(256) if byte not in printable):
        table[chr(256 + i)] = byte
    return table


_BYTE_OF_CHARACTER = _byte_table()


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:
        return piece.encode("utf-8", "replace")


def _read_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The model's own templates by name: a field of tokenizer_config.json (one, or a list of named ones),
    chat_template.jinja, and those of the folder that `transformers` writes others to. Where these have no default, that
    of chat_template.json, the older file of models that see images."""
    given = settings.get("chat_template")
    entries = given if isinstance(given, list) else [{"name": "default", "template": given}] if given else []
    if not all(isinstance(entry, dict) and isinstance(entry.get("template"), str) for entry in entries):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: chat_template must be text")
    named = {str(entry.get("name")): entry["template"] for entry in entries}
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        named[file.stem] = read_text(file)
    if (folder / "chat_template.jinja").is_file():
        named["default"] = read_text(folder / "chat_template.jinja")
    older = folder / "chat_template.json"
    if not named and older.is_file():
        named["default"] = read_json(older).get("chat_template")
        if not isinstance(named["default"], str):
            raise ConfigError(f"{older}: chat_template must be text")
    return named


def _given_template(given: str) -> str:
    if "{{" in given or "{%" in given:
        return given
    if not Path(given).is_file():
        raise ConfigError(f"chat_template: {given} is not a file")
    return read_text(Path(given))


def _load(folder: Path, settings: Mapping[str, Any]) -> tuple[Backend, dict[str, str], TokenizerFamily]:
    file = folder / "tokenizer.json"
    if file.is_file():
        pipeline = _load_pipeline(file)
        if _is_whole(pipeline, settings):
            return Pipeline(pipeline), named_tokens(folder, settings), OTHER
    made = read_family_tokenizer(folder, settings)
    if made is not None:
        return FamilyPipeline(made), {**made.named, **named_tokens(folder, settings)}, made.family
    return *_load_with_transformers(folder, settings), OTHER


def _load_pipeline(file: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception for everything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{file}: not a tokenizer: {reason}") from None


def _is_whole(pipeline: Any, settings: Mapping[str, Any]) -> bool:
    """Whether the pipeline is all there is: `transformers` would change nothing."""
    adds_ends = settings.get("add_bos_token") or settings.get("add_eos_token")
    names_ends = "add_bos_token" in settings or "add_eos_token" in settings
    if settings.get("tokenizer_class") not in _GENERIC_CLASSES or "auto_map" in settings:
        return False
    if adds_ends or (names_ends and pipeline.post_processor is not None):
        return False
    declared = settings.get("added_tokens_decoder")
    added = {entry.get("content") for entry in declared.values()} if isinstance(declared, dict) else set()
    known = {token.content for token in pipeline.get_added_tokens_decoder().values()}
    named = {text for name in NAMED_TOKENS if (text := token_content(settings.get(name)))}
    return added <= known and named <= known


def _load_with_transformers(folder: Path, settings: Mapping[str, Any]) -> tuple[Backend, dict[str, str]]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    made_by: Any = PreTrainedTokenizerFast if brings_code(settings) else AutoTokenizer
    try:
        tokenizer = made_by.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # from OSError to KeyError, by the way in which the files are wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"tokenizer: cannot load one from {folder}: {reason}") from None
    named = {name: str(token) for name in NAMED_TOKENS if (token := getattr(tokenizer, name, None)) is not None}
    pipeline = getattr(tokenizer, "backend_tokenizer", None)
    return (PythonTokenizer(tokenizer) if pipeline is None else Pipeline(pipeline)), named
