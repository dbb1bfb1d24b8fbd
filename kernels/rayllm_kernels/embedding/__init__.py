"""Looking up tokens in one rank's part of the vocabulary."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.embedding import reference

__all__ = ["embed_part"]


def embed_part(token_ids_T: Tensor, weight_VD: Tensor, first: int) -> Tensor:
    """The rows of the ids that this part holds, zeros for the others. `reference.embed_part` says more."""
    if uses_triton(weight_VD):
        from rayllm_kernels.embedding import triton

        return triton.embed_part(token_ids_T, weight_VD, first)
    return reference.embed_part(token_ids_T, weight_VD, first)
