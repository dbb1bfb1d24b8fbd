import msgspec
import pytest
from scheduler.simulated_worker import EOS, Engine, expected_answer, make_request, make_scheduler

from rayllm.errors import ConfigError, EngineError
from rayllm.messages import Finish, RowParams, RowTable, StepPlan, StepResult
from rayllm.request import pack_ids, unpack_ids
from rayllm.scheduler.sequence import Status

PROMPT = list(range(1, 11))


def counts(plan: StepPlan) -> list[int]:
    return list(unpack_ids(plan.counts))


# -------------------------------------------------------------------------------------------- what is refused


def test_a_pool_too_small_for_one_sequence_is_a_config_error():
    make_scheduler(num_blocks=32, block_size=4, max_model_len=128)
    with pytest.raises(ConfigError, match=r"max_model_len=128 does not fit .* needs 32 blocks, and there are 31"):
        make_scheduler(num_blocks=31, block_size=4, max_model_len=128)


def test_a_result_that_answers_another_plan_is_refused():
    engine = Engine()
    engine.add(make_request("a", PROMPT))
    empty = StepResult(1, 0, b"", b"", {}, {}, 0.0)
    with pytest.raises(EngineError, match="expected none"):
        engine.scheduler.commit(empty)
    engine.plan()
    with pytest.raises(EngineError, match="samples 1 tokens, but its result has 0"):
        engine.scheduler.commit(empty)
    with pytest.raises(EngineError, match="step 1 of epoch 3, expected step 1 of epoch 0"):
        engine.scheduler.commit(StepResult(1, 3, b"", b"", {}, {}, 0.0))
    engine.commit()


# ------------------------------------------------------------------------------------------- the token budget


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    engine = Engine(max_num_batched_tokens=4)
    engine.add(make_request("a", PROMPT, max_tokens=2))
    steps = [engine.step() for _ in range(4)]
    assert [counts(plan) for plan, _ in steps] == [[4], [4], [2], [1]]
    assert [len(updates) for _, updates in steps] == [0, 0, 1, 1]


def test_running_sequences_come_first_and_single_tokens_stand_before_chunks():
    engine = Engine(max_num_batched_tokens=8, enable_prefix_caching=False)
    engine.add(make_request("long", PROMPT))
    engine.add(make_request("short", [1, 2]))
    assert counts(engine.step()[0]) == [8]
    assert counts(engine.step()[0]) == [2, 2]
    engine.add(make_request("next", PROMPT))
    assert counts(engine.step()[0]) == [1, 1, 6]


def test_a_long_prompt_leaves_a_token_for_each_sequence_behind_it():
    engine = Engine(max_num_batched_tokens=8, enable_prefix_caching=False)
    engine.add(make_request("b", [5]))
    engine.step()
    engine.add(make_request("a", [1] * 40, priority=-1))
    engine.step()
    assert counts(engine.plan()) == [1, 7]


def test_a_sequence_is_planned_twice_before_its_token_is_seen_and_never_past_its_length():
    engine = Engine()
    [sequence] = engine.add(make_request("a", PROMPT, max_tokens=2))
    assert counts(engine.plan()) == [10]
    assert counts(engine.plan()) == [1]
    assert sequence.num_pending == 2
    assert engine.plan() is None, "two plans are out"
    [first] = engine.commit()
    assert engine.plan() is None, "all it may have is sampled"
    [last] = engine.commit()
    assert (first.finish, last.finish) == (None, Finish("length"))
    assert engine.scheduler.num_uncommitted == 0


def test_no_more_steps_are_in_flight_than_the_layout_allows():
    engine, undisturbed = Engine(max_inflight_steps=3), Engine()
    [sequence] = engine.add(make_request("a", PROMPT, max_tokens=6))
    assert [engine.plan() is not None for _ in range(4)] == [True, True, True, False]
    engine.commit()
    assert engine.plan() is not None
    assert engine.plan() is None, "three are in flight again"
    while engine.scheduler.num_uncommitted:
        engine.commit()
        engine.plan()
    [alone] = undisturbed.add(make_request("a", PROMPT, max_tokens=6))
    while undisturbed.scheduler.has_work:
        undisturbed.step()
    assert sequence.tokens == alone.tokens


def test_max_model_len_ends_a_sequence_by_length():
    engine = Engine(max_model_len=12)
    [sequence] = engine.add(make_request("a", PROMPT, max_tokens=8))
    engine.drain()
    assert len(engine.tokens_of(sequence)) == 2
    assert sequence.finish == Finish("length")


