from __future__ import annotations

import pytest

from rayllm.layout import ParallelLayout


def test_one_rank_is_the_default_and_answers() -> None:
    layout = ParallelLayout()
    assert (layout.num_ranks, list(layout.ranks), layout.answering_rank) == (1, [0], 0)


def test_with_tensor_parallelism_alone_rank_0_answers_and_two_steps_are_in_flight() -> None:
    layout = ParallelLayout(tp=4)
    assert (layout.num_ranks, layout.answering_rank, layout.max_inflight_steps) == (4, 0, 2)
    assert [(layout.stage(rank), layout.tp_rank(rank)) for rank in layout.ranks] == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_with_stages_the_first_rank_of_the_last_answers_and_each_stage_holds_a_step() -> None:
    layout = ParallelLayout(tp=2, pp=3)
    assert [(layout.stage(rank), layout.tp_rank(rank)) for rank in layout.ranks] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert (layout.num_ranks, layout.answering_rank, layout.max_inflight_steps) == (6, 4, 4)


@pytest.mark.parametrize("sizes", [{"tp": 0}, {"pp": -1}])
def test_a_layout_without_ranks_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        ParallelLayout(**sizes)
