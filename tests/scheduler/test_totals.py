from __future__ import annotations

from scheduler.simulated_worker import make_sequence

from rayllm.scheduler.totals import SchedulerTotals


def test_a_sequence_that_ended_counts_with_what_it_had_and_might_have_had() -> None:
    totals, sequence = SchedulerTotals(), make_sequence([1, 2, 3])
    sequence.tokens.append(5)
    totals.note_end(sequence)
    totals.note_end(sequence)
    assert totals.num_ended_tokens == 2
    assert totals.num_ended_max_tokens == 2 * (sequence.max_length - 3)
