from __future__ import annotations

import pytest
import torch

from rayllm_kernels.fp8 import fp8_weight
from rayllm_kernels.fp8.reference import dequantized

VALUES = torch.ones(200, 300).to(torch.float8_e4m3fn)


def test_a_scale_belongs_to_all_to_an_output_or_to_a_block() -> None:
    assert dequantized(fp8_weight(VALUES, torch.tensor(2.0))).unique().tolist() == [2.0]
    of_outputs = torch.arange(200, dtype=torch.bfloat16)
    assert torch.equal(dequantized(fp8_weight(VALUES, of_outputs))[:, 7], of_outputs.float())
    blocks = torch.arange(6.0).view(2, 3)
    found = dequantized(fp8_weight(VALUES, blocks))
    expected = [[blocks[o // 128, i // 128].item() for i in range(300)] for o in range(200)]
    assert found.tolist() == expected


def test_one_scale_of_a_small_weight_is_that_of_all() -> None:
    weight = fp8_weight(VALUES[:100, :100], torch.full((1, 1), 3.0))
    assert not weight.has_blocks
    assert dequantized(weight).unique().tolist() == [3.0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"weight is torch.float32: torch.float8_e4m3fn is expected"):
        fp8_weight(VALUES.float(), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"scales of shape \(2, 2\).*200 outputs and 300 inputs: .*or \(2, 3\)"):
        fp8_weight(VALUES, torch.ones(2, 2))
    with pytest.raises(ValueError, match="input_scale has 3 values"):
        fp8_weight(VALUES, torch.tensor(1.0), torch.ones(3))
