from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rayllm.messages import RowParams, RowStart, RowTable, StepPlan
from rayllm.request import pack_ids
from rayllm.runner.batch import StagedStep, StepShape, stage_step
from rayllm.runner.device_state import DeviceState
from rayllm.runner.rows import Rows
from rayllm.transfer.upload import Upload

CPU = torch.device("cpu")


@pytest.fixture
def rows() -> Rows:
    """Block size 4. Row 0: ten tokens 100.., six computed. Row 1: three tokens, one sampled here since. Row 2: five
    tokens, none computed, prompt log-probabilities wanted."""
    rows = Rows(max_rows=4, max_blocks=4, notes_changes=True)
    starts = [
        (0, list(range(100, 110)), 6, [7, 3, 5], RowParams()),
        (1, [200, 201, 202], 0, [1], RowParams()),
        (2, [300, 301, 302, 303, 304], 0, [2, 6], RowParams(prompt_logprobs=1)),
    ]
    new = [RowStart(r, pack_ids(t), len(t), c, [RowTable(pack_ids(b))], p, 0, 0) for r, t, c, b, p in starts]
    rows.apply(StepPlan(0, 0, b"", new, b"", b"", b"", b"", 0))
    rows.advance(np.array([1]), np.array([3]), np.array([1]))
    return rows


@pytest.fixture
def state() -> DeviceState:
    """Row 1's sampled token is known on the device alone."""
    state = DeviceState(4, 1, 4, CPU)
    state.last_token_M[1] = 999
    return state


def _stage(rows: Rows, counts: dict[int, int], **settings: Any) -> StagedStep:
    upload = Upload(CPU)
    row_ids, lengths = np.array(list(counts), np.int32), np.array(list(counts.values()), np.int32)
    step = stage_step(rows, row_ids, lengths, 4, upload, **settings)
    upload.send()
    return step


def test_tokens_positions_and_slots_follow_the_rows(rows: Rows, state: DeviceState) -> None:
    batch = _stage(rows, {1: 1, 0: 4, 2: 3}).batch(state)
    assert batch.token_ids_T.tolist() == [999, 106, 107, 108, 109, 300, 301, 302]
    assert batch.positions_T.tolist() == [3, 6, 7, 8, 9, 0, 1, 2]
    assert batch.slots_ST[0].tolist() == [1 * 4 + 3, 3 * 4 + 2, 3 * 4 + 3, 5 * 4, 5 * 4 + 1, 8, 9, 10]
    assert batch.query_starts == [0, 1, 5, 8]
    assert batch.kv_lens == [4, 10, 3]
    assert batch.num_decode_rows == 1
    assert batch.block_table_SRB is not None
    assert batch.block_table_SRB[0].tolist() == [[1, 0, 0], [7, 3, 5], [2, 6, 0]]
    assert batch.device_rows is None


def test_a_backend_that_reads_rows_on_the_device_gets_their_lines_and_the_tables_changes(
    rows: Rows, state: DeviceState
) -> None:
    batch = _stage(rows, {1: 1, 0: 4, 2: 3}, uses_device_rows=True).batch(state)
    lines = batch.device_rows
    assert lines is not None
    assert batch.block_table_SRB is None
    assert lines.rows_R.tolist() == [1, 0, 2]
    assert lines.query_starts_R1.tolist() == [0, 1, 5, 8]
    assert lines.kv_lens_R.tolist() == [4, 10, 3]
    assert (lines.num_decode_lines, lines.max_query_len) == (1, 4)
    assert lines.block_table_SMB[0].tolist() == [[7, 3, 5, 0], [1, 0, 0, 0], [2, 6, 0, 0], [0] * 4]
    rows.apply(StepPlan(0, 0, b"", [], pack_ids([1, 0]), pack_ids([9, 8]), b"", b"", 0))
    step = _stage(rows, {1: 1}, uses_device_rows=True)
    assert [change.array.tolist() for change in step.table_changes] == [[5, 3], [9, 8]]
    step.batch(state)
    assert state.block_table_SMB[0].tolist() == [[7, 3, 5, 8], [1, 9, 0, 0], [2, 6, 0, 0], [0] * 4]


