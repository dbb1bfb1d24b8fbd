from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_interpreter import corrected

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.moe import Experts, SparseMlp
from rayllm.spec import ClampedSwiglu, ExpertSpec, MlpSpec, RouterSpec, SparseMlpSpec
from rayllm.weights.source import DummyWeights
from rayllm_kernels.device import interpreted

WIDTH, INNER, NUM_EXPERTS = 16, 12, 6
SPEC = SparseMlpSpec(RouterSpec(NUM_EXPERTS, 2, "softmax", renormalize=True), ExpertSpec(INNER, "silu"))


def _weights() -> DummyWeights:
    return DummyWeights(0, torch.float32, torch.device("cpu"))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _mlp(x: Tensor, prefix: str, inner: int) -> Tensor:
    shapes = {"gate": (inner, WIDTH), "up": (inner, WIDTH), "down": (WIDTH, inner)}
    gate, up, down = (_weights().tensor(f"{prefix.format(name)}.weight", shape) for name, shape in shapes.items())
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def _expected(x: Tensor, experts: Tensor, scores: Tensor, weighs_inputs: bool = False) -> Tensor:
    rows = []
    for row, chosen, weights in zip(x, experts.tolist(), scores.tolist(), strict=True):
        out = torch.zeros(WIDTH)
        for expert, weight in zip(chosen, weights, strict=True):
            name = f"e.{{}}.{expert}"
            out += _mlp(row * weight, name, INNER) if weighs_inputs else weight * _mlp(row, name, INNER)
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("weighs_inputs", [False, True])
def test_each_token_is_the_sum_of_its_experts_by_their_scores(weighs_inputs: bool) -> None:
    spec = SparseMlpSpec(SPEC.router, SPEC.expert, scores_weigh_inputs=weighs_inputs)
    x, scores = _random(7, WIDTH), _random(7, 2, seed=1).sigmoid()
    experts = torch.tensor([[0, 5], [5, 0], [1, 2], [2, 1], [3, 5], [0, 1], [2, 5]])
    found = Experts(_weights(), "e", spec, WIDTH, TensorParallel())(x, experts, scores)
    torch.testing.assert_close(found, _expected(x, experts, scores, weighs_inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("experts", [[[0, 5], [3, 2], [1, 4]], [[0, 1], [2, 0]]], ids=["all", "the first half"])
def test_the_ranks_sum_is_that_of_one_rank(experts: list[list[int]], expert_parallel: bool) -> None:
    x, scores = _random(len(experts), WIDTH), _random(len(experts), 2, seed=1).sigmoid()
    chosen = torch.tensor(experts)
    parts = [
        Experts(_weights(), "e", SPEC, WIDTH, TensorParallel(rank, 2, expert_parallel=expert_parallel))(
            x, chosen, scores
        )
        for rank in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], _expected(x, chosen, scores), atol=1e-5, rtol=1e-5)


def test_a_token_gets_the_same_bits_whatever_others_take_its_experts() -> None:
    """As far as the products do: each expert has one row in both steps here."""
    layer = Experts(_weights(), "e", SPEC, WIDTH, TensorParallel())
    x, scores = _random(3, WIDTH), _random(3, 2, seed=1).sigmoid()
    experts = torch.tensor([[4, 1], [3, 0], [2, 5]])
    together = layer(x, experts, scores)
    for token in range(3):
        one = slice(token, token + 1)
        assert torch.equal(layer(x[one], experts[one], scores[one]), together[one])


@pytest.mark.parametrize("gate", [False, True])
def test_the_shared_layer_is_added_to_the_experts_and_both_to_the_residual(gate: bool) -> None:
    spec = SparseMlpSpec(SPEC.router, SPEC.expert, MlpSpec(20, "silu", gated=True), shared_gate=gate)
    x, residual = _random(5, WIDTH), _random(5, WIDTH, seed=1)
    alone = SparseMlp(_weights(), "l", SPEC, WIDTH, TensorParallel())(x)
    shared = _mlp(x, "l.shared.{}", 20)
    if gate:
        shared = shared * (x @ _weights().tensor("l.shared_gate.weight", (1, WIDTH)).T).sigmoid()
    layer = SparseMlp(_weights(), "l", spec, WIDTH, TensorParallel())
    torch.testing.assert_close(layer(x), alone + shared, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.plus(x, residual), alone + shared + residual, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_a_step_may_want_no_token(expert_parallel: bool) -> None:
    """As the last layer of a step that computes chunks alone."""
    router = RouterSpec(NUM_EXPERTS, 2, "sigmoid", renormalize=True, num_groups=3, top_groups=2, group_score="top2_sum")
    spec = SparseMlpSpec(router, SPEC.expert, MlpSpec(20, "silu", gated=True), shared_gate=True)
    layer = SparseMlp(_weights(), "l", spec, WIDTH, TensorParallel(1, 2, expert_parallel=expert_parallel))
    assert layer._partial(_random(0, WIDTH)).shape == (0, WIDTH)


CLAMPED = replace(SPEC, expert=ExpertSpec(INNER, ClampedSwiglu(1.702, 0.5), bias=True), scores_weigh_inputs=True)
SHARED = replace(SPEC, shared=MlpSpec(20, "silu", gated=True), shared_gate=True)


@pytest.mark.parametrize("spec", [CLAMPED, SHARED], ids=["clamped", "shared"])
@pytest.mark.parametrize("fields", [{"size": 1}, {"size": 2}, {"size": 2, "expert_parallel": True}], ids=str)
def test_kernels_compute_what_the_cpu_does(
    spec: SparseMlpSpec, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TensorParallel, "all_reduce", lambda self, part: part)
    x, residual = _random(5, WIDTH), _random(5, WIDTH, seed=1)
    for rank in range(fields["size"]):
        tp = TensorParallel(rank, **fields)
        expected = SparseMlp(_weights(), "l", spec, WIDTH, tp).plus(x, residual)
        with corrected(), interpreted():
            found = SparseMlp(_weights(), "l", spec, WIDTH, tp).plus(x, residual)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("fields", "name"), [({"expert_parallel": True}, "num_experts=6"), ({}, "moe_inter.*=12")])
def test_what_cannot_be_shared_out_is_refused(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot be split evenly"):
        Experts(_weights(), "e", SPEC, WIDTH, TensorParallel(0, 5, **fields))
