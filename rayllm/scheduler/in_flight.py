"""Step plans: under construction, and in flight at the workers."""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from operator import attrgetter

from rayllm.errors import EngineError
from rayllm.messages import RowParams, RowStart, RowTable, StepPlan, StepResult
from rayllm.request import pack_ids, unpack_ids
from rayllm.scheduler.sequence import Sequence

_row = attrgetter("row")


@dataclass(slots=True)
class PlanBuilder:
    """A plan under construction: how many tokens of which sequence it computes, out of a `budget` of tokens."""

    budget: int
    counts: dict[Sequence, int] = field(default_factory=dict)
    grown_rows: list[int] = field(default_factory=list)
    grown_groups: list[int] = field(default_factory=list)
    grown_blocks: list[int] = field(default_factory=list)
    starts: list[RowStart] = field(default_factory=list)

    def start(self, sequence: Sequence) -> None:
        """Adds a sequence that was just given its row and blocks: as much of it as the budget allows."""
        assert sequence.row is not None
        self.starts.append(
            RowStart(
                row=sequence.row,
                tokens=sequence.tokens.tobytes(),
                num_prompt_tokens=sequence.num_prompt_tokens,
                num_computed_tokens=sequence.num_computed,
                tables=[RowTable(pack_ids(table.blocks), table.first) for table in sequence.tables],
                params=RowParams.of(sequence.request.params),
                seed=sequence.request.seed,
                choice=sequence.choice,
                traceparent=sequence.request.traceparent,
            )
        )
        count = min(len(sequence.tokens) - sequence.num_computed, self.budget)
        self.counts[sequence] = count
        self.budget -= count

    def grow(self, sequence: Sequence, added: list[tuple[int, list[int]]]) -> None:
        """It was given these blocks, by KV group."""
        assert sequence.row is not None
        for group, blocks in added:
            for block in blocks:
                self.grown_rows.append(sequence.row)
                self.grown_groups.append(group)
                self.grown_blocks.append(block)

    def take_back(self, sequence: Sequence) -> None:
        """Removes a preempted sequence; its tokens return to the budget."""
        self.budget += self.counts.pop(sequence, 0)
        if sequence.row in self.grown_rows:
            kept = [i for i, row in enumerate(self.grown_rows) if row != sequence.row]
            for grown in (self.grown_rows, self.grown_groups, self.grown_blocks):
                grown[:] = [grown[i] for i in kept]


@dataclass(slots=True)
class InFlightStep:
    """A plan without a result yet, and what its result is matched with."""

    step: int
    by_row: dict[int, Sequence]
    num_samples: int
    filled: list[tuple[Sequence, int]]
    """Sequences for which the step may fill blocks, and how many tokens then have KV."""


class InFlightSteps(deque[InFlightStep]):
    """The steps without a result yet, oldest first, all of one epoch. Workers finish them in this order."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        self.num_plans = 0
        """Plans made so far, which is the number of the last one."""

    def is_in_flight(self, step: int) -> bool:
        """Whether that step, or an earlier one, has no result yet."""
        return bool(self) and self[0].step <= step

    def request_ids(self) -> set[str]:
        """Ids of the unfinished requests that these steps compute."""
        sequences = (sequence for step in self for sequence in step.by_row.values())
        return {sequence.request.request_id for sequence in sequences if sequence.finish is None}

    def launch(self, builder: PlanBuilder, freed_rows: list[int], block_size: int) -> StepPlan:
        """Finishes the plan, advances its sequences to where it brings them, and adds it to the steps in flight.
        Workers clear `freed_rows` before they start it."""
        self.num_plans += 1
        sequences = [sequence for sequence, count in builder.counts.items() if count == 1]
        sequences += [sequence for sequence, count in builder.counts.items() if count > 1]
        counts = [builder.counts[sequence] for sequence in sequences]
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
        self.append(InFlightStep(self.num_plans, dict(zip(rows, sequences)), num_samples, filled))
        return StepPlan(
            step=self.num_plans,
            epoch=self.epoch,
            finished_rows=pack_ids(freed_rows),
            new_rows=builder.starts,
            grown_rows=pack_ids(builder.grown_rows),
            grown_blocks=pack_ids(builder.grown_blocks),
            rows=pack_ids(rows),
            counts=pack_ids(counts),
            num_tokens=sum(counts),
            grown_groups=pack_ids(builder.grown_groups) if any(builder.grown_groups) else b"",
        )

    def complete(self, result: StepResult) -> tuple[InFlightStep, array[int]]:
        """Removes and returns the oldest step, which `result` belongs to, and the rows that have new tokens. Raises
        `EngineError`, and changes nothing, if the result belongs to another step."""
        if not self or (self[0].step, self.epoch) != (result.step, result.epoch):
            expected = f"step {self[0].step} of epoch {self.epoch}" if self else "none"
            raise EngineError(f"received the result of step {result.step} of epoch {result.epoch}, expected {expected}")
        step, rows = self[0], unpack_ids(result.rows)
        if len(rows) != step.num_samples:
            raise EngineError(f"step {step.step} samples {step.num_samples} tokens, but its result has {len(rows)}")
        self.popleft()
        return step, rows

    def forget(self, epoch: int) -> None:
        """Discards the steps in flight; later plans belong to `epoch`."""
        self.clear()
        self.epoch = epoch
