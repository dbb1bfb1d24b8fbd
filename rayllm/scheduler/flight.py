"""Plans on their way: in the making, and out at the workers."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from rayllm.errors import EngineError
from rayllm.messages import RowStart, StepPlan, StepResult
from rayllm.request import pack_ids, unpack_ids
from rayllm.scheduler.sequence import Sequence

_row = attrgetter("row")


@dataclass(slots=True)
class Draft:
    """A plan in the making: how many tokens of which sequence it computes, out of a `budget` of tokens."""

    budget: int
    counts: dict[Sequence, int] = field(default_factory=dict)
    grown: dict[Sequence, list[int]] = field(default_factory=dict)
    starts: list[RowStart] = field(default_factory=list)

    def start(self, sequence: Sequence) -> None:
        """It has just taken its place; as much of it is computed as the budget still allows."""
        assert sequence.row is not None
        self.starts.append(
            RowStart(
                row=sequence.row,
                tokens=sequence.tokens.tobytes(),
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_computed_tokens=sequence.num_computed,
                blocks=pack_ids(sequence.blocks),
                params=sequence.request.params,
                seed=sequence.request.seed,
                choice=sequence.choice,
                traceparent=sequence.request.traceparent,
            )
        )
        count = min(len(sequence.tokens) - sequence.num_computed, self.budget)
        self.counts[sequence] = count
        self.budget -= count

    def take_back(self, sequence: Sequence) -> None:
        """It is preempted: the budget has its tokens again."""
        self.budget += self.counts.pop(sequence, 0)
        self.grown.pop(sequence, None)


@dataclass(slots=True)
class Flight:
    """A plan that is out: what its result will be matched with."""

    step: int
    by_row: dict[int, Sequence]
    num_samples: int
    filled: list[tuple[Sequence, int]]
    """Sequences for which the step may fill blocks, and how many tokens then have KV."""


class Flights(deque[Flight]):
    """The plans that are out, in the order in which they were made and are answered, all of one epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        self.num_plans = 0
        """All that were ever made; the last one's number."""

    def is_out(self, step: int) -> bool:
        """Whether that plan's result has not come."""
        return bool(self) and self[0].step <= step

    def request_ids(self) -> set[str]:
        """Of the unfinished requests that they compute."""
        sequences = (sequence for flight in self for sequence in flight.by_row.values())
        return {sequence.request.request_id for sequence in sequences if sequence.finish is None}

    def send(self, draft: Draft, left_rows: list[int], block_size: int) -> StepPlan:
        """Turns the draft into a plan and moves its sequences forward, to where it brings them. Workers forget the rows
        that were left before they begin with it."""
        self.num_plans += 1
        sequences = [sequence for sequence, count in draft.counts.items() if count == 1]
        sequences += [sequence for sequence, count in draft.counts.items() if count > 1]
        counts = [draft.counts[sequence] for sequence in sequences]
        num_samples = 0
        filled = []
        for sequence, count in zip(sequences, counts):
            end = sequence.num_computed = sequence.num_computed + count
            if end == len(sequence.tokens) + sequence.num_pending:
                sequence.num_pending += 1
                num_samples += 1
            if count > 1 or end % block_size == 0:
                filled.append((sequence, end))
        rows = list(map(_row, sequences))
        self.append(Flight(self.num_plans, dict(zip(rows, sequences)), num_samples, filled))
        return StepPlan(
            step=self.num_plans,
            epoch=self.epoch,
            finished_rows=pack_ids(left_rows),
            new_rows=draft.starts,
            grown_rows=pack_ids(_row(sequence) for sequence, blocks in draft.grown.items() for _ in blocks),
            grown_blocks=pack_ids(block for blocks in draft.grown.values() for block in blocks),
            rows=pack_ids(rows),
            counts=pack_ids(counts),
        )

    def land(self, result: StepResult) -> tuple[Flight, array[int]]:
        """The oldest plan, which `result` answers and which is out no longer, and the rows that tokens came for.
        `EngineError`, and nothing changed, where the result is not the answer to that plan."""
        if not self or (self[0].step, self.epoch) != (result.step, result.epoch):
            expected = f"step {self[0].step} of epoch {self.epoch}" if self else "none"
            raise EngineError(f"result of step {result.step} of epoch {result.epoch} came, expected {expected}")
        flight, rows = self[0], unpack_ids(result.rows)
        if len(rows) != flight.num_samples:
            raise EngineError(f"step {flight.step} samples {flight.num_samples} tokens, but {len(rows)} came")
        self.popleft()
        return flight, rows

    def forget(self, epoch: int) -> None:
        """No result will come; the plans to come are of another epoch."""
        self.clear()
        self.epoch = epoch
