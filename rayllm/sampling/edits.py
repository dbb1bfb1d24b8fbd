"""Bounds and shifts of a row's logits that do not follow from its text: a grammar's mask, allowed ids, bias, and end
tokens that must wait. Shapes: N lines, G of them bound by a mask, V vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllm.messages import RowParams
from rayllm.transfer.upload import Upload, Uploaded


@dataclass(frozen=True, slots=True)
class RowEdits:
    """A row's, on the host; None where it has none of that kind. Ids are int64, the bias of ids is float32."""

    allowed_ids: np.ndarray | None
    bias: tuple[np.ndarray, np.ndarray] | None
    end_ids: np.ndarray | None
    """Masked until `min_tokens` are emitted."""
    min_tokens: int

    @classmethod
    def of(cls, params: RowParams, eos_token_ids: Iterable[int], vocab_size: int) -> RowEdits:
        ends = {*eos_token_ids, *params.stop_token_ids} if params.min_tokens else set()
        end_ids = sorted(token_id for token_id in ends if token_id < vocab_size)
        bias = params.logit_bias
        return cls(
            _ids(params.allowed_token_ids) if params.allowed_token_ids else None,
            (_ids(bias), np.array(list(bias.values()), np.float32)) if bias else None,
            _ids(end_ids) if end_ids else None,
            params.min_tokens,
        )

    def bans_ends(self, position: int) -> bool:
        """Whether the row, which has emitted `position` tokens, must not end yet."""
        return self.end_ids is not None and position < self.min_tokens

    def is_needed(self, position: int) -> bool:
        """Whether the row's next logits are edited."""
        return self.allowed_ids is not None or self.bias is not None or self.bans_ends(position)


@dataclass(frozen=True, slots=True)
class _LineEdits:
    line: int
    allowed_ids: Uploaded | None
    bias: tuple[Uploaded, Uploaded] | None
    end_ids: Uploaded | None


@dataclass(frozen=True, slots=True)
class Edits:
    """A step's, on their way to the device."""

    lines: list[_LineEdits]

    @classmethod
    def prepare(cls, upload: Upload, lines: Iterable[tuple[int, RowEdits, int]]) -> Edits | None:
        """Of each (line, edits of its row, number of tokens that the row has emitted); None where none is needed."""
        found = []
        for line, row, position in lines:
            if row.is_needed(position):
                allowed = None if row.allowed_ids is None else upload.add(row.allowed_ids)
                bias = None if row.bias is None else (upload.add(row.bias[0]), upload.add(row.bias[1]))
                ends = upload.add(row.end_ids) if row.end_ids is not None and row.bans_ends(position) else None
                found.append(_LineEdits(line, allowed, bias, ends))
        return cls(found) if found else None

    def apply(self, logits_NV: Tensor) -> None:
        """Allowed ids, bias, then end tokens masked below `min_tokens`, unless no token would be left."""
        for edits in self.lines:
            logits_V = logits_NV[edits.line]
            if edits.allowed_ids is not None:
                allowed_ids = edits.allowed_ids.tensor
                kept = logits_V[allowed_ids]
                logits_V.fill_(-torch.inf)
                logits_V[allowed_ids] = kept
            if edits.bias is not None:
                ids, values = edits.bias
                logits_V[ids.tensor] += values.tensor
            if edits.end_ids is not None:
                end_ids = edits.end_ids.tensor
                before = logits_V[end_ids]
                logits_V[end_ids] = -torch.inf
                nothing_left = logits_V.max() == -torch.inf
                logits_V[end_ids] = before.masked_fill(~nothing_left, -torch.inf)


def apply_mask(logits_NV: Tensor, lines: list[int], bits_GB: Tensor) -> None:
    """Leaves `logits_NV[lines[i]]` the ids whose bit in `bits_GB[i]` (uint8, the lowest first) is set."""
    shifts = torch.arange(8, dtype=torch.uint8, device=logits_NV.device)
    is_allowed_GV = (bits_GB[:, :, None] >> shifts & 1).bool().flatten(1)
    is_banned_GV = is_allowed_GV[:, : logits_NV.shape[1]].logical_not_()
    if len(lines) == len(logits_NV):
        logits_NV.masked_fill_(is_banned_GV, -torch.inf)
    else:
        for line, is_banned_V in zip(lines, is_banned_GV):
            logits_NV[line].masked_fill_(is_banned_V, -torch.inf)


def _ids(ids: Iterable[int]) -> np.ndarray:
    return np.array(list(ids), np.int64)
