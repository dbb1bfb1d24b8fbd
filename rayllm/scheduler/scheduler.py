"""What each step computes, and what its result means. Plain Python, one thread, no clock.

There is no prefill and no decode: a running sequence has tokens that the workers know and KV for some of
them, and each step lets it *catch up* as far as one budget of tokens allows. A new prompt, the rest of a long
one, the token sampled last, a prefix found in the cache, recomputing after preemption and replay after a
fault are this one rule.

**Steps may be in flight**, two where workers are processes of their own. Step n+1 is planned while n runs. A sequence
that n samples for has then one token more than the driver has seen; the worker holds it, so n+1 can compute it.
Known lengths are never planned past; a stop token is seen only at commit, and what n+1 sampled after it is dropped at
its own commit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from collections.abc import Sequence as SequenceOf

from rayllm.kv_layout import KVSpan, check_holds
from rayllm.layout import ParallelLayout
from rayllm.messages import Finish, StepPlan, StepResult, TokenLogprobs
from rayllm.request import Request, unpack_ids
from rayllm.scheduler.fairness import OUTPUT_WEIGHT, PROMPT_WEIGHT, FairQueue, ServiceCounters
from rayllm.scheduler.in_flight import InFlightSteps, PlanBuilder
from rayllm.scheduler.kv_allocator import KVAllocator
from rayllm.scheduler.prefix_cache import CachedPrefix
from rayllm.scheduler.quarantine import Quarantine
from rayllm.scheduler.queue import ServiceQueue
from rayllm.scheduler.sequence import Sequence, SequenceUpdate, Status
from rayllm.scheduler.totals import SchedulerTotals

_INVALID_LOGITS = (
    "the model's logits for this request hold NaN or infinity, so no token can be drawn; check the weights and the "
    "dtype (float16 overflows where bfloat16 does not)"
)


class Scheduler:
    """Plans steps for the sequences it is given and commits their results, oldest first.

    Raises `ConfigError` where `num_blocks` cannot hold one sequence of `max_model_len`: so the sequence that
    is first in order of service can always go on, and everything ends.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        kv_spans: SequenceOf[KVSpan],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        enable_prefix_caching: bool,
        eos_token_ids: Collection[int],
        max_inflight_steps: int = ParallelLayout().max_inflight_steps,
        rope_boundary: int | None = None,
    ):
        check_holds(kv_spans, num_blocks, max_model_len)
        self._num_blocks = num_blocks
        self._kv_spans = kv_spans
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._enable_prefix_caching = enable_prefix_caching
        self._eos_token_ids = eos_token_ids
        self._max_inflight_steps = max_inflight_steps
        self._rope_boundary = rope_boundary

        self.totals = SchedulerTotals()
        self._num_arrivals = 0
        self.quarantine = Quarantine()
        self._requests: dict[str, list[Sequence]] = {}  # with their unfinished sequences
        self._running = ServiceQueue()
        self._counters = ServiceCounters()
        self.waiting = FairQueue(self._counters)
        """Read-only for others."""
        self._started: list[Sequence] = []
        self._in_flight = InFlightSteps()
        self._allocator = self._new_allocator()

    def _new_allocator(self) -> KVAllocator:
        return KVAllocator(
            num_rows=self._max_num_seqs,
            num_blocks=self._num_blocks,
            spans=self._kv_spans,
            enable_prefix_caching=self._enable_prefix_caching,
        )

    # ------------------------------------------------------------------------------------------ what is there

    @property
    def has_work(self) -> bool:
        return bool(self._running or self.waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting)

    @property
    def num_tokens_left(self) -> int:
        """Tokens that what runs may have yet."""
        return sum(max(0, sequence.max_length - len(sequence.tokens)) for sequence in self._running)

    @property
    def num_computed_tokens(self) -> int:
        """Tokens of what runs whose KV is computed, or planned to be."""
        return sum(sequence.num_computed for sequence in self._running)

    @property
    def num_plans(self) -> int:
        """All that were ever made."""
        return self._in_flight.num_plans

    @property
    def num_free_rows(self) -> int:
        """Sequences that could begin at once, as far as rows go."""
        return self._allocator.num_free_rows

    @property
    def num_free_slots(self) -> int:
        """Tokens for which KV could be computed at once, whatever windows let go of."""
        return self._allocator.num_free_blocks // len(self._kv_spans) * self._allocator.block_size

    @property
    def num_uncommitted(self) -> int:
        """Plans whose result has not come."""
        return len(self._in_flight)

    def planned_requests(self) -> set[str]:
        """Ids of the unfinished requests that the plans still out compute: what workers may have failed over."""
        return self._in_flight.request_ids()

    @property
    def num_blocks(self) -> int:
        return self._num_blocks

    @property
    def num_blocks_used(self) -> int:
        """Blocks that running sequences own; cached ones without an owner are not counted."""
        return self._allocator.num_used_blocks

    @property
    def num_slots_filled(self) -> int:
        """Slots with KV (planned or computed) in the used blocks. Takes time proportional to the running sequences."""
        return self._allocator.num_slots_filled(self._running)

    # ----------------------------------------------------------------------------------- requests come and go

    def add(self, request: Request) -> list[Sequence]:
        """Queues the request's `params.n` sequences, choice 0 first.

        A replayed choice that had come to its end already is returned with `finish` set, and is not run.
        The request is one that `engine.driver.admission` lets in, and its id is no open request's.
        """
        assert 0 < len(request.prompt) // 4 < self._max_model_len, "the prompt is empty, or leaves no room for a token"
        assert request.request_id not in self._requests, f"request_id={request.request_id!r} is in use"
        prompt_hashes: list[bytes] = []
        sequences = [
            Sequence(
                request,
                choice,
                arrival=self._num_arrivals + choice,
                max_model_len=self._max_model_len,
                eos_token_ids=self._eos_token_ids,
                prompt_hashes=prompt_hashes,
            )
            for choice in range(request.params.n)
        ]
        self._num_arrivals += len(sequences)
        self._requests[request.request_id] = list(sequences)
        for sequence in sequences:
            self._counters.enter(sequence.client)
            self.waiting.add(sequence)
            if finish := sequence.finish_reason():
                self._end(sequence, finish)
        return sequences

    def abort(self, request_id: str) -> list[Sequence]:
        """Ends the request's unfinished sequences and frees their KV, at any stage. An unknown id gives
        []."""
        sequences = list(self._requests.get(request_id, ()))
        for sequence in sequences:
            self.abort_sequence(sequence)
        return sequences

    def reset_prefix_cache(self) -> None:
        """Requests that come after share nothing with those that came before."""
        self._allocator.reset_prefix_cache()

    def abort_sequence(self, sequence: Sequence) -> None:
        """Ends this choice alone, its siblings go on. Nothing happens where it has finished."""
        if sequence.finish is None:
            self._end(sequence, Finish("abort"))

    def _end(self, sequence: Sequence, finish: Finish) -> None:
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
            self._allocator.free(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.status = Status.FINISHED
        sequence.finish = finish
        self._counters.leave(sequence.client)
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]

    # ----------------------------------------------------------------------------------------------- planning

    def plan(self) -> StepPlan | None:
        """The next step; None where nothing can run now: no work, `max_inflight_steps` are in flight, or all sequences
        wait for one of these."""
        if len(self._in_flight) >= self._max_inflight_steps:
            return None
        if self._rope_boundary is not None:
            self._restart_crossed(self._rope_boundary)
        builder = PlanBuilder(self._max_num_batched_tokens)
        self._plan_running(builder)
        self._plan_waiting(builder)
        self.totals.num_slack_plans += not len(self.waiting)
        if not builder.counts:
            return None
        return self._in_flight.launch(builder, self._allocator.take_freed_rows(), self._allocator.block_size)

    def take_started(self) -> list[Sequence]:
        """Those that came into a plan for the first time, since this was last asked."""
        started, self._started = self._started, []
        return started

    def _plan_running(self, builder: PlanBuilder) -> None:
        """In order of service. However long a prompt, one token is left for each sequence behind it."""
        counts, budget = builder.counts, builder.budget
        spare = max(0, budget - len(self._running))
        for sequence in self._running:  # the preempted leave from the end, so the walk stays sound
            num_tokens = len(sequence.tokens) + sequence.num_pending
            if num_tokens >= sequence.max_length:
                continue  # all it may have is sampled
            num_computed = sequence.num_computed
            count = num_tokens - num_computed
            if count > 1:
                count = min(count, 1 + spare)
                spare -= count - 1
            end = num_computed + count
            if end > sequence.num_slots and not self._grow(sequence, end, builder):
                break
            counts[sequence] = count
            budget -= count
            if not budget:
                break
        builder.budget = budget

    def _grow(self, sequence: Sequence, num_tokens: int, builder: PlanBuilder) -> bool:
        """Gives `sequence` blocks for its first `num_tokens`; the last in order are preempted where none is
        free. False where that came to be `sequence` itself."""
        while (added := self._allocator.grow(sequence, num_tokens)) is None:
            if self._preempt_last(builder) is sequence:
                return False
        builder.grow(sequence, added)
        return True

    def _preempt_last(self, builder: PlanBuilder) -> Sequence:
        """The last running sequence waits again, in its place of order; what it had planned is taken back."""
        sequence = self._running.pop()
        builder.take_back(sequence)
        self._wait_again(sequence)
        self.totals.num_preemptions += 1
        return sequence

    def _restart_crossed(self, rope_boundary: int) -> None:
        """The KV of a sequence that has grown past the boundary is worth nothing: it is computed from its first token
        on, by the rotary embedding of long sequences (`RopeSpec.beyond`)."""
        for sequence in [sequence for sequence in self._running if sequence.has_crossed(rope_boundary)]:
            self._running.remove(sequence)
            sequence.goes_first = True
            self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        self._allocator.free(sequence)
        sequence.resume_after = self._in_flight.num_plans
        self.waiting.add(sequence)

    def _plan_waiting(self, builder: PlanBuilder) -> None:
        """Admits in strict order. Only those that wait for a prefix being computed are passed over, and only
        so many: a long queue must not make a plan slow."""
        num_deferred = 0
        for sequence in self.waiting.walk():
            if not builder.budget or num_deferred == self._max_num_seqs or not self._may_run(sequence):
                return
            if self._rope_boundary is not None:
                sequence.choose_rope(self._rope_boundary)
            waits = self.quarantine.holds_back(sequence, self._running)
            prefix = None if waits else self._allocator.find_cached(sequence)
            if prefix is None:
                num_deferred += 1
            elif not self._admit(sequence, prefix, builder):
                return

    def _may_run(self, sequence: Sequence) -> bool:
        """Whether to try at all: quick, so that a full engine spends no time on those that wait."""
        if self._in_flight.is_in_flight(sequence.resume_after):
            return False  # its tokens are not all known yet
        if not self._running or self._running[-1].priority > sequence.priority:
            return True
        num_to_grow = self._allocator.num_blocks_to_grow(len(self._running))
        return self._allocator.can_allocate(sequence.num_blocks_missing + num_to_grow)

    def _admit(self, sequence: Sequence, prefix: CachedPrefix, builder: PlanBuilder) -> bool:
        """Starts it where there is room for all its tokens, so that it is not cut off half-way."""
        self._allocator.pin(prefix)
        if not self._make_room(sequence, self._allocator.num_blocks_beside(prefix, sequence), builder):
            self._allocator.unpin(prefix)
            return False
        self._allocator.allocate(sequence, prefix)
        self._note_start(sequence)
        self.waiting.remove(sequence)
        self._running.add(sequence)
        builder.start(sequence)
        return True

    def _make_room(self, sequence: Sequence, num_blocks: int, builder: PlanBuilder) -> bool:
        """Whether there is a row for it, and `num_blocks` besides those the running ones will soon grow into.
        Sequences of lower priority are preempted for it, but only if that is enough."""
        lower = self._running.lower_than(sequence.priority)
        sequence.num_blocks_missing = num_blocks
        wanted = num_blocks + self._allocator.num_blocks_to_grow(len(self._running) - len(lower))
        if not self._allocator.can_allocate_without(wanted, without=lower):
            return False
        while not self._allocator.can_allocate(wanted):
            self._preempt_last(builder)
        return True

    def _note_start(self, sequence: Sequence) -> None:
        sequence.goes_first = False
        if not sequence.charged:
            sequence.charged = True
            self._counters.charge(sequence.client, PROMPT_WEIGHT * (len(sequence.tokens) - sequence.num_computed))
            self.waiting.note_start(sequence)
            self.totals.num_started_tokens += sequence.num_prompt_tokens
            self._started.append(sequence)
        if sequence.prompt_logprobs is not None:
            sequence.prompt_logprobs.clear()  # computed anew, from the first position
        elif self._enable_prefix_caching and sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(sequence.num_computed, sequence.num_prompt_tokens)
            self.totals.prefix_queries += sequence.num_prompt_tokens
            self.totals.prefix_hits += sequence.num_cached_tokens

    # --------------------------------------------------------------------------------------------- committing

    def commit(self, result: StepResult) -> list[SequenceUpdate]:
        """Takes the result of the oldest plan that is out: what each of its sequences gained.

        Nothing is said of sequences that ended after the plan was made. `EngineError` where the result is not
        the answer to that plan.
        """
        step, rows = self._in_flight.complete(result)
        updates = self._end_invalid(step.by_row[row] for row in unpack_ids(result.invalid_rows))
        if self._enable_prefix_caching:
            for sequence, end in step.filled:
                if sequence.status is Status.RUNNING:  # since that plan: see `resume_after`
                    self._allocator.publish(sequence, end)
        for row, prompt_logprobs in result.prompt_logprobs.items():
            sequence = step.by_row[row]
            if sequence.prompt_logprobs is not None:
                sequence.prompt_logprobs += prompt_logprobs
        if result.counts or result.ends or result.logprobs:
            for row, token_ids in zip(rows, result.tokens()):
                sequence = step.by_row[row]
                if sequence.finish is None:
                    reported = result.ends.get(row) if result.ends else None
                    logprobs = result.logprobs.get(row) if result.logprobs else None
                    updates.append(self._append(sequence, token_ids, logprobs, reported))
        else:
            updates += self._append_each(zip(map(step.by_row.__getitem__, rows), unpack_ids(result.token_ids)))
        return updates

    def _append_each(self, gained: Iterable[tuple[Sequence, int]]) -> Iterator[SequenceUpdate]:
        """What `_append` does where each sequence gains one token and the worker says no more of it: most steps, and
        the driver's largest cost of one."""
        charge = self._counters.charge
        for sequence, token_id in gained:
            if sequence.finish is not None:
                continue
            tokens = sequence.tokens
            if not sequence.answered or token_id in sequence.stop_ids or len(tokens) + 1 >= sequence.max_length:
                yield self._append(sequence, [token_id], None, None)
                continue
            tokens.append(token_id)
            sequence.num_pending -= 1
            charge(sequence.client, OUTPUT_WEIGHT)
            yield SequenceUpdate(sequence, [token_id])

    def _append(
        self, sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs] | None, reported: Finish | None
    ) -> SequenceUpdate:
        """The sequence has these tokens more; `reported` is an end that the worker knows of at the last one."""
        if reported is not None and reported.reason == "error":
            self._end(sequence, reported)
            return SequenceUpdate(sequence, [], reported)
        update = sequence.append(token_ids, logprobs, reported)
        self._counters.charge(sequence.client, OUTPUT_WEIGHT * len(update.token_ids))
        if update.finish:
            self.totals.note_end(sequence)
            self._end(sequence, update.finish)
        return update

    def _end_invalid(self, sequences: Iterable[Sequence]) -> list[SequenceUpdate]:
        """Ends sequences whose logits are not finite."""
        finish = Finish("error", code="invalid_logits", message=_INVALID_LOGITS)
        updates = [SequenceUpdate(sequence, [], finish) for sequence in sequences if sequence.finish is None]
        for update in updates:
            self._allocator.invalidate(update.sequence)
            self._end(update.sequence, finish)
        return updates

    # ------------------------------------------------------------------------------------------ after a fault

    def rewind(self, epoch: int, quarantined: Collection[str] = ()) -> None:
        """Forgets the plans that are out, all KV and the prefix cache. Every unfinished sequence waits, in
        its old order, with its prompt and the tokens committed. Workers begin the new epoch with no rows.

        Of the requests with ids in `quarantined` only one runs at a time from now on, beside all other requests."""
        self.quarantine = Quarantine(quarantined)
        for sequence in self._running:
            sequence.release()
            self.waiting.add(sequence)
        self._running.clear()
        for sequence in self.waiting:
            sequence.num_pending = 0
        self._in_flight.forget(epoch)
        self._allocator = self._new_allocator()

    # -------------------------------------------------------------------------------------------------- check

    def check(self) -> None:
        """`AssertionError` if an invariant is broken. Slow: for tests."""
        self._running.check()
        self.waiting.check()
        self._allocator.check(self._running)
        sequences = [*self._running, *self.waiting]
        self._counters.check(sequences)
        live = [sequence for siblings in self._requests.values() for sequence in siblings]
        assert sorted(map(id, live)) == sorted(map(id, sequences)), "requests and queues differ"
        for sequence in sequences:
            sequence.check(len(self._in_flight))
        assert all(sequence.status is Status.WAITING for sequence in self.waiting)
