"""Latent attention over pages by Triton kernels. Functions, shapes and shape letters: see `reference.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm_kernels.attention.paged import PagedLines, refusal_of_kernels
from rayllm_kernels.attention.triton.split import num_splits, parts
from rayllm_kernels.attention.triton.tile import factors
from rayllm_kernels.attention.triton.tiles import Tiles, device_shape, padded
from rayllm_kernels.latent_attention.triton.kernels import latent_decode_kernel, latent_prefill_kernel
from rayllm_kernels.launch import launch

_PROGRAMS_PER_PROCESSOR = 2
_MIN_TILES = 2
_DECODE = {8: Tiles(16, 32, 4, 2), 9: Tiles(16, 64, 8, 2), 10: Tiles(16, 32, 4, 2)}
_PREFILL = {8: Tiles(32, 32, 8, 2), 9: Tiles(32, 32, 8, 2), 10: Tiles(64, 32, 8, 2)}
"""By the first number of the compute capability; 10 stands for all later ones. On 9 the sums of 64 query rows,
as its own kind of product wants, do not fit in the registers."""
_FLOAT32 = Tiles(16, 16, 4, 1)


def paged_latent_decode(
    q_NHW: Tensor, cache: Tensor, lines: PagedLines, scale: float, arrivals: Tensor, out_NHC: Tensor
) -> None:
    tiles, num_processors = _tiles(_DECODE, q_NHW, cache, out_NHC)
    num_lines, num_heads, _ = q_NHW.shape
    head_tiles = -(-num_heads // tiles.queries)
    max_keys = lines.block_table_MB.shape[1] * cache.shape[2]
    num_split = num_lines * head_tiles
    splits = num_splits(num_split, max_keys, len(arrivals), _PROGRAMS_PER_PROCESSOR * num_processors)
    launch(
        latent_decode_kernel,
        (num_lines, head_tiles, splits),
        *(q_NHW, cache, lines.rows_N, lines.kv_lens_N, lines.block_table_MB, out_NHC),
        *(*parts(num_split, splits, tiles.queries, out_NHC.shape[2], q_NHW.device), arrivals),
        *(factors(scale, None)[0], q_NHW.stride(0), q_NHW.stride(1), lines.block_table_MB.stride(0)),
        **_constants(tiles, q_NHW, cache, out_NHC),
        MIN_TILES=_MIN_TILES,
    )


def paged_latent_prefill(q_THW: Tensor, cache: Tensor, lines: PagedLines, scale: float, out_THC: Tensor) -> None:
    tiles, _ = _tiles(_PREFILL, q_THW, cache, out_THC)
    num_tokens, num_heads, _ = q_THW.shape
    block_q, num_lines = max(1, tiles.queries // num_heads), len(lines.rows_N)
    launch(
        latent_prefill_kernel,
        (num_tokens // block_q + num_lines if num_lines else 0, -(-block_q * num_heads // tiles.queries)),
        *(q_THW, cache, lines.rows_N, lines.kv_lens_N, lines.query_starts_N1, lines.block_table_MB, out_THC),
        *(factors(scale, None)[0], q_THW.stride(0), q_THW.stride(1), lines.block_table_MB.stride(0)),
        *(lines.first_query, num_lines),
        **_constants(tiles, q_THW, cache, out_THC),
        BLOCK_Q=block_q,
    )


def _tiles(table: dict[int, Tiles], q: Tensor, cache: Tensor, out: Tensor) -> tuple[Tiles, int]:
    """How tiles are cut, and the GPU's multiprocessors."""
    if refusal := refusal_of_kernels(1, cache.shape[2]):
        raise ValueError(refusal)
    assert cache.shape[1] == 1, "one vector a token for all heads"
    assert all(x.is_contiguous() for x in (cache, out)), "cache and out are contiguous"
    assert (q.stride(2), q.shape[:2], q.shape[2]) == (1, out.shape[:2], cache.shape[3]), (
        "queries are as wide as latents"
    )
    major, num_processors = device_shape(q.device)
    tiles = _FLOAT32 if q.dtype == torch.float32 else table[min(max(major, 8), 10)]
    return tiles.for_pages(cache.shape[2]), num_processors


def _constants(tiles: Tiles, q: Tensor, cache: Tensor, out: Tensor) -> dict[str, int]:
    width, latent_dim = cache.shape[3], out.shape[2]
    return {
        "HEADS": q.shape[1],
        "LATENT": latent_dim,
        "WIDTH": width,
        "PAGE": cache.shape[2],
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "BLOCK_C": padded(latent_dim),
        "BLOCK_R": padded(width - latent_dim),
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }
