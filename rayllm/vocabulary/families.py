"""What the Python code of tokenizers does that checkpoints bring along, as data. That code is never imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rayllm.vocabulary import templates
from rayllm.weights.config_file import read_json


@dataclass(frozen=True)
class TokenizerFamily:
    """A tokenizer class and the special tokens, prompts and chats that its code makes."""

    name: str
    classes: tuple[str, ...] = ()
    """Values of `tokenizer_class` in tokenizer_config.json."""
    model_types: tuple[str, ...] = ()
    """Values of `model_type` in config.json, where no class is named."""
    form: Literal["sentencepiece", "ranks"] = "sentencepiece"
    """Of tokenizer.model: sentencepiece's protobuf, or lines of a token in base64 and its rank (tiktoken)."""
    signs: tuple[str, ...] = ()
    """Of families with one class: any of these texts stands in tokenizer_config.json, in the name that config.json
    gives, or in the Python code, which is read as text."""
    special_tokens: tuple[str, ...] = ()
    """In this order behind the vocabulary, where added_tokens_decoder gives no ids and the vocabulary holds none."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Special tokens by their roles, where no file names them."""
    prefix: tuple[str, ...] = ()
    """Special tokens before each plain prompt."""
    adds_start: bool = False
    """The start token stands before each plain prompt, where `add_bos_token` does not say."""
    turns: tuple[str, ...] | None = None
    """Special tokens that count in a chat's text; in a plain prompt none does, unless it begins with the prefix. None:
    all count in any text."""
    chat_template: str | None = None
    """Where the files bring none."""
    tool_template: str | None = None
    """For chats with tools, where the files' own template does not take them as its variable `tools`."""


_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
_BAICHUAN = ("BaichuanTokenizer", "BaiChuanTokenizer")

FAMILIES = (
    TokenizerFamily(
        "glm4",
        ("ChatGLM4Tokenizer",),
        ("chatglm",),
        form="ranks",
        special_tokens=(
            "<|endoftext|>", *_MASKS, "<sop>", "<eop>", *_ROLES,
            "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>",
        ),
        named={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        prefix=("[gMASK]", "<sop>"),
        chat_template=templates.GLM4,
        tool_template=templates.GLM4,
    ),
    TokenizerFamily(
        "chatglm3",
        ("ChatGLMTokenizer",),
        ("chatglm",),
        signs=("<|user|>", "chatglm3"),
        special_tokens=(*_MASKS, "sop", "eop", *_ROLES),
        prefix=("[gMASK]", "sop"),
        turns=_ROLES,
        chat_template=templates.CHATGLM3,
    ),
    TokenizerFamily(
        "chatglm2",
        ("ChatGLMTokenizer",),
        ("chatglm",),
        special_tokens=(*_MASKS, "sop", "eop"),
        prefix=("[gMASK]", "sop"),
        turns=(),
        chat_template=templates.CHATGLM2,
    ),
    TokenizerFamily(
        "internlm2", ("InternLM2Tokenizer", "InternLMTokenizer"), ("internlm", "internlm2"), adds_start=True
    ),
    TokenizerFamily(
        "baichuan2",
        _BAICHUAN,
        ("baichuan",),
        signs=("125696",),  # config.json's vocab_size
        special_tokens=templates.BAICHUAN2_ROLES,
        adds_start=True,
        chat_template=templates.BAICHUAN2,
    ),
    TokenizerFamily(
        "baichuan",
        _BAICHUAN,
        ("baichuan",),
        special_tokens=templates.BAICHUAN_ROLES,
        adds_start=True,
        chat_template=templates.BAICHUAN,
    ),
)  # fmt: skip
"""In the order in which a folder is looked at."""
OTHER = TokenizerFamily("other")
"""A sentencepiece model of a class that is not known: what its protobuf and tokenizer_config.json say is all."""


def find_family(folder: Path, settings: Mapping[str, Any], form: str) -> TokenizerFamily | None:
    """The family of a folder with a tokenizer.model of this form, by `settings` (tokenizer_config.json) and the files.

    None where it is not known how such a tokenizer splits text.
    """
    name = settings.get("tokenizer_class")
    model_type = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    for family in FAMILIES:
        is_meant = name in family.classes if name is not None else model_type in family.model_types
        if is_meant and form == family.form and _has_sign(folder, family):
            return family
    return OTHER if form == "sentencepiece" else None


def _has_sign(folder: Path, family: TokenizerFamily) -> bool:
    if not family.signs:
        return True
    files = [folder / "tokenizer_config.json", folder / "config.json", *sorted(folder.glob("tokenization_*.py"))]
    texts = [file.read_text("utf-8", errors="replace") for file in files if file.is_file()]
    return any(sign in text for sign in family.signs for text in texts)
