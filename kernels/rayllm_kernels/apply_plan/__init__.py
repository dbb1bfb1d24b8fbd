"""Writing a plan's differences into the state that a worker keeps on its device."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.apply_plan import reference
from rayllm_kernels.device import uses_triton

__all__ = ["apply_plan"]


def apply_plan(
    state: Tensor, indices_N: Tensor, values_N: Tensor, token_ids_T: Tensor, sources_T: Tensor, last_token_R: Tensor
) -> None:
    """Changes `state` and `token_ids_T` in place, in one launch. `reference.apply_plan` says what it writes."""
    if uses_triton(state):
        from rayllm_kernels.apply_plan.triton import apply_plan as implementation
    else:
        implementation = reference.apply_plan
    implementation(state, indices_N, values_N, token_ids_T, sources_T, last_token_R)