def test_a_step_is_padded_with_tokens_and_lines_that_change_nothing(rows: Rows, state: DeviceState) -> None:
    step = _stage(rows, {1: 1}, uses_device_rows=True, rope_boundary=3, padded=lambda *sizes: StepShape(4, 4, 4))
    batch = step.batch(state)
    lines, beyond_T = batch.device_rows, batch.beyond_T
    assert lines is not None
    assert beyond_T is not None
    assert batch.token_ids_T.tolist() == [999, 0, 0, 0]
    assert batch.positions_T.tolist() == [3, 0, 0, 0]
    assert batch.slots_ST.tolist() == [[7, -1, -1, -1]]
    assert beyond_T.tolist() == [True, False, False, False]
    assert batch.logits_indices_N.tolist() == [0] * 4
    assert lines.rows_R.tolist() == [1, 0, 0, 0]
    assert lines.query_starts_R1.tolist() == [0, 1, 1, 1, 1]
    assert lines.kv_lens_R.tolist() == [4, 0, 0, 0]
    assert (lines.num_decode_lines, step.sampled_rows.tolist(), batch.num_rows) == (4, [1], 1)


def test_arrays_of_a_shape_are_at_the_same_place_in_every_step(rows: Rows) -> None:
    shape = StepShape(8, 4, 4)
    steps = [
        _stage(rows, counts, uses_device_rows=True, padded=lambda *sizes: shape)
        for counts in ({1: 1}, {1: 1, 0: 4, 2: 2})
    ]
    lines = [step.lines for step in steps]
    places = [
        [x.offset for x in (step.tokens.slots, step.logits_indices, line.rows, line.query_starts, line.kv_lens)]
        for step, line in zip(steps, lines, strict=True)
        if line is not None
    ]
    assert places[0] == places[1]
    with pytest.raises(AssertionError, match="8 do not fit a shape of 4"):
        _stage(rows, {1: 1, 0: 4, 2: 3}, uses_device_rows=True, padded=lambda *sizes: StepShape(4, 4, 4))


def test_tokens_of_rows_longer_than_the_rope_boundary_are_told_apart(rows: Rows, state: DeviceState) -> None:
    counts = {1: 1, 0: 2, 2: 2}
    assert _stage(rows, counts).batch(state).beyond_T is None
    batch = _stage(rows, counts, rope_boundary=4).batch(state)  # of 4, 10 and 5 tokens
    assert batch.beyond_T is not None
    assert batch.beyond_T.tolist() == [False, True, True, True, True]


def test_a_row_samples_when_all_its_tokens_are_computed(rows: Rows) -> None:
    step = _stage(rows, {1: 1, 0: 4, 2: 3})
    assert step.sampled_rows.tolist() == [1, 0]
    assert step.logits_indices.tensor[:2].tolist() == [0, 4]
    assert _stage(rows, {0: 3}).sampled_rows.tolist() == []


def test_prompt_logprobs_are_asked_for_every_position_that_has_a_next_prompt_token(rows: Rows) -> None:
    step = _stage(rows, {2: 3})
    [span] = step.spans
    assert (span.row, span.num_top, span.next_ids.tensor.tolist()) == (2, 1, [301, 302, 303])
    assert step.logits_indices.tensor.tolist() == [0, 1, 2]
    rows.advance(np.array([2]), np.array([3]), np.array([], np.int64))
    step = _stage(rows, {2: 2})
    assert step.spans[0].next_ids.tensor.tolist() == [304]
    assert step.logits_indices.tensor.tolist() == [1, 0]
    assert step.sampled_rows.tolist() == [2]


def test_rows_with_one_token_must_come_first(rows: Rows) -> None:
    with pytest.raises(AssertionError, match="first"):
        _stage(rows, {0: 4, 1: 1})
