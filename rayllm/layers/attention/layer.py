"""What the decoder asks of a layer's attention, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup
from rayllm.layers.kv_cache import LayerKV
from rayllm.layers.linear import RowParallelLinear
from rayllm.weights.source import WeightSource


class AttentionLayer(ABC):
    """One layer; a subclass for each kind of attention spec. Shape letters: T tokens of the step, D hidden width."""

    out: RowParallelLinear
    """The output projection, which the caller applies and adds to its residual."""

    @abstractmethod
    def __init__(
        self,
        weights: WeightSource,
        prefix: str,
        spec: Any,
        width: int,
        tp: TensorParallel,
        backend: AttentionBackend,
    ): ...

    @staticmethod
    @abstractmethod
    def group(spec: Any, rank: int, tp_size: int) -> AttentionGroup:
        """What a rank's backend must know of layers with this spec to prepare a step."""

    @abstractmethod
    def attend(self, x_TD: Tensor, kv: LayerKV, metadata: Any, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        """The input of `out`: attention of this rank's heads, `[T, heads * value width]`. What the kind of attention
        keeps of the tokens goes to the cache.

        `metadata` is what the backend prepared for the step; `rotation` are cosine and sine of the spec's rope.
        """
