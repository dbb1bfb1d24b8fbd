"""Norms as layers: parameters and the kernel that uses them."""

from __future__ import annotations

from torch import Tensor

from rayllm.weights.source import WeightSource
from rayllm_kernels.norm import layer_norm, rms_norm


class RMSNorm:
    """Root-mean-square norm over the last dimension."""

    def __init__(self, weights: WeightSource, name: str, width: int, eps: float):
        self.weight = weights.tensor(f"{name}.weight", (width,))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm:
    """Layer norm with weight and bias over the last dimension."""

    def __init__(self, weights: WeightSource, name: str, width: int, eps: float):
        self.weight = weights.tensor(f"{name}.weight", (width,))
        self.bias = weights.tensor(f"{name}.bias", (width,))
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


Norm = RMSNorm | LayerNorm
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
