"""The definition of each rule, once more in float64 numpy, against the torch reference."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from rayllm_kernels.sampling import reference


def oracle_probs(
    logits_V: np.ndarray, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> np.ndarray:
    """Probabilities after min-p, top-k and top-p; 0 for what is dropped."""
    exact_V = logits_V.astype(np.float64)
    probs_V = np.exp((exact_V - exact_V.max()) / temperature)
    probs_V[probs_V < min_p] = 0
    values, group_V = np.unique(-exact_V, return_inverse=True)  # group 0 is the most likely
    sizes = np.bincount(group_V, minlength=len(values))
    if top_k:
        probs_V[(np.cumsum(sizes) - sizes)[group_V] >= top_k] = 0
    if top_p < 1:
        masses = np.bincount(group_V, weights=probs_V, minlength=len(values))
        probs_V[(np.cumsum(masses) - masses)[group_V] >= top_p * probs_V.sum()] = 0
    return probs_V / probs_V.sum()


def full(number: float | None, num: int) -> torch.Tensor | None:
    return None if number is None else torch.full((num,), float(number), dtype=torch.float64)


def drawn(
    logits_V: np.ndarray,
    uniforms: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    num_candidates: int = 64,
) -> np.ndarray:
    num = len(uniforms)
    logits_NV = torch.from_numpy(logits_V).float().expand(num, -1)
    uniform_N = torch.from_numpy(uniforms)
    rules = reference.Rules(
        torch.full((num,), temperature, dtype=torch.float64),
        min_p_N=full(min_p or None, num),
        top_k_N=full(top_k or None, num),
        top_p_N=full(top_p if top_p < 1 else None, num),
    )
    if not top_k and top_p == 1:
        ids, _ = reference.sample_all(logits_NV, rules, uniform_N)
    else:
        ids, _ = reference.sample_top(logits_NV, rules, uniform_N, num_candidates)
    return ids.numpy()


def assert_draws_follow(probs_V: np.ndarray, logits_V: np.ndarray, **rules: float) -> None:
    """Each token's interval of the unit line, tried just inside both of its ends."""
    ends_V = np.cumsum(probs_V)
    margin = 3e-6
    tested = np.flatnonzero(probs_V > 3 * margin)[:200]
    begins = ends_V[tested] - probs_V[tested] + margin
    np.testing.assert_array_equal(drawn(logits_V, begins, **rules), tested)
    np.testing.assert_array_equal(drawn(logits_V, ends_V[tested] - margin, **rules), tested)
    # A weight is a whole number: what is below one unit of 2**-34 of the highest is never drawn.
    outermost = np.flatnonzero(probs_V > 1.00001 * 2.0**-34 * probs_V.max())[[0, -1]]
    np.testing.assert_array_equal(drawn(logits_V, np.array([0.0, 1 - 2.0**-53]), **rules), outermost)


def words(*hexes: str) -> list[int]:
    return [int(word, 16) for word in hexes]


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (words("0", "0", "0", "0"), words("0", "0"), words("6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8")),
        (
            words(*["ffffffff"] * 4),
            words(*["ffffffff"] * 2),
            words("408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"),
        ),
        (
            words("243f6a88", "85a308d3", "13198a2e", "03707344"),
            words("a4093822", "299f31d0"),
            words("d16cfe09", "94fdcceb", "5001e420", "24126ea1"),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    answer = reference.philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])
    assert answer[:, 0].tolist() == expected


def python_uniform(seed: int, choice: int, position: int) -> float:
    """Philox in Python's own integers, written from the paper."""
    counter = [position & 0xFFFFFFFF, position >> 32, choice, 0]
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0],
            second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1],
            first & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return ((counter[0] >> 5) * 2**26 + (counter[1] >> 6)) / 2**53


def test_uniform_is_philox_keyed_by_the_seed_for_any_int64() -> None:
    seeds = [0, 1, -1, 42, -(2**63), 2**63 - 1, 2**32, -(2**31)]
    keys = list(product(seeds, [0, 1, 127], [0, 1, 1000, 2**31]))
    ours = reference.uniform(*torch.tensor(keys).unbind(1)).tolist()
    assert ours == [python_uniform(*key) for key in keys]
    assert len(set(ours)) == len(ours)
    assert all(0 <= number < 1 for number in ours)


