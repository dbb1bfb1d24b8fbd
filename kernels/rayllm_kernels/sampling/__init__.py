"""Drawing the next token from logits. `reference.py` is plain torch: the definition, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.sampling import reference
from rayllm_kernels.sampling.reference import Draw, Group

__all__ = ["Draw", "Group", "mask", "sample"]


def mask(logits_NV: Tensor, lines_G: Tensor, bits_GB: Tensor) -> None:
    """Rules out the ids of some lines, in place. `reference.mask` says which."""
    if uses_triton(logits_NV):
        from rayllm_kernels.sampling.triton import mask as implementation
    else:
        implementation = reference.mask
    implementation(logits_NV, lines_G, bits_GB)


def sample(
    logits_NV: Tensor,
    keys_4N: Tensor,
    numbers_4N: Tensor,
    groups: Sequence[Group],
    rows_N: Tensor,
    last_token_M: Tensor,
    is_bound_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, which lines are usable and which are stuck. `reference.sample` says what it draws and writes."""
    if uses_triton(logits_NV):
        from rayllm_kernels.sampling.triton import sample as implementation
    else:
        implementation = reference.sample
    return implementation(logits_NV, keys_4N, numbers_4N, groups, rows_N, last_token_M, is_bound_N)
