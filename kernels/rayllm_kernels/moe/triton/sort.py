"""The choices of all tokens sorted by expert, on the device. Shape letters: T tokens, K experts a token takes, E
experts held, N choices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayllm_kernels.launch import launch

_BLOCK = 1024


def sort_by_expert(experts_TK: Tensor, held: range) -> tuple[Tensor, Tensor]:
    """(starts_E1, choices_N) int32: the choices (token * K + place among its choices) of the expert `held[e]`, in their
    order, are choices_N[starts_E1[e] : starts_E1[e + 1]]. What is behind the last is left unwritten.

    A program an expert, each of which reads all choices: for the few that a step has, faster than a sort, and nothing
    must be zero before.
    """
    assert experts_TK.is_contiguous(), "choices must be contiguous"
    starts_E1 = torch.empty(len(held) + 1, dtype=torch.int32, device=experts_TK.device)
    choices_N = torch.empty(experts_TK.numel(), dtype=torch.int32, device=experts_TK.device)
    launch(
        sort_kernel,
        (len(held),),
        experts_TK,
        starts_E1,
        choices_N,
        experts_TK.numel(),
        held.start,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return starts_E1, choices_N


@triton.jit(do_not_specialize=["num_choices"])
def sort_kernel(experts_ptr, starts_ptr, choices_ptr, num_choices, first, BLOCK: tl.constexpr):
    expert = first + tl.program_id(0)
    at_N = tl.arange(0, BLOCK)
    before_N, own_N = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    for begin in range(0, num_choices, BLOCK):
        experts_N = tl.load(experts_ptr + begin + at_N, mask=begin + at_N < num_choices, other=-1)
        before_N += ((experts_N >= first) & (experts_N < expert)).to(tl.int32)
        own_N += (experts_N == expert).to(tl.int32)
    place = tl.sum(before_N, 0)
    num_own = tl.sum(own_N, 0)
    tl.store(starts_ptr + tl.program_id(0), place)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(starts_ptr + tl.num_programs(0), place + num_own)
    if num_own == 0:
        return
    for begin in range(0, num_choices, BLOCK):
        experts_N = tl.load(experts_ptr + begin + at_N, mask=begin + at_N < num_choices, other=-1)
        own_N = (experts_N == expert).to(tl.int32)
        tl.store(choices_ptr + place + tl.cumsum(own_N, 0) - 1, begin + at_N, mask=own_N > 0)
        place += tl.sum(own_N, 0)
