"""The scheduler against a worker that checks every slot it reads, over any order of events."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler.simulated_worker import Engine, expected_answer, make_request, make_spans

from rayllm.kv_layout import num_blocks_for

STEMS = ([1, 2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 9, 9, 9, 9], [2, 2, 2])

requests = st.fixed_dictionaries(
    {
        "prompt": st.builds(
            lambda stem, cut, tail: stem[:cut] + tail,
            st.sampled_from(STEMS),
            st.integers(1, 8),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "n": st.sampled_from([1, 1, 2, 3]),
        "max_tokens": st.integers(1, 16),
        "ignore_eos": st.sampled_from([True, True, False]),
        "stop_token_ids": st.sampled_from([(), (), (5, 6)]),
        "min_tokens": st.sampled_from([0, 0, 1, 3]),
        "logprobs": st.sampled_from([None, None, 0]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
        "cache_salt": st.sampled_from(["", "", "salt"]),
        "client_key": st.sampled_from(["", "", "a", "b"]),
    }
)


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_spare_blocks=st.integers(0, 3),
        max_num_seqs=st.sampled_from([1, 2, 3, 6]),
        max_num_batched_tokens=st.sampled_from([1, 2, 3, 5, 8, 32]),
        enable_prefix_caching=st.sampled_from([True, True, False]),
        windows=st.sampled_from([(None,), (3,), (1,), (None, 5), (None, 4, 4), (9, 2)]),
        rope_boundary=st.sampled_from([None, None, 4, 8, 11]),
    )
    def start(self, num_spare_blocks, rope_boundary, **config):
        self.max_model_len, self.rope_boundary = 20, rope_boundary
        settings = config | {"max_model_len": self.max_model_len}
        num_blocks = num_blocks_for(make_spans(**settings), self.max_model_len) + num_spare_blocks
        self.engine = Engine(num_blocks=num_blocks, rope_boundary=rope_boundary, **settings)
        self.num_requests = 0
        self.open = {}

    @rule(spec=requests, num_replayed=st.sampled_from([0, 0, 0, 1, 2, 4]))
    def submit(self, spec, num_replayed):
        spec = spec | {"min_tokens": min(spec["min_tokens"], spec["max_tokens"])}
        request_id = f"r{self.num_requests}"
        self.num_requests += 1
        answers = [
            expected_answer(make_request(request_id, **spec), choice, self.max_model_len, self.rope_boundary)
            for choice in range(spec["n"])
        ]
        emitted = [tokens[:num_replayed] for tokens, _, _ in answers] if num_replayed else ()
        sequences = self.engine.add(make_request(request_id, emitted=emitted, **spec))
        for sequence, answer in zip(sequences, answers, strict=True):
            assert (sequence.finish is not None) == (num_replayed >= len(answer[0]))
            self.open[sequence] = answer, num_replayed

    @rule()
    def plan(self):
        self.engine.plan()

    @precondition(lambda self: self.engine.results)
    @rule()
    def commit(self):
        self.engine.commit()

    @rule(num_steps=st.integers(3, 9))
    def run(self, num_steps):
        for _ in range(num_steps):
            self.engine.plan()
            if len(self.engine.results) == 2:
                self.engine.commit()

    @precondition(lambda self: self.num_requests)
    @rule(data=st.data())
    def abort(self, data):
        request_id = f"r{data.draw(st.integers(0, self.num_requests - 1))}"
        unfinished = [s for s in self.open if s.request.request_id == request_id and s.finish is None]
        assert self.engine.scheduler.abort(request_id) == unfinished
        assert all(sequence.finish.reason == "abort" for sequence in unfinished)

    @precondition(lambda self: any(sequence.finish is None for sequence in self.open))
    @rule(data=st.data())
    def abort_one_choice(self, data):
        sequence = data.draw(st.sampled_from([s for s in self.open if s.finish is None]))
        self.engine.scheduler.abort_sequence(sequence)

    @rule(how_bad=st.integers(0, 4))  # rare, so that runs grow deep
    def fault(self, how_bad):
        if how_bad == 4:
            self.engine.rewind()

    @invariant()
    def tokens_are_those_of_the_pure_function(self):
        if not hasattr(self, "engine"):
            return
        self.engine.scheduler.check()
        for sequence, ((tokens, reason, stop_reason), num_replayed) in self.open.items():
            delivered = self.engine.tokens_of(sequence)
            assert delivered == tokens[num_replayed : num_replayed + len(delivered)]
            finish = sequence.finish
            if finish is not None and finish.reason != "abort":
                assert num_replayed + len(delivered) >= len(tokens)
                assert (finish.reason, finish.stop_reason) == (reason, stop_reason)

    def check_extras(self):
        for sequence, (_, num_replayed) in self.open.items():
            updates, params = self.engine.delivered[sequence], sequence.request.params
            for update in updates:
                assert (update.logprobs is not None) == (params.logprobs is not None)
                assert (update.finish is not None) == (update is updates[-1] and sequence.finish.reason != "abort")
            first, *later = updates or [None]
            assert all(update.prompt_logprobs is None for update in later)
            wanted = params.prompt_logprobs is not None and sequence.choice == 0 and not num_replayed
            if first and wanted:
                ranks = [logprobs.rank for logprobs in first.prompt_logprobs]
                assert ranks == list(range(1, sequence.num_prompt_tokens)), "each position once, in order"
            elif first:
                assert first.prompt_logprobs is None

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        self.tokens_are_those_of_the_pure_function()
        self.check_extras()
        assert all(sequence.finish is not None for sequence in self.open)
        scheduler = self.engine.scheduler
        assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_uncommitted) == (0, 0, 0)
        assert (scheduler.num_blocks_used, scheduler.num_slots_filled) == (0, 0)
        scheduler.check()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
