"""Masks, penalties and the draw of the next token. `reference.py` is plain torch: the definition, and the CPU path."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.sampling import reference
from rayllm_kernels.sampling.reference import Draw, Group

__all__ = ["Draw", "Group", "append_to_histories", "begin_histories", "mask", "penalise", "sample"]


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


def begin_histories(
    counts_SV: Tensor, history_SL: Tensor, tokens_T: Tensor, histories_B4: Tensor, max_length: int
) -> None:
    """New rows' tokens into slots, in place. `reference.begin_histories` says how."""
    if uses_triton(counts_SV):
        from rayllm_kernels.sampling.triton import begin_histories as implementation
    else:
        implementation = reference.begin_histories
    implementation(counts_SV, history_SL, tokens_T, histories_B4, max_length)


def penalise(
    logits_NV: Tensor,
    counts_SV: Tensor,
    history_SL: Tensor,
    lines_slots_lengths_3P: Tensor,
    numbers_P3: Tensor,
    max_length: int,
) -> None:
    """Repetition, frequency and presence penalties of some lines, in place. `reference.penalise` defines them."""
    if uses_triton(logits_NV):
        from rayllm_kernels.sampling.triton import penalise as implementation
    else:
        implementation = reference.penalise
    implementation(logits_NV, counts_SV, history_SL, lines_slots_lengths_3P, numbers_P3, max_length)


def append_to_histories(
    counts_SV: Tensor, history_SL: Tensor, lines_slots_lengths_3P: Tensor, token_ids_N: Tensor
) -> None:
    """Drawn tokens into slots, in place. `reference.append_to_histories` says how."""
    if uses_triton(counts_SV):
        from rayllm_kernels.sampling.triton import append_to_histories as implementation
    else:
        implementation = reference.append_to_histories
    implementation(counts_SV, history_SL, lines_slots_lengths_3P, token_ids_N)
