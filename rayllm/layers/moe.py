"""Mixtures of experts. Each rank computes with its share of every expert, or with its share of the experts, whole; the
ranks' results are summed once.

Shape letters: T tokens, D hidden width, I inner width, K experts a token takes, N rows of tokens sorted by expert, one
for each expert that a token takes of those the rank holds.
"""

from __future__ import annotations

from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.mlp import Mlp
from rayllm.layers.router import Router
from rayllm.linear import ExpertLinear, StackedExperts
from rayllm.spec import ClampedSwiglu, SparseMlpSpec
from rayllm.weights.source import ExpertPart, Outputs, WeightSource
from rayllm_kernels.moe import ExpertWeights, mix_experts


class Experts:
    """A rank's experts."""

    def __init__(self, weights: WeightSource, prefix: str, spec: SparseMlpSpec, width: int, tp: TensorParallel):
        expert, total = spec.expert, spec.router.num_experts
        whole = tp.expert_parallel or tp.size == 1
        inner = None if whole else tp.shard(expert.intermediate_size, "moe_intermediate_size")
        self._held = tp.shard(total, "num_experts") if tp.expert_parallel else range(total)
        part = ExpertPart(self._held, total)
        gate, up = (Outputs(f"{prefix}.{name}", expert.intermediate_size, inner) for name in ("gate", "up"))
        projection = weights.expert_gated_linear(gate, up, width, part, expert.activation, bias=expert.bias)
        down = weights.expert_linear(
            Outputs(f"{prefix}.down", width),
            expert.intermediate_size,
            part,
            inputs=inner,
            bias=expert.bias,
            holds_bias=whole or tp.rank == 0,  # a bias enters the ranks' sum once
        )
        self._num_experts = total
        self._scores_weigh_inputs = spec.scores_weigh_inputs
        self._stacked: ExpertWeights | None = None
        if isinstance(projection, StackedExperts) and isinstance(down, StackedExperts):
            self._stacked = self._weights_of(projection, down)
        else:
            assert isinstance(projection, ExpertLinear)
            assert isinstance(down, ExpertLinear)
            self._projection, self._down = projection, down

    def _weights_of(self, projection: StackedExperts, down: StackedExperts) -> ExpertWeights:
        activation, alpha, limit = projection.activation, 1.0, 0.0
        assert activation is not None
        if isinstance(activation, ClampedSwiglu):
            alpha, limit = activation.alpha, activation.limit
            activation = "clamped_swiglu"
        return ExpertWeights(
            projection.weight_EOI,
            projection.bias_EO,
            down.weight_EOI,
            down.bias_EO,
            activation,
            alpha,
            limit,
            first=self._held.start,
            total=self._num_experts,
            scores_weigh_inputs=self._scores_weigh_inputs,
        )

    def __call__(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        scores_TK: Tensor,
        *,
        shared_TD: Tensor | None = None,
        shared_gate_T1: Tensor | None = None,
        residual_TD: Tensor | None = None,
    ) -> Tensor:
        """The sum over the experts that each token takes of those this rank holds, `[T, D]`; plus shared, times
        sigmoid(shared_gate) where there is one; plus residual. Shared and its gate may be changed."""
        if self._stacked is not None:
            return mix_experts(
                x_TD,
                experts_TK,
                scores_TK,
                self._stacked,
                shared_TD=shared_TD,
                shared_gate_T1=shared_gate_T1,
                residual_TD=residual_TD,
            )
        out_TD = self._one_after_another(x_TD, experts_TK, scores_TK)
        if shared_TD is not None:
            out_TD.add_(shared_TD if shared_gate_T1 is None else shared_TD.mul_(shared_gate_T1.sigmoid_()))
        return out_TD if residual_TD is None else out_TD.add_(residual_TD)

    def _one_after_another(self, x_TD: Tensor, experts_TK: Tensor, scores_TK: Tensor) -> Tensor:
        num_tokens, top_k = experts_TK.shape
        held = self._held
        choices = experts_TK.flatten()
        counts = choices.bincount(minlength=self._num_experts).tolist()
        first = sum(counts[: held.start])
        counts = counts[held.start : held.stop]
        places_N = choices.argsort(stable=True)[first : first + sum(counts)]
        scores_N1 = scores_TK.flatten()[places_N].unsqueeze(1)
        x_ND = x_TD[places_N // top_k]
        if self._scores_weigh_inputs:
            x_ND.mul_(scores_N1)
        y_ND = self._down(self._projection(x_ND, counts), counts)
        if not self._scores_weigh_inputs:
            y_ND.mul_(scores_N1)
        # A token's rows are summed in the order of its scores, whatever other tokens are in the step.
        out_TKD = y_ND.new_zeros(num_tokens * top_k, y_ND.shape[1])
        out_TKD[places_N] = y_ND
        return out_TKD.view(num_tokens, top_k, y_ND.shape[1]).sum(1)


class SparseMlp:
    """What a `SparseMlpSpec` says."""

    def __init__(self, weights: WeightSource, prefix: str, spec: SparseMlpSpec, width: int, tp: TensorParallel):
        self._router = Router(weights, f"{prefix}.router", spec.router, width)
        self._experts = Experts(weights, f"{prefix}.experts", spec, width, tp)
        self._shared = None if spec.shared is None else Mlp(weights, f"{prefix}.shared", spec.shared, width, tp)
        self._shared_gate = weights.linear([Outputs(f"{prefix}.shared_gate", 1)], width) if spec.shared_gate else None
        self._tp = tp

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The whole sum, on every rank."""
        return self._tp.all_reduce(self._partial(x_TD))

    def plus(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """The whole sum plus residual, on every rank."""
        # the residual enters the ranks' sum once
        return self._tp.all_reduce(self._partial(x_TD, residual_TD if self._tp.rank == 0 else None))

    def _partial(self, x_TD: Tensor, residual_TD: Tensor | None = None) -> Tensor:
        experts_TK, scores_TK = self._router(x_TD)
        return self._experts(
            x_TD,
            experts_TK,
            scores_TK,
            shared_TD=None if self._shared is None else self._shared.partial(x_TD),
            shared_gate_T1=None if self._shared_gate is None else self._shared_gate(x_TD),
            residual_TD=residual_TD,
        )
