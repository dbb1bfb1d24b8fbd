"""One decoder layer: attention and feed-forward with their norms and residual sums.

Shape letters: T tokens of the step, D hidden width, N positions that go on to the next layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.attention import AttentionBackend, AttentionLayer, GroupedAttention, LatentAttention
from rayllm.layers.kv_cache import LayerKV
from rayllm.layers.mlp import Mlp
from rayllm.layers.moe import SparseMlp
from rayllm.layers.norm import NORMS, Norm
from rayllm.spec import GroupedAttentionSpec, LatentAttentionSpec, LayerSpec, MlpSpec, NormSpec, SparseMlpSpec
from rayllm.weights.source import WeightSource

ATTENTION_LAYERS: dict[type, type[AttentionLayer]] = {
    GroupedAttentionSpec: GroupedAttention,
    LatentAttentionSpec: LatentAttention,
}
"""The layer for each kind of spec."""


class Branch(Protocol):
    """What is added to the residual; it can add it itself, in one pass, and may then write the sum in its place."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    def plus(self, x: Tensor, residual: Tensor, /) -> Tensor: ...


FEED_FORWARD_LAYERS: dict[type, Callable[..., Branch]] = {MlpSpec: Mlp, SparseMlpSpec: SparseMlp}
"""The layer for each kind of spec."""


def make_norm(weights: WeightSource, name: str, spec: NormSpec, width: int) -> Norm:
    return NORMS[spec.kind](weights, name, width, spec)


class ResidualSum:
    """residual + scale * norm(branch(x)), and a norm on that sum, where a layer has them."""

    def __init__(self, weights: WeightSource, prefix: str, spec: LayerSpec, width: int):
        norm = None if spec.norm_placement == "input" else spec.norm
        name = f"{prefix}_output_norm" if "output" in spec.norm_placement else f"{prefix}_norm"
        made = None if norm is None else make_norm(weights, name, norm, width)
        self._sum_norm = made if spec.norm_placement == "sum" else None
        self._output_norm = made if spec.norm_placement != "sum" else None
        self._scale = spec.residual_scale

    def __call__(self, branch: Branch, x: Tensor, residual_TD: Tensor) -> Tensor:
        norm = self._output_norm
        if self._scale != 1.0:
            out_TD = branch(x)
            sum_TD = residual_TD.add(out_TD if norm is None else norm(out_TD), alpha=self._scale)
        else:
            sum_TD = branch.plus(x, residual_TD) if norm is None else norm.plus(branch(x), residual_TD)
        return sum_TD if self._sum_norm is None else self._sum_norm(sum_TD)


class DecoderLayer:
    """What a `LayerSpec` says."""

    def __init__(
        self,
        weights: WeightSource,
        index: int,
        spec: LayerSpec,
        width: int,
        tp: TensorParallel,
        backend: AttentionBackend,
    ):
        prefix = f"layers.{index}"
        attention_class = ATTENTION_LAYERS[type(spec.attention)]
        feed_forward_class = FEED_FORWARD_LAYERS[type(spec.feed_forward)]
        self._attention = attention_class(weights, prefix, spec.attention, width, tp, backend)
        self._feed_forward = feed_forward_class(weights, prefix, spec.feed_forward, width, tp)
        self._attention_norm: Norm | None = None
        self._mlp_norm: Norm | None = None
        if "input" in spec.norm_placement:
            self._attention_norm = make_norm(weights, f"{prefix}.attention_norm", spec.norm, width)
            if not spec.shares_norm:
                self._mlp_norm = make_norm(weights, f"{prefix}.mlp_norm", spec.norm, width)
        self._attention_sum = ResidualSum(weights, f"{prefix}.attention", spec, width)
        self._mlp_sum = ResidualSum(weights, f"{prefix}.mlp", spec, width)
        self._parallel = spec.parallel
        self._shares_norm = spec.shares_norm

    def __call__(
        self,
        hidden_TD: Tensor,
        kv: LayerKV,
        metadata: Any,
        rotation: tuple[Tensor, Tensor] | None,
        keep_N: Tensor | None,
    ) -> Tensor:
        """The hidden states after the layer: of the tokens `keep_N` only, if given; keys and values of all tokens go to
        the cache."""
        normed_TD = hidden_TD if self._attention_norm is None else self._attention_norm(hidden_TD)
        heads = self._attention.attend(normed_TD, kv, metadata, rotation)
        if keep_N is not None:
            heads, hidden_TD = heads[keep_N], hidden_TD[keep_N]
            normed_TD = normed_TD[keep_N] if self._shares_norm else normed_TD
        if self._parallel:  # what the feed-forward layer reads is made before the residual is written
            inner_TD = self._mlp_input(hidden_TD, normed_TD)
            hidden_TD = hidden_TD.clone() if inner_TD is hidden_TD else hidden_TD
            sum_TD = self._attention_sum(self._attention.out, heads, hidden_TD)
        else:
            sum_TD = self._attention_sum(self._attention.out, heads, hidden_TD)
            inner_TD = self._mlp_input(sum_TD, normed_TD)
        return self._mlp_sum(self._feed_forward, inner_TD, sum_TD)

    def _mlp_input(self, x_ND: Tensor, attention_input_ND: Tensor) -> Tensor:
        if self._shares_norm:
            return attention_input_ND
        return x_ND if self._mlp_norm is None else self._mlp_norm(x_ND)
