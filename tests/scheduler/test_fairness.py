from __future__ import annotations

import random
from collections import Counter

import pytest
from scheduler.simulated_worker import Engine, make_request, make_sequence

from rayllm.scheduler.fairness import FairQueue, ServiceCounters
from rayllm.scheduler.sequence import Sequence


def sequence(
    counters: ServiceCounters, arrival: int, client: str = "", priority: int = 0, num_tokens: int = 1
) -> Sequence:
    counters.enter(client)
    return make_sequence([1] * num_tokens, arrival=arrival, priority=priority, client_key=client)


def queue_of(*members: tuple[str, int]) -> tuple[FairQueue, ServiceCounters, list[Sequence]]:
    """A queue of (client, priority) in order of arrival."""
    counters = ServiceCounters()
    queue = FairQueue(counters)
    sequences = [sequence(counters, arrival, *member) for arrival, member in enumerate(members)]
    for member in sequences:
        queue.add(member)
    queue.check()
    return queue, counters, sequences


def test_with_one_client_the_order_is_priority_then_arrival():
    queue, _, members = queue_of(("a", 0), ("a", 5), ("a", 0), ("a", -1))
    assert list(queue) == list(queue.walk()) == [members[3], members[0], members[2], members[1]]


def test_the_client_that_was_served_least_goes_first_among_equal_priorities():
    queue, counters, members = queue_of(("a", 0), ("b", 0), ("c", 0), ("c", -1))
    counters.charge("a", 10)
    counters.charge("b", 5)
    counters.charge("c", 20)
    assert list(queue) == list(queue.walk()) == [members[3], members[1], members[0], members[2]]


def test_equal_service_goes_by_arrival():
    queue, _, members = queue_of(("b", 0), ("a", 0), ("b", 0))
    assert list(queue) == members


def test_a_walk_follows_the_counters_as_they_change():
    queue, counters, _ = queue_of(*[("a", 0)] * 4, *[("b", 0)] * 4)
    order = []
    for member in queue.walk():
        order.append(member.client)
        counters.charge(member.client, 1)
    assert order == ["a", "b"] * 4


def test_a_walk_goes_on_past_those_that_began_to_run_and_those_that_were_left():
    from rayllm.scheduler.sequence import Status

    queue, _, members = queue_of(*[("a", 0)] * 4)
    seen = []
    for number, member in enumerate(queue.walk()):
        seen.append(member)
        if number % 2 == 0:
            queue.remove(member)
            member.status = Status.RUNNING
    assert seen == members
    assert list(queue) == members[1::2]


def test_a_client_that_becomes_active_starts_at_the_least_served_active_one():
    counters = ServiceCounters()
    for client in "ab":
        counters.enter(client)
    counters.charge("a", 100)
    counters.charge("b", 70)
    counters.enter("new")
    assert counters["new"] == 70


def test_what_a_client_was_served_is_remembered_while_others_are_active():
    counters = ServiceCounters()
    for client in "ab":
        counters.enter(client)
    counters.charge("a", 100)
    counters.leave("a")
    counters.enter("a")
    assert counters["a"] == 100
    counters.charge("b", 500)
    counters.leave("a")
    counters.enter("a")
    assert counters["a"] == 500, "it did not ask meanwhile: no claim grows out of that"


def test_when_no_one_is_active_all_is_forgotten():
    counters = ServiceCounters()
    counters.enter("a")
    counters.charge("a", 100)
    counters.leave("a")
    counters.check([])
    counters.enter("a")
    assert counters["a"] == 0


def test_clients_that_came_once_are_not_kept_for_ever():
    counters = ServiceCounters()
    counters.enter("busy")
    for number in range(10_000):
        counters.charge("busy", 10)
        counters.enter(str(number))
        counters.charge(str(number), 5)
        counters.leave(str(number))
    assert len(counters._served) < 200


def test_removing_what_is_not_there_is_an_error():
    queue, counters, _ = queue_of(("a", 0))
    for stranger in (sequence(counters, 0, "a"), sequence(counters, 9, "nobody")):
        with pytest.raises(ValueError, match="not in the queue"):
            queue.remove(stranger)