def test_what_was_sampled_after_a_stop_token_is_dropped():
    request = make_request("a", PROMPT, ignore_eos=False, max_tokens=100)
    answer, reason, _ = expected_answer(request, 0, 128)
    assert reason == "stop"
    engine = Engine()
    [sequence] = engine.add(request)
    while sequence.finish is None:
        engine.plan()
        engine.plan()
        engine.commit()
    assert engine.tokens_of(sequence) == answer
    assert answer[-1] == EOS
    assert engine.scheduler.num_blocks_used == 0, "freed while a plan that holds it is out"
    assert engine.commit() == []
    assert not engine.scheduler.has_work


# -------------------------------------------------------------------------------------- blocks and preemption


def test_the_newest_is_preempted_when_blocks_run_out_and_its_tokens_are_the_same():
    engine = Engine(num_blocks=8, max_model_len=32, enable_prefix_caching=False)
    requests = [make_request(name, [n] * 10, max_tokens=20) for n, name in enumerate("ab", start=1)]
    [[first], [second]] = [engine.add(request) for request in requests]
    while not engine.scheduler.totals.num_preemptions:
        engine.step()
    assert (first.status, second.status) == (Status.RUNNING, Status.WAITING)
    engine.drain()
    assert engine.scheduler.totals.num_preemptions == 1
    for sequence in (first, second):
        assert engine.tokens_of(sequence) == expected_answer(sequence.request, 0, 32)[0]


def test_a_sequence_that_crosses_the_rope_boundary_is_computed_anew_once():
    engine = Engine(rope_boundary=12)
    request = make_request("a", PROMPT, max_tokens=8)
    [sequence] = engine.add(request)
    engine.drain(depth=1)
    assert engine.tokens_of(sequence) == expected_answer(request, 0, 128, 12)[0]
    assert engine.worker.num_tokens_computed == 12 + 17  # the last of 18 tokens is not computed
    assert engine.scheduler.totals.num_preemptions == 0


@pytest.mark.parametrize("depth", [1, 2])
def test_a_sequence_that_crosses_the_rope_boundary_does_not_queue_behind_clients_served_less(depth):
    engine = Engine(rope_boundary=12, max_num_seqs=1)
    [sequence] = engine.add(make_request("a", PROMPT, max_tokens=8, client_key="much served"))
    engine.step()
    [other] = engine.add(make_request("b", PROMPT, max_tokens=8, client_key="not served yet"))
    while sequence.finish is None:
        while len(engine.results) < depth and engine.plan():
            pass
        engine.commit()
    assert engine.tokens_of(other) == []
    engine.drain()
    for each in (sequence, other):
        assert engine.tokens_of(each) == expected_answer(each.request, 0, 128, 12)[0]


@pytest.mark.parametrize(("max_tokens", "num_computed"), [(2, 11), (3, 12), (4, 12 + 13)])
def test_nothing_is_computed_anew_for_a_sequence_that_ends_at_the_boundary(max_tokens, num_computed):
    engine = Engine(rope_boundary=12)
    engine.add(make_request("a", PROMPT, max_tokens=max_tokens))
    engine.drain()
    assert engine.worker.num_tokens_computed == num_computed


def test_a_long_sequence_uses_no_cached_block_of_a_short_one_and_shares_with_long_ones():
    engine = Engine(rope_boundary=12)
    engine.add(make_request("short", PROMPT, max_tokens=1))
    engine.drain()
    sequences = engine.add(make_request("long", [*PROMPT, 1, 2, 3, 4], max_tokens=1))
    engine.drain()
    assert sequences[0].num_cached_tokens == 0
    sequences += engine.add(make_request("longer", [*PROMPT, 1, 2, 3, 4, 5], max_tokens=1))
    sequences += engine.add(make_request("short again", [*PROMPT, 1], max_tokens=1))
    engine.drain()
    assert [sequence.num_cached_tokens for sequence in sequences] == [0, 12, 8]
    for sequence in sequences:
        assert engine.tokens_of(sequence) == expected_answer(sequence.request, 0, 128, 12)[0]


def test_choices_that_cross_and_choices_that_are_replayed_past_the_boundary_go_on():
    whole = [expected_answer(make_request("a", PROMPT, n=2), choice, 128, 12)[0] for choice in range(2)]
    engine = Engine(rope_boundary=12)
    sequences = engine.add(make_request("a", PROMPT, n=2, emitted=[whole[0][:5], whole[1][:1]]))
    engine.step()
    engine.rewind()
    engine.drain()
    assert [engine.tokens_of(sequence) for sequence in sequences] == [whole[0][5:], whole[1][1:]]