def test_uniform_fills_the_unit_line_evenly() -> None:
    position_N = torch.arange(20_000)
    numbers_N = reference.uniform(torch.full_like(position_N, 7), torch.zeros_like(position_N), position_N)
    counts = torch.histc(numbers_N, bins=50, min=0, max=1)
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert chi_square < 49 + 4 * (2 * 49) ** 0.5


RULES = [
    {},
    {"temperature": 0.5},
    {"temperature": 5.0, "min_p": 0.3},
    {"min_p": 0.02},
    {"top_k": 2},
    {"top_k": 7, "temperature": 3.0},
    {"top_k": 40},
    {"top_p": 0.5},
    {"top_p": 0.9, "temperature": 2.0},
    {"top_p": 0.999},
    {"top_p": 1e-9},
    {"top_k": 10, "top_p": 0.8},
    {"top_k": 30, "top_p": 0.95, "min_p": 0.05},
    {"top_p": 0.7, "min_p": 0.1},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 5, 64, 333])
@pytest.mark.parametrize("step", [None, 0.5, 2.0], ids=["no ties", "ties", "many ties"])
def test_exactly_the_kept_tokens_are_drawn_each_in_its_interval(
    rules: dict[str, float], vocab_size: int, step: float | None
) -> None:
    generator = np.random.default_rng(vocab_size)
    logits_V = generator.normal(0, 2.5, vocab_size).astype(np.float32)
    if step is not None:
        logits_V = np.round(logits_V / step) * np.float32(step)
    assert_draws_follow(oracle_probs(logits_V, **rules), logits_V, **rules)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("step", [None, 0.125], ids=["no ties", "ties"])
def test_a_large_vocabulary_is_searched_in_blocks_and_gives_the_same_sets(
    rules: dict[str, float], step: float | None
) -> None:
    generator = np.random.default_rng(3)
    logits_V = generator.normal(0, 1, 32_003).astype(np.float32)
    logits_V[generator.permutation(32_003)[:40]] += np.linspace(14, 4, 40, dtype=np.float32)
    logits_V[-1] = 15  # in the tail behind the last whole block
    if step is not None:
        logits_V = np.round(logits_V / step) * np.float32(step)
    assert_draws_follow(oracle_probs(logits_V, **rules), logits_V, **rules)


@pytest.mark.parametrize("rules", [{"top_p": 0.9}, {"top_k": 3000}, {"top_k": 100, "top_p": 0.5}, {"top_k": 64}])
@pytest.mark.parametrize("num_candidates", [1, 16, 64, 256])
def test_rows_that_need_more_than_the_candidates_are_drawn_all_the_same(
    rules: dict[str, float], num_candidates: int
) -> None:
    generator = np.random.default_rng(5)
    logits_V = np.round(generator.normal(0, 1, 20_000), 2).astype(np.float32)
    logits_V[::7] = -np.inf
    uniforms = generator.random(8)
    probs_V = oracle_probs(logits_V, **rules)
    expected = np.searchsorted(np.cumsum(probs_V), uniforms, side="right")
    np.testing.assert_array_equal(drawn(logits_V, uniforms, **rules, num_candidates=num_candidates), expected)


def test_ties_at_the_edge_are_kept_whole() -> None:
    logits_V = np.array([1, 3, 2, 2, 2, 0], dtype=np.float32)
    for rules, kept in [
        ({"top_k": 2}, [1, 2, 3, 4]),
        ({"top_k": 4}, [1, 2, 3, 4]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.5}, [1, 2, 3, 4]),
        ({"top_p": 0.01}, [1]),
        ({"min_p": 0.36}, [1, 2, 3, 4]),
    ]:
        probs_V = oracle_probs(logits_V, **rules)
        assert np.flatnonzero(probs_V).tolist() == kept
        assert sorted(set(drawn(logits_V, np.linspace(0, 0.9999, 500), **rules))) == kept


