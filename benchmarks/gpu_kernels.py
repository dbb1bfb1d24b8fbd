"""Each kernel of `gpu.py`: its error against float64 on small inputs, and its time against its floor on large ones.

Shapes are Llama-3-8B's. Floors and tolerances are those of `kernels/README.md`. With `--smoke` the same code runs on
tiny shapes in Triton's interpreter.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_report import Row
from torch import Tensor

BYTES_PER_S = 4.3e12
"""What a copy reaches on one H200; targets are shares of it."""
_L2_BYTES = 50 * 2**20
_MAX_SETS = 16
_NUM_REPLAYS = 11
_TOLERANCES = {torch.bfloat16: 4e-3, torch.float32: 1e-5}
_ATTENTION_TOLERANCES = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Bench:
    """Where kernels run, and how large."""

    device: torch.device
    is_smoke: bool

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_smoke else torch.bfloat16  # the interpreter is wrong in bfloat16

    def size(self, full: int, smoke: int) -> int:
        return smoke if self.is_smoke else full

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def sets(self, make: Callable[[int], Callable[[], Any]], num_bytes: int) -> list[Callable[[], Any]]:
        """Calls on different buffers, so many that none finds its inputs in the cache of the GPU."""
        count = 1 if self.is_smoke else min(_MAX_SETS, 1 + math.ceil(4 * _L2_BYTES / num_bytes))
        return [make(seed) for seed in range(count)]

    def microseconds(self, calls: Sequence[Callable[[], Any]]) -> float:
        """The median of one call's time, without the host: on a GPU the calls are replayed as a CUDA graph."""
        for call in calls:
            call()
        if self.device.type == "cpu":
            began_s = time.perf_counter()
            calls[0]()
            return (time.perf_counter() - began_s) * 1e6
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times_us = []
        for _ in range(_NUM_REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times_us.append(begin.elapsed_time(end) * 1e3 / len(calls))
        graph.reset()
        return statistics.median(times_us[1:])

    def bandwidth(
        self, name: str, make: Callable[[int], Callable[[], Any]], num_bytes: int, share: float | None
    ) -> Iterator[Row]:
        """Time, and the share of `BYTES_PER_S` at which `num_bytes` are moved; a target where there is a `share`."""
        us = self.microseconds(self.sets(make, num_bytes))
        reached = num_bytes / us * 1e6 / BYTES_PER_S
        floor_us = num_bytes / BYTES_PER_S * 1e6
        note = f"{us:.1f} µs, floor {floor_us:.1f}"
        yield Row(name, reached, "of copy", at_least=None if self.is_smoke else share, note=note)

    def latency(
        self, name: str, make: Callable[[int], Callable[[], Any]], num_bytes: int, at_most_us: float | None
    ) -> Iterator[Row]:
        us = self.microseconds(self.sets(make, num_bytes))
        yield Row(name, us, "µs", at_most=None if self.is_smoke else at_most_us)

    def error(self, name: str, found: Tensor, expected: Tensor, tolerances: dict[torch.dtype, float]) -> Row:
        """‖found − expected‖ / ‖expected‖ in float64."""
        error = float((found.double() - expected.double()).norm() / expected.double().norm())
        return Row(f"{name}: error", error, "", at_most=tolerances[self.dtype])


def ceilings(bench: Bench) -> Iterator[Row]:
    """What this device reaches at best: a copy, and a matrix product by torch."""
    size = bench.size(2**28, 2**16)

    def copy(seed: int) -> Callable[[], Any]:
        source, target = (torch.empty(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
        return lambda: target.copy_(source)

    us = bench.microseconds([copy(0)])
    yield Row("copy", 2 * size / us / 1e6, "TB/s")
    width = bench.size(8192, 128)
    a, b = (bench.random(width, width, seed=seed) for seed in range(2))
    us = bench.microseconds([lambda: a @ b])
    yield Row("matrix product", 2 * width**3 / us / 1e6, "TFLOP/s")


def norm(bench: Bench) -> Iterator[Row]:
    from rayllm_kernels.norm import add_rms_norm, reference, rms_norm

    width = bench.size(4096, 96)
    weight_D = bench.random(width, seed=9)

    def inputs(num_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        return bench.random(num_tokens, width, seed=seed), bench.random(num_tokens, width, seed=seed + 100)

    x_TD, residual_TD = inputs(5, 0)
    expected = reference.rms_norm(x_TD.double(), weight_D.double(), 1e-5)
    yield bench.error("rms_norm", rms_norm(x_TD, weight_D, 1e-5), expected, _TOLERANCES)
    summed = x_TD.double() + residual_TD.double()
    found, _ = add_rms_norm(x_TD, residual_TD.clone(), weight_D, 1e-5)
    yield bench.error("add_rms_norm", found, reference.rms_norm(summed, weight_D.double(), 1e-5), _TOLERANCES)

    def make(num_tokens: int) -> Callable[[int], Callable[[], Any]]:
        def of_set(seed: int) -> Callable[[], Any]:
            x_TD, residual_TD = inputs(num_tokens, seed)
            return lambda: add_rms_norm(x_TD, residual_TD, weight_D, 1e-5)

        return of_set

    few, many = bench.size(128, 2), bench.size(8192, 4)
    row_bytes = 4 * width * bench.dtype.itemsize
    yield from bench.latency(f"add_rms_norm, {few} tokens", make(few), few * row_bytes, 4)
    yield from bench.bandwidth(f"add_rms_norm, {many} tokens", make(many), many * row_bytes, 0.85)


def activation(bench: Bench) -> Iterator[Row]:
    from rayllm_kernels.activation import reference, silu_mul

    width, many = bench.size(14336, 80), bench.size(8192, 4)
    x = bench.random(5, 2 * width)
    yield bench.error("silu_mul", silu_mul(x), reference.silu_mul(x.double()), _TOLERANCES)

    def make(seed: int) -> Callable[[], Any]:
        x = bench.random(many, 2 * width, seed=seed)
        return lambda: silu_mul(x)

    yield from bench.bandwidth(f"silu_mul, {many} tokens", make, 3 * many * width * bench.dtype.itemsize, 0.85)


def rope(bench: Bench) -> Iterator[Row]:
    from rayllm_kernels.rope import Rotation, reference, rope_and_write

    heads, kv_heads, width, page = bench.size(32, 4), bench.size(8, 2), bench.size(128, 16), bench.size(64, 16)
    all_heads = heads + 2 * kv_heads

    def inputs(num_tokens: int, seed: int) -> tuple[Any, ...]:
        num_blocks = -(-num_tokens // page) + 1
        qkv_TAD = bench.random(num_tokens, all_heads, width, seed=seed)
        k_cache, v_cache = (
            torch.zeros(num_blocks, kv_heads, page, width, dtype=bench.dtype, device=bench.device) for _ in range(2)
        )
        slots_T = torch.randperm(num_blocks * page, device=bench.device)[:num_tokens]
        angles_TR = bench.random(num_tokens, width // 2, dtype=torch.float32).repeat(1, 2)
        rotation = Rotation(angles_TR.cos().to(bench.dtype), angles_TR.sin().to(bench.dtype))
        return qkv_TAD, k_cache, v_cache, slots_T, rotation

    given = inputs(7, 0)
    found, (_, k_cache, v_cache, *_rest) = rope_and_write(*given), given
    qkv_TAD, k_expected, v_expected, _slots_T, rotation = inputs(7, 0)
    caches = k_expected.double(), v_expected.double()
    wide = Rotation(rotation.cos_TR.double(), rotation.sin_TR.double())
    expected = reference.rope_and_write(qkv_TAD.double(), *caches, given[3], wide)
    yield bench.error("rope_and_write, queries", found, expected, _TOLERANCES)
    yield bench.error("rope_and_write, keys", k_cache, caches[0], _TOLERANCES)
    yield bench.error("rope_and_write, values", v_cache, caches[1], _TOLERANCES)

    def make(num_tokens: int) -> Callable[[int], Callable[[], Any]]:
        def of_set(seed: int) -> Callable[[], Any]:
            given = inputs(num_tokens, seed)
            return lambda: rope_and_write(*given)

        return of_set

    few, many = bench.size(128, 2), bench.size(8192, 4)
    row_bytes = 2 * all_heads * width * bench.dtype.itemsize
    yield from bench.latency(f"rope_and_write, {few} tokens", make(few), few * row_bytes, 5)
    yield from bench.bandwidth(f"rope_and_write, {many} tokens", make(many), many * row_bytes, 0.75)


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
        yield bench.error(name, pages.out_THD, pages.expected, _ATTENTION_TOLERANCES)
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
    yield bench.error("paged_latent_decode", found, expected, _ATTENTION_TOLERANCES)
    num_lines, context = bench.size(64, 1), bench.size(4096, 16)

    def make(seed: int) -> Callable[[], Any]:
        given = inputs(num_lines, context, seed)
        return lambda: paged_latent_decode(*given)

    num_bytes = num_lines * context * width * bench.dtype.itemsize
    yield from bench.bandwidth(f"paged_latent_decode, {num_lines} rows of {context} tokens", make, num_bytes, None)


def prefill_attention(bench: Bench) -> Iterator[Row]:
    pages = Pages.make(bench, 2, bench.size(333, 20), bench.size(200, 9))
    pages.prefill()
    yield bench.error("paged_prefill", pages.out_THD, pages.expected, _ATTENTION_TOLERANCES)
    length = bench.size(8192, 16)
    whole = Pages.make(bench, 1, length, length)
    us = bench.microseconds([whole.prefill])
    num_flops = 2 * length**2 * whole.q_THD.shape[1] * whole.q_THD.shape[2]
    name = f"paged_prefill, {length} tokens, causal"
    yield Row(name, num_flops / us / 1e6, "TFLOP/s", at_least=None if bench.is_smoke else 400, note=f"{us:.0f} µs")


KERNELS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ceilings of this device": ceilings,
    "kernels: norm": norm,
    "kernels: activation": activation,
    "kernels: rotation and KV write": rope,
    "kernels: decode attention": decode_attention,
    "kernels: latent attention": latent_attention,
    "kernels: prefill attention": prefill_attention,
}