def test_a_preempted_sequence_comes_back_before_those_that_arrived_after_it():
    engine = Engine(num_blocks=8, max_model_len=32, enable_prefix_caching=False)
    for n, name in enumerate("ab", start=1):
        engine.add(make_request(name, [n] * 10, max_tokens=20))
    while not engine.scheduler.totals.num_preemptions:
        engine.step()
    engine.add(make_request("c", [3]))
    assert [s.request.request_id for s in engine.scheduler.waiting] == ["b", "c"]
    plan, _ = engine.step()
    assert counts(plan) == [1], "strict order: c would fit, and does not overtake b"


def test_a_preempted_sequence_keeps_the_token_that_was_not_yet_committed():
    engine = Engine(max_num_seqs=1)
    [low] = engine.add(make_request("low", PROMPT, priority=1))
    engine.plan()
    engine.plan()
    engine.commit()
    [high] = engine.add(make_request("high", [5], max_tokens=1))
    engine.plan()
    assert (low.status, low.num_pending, high.status) == (Status.WAITING, 1, Status.RUNNING)
    engine.commit()
    assert (low.num_pending, low.num_emitted) == (0, 2)
    engine.commit()
    [start] = engine.plan().new_rows
    assert start.tokens == low.tokens.tobytes()
    engine.drain()
    assert engine.tokens_of(low) == expected_answer(low.request, 0, 128)[0]


def test_a_preempted_sequence_can_end_while_it_waits():
    engine = Engine(max_num_seqs=1)
    [low] = engine.add(make_request("low", PROMPT, priority=1, max_tokens=1))
    engine.plan()
    engine.add(make_request("high", [5]))
    engine.plan()
    assert low.status is Status.WAITING
    engine.commit()
    assert low.finish == Finish("length")
    assert engine.scheduler.num_waiting == 0
    engine.drain()


def test_admission_leaves_blocks_for_the_running_to_grow_into():
    engine = Engine(num_blocks=4, max_model_len=16, enable_prefix_caching=False)
    engine.add(make_request("a", [1] * 4))
    engine.add(make_request("b", [2] * 12))
    plan = engine.plan()
    assert len(plan.new_rows) == 1, "b would fill the pool to the last block"
    engine.drain()


def test_what_admission_leaves_for_the_running_is_counted_by_those_that_run_now():
    engine = Engine(num_blocks=12, block_size=16, max_num_seqs=16, enable_prefix_caching=False)
    for n in range(4):
        engine.add(make_request(f"long{n}", [n] * 13, max_tokens=60))
        engine.add(make_request(f"short{n}", [n], max_tokens=60))
    engine.step()
    [late] = engine.add(make_request("late", [9]))
    engine.step()
    assert late.status is Status.WAITING, "one block for it and four for the eight that run: four are free"
    while engine.scheduler.num_blocks_used < 12:
        engine.step()
    for n in range(4):
        engine.scheduler.abort(f"short{n}")
    engine.step()
    assert late.status is Status.RUNNING, "one for it and two for the four that run: four are free"
    engine.drain()


def test_a_sequence_as_long_as_the_pool_runs_alone():
    engine = Engine(num_blocks=4, max_model_len=16)
    sequences = [engine.add(make_request(name, [1] * 3, max_tokens=13))[0] for name in "abc"]
    engine.drain()
    assert all(len(engine.tokens_of(sequence)) == 13 for sequence in sequences)


def test_a_higher_priority_is_served_first_and_preempts_for_a_row():
    engine = Engine(max_num_seqs=2)
    low = [engine.add(make_request(f"low{n}", [n] * 5, priority=1))[0] for n in (1, 2, 3)]
    engine.step()
    [high] = engine.add(make_request("high", [9] * 5, priority=0))
    engine.step()
    assert [s.status.value for s in (*low, high)] == ["running", "waiting", "waiting", "running"]
    assert engine.scheduler.totals.num_preemptions == 1
    engine.drain()


def test_a_planned_sequence_preempted_for_a_higher_priority_gives_back_all_it_was_planned():
    engine = Engine(max_num_seqs=1, max_num_batched_tokens=8)
    [low] = engine.add(make_request("low", [1] * 4, priority=1))
    engine.step()
    [high] = engine.add(make_request("high", [2] * 8, priority=0))
    plan = engine.plan()  # low grew into a second block before it was preempted
    assert counts(plan) == [8], "its token is the budget's again"
    assert (plan.grown_rows, plan.grown_blocks) == (b"", b"")
    engine.drain()
    for sequence in (low, high):
        assert engine.tokens_of(sequence) == expected_answer(sequence.request, 0, 128)[0]