def test_minus_zero_ties_with_zero() -> None:
    logits_V = np.zeros(6000, dtype=np.float32)
    logits_V[::2] = -0.0
    logits_V[0] = 5.0
    uniforms = np.linspace(0.5, 0.999, 40)
    for rules in ({"top_k": 2}, {"top_p": 0.5}):
        expected = np.searchsorted(np.cumsum(oracle_probs(logits_V, **rules)), uniforms, side="right")
        np.testing.assert_array_equal(drawn(logits_V, uniforms, **rules), expected)


def test_more_equal_tokens_than_candidates_are_all_kept() -> None:
    logits_V = np.zeros(10_000, dtype=np.float32)
    uniforms = (np.arange(0, 10_000, 500) + 0.5) / 10_000
    for rules in ({"top_k": 3}, {"top_p": 0.25}, {"top_k": 3, "top_p": 0.25}):
        np.testing.assert_array_equal(drawn(logits_V, uniforms, **rules), np.arange(0, 10_000, 500))


@pytest.mark.parametrize("rules", [{}, {"temperature": 0.6}, {"top_k": 8}, {"top_p": 0.85}, {"min_p": 0.05}], ids=str)
def test_frequencies_of_many_draws_are_the_probabilities(rules: dict[str, float]) -> None:
    logits_V = np.random.default_rng(0).normal(0, 1.5, 40).astype(np.float32)
    position_N = torch.arange(20_000)
    uniform_N = reference.uniform(torch.full_like(position_N, 11), torch.full_like(position_N, 1), position_N)
    expected_V = oracle_probs(logits_V, **rules) * 20_000
    observed_V = np.bincount(drawn(logits_V, uniform_N.numpy(), **rules), minlength=40)
    kept_V = expected_V > 0
    assert observed_V[~kept_V].sum() == 0
    chi_square = float(((observed_V - expected_V)[kept_V] ** 2 / expected_V[kept_V]).sum())
    freedom = kept_V.sum() - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("vocab_size", [3, 64, 70, 1000, 20_001])
def test_greedy_takes_the_lowest_of_the_most_likely_ids(vocab_size: int) -> None:
    generator = np.random.default_rng(vocab_size)
    logits_NV = np.round(generator.normal(0, 1, (6, vocab_size)) * 2).astype(np.float32)
    logits_NV[0, -1] = 100
    logits_NV[1, :] = -np.inf
    logits_NV[1, vocab_size // 2] = -5
    ids_N, best_N = reference.greedy(torch.from_numpy(logits_NV))
    np.testing.assert_array_equal(ids_N.numpy(), logits_NV.argmax(1))
    np.testing.assert_array_equal(best_N.numpy(), logits_NV.max(1))


@pytest.mark.parametrize("place", [0, 77, 999])
def test_greedy_shows_a_nan_wherever_it_is(place: int) -> None:
    logits_NV = torch.randn(2, 1000)
    logits_NV[1, place] = torch.nan
    _, best_N = reference.greedy(logits_NV)
    assert best_N.isnan().tolist() == [False, True]


@pytest.mark.parametrize("num", [1, 5, 20, 64, 5000])
@pytest.mark.parametrize("vocab_size", [40, 6000, 20_011])
def test_candidates_hold_every_token_above_their_floor(num: int, vocab_size: int) -> None:
    logits_NV = (torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(num)) * 20).round()
    values_NK, ids_NK, floor_N = reference.candidates(logits_NV, num)
    assert torch.equal(logits_NV.gather(1, ids_NK), values_NK)
    for logits_V, values_K, ids_K, floor in zip(logits_NV, values_NK, ids_NK.tolist(), floor_N):
        assert len(set(ids_K)) == len(ids_K)
        assert set((logits_V > floor).nonzero()[:, 0].tolist()) <= set(ids_K)
        assert list(zip((-values_K).tolist(), ids_K)) == sorted(zip((-values_K).tolist(), ids_K))
        top = logits_V.sort(descending=True).values[: len(values_K)]
        assert torch.equal(values_K, top)


def test_sums_of_weights_do_not_depend_on_their_order() -> None:
    logits_1V = torch.randn(1, 150_000) * 4
    weights_1V = reference.token_weights(logits_1V, logits_1V.amax(1), reference.Rules(torch.ones(1)))
    shuffled_1V = weights_1V[:, torch.randperm(150_000)]
    assert weights_1V.sum(dtype=torch.float64) == shuffled_1V.double().cumsum(1)[0, -1]
