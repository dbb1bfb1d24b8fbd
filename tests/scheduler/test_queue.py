import pytest
from scheduler.simulated_worker import make_sequence

from rayllm.scheduler.queue import ServiceQueue
from rayllm.scheduler.sequence import Sequence


def sequence(arrival: int, priority: int = 0) -> Sequence:
    return make_sequence([1], arrival=arrival, priority=priority)


def test_order_is_priority_then_arrival_whatever_the_order_of_adding():
    queue = ServiceQueue()
    for arrival, priority in [(3, 0), (1, 5), (2, 0), (0, 5), (4, -1)]:
        queue.add(sequence(arrival, priority))
    assert [s.order for s in queue] == [(-1, 4), (0, 2), (0, 3), (5, 0), (5, 1)]
    queue.check()


def test_a_removed_sequence_finds_its_place_again():
    queue, members = ServiceQueue(), [sequence(i) for i in range(5)]
    for member in members:
        queue.add(member)
    queue.remove(members[2])
    assert list(queue) == members[:2] + members[3:]
    queue.add(members[2])
    assert list(queue) == members


def test_removing_what_is_not_there_is_an_error():
    queue = ServiceQueue()
    queue.add(sequence(1))
    for stranger in (sequence(1), sequence(7)):
        with pytest.raises(ValueError, match="not in the queue"):
            queue.remove(stranger)
    assert len(queue) == 1


def test_those_of_lower_priority_stand_at_the_end():
    queue, members = ServiceQueue(), [sequence(0, -1), sequence(1, 0), sequence(2, 0), sequence(3, 5)]
    for member in members:
        queue.add(member)
    assert queue.lower_than(-2) == members
    assert queue.lower_than(-1) == members[1:]
    assert queue.lower_than(0) == members[3:]
    assert queue.lower_than(5) == []


def test_check_sees_disorder():
    queue = ServiceQueue()
    queue.extend([sequence(2), sequence(1)])
    with pytest.raises(AssertionError, match="out of order"):
        queue.check()