def test_no_one_is_preempted_where_that_would_not_be_enough():
    engine = Engine(num_blocks=8, max_model_len=32, enable_prefix_caching=False)
    engine.add(make_request("top", [1] * 17, priority=-1, max_tokens=2))
    engine.add(make_request("low", [2] * 4, priority=1, max_tokens=2))
    engine.step()
    engine.add(make_request("middle", [3] * 16, priority=0))
    engine.step()
    assert engine.scheduler.totals.num_preemptions == 0
    engine.drain()


def test_blocks_that_others_share_are_no_reason_to_preempt():
    engine = Engine(num_blocks=8, max_model_len=32)
    shared = [1] * 16
    engine.add(make_request("top", [*shared, 9], priority=-1, max_tokens=3))
    engine.step()
    [low] = engine.add(make_request("low", [*shared, 8], priority=1, max_tokens=3))
    engine.step()
    assert (low.status, low.num_cached_tokens) == (Status.RUNNING, 16)
    engine.add(make_request("middle", [3] * 16))
    engine.plan()
    assert engine.scheduler.totals.num_preemptions == 0, "without low, one block more would be free, not five"
    engine.drain()


def test_equal_priority_never_preempts():
    engine = Engine(max_num_seqs=1)
    engine.add(make_request("a", PROMPT))
    engine.step()
    engine.add(make_request("b", PROMPT))
    engine.drain()
    assert engine.scheduler.totals.num_preemptions == 0


# --------------------------------------------------------------------------------------------------- prefixes


def test_choices_of_a_request_compute_its_prompt_once():
    engine = Engine()
    sequences = engine.add(make_request("a", PROMPT, n=4, max_tokens=1))
    assert [s.choice for s in sequences] == [0, 1, 2, 3]
    engine.drain()
    assert engine.worker.num_tokens_computed == 10 + 3 * 2
    assert [engine.delivered[s][0].num_cached_tokens for s in sequences] == [0, 8, 8, 8]
    assert len({tuple(engine.tokens_of(s)) for s in sequences}) > 1, "each choice draws for itself"


def test_requests_that_come_together_compute_their_shared_prefix_once():
    engine = Engine(max_num_seqs=32, max_num_batched_tokens=32, num_blocks=256)
    shared = [*range(1, 11)] * 4
    sequences = [engine.add(make_request(str(n), [*shared, 50 + n], max_tokens=1))[0] for n in range(32)]
    engine.drain()
    assert engine.worker.num_tokens_computed == 41 + 31
    assert all(engine.tokens_of(s) == expected_answer(s.request, 0, 128)[0] for s in sequences)
    assert engine.scheduler.totals.prefix_hits == 31 * 40
    assert engine.scheduler.totals.prefix_queries == 32 * 41


def test_others_go_ahead_of_a_sequence_that_waits_for_a_prefix():
    engine = Engine()
    engine.add(make_request("a", PROMPT, n=2))
    [other] = engine.add(make_request("b", [9] * 3))
    engine.plan()
    assert other.status is Status.RUNNING
    assert engine.scheduler.num_waiting == 1


def test_a_sequence_stops_waiting_when_the_owner_of_its_prefix_is_aborted():
    engine = Engine(max_num_batched_tokens=4)
    engine.add(make_request("owner", PROMPT))
    [waiting] = engine.add(make_request("b", PROMPT))
    engine.step()
    engine.plan()
    engine.scheduler.abort("owner")
    engine.commit()
    engine.plan()
    assert waiting.status is Status.RUNNING
    engine.drain()
    assert engine.tokens_of(waiting) == expected_answer(waiting.request, 0, 128)[0]


def test_blocks_are_published_only_when_their_step_is_committed():
    engine = Engine()
    engine.add(make_request("a", PROMPT, max_tokens=1))
    engine.plan()
    [late] = engine.add(make_request("b", PROMPT))
    assert engine.plan() is None
    engine.commit()
    engine.plan()
    assert late.num_cached_tokens == 8
    engine.drain()


def test_an_answer_is_a_prefix_too():
    engine = Engine()
    [first] = engine.add(make_request("a", PROMPT, max_tokens=19))
    engine.drain()
    [second] = engine.add(make_request("b", [*first.tokens, 3], max_tokens=1))
    engine.drain()
    assert second.num_cached_tokens == 28, "all that had KV: the last token never had"


