"""The seam between a layer's attention and how it is computed on a device.

Once a step the runner asks the backend to `prepare` the step's metadata, on the host where it must; a layer's `write`
and `forward` are device work alone. One backend is chosen at start for the whole model.

Shape letters: T tokens of the step, H query heads of this rank, K key/value heads of this rank, D head width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import LayerKV


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


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """How one layer's scores become weights: softmax(soft_cap(q @ k.T * scale) + mask), with sinks in the sum."""

    group: AttentionGroup
    scale: float
    soft_cap: float | None = None
    """c * tanh(score / c)."""
    sinks_H: Tensor | None = None
    """float32: for each head one more score in the softmax's sum, without a value."""


class AttentionBackend(ABC):
    """One way to compute paged attention for all layers of a model."""

    name: str
    """What users and the log call it."""

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """The metadata of a step, given to every layer's `write` and `forward`; the only call that may wait for the
        host."""

    @abstractmethod
    def write(self, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: Any, layer: LayerAttention) -> None:
        """Puts the step's keys and values into their slots of `kv`; other slots stay as they are."""

    @abstractmethod
    def forward(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, metadata: Any, layer: LayerAttention
    ) -> Tensor:
        """Causal attention of the step's tokens, `[T, H, D]`; their keys and values are already in `kv`."""
