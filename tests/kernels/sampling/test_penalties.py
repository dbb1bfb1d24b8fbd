"""Penalties, by both implementations: against float64, and equal to the last bit."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from kernel_accuracy import Buffers

from rayllm_kernels.device import interpreted
from rayllm_kernels.sampling import append_to_histories, begin_histories, penalise

NUM_SLOTS, NUM_LINES, MAX_TOKENS = 5, 6, 1100


@dataclass
class Row:
    line: int
    slot: int
    prompt: list[int]
    emitted: list[int]
    numbers: tuple[float, float, float]
    """Repetition, frequency, presence."""


class Histories:
    """Slots of one implementation, which hold other rows' tokens at first."""

    def __init__(self, implementation: str, vocab_size: int, buffers: Buffers):
        self.is_triton = implementation == "triton"
        self.buffers = buffers
        self.counts_SV = buffers.inout(torch.zeros(NUM_SLOTS, vocab_size, dtype=torch.int32))
        columns = 0 if self.is_triton else MAX_TOKENS + 8
        self.history_SL = buffers.inout(torch.zeros(NUM_SLOTS, columns, dtype=torch.int32))
        self.begin([Row(0, slot, [0, vocab_size - 1], [0, 0], (1, 0, 0)) for slot in range(NUM_SLOTS)])

    def chosen(self) -> contextlib.AbstractContextManager[None]:
        return interpreted() if self.is_triton else contextlib.nullcontext()

    def begin(self, rows: list[Row]) -> None:
        tokens = [np.array(row.prompt + row.emitted, np.int32) for row in rows]
        ends = np.cumsum([len(each) for each in tokens])
        histories = [[r.slot, end - len(t), end, len(r.prompt)] for r, t, end in zip(rows, tokens, ends)]
        tokens_T = self.buffers.input(torch.from_numpy(np.concatenate(tokens)))
        histories_B4 = self.buffers.input(torch.tensor(np.array(histories)))
        with self.chosen():
            begin_histories(self.counts_SV, self.history_SL, tokens_T, histories_B4, max(map(len, tokens)))

    def penalised(self, logits_NV: torch.Tensor, rows: list[Row]) -> torch.Tensor:
        changed_NV = self.buffers.inout(logits_NV)
        numbers_P3 = self.buffers.input(torch.tensor([row.numbers for row in rows], dtype=torch.float32))
        longest = max(len(row.prompt) + len(row.emitted) for row in rows)
        lines = self.buffers.input(lines_of(rows))
        with self.chosen():
            penalise(changed_NV, self.counts_SV, self.history_SL, lines, numbers_P3, longest)
        return changed_NV

    def append(self, rows: list[Row], token_ids_N: torch.Tensor) -> None:
        lines, token_ids_N = self.buffers.input(lines_of(rows)), self.buffers.input(token_ids_N)
        with self.chosen():
            append_to_histories(self.counts_SV, self.history_SL, lines, token_ids_N)


def lines_of(rows: list[Row]) -> torch.Tensor:
    return torch.tensor([[r.line, r.slot, len(r.prompt) + len(r.emitted)] for r in rows]).T.contiguous()


def make_rows(vocab_size: int) -> list[Row]:
    """A prompt alone, a replayed row, one longer than a block with each id many times, and one of a single id."""
    generator = np.random.default_rng(vocab_size)
    many = generator.integers(0, min(vocab_size, 30), MAX_TOKENS).tolist()
    few = generator.integers(0, vocab_size, 12).tolist()
    last = vocab_size - 1
    return [
        Row(4, 1, [*few, *few], [], (1.3, 0.7, 0.4)),
        Row(0, 3, few[:4], [*few[2:], last, last, 0], (0.7, -0.3, 1.1)),
        Row(5, 0, many[:70], many[70:], (1.1, 0.013, -0.2)),
        Row(2, 4, [last], [], (3.0, 0.1, 0.1)),
    ]


def expected(logits_NV: torch.Tensor, rows: list[Row]) -> np.ndarray:
    out_NV = logits_NV.double().numpy().copy()
    for row in rows:
        repetition, frequency, presence = (float(np.float32(number)) for number in row.numbers)
        for token_id in set(row.prompt + row.emitted):
            logit, count = out_NV[row.line, token_id], row.emitted.count(token_id)
            logit = logit / repetition if logit > 0 else logit * repetition
            out_NV[row.line, token_id] = logit - frequency * count - presence * (count > 0)
    return out_NV


def some_logits(vocab_size: int) -> torch.Tensor:
    """Many of them equal, some that were ruled out, some NaN."""
    logits_NV = (torch.randn(NUM_LINES, vocab_size, generator=torch.Generator().manual_seed(1)) * 9).round() / 3
    logits_NV[4, ::5] = -torch.inf
    logits_NV[0, ::7] = torch.nan
    return logits_NV


@pytest.mark.parametrize("vocab_size", [1, 21, 2051])
def test_both_penalise_each_id_once_while_rows_emit_tokens(vocab_size: int, buffers: Buffers) -> None:
    rows, logits_NV = make_rows(vocab_size), some_logits(vocab_size)
    both = [Histories(implementation, vocab_size, buffers) for implementation in ("reference", "triton")]
    for histories in both:
        histories.begin(rows)
    for step in range(3):
        theirs, ours = (histories.penalised(logits_NV, rows) for histories in both)
        np.testing.assert_allclose(ours.numpy(), expected(logits_NV, rows), rtol=2e-6, atol=2e-6)
        assert torch.equal(ours.view(torch.int32)[~ours.isnan()], theirs.view(torch.int32)[~ours.isnan()])
        others = [1, 3]
        assert torch.equal(ours.view(torch.int32)[others], logits_NV.view(torch.int32)[others])
        token_ids_N = torch.tensor([(line * line + step // 2) % vocab_size for line in range(NUM_LINES)])
        for histories in both:
            histories.append(rows, token_ids_N)
        for row in rows:
            row.emitted.append(int(token_ids_N[row.line]))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_row_that_begins_leaves_other_slots_alone(implementation: str, buffers: Buffers) -> None:
    rows, logits_NV = make_rows(21), some_logits(21)
    histories = Histories(implementation, 21, buffers)
    histories.begin(rows)
    rows[1] = Row(0, 3, [9, 9], [8, 8, 9], (1.5, 0.25, 0.5))
    histories.begin(rows[1:2])
    found_NV = histories.penalised(logits_NV, rows).numpy()
    np.testing.assert_allclose(found_NV, expected(logits_NV, rows), rtol=2e-6, atol=2e-6)
