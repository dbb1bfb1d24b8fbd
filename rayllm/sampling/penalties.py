"""Repetition, presence and frequency penalties. State exists only for rows that asked for one.

Shapes: S slots (a slot is a penalised row's place here), P penalised lines of a batch, L tokens of a history,
V vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllm.messages import RowParams
from rayllm.transfer.upload import Upload, Uploaded


def wants_penalty(params: RowParams) -> bool:
    """Whether any of the three penalties changes a logit."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


@dataclass(frozen=True, slots=True)
class _Begun:
    """A row that is new since the last step: its slot, its tokens and how many of them are the prompt's."""

    slot: int
    tokens: np.ndarray
    num_prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Penalised:
    """A step's penalised lines, on their way to the device."""

    begun: list[tuple[int, int, Uploaded]]
    """Slot, number of prompt tokens and int32 tokens of each row that is new."""
    lines_slots_lengths_3P: Uploaded
    numbers_P3: Uploaded
    """float32: repetition, frequency, presence."""
    max_length: int


class PenaltyTable:
    """Which tokens each penalised row has, and how often it has emitted them.

    Memory: an int32 for each vocabulary id and one for each position, per slot; slots double when needed.
    Time of a step: in proportion to the longest history, not to the vocabulary. Nothing waits for the device.
    """

    def __init__(self, *, vocab_size: int, max_tokens: int, device: torch.device):
        self._device = device
        self._counts_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._history_SL = torch.zeros((0, max_tokens), dtype=torch.int32, device=device)
        self._length: list[int] = []
        self._params: list[RowParams] = []
        self._slot: dict[int, int] = {}
        self._begun: dict[int, _Begun] = {}
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
        self._begun[row] = _Begun(slot, np.array(tokens, np.int32), num_prompt_tokens)

    def remove(self, row: int) -> None:
        """Rows that are not here are ignored."""
        slot = self._slot.pop(row, None)
        self._begun.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def prepare(self, upload: Upload, lines: list[int], rows: list[int]) -> Penalised:
        """What `apply` and `append` need for `rows[i]` on line `lines[i]`; each row emits one token."""
        slots = [self._slot[row] for row in rows]
        lengths = [self._length[slot] for slot in slots]
        params = [self._params[slot] for slot in slots]
        numbers = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
        begun, self._begun = self._begun, {}
        for slot in slots:
            self._length[slot] += 1
        return Penalised(
            [(new.slot, new.num_prompt_tokens, upload.add(new.tokens)) for new in begun.values()],
            upload.add(np.array([lines, slots, lengths], np.int64)),
            upload.add(np.array(numbers, np.float32)),
            max(lengths),
        )

    def apply(self, logits_NV: Tensor, step: Penalised) -> None:
        """Changes the lines' logits as their rows asked: repetition, then frequency, then presence.

        Repetition covers prompt and output, divides positive logits and multiplies others (Keskar et al.,
        2019). Frequency and presence cover the output only and are subtracted (OpenAI's definition).
        """
        self._begin(step)
        line_P1, slot_P1, length_P1 = step.lines_slots_lengths_3P.tensor[:, :, None]
        repetition_P1, frequency_P1, presence_P1 = step.numbers_P3.tensor.T[:, :, None]
        history_PL = self._history_SL[slot_P1[:, 0], : step.max_length].long()
        past_end_PL = torch.arange(step.max_length, device=self._device) >= length_P1
        # Padding repeats the first token; a token met twice is written twice with the same value: no harm.
        history_PL = torch.where(past_end_PL, history_PL[:, :1], history_PL)
        counts_PL = self._counts_SV[slot_P1, history_PL]
        logits_PL = logits_NV[line_P1, history_PL]
        logits_PL = torch.where(logits_PL > 0, logits_PL / repetition_P1, logits_PL * repetition_P1)
        logits_PL -= frequency_P1 * counts_PL
        logits_PL -= presence_P1 * (counts_PL > 0)
        logits_NV[line_P1, history_PL] = logits_PL

    def append(self, step: Penalised, token_ids_P: Tensor) -> None:
        """The step's rows have emitted `token_ids_P`, which may still be unknown to the host."""
        _, slot_P, length_P = step.lines_slots_lengths_3P.tensor
        self._history_SL[slot_P, length_P] = token_ids_P.to(torch.int32)
        self._counts_SV[slot_P, token_ids_P] += 1

    def _begin(self, step: Penalised) -> None:
        num_new = len(self._length) - len(self._counts_SV)
        if num_new:
            more_counts = self._counts_SV.new_zeros((num_new, self._counts_SV.shape[1]))
            more_history = self._history_SL.new_zeros((num_new, self._history_SL.shape[1]))
            self._counts_SV = torch.cat((self._counts_SV, more_counts))
            self._history_SL = torch.cat((self._history_SL, more_history))
        for slot, num_prompt_tokens, uploaded in step.begun:
            tokens_L = uploaded.tensor
            self._history_SL[slot, : len(tokens_L)] = tokens_L
            emitted = tokens_L[num_prompt_tokens:]
            self._counts_SV[slot].zero_().index_add_(0, emitted.long(), torch.ones_like(emitted))
