"""A sentencepiece model as a `tokenizers` pipeline that gives the same ids.

Fields are those of sentencepiece_model.proto (github.com/google/sentencepiece).
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from rayllm.errors import ConfigError
from rayllm.vocabulary.cuts import cut_inside

SPACE = "▁"
_ALL = 2**20
_UNIGRAM, _BPE = 1, 2
_NORMAL, _USER_DEFINED = 1, 4


def read_sentencepiece(model: Path) -> Any:
    """The `ModelProto` in a file. Raises `ConfigError`."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(model.read_bytes())
    except DecodeError as error:
        raise ConfigError(f"{model}: not a sentencepiece model: {error}") from None
    if not proto.pieces:
        raise ConfigError(f"{model}: not a sentencepiece model: it holds no pieces")
    kind = proto.trainer_spec.model_type
    if kind not in (_UNIGRAM, _BPE):
        raise ConfigError(f"{model}: model_type={kind} is not supported: it must be unigram (1) or BPE (2)")
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise ConfigError(f"{model}: treat_whitespace_as_suffix is not supported")
    return proto


def named_pieces(proto: Any) -> dict[str, str]:
    """The pieces that the model itself names: start, end, unknown."""
    spec = proto.trainer_spec
    ids = {"bos_token": spec.bos_id, "eos_token": spec.eos_id, "unk_token": spec.unk_id, "pad_token": spec.pad_id}
    return {role: proto.pieces[i].piece for role, i in ids.items() if 0 <= i < len(proto.pieces)}


def sentencepiece_pipeline(proto: Any, special_ids: Mapping[str, int]) -> Any:
    """`special_ids` may name pieces anew, or stand behind them. Those are never part of a text.

    Each text between special tokens is encoded as one of its own, with a space put before it where the model does so.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

    renamed = {token_id: text for text, token_id in special_ids.items()}
    pieces = [renamed.get(i, piece.piece) for i, piece in enumerate(proto.pieces)]
    user_defined = [
        piece.piece for i, piece in enumerate(proto.pieces) if piece.type == _USER_DEFINED and i not in renamed
    ]
    pipeline = Tokenizer(_model(proto, pieces, special_ids, has_user_defined=bool(user_defined)))
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    space = SPACE if spec.escape_whitespaces else " "
    steps.append(normalizers.Replace(" ", space))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(space))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{space}+\z"), ""))
    pipeline.normalizer = normalizers.Sequence(steps)
    is_unigram = proto.trainer_spec.model_type == _UNIGRAM
    cuts = []
    if user_defined and not is_unigram:
        longest_first = sorted(user_defined, key=len, reverse=True)
        cuts.append(pre_tokenizers.Split(Regex("|".join(map(re.escape, longest_first))), "isolated"))
    if user_defined or is_unigram:  # then the model takes what it finds whole in its vocabulary
        never = [piece.piece for piece in proto.pieces if piece.type not in (_NORMAL, _USER_DEFINED)]
        cuts += cut_inside([*special_ids, *never])
    if cuts:
        pipeline.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        steps.append(decoders.Strip(" ", _ALL if spec.remove_extra_whitespaces else 1, 0))
    pipeline.decoder = decoders.Sequence(steps)
    return pipeline


def _model(proto: Any, pieces: list[str], special_ids: Mapping[str, int], *, has_user_defined: bool) -> Any:
    from tokenizers import models

    spec = proto.trainer_spec
    if spec.model_type == _UNIGRAM:
        behind = sorted(token_id for token_id in special_ids.values() if token_id >= len(pieces))
        if behind != list(range(len(pieces), len(pieces) + len(behind))):
            raise ConfigError(f"added tokens have the ids {behind}: they must follow the {len(pieces)} of the model")
        return models.Unigram(list(zip(pieces, _scores(proto))), spec.unk_id, spec.byte_fallback)
    return models.BPE(
        {**{piece: i for i, piece in enumerate(pieces)}, **special_ids},
        _merges(proto, set(special_ids.values())),
        unk_token=pieces[spec.unk_id],
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=has_user_defined,
    )


def _scores(proto: Any) -> list[float]:
    """Of a unigram model; a user-defined piece has one that wins against any normal pieces in its place."""
    best = max((piece.score for piece in proto.pieces if piece.type == _NORMAL), default=0.0)
    return [len(piece.piece) * best - 0.1 if piece.type == _USER_DEFINED else piece.score for piece in proto.pieces]


def _merges(proto: Any, special: Container[int]) -> list[tuple[str, str]]:
    """All pairs of normal pieces that make one, the best score first: what sentencepiece's BPE merges first."""
    normal = (piece for i, piece in enumerate(proto.pieces) if piece.type == _NORMAL and i not in special)
    scores = {piece.piece: piece.score for piece in normal}
    best_first = sorted(scores, key=scores.__getitem__, reverse=True)  # stable: pieces of one score in their order
    return [
        (whole[:i], whole[i:])
        for whole in best_first
        for i in range(1, len(whole))
        if whole[:i] in scores and whole[i:] in scores
    ]
