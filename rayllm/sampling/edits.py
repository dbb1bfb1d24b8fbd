"""Edits of a row's logits that do not follow from its text: allowed ids, bias, and end tokens that must wait.

Shapes: N lines, V vocabulary ids; A allowed, B biased and E banned ids of all lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllm.messages import RowParams
from rayllm.transfer.upload import Upload, Uploaded, int64_array


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
            int64_array(params.allowed_token_ids) if params.allowed_token_ids else None,
            (int64_array(bias), np.array(list(bias.values()), np.float32)) if bias else None,
            int64_array(end_ids) if end_ids else None,
            params.min_tokens,
        )

    def bans_ends(self, position: int) -> bool:
        """Whether the row, which has emitted `position` tokens, must not end yet."""
        return self.end_ids is not None and position < self.min_tokens

    def is_needed(self, position: int) -> bool:
        """Whether the row's next logits are edited."""
        return self.allowed_ids is not None or self.bias is not None or self.bans_ends(position)


@dataclass(frozen=True, slots=True)
class Edits:
    """A step's, on their way to the device: for all lines together, in one tensor of each kind. None where no line has
    that kind."""

    allowed: tuple[Uploaded, Uploaded] | None
    """Lines with allowed ids, int64; and for each allowed id its line and itself, int64 [2, A]."""
    bias: tuple[Uploaded, Uploaded] | None
    """For each biased id its line and itself, int64 [2, B]; and the bias, float32 [B]."""
    ends: Uploaded | None
    """For each end token that is banned its line and itself, int64 [2, E]."""

    @classmethod
    def prepare(cls, upload: Upload, lines: Iterable[tuple[int, RowEdits, int]]) -> Edits | None:
        """Of each (line, edits of its row, number of tokens that the row has emitted); None where none is needed."""
        needed = [each for each in lines if each[1].is_needed(each[2])]
        if not needed:
            return None
        allowed = [(line, row.allowed_ids) for line, row, _ in needed if row.allowed_ids is not None]
        bias = [(line, row.bias) for line, row, _ in needed if row.bias is not None]
        ends = [
            (line, row.end_ids) for line, row, position in needed if row.end_ids is not None and row.bans_ends(position)
        ]
        values = np.concatenate([values for _, (_, values) in bias]) if bias else None
        return cls(
            (upload.add(int64_array(line for line, _ in allowed)), upload.add(_places(allowed))) if allowed else None,
            None if values is None else (upload.add(_places([(i, ids) for i, (ids, _) in bias])), upload.add(values)),
            upload.add(_places(ends)) if ends else None,
        )

    def apply(self, logits_NV: Tensor) -> None:
        """Allowed ids, bias, then end tokens masked below `min_tokens`, unless no token would be left."""
        if self.allowed is not None:
            lines, (line_A, id_A) = self.allowed[0].tensor, self.allowed[1].tensor
            kept_A = logits_NV[line_A, id_A]
            logits_NV.index_fill_(0, lines, -torch.inf)
            logits_NV[line_A, id_A] = kept_A
        if self.bias is not None:
            line_B, id_B = self.bias[0].tensor
            logits_NV[line_B, id_B] += self.bias[1].tensor
        if self.ends is not None:
            line_E, id_E = self.ends.tensor
            before_E = logits_NV[line_E, id_E]
            logits_NV.index_put_((line_E, id_E), before_E.new_full((), -torch.inf))
            nothing_left_E = (logits_NV.amax(1) == -torch.inf)[line_E]
            logits_NV[line_E, id_E] = before_E.masked_fill(~nothing_left_E, -torch.inf)


def _places(ids_of_lines: Sequence[tuple[int, np.ndarray]]) -> np.ndarray:
    """[2, ids of all lines]: the line of each, and itself."""
    lines = np.repeat([line for line, _ in ids_of_lines], [len(ids) for _, ids in ids_of_lines])
    return np.stack((lines, np.concatenate([ids for _, ids in ids_of_lines])))
