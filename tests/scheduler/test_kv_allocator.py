import pytest
from scheduler.simulated_worker import make_sequence, make_spans

from rayllm.scheduler.kv_allocator import KVAllocator
from rayllm.scheduler.sequence import Sequence, Status

PROMPT = list(range(1, 11))  # two blocks and a half


def make_allocator(*, num_rows: int = 2, num_blocks: int = 6, **changes) -> KVAllocator:
    settings = {"spans": make_spans(windows=(None,)), "enable_prefix_caching": True} | changes
    return KVAllocator(num_rows=num_rows, num_blocks=num_blocks, **settings)


def blocks_of(sequence: Sequence) -> list[int]:
    [table] = sequence.tables
    return table.blocks


def found_blocks(allocator: KVAllocator, sequence: Sequence) -> list[int]:
    [table] = allocator.find_cached(sequence).tables
    return table.blocks


def allocate(allocator: KVAllocator, sequence: Sequence) -> None:
    found = allocator.find_cached(sequence)
    allocator.pin(found)
    allocator.allocate(sequence, found)


def test_a_sequence_is_given_a_row_and_blocks_for_all_its_tokens_and_frees_them():
    allocator, sequence = make_allocator(), make_sequence(PROMPT)
    allocate(allocator, sequence)
    assert (sequence.status, len(blocks_of(sequence)), sequence.num_computed) == (Status.RUNNING, 3, 0)
    assert (allocator.num_free_rows, allocator.num_free_blocks, allocator.num_used_blocks) == (1, 3, 3)
    allocator.check([sequence])
    row = sequence.row
    allocator.free(sequence)
    assert (sequence.status, sequence.row, sequence.tables) == (Status.WAITING, None, [])
    assert (allocator.num_free_rows, allocator.num_free_blocks) == (2, 6)
    assert allocator.take_freed_rows() == [row]
    assert allocator.take_freed_rows() == [], "said once"
    allocator.check([])


def test_room_is_a_row_and_blocks():
    allocator = make_allocator(num_rows=1)
    assert allocator.can_allocate(6)
    assert not allocator.can_allocate(7)
    allocate(allocator, make_sequence([1]))
    assert not allocator.can_allocate(0), "five blocks are free, and no row"


def test_growing_gives_what_is_missing_or_changes_nothing():
    allocator, sequence = make_allocator(num_blocks=5), make_sequence(PROMPT)
    allocate(allocator, sequence)
    assert allocator.grow(sequence, 12) == [(0, [])]
    [(_, added)] = allocator.grow(sequence, 13)
    assert (len(added), blocks_of(sequence)[3:], sequence.num_slots) == (1, added, 16)
    assert allocator.grow(sequence, 21) is None
    assert (len(blocks_of(sequence)), sequence.num_slots) == (4, 16)
    allocator.check([sequence])


def test_what_was_published_is_found_after_its_owner_has_left():
    allocator, first = make_allocator(), make_sequence(PROMPT)
    allocate(allocator, first)
    assert allocator.find_cached(make_sequence([*PROMPT, 50], arrival=1)) is None, "it is being computed"
    first.num_computed = 10
    allocator.publish(first, 10)
    blocks = blocks_of(first)[:2]
    allocator.free(first)
    second = make_sequence([*PROMPT, 50], arrival=1)
    assert found_blocks(allocator, second) == blocks
    allocate(allocator, second)
    assert (blocks_of(second)[:2], second.num_published, second.num_computed) == (blocks, 2, 8)
    assert allocator.num_slots_filled([second]) == 8
    allocator.check([second])


def test_pinned_blocks_are_not_given_away():
    allocator, first = make_allocator(num_blocks=3), make_sequence(PROMPT)
    allocate(allocator, first)
    first.num_computed = 10
    allocator.publish(first, 10)
    allocator.free(first)
    found = allocator.find_cached(make_sequence(PROMPT, arrival=1))
    allocator.pin(found)
    assert (allocator.num_free_blocks, allocator.can_allocate(2)) == (1, False)
    allocator.unpin(found)
    assert allocator.can_allocate(3)


