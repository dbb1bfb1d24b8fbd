"""`reference` in one launch: the first programs write words, each of them tokens as well while there are any."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 256


def apply_plan(
    state: Tensor, indices_N: Tensor, values_N: Tensor, token_ids_T: Tensor, sources_T: Tensor, last_token_R: Tensor
) -> None:
    """See `reference.apply_plan`."""
    num_words, num_tokens = indices_N.numel(), sources_T.numel()
    launch(
        _apply_plan,
        (triton.cdiv(max(num_words, num_tokens), _BLOCK),),
        state,
        indices_N,
        values_N,
        token_ids_T,
        sources_T,
        last_token_R,
        num_words,
        num_tokens,
        BLOCK=_BLOCK,
        num_warps=4,
    )


@triton.jit(do_not_specialize=("num_words", "num_tokens"))  # they vary from step to step
def _apply_plan(
    state_ptr,
    indices_ptr,
    values_ptr,
    token_ids_ptr,
    sources_ptr,
    last_token_ptr,
    num_words,
    num_tokens,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices_ptr + at, mask=at < num_words, other=-1)
    tl.store(state_ptr + index, tl.load(values_ptr + at, mask=index >= 0), mask=index >= 0)
    source = tl.load(sources_ptr + at, mask=at < num_tokens, other=-1)
    tl.store(token_ids_ptr + at, tl.load(last_token_ptr + source, mask=source >= 0), mask=source >= 0)
