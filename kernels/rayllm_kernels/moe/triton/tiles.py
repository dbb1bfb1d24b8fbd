"""How the rows of experts are parted among programs, by shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class Tile:
    """What a program of the two products multiplies. Outputs are the rows of tensor-core instructions, so that few
    tokens do not leave most of their rows empty."""

    tokens: int
    gate_outputs: int
    """Of each of gate and up."""
    down_outputs: int
    inputs: int
    """Of a step of the loop: the same for all numbers of tokens."""
    num_warps: int
    num_stages: int


def tile_of_products(num_choices: int, num_experts: int, dtype: torch.dtype) -> Tile:
    """For the rows that an expert has on average, between 16 and 128."""
    if dtype == torch.float32:  # without tensor cores
        return Tile(16, 32, 32, 32, num_warps=4, num_stages=2)
    tokens = min(max(triton.next_power_of_2(triton.cdiv(num_choices, num_experts)), 16), 128)
    if tokens <= 64:
        return Tile(tokens, 64, 64, 64, num_warps=4, num_stages=4)
    return Tile(tokens, 64, 128, 64, num_warps=8, num_stages=4)


def num_tiles(num_choices: int, num_held: int, tokens: int) -> int:
    """The most tiles of so many tokens that can have a choice, whatever each expert has: the experts that have any are
    at most as many as choices, and the last tile of each has at least one."""
    return (num_choices + min(num_choices, num_held) * (tokens - 1)) // tokens
