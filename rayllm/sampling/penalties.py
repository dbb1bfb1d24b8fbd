"""Repetition, presence and frequency penalties. State exists only for rows that asked for one.

Shapes: S slots (a slot is a penalised row's place here), B of them whose rows are new, N lines of a batch, P penalised
ones, L tokens of a history, T tokens of all new rows, V vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllm.messages import RowParams
from rayllm.transfer.upload import Upload, Uploaded
from rayllm_kernels.device import uses_triton
from rayllm_kernels.sampling import append_to_histories, begin_histories, penalise


def wants_penalty(params: RowParams) -> bool:
    """Whether any of the three penalties changes a logit."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class _New:
    """A row that is new since the last step: its slot, its tokens and how many of them are the prompt's."""

    slot: int
    tokens: np.ndarray
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class _Begun:
    """The rows that are new since the last step, on their way to the device."""

    tokens_T: Uploaded
    """int32."""
    histories_B4: Uploaded
    """int64: slot, where its tokens begin and end in `tokens_T`, how many of them are the prompt's."""
    max_length: int


@dataclass(frozen=True, slots=True)
class Penalised:
    """A step's penalised lines, on their way to the device."""

    begun: _Begun | None
    lines_slots_lengths_3P: Uploaded
    """int64."""
    numbers_P3: Uploaded
    """float32: repetition, frequency, presence."""
    max_length: int


class PenaltyTable:
    """Which tokens each penalised row has, and how often it has emitted them.

    Memory: an int32 for each vocabulary id and, on a CPU, one for each position, per slot; slots double when needed.
    Time of a step: on a CPU in proportion to the longest history, on a GPU to the vocabulary. Nothing waits for the
    device.
    """

    def __init__(self, *, vocab_size: int, max_tokens: int, device: torch.device):
        self._counts_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        history_length = 0 if uses_triton(self._counts_SV) else max_tokens
        self._history_SL = torch.zeros((0, history_length), dtype=torch.int32, device=device)
        self._length: list[int] = []
        self._params: list[RowParams] = []
        self._slot: dict[int, int] = {}
        self._new: dict[int, _New] = {}
        self._free: list[int] = []

    def __contains__(self, row: int) -> bool:
        return row in self._slot

    def add(self, row: int, params: RowParams, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """`tokens` are the prompt, then what was emitted; never empty. The device learns of it with the next step."""
        if not self._free:
            num_slots = len(self._length)
            num_new = max(4, num_slots)
            self._length += [0] * num_new
            self._params += [RowParams()] * num_new
            self._free += reversed(range(num_slots, num_slots + num_new))
        slot = self._slot[row] = self._free.pop()
        self._length[slot], self._params[slot] = len(tokens), params
        self._new[row] = _New(slot, np.array(tokens, np.int32), num_prompt_tokens)

    def remove(self, row: int) -> None:
        """Rows that are not here are ignored."""
        slot = self._slot.pop(row, None)
        self._new.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def prepare(self, upload: Upload, lines: list[int], rows: list[int]) -> Penalised:
        """What `apply` and `append` need for `rows[i]` on line `lines[i]`; each row emits one token."""
        slots = [self._slot[row] for row in rows]
        lengths = [self._length[slot] for slot in slots]
        params = [self._params[slot] for slot in slots]
        numbers = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
        for slot in slots:
            self._length[slot] += 1
        return Penalised(
            self._send_begun(upload),
            upload.add(np.array([lines, slots, lengths], np.int64)),
            upload.add(np.array(numbers, np.float32)),
            max(lengths),
        )

    def apply(self, logits_NV: Tensor, step: Penalised) -> None:
        """Changes the lines' logits as their rows asked: see `rayllm_kernels.sampling.reference.penalise`."""
        self._grow()
        if step.begun:
            tokens, histories = step.begun.tokens_T.tensor, step.begun.histories_B4.tensor
            begin_histories(self._counts_SV, self._history_SL, tokens, histories, step.begun.max_length)
        lines, numbers = step.lines_slots_lengths_3P.tensor, step.numbers_P3.tensor
        penalise(logits_NV, self._counts_SV, self._history_SL, lines, numbers, step.max_length)

    def append(self, step: Penalised, token_ids_N: Tensor) -> None:
        """The step's lines have emitted their tokens of `token_ids_N`, which may still be unknown to the host."""
        append_to_histories(self._counts_SV, self._history_SL, step.lines_slots_lengths_3P.tensor, token_ids_N)

    def _send_begun(self, upload: Upload) -> _Begun | None:
        new, self._new = list(self._new.values()), {}
        if not new:
            return None
        ends = np.cumsum([len(each.tokens) for each in new]).tolist()
        histories = [(each.slot, end - len(each.tokens), end, each.num_prompt_tokens) for each, end in zip(new, ends)]
        return _Begun(
            upload.add(np.concatenate([each.tokens for each in new])),
            upload.add(np.array(histories, np.int64)),
            max(len(each.tokens) for each in new),
        )

    def _grow(self) -> None:
        num_new = len(self._length) - len(self._counts_SV)
        if num_new:
            more_counts = self._counts_SV.new_zeros((num_new, self._counts_SV.shape[1]))
            more_history = self._history_SL.new_zeros((num_new, self._history_SL.shape[1]))
            self._counts_SV = torch.cat((self._counts_SV, more_counts))
            self._history_SL = torch.cat((self._history_SL, more_history))
