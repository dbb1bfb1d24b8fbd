from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rayllm.errors import ConfigError
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.mxfp4 import Mxfp4, dequantized
from rayllm.weights.stored import Tensor

NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_a_byte_holds_two_numbers_the_first_in_its_low_half() -> None:
    blocks = torch.tensor([[bits | (15 - bits) << 4 for bits in range(16)]], dtype=torch.uint8)
    found = dequantized(blocks, torch.tensor([127], dtype=torch.uint8))
    signed = NUMBERS + [-number for number in NUMBERS]
    assert found.dtype == torch.bfloat16
    assert found.tolist() == [number for bits in range(16) for number in (signed[bits], signed[15 - bits])]


@pytest.mark.parametrize("scale", [0, 1, 100, 127, 130, 250])
def test_a_scale_is_a_power_of_two(scale: int) -> None:
    blocks = torch.full((1, 16), 0x77, dtype=torch.uint8)
    found = dequantized(blocks, torch.tensor([scale], dtype=torch.uint8))
    assert found.double().tolist() == [6.0 * 2.0 ** (scale - 127)] * 32


def test_the_last_scale_is_not_a_number() -> None:
    assert dequantized(torch.zeros(1, 16, dtype=torch.uint8), torch.tensor([255], dtype=torch.uint8)).isnan().all()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(120, 130, (3, 5, 4), dtype=torch.uint8, generator=generator)
    save_file({"w_blocks": blocks, "w_scales": scales}, tmp_path / "model.safetensors")
    return Checkpoint(tmp_path)


@pytest.mark.parametrize("inputs", [range(128), range(32, 64), range(40, 50), range(16, 80)])
def test_a_region_is_that_of_the_whole_and_only_its_blocks_are_read(checkpoint: Checkpoint, inputs: range) -> None:
    place = Mxfp4(Tensor("w_blocks"), Tensor("w_scales"))
    place.check(checkpoint, (3, 5, 128))
    whole = place.read(checkpoint, (range(3), range(5), range(128)))
    before = checkpoint.bytes_read
    found = place.read(checkpoint, (range(1, 2), range(2, 4), inputs))
    assert torch.equal(found, whole[1:2, 2:4, inputs.start : inputs.stop])
    num_blocks = (inputs.stop + 31) // 32 - inputs.start // 32
    assert checkpoint.bytes_read - before == 2 * num_blocks * 17


def test_inputs_that_are_no_whole_blocks_are_refused(checkpoint: Checkpoint) -> None:
    place = Mxfp4(Tensor("w_blocks"), Tensor("w_scales"))
    with pytest.raises(ConfigError, match="'w_blocks' is in MXFP4, whose blocks hold 32 inputs each: the 100 that"):
        place.check(checkpoint, (3, 5, 100))
    with pytest.raises(ConfigError, match=r"'w_blocks' has shape \[3, 5, 4, 16\]"):
        place.check(checkpoint, (3, 5, 96))
