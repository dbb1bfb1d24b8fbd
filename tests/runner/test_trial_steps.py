from __future__ import annotations

import pytest

from rayllm.request import unpack_ids
from rayllm.runner.trial_steps import EVERY_RULE, end_of, largest_counts, next_token_of, step_of_new_rows


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "max_num_seqs", "max_model_len", "counts"),
    [
        (64, 4, 1000, [1, 1, 1, 61]),
        (64, 4, 40, [1, 1, 22, 40]),
        (64, 4, 10, [10, 10, 10, 10]),  # more tokens than the rows can have
        (3, 8, 1000, [1, 1, 1]),
        (5, 1, 1000, [5]),
    ],
)
def test_the_largest_step_has_all_rows_and_as_many_tokens_as_they_can_have(
    max_num_batched_tokens: int, max_num_seqs: int, max_model_len: int, counts: list[int]
) -> None:
    assert largest_counts(max_num_batched_tokens, max_num_seqs, max_model_len) == counts


def test_new_rows_have_blocks_for_what_they_compute_and_the_room_asked_for() -> None:
    plan = step_of_new_rows([1, 7], 4, 2, EVERY_RULE, num_computed=8, room=1)
    assert (list(unpack_ids(plan.rows)), list(unpack_ids(plan.counts)), plan.num_tokens) == ([0, 1], [1, 7], 8)
    for start, num_tokens, num_blocks in zip(plan.new_rows, (9, 15), (3, 4), strict=True):
        assert (len(unpack_ids(start.tokens)), start.num_prompt_tokens, start.num_computed_tokens) == (
            num_tokens,
            num_tokens,
            8,
        )
        assert [list(unpack_ids(table.blocks)) for table in start.tables] == [[0] * num_blocks] * 2
    assert list(unpack_ids(next_token_of(2).counts)) == [1, 1]
    assert list(unpack_ids(end_of(2).finished_rows)) == [0, 1]
