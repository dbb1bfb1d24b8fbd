"""Norms as layers: parameters and the kernel that uses them."""

from __future__ import annotations

from torch import Tensor

from rayllm.spec import NormSpec
from rayllm.weights.source import WeightSource
from rayllm_kernels.norm import layer_norm, rms_norm, rms_norm_add


def rms_weight(weights: WeightSource, name: str, width: int, spec: NormSpec) -> Tensor:
    """The factors of a root-mean-square norm, `[width]`: float32 where the checkpoint holds them minus one."""
    weight = weights.tensor(f"{name}.weight", (width,))
    return weight.float() + 1.0 if spec.zero_centered else weight


class RMSNorm:
    """Root-mean-square norm over the last dimension."""

    def __init__(self, weights: WeightSource, name: str, width: int, spec: NormSpec):
        self.weight = rms_weight(weights, name, width, spec)
        self.eps = spec.eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + norm(x), written to `residual`."""
        return rms_norm_add(x, residual, self.weight, self.eps)


class LayerNorm:
    """Layer norm with weight and bias over the last dimension."""

    def __init__(self, weights: WeightSource, name: str, width: int, spec: NormSpec):
        self.weight = weights.tensor(f"{name}.weight", (width,))
        self.bias = weights.tensor(f"{name}.bias", (width,))
        self.eps = spec.eps

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + norm(x), written to `residual`."""
        return residual.add_(self(x))


Norm = RMSNorm | LayerNorm
NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
