"""Four-bit weights as checkpoints store them, one value at a time by the definition of each layout."""

from __future__ import annotations

import torch
from torch import Tensor


def random_values(num_inputs: int, num_outputs: int, group_size: int, act_order: bool = False) -> dict[str, Tensor]:
    """`q` `[O, I]`, `zeros` and `scales` `[G, O]`, `groups` `[I]`."""
    generator = torch.Generator().manual_seed(0)
    size = num_inputs if group_size == -1 else group_size
    groups = torch.arange(num_inputs) // size
    if act_order:
        groups = groups[torch.randperm(num_inputs, generator=generator)]
    num_groups = -(-num_inputs // size)
    return {
        "q": torch.randint(0, 16, (num_outputs, num_inputs), generator=generator),
        "zeros": torch.randint(1, 16, (num_groups, num_outputs), generator=generator),
        "scales": (torch.rand(num_groups, num_outputs, generator=generator) + 0.5).half() / 16,
        "groups": groups,
    }


def as_gptq(values: dict[str, Tensor], zeros_are_less_one: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(qweight, qzeros, scales, g_idx): words of eight neighbouring inputs, and of eight neighbouring outputs."""
    zeros = values["zeros"] - (1 if zeros_are_less_one else 0)
    return _words(values["q"]).T.contiguous(), _words(zeros), values["scales"], values["groups"].int()


def as_awq(values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(qweight, qzeros, scales): words of eight neighbouring outputs, the even ones first."""
    interleaved = torch.arange(values["q"].shape[0]).view(-1, 8)[:, [0, 2, 4, 6, 1, 3, 5, 7]].flatten()
    return _words(values["q"].T[:, interleaved]), _words(values["zeros"][:, interleaved]), values["scales"]


def _words(rows: Tensor) -> Tensor:
    """Eight neighbours of a row in one word, the first in the lowest bits."""
    numbers = [
        [sum(int(value) << 4 * place for place, value in enumerate(row[i : i + 8])) for i in range(0, len(row), 8)]
        for row in rows.tolist()
    ]
    return torch.tensor(numbers, dtype=torch.int64).to(torch.int32)
