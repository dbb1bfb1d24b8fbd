"""Multi-head latent attention as a layer (DeepSeek-V2, 2024): projections, rotation, cache and output.

Heads are split over ranks; the projections to latents, and the latents in the cache, are the same on every rank.

Shape letters: T tokens of the step, H query heads of this rank. Others: see `backend.py`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup, LatentLayerAttention
from rayllm.layers.attention.layer import AttentionLayer
from rayllm.layers.kv_cache import LayerKV
from rayllm.layers.linear import RowParallelLinear
from rayllm.layers.norm import NORMS, Norm
from rayllm.linear import PerHeadLinear
from rayllm.spec import LatentAttentionSpec
from rayllm.weights.source import Outputs, WeightSource
from rayllm_kernels.rope import Rotation


class LatentAttention(AttentionLayer):
    """Layers with a `LatentAttentionSpec`."""

    @staticmethod
    def group(spec: LatentAttentionSpec, rank: int, tp_size: int) -> AttentionGroup:
        return AttentionGroup(1, spec.kv_dim, shares_cache=True)

    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        spec: LatentAttentionSpec,
        width: int,
        tp: TensorParallel,
        backend: AttentionBackend,
    ):
        self.spec = spec
        self._backend = backend
        heads = tp.shard(spec.num_heads, "num_attention_heads")
        self._num_heads = len(heads)
        queries = Outputs(f"{prefix}.q", spec.num_heads * spec.qk_dim, _outputs_of(heads, spec.qk_dim))
        to_latents, norm_class = [Outputs(f"{prefix}.kv_down", spec.kv_dim)], NORMS[spec.norm.kind]
        self._q_norm: Norm | None = None
        if spec.q_latent_dim is not None:
            to_latents.insert(0, Outputs(f"{prefix}.q_down", spec.q_latent_dim))
            self._q_norm = norm_class(weights, f"{prefix}.q_latent_norm", spec.q_latent_dim, spec.norm)
        self._down = weights.linear(to_latents, width, bias=spec.latent_bias)
        self._q = weights.linear([queries], spec.q_latent_dim or width)
        self._kv_norm = norm_class(weights, f"{prefix}.kv_latent_norm", spec.latent_dim, spec.norm)
        k_up_HNC, v_up_HVC = (
            weights.tensor(
                f"{prefix}.{name}.weight",
                (spec.num_heads * size, spec.latent_dim),
                part=_outputs_of(heads, size),
            ).unflatten(0, (-1, size))
            for name, size in (("k_up", spec.nope_dim), ("v_up", spec.value_dim))
        )
        self._attention = LatentLayerAttention(
            group=self.group(spec, tp.rank, tp.size),
            spec=spec,
            absorb=PerHeadLinear(k_up_HNC.transpose(1, 2)),
            k_up=PerHeadLinear(k_up_HNC),
            v_up=PerHeadLinear(v_up_HVC),
        )
        self.out = RowParallelLinear(
            weights, f"{prefix}.out", spec.num_heads * spec.value_dim, width, tp, bias=spec.out_bias
        )

    def attend(self, x_TD: Tensor, kv: LayerKV, metadata: Any, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        assert rotation is not None, "latent attention has rotary positions"
        spec = self.spec
        down = self._down(x_TD)
        q_input = x_TD if self._q_norm is None else self._q_norm(down[:, : -spec.kv_dim])
        q_THD = self._q(q_input).view(-1, self._num_heads, spec.qk_dim)
        turn, down_TW = Rotation(*rotation, spec.rope.in_pairs), down[:, -spec.kv_dim :]
        backend, layer = self._backend, self._attention
        latent_TW = backend.rotate_and_write_latent(q_THD, down_TW, turn, self._kv_norm, kv, metadata, layer)
        out_THV = backend.forward_latent(q_THD, latent_TW, kv, metadata, layer)
        return out_THV.reshape(x_TD.shape[0], -1)


def _outputs_of(heads: range, size: int) -> range:
    return range(heads.start * size, heads.stop * size)
