"""A tokenizer of a family, made from tokenizer.model and tokenizer_config.json alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError
from rayllm.vocabulary.families import FAMILIES, TokenizerFamily, find_family
from rayllm.vocabulary.ranks import holds_ranks, ranks_pipeline, read_ranks
from rayllm.vocabulary.sentencepiece import named_pieces, read_sentencepiece, sentencepiece_pipeline
from rayllm.weights.config_file import read_json

logger = logging.getLogger(__name__)

_MAX_ID = 2**24
MODEL_FILE, PIPELINE_FILE = "tokenizer.model", "tokenizer.json"


@dataclass(frozen=True)
class FamilyTokenizer:
    """Made by `read_family_tokenizer`."""

    family: TokenizerFamily
    special_ids: Mapping[str, int]
    """All added tokens."""
    named: Mapping[str, str]
    """Special tokens by their roles, of the vocabulary itself."""
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    """Ids before and after a plain prompt."""
    counted: Mapping[str, tuple[int, ...]]
    """Texts of special tokens that count where they stand in a chat, and their ids."""
    build: Callable[[], Any]

    @cached_property
    def pipeline(self) -> Any:
        """A `tokenizers` pipeline that adds nothing, with all added tokens. Seconds for a large vocabulary."""
        return self.build()


def brings_code(settings: Mapping[str, Any]) -> bool:
    """Whether tokenizer_config.json names a class that is Python code of the checkpoint."""
    found = settings.get("auto_map")
    return isinstance(found, (list, tuple)) or (isinstance(found, dict) and "AutoTokenizer" in found)


def read_family_tokenizer(folder: Path, settings: Mapping[str, Any]) -> FamilyTokenizer | None:
    """`settings`: tokenizer_config.json. None where the classes of `transformers` know the folder's tokenizer.

    Raises `ConfigError` for files that are broken or contradict each other, and for a tokenizer that only its code can
    explain.
    """
    model = folder / MODEL_FILE
    if not model.is_file() or (folder / PIPELINE_FILE).is_file():
        return None
    name = settings.get("tokenizer_class")
    if not brings_code(settings) and not _is_known(folder, name):
        return None
    has_ranks = holds_ranks(model)
    family = find_family(folder, settings, "ranks" if has_ranks else "sentencepiece")
    if family is None:
        raise ConfigError(
            f"{model}: how tokenizer_class={name!r} splits text stands in Python code of the checkpoint, which is not "
            f"run; give --tokenizer FOLDER with its {PIPELINE_FILE}"
        )
    logger.info("%s is read as the vocabulary of %s; Python files of the checkpoint are not used", model, family.name)
    return _from_ranks(model, family, settings) if has_ranks else _from_sentencepiece(model, family, settings)


def _is_known(folder: Path, name: Any) -> bool:
    """Whether a family has this class; or this kind of model, where no class is named."""
    if name is not None:
        return any(name in family.classes for family in FAMILIES)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return any(config.get("model_type") in family.model_types for family in FAMILIES)


def _from_ranks(model: Path, family: TokenizerFamily, settings: Mapping[str, Any]) -> FamilyTokenizer:
    ranks = read_ranks(model)
    known = {token.decode("utf-8", "replace"): rank for token, rank in ranks.items()}
    special = _special_ids(model, family, settings, known, {})
    taken = set(ranks.values())
    for text, token_id in special.items():
        if token_id in taken:
            raise ConfigError(f"{model}: special token {text[:40]!r} has the id {token_id}, which is a token's rank")
    return _made(family, settings, lambda: ranks_pipeline(ranks, special), special, family.named)


def _from_sentencepiece(model: Path, family: TokenizerFamily, settings: Mapping[str, Any]) -> FamilyTokenizer:
    proto = read_sentencepiece(model)
    known = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    named = {**family.named, **named_pieces(proto)}
    own = {text: known[text] for text in named.values()}
    special = _special_ids(model, family, settings, known, own)
    return _made(family, settings, lambda: sentencepiece_pipeline(proto, special), special, named)


def _special_ids(
    model: Path,
    family: TokenizerFamily,
    settings: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    own: Mapping[str, int],
) -> dict[str, int]:
    """Ids of all special tokens: `own` ones of the vocabulary, those of added_tokens_decoder, and the family's."""
    declared = _declared(model, settings)
    taken = set(declared.values())
    found = {**{text: token_id for text, token_id in own.items() if token_id not in taken}, **declared}
    taken.update(found.values())
    size = max(vocabulary.values()) + 1
    for place, text in enumerate(family.special_tokens):
        token_id = vocabulary.get(text, size + place)
        if text not in found and token_id not in taken:
            found[text] = token_id
    missing = [text for text in family.prefix if text not in found]
    if missing:
        raise ConfigError(
            f"{model.parent / 'tokenizer_config.json'}: added_tokens_decoder lacks {missing[0]!r}, with which every "
            "prompt of this model begins"
        )
    return found


def _text(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _declared(model: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    declared = settings.get("added_tokens_decoder") or {}
    where = f"{model.parent / 'tokenizer_config.json'}: added_tokens_decoder"
    if not isinstance(declared, dict):
        raise ConfigError(f"{where} must be an object of ids and tokens")
    found: dict[str, int] = {}
    for token_id, entry in declared.items():
        text = _text(entry)
        if not token_id.isdecimal() or int(token_id) > _MAX_ID or not text:
            raise ConfigError(
                f"{where} holds {token_id[:20]!r}: it must map ids, at most {_MAX_ID}, to tokens with a content"
            )
        if text in found:
            raise ConfigError(f"{where} gives {text[:40]!r} two ids")
        found[text] = int(token_id)
    return found


def _shown_tokens(settings: Mapping[str, Any]) -> set[str]:
    """Added tokens that are parts of a text, as code for a call may be: not special."""
    declared = (settings.get("added_tokens_decoder") or {}).values()
    return {str(_text(entry)) for entry in declared if isinstance(entry, dict) and entry.get("special") is False}


def _made(
    family: TokenizerFamily,
    settings: Mapping[str, Any],
    make: Callable[[], Any],
    special: Mapping[str, int],
    named: Mapping[str, str],
) -> FamilyTokenizer:
    shown = _shown_tokens(settings).difference(family.special_tokens, named.values())
    ends = {role: _text(settings.get(role)) or named.get(role, "") for role in ("bos_token", "eos_token")}
    start, end = ((special[text],) if text in special else () for text in ends.values())
    prefix = tuple(special[text] for text in family.prefix)
    if not prefix and settings.get("add_bos_token", family.adds_start):
        prefix = start
    counted: dict[str, tuple[int, ...]]
    if family.turns is None:
        counted = {text: (token_id,) for text, token_id in special.items() if text not in shown}
    else:
        counted = {text: (special[text],) for text in family.turns if text in special}
        counted["".join(family.prefix)] = prefix
    suffix = end if settings.get("add_eos_token") else ()
    return FamilyTokenizer(family, special, named, prefix, suffix, counted, lambda: _with_added(make(), special, shown))


def _with_added(pipeline: Any, added: Mapping[str, int], shown: Container[str]) -> Any:
    from tokenizers import AddedToken

    for text in sorted(added, key=added.__getitem__):  # ids behind a list of pieces are given in this order
        add = pipeline.add_tokens if text in shown else pipeline.add_special_tokens
        add([AddedToken(text, normalized=False, special=text not in shown)])
    pipeline.encode_special_tokens = True
    return pipeline
