"""Words that a row may not write, as token ids. State exists only for rows that have some.

A word of one token is never drawn; of a longer one the last token is not, where those before it end what the row has
emitted. So the ban is a pure function of the row's tokens.

Shapes: S slots (a slot is such a row's place here), B such lines of a batch, W words of all of them, K tokens that
stand before the last of a word, in line for all words, L tokens that are remembered, N lines, V vocabulary ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad

from rayllm.sampling.penalties import upload

_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class _Words:
    """The words of one row, on the device."""

    last_W: Tensor
    before_K: Tensor
    distance_K: Tensor
    """How far back each of `before_K` must stand: 1 is the newest token."""
    word_K: Tensor
    """Whose token it is: an index into `last_W`."""


class BadWordTable:
    """What rows with bad words have emitted last, and which tokens that forbids.

    Memory: an int64 for each token of the longest word, per slot, and for each token of a row's words. Time of a step:
    a dozen operations, in proportion to the words' tokens. Nothing waits for the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._recent_SL = torch.empty((0, 0), dtype=torch.int64, device=device)
        """The newest token last."""
        self._words: dict[int, _Words] = {}
        self._slot: dict[int, int] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, row: int) -> bool:
        return row in self._words

    def add(self, row: int, words: Sequence[Sequence[int]], emitted: Sequence[int]) -> None:
        """The row may not write `words` (each of at least one token); it has emitted `emitted`."""
        self._make_room(max(len(word) for word in words) - 1)
        slot = self._slot[row] = self._free.pop()
        width = self._recent_SL.shape[1]
        recent = [_NO_TOKEN] * width + list(emitted)
        self._recent_SL[slot] = self._ids(recent[len(recent) - width :])
        self._words[row] = _Words(
            self._ids([word[-1] for word in words]),
            self._ids([token_id for word in words for token_id in word[:-1]]),
            self._ids([distance for word in words for distance in range(len(word) - 1, 0, -1)]),
            self._ids([i for i, word in enumerate(words) for _ in word[:-1]]),
        )

    def remove(self, row: int) -> None:
        """Rows that are not here are ignored."""
        if self._words.pop(row, None) is not None:
            self._free.append(self._slot.pop(row))

    def ban(self, logits_NV: Tensor, lines: list[int], rows: list[int]) -> None:
        """`logits_NV[lines[i]]` becomes -infinity where a token would complete a word of `rows[i]`."""
        words = [self._words[row] for row in rows]
        num_words = [len(found.last_W) for found in words]
        line_W = self._repeated(lines, num_words)
        last_W = torch.cat([found.last_W for found in words])
        differs_W = self._num_differing(words, [self._slot[row] for row in rows], num_words)
        # Added, not written: two words may have one last token, and only one of them stand there.
        logits_NV.index_put_((line_W, last_W), torch.where(differs_W > 0, 0.0, -torch.inf), accumulate=True)

    def _num_differing(self, words: list[_Words], slots: list[int], num_words: list[int]) -> Tensor:
        """For each word, how many of the tokens before its last one are not what the row has emitted."""
        differing_W = torch.zeros(sum(num_words), dtype=torch.int32, device=self._device)
        num_before = [len(found.before_K) for found in words]
        if any(num_before):
            first_words = [0, *accumulate(num_words[:-1])]
            word_K = torch.cat([found.word_K for found in words]) + self._repeated(first_words, num_before)
            place_K = self._recent_SL.shape[1] - torch.cat([found.distance_K for found in words])
            emitted_K = self._recent_SL[self._repeated(slots, num_before), place_K]
            differs_K = emitted_K != torch.cat([found.before_K for found in words])
            differing_W.index_add_(0, word_K, differs_K.int())
        return differing_W

    def append(self, rows: list[int], token_ids_B: Tensor) -> None:
        """`rows[i]` has emitted `token_ids_B[i]`, which may still be unknown to the host."""
        if not self._recent_SL.shape[1]:
            return  # all words are single tokens
        slot_B = self._ids([self._slot[row] for row in rows])
        self._recent_SL[slot_B] = torch.cat((self._recent_SL[slot_B], token_ids_B[:, None]), 1)[:, 1:]

    def _make_room(self, num_before: int) -> None:
        num_slots, width = self._recent_SL.shape
        num_new = 0 if self._free else max(4, num_slots)
        num_wider = max(0, num_before - width)
        if num_new or num_wider:
            self._recent_SL = pad(self._recent_SL, (num_wider, 0, 0, num_new), value=_NO_TOKEN)
            self._free += reversed(range(num_slots, num_slots + num_new))

    def _repeated(self, values: list[int], counts: list[int]) -> Tensor:
        value_B, count_B = upload(torch.tensor([values, counts]), self._device)
        return value_B.repeat_interleave(count_B, output_size=sum(counts))

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return upload(torch.tensor(ids, dtype=torch.int64), self._device)
