"""The attention kernels of `gpu.py`, in Llama-3-8B's shapes and DeepSeek-V2-Lite's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_bench import ATTENTION_TOLERANCES, Bench
from gpu_report import Row
from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """Keys and values of lines of equal length in shuffled blocks, and queries at their ends."""

    q_THD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    lines: Any
    scoring: Any
    arrivals: Tensor
    out_THD: Tensor

    @classmethod
    def make(
        cls, bench: Bench, num_lines: int, kv_len: int, num_queries: int, seed: int = 0, *, in_float8: bool = False
    ) -> Pages:
        from rayllm_kernels.attention import PagedLines, Scoring

        heads, kv_heads, width, page = bench.size(32, 4), bench.size(8, 2), bench.size(128, 16), bench.size(64, 16)
        blocks = -(-kv_len // page)
        caches = [bench.random(num_lines * blocks, kv_heads, page, width, seed=seed + i) for i in range(2)]
        if in_float8:
            caches = [(cache * 8).to(torch.float8_e4m3fn) for cache in caches]
        cache_scale = 1 / 8 if in_float8 else 1.0
        table_MB = torch.randperm(num_lines * blocks, device=bench.device).view(num_lines, blocks).int()
        ints = {"dtype": torch.int32, "device": bench.device}
        lines = PagedLines(
            torch.arange(num_lines, **ints),
            torch.full((num_lines,), kv_len, **ints),
            table_MB,
            torch.arange(0, num_lines * num_queries + 1, num_queries, **ints),
        )
        q_THD = bench.random(num_lines * num_queries, heads, width, seed=seed + 2)
        arrivals = torch.zeros(65536, **ints)
        scoring = Scoring(width**-0.5, k_scale=cache_scale, v_scale=cache_scale)
        return cls(q_THD, *caches, lines, scoring, arrivals, torch.full_like(q_THD, math.nan))

    def decode(self) -> None:
        from rayllm_kernels.attention import paged_decode

        paged_decode(self.q_THD, self.k_cache, self.v_cache, self.lines, self.scoring, self.arrivals, self.out_THD)

    def prefill(self) -> None:
        from rayllm_kernels.attention import paged_prefill

        paged_prefill(self.q_THD, self.k_cache, self.v_cache, self.lines, self.scoring, self.out_THD)

    @property
    def expected(self) -> Tensor:
        """By torch alone, in float64."""
        lengths, tables_MB = self.lines.kv_lens_N.tolist(), self.lines.block_table_MB.long()
        group = self.q_THD.shape[1] // self.k_cache.shape[1]
        outs = []
        for q_THD, length, table_B in zip(self.q_THD.double().chunk(len(lengths)), lengths, tables_MB, strict=True):
            k_HLD, v_HLD = (
                cache.double()[table_B].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(group, dim=0)
                for cache in (self.k_cache, self.v_cache)
            )
            scores_HTL = q_THD.transpose(0, 1) @ k_HLD.transpose(1, 2) * (self.scoring.scale * self.scoring.k_scale)
            later_TL = torch.ones_like(scores_HTL[0], dtype=torch.bool).triu(length - len(q_THD) + 1)
            weights_HTL = scores_HTL.masked_fill(later_TL, -math.inf).softmax(-1)
            outs.append((weights_HTL @ v_HLD).transpose(0, 1) * self.scoring.v_scale)
        return torch.cat(outs)


def decode_attention(bench: Bench) -> Iterator[Row]:
    for name, in_float8 in (("paged_decode", False), ("paged_decode, float8 cache", True)):
        pages = Pages.make(bench, 3, bench.size(777, 21), 1, in_float8=in_float8)
        pages.decode()
        yield bench.error(name, pages.out_THD, pages.expected, ATTENTION_TOLERANCES)
    context = bench.size(1024, 16)
    kv_elements = context * 2 * pages.k_cache.shape[1] * pages.k_cache.shape[3]

    def make(num_lines: int, in_float8: bool = False) -> Callable[[int], Callable[[], Any]]:
        return lambda seed: Pages.make(bench, num_lines, context, 1, seed, in_float8=in_float8).decode

    few, many = bench.size(32, 1), bench.size(256, 2)
    for num_lines in (few, many):
        kv_bytes = num_lines * kv_elements * bench.dtype.itemsize
        yield from bench.bandwidth(
            f"paged_decode, {num_lines} rows of {context} tokens", make(num_lines), kv_bytes, 0.75
        )
    us, narrow_us = (
        bench.microseconds(bench.sets(make(many, in_float8), many * kv_elements)) for in_float8 in (False, True)
    )
    target = None if bench.is_smoke else 1.6
    yield Row(f"paged_decode, {many} rows, float8 cache", us / narrow_us, "times", at_least=target)


def latent_attention(bench: Bench) -> Iterator[Row]:
    """Of DeepSeek-V2-Lite's shape, or a share of DeepSeek-V3's heads."""
    from rayllm_kernels.attention import PagedLines
    from rayllm_kernels.latent_attention import paged_latent_decode

    heads, width, latent = 16, bench.size(576, 48), bench.size(512, 32)
    page, scale = bench.size(64, 16), bench.size(192, 24) ** -0.5
    ints = {"dtype": torch.int32, "device": bench.device}
    arrivals = torch.zeros(65536, **ints)

    def inputs(num_lines: int, kv_len: int, seed: int) -> tuple[Any, ...]:
        blocks = -(-kv_len // page)
        lines = PagedLines(
            torch.arange(num_lines, **ints),
            torch.full((num_lines,), kv_len, **ints),
            torch.randperm(num_lines * blocks, device=bench.device).view(num_lines, blocks).int(),
            torch.arange(num_lines + 1, **ints),
        )
        cache = bench.random(num_lines * blocks, 1, page, width, seed=seed)
        q_NHW = bench.random(num_lines, heads, width, seed=seed + 1)
        return q_NHW, cache, lines, scale, arrivals, torch.full_like(q_NHW[..., :latent], math.nan)

    given = inputs(3, bench.size(777, 21), 0)
    paged_latent_decode(*given)
    q_NHW, cache, lines, *_, found = given
    kept_NLW = cache.double()[lines.block_table_MB.long(), 0].flatten(1, 2)[:, : int(lines.kv_lens_N[0])]
    weights_NHL = (q_NHW.double() @ kept_NLW.transpose(1, 2) * scale).softmax(-1)
    expected = weights_NHL @ kept_NLW[..., :latent]
    yield bench.error("paged_latent_decode", found, expected, ATTENTION_TOLERANCES)
    num_lines, context = bench.size(64, 1), bench.size(4096, 16)

    def make(seed: int) -> Callable[[], Any]:
        given = inputs(num_lines, context, seed)
        return lambda: paged_latent_decode(*given)

    num_bytes = num_lines * context * width * bench.dtype.itemsize
    yield from bench.bandwidth(f"paged_latent_decode, {num_lines} rows of {context} tokens", make, num_bytes, None)


def prefill_attention(bench: Bench) -> Iterator[Row]:
    pages = Pages.make(bench, 2, bench.size(333, 20), bench.size(200, 9))
    pages.prefill()
    yield bench.error("paged_prefill", pages.out_THD, pages.expected, ATTENTION_TOLERANCES)
    length = bench.size(8192, 16)
    whole = Pages.make(bench, 1, length, length)
    us = bench.microseconds([whole.prefill])
    num_flops = 2 * length**2 * whole.q_THD.shape[1] * whole.q_THD.shape[2]
    name = f"paged_prefill, {length} tokens, causal"
    yield Row(name, num_flops / us / 1e6, "TFLOP/s", at_least=None if bench.is_smoke else 400, note=f"{us:.0f} µs")
