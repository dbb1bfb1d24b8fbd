"""Drawing the next token from logits. `reference.py` is plain torch: the definition, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rayllm_kernels.sampling import reference
from rayllm_kernels.sampling.reference import Draw, Group

__all__ = ["Draw", "Group", "sample"]


def sample(logits_NV: Tensor, keys_3N: Tensor, numbers_4N: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """One id (int64) for each line, and the lines' highest logits. `reference.sample` says what it draws."""
    return reference.sample(logits_NV, keys_3N, numbers_4N, groups)
