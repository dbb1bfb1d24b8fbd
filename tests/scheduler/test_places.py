import pytest
from scheduler.simulated_worker import make_sequence

from rayllm.scheduler.places import Places
from rayllm.scheduler.sequence import Sequence, Status

PROMPT = list(range(1, 11))  # two blocks and a half


def make_places(*, num_rows: int = 2, num_blocks: int = 6, **changes) -> Places:
    settings = {"block_size": 4, "enable_prefix_caching": True} | changes
    return Places(num_rows=num_rows, num_blocks=num_blocks, **settings)


def take(places: Places, sequence: Sequence) -> None:
    found = places.find(sequence)
    places.hold(found)
    places.take(sequence, found)


def test_a_sequence_takes_a_row_and_blocks_for_all_its_tokens_and_leaves_them():
    places, sequence = make_places(), make_sequence(PROMPT)
    take(places, sequence)
    assert (sequence.status, len(sequence.blocks), sequence.num_computed) == (Status.RUNNING, 3, 0)
    assert (places.num_free_rows, places.num_free_blocks, places.num_used_blocks) == (1, 3, 3)
    places.check([sequence])
    row = sequence.row
    places.leave(sequence)
    assert (sequence.status, sequence.row, sequence.blocks) == (Status.WAITING, None, [])
    assert (places.num_free_rows, places.num_free_blocks) == (2, 6)
    assert places.take_left_rows() == [row]
    assert places.take_left_rows() == [], "said once"
    places.check([])


def test_room_is_a_row_and_blocks():
    places = make_places(num_rows=1)
    assert places.has_room(6)
    assert not places.has_room(7)
    take(places, make_sequence([1]))
    assert not places.has_room(0), "five blocks are free, and no row"


def test_growing_gives_what_is_missing_or_changes_nothing():
    places, sequence = make_places(num_blocks=5), make_sequence(PROMPT)
    take(places, sequence)
    assert places.grow(sequence, 12) == []
    added = places.grow(sequence, 13)
    assert (len(added), sequence.blocks[3:]) == (1, added)
    assert places.grow(sequence, 21) is None
    assert len(sequence.blocks) == 4
    places.check([sequence])


def test_what_was_published_is_found_after_its_owner_has_left():
    places, first = make_places(), make_sequence(PROMPT)
    take(places, first)
    assert places.find(make_sequence([*PROMPT, 50], arrival=1)) is None, "it is being computed"
    first.num_computed = 10
    places.publish(first, 10)
    blocks = first.blocks[:2]
    places.leave(first)
    second = make_sequence([*PROMPT, 50], arrival=1)
    assert places.find(second) == blocks
    take(places, second)
    assert (second.blocks[:2], second.num_published, second.num_computed) == (blocks, 2, 8)
    assert places.num_slots_filled([second]) == 8
    places.check([second])


def test_what_is_held_is_given_to_no_one():
    places, first = make_places(num_blocks=3), make_sequence(PROMPT)
    take(places, first)
    first.num_computed = 10
    places.publish(first, 10)
    places.leave(first)
    found = places.find(make_sequence(PROMPT, arrival=1))
    places.hold(found)
    assert (places.num_free_blocks, places.has_room(2)) == (1, False)
    places.let_go(found)
    assert places.has_room(3)


def test_what_is_missing_may_be_had_from_those_who_leave():
    places, first, second = make_places(), make_sequence(PROMPT), make_sequence([9], arrival=1)
    take(places, first)
    take(places, second)
    assert not places.would_have_room(1, without=[]), "no row"
    assert places.would_have_room(5, without=[first])
    assert not places.would_have_room(6, without=[first])
    assert places.would_have_room(6, without=[first, second])


@pytest.mark.parametrize("leaves_before", [True, False])
def test_what_is_distrusted_is_found_no_more(leaves_before):
    places, first = make_places(), make_sequence(PROMPT)
    take(places, first)
    first.num_computed = 10
    places.publish(first, 10)
    if leaves_before:
        places.leave(first)
    places.distrust(first)
    if not leaves_before:
        places.leave(first)
    assert places.find(make_sequence(PROMPT, arrival=1)) == []
    places.check([])


def test_check_sees_a_lost_row():
    places = make_places()
    places._free_rows.pop()
    with pytest.raises(AssertionError, match="a row is lost"):
        places.check([])
