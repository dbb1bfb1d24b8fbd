"""Writing keys and values into pages. `reference` says what each function computes."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.device import uses_triton
from rayllm_kernels.kv_cache import reference
from rayllm_kernels.kv_cache.reference import page_rows

__all__ = ["page_rows", "write_kv", "write_latent"]


def write_kv(
    k_TKD: Tensor,
    v_TKD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots_T: Tensor,
    rows: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Each token's key and value to its slot."""
    if uses_triton(k_TKD):
        from rayllm_kernels.kv_cache import triton

        triton.write_kv(k_TKD, v_TKD, k_cache, v_cache, slots_T, rows, k_scale, v_scale)
    else:
        reference.write_kv(k_TKD, v_TKD, k_cache, v_cache, slots_T, rows, k_scale, v_scale)


def write_latent(latent_TW: Tensor, cache: Tensor, slots_T: Tensor, scale: float = 1.0) -> None:
    """Each token's vector to its slot of a cache of one head."""
    if uses_triton(latent_TW):
        from rayllm_kernels.kv_cache import triton

        triton.write_latent(latent_TW, cache, slots_T, scale)
    else:
        reference.write_latent(latent_TW, cache, slots_T, scale)