def test_nothing_is_shared_or_deferred_with_prefix_caching_off():
    engine = Engine(enable_prefix_caching=False)
    engine.add(make_request("a", PROMPT, n=3, max_tokens=1))
    plan = engine.plan()
    assert counts(plan) == [10, 10, 10]
    engine.drain()
    assert engine.scheduler.totals.prefix_queries == 0


def test_prompt_logprobs_come_whole_and_once_however_the_prompt_was_cut():
    engine = Engine(max_num_batched_tokens=3)
    engine.add(make_request("warm", PROMPT, max_tokens=1))
    engine.drain()
    [sequence] = engine.add(make_request("a", PROMPT, prompt_logprobs=0, max_tokens=3))
    engine.drain()
    first, *later = engine.delivered[sequence]
    assert [logprobs.rank for logprobs in first.prompt_logprobs] == list(range(1, 10))
    assert [list(unpack_ids(logprobs.ids)) for logprobs in first.prompt_logprobs] == [[t] for t in PROMPT[1:]]
    assert [update.prompt_logprobs for update in later] == [None, None]


def test_once_prompt_logprobs_are_delivered_a_preempted_sequence_uses_the_cache():
    engine = Engine(max_num_seqs=1)
    [low] = engine.add(make_request("low", PROMPT, priority=1, prompt_logprobs=0))
    engine.step()
    engine.add(make_request("high", [5], max_tokens=1))
    engine.step()
    [start] = engine.plan().new_rows
    assert start.num_computed_tokens == 8
    engine.drain()
    assert [update.prompt_logprobs is None for update in engine.delivered[low]] == [False] + [True] * 7


def test_logprobs_are_delivered_with_their_token():
    engine = Engine()
    [plain] = engine.add(make_request("a", PROMPT))
    [asking] = engine.add(make_request("b", PROMPT, logprobs=2))
    engine.drain()
    assert all(update.logprobs is None for update in engine.delivered[plain])
    for update in engine.delivered[asking]:
        [logprobs] = update.logprobs
        assert list(unpack_ids(logprobs.ids)) == update.token_ids


# --------------------------------------------------------------------------------- aborts, replays and faults


def test_abort_frees_everything_at_once_at_any_stage():
    engine = Engine(max_num_seqs=2)
    running = engine.add(make_request("a", PROMPT, n=2))
    waiting = engine.add(make_request("b", [9] * 5))
    engine.step()
    engine.plan()
    assert engine.scheduler.abort("nobody") == []
    assert engine.scheduler.abort("a") == running
    assert engine.scheduler.abort("b") == waiting
    assert engine.scheduler.abort("a") == []
    assert (engine.scheduler.num_blocks_used, engine.scheduler.has_work) == (0, False)
    assert all(s.finish == Finish("abort") for s in running + waiting)
    assert engine.commit() == []
    engine.add(make_request("a", PROMPT))
    engine.drain()


def test_a_choice_can_be_aborted_alone():
    engine = Engine()
    first, second = engine.add(make_request("a", PROMPT, n=2))
    engine.step()
    engine.scheduler.abort_sequence(first)
    engine.scheduler.abort_sequence(first)
    engine.drain()
    assert first.finish == Finish("abort")
    assert engine.tokens_of(second) == expected_answer(second.request, 1, 128)[0]


def test_a_replayed_request_goes_on_where_it_was():
    whole, _, _ = expected_answer(make_request("a", PROMPT), 0, 128)
    engine = Engine()
    [sequence] = engine.add(make_request("a", PROMPT, emitted=[whole[:3]]))
    engine.drain()
    assert engine.tokens_of(sequence) == whole[3:]
    assert sequence.finish == Finish("length")


def test_a_replayed_choice_that_had_ended_is_not_run():
    whole, _, _ = expected_answer(make_request("a", PROMPT, n=2), 0, 128)
    engine = Engine()
    ended, other = engine.add(make_request("a", PROMPT, n=2, emitted=[whole, []]))
    assert ended.finish == Finish("length")
    engine.drain()
    assert engine.tokens_of(ended) == []
    assert len(engine.tokens_of(other)) == 8


