from __future__ import annotations

import pytest
import torch
from kernel_accuracy import Buffers

from rayllm_kernels.moe.triton.sort import sort_by_expert


@pytest.mark.parametrize("held", [range(5), range(1, 3), range(4, 5)])
@pytest.mark.parametrize("num_tokens", [1, 9, 700])
def test_choices_are_sorted_by_expert_and_keep_their_order(num_tokens: int, held: range, buffers: Buffers) -> None:
    experts = torch.randint(0, 5, (num_tokens, 2), generator=torch.Generator().manual_seed(0)).pow(2) // 4
    starts, choices = sort_by_expert(buffers.input(experts.int()), held)
    flat = experts.flatten().tolist()
    expected = [[place for place, expert in enumerate(flat) if expert == each] for each in held]
    found = [choices[starts[e] : starts[e + 1]].tolist() for e in range(len(held))]
    assert found == expected
    assert starts[0] == 0
