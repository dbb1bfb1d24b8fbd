"""`reference.penalise` and what keeps its histories: one launch each, two where rows begin.

A list of tokens is not kept: `history_SL` may have no columns. A slot has a word for each id: how often it was emitted,
and a bit for whether it is in the prompt. So each logit is read and written by one program, once, however often its id
occurs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 1024
_IN_PROMPT = tl.constexpr(1 << 30)


def begin_histories(
    counts_SV: Tensor, history_SL: Tensor, tokens_T: Tensor, histories_B4: Tensor, max_length: int
) -> None:
    """See `reference.begin_histories`."""
    num, vocab_size = len(histories_B4), counts_SV.shape[1]
    assert counts_SV.is_contiguous()
    grid = (num, triton.cdiv(vocab_size, _BLOCK))
    launch(_clear, grid, counts_SV, histories_B4, vocab_size, BLOCK=_BLOCK, num_warps=4)
    grid = (num, triton.cdiv(max_length, _BLOCK))
    launch(_count, grid, counts_SV, tokens_T, histories_B4, vocab_size, BLOCK=_BLOCK, num_warps=4)


def penalise(
    logits_NV: Tensor,
    counts_SV: Tensor,
    history_SL: Tensor,
    lines_slots_lengths_3P: Tensor,
    numbers_P3: Tensor,
    max_length: int,
) -> None:
    """See `reference.penalise`."""
    num, vocab_size = lines_slots_lengths_3P.shape[1], logits_NV.shape[1]
    assert logits_NV.is_contiguous()
    assert counts_SV.is_contiguous()
    launch(
        _penalise,
        (num, triton.cdiv(vocab_size, _BLOCK)),
        logits_NV,
        counts_SV,
        lines_slots_lengths_3P,
        numbers_P3,
        num,
        vocab_size,
        BLOCK=_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,  # the reference rounds products
    )


def append_to_histories(
    counts_SV: Tensor, history_SL: Tensor, lines_slots_lengths_3P: Tensor, token_ids_N: Tensor
) -> None:
    """See `reference.append_to_histories`."""
    num, vocab_size = lines_slots_lengths_3P.shape[1], counts_SV.shape[1]
    assert counts_SV.is_contiguous()
    grid = (triton.cdiv(num, 128),)
    launch(_append, grid, counts_SV, lines_slots_lengths_3P, token_ids_N, num, vocab_size, BLOCK=128, num_warps=4)


@triton.jit
def _clear(counts_ptr, histories_ptr, vocab_size, BLOCK: tl.constexpr):
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(histories_ptr + tl.program_id(0) * 4)
    tl.store(counts_ptr + slot * vocab_size + ids, 0, mask=ids < vocab_size)


@triton.jit
def _count(counts_ptr, tokens_ptr, histories_ptr, vocab_size, BLOCK: tl.constexpr):
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    history_ptr = histories_ptr + tl.program_id(0) * 4
    slot, begin, end = tl.load(history_ptr), tl.load(history_ptr + 1), tl.load(history_ptr + 2)
    num_prompt_tokens = tl.load(history_ptr + 3)
    is_token = places < end - begin
    is_prompt = places < num_prompt_tokens
    words_ptr = counts_ptr + slot * vocab_size + tl.load(tokens_ptr + begin + places, mask=is_token, other=0)
    tl.atomic_or(words_ptr, _IN_PROMPT, mask=is_token & is_prompt, sem="relaxed")
    tl.atomic_add(words_ptr, 1, mask=is_token & (is_prompt == 0), sem="relaxed")


@triton.jit(do_not_specialize=("num",))  # it varies from step to step
def _penalise(logits_ptr, counts_ptr, lines_slots_lengths_ptr, numbers_ptr, num, vocab_size, BLOCK: tl.constexpr):
    at = tl.program_id(0)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    line, slot = tl.load(lines_slots_lengths_ptr + at), tl.load(lines_slots_lengths_ptr + num + at)
    words = tl.load(counts_ptr + slot * vocab_size + ids, mask=ids < vocab_size, other=0)
    is_met = words != 0
    counts = (words & (_IN_PROMPT - 1)).to(tl.float32)
    repetition, frequency = tl.load(numbers_ptr + at * 3), tl.load(numbers_ptr + at * 3 + 1)
    presence = tl.load(numbers_ptr + at * 3 + 2)
    logits_ptr += line * vocab_size + ids
    logits = tl.load(logits_ptr, mask=is_met, other=0.0)
    logits = tl.where(logits > 0, tl.div_rn(logits, repetition), logits * repetition)
    logits -= frequency * counts
    logits -= presence * (counts > 0).to(tl.float32)
    tl.store(logits_ptr, logits, mask=is_met)


@triton.jit(do_not_specialize=("num",))
def _append(counts_ptr, lines_slots_lengths_ptr, token_ids_ptr, num, vocab_size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_line = at < num
    line = tl.load(lines_slots_lengths_ptr + at, mask=is_line, other=0)
    slot = tl.load(lines_slots_lengths_ptr + num + at, mask=is_line, other=0)
    token_ids = tl.load(token_ids_ptr + line, mask=is_line, other=0)
    words_ptr = counts_ptr + slot * vocab_size + token_ids
    tl.store(words_ptr, tl.load(words_ptr, mask=is_line, other=0) + 1, mask=is_line)