def test_tokens_ahead_are_those_served_before_one_that_comes_now():
    counters = ServiceCounters()
    queue = FairQueue(counters)
    for arrival, (client, priority, num_tokens) in enumerate(
        [("a", 0, 100), ("a", 0, 50), ("b", 0, 1000), ("b", 1, 30), ("c", -1, 7)]
    ):
        queue.add(sequence(counters, arrival, client, priority, num_tokens))
    assert queue.num_prompt_tokens == 1187
    assert queue.num_tokens_ahead("a", 0, 10) == 7 + 150 + 160
    assert queue.num_tokens_ahead("new", 0, 10) == 7 + 10 + 10
    assert queue.num_tokens_ahead("b", 1, 10) == 7 + 150 + 1000 + 30
    assert queue.num_tokens_ahead("a", -2, 10) == 0


def served_tokens(engine: Engine) -> Counter[str]:
    served: Counter[str] = Counter()
    for member in engine.delivered:
        served[member.request.client_key] += len(engine.tokens_of(member))
    return served


def test_two_clients_get_equal_shares_whoever_came_first_and_with_more():
    engine = Engine(max_num_seqs=2, enable_prefix_caching=False)
    for number in range(60):
        engine.add(make_request(f"greedy-{number}", [1, 2, number % 9], max_tokens=6, client_key="greedy"))
    for _ in range(8):
        engine.step()
    for number in range(12):
        engine.add(make_request(f"modest-{number}", [3, 4, number % 9], max_tokens=6, client_key="modest"))
    before = served_tokens(engine)["greedy"]
    while served_tokens(engine)["modest"] < 12 * 6:
        engine.step()
    assert served_tokens(engine)["greedy"] - before <= 12 * 6 + 2 * 6
    engine.drain()


def test_a_client_with_long_prompts_gets_fewer_turns():
    engine = Engine(max_num_seqs=1, enable_prefix_caching=False, max_num_batched_tokens=64)
    for number in range(20):
        engine.add(make_request(f"long-{number}", [number % 9] * 50, max_tokens=2, client_key="long"))
        engine.add(make_request(f"short-{number}", [number % 9] * 5, max_tokens=2, client_key="short"))
    while sum(member.finish is not None for member in engine.delivered) < 12:
        engine.step()
    ended = Counter(member.request.client_key for member in engine.delivered if member.finish)
    assert ended == {"long": 2, "short": 10}
    engine.drain()


def test_recomputing_after_preemption_is_not_charged_again():
    engine = Engine(num_blocks=8, block_size=4, max_model_len=32, max_num_seqs=4, enable_prefix_caching=False)
    for number in range(3):
        engine.add(make_request(str(number), [1, 2, 3, number], max_tokens=16, client_key="a"))
    engine.add(make_request("other", [1], priority=9, max_tokens=16, client_key="b"))
    while engine.scheduler._counters._num_open.get("a"):
        service = engine.scheduler._counters["a"]
        engine.step()
    assert engine.scheduler.totals.num_preemptions > 0
    assert service <= 3 * (4 + 2 * 16)
    engine.drain()


@pytest.mark.parametrize("seed", range(5))
def test_no_client_starves_under_any_mix(seed):
    rng = random.Random(seed)
    engine = Engine(num_blocks=16, max_model_len=40, max_num_seqs=3, max_num_batched_tokens=8)
    victim = None
    for number in range(300):
        if rng.random() < 0.7:
            client = rng.choice(["a", "a", "a", "b", "c"])
            prompt = [rng.randint(1, 9) for _ in range(rng.randint(1, 20))]
            engine.add(make_request(str(number), prompt, max_tokens=rng.randint(1, 12), client_key=client))
        if number == 30:
            victim = engine.add(make_request("victim", [7] * 20, max_tokens=12, client_key="victim"))[0]
        engine.step()
    assert victim is not None
    assert victim.finish is not None, "a new client waits behind others' backlog"
    engine.drain()
