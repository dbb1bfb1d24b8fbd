"""Repetition, presence and frequency penalties. State exists only for rows that asked for one.

Shapes: S slots (a slot is a penalised row's place here), P penalised lines of a batch, L tokens of a history,
V vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rayllm.messages import RowParams


def wants_penalty(params: RowParams) -> bool:
    """Whether any of the three penalties changes a logit."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def upload(host: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, without waiting for the device."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class PenaltyTable:
    """Which tokens each penalised row has, and how often it has emitted them.

    Memory: an int32 for each vocabulary id and one for each position, per slot; slots double when needed.
    Time of a step: in proportion to the longest history, not to the vocabulary.
    """

    def __init__(self, *, vocab_size: int, max_tokens: int, device: torch.device):
        self._device = device
        self._counts_SV = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)
        self._history_SL = torch.zeros((0, max_tokens), dtype=torch.int32, device=device)
        self._length: list[int] = []
        self._params: list[RowParams] = []
        self._slot: dict[int, int] = {}
        self._free: list[int] = []

    def __contains__(self, row: int) -> bool:
        return row in self._slot

    def add(self, row: int, params: RowParams, tokens: Sequence[int], num_prompt_tokens: int) -> None:
        """`tokens` are the prompt, then what was emitted; never empty."""
        if not self._free:
            self._grow()
        slot = self._slot[row] = self._free.pop()
        tokens_L = upload(torch.tensor(tokens, dtype=torch.int32), self._device)
        self._length[slot], self._params[slot] = len(tokens), params
        self._history_SL[slot, : len(tokens)] = tokens_L
        emitted = tokens_L[num_prompt_tokens:]
        self._counts_SV[slot].zero_().index_add_(0, emitted.long(), torch.ones_like(emitted))

    def remove(self, row: int) -> None:
        """Rows that are not here are ignored."""
        slot = self._slot.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def apply(self, logits_NV: Tensor, lines: list[int], rows: list[int]) -> None:
        """Changes `logits_NV[lines[i]]` as `rows[i]` asked: repetition, then frequency, then presence.

        Repetition covers prompt and output, divides positive logits and multiplies others (Keskar et al.,
        2019). Frequency and presence cover the output only and are subtracted (OpenAI's definition).
        """
        slots = [self._slot[row] for row in rows]
        lengths = [self._length[slot] for slot in slots]
        params = [self._params[slot] for slot in slots]
        index_3P = upload(torch.tensor([lines, slots, lengths]), self._device)
        numbers = [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params]
        numbers_P3 = upload(torch.tensor(numbers, dtype=torch.float32), self._device)
        line_P1, slot_P1, length_P1 = index_3P[:, :, None]
        repetition_P1, frequency_P1, presence_P1 = numbers_P3.T[:, :, None]
        history_PL = self._history_SL[slot_P1[:, 0], : max(lengths)].long()
        past_end_PL = torch.arange(max(lengths), device=self._device) >= length_P1
        # Padding repeats the first token; a token met twice is written twice with the same value: no harm.
        history_PL = torch.where(past_end_PL, history_PL[:, :1], history_PL)
        counts_PL = self._counts_SV[slot_P1, history_PL]
        logits_PL = logits_NV[line_P1, history_PL]
        logits_PL = torch.where(logits_PL > 0, logits_PL / repetition_P1, logits_PL * repetition_P1)
        logits_PL -= frequency_P1 * counts_PL
        logits_PL -= presence_P1 * (counts_PL > 0)
        logits_NV[line_P1, history_PL] = logits_PL

    def append(self, rows: list[int], token_ids_P: Tensor) -> None:
        """`rows[i]` has emitted `token_ids_P[i]`, which may still be unknown to the host."""
        slots = [self._slot[row] for row in rows]
        slot_P, length_P = upload(torch.tensor([slots, [self._length[slot] for slot in slots]]), self._device)
        self._history_SL[slot_P, length_P] = token_ids_P.to(torch.int32)
        self._counts_SV[slot_P, token_ids_P] += 1
        for slot in slots:
            self._length[slot] += 1

    def _grow(self) -> None:
        num_slots = len(self._length)
        num_new = max(4, num_slots)
        more_counts = self._counts_SV.new_zeros((num_new, self._counts_SV.shape[1]))
        more_history = self._history_SL.new_zeros((num_new, self._history_SL.shape[1]))
        self._counts_SV = torch.cat((self._counts_SV, more_counts))
        self._history_SL = torch.cat((self._history_SL, more_history))
        self._length += [0] * num_new
        self._params += [RowParams()] * num_new
        self._free += reversed(range(num_slots, num_slots + num_new))
