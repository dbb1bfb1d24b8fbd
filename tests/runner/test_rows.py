from __future__ import annotations

import numpy as np

from rayllm.messages import RowParams, RowStart, RowTable, StepPlan
from rayllm.request import pack_ids
from rayllm.runner.rows import Rows


def _start(row: int, tokens: list[int], blocks: list[int], num_computed: int = 0, **params: int) -> RowStart:
    sampling = RowParams(**params)  # type: ignore[arg-type]
    return RowStart(row, pack_ids(tokens), len(tokens), num_computed, [RowTable(pack_ids(blocks))], sampling, 0, 0)


def _plan(
    finished: list[int] = [],  # noqa: B006 (read only)
    new: list[RowStart] = [],  # noqa: B006
    grown: list[tuple[int, int]] = [],  # noqa: B006
) -> StepPlan:
    rows, blocks = [row for row, _ in grown], [block for _, block in grown]
    return StepPlan(0, 0, pack_ids(finished), new, pack_ids(rows), pack_ids(blocks), b"", b"", 0)


def _rows() -> Rows:
    return Rows(max_rows=3, max_blocks=4)


def test_a_row_begins_with_its_tokens_blocks_and_what_is_computed() -> None:
    rows = _rows()
    rows.apply(_plan(new=[_start(2, [7, 8, 9], [5, 1], num_computed=2)]))
    assert (rows.num_tokens[2], rows.num_computed[2], rows.num_blocks[0, 2]) == (3, 2, 2)
    assert rows.block_table[0, 2, :2].tolist() == [5, 1]
    assert rows.start_tokens(2, 1, 3).tolist() == [8, 9]


def test_blocks_are_appended_in_order() -> None:
    rows = _rows()
    rows.apply(_plan(new=[_start(0, [1], [3]), _start(1, [1], [4])]))
    rows.apply(_plan(grown=[(1, 9), (0, 6), (1, 8)]))
    assert rows.block_table[0, 0, :2].tolist() == [3, 6]
    assert rows.block_table[0, 1, :3].tolist() == [4, 9, 8]


def test_a_row_can_end_and_begin_anew_in_one_plan() -> None:
    rows = _rows()
    rows.apply(_plan(new=[_start(0, [1, 2, 3, 4], [3, 2, 1], prompt_logprobs=2)]))
    assert rows.prompt_logprobs_wanted(0) == (2, 4)
    rows.apply(_plan(finished=[0], new=[_start(0, [9], [7])], grown=[(0, 5)]))
    assert rows.num_tokens[0] == 1
    assert rows.block_table[0, 0, :2].tolist() == [7, 5]
    assert rows.prompt_logprobs_wanted(0) is None


def test_a_step_advances_what_is_computed_and_what_is_known() -> None:
    rows = _rows()
    rows.apply(_plan(new=[_start(0, [1, 2, 3], [0]), _start(1, [1, 2, 3], [1])]))
    rows.advance(np.array([0, 1]), np.array([3, 2]), np.array([0]))
    assert rows.num_computed.tolist() == [3, 2, 0]
    assert rows.num_tokens.tolist() == [4, 3, 0]


def test_each_kv_group_has_a_table_which_may_begin_late():
    rows = Rows(max_rows=3, max_blocks=4, no_block=99, num_kv_groups=2)
    tables = [RowTable(pack_ids([5, 6, 7])), RowTable(pack_ids([8]), first=1)]
    start = RowStart(1, pack_ids([1] * 9), 9, 8, tables, RowParams(), 0, 0)
    grown = [(1, 1, 3), (1, 0, 4), (1, 1, 2)]
    plan = StepPlan(
        0,
        0,
        b"",
        [start],
        *(pack_ids(row for row, _, _ in grown), pack_ids(b for _, _, b in grown)),
        b"",
        b"",
        0,
        grown_groups=pack_ids(group for _, group, _ in grown),
    )
    rows.apply(plan)
    assert rows.block_table[:, 1].tolist() == [[5, 6, 7, 4], [99, 8, 3, 2]]
    assert rows.num_blocks[:, 1].tolist() == [4, 4]
    assert rows.blocks(1) == {5, 6, 7, 4, 99, 8, 3, 2}


def test_changes_of_the_tables_are_noted_once_and_lead_from_one_table_to_the_next() -> None:
    rows = Rows(max_rows=3, max_blocks=4, num_kv_groups=2, notes_changes=True)
    copy = rows.block_table.copy()
    tables = [RowTable(pack_ids([5, 6])), RowTable(pack_ids([8]), first=1)]
    start = RowStart(1, pack_ids([1] * 5), 5, 4, tables, RowParams(), 0, 0)
    grown = {"grown_rows": pack_ids([1, 1]), "grown_blocks": pack_ids([3, 4]), "grown_groups": pack_ids([1, 0])}
    rows.apply(StepPlan(0, 0, b"", [start], rows=b"", counts=b"", num_tokens=0, **grown))
    indices, blocks = rows.take_changes()
    assert len(set(indices.tolist())) == len(indices)
    copy.reshape(-1)[indices] = blocks
    assert copy[0, 1, :3].tolist() == [5, 6, 4]
    assert copy[1, 1, 1:3].tolist() == [8, 3]
    assert [len(x) for x in rows.take_changes()] == [0, 0]
