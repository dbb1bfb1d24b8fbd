import pytest
from scheduler.simulated_worker import make_sequence

from rayllm.errors import EngineError
from rayllm.messages import Finish, RowTable, StepResult
from rayllm.request import pack_ids, unpack_ids
from rayllm.scheduler.in_flight import InFlightSteps, PlanBuilder
from rayllm.scheduler.sequence import BlockTable, Sequence

BLOCK_SIZE = 4


def placed(row: int, num_tokens: int, num_computed: int = 0) -> Sequence:
    sequence = make_sequence([1] * num_tokens, arrival=row)
    sequence.row, sequence.num_computed = row, num_computed
    sequence.tables = [BlockTable([10 * row, 10 * row + 1], 2), BlockTable([50 + row], 2)]
    return sequence


def result(step: int, rows: list[int], epoch: int = 0) -> StepResult:
    return StepResult(step, epoch, pack_ids(rows), pack_ids(rows), {}, {}, 0.0)


def test_a_sequence_starts_with_as_much_as_the_budget_allows():
    builder, first, second = PlanBuilder(10), placed(0, 7), placed(1, 7, num_computed=1)
    builder.start(first)
    builder.start(second)
    assert (builder.counts, builder.budget) == ({first: 7, second: 3}, 0)
    assert [(start.row, start.num_computed_tokens) for start in builder.starts] == [(0, 0), (1, 1)]
    assert builder.starts[1].tables == [RowTable(pack_ids([10, 11])), RowTable(pack_ids([51]), first=1)]


def test_what_a_preempted_sequence_was_to_get_is_taken_back():
    builder, sequence = PlanBuilder(10), placed(0, 7)
    builder.start(sequence)
    other = placed(1, 7)
    builder.grow(other, [(0, [3]), (1, [8])])
    builder.grow(sequence, [(0, [4]), (1, [])])
    builder.take_back(sequence)
    assert (builder.counts, builder.budget) == ({}, 10)
    assert (builder.grown_rows, builder.grown_groups, builder.grown_blocks) == ([1, 1], [0, 1], [3, 8])
    builder.take_back(sequence)
    assert builder.budget == 10, "of one that has nothing, nothing is taken"


def test_a_plan_moves_its_sequences_forward_and_says_single_tokens_first():
    in_flight, long, single, done = InFlightSteps(), placed(0, 9), placed(1, 4, num_computed=3), placed(2, 5)
    builder = PlanBuilder(0, counts={long: 6, single: 1, done: 5})
    builder.grow(single, [(0, [7, 8])])
    plan = in_flight.launch(builder, [5, 6], BLOCK_SIZE)
    assert list(unpack_ids(plan.rows)) == [1, 0, 2]
    assert list(unpack_ids(plan.counts)) == [1, 6, 5]
    assert list(unpack_ids(plan.finished_rows)) == [5, 6]
    assert (list(unpack_ids(plan.grown_rows)), list(unpack_ids(plan.grown_blocks))) == ([1, 1], [7, 8])
    assert plan.grown_groups == b"", "all in the first group"
    assert [sequence.num_computed for sequence in (long, single, done)] == [6, 4, 5]
    assert [sequence.num_pending for sequence in (long, single, done)] == [0, 1, 1], "where all known tokens are in it"
    assert (in_flight[0].num_samples, in_flight[0].filled) == (2, [(single, 4), (long, 6), (done, 5)])


def test_a_plan_says_which_table_grows_where_there_are_several():
    in_flight, sequence, builder = InFlightSteps(), placed(3, 9), PlanBuilder(0)
    builder.counts[sequence] = 9
    builder.grow(sequence, [(0, [7]), (1, [8, 9])])
    plan = in_flight.launch(builder, [], BLOCK_SIZE)
    growth = plan.grown_rows, plan.grown_groups, plan.grown_blocks
    assert [unpack_ids(ids).tolist() for ids in growth] == [[3, 3, 3], [0, 1, 1], [7, 8, 9]]


def test_steps_complete_in_the_order_of_their_plans():
    in_flight, sequence = InFlightSteps(), placed(0, 4)
    for _ in range(2):
        in_flight.launch(PlanBuilder(0, counts={sequence: sequence.num_tokens - sequence.num_computed}), [], BLOCK_SIZE)
    assert in_flight.num_plans == 2
    assert [in_flight.is_in_flight(step) for step in range(3)] == [False, True, True]
    with pytest.raises(EngineError, match="received the result of step 2 of epoch 0, expected step 1"):
        in_flight.complete(result(2, [0]))
    with pytest.raises(EngineError, match="step 1 samples 1 tokens, but its result has 0"):
        in_flight.complete(result(1, []))
    step, rows = in_flight.complete(result(1, [0]))
    assert (step.by_row, list(rows)) == ({0: sequence}, [0])
    assert (in_flight.is_in_flight(1), in_flight.is_in_flight(2)) == (False, True)


def test_the_requests_in_flight_are_those_that_have_not_ended():
    in_flight, first, second = InFlightSteps(), placed(0, 4), placed(1, 4)
    in_flight.launch(PlanBuilder(0, counts={first: 4, second: 4}), [], BLOCK_SIZE)
    first.finish = Finish("abort")
    assert in_flight.request_ids() == {"1"}


def test_forgotten_plans_are_answered_by_nothing_and_their_numbers_are_not_used_again():
    in_flight, sequence = InFlightSteps(), placed(0, 4)
    in_flight.launch(PlanBuilder(0, counts={sequence: 4}), [], BLOCK_SIZE)
    in_flight.forget(epoch=3)
    assert not in_flight.is_in_flight(1)
    with pytest.raises(EngineError, match="expected none"):
        in_flight.complete(result(1, [0]))
    plan = in_flight.launch(PlanBuilder(0, counts={sequence: 1}), [], BLOCK_SIZE)
    assert (plan.step, plan.epoch) == (2, 3)
