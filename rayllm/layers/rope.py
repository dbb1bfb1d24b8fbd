"""Rotary frequencies and their scalings: linear, llama3 (Llama 3.1), YaRN (Peng et al., 2023), LongRoPE (Ding et al.,
2024), and proportional (a share of the channels turns).

Angles are computed for the tokens of a step, once, and shared by all layers: no table, whatever the context length.

LongRoPE has two sets of frequencies: one for sequences up to the pretrained context, one for all tokens of a longer
sequence. The KV of a sequence that grows past that length is computed again (`Scheduler`), so that no query meets keys
of the other set.

Shape letters: T tokens, R rotated width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayllm.spec import RopeSpec
from rayllm_kernels.rope import cos_sin


class RotaryEmbedding:
    """Cosines and sines of a spec's angles."""

    def __init__(self, spec: RopeSpec, dtype: torch.dtype, device: torch.device):
        self._frequencies_R = torch.cat((inverse_frequencies(spec),) * 2).to(device)
        self._factor = spec.attention_factor
        self._beyond = None if spec.beyond is None else RotaryEmbedding(spec.beyond, dtype, device)
        self._dtype = dtype

    def __call__(self, positions_T: Tensor, beyond_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos_TR, sin_TR), the angles of all pairs of channels twice, in the model's dtype.

        `beyond_T`: which tokens belong to a sequence longer than the boundary, where the spec has one.
        """
        beyond = None
        if self._beyond is not None:
            assert beyond_T is not None, "the batch does not say which sequences are longer than the rope's boundary"
            beyond = (beyond_T, self._beyond._frequencies_R, self._beyond._factor)
        return cos_sin(positions_T, self._frequencies_R, self._factor, self._dtype, beyond)


def inverse_frequencies(spec: RopeSpec) -> Tensor:
    """Radians a position for each pair of channels, float32 `[R / 2]`."""
    exponents = torch.arange(0, spec.rotary_dim, 2, dtype=torch.float32) / spec.rotary_dim
    if spec.scaling == "longrope":
        return 1.0 / (torch.tensor(spec.pair_factors, dtype=torch.float32) * spec.theta**exponents)
    plain = 1.0 / spec.theta**exponents
    if spec.scaling == "linear":
        return plain / spec.factor
    if spec.scaling == "llama3":
        return _llama3(plain, spec)
    if spec.scaling == "yarn":
        return _yarn(plain, spec)
    if spec.scaling == "proportional":
        plain[spec.num_turning_pairs :] = 0.0
        return plain / spec.factor
    return plain


def _llama3(plain: Tensor, spec: RopeSpec) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between, if there are any, interpolated."""
    context = spec.original_max_positions
    wavelengths = 2 * math.pi / plain
    between = max(spec.high_freq_factor - spec.low_freq_factor, 1e-6)
    smooth = (context / wavelengths - spec.low_freq_factor) / between
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * plain / spec.factor + smooth * plain


def _yarn(plain: Tensor, spec: RopeSpec) -> Tensor:
    """Channels that turn more than `beta_fast` times in the pretrained context are kept, those that turn less than
    `beta_slow` times stretched by `factor`, with a linear ramp between.
    """

    def channel_that_turns(num_turns: float) -> float:
        context = spec.original_max_positions
        return spec.rotary_dim * math.log(context / (num_turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = channel_that_turns(spec.beta_fast), channel_that_turns(spec.beta_slow)
    if spec.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.rotary_dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(spec.rotary_dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return plain / spec.factor * stretched + plain * (1 - stretched)
