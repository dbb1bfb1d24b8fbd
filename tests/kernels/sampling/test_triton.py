"""The Triton kernels draw the very tokens of the reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_accuracy import Buffers

from rayllm_kernels.launch import launch
from rayllm_kernels.sampling import Draw, Group, reference
from rayllm_kernels.sampling.triton import draw as kernels
from rayllm_kernels.sampling.triton import row

NAN, INF = float("nan"), float("inf")


@dataclass
class Line:
    """How one line draws."""

    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    choice: int = 0
    position: int = 0
    is_bound: bool = False
    draw: Draw = field(init=False)

    def __post_init__(self) -> None:
        if self.temperature == 0:
            self.draw, self.temperature = Draw.GREEDY, 1.0
        elif self.top_k:
            self.draw = Draw.TOP_K
        else:
            self.draw = Draw.TOP_P if self.top_p < 1 else Draw.ALL


def groups_of(lines: list[Line]) -> list[Group]:
    groups = []
    for draw in {line.draw for line in lines}:
        members = torch.tensor([i for i, line in enumerate(lines) if line.draw is draw])
        groups.append(Group(draw, members, 64, True, any(line.top_p < 1 for line in lines if line.draw is draw)))
    return groups


def drawn(implementation, logits_NV: torch.Tensor, lines: list[Line], buffers: Buffers | None = None):
    """Ids, usable and stuck lines, and what was written of the newest tokens."""
    keys = torch.tensor([[line.draw, line.seed, line.choice, line.position] for line in lines]).T.contiguous()
    numbers = [[line.temperature, line.min_p, line.top_k, line.top_p] for line in lines]
    numbers_4N = torch.tensor(numbers, dtype=torch.float64).T.contiguous()
    is_bound_N = torch.tensor([line.is_bound for line in lines], dtype=torch.uint8)
    last_token_M = torch.full((2 * len(lines),), -5)
    rows_N = torch.arange(len(lines)).flip(0) * 2
    if buffers is not None:
        logits_NV, keys, numbers_4N, rows_N, is_bound_N = map(
            buffers.input, (logits_NV, keys, numbers_4N, rows_N, is_bound_N)
        )
        last_token_M = buffers.inout(last_token_M)
    found = implementation.sample(logits_NV, keys, numbers_4N, groups_of(lines), rows_N, last_token_M, is_bound_N)
    return [part.tolist() for part in (*found, last_token_M)]


def assert_same(logits_NV: torch.Tensor, lines: list[Line], buffers: Buffers | None = None) -> list[int]:
    found = drawn(kernels, logits_NV, lines, buffers)
    assert found == drawn(reference, logits_NV, lines)
    return found[0]


def random_lines(rng: np.random.Generator, num: int, *, only: tuple[Draw, ...] = tuple(Draw)) -> list[Line]:
    lines: list[Line] = []
    while len(lines) < num:
        line = Line(
            temperature=float(rng.choice([0, 0.3, 0.7, 1, 1.6, 8])),
            min_p=float(rng.choice([0, 0, 0.003, 0.2])),
            top_k=int(rng.choice([0, 0, 2, 7, 40, 300])),
            top_p=float(rng.choice([1, 1, 0.3, 0.9, 0.999, 1e-9])),
            seed=int(rng.integers(-(2**63), 2**63)),
            choice=int(rng.integers(0, 9)),
            position=int(rng.integers(0, 10_000)),
        )
        if line.draw in only:
            lines.append(line)
    return lines


def random_logits(rng: np.random.Generator, num: int, vocab_size: int) -> torch.Tensor:
    """Some peaked, some flat, some with ties, some with ids that are ruled out."""
    logits_NV = rng.normal(0, 1, (num, vocab_size)) * rng.choice([0.01, 1, 3, 12], (num, 1))
    steps = rng.choice([0, 0, 0.25, 2], (num, 1))
    logits_NV = np.where(steps > 0, np.round(logits_NV / np.maximum(steps, 0.1)) * steps, logits_NV)
    logits_NV[rng.random((num, vocab_size)) < rng.choice([0, 0, 0.3, 0.999], (num, 1))] = -np.inf
    logits_NV[:, rng.integers(vocab_size)] = rng.normal(0, 1, num)  # so that no line is without any
    return torch.from_numpy(logits_NV.astype(np.float32))


def test_tokens_of_all_kinds_are_the_references(buffers: Buffers) -> None:
    lines = [Line(top_k=40, top_p=0.9, seed=3), Line(top_p=0.8), Line(min_p=0.01), Line(temperature=0)]
    assert_same(random_logits(np.random.default_rng(1), len(lines), 333), lines, buffers)


@pytest.mark.kernels
@pytest.mark.parametrize(("vocab_size", "split"), [(1, 4096), (17, 16), (700, 128), (2003, 512)])
def test_many_random_rows(vocab_size: int, split: int, buffers: Buffers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MIN_SPLIT", split)
    rng = np.random.default_rng(vocab_size)
    assert_same(random_logits(rng, 16, vocab_size), random_lines(rng, 16), buffers)


@pytest.mark.kernels
def test_ties_at_the_edge_are_kept_whole() -> None:
    logits_V = torch.tensor([1.0, 3, 2, 2, -0.0, 2, 0, 0.0])
    for rules, kept in [
        ({"top_k": 2}, [1, 2, 3, 5]),
        ({"top_k": 4}, [1, 2, 3, 5]),
        ({"top_k": 6}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"top_p": 0.5}, [1, 2, 3, 5]),
        ({"top_p": 0.01}, [1]),
        ({"min_p": 0.36}, [1, 2, 3, 5]),
    ]:
        lines = [Line(position=i, temperature=4 if rules == {"top_k": 6} else 1, **rules) for i in range(20)]
        assert sorted(set(assert_same(logits_V.repeat(len(lines), 1), lines))) == kept


@pytest.mark.kernels
@pytest.mark.parametrize("room", [1, 8, 256])
def test_rows_that_keep_more_than_there_is_room_for_are_drawn_all_the_same(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_NUM_COLLECTED", room)
    logits_NV = torch.randn(5, 900, generator=torch.Generator().manual_seed(0)).div(8)
    logits_NV[1] = 0.0
    rules = [{"top_p": 0.9}, {"top_k": 3}, {"top_k": 500, "top_p": 0.5}, {"top_k": 300}, {"top_p": 0.002}]
    assert_same(logits_NV, [Line(position=i, **each) for i, each in enumerate(rules)])


@pytest.mark.kernels
def test_lines_without_a_meaning_are_named_and_stay_in_the_vocabulary() -> None:
    rules: list[dict[str, float]] = [{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 5}]
    for each in rules:
        logits_NV = torch.randn(5, 100)
        logits_NV[0, 77] = NAN
        logits_NV[1, 99] = INF
        logits_NV[2:4] = -INF
        lines = [Line(is_bound=is_bound, **each) for is_bound in (True, True, False, True, True)]
        token_ids, is_usable, is_stuck, _ = drawn(kernels, logits_NV, lines)
        assert all(0 <= token_id < 100 for token_id in token_ids)
        assert is_usable == [False, False, False, True, True]
        assert is_stuck == [False, False, False, True, False]
        expected = drawn(reference, logits_NV, lines)
        assert [is_usable, is_stuck, token_ids[4]] == [*expected[1:3], expected[0][4]]


@triton.jit
def _weigh(logits_ptr, weights_ptr, highest, scale, min_p, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(weights_ptr + at, row.weigh(tl.load(logits_ptr + at), highest, scale, min_p))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.7])
def test_weights_are_the_references_to_the_last_bit(temperature: float) -> None:
    logits_1V = torch.randn(1, 2**17, generator=torch.Generator().manual_seed(7)) * 8
    max_1, temperature_1 = logits_1V.amax(1), torch.tensor([temperature], dtype=torch.float64)
    for min_p in (0.0, 0.02):
        rules = reference.Rules(temperature_1, min_p_N=torch.tensor([min_p]))
        found_1V = torch.empty(logits_1V.shape, dtype=torch.int64)
        scale = (1.4426950408889634 / temperature_1).float().item()
        launch(_weigh, (4,), logits_1V, found_1V, max_1.item(), scale, np.float32(min_p).item(), BLOCK=2**15)
        assert torch.equal(found_1V, reference.token_weights(logits_1V, max_1, rules).long())


@triton.jit
def _draw_uniforms(keys_ptr, uniforms_ptr, NUM: tl.constexpr):
    at = tl.arange(0, NUM)
    tl.store(uniforms_ptr + at, row.draw_uniform(keys_ptr, at, NUM))


def test_uniform_numbers_are_the_references() -> None:
    ends = torch.iinfo(torch.int64)
    keys_4N = torch.randint(ends.min, ends.max, (4, 512), generator=torch.Generator().manual_seed(0))
    uniform_N = torch.empty(512, dtype=torch.float64)
    launch(_draw_uniforms, (1,), keys_4N, uniform_N, NUM=512)
    assert torch.equal(uniform_N, reference.uniform(*keys_4N[1:]))
