from __future__ import annotations

import numpy as np
import pytest
import torch

from rayllm.messages import RowParams, RowStart, RowTable, StepPlan
from rayllm.request import pack_ids
from rayllm.runner.batch import StepInput, build_step
from rayllm.runner.rows import Rows

CPU = torch.device("cpu")


@pytest.fixture
def rows() -> Rows:
    """Block size 4. Row 0: ten tokens 100.., six computed. Row 1: three tokens, one sampled here since. Row 2: five
    tokens, none computed, prompt log-probabilities wanted."""
    rows = Rows(max_rows=4, max_blocks=4, device=CPU)
    starts = [
        (0, list(range(100, 110)), 6, [7, 3, 5], RowParams()),
        (1, [200, 201, 202], 0, [1], RowParams()),
        (2, [300, 301, 302, 303, 304], 0, [2, 6], RowParams(prompt_logprobs=1)),
    ]
    new = [RowStart(r, pack_ids(t), len(t), c, [RowTable(pack_ids(b))], p, 0, 0) for r, t, c, b, p in starts]
    rows.apply(StepPlan(0, 0, b"", new, b"", b"", b"", b"", 0))
    rows.advance(np.array([1]), np.array([3]), np.array([1]))
    rows.last_token_R[1] = 999
    return rows


def _build(rows: Rows, counts: dict[int, int]) -> StepInput:
    return build_step(rows, np.array(list(counts), np.int32), np.array(list(counts.values()), np.int32), 4, CPU)


def test_tokens_positions_and_slots_follow_the_rows(rows: Rows) -> None:
    batch = _build(rows, {1: 1, 0: 4, 2: 3}).batch
    assert batch.token_ids_T.tolist() == [999, 106, 107, 108, 109, 300, 301, 302]
    assert batch.positions_T.tolist() == [3, 6, 7, 8, 9, 0, 1, 2]
    assert batch.slots_ST[0].tolist() == [1 * 4 + 3, 3 * 4 + 2, 3 * 4 + 3, 5 * 4, 5 * 4 + 1, 8, 9, 10]
    assert batch.query_starts == [0, 1, 5, 8]
    assert batch.kv_lens == [4, 10, 3]
    assert batch.num_decode_rows == 1
    assert batch.block_table_SRB[0].tolist() == [[1, 0, 0], [7, 3, 5], [2, 6, 0]]


def test_tokens_of_rows_longer_than_the_rope_boundary_are_told_apart(rows: Rows) -> None:
    ids, counts = np.array([1, 0, 2], np.int32), np.array([1, 2, 2], np.int32)
    assert build_step(rows, ids, counts, 4, CPU).batch.beyond_T is None
    batch = build_step(rows, ids, counts, 4, CPU, rope_boundary=4).batch  # of 4, 10 and 5 tokens
    assert batch.beyond_T is not None
    assert batch.beyond_T.tolist() == [False, True, True, True, True]


def test_a_row_samples_when_all_its_tokens_are_computed(rows: Rows) -> None:
    step = _build(rows, {1: 1, 0: 4, 2: 3})
    assert step.sampled_rows.tolist() == [1, 0]
    assert step.batch.logits_indices_N[:2].tolist() == [0, 4]
    assert _build(rows, {0: 3}).sampled_rows.tolist() == []


def test_prompt_logprobs_are_asked_for_every_position_that_has_a_next_prompt_token(rows: Rows) -> None:
    step = _build(rows, {2: 3})
    [span] = step.spans
    assert (span.row, span.num_top, span.next_ids.tolist()) == (2, 1, [301, 302, 303])
    assert step.batch.logits_indices_N.tolist() == [0, 1, 2]
    rows.advance(np.array([2]), np.array([3]), np.array([], np.int64))
    step = _build(rows, {2: 2})
    assert step.spans[0].next_ids.tolist() == [304]
    assert step.batch.logits_indices_N.tolist() == [1, 0]
    assert step.sampled_rows.tolist() == [2]


def test_rows_with_one_token_must_come_first(rows: Rows) -> None:
    with pytest.raises(AssertionError, match="first"):
        _build(rows, {0: 4, 1: 1})
