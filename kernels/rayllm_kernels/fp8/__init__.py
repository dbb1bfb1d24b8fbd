"""Products with weights and activations of eight bits. `reference` says what each function computes."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.fp8 import reference
from rayllm_kernels.fp8.weight import Fp8Weight, fp8_weight

__all__ = ["Fp8Weight", "fp8_linear", "fp8_weight", "quantize"]


def fp8_linear(x_TI: Tensor, weight: Fp8Weight, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias of quantized x, `[T, O]` in the dtype of `x_TI`."""
    if uses_triton(x_TI):
        from rayllm_kernels.fp8 import triton

        return triton.fp8_linear(x_TI, weight, bias_O)
    return reference.fp8_linear(x_TI, weight, bias_O)


def quantize(x_TI: Tensor, group_size: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(values_TI float8 e4m3, scales_TG float32), for groups of `group_size` inputs of a token."""
    if uses_triton(x_TI):
        from rayllm_kernels.fp8 import triton

        return triton.quantize(x_TI, group_size, scale)
    return reference.quantize(x_TI, group_size, scale)
