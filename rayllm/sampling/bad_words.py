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

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from rayllm.transfer.upload import Upload, Uploaded, int64_array

_NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class _Words:
    """The words of one row; int64."""

    last_W: np.ndarray
    before_K: np.ndarray
    distance_K: np.ndarray
    """How far back each of `before_K` must stand: 1 is the newest token."""
    word_K: np.ndarray
    """Whose token it is: an index into `last_W`."""

    @classmethod
    def of(cls, words: Sequence[Sequence[int]]) -> _Words:
        return cls(
            int64_array([word[-1] for word in words]),
            int64_array([token_id for word in words for token_id in word[:-1]]),
            int64_array([distance for word in words for distance in range(len(word) - 1, 0, -1)]),
            int64_array([i for i, word in enumerate(words) for _ in word[:-1]]),
        )


@dataclass(frozen=True, slots=True)
class Barred:
    """A step's lines with bad words, on their way to the device."""

    begun: list[tuple[int, Uploaded]]
    """Slot of each row that is new, and what it has emitted last."""
    slot_B: Uploaded
    lines_and_last_2W: Uploaded
    before_4K: Uploaded
    """For each token before a word's last: word, slot, how far back, token."""


class BadWordTable:
    """What rows with bad words have emitted last, and which tokens that forbids.

    Memory: an int64 for each token of the longest word, per slot, and for each token of a row's words. Time of a step:
    a dozen operations, in proportion to the words' tokens. Nothing waits for the device.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._recent_SL = torch.empty((0, 0), dtype=torch.int64, device=device)
        """The newest token last."""
        self._num_slots = self._width = 0
        """What `_recent_SL` is to be from the next step on."""
        self._words: dict[int, _Words] = {}
        self._slot: dict[int, int] = {}
        self._begun: dict[int, list[int]] = {}
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._words)

    def __contains__(self, row: int) -> bool:
        return row in self._words

    def add(self, row: int, words: Sequence[Sequence[int]], emitted: Sequence[int]) -> None:
        """The row may not write `words` (each of at least one token); it has emitted `emitted`. The device learns of it
        with the next step."""
        if not self._free:
            num_new = max(4, self._num_slots)
            self._free += reversed(range(self._num_slots, self._num_slots + num_new))
            self._num_slots += num_new
        self._width = max(self._width, *(len(word) - 1 for word in words))
        self._slot[row] = self._free.pop()
        self._begun[row] = list(emitted)
        self._words[row] = _Words.of(words)

    def remove(self, row: int) -> None:
        """Rows that are not here are ignored."""
        self._begun.pop(row, None)
        if self._words.pop(row, None) is not None:
            self._free.append(self._slot.pop(row))

    def prepare(self, upload: Upload, lines: list[int], rows: list[int]) -> Barred:
        """What `ban` and `append` need for `rows[i]` on line `lines[i]`."""
        words, slots = [self._words[row] for row in rows], [self._slot[row] for row in rows]
        num_words, num_before = [len(found.last_W) for found in words], [len(found.before_K) for found in words]
        first_words = [0, *accumulate(num_words[:-1])]
        of_words = [np.repeat(lines, num_words), np.concatenate([found.last_W for found in words])]
        before = [
            np.concatenate([found.word_K for found in words]) + np.repeat(first_words, num_before),
            np.repeat(slots, num_before),
            np.concatenate([found.distance_K for found in words]),
            np.concatenate([found.before_K for found in words]),
        ]
        begun, self._begun = self._begun, {}
        return Barred(
            [(self._slot[row], upload.add(self._recent(emitted))) for row, emitted in begun.items()],
            upload.add(int64_array(slots)),
            upload.add(np.stack(of_words)),
            upload.add(np.stack(before)),
        )

    def ban(self, logits_NV: Tensor, step: Barred) -> None:
        """A line's logit becomes -infinity where its token would complete a word of the line's row."""
        self._begin(step)
        line_W, last_W = step.lines_and_last_2W.tensor
        differing_W = self._num_differing(len(line_W), step)
        # Added, not written: two words may have one last token, and only one of them stand there.
        logits_NV.index_put_((line_W, last_W), torch.where(differing_W > 0, 0.0, -torch.inf), accumulate=True)

    def _num_differing(self, num_words: int, step: Barred) -> Tensor:
        """For each word, how many of the tokens before its last one are not what the row has emitted."""
        differing_W = torch.zeros(num_words, dtype=torch.int32, device=self._device)
        word_K, slot_K, distance_K, before_K = step.before_4K.tensor
        if len(word_K):
            emitted_K = self._recent_SL[slot_K, self._recent_SL.shape[1] - distance_K]
            differing_W.index_add_(0, word_K, (emitted_K != before_K).int())
        return differing_W

    def append(self, step: Barred, token_ids_B: Tensor) -> None:
        """The step's rows have emitted `token_ids_B`, which may still be unknown to the host."""
        if not self._recent_SL.shape[1]:
            return  # all words are single tokens
        slot_B = step.slot_B.tensor
        self._recent_SL[slot_B] = torch.cat((self._recent_SL[slot_B], token_ids_B[:, None]), 1)[:, 1:]

    def _recent(self, emitted: list[int]) -> np.ndarray:
        padded = [_NO_TOKEN] * self._width + emitted
        return int64_array(padded[len(padded) - self._width :])

    def _begin(self, step: Barred) -> None:
        num_slots, width = self._recent_SL.shape
        if (num_slots, width) != (self._num_slots, self._width):
            more = (self._width - width, 0, 0, self._num_slots - num_slots)
            self._recent_SL = pad(self._recent_SL, more, value=_NO_TOKEN)
        for slot, recent in step.begun:
            self._recent_SL[slot] = recent.tensor
