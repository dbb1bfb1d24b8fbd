"""What a model asks of its attention backend, and why a backend may refuse it."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from rayllm.spec import AttentionSpec, GroupedAttentionSpec

NARROW_DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class AttentionNeeds:
    """Of one rank."""

    specs: tuple[AttentionSpec, ...]
    """Of the layers, each kind once."""
    tp_size: int
    block_size: int
    dtype: torch.dtype
    """Of queries, keys and values."""
    device: torch.device

    def grouped(self) -> list[GroupedAttentionSpec]:
        return [spec for spec in self.specs if isinstance(spec, GroupedAttentionSpec)]

    def capability(self) -> tuple[int, int]:
        """Compute capability of the GPU."""
        return torch.cuda.get_device_capability(self.device)


def refusal_of_library(needs: AttentionNeeds, module: str, package: str, head_dims: range | tuple[int, ...]) -> str:
    """Why a library's kernels cannot compute what a model needs: they take narrow types, certain head widths, and
    neither latents, sinks nor ALiBi. Empty where they can."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed (no module {module})"
    if needs.dtype not in NARROW_DTYPES:
        return f"it computes in float16 and bfloat16, and the model in {str(needs.dtype).removeprefix('torch.')}"
    grouped = needs.grouped()
    if len(grouped) < len(needs.specs):
        return "the model has latent attention"
    for spec in grouped:
        if spec.head_dim not in head_dims:
            return f"it has no kernel for head_dim={spec.head_dim}"
        if spec.has_sinks or spec.alibi_slopes:
            return f"the model has {'attention sinks' if spec.has_sinks else 'ALiBi'}, which it does not compute"
    return ""
