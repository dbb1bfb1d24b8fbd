from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

import pytest
from simulation.world import World, run_seed

from rayllm.messages import Finish

NUM_SEEDS = 2000  # any other number: python tests/simulation --seeds N --first S
_PER_TEST = 250


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Each fault is a line of log."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@functools.cache
def _met(seed: int) -> frozenset[str]:
    """What there was in the run of a seed, which is made once: faults, and ends of requests."""
    world = run_seed(seed)
    seen = {*world.faults.log, *(["adopted"] if world.num_adopted else [])}
    for reader in world.readers:
        finishes = [deltas[-1].finish for deltas in reader.deltas.values() if deltas]
        seen.update(_word(finish) for finish in finishes if finish is not None)
    return frozenset(seen)


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, _PER_TEST))
def test_every_reader_gets_the_tokens_of_the_undisturbed_run(first: int) -> None:
    for seed in range(first, first + _PER_TEST):
        try:
            _met(seed)
        except AssertionError as error:
            raise AssertionError(
                f"seed {seed}: {error}; replay: python tests/simulation --seeds 1 --first {seed}"
            ) from error


def test_a_seed_replays_exactly() -> None:
    def story(world: World) -> object:
        return world.faults.log, world.num_steps, [(r.deltas, r.dropped, str(r.error)) for r in world.readers]

    for seed in range(40):
        assert story(run_seed(seed)) == story(run_seed(seed))


def test_the_runs_meet_every_fault_and_every_end() -> None:
    """Seeds that never broke anything would prove nothing."""
    seen = frozenset[str]().union(*map(_met, range(400)))
    driver = [
        "before a message",
        "after a message",
        "before a plan is sent",
        "after a plan is sent",
        "before a result",
        "after a result",
        "during recovery",
        "before a frame is sent",
        "in the middle of a frame",
        "after a frame is sent",
    ]
    worker = ["before a plan", "during a plan", "before a result", "by a hang", "after a result", "while idle"]
    worker += ["by NaN in one row"]
    ends = ["length", "stop", "overloaded", "deadline_exceeded", "poison_request", "ingress 0 lost", "ingress 1 lost"]
    ends += ["invalid_logits", "adopted", "complete", "connection lost"]
    wanted = {f"driver killed {place}" for place in driver} | {f"worker broken {place}" for place in worker} | {*ends}
    assert seen - {"abort"} == wanted | {"worker broken for good, in its replacement"}


def _word(finish: Finish) -> str:
    return "complete" if finish.is_complete else str(finish.code or finish.reason)
