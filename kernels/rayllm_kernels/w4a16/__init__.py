"""Products with weights of four bits and activations of sixteen."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.w4a16 import reference
from rayllm_kernels.w4a16.awq import from_awq
from rayllm_kernels.w4a16.gptq import from_gptq
from rayllm_kernels.w4a16.weight import Int4Weight

__all__ = ["Int4Weight", "from_awq", "from_gptq", "int4_linear"]


def int4_linear(x_TI: Tensor, weight: Int4Weight, bias_O: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, `[T, O]` in the dtype of `x_TI`."""
    if uses_triton(x_TI):
        from rayllm_kernels.w4a16 import triton

        return triton.int4_linear(x_TI, weight, bias_O)
    return reference.int4_linear(x_TI, weight, bias_O)
