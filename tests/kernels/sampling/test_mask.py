"""Masks of lines, by both implementations."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from kernel_accuracy import Buffers

from rayllm_kernels.device import interpreted
from rayllm_kernels.sampling import mask


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("lines", [[0, 1, 2], [2, 0], [1]])
@pytest.mark.parametrize("vocab_size", [1, 21, 4099])
def test_a_mask_leaves_a_line_the_ids_whose_bits_are_set(
    vocab_size: int, lines: list[int], implementation: str, buffers: Buffers
) -> None:
    is_allowed_GV = np.random.default_rng(0).random((len(lines), vocab_size)) < 0.5
    logits_NV = torch.randn(3, vocab_size)
    logits_NV[lines[0], 0] = torch.nan
    masked_NV = buffers.inout(logits_NV)
    bits_GB = buffers.input(torch.from_numpy(np.packbits(is_allowed_GV, axis=1, bitorder="little")))
    with interpreted() if implementation == "triton" else contextlib.nullcontext():
        mask(masked_NV, buffers.input(torch.tensor(lines)), bits_GB)
    expected_NV = logits_NV.clone()
    for line, is_allowed_V in zip(lines, is_allowed_GV):
        expected_NV[line, torch.from_numpy(~is_allowed_V)] = -torch.inf
    assert torch.equal(masked_NV.nan_to_num(7), expected_NV.nan_to_num(7))