def test_can_allocate_without_counts_what_preempted_sequences_would_free():
    allocator, first, second = make_allocator(), make_sequence(PROMPT), make_sequence([9], arrival=1)
    allocate(allocator, first)
    allocate(allocator, second)
    assert not allocator.can_allocate_without(1, without=[]), "no row"
    assert allocator.can_allocate_without(5, without=[first])
    assert not allocator.can_allocate_without(6, without=[first])
    assert allocator.can_allocate_without(6, without=[first, second])


@pytest.mark.parametrize("freed_before", [True, False])
def test_invalidated_blocks_are_not_found(freed_before):
    allocator, first = make_allocator(), make_sequence(PROMPT)
    allocate(allocator, first)
    first.num_computed = 10
    allocator.publish(first, 10)
    if freed_before:
        allocator.free(first)
    allocator.invalidate(first)
    if not freed_before:
        allocator.free(first)
    assert found_blocks(allocator, make_sequence(PROMPT, arrival=1)) == []
    allocator.check([])


def test_check_sees_a_lost_row():
    allocator = make_allocator()
    allocator._free_rows.pop()
    with pytest.raises(AssertionError, match="a row is lost"):
        allocator.check([])


def make_windowed(*windows: int | None, num_blocks: int = 40, **changes) -> KVAllocator:
    """Steps of at most 4 tokens."""
    spans = make_spans(windows=windows, max_num_batched_tokens=4)
    return make_allocator(num_blocks=num_blocks, spans=spans, **changes)


def compute(allocator: KVAllocator, sequence: Sequence, num_tokens: int, *, publish: bool = True) -> None:
    """Grows it, and computes up to `num_tokens`."""
    assert allocator.grow(sequence, num_tokens) is not None
    sequence.num_computed = num_tokens
    if publish:
        allocator.publish(sequence, num_tokens)
    allocator.check([sequence])


def test_blocks_that_no_later_token_sees_are_freed_as_the_sequence_grows():
    allocator, sequence = make_windowed(None, 5), make_sequence(list(range(1, 65)))
    allocate(allocator, sequence)
    full, windowed = sequence.tables
    assert (len(full.blocks), len(windowed.blocks)) == (16, 3), "windows are not given what they would give back"
    for end in range(4, 65, 4):
        compute(allocator, sequence, end)
    assert (full.first, full.end) == (0, 16)
    assert (windowed.first, windowed.end) == (14, 16), "token 60 sees tokens 56 to 60"
    assert allocator.num_used_blocks == 16 + 2
    assert allocator.num_slots_filled([sequence]) == 18 * 4
    allocator.free(sequence)
    assert allocator.num_used_blocks == 0
    allocator.check([])


def test_what_a_window_has_passed_is_kept_until_it_is_published():
    allocator, sequence = make_windowed(2), make_sequence(list(range(1, 21)))
    allocate(allocator, sequence)
    compute(allocator, sequence, 4, publish=False)
    compute(allocator, sequence, 8, publish=False)
    [table] = sequence.tables
    assert table.first == 0, "its step is not committed"
    allocator.publish(sequence, 8)
    assert allocator.grow(sequence, 12) is not None
    assert table.first == 1
    without_cache, sequence = make_windowed(2, enable_prefix_caching=False), make_sequence(list(range(1, 21)))
    allocate(without_cache, sequence)
    compute(without_cache, sequence, 8, publish=False)
    assert without_cache.grow(sequence, 12) is not None
    assert sequence.tables[0].first == 1


def test_a_sequence_longer_than_the_pool_runs_in_the_blocks_of_its_window():
    allocator, sequence = make_windowed(5, num_blocks=3), make_sequence([1])
    allocate(allocator, sequence)
    for end in range(1, 100):
        compute(allocator, sequence, end)


def test_check_sees_a_block_that_was_freed_too_early():
    allocator, sequence = make_windowed(5), make_sequence(list(range(1, 21)))
    allocate(allocator, sequence)
    compute(allocator, sequence, 10)
    allocator._pool.release([sequence.tables[0].blocks.pop(0), sequence.tables[0].blocks.pop(0)])
    with pytest.raises(AssertionError, match="lacks a block that it sees"):
        allocator.check([sequence])
