"""The seam between a layer's attention and how it is computed on a device.

Once a step the runner asks the backend to `prepare` the step's metadata, on the host where it must; a layer's `write`
and `forward` are device work alone. One backend is chosen at start for the whole model.

Shape letters: T tokens of the step, H query heads of this rank, K key/value heads of this rank, D head width. Of latent
attention: W width of what is kept of a token, C of its latent, R of the rotated key (W = C + R), N of a head's channels
that are not rotated (D = N + R), V of its values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import LayerKV
from rayllm.layers.norm import Norm
from rayllm.linear import PerHeadLinear
from rayllm.spec import LatentAttentionSpec
from rayllm_kernels.norm import rms_norm
from rayllm_kernels.rope import HeadNorm, Rotation, rope


@dataclass(frozen=True, slots=True)
class AttentionGroup:
    """Layers for which a step's metadata is the same."""

    num_kv_heads: int
    """Of this rank."""
    head_dim: int
    window: int | None = None
    """A token attends to itself and the `window - 1` tokens before it; None: to all before it."""
    alibi_slopes: tuple[float, ...] = ()
    """Of this rank's query heads: slope * (key position - query position) is added to each score (Press et al., 2022).
    """
    shares_cache: bool = False
    """Of latent attention: one cache, `head_dim` wide, holds what keys and values are made of; else there are two."""

    @property
    def num_caches(self) -> int:
        return 1 if self.shares_cache else 2


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """How one layer's scores become weights: softmax(soft_cap(q @ k.T * scale) + mask), with sinks in the sum."""

    group: AttentionGroup
    scale: float
    soft_cap: float | None = None
    """c * tanh(score / c)."""
    sinks_H: Tensor | None = None
    """float32: for each head one more score in the softmax's sum, without a value."""


@dataclass(frozen=True, slots=True, eq=False)
class LatentLayerAttention:
    """How one layer's latents become keys and values: head h has the key (k_up[h] @ latent, rotated key) and the value
    v_up[h] @ latent. Scores are as without latents, softmax(q @ k.T * scale + mask)."""

    group: AttentionGroup
    spec: LatentAttentionSpec
    """Scale and widths."""
    absorb: PerHeadLinear
    """Multiplies the queries' N channels by k_up, `[T, H, C]`: their products with a latent are those with its key."""
    k_up: PerHeadLinear
    """Latents to keys, N channels a head."""
    v_up: PerHeadLinear
    """Latents to values, V channels a head; weighted sums of latents to those of values."""


class AttentionBackend(ABC):
    """One way to compute paged attention for all layers of a model."""

    name: str
    """What users and the log call it."""
    uses_device_rows = False
    """Whether it reads `Batch.device_rows`, and so never waits for the host."""
    reads_unwritten_slots = True
    """Whether slots that no token was written to must hold finite numbers, because they are multiplied by zero."""

    @abstractmethod
    def prepare(self, batch: Batch) -> list[Any]:
        """The metadata of a step for each KV group, given to the calls of the group's layers; the only
        call that may wait for the host."""

    @abstractmethod
    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: Any, layer: LayerAttention) -> None:
        """Puts the step's keys and values into their slots of `kv`; other slots stay as they are."""

    def rotate_and_write(
        self,
        qkv_TAD: Tensor,
        rotation: Rotation | None,
        norm: HeadNorm | None,
        kv: LayerKV,
        metadata: Any,
        layer: LayerAttention,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All between a layer's projections and its attention: queries and keys are normed and rotated, keys and values
        put into their slots of `kv`. Returns (q_THD, k_TKD, v_TKD) for `forward`.

        A token has A = H + 2 K heads: queries, keys, values. A backend that attends to what is in `kv` alone may return
        keys and values as they came.
        """
        num_kv_heads = layer.group.num_kv_heads
        num_heads = qkv_TAD.shape[1] - 2 * num_kv_heads
        qk_TBD, v_TKD = qkv_TAD[:, : num_heads + num_kv_heads], qkv_TAD[:, num_heads + num_kv_heads :]
        if norm is not None:
            qk_TBD = rms_norm(qk_TBD, *norm)
        if rotation is not None:
            qk_TBD = rope(qk_TBD, *rotation)
        q_THD, k_TKD = qk_TBD[:, :num_heads], qk_TBD[:, num_heads:]
        self.write(k_TKD, v_TKD, kv, metadata, layer)
        return q_THD, k_TKD, v_TKD

    @abstractmethod
    def forward(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: Any, layer: LayerAttention
    ) -> Tensor:
        """Causal attention of the step's tokens, `[T, H, D]`; their keys and values are already in `kv`."""

    @abstractmethod
    def write_latent(self, latent_TW: Tensor, kv: LayerKV, metadata: Any, layer: LatentLayerAttention) -> None:
        """Puts the step's latents, each with its rotated key behind it, into their slots of the one cache of `kv`."""

    def rotate_and_write_latent(
        self,
        q_THD: Tensor,
        down_TW: Tensor,
        rotation: Rotation,
        norm: Norm,
        kv: LayerKV,
        metadata: Any,
        layer: LatentLayerAttention,
    ) -> Tensor:
        """`rotate_and_write` of latent attention. Queries are rotated in place; `down_TW` has each token's latent,
        which is normed, and behind it the key of all heads, which is rotated. Returns what was written, for
        `forward_latent`; a backend that attends to what is in `kv` alone may return `down_TW` as it came."""
        spec = layer.spec
        q_THD[..., spec.nope_dim :] = rope(q_THD[..., spec.nope_dim :], *rotation)
        latent, key = down_TW.split((spec.latent_dim, spec.rope.rotary_dim), dim=-1)
        key = rope(key.unsqueeze(1), *rotation).squeeze(1)
        latent_TW = torch.cat((norm(latent), key), dim=-1)
        self.write_latent(latent_TW, kv, metadata, layer)
        return latent_TW

    @abstractmethod
    def forward_latent(
        self, q_THD: Tensor, latent_TW: Tensor, kv: LayerKV, metadata: Any, layer: LatentLayerAttention
    ) -> Tensor:
        """Causal attention of the step's tokens, `[T, H, V]`; their latents are already in `kv`. The last R channels of
        a head's queries are rotated.

        A backend may absorb the key's projection into the queries, and attend to the latents as one head of keys and
        values for all, or expand latents to keys and values: the result is the same.
        """
