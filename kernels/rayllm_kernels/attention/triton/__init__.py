"""Attention over paged keys and values by Triton kernels. Functions, shapes and shape letters: see `reference.py`."""

from __future__ import annotations

from torch import Tensor

from rayllm_kernels.attention.paged import PagedLines, Scoring, refusal_of_kernels
from rayllm_kernels.attention.triton.decode import decode_kernel
from rayllm_kernels.attention.triton.prefill import prefill_kernel
from rayllm_kernels.attention.triton.split import num_splits, parts
from rayllm_kernels.attention.triton.tile import factors
from rayllm_kernels.attention.triton.tiles import decode_tiles, device_shape, padded, prefill_tiles
from rayllm_kernels.launch import launch

_PROGRAMS_PER_PROCESSOR = 4
_MAX_DECODE_HEADS = 64
"""Query heads of one program; more that share a key/value head are parted."""
_MIN_TILES = 2


def paged_decode(
    q_NHD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lines: PagedLines,
    scoring: Scoring,
    arrivals: Tensor,
    out_NHD: Tensor,
) -> None:
    num_kv_heads, page_size, head_dim = _check(q_NHD, k_cache, v_cache, out_NHD)
    num_lines, num_heads, _ = q_NHD.shape
    major, num_processors = device_shape(q_NHD.device)
    tiles = decode_tiles(head_dim, q_NHD.dtype, k_cache.dtype, major).for_pages(page_size)
    group = num_heads // num_kv_heads
    block_m = min(padded(group), _MAX_DECODE_HEADS)
    programs_of_line = num_kv_heads * -(-group // block_m)
    max_keys = lines.block_table_MB.shape[1] * page_size
    if scoring.window is not None:
        max_keys = min(max_keys, scoring.window)
    num_lines_split = num_lines * programs_of_line
    splits = num_splits(num_lines_split, max_keys, len(arrivals), _PROGRAMS_PER_PROCESSOR * num_processors)
    launch(
        decode_kernel,
        (num_lines, programs_of_line, splits),
        *(q_NHD, k_cache, v_cache, lines.rows_N, lines.kv_lens_N, lines.block_table_MB),
        *(_or(scoring.sinks_H, arrivals), _or(scoring.slopes_H, arrivals), out_NHD),
        *(*parts(num_lines_split, splits, block_m, head_dim, q_NHD.device), arrivals),
        *_numbers(scoring),
        *(q_NHD.stride(0), q_NHD.stride(1), lines.block_table_MB.stride(0)),
        **_constants(scoring, num_kv_heads, group, head_dim, page_size),
        BLOCK_M=block_m,
        BLOCK_N=tiles.keys,
        BLOCK_D=padded(head_dim),
        MIN_TILES=_MIN_TILES,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def paged_prefill(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, lines: PagedLines, scoring: Scoring, out_THD: Tensor
) -> None:
    num_kv_heads, page_size, head_dim = _check(q_THD, k_cache, v_cache, out_THD)
    num_tokens, num_heads, _ = q_THD.shape
    num_lines, group = len(lines.rows_N), num_heads // num_kv_heads
    has_slopes, (major, _) = scoring.slopes_H is not None, device_shape(q_THD.device)
    tiles = prefill_tiles(head_dim, q_THD.dtype, k_cache.dtype, has_slopes, major).for_pages(page_size)
    block_m = max(tiles.queries, padded(group))
    num_blocks = num_tokens // (block_m // group) + num_lines
    launch(
        prefill_kernel,
        (num_blocks if num_lines else 0, num_kv_heads),
        *(q_THD, k_cache, v_cache, lines.rows_N, lines.kv_lens_N, lines.query_starts_N1, lines.block_table_MB),
        *(_or(scoring.sinks_H, lines.block_table_MB), _or(scoring.slopes_H, lines.block_table_MB), out_THD),
        *_numbers(scoring),
        *(q_THD.stride(0), q_THD.stride(1), lines.block_table_MB.stride(0), lines.first_query, num_lines),
        **_constants(scoring, num_kv_heads, group, head_dim, page_size),
        BLOCK_M=block_m,
        BLOCK_N=tiles.keys,
        BLOCK_D=padded(head_dim),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> tuple[int, int, int]:
    """Key/value heads, page size, head width."""
    _, num_kv_heads, page_size, head_dim = k_cache.shape
    if refusal := refusal_of_kernels(head_dim, page_size):
        raise ValueError(refusal)
    assert k_cache.shape == v_cache.shape, "keys and values have one shape"
    assert all(x.is_contiguous() for x in (k_cache, v_cache, out)), "caches and out are contiguous"
    assert (q.stride(2), q.shape) == (1, out.shape), "a head's channels stand together"
    assert (q.shape[1] % num_kv_heads, q.shape[2]) == (0, head_dim), "query heads share key/value heads evenly"
    return num_kv_heads, page_size, head_dim


def _numbers(scoring: Scoring) -> tuple[float, float, float, int]:
    return *factors(scoring.scale * scoring.k_scale, scoring.soft_cap), scoring.v_scale, scoring.window or 0


def _constants(scoring: Scoring, num_kv_heads: int, group: int, head_dim: int, page_size: int) -> dict[str, int | bool]:
    return {
        "KV_HEADS": num_kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE": page_size,
        "WINDOW": scoring.window is not None,
        "SOFT_CAP": scoring.soft_cap is not None,
        "SINKS": scoring.sinks_H is not None,
        "ALIBI": scoring.slopes_H is not None,
    }


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer where the kernel reads none, of an alignment that is the same in every step."""
    return other if tensor is None else tensor
