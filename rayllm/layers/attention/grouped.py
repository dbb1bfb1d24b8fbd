"""Grouped attention as a layer: projections, rotation, cache and output.

Shape letters: T tokens of the step, A heads of queries, keys and values of this rank, B of queries
and keys, H of queries, K of keys, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup, LayerAttention
from rayllm.layers.attention.layer import AttentionLayer
from rayllm.layers.kv_cache import LayerKV
from rayllm.layers.linear import RowParallelLinear
from rayllm.layers.norm import rms_weight
from rayllm.linear import Linear
from rayllm.spec import GroupedAttentionSpec
from rayllm.weights.source import Outputs, WeightSource
from rayllm_kernels.rope import HeadNorm, Rotation


def kv_heads_of(num_kv_heads: int, rank: int, tp_size: int) -> range:
    """A rank's key/value heads; where there are fewer than ranks, neighbouring ranks hold the same one."""
    if num_kv_heads >= tp_size:
        width = num_kv_heads // tp_size
        return range(rank * width, (rank + 1) * width)
    head = rank * num_kv_heads // tp_size
    return range(head, head + 1)


class GroupedAttention(AttentionLayer):
    """Layers with a `GroupedAttentionSpec`."""

    @staticmethod
    def group(spec: GroupedAttentionSpec, rank: int, tp_size: int) -> AttentionGroup:
        num_kv_heads = len(kv_heads_of(spec.num_kv_heads, rank, tp_size))
        width = spec.num_heads // tp_size
        slopes = spec.alibi_slopes[rank * width : (rank + 1) * width]
        return AttentionGroup(num_kv_heads, spec.head_dim, spec.window, slopes)

    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        spec: GroupedAttentionSpec,
        width: int,
        tp: TensorParallel,
        backend: AttentionBackend,
    ):
        self.spec = spec
        self._backend = backend
        heads = tp.shard(spec.num_heads, "num_attention_heads")
        kv_heads = kv_heads_of(spec.num_kv_heads, tp.rank, tp.size)
        self._num_all_heads = len(heads) + 2 * len(kv_heads)
        self._qkv = _qkv(weights, prefix, spec, width, heads, kv_heads)
        self._qk_norm: HeadNorm | None = None
        if spec.qk_norm is not None:
            q_norm_D, k_norm_D = (
                rms_weight(weights, f"{prefix}.{name}_norm", spec.head_dim, spec.qk_norm) for name in "qk"
            )
            weight_BD = torch.cat((q_norm_D.expand(len(heads), -1), k_norm_D.expand(len(kv_heads), -1)))
            self._qk_norm = HeadNorm(weight_BD, spec.qk_norm.eps)
        sinks = weights.tensor(f"{prefix}.sinks", (spec.num_heads,), part=heads).float() if spec.has_sinks else None
        group = self.group(spec, tp.rank, tp.size)
        self._attention = LayerAttention(group, spec.scale, spec.soft_cap, sinks)
        self.out = RowParallelLinear(
            weights, f"{prefix}.out", spec.num_heads * spec.head_dim, width, tp, bias=spec.out_bias
        )

    def attend(self, x_TD: Tensor, kv: LayerKV, metadata: Any, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        spec = self.spec
        qkv_TAD = self._qkv(x_TD).view(-1, self._num_all_heads, spec.head_dim)
        turn = None
        if rotation is not None and spec.rope is not None:
            turn = Rotation(*rotation, spec.rope.in_pairs)
        backend, layer = self._backend, self._attention
        q_THD, k_TKD, v_TKD = backend.rotate_and_write(qkv_TAD, turn, self._qk_norm, kv, metadata, layer)
        out_THD = backend.forward(q_THD, k_TKD, v_TKD, kv, metadata, layer)
        return out_THD.reshape(x_TD.shape[0], -1)


def _qkv(
    weights: WeightSource, prefix: str, spec: GroupedAttentionSpec, width: int, heads: range, kv_heads: range
) -> Linear:
    """Queries, keys and values of this rank's heads in one product."""
    outputs = []
    for name, held, num_heads in (
        ("q", heads, spec.num_heads),
        ("k", kv_heads, spec.num_kv_heads),
        ("v", kv_heads, spec.num_kv_heads),
    ):
        part = range(held.start * spec.head_dim, held.stop * spec.head_dim)
        outputs.append(Outputs(f"{prefix}.{name}", num_heads * spec.head_dim, part))
    return weights.linear(outputs, width, bias=spec.qkv_bias)
