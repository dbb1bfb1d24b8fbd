"""A worker without tensors that does what plans say, and objects to each one that would read wrong KV."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec

from rayllm.kv_layout import KVSpan, kv_spans
from rayllm.messages import Finish, RowStart, StepPlan, StepResult, TokenLogprobs
from rayllm.request import Request, SamplingParams, pack_ids, unpack_ids
from rayllm.scheduler.scheduler import Scheduler
from rayllm.scheduler.sequence import Sequence, SequenceUpdate

EOS = 0
VOCAB_SIZE = 12


def digest(*numbers: int) -> int:
    return int.from_bytes(blake2b(struct.pack(f"{len(numbers)}q", *numbers), digest_size=7).digest(), "big")


def prefix_digests(tokens: list[int], rope_boundary: int | None = None) -> list[int]:
    """For each position, what its KV depends on: all tokens up to it, and whether there are more than the boundary."""
    digests, last = [], int(rope_boundary is not None and len(tokens) > rope_boundary)
    for token in tokens:
        last = digest(last, token)
        digests.append(last)
    return digests


@dataclass
class BoundText:
    """Stands for a grammar's matcher, whatever the grammar, and is a fold of the tokens as that is: a token is less
    than five away from the one before, and the text is complete when its tokens come to 25 in sum."""

    last: int = 1
    total: int = 0

    @classmethod
    def of(cls, params: SamplingParams, emitted: list[int]) -> BoundText | None:
        """None where the text may be any."""
        if params.structured_outputs is None:
            return None
        text = cls()
        for token in emitted:
            text.take(token)
        return text

    def forbidden(self) -> set[int]:
        return set() if self.is_complete else {token for token in range(VOCAB_SIZE) if abs(token - self.last) > 4}

    def take(self, token: int) -> None:
        assert token not in self.forbidden(), f"{token} does not follow {self.last}"
        self.last, self.total = token, self.total + token

    @property
    def is_complete(self) -> bool:
        return self.total >= 25


def draw(
    prefix_digest: int, seed: int, choice: int, num_emitted: int, params: SamplingParams, text: BoundText | None = None
) -> int:
    """The next token, a pure function of its arguments; before `min_tokens`, stop tokens are masked."""
    token = digest(prefix_digest, seed, choice, num_emitted) % VOCAB_SIZE
    masked = {EOS, *params.stop_token_ids} if num_emitted < params.min_tokens else set()
    if text is not None:
        masked |= text.forbidden()
    while token in masked:
        token = (token + 1) % VOCAB_SIZE
    return token


def expected_answer(
    request: Request, choice: int, max_model_len: int, rope_boundary: int | None = None
) -> tuple[list[int], str, int | None]:
    """All tokens of a choice, finish reason and stop reason, by the rules and with no scheduler."""
    params, prompt = request.params, list(request.prompt_token_ids)
    emitted: list[int] = []
    text = BoundText.of(params, emitted)
    last = prefix_digests(prompt, rope_boundary)[-1]
    while True:
        token = draw(last, request.seed, choice, len(emitted), params, text)
        emitted.append(token)
        last = digest(last, token)
        if len(prompt) + len(emitted) - 1 == rope_boundary:
            last = prefix_digests(prompt + emitted, rope_boundary)[-1]
        if text is not None:
            text.take(token)
        if token == EOS and not params.ignore_eos:
            return emitted, "stop", None
        if token in params.stop_token_ids and len(emitted) >= params.min_tokens:
            return emitted, "stop", token
        if text is not None and text.is_complete:
            return emitted, "stop", None
        if len(emitted) == request.max_tokens or len(prompt) + len(emitted) == max_model_len:
            return emitted, "length", None


@dataclass
class Row:
    start: RowStart
    tokens: list[int]
    digests: list[int]
    tables: list[list[int | None]]
    """By KV group; None where the row began behind a window."""
    num_computed: int
    text: BoundText | None
    written: list[int] = field(default_factory=list)
    """Slots of the last step."""
    spoiled: bool = False


@dataclass
class SimulatedWorker:
    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    windows: tuple[int | None, ...] = (None,)
    """Of each KV group."""
    rows: dict[int, Row] = field(default_factory=dict)
    slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By slot: the group and the digest of the prefix whose KV was written there last."""
    num_tokens_computed: int = 0
    rope_boundary: int | None = None

    def run(self, plan: StepPlan) -> StepResult:
        self._take_over(plan)
        rows, counts = unpack_ids(plan.rows), unpack_ids(plan.counts)
        assert len(set(rows)) == len(rows) > 0
        assert min(counts) >= 1
        assert sum(counts) <= self.max_num_batched_tokens
        assert sorted(counts, key=lambda count: count > 1) == list(counts), "single tokens come first"
        self._write(rows, counts)
        self._attend(rows, counts)
        self.num_tokens_computed += sum(counts)
        return self._sample(plan, rows, counts)

    def _take_over(self, plan: StepPlan) -> None:
        for row in unpack_ids(plan.finished_rows):
            del self.rows[row]
        for start in plan.new_rows:
            assert start.row not in self.rows, f"row {start.row} is taken"
            tokens = list(unpack_ids(start.tokens))
            assert start.num_computed_tokens < len(tokens)
            assert len(start.tables) == len(self.windows)
            tables = [[None] * table.first + list(unpack_ids(table.blocks)) for table in start.tables]
            text = BoundText.of(start.params, tokens[start.num_prompt_tokens :])
            self.rows[start.row] = Row(start, tokens, self._digests(tokens), tables, start.num_computed_tokens, text)
        grown_rows = unpack_ids(plan.grown_rows)
        grown_groups = unpack_ids(plan.grown_groups) or [0] * len(grown_rows)
        for row, group, block in zip(grown_rows, grown_groups, unpack_ids(plan.grown_blocks), strict=True):
            self.rows[row].tables[group].append(block)
        for row in self.rows.values():
            seen = [
                block
                for window, table in zip(self.windows, row.tables)
                for block in table[self._first_seen(window, row.num_computed) // self.block_size :]
            ]
            assert len(set(seen)) == len(seen), "a row has a block twice"
            assert all(0 <= block < self.num_blocks for block in seen)

    def _digests(self, tokens: list[int]) -> list[int]:
        return prefix_digests(tokens, self.rope_boundary)

    def _first_seen(self, window: int | None, position: int) -> int:
        """The first position that the token at `position` sees."""
        return 0 if window is None else max(0, position - window + 1)

    def _slot(self, table: list[int | None], position: int) -> int:
        block = table[position // self.block_size]
        assert block is not None, f"position {position} has no block"
        return block * self.block_size + position % self.block_size

    def _write(self, rows, counts) -> None:
        written = set()
        for row_id, count in zip(rows, counts):
            row = self.rows[row_id]
            row.written = []
            assert row.num_computed + count <= len(row.tokens), "a plan computes tokens that are not there"
            if self.rope_boundary is not None and not row.spoiled:
                assert row.digests == self._digests(row.tokens), "a row has crossed the rope boundary"
            for position in range(row.num_computed, row.num_computed + count):
                for group, table in enumerate(row.tables):
                    slot = self._slot(table, position)
                    assert slot not in written, "two rows write one slot"
                    written.add(slot)
                    row.written.append(slot)
                    self.slots[slot] = group, row.digests[position]
            row.num_computed += count

    def _attend(self, rows, counts) -> None:
        """Reads all that a token of the step sees, in each group."""
        for row_id, count in zip(rows, counts):
            row = self.rows[row_id]
            if row.spoiled:
                continue
            for group, (window, table) in enumerate(zip(self.windows, row.tables)):
                for position in range(self._first_seen(window, row.num_computed - count), row.num_computed):
                    found = self.slots.get(self._slot(table, position))
                    expected = group, row.digests[position]
                    assert found == expected, f"row {row_id} reads foreign KV at position {position} of group {group}"

    def spoil(self, result: StepResult, row_id: int) -> StepResult:
        """As if the step had given the row NaN: what it wrote last is junk, its token means nothing, and it is said."""
        row = self.rows[row_id]
        row.spoiled = True
        row.tokens[-1], row.digests[-1] = (row.tokens[-1] + 1) % VOCAB_SIZE, -1
        self.slots |= dict.fromkeys(row.written, (-1, -1))
        return msgspec.structs.replace(result, invalid_rows=result.invalid_rows + pack_ids([row_id]))

    def _sample(self, plan: StepPlan, rows, counts) -> StepResult:
        sampled, token_ids, logprobs, prompt_logprobs, ends = [], [], {}, {}, {}
        for row_id, count in zip(rows, counts):
            row, start = self.rows[row_id], self.rows[row_id].start
            if start.params.prompt_logprobs is not None:
                positions = range(row.num_computed - count + 1, row.num_computed + 1)
                wanted = [position for position in positions if position < start.num_prompt_tokens]
                if wanted:
                    prompt_logprobs[row_id] = [say(position, row.tokens[position]) for position in wanted]
            if row.num_computed == len(row.tokens):
                num_emitted = len(row.tokens) - start.num_prompt_tokens
                token = draw(row.digests[-1], start.seed, start.choice, num_emitted, start.params, row.text)
                if row.text is not None and not row.text.is_complete:
                    row.text.take(token)
                    if row.text.is_complete:
                        ends[row_id] = Finish("stop", is_complete=True)
                if start.params.logprobs is not None:
                    logprobs[row_id] = [say(len(row.tokens), token)]
                row.tokens.append(token)
                row.digests.append(digest(row.digests[-1], token))
                sampled.append(row_id)
                token_ids.append(token)
        return StepResult(
            step=plan.step,
            epoch=plan.epoch,
            rows=pack_ids(sampled),
            token_ids=pack_ids(token_ids),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            elapsed_s=0.0,
            ends=ends,
        )


def say(position: int, token: int) -> TokenLogprobs:
    return TokenLogprobs(ids=pack_ids([token]), values=struct.pack("f", -1.0), rank=position)


SETTINGS = {
    "num_blocks": 64,
    "block_size": 4,
    "windows": (None,),
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "max_model_len": 128,
    "enable_prefix_caching": True,
    "eos_token_ids": frozenset({EOS}),
}


def make_spans(**changes) -> tuple[KVSpan, ...]:
    settings = {"max_inflight_steps": 2} | SETTINGS | changes
    names = ("windows", "block_size", "max_model_len", "max_num_batched_tokens", "max_inflight_steps")
    return kv_spans(**{name: settings[name] for name in names})


def make_scheduler(**changes) -> Scheduler:
    settings = SETTINGS | changes
    for_spans = {name: settings.pop(name) for name in ("windows", "block_size")}
    return Scheduler(kv_spans=make_spans(**for_spans, **settings), **settings)


def make_request(
    request_id: str, prompt: list[int], *, priority=0, cache_salt="", emitted=(), client_key="", **params
) -> Request:
    sampling = SamplingParams(**({"max_tokens": 8, "ignore_eos": True} | params))
    return Request(
        request_id=request_id,
        prompt=pack_ids(prompt),
        params=sampling,
        seed=7,
        max_tokens=sampling.max_tokens,
        priority=priority,
        cache_salt=cache_salt,
        emitted=tuple(map(pack_ids, emitted)),
        client_key=client_key,
    )


def make_sequence(
    tokens: list[int], *, arrival: int = 0, max_model_len: int = 999, eos_token_ids=frozenset(), **request
) -> Sequence:
    """Choice 0 of a request of its own."""
    return Sequence(
        make_request(str(arrival), tokens, **request),
        0,
        arrival=arrival,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
        prompt_hashes=[],
    )


class Engine:
    """A scheduler and a simulated worker; steps on demand, and remembers what was delivered."""

    def __init__(self, **changes):
        self.settings = SETTINGS | changes
        self.scheduler = make_scheduler(**changes)
        self.delivered: dict[Sequence, list[SequenceUpdate]] = {}
        self.results: list[StepResult] = []
        self.epoch = 0
        self._start_worker()

    def _start_worker(self) -> None:
        names = ("num_blocks", "block_size", "max_num_batched_tokens", "windows")
        settings = {name: self.settings[name] for name in names}
        self.worker = SimulatedWorker(**settings, rope_boundary=self.settings.get("rope_boundary"))
        self.results.clear()

    def add(self, request: Request) -> list[Sequence]:
        sequences = self.scheduler.add(request)
        self.delivered |= {sequence: [] for sequence in sequences}
        return sequences

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self.results.append(self.worker.run(plan))
        self.scheduler.check()
        return plan

    def commit(self) -> list[SequenceUpdate]:
        updates = self.scheduler.commit(self.results.pop(0))
        for update in updates:
            self.delivered[update.sequence].append(update)
        self.scheduler.check()
        return updates

    def step(self) -> tuple[StepPlan | None, list[SequenceUpdate]]:
        """One plan and, where one is out, one result."""
        plan = self.plan()
        return plan, self.commit() if self.results else []

    def rewind(self) -> None:
        self.epoch += 1
        self.scheduler.rewind(self.epoch)
        self.scheduler.check()
        self._start_worker()

    def drain(self, depth: int = 2) -> None:
        """Runs until nothing is left, with up to `depth` plans out."""
        while True:
            while len(self.results) < depth and self.plan():
                pass
            if not self.results:
                assert not self.scheduler.has_work, "work is left, and no plan is made"
                return
            self.commit()

    def tokens_of(self, sequence: Sequence) -> list[int]:
        return [token for update in self.delivered[sequence] for token in update.token_ids]
