"""Rows, groups, masks and streams of draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from drawing import sample
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rayllm.errors import RequestError
from rayllm.messages import RowParams
from rayllm.sampling.sampler import Sampler
from rayllm.transfer.upload import Upload
from rayllm_kernels.sampling import reference

V = 3000
EOS = 7
ALL_KINDS = [
    RowParams(temperature=0),
    RowParams(temperature=0, logprobs=2),
    RowParams(),
    RowParams(temperature=1.7),
    RowParams(min_p=0.1),
    RowParams(top_p=0.9),
    RowParams(top_p=0.3, min_p=0.01, logprobs=1),
    RowParams(top_k=5),
    RowParams(top_k=500),
    RowParams(top_k=2000, top_p=0.99),
    RowParams(top_k=50, top_p=0.8, min_p=0.02, temperature=0.6),
    RowParams(repetition_penalty=1.4, temperature=0),
    RowParams(repetition_penalty=0.8, presence_penalty=0.5, frequency_penalty=0.3, top_k=20),
    RowParams(frequency_penalty=-1.0, top_p=0.95),
    RowParams(logit_bias={3: 5.0, 9: -100.0}, min_tokens=3, stop_token_ids=(11,)),
    RowParams(allowed_token_ids=tuple(range(0, V, 17))),
]


def make_sampler(vocab_size: int = V, max_rows: int = 32, eos: tuple[int, ...] = (EOS,)) -> Sampler:
    return Sampler(
        max_rows=max_rows,
        vocab_size=vocab_size,
        max_model_len=64,
        eos_token_ids=eos,
        device=torch.device("cpu"),
    )


def logits_of(request: int, position: int, vocab_size: int = V) -> torch.Tensor:
    """What a model would answer: it depends on the request and the position only."""
    generator = torch.Generator().manual_seed(1000 * request + position)
    return torch.randn(vocab_size, generator=generator) * 3


def stream(params: RowParams, *, seed: int = 5, choice: int = 0, num: int = 6, request: int = 0) -> list[int]:
    """The tokens of a row that is alone."""
    sampler = make_sampler()
    sampler.set_row(0, params, seed, choice, [1, 2, 3], 3)
    return [
        sample(sampler, logits_of(request, position)[None], [0]).token_ids_N.array.item() for position in range(num)
    ]


def sample_once(params: RowParams, logits_V: torch.Tensor, *, prompt: list[int], emitted: list[int]) -> int:
    sampler = make_sampler(len(logits_V))
    sampler.set_row(0, params, 1, 0, prompt + emitted, len(prompt))
    return int(sample(sampler, logits_V.clone()[None], [0]).token_ids_N.array.item())


def test_a_row_draws_the_same_alone_and_in_any_company_at_any_row() -> None:
    alone = [stream(params, seed=i, choice=i % 3, request=i) for i, params in enumerate(ALL_KINDS)]
    shuffle = np.random.default_rng(0)
    sampler = make_sampler()
    row_of = shuffle.permutation(32)[: len(ALL_KINDS)].tolist()
    together: list[list[int]] = [[] for _ in ALL_KINDS]
    for i, params in enumerate(ALL_KINDS):
        sampler.set_row(row_of[i], params, i, i % 3, [1, 2, 3], 3)
    while any(len(tokens) < 6 for tokens in together):
        unfinished = [i for i, tokens in enumerate(together) if len(tokens) < 6]
        present = shuffle.permutation(unfinished)[: shuffle.integers(1, 9)].tolist()
        logits_NV = torch.stack([logits_of(i, len(together[i])) for i in present])
        sampled = sample(sampler, logits_NV, [row_of[i] for i in present])
        for i, token_id in zip(present, sampled.token_ids_N.array.tolist()):
            together[i].append(token_id)
    assert together == alone


def test_a_replayed_row_goes_on_where_its_stream_stopped() -> None:
    for request, params in enumerate(ALL_KINDS):
        whole = stream(params, seed=-3, choice=2, num=8, request=request)
        sampler = make_sampler()
        sampler.set_row(4, ALL_KINDS[12], 0, 0, [5], 1)  # the row's last tenant leaves no trace
        sample(sampler, logits_of(9, 9)[None], [4])
        sampler.clear_row(4)
        sampler.set_row(4, params, -3, 2, [1, 2, 3, *whole[:5]], 3)
        rest = [sample(sampler, logits_of(request, i)[None], [4]).token_ids_N.array.item() for i in range(5, 8)]
        assert rest == whole[5:], params


def test_a_row_set_anew_forgets_the_sequence_before() -> None:
    params = RowParams(frequency_penalty=2.0, temperature=0)
    sampler = make_sampler(4, eos=())
    for _ in range(3):
        sampler.set_row(0, params, 0, 0, [0], 1)
        logits_1V = torch.tensor([[0.0, 1.0, 0.5, -9.0]])
        assert [sample(sampler, logits_1V.clone(), [0]).token_ids_N.array.item() for _ in range(3)] == [1, 2, 0]


def test_seeds_and_choices_give_different_streams() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**32]
    streams = [stream(RowParams(), seed=seed, choice=choice) for seed in seeds for choice in (0, 1, 127)]
    assert len({tuple(tokens) for tokens in streams}) == len(streams)
    assert stream(RowParams(), seed=-1) == stream(RowParams(), seed=-1)


def test_sampling_leaves_torchs_own_generator_alone() -> None:
    state = torch.get_rng_state()
    stream(RowParams(top_p=0.9))
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_needs_no_seed_and_takes_the_lowest_of_equals() -> None:
    logits_V = torch.zeros(V)
    logits_V[[40, 90, 2999]] = 3.0
    for params in (
        RowParams(temperature=0),
        RowParams(temperature=1e-30),
        RowParams(temperature=9e-6, top_p=0.5),
        RowParams(top_k=1),
    ):
        assert sample_once(params, logits_V, prompt=[1], emitted=[]) == 40


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 0.01])
def test_a_small_temperature_takes_the_most_likely_token(temperature: float) -> None:
    logits_V = torch.linspace(-3e4, 3e4, V)
    for rules in ({}, {"top_p": 0.9}, {"top_k": 9}):
        params = RowParams(temperature=temperature, **rules)
        assert sample_once(params, logits_V, prompt=[1], emitted=[]) == V - 1


@pytest.mark.parametrize(
    "rules",
    [
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.2},
        {"top_k": 9, "top_p": 0.6},
        {"min_p": 0.05, "top_k": 12, "top_p": 0.9, "temperature": 0.8},
    ],
    ids=str,
)
def test_the_kept_tokens_are_those_of_transformers(rules: dict[str, float]) -> None:
    vocab_size, num_draws = 40, 3000
    logits_V = torch.randn(vocab_size, generator=torch.Generator().manual_seed(2)) * 1.5
    params = RowParams(**rules)
    scores = TemperatureLogitsWarper(params.temperature)(None, logits_V[None])
    if params.min_p:
        scores = MinPLogitsWarper(params.min_p)(None, scores)
    if params.top_k:
        scores = TopKLogitsWarper(params.top_k)(None, scores)
    if params.top_p < 1:
        scores = TopPLogitsWarper(params.top_p)(None, scores)
    kept = (scores[0] > -math.inf).nonzero()[:, 0].tolist()
    sampler = make_sampler(vocab_size, max_rows=num_draws)
    for row in range(num_draws):
        sampler.set_row(row, params, row, 0, [1], 1)
    sampled = sample(sampler, logits_V.repeat(num_draws, 1), list(range(num_draws)))
    assert sorted(set(sampled.token_ids_N.array.tolist())) == kept
    counts = torch.bincount(torch.from_numpy(sampled.token_ids_N.array), minlength=vocab_size)[kept].double()
    expected = scores[0].softmax(0)[kept].double() * num_draws
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < len(kept) - 1 + 4 * (2 * (len(kept) - 1)) ** 0.5


def test_bias_moves_a_logit_and_allowed_ids_bound_the_choice() -> None:
    logits_V = torch.arange(10.0)
    for params, expected in [
        (RowParams(temperature=0, logit_bias={2: 8.0}), 2),
        (RowParams(temperature=0, logit_bias={9: -100.0}), 8),
        (RowParams(temperature=0, allowed_token_ids=(4, 1, 4)), 4),
        (RowParams(temperature=0, allowed_token_ids=(4, 1), logit_bias={1: 3.5, 8: 100.0}), 1),
        (RowParams(temperature=1, top_p=0.99, allowed_token_ids=(3,)), 3),
        (RowParams(temperature=1, top_k=4, allowed_token_ids=(3,)), 3),
    ]:
        assert sample_once(params, logits_V, prompt=[1], emitted=[]) == expected


def test_all_allowed_ids_are_drawn_and_no_other() -> None:
    allowed = (3, 500, 2999)
    for rules in ({}, {"top_p": 0.99999}, {"top_k": 10}, {"top_k": 2500}):
        params = RowParams(allowed_token_ids=allowed, temperature=10, **rules)
        seen = {stream(params, seed=seed, num=1)[0] for seed in range(60)}
        assert seen == set(allowed)


def test_end_tokens_are_masked_until_min_tokens_are_emitted() -> None:
    logits_V = torch.zeros(20)
    logits_V[EOS], logits_V[11], logits_V[2] = 9.0, 8.0, 1.0
    sampler = make_sampler(20)
    params = RowParams(temperature=0, min_tokens=2, stop_token_ids=(11, 10**6), ignore_eos=True)
    sampler.set_row(0, params, 0, 0, [1, 1], 2)
    sampler.set_row(1, params, 0, 0, [1, 1, 2], 2)  # has emitted one already
    rows = [sample(sampler, logits_V.repeat(2, 1), [0, 1]).token_ids_N.array.tolist() for _ in range(3)]
    assert rows == [[2, 2], [2, EOS], [EOS, EOS]]


def test_min_tokens_gives_way_where_only_end_tokens_are_allowed() -> None:
    logits_V = torch.arange(20.0)
    params = RowParams(min_tokens=5, stop_token_ids=(3,), allowed_token_ids=(3, EOS), temperature=0)
    assert sample_once(params, logits_V, prompt=[1], emitted=[]) == EOS


@pytest.mark.parametrize("params", ALL_KINDS[:12], ids=str)
def test_logits_that_are_not_numbers_make_their_row_invalid_and_no_other(params: RowParams) -> None:
    for poison in (math.nan, math.inf):
        sampler = make_sampler()
        sampler.set_row(0, params, 0, 0, [1], 1)
        sampler.set_row(5, params, 0, 0, [1], 1)
        logits_NV = torch.randn(2, V)
        logits_NV[1, 1234] = poison
        sound_1V = logits_NV[:1].clone()
        sampled = sample(sampler, logits_NV, [0, 5])
        assert sampled.invalid_rows() == {5}
        assert 0 <= int(sampled.token_ids_N.array[1]) < V
        sampler.set_row(0, params, 0, 0, [1], 1)
        assert sample(sampler, sound_1V, [0]).token_ids_N.array[0] == sampled.token_ids_N.array[0]
        assert (sampled.by_row().get(5) is None) or poison != math.nan


def test_logits_that_leave_no_token_make_their_row_invalid() -> None:
    sampler = make_sampler()
    sampler.set_row(0, RowParams(), 0, 0, [1], 1)
    assert sample(sampler, torch.full((1, V), -math.inf), [0]).invalid_rows() == {0}


def test_tokens_that_a_model_rules_out_are_never_drawn() -> None:
    logits_V = torch.full((V,), -math.inf)
    logits_V[[10, 20]] = 0.0
    for rules in ({}, {"top_k": 5}, {"top_p": 0.9}, {"top_k": 2000}, {"repetition_penalty": 2.0}):
        seen = {sample_once(RowParams(**rules), logits_V, prompt=[1, 10], emitted=[0] * n) for n in range(12)}
        assert seen == {10, 20}


def test_ids_beyond_the_vocabulary_are_refused_by_name() -> None:
    sampler = make_sampler(100)
    with pytest.raises(RequestError, match="logit_bias holds token id 100, but the model's ids end at 99"):
        sampler.set_row(0, RowParams(logit_bias={100: 1.0}), 0, 0, [1], 1)
    with pytest.raises(RequestError, match="allowed_token_ids holds token id 4000"):
        sampler.set_row(0, RowParams(allowed_token_ids=(1, 4000)), 0, 0, [1], 1)


def test_a_vocabulary_beyond_exact_sums_is_refused() -> None:
    with pytest.raises(ValueError, match=f"vocab_size={reference.MAX_VOCAB_SIZE + 1} is above"):
        make_sampler(reference.MAX_VOCAB_SIZE + 1)


def test_token_ids_stay_int64_on_the_device_and_logprobs_come_for_rows_that_asked() -> None:
    sampler = make_sampler()
    for row, params in enumerate(ALL_KINDS):
        sampler.set_row(row, params, row, 0, [1], 1)
    rows = [6, 2, 1, 0]
    logits_NV = torch.randn(4, V)
    sampled = sample(sampler, logits_NV.clone(), rows)
    assert sampled.token_ids_N.array.dtype == np.int64
    found = sampled.by_row()
    assert sorted(found) == [1, 6]
    for row, num_top in ((6, 1), (1, 2)):
        line = rows.index(row)
        ids = np.frombuffer(found[row].ids, dtype=np.int32)
        values = np.frombuffer(found[row].values, dtype=np.float32)
        assert len(ids) == len(values) == 1 + num_top
        assert ids[0] == sampled.token_ids_N.array[line]
        exact_V = logits_NV[line].double().log_softmax(0)
        np.testing.assert_allclose(values, exact_V[ids.tolist()].numpy(), rtol=1e-6)


def test_logprobs_are_those_of_the_raw_logits() -> None:
    params = RowParams(temperature=0, logprobs=3, logit_bias={5: 100.0}, repetition_penalty=2.0, presence_penalty=2.0)
    sampler = make_sampler(50)
    sampler.set_row(0, params, 0, 0, [1, 2, 3], 3)
    logits_1V = torch.randn(1, 50, generator=torch.Generator().manual_seed(1))
    found = sample(sampler, logits_1V.clone(), [0]).by_row()[0]
    exact_V = logits_1V[0].double().log_softmax(0)
    assert np.frombuffer(found.ids, dtype=np.int32).tolist() == [5, *exact_V.topk(3).indices.tolist()]
    assert np.frombuffer(found.values, dtype=np.float32)[0] == pytest.approx(exact_V[5].item(), rel=1e-6)
    assert found.rank == 1 + int((exact_V > exact_V[5]).sum())


def test_a_rows_token_is_written_where_the_next_step_reads_it() -> None:
    sampler = make_sampler(10)
    for row in (2, 4):
        sampler.set_row(row, RowParams(temperature=0), 0, 0, [1], 1)
    upload = Upload(torch.device("cpu"))
    draws = sampler.prepare(upload, [4, 2])
    upload.send()
    last_token_M = torch.full((6,), -1)
    sampler.sample(torch.eye(10)[[7, 3]], draws, last_token_M)
    assert last_token_M.tolist() == [-1, -1, 3, -1, 7, -1]


def mixed_stream(num_steps: int) -> list[tuple[list[int], list[int], set[int]]]:
    """Tokens, stuck rows and invalid rows of steps in which each row draws another way, two of them under a mask."""
    kinds = [
        RowParams(temperature=0, repetition_penalty=1.3),
        RowParams(logit_bias={5: 3.0}, min_tokens=2),
        RowParams(top_p=0.8, allowed_token_ids=tuple(range(3, 90))),
        RowParams(top_k=20, top_p=0.9, bad_words_token_ids=((4, 5), (6,))),
        RowParams(temperature=0, allowed_token_ids=(1,)),
    ]
    sampler = make_sampler(100, max_rows=8)
    for row, params in enumerate(kinds):
        sampler.set_row(row, params, row, 0, [1, 2], 2)
    bits_2B = np.packbits(np.arange(200).reshape(2, 100) % 3 > 0, axis=1, bitorder="little")
    bits_2B[1] = 0
    steps = []
    for position in range(num_steps):
        logits_NV = torch.stack([logits_of(row, position, 100) for row in range(len(kinds))])
        sampled = sample(sampler, logits_NV, list(range(len(kinds))), ([1, 4], bits_2B))
        steps.append((sampled.token_ids_N.array[:4].tolist(), sampled.stuck_rows(), sampled.invalid_rows()))
    return steps


@pytest.mark.kernels
def test_the_kernels_of_a_gpu_draw_the_same_tokens(interpreted_kernels: None) -> None:
    by_kernels = mixed_stream(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rayllm_kernels.device._interpreted", False)
        assert mixed_stream(3) == by_kernels
    assert all(stuck == [4] for _, stuck, _ in by_kernels)