def test_a_rewind_loses_no_token_and_keeps_the_order():
    engine = Engine(max_num_seqs=2)
    sequences = [engine.add(make_request(name, [n] * 6))[0] for n, name in enumerate("abc", start=1)]
    for _ in range(3):
        engine.step()
    engine.plan()
    engine.rewind()
    scheduler = engine.scheduler
    assert (scheduler.num_running, scheduler.num_uncommitted, scheduler.num_blocks_used) == (0, 0, 0)
    assert list(scheduler.waiting) == sequences
    plan = engine.plan()
    assert plan.epoch == 1
    assert plan.finished_rows == b"", "workers begin an epoch with no rows"
    engine.drain()
    for sequence in sequences:
        assert engine.tokens_of(sequence) == expected_answer(sequence.request, 0, 128)[0]


def test_a_result_from_before_a_rewind_is_refused():
    engine = Engine()
    engine.add(make_request("a", PROMPT))
    engine.plan()
    stale = engine.results[0]
    engine.rewind()
    engine.plan()
    with pytest.raises(EngineError, match="epoch 0, expected step 2 of epoch 1"):
        engine.scheduler.commit(stale)
    engine.drain()


# ---------------------------------------------------------------------------------------------------- figures


def test_used_blocks_and_filled_slots_count_shared_blocks_once():
    engine = Engine()
    engine.add(make_request("a", PROMPT, n=2))
    engine.step()
    engine.step()
    # Choice 0: 8 shared tokens and 3 more; choice 1: the shared ones and 2.
    assert engine.scheduler.num_blocks_used == 4
    assert engine.scheduler.num_slots_filled == 8 + 3 + 2


def test_a_row_start_carries_all_that_a_worker_needs():
    scheduler = make_scheduler()
    request = make_request("a", PROMPT, emitted=[[7, 7]], temperature=0.5)
    [sequence] = scheduler.add(request)
    [start] = scheduler.plan().new_rows
    assert start.tokens == pack_ids([*PROMPT, 7, 7])
    assert (start.num_prompt_tokens, start.num_computed_tokens, start.choice) == (10, 0, 0)
    assert (start.row, start.tables) == (sequence.row, [RowTable(pack_ids(sequence.tables[0].blocks))])
    assert (start.params, start.seed) == (RowParams.of(request.params), request.seed)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_row_with_invalid_logits_ends_alone_and_its_kv_is_not_used_again(depth: int):
    engine = Engine(block_size=4)
    prompt = list(range(1, 10))
    [bad] = engine.add(make_request("bad", [*prompt, 3]))
    [sound] = engine.add(make_request("sound", [7, 7, 7], max_tokens=20))
    for _ in range(depth):
        engine.plan()
    first = engine.results[0]
    engine.results[0] = msgspec.structs.replace(first, invalid_rows=pack_ids([bad.row]))
    updates = {update.sequence: update for update in engine.commit()}
    assert updates[bad].finish.code == "invalid_logits"
    assert updates[bad].token_ids == []
    assert updates[sound].finish is None
    [again] = engine.add(make_request("again", [*prompt, 4]))
    engine.drain(depth)
    assert again.num_cached_tokens == 0
    assert engine.tokens_of(sound) == expected_answer(sound.request, 0, 128)[0]
    assert engine.tokens_of(again) == expected_answer(again.request, 0, 128)[0]
    assert engine.scheduler.num_blocks_used == 0


def test_a_prefix_is_distrusted_once_a_sequence_that_used_it_had_invalid_logits():
    engine = Engine(block_size=4)
    prompt = list(range(1, 10))
    engine.add(make_request("first", prompt))
    engine.drain()
    [bad] = engine.add(make_request("bad", prompt))
    engine.plan()
    engine.results[0] = msgspec.structs.replace(engine.results[0], invalid_rows=pack_ids([bad.row]))
    engine.commit()
    assert bad.num_cached_tokens == 8
    [again] = engine.add(make_request("again", prompt))
    engine.drain()
    assert again.num_cached_tokens == 0


def test_the_prefix_of_a_sequence_that_was_preempted_before_its_logits_were_seen_to_be_invalid_is_distrusted():
    engine = Engine(max_num_seqs=1, max_num_batched_tokens=8)
    [bad] = engine.add(make_request("bad", PROMPT, priority=1))
    engine.step()
    engine.plan()
    engine.results[0] = msgspec.structs.replace(engine.results[0], invalid_rows=pack_ids([bad.row]))
    engine.add(make_request("high", [5], max_tokens=1))
    engine.plan()
    assert bad.status is Status.WAITING
    engine.commit()
    assert bad.finish.code == "invalid_logits"
    engine.drain()
    [again] = engine.add(make_request("again", PROMPT))
    engine.drain()
    assert again.num_cached_tokens == 0
