"""Weights in MXFP4, widened as they are read (OCP Microscaling Formats, version 1.0).

32 neighbours along the inputs are a block: 16 bytes, of which each holds two numbers of 4 bits (E2M1), the first in its
low half, and a scale of 8 bits (E8M0): a power of two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rayllm.errors import ConfigError
from rayllm.weights.stored import Region, Stored

if TYPE_CHECKING:
    import torch

    from rayllm.weights.checkpoint import Checkpoint

BLOCK_SIZE = 32
_BLOCK_BYTES = BLOCK_SIZE // 2
_NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the low three bits; the fourth is the sign."""
_EXPONENT_BIAS = 127


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """A parameter `[..., I]` stored as bytes: `blocks` `[..., I / 32, 16]` and `scales` `[..., I / 32]`."""

    blocks: Stored
    scales: Stored

    @property
    def name(self) -> str:
        return self.blocks.name

    def renamed(self, rename: Callable[[str], str]) -> Mxfp4:
        return Mxfp4(self.blocks.renamed(rename), self.scales.renamed(rename))

    def check(self, checkpoint: Checkpoint, shape: Sequence[int]) -> None:
        *rows, num_inputs = shape
        if num_inputs % BLOCK_SIZE:
            raise ConfigError(
                f"{checkpoint.file_of(self.name)}: tensor {self.name!r} is in MXFP4, whose blocks hold {BLOCK_SIZE} "
                f"inputs each: the {num_inputs} that config.json requires are no multiple of that"
            )
        num_blocks = num_inputs // BLOCK_SIZE
        self.blocks.check(checkpoint, (*rows, num_blocks, _BLOCK_BYTES))
        self.scales.check(checkpoint, (*rows, num_blocks))

    def read(self, checkpoint: Checkpoint, region: Region) -> torch.Tensor:
        """In bfloat16, which holds every value exactly. Whole blocks are read."""
        *rows, inputs = region
        blocks = range(inputs.start // BLOCK_SIZE, -(-inputs.stop // BLOCK_SIZE))
        halves = self.blocks.read(checkpoint, (*rows, blocks, range(_BLOCK_BYTES)))
        wide = dequantized(halves, self.scales.read(checkpoint, (*rows, blocks)))
        return wide.narrow(-1, inputs.start - blocks.start * BLOCK_SIZE, len(inputs))


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers of uint8 `blocks` `[..., B, 16]` with uint8 `scales` `[..., B]`: bfloat16 `[..., 32 B]`. A scale of
    255 is NaN."""
    import torch

    magnitudes = torch.tensor(_NUMBERS, dtype=torch.bfloat16)
    numbers = torch.cat((magnitudes, -magnitudes))
    byte = torch.arange(256)
    # Both numbers of a byte are looked up at once, as 32 bits.
    pairs = torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=1).view(torch.int32).squeeze(1)
    powers = torch.exp2(byte.double() - _EXPONENT_BIAS).to(torch.bfloat16)
    powers[255] = torch.nan
    wide = pairs.index_select(0, blocks.flatten().int()).view(torch.bfloat16).view(*scales.shape, BLOCK_SIZE)
    return wide.mul_(powers.index_select(0, scales.flatten().int()).view(*scales.shape, 1)).flatten(-2)
