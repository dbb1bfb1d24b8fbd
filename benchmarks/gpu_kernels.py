"""Each kernel of `gpu.py` but attention: its error against float64 on small inputs, and its time against its floor on
large ones.

Shapes are Llama-3-8B's. Floors and tolerances are those of `kernels/README.md`. With `--smoke` the same code runs on
tiny shapes in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from gpu_attention import decode_attention, latent_attention, prefill_attention
from gpu_bench import TOLERANCES, Bench
from gpu_report import Row
from torch import Tensor

_EXPERT_TOLERANCES = {torch.bfloat16: 5e-3, torch.float32: 1e-5}


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
    yield bench.error("rms_norm", rms_norm(x_TD, weight_D, 1e-5), expected, TOLERANCES)
    summed = x_TD.double() + residual_TD.double()
    found, _ = add_rms_norm(x_TD, residual_TD.clone(), weight_D, 1e-5)
    yield bench.error("add_rms_norm", found, reference.rms_norm(summed, weight_D.double(), 1e-5), TOLERANCES)

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
    yield bench.error("silu_mul", silu_mul(x), reference.silu_mul(x.double()), TOLERANCES)

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
    yield bench.error("rope_and_write, queries", found, expected, TOLERANCES)
    yield bench.error("rope_and_write, keys", k_cache, caches[0], TOLERANCES)
    yield bench.error("rope_and_write, values", v_cache, caches[1], TOLERANCES)

    def make(num_tokens: int) -> Callable[[int], Callable[[], Any]]:
        def of_set(seed: int) -> Callable[[], Any]:
            given = inputs(num_tokens, seed)
            return lambda: rope_and_write(*given)

        return of_set

    few, many = bench.size(128, 2), bench.size(8192, 4)
    row_bytes = 2 * all_heads * width * bench.dtype.itemsize
    yield from bench.latency(f"rope_and_write, {few} tokens", make(few), few * row_bytes, 5)
    yield from bench.bandwidth(f"rope_and_write, {many} tokens", make(many), many * row_bytes, 0.75)


def experts(bench: Bench) -> Iterator[Row]:
    """Of Qwen3-30B-A3B's shape: a mixture's experts for a decode step, which reads all their weights, and a prompt."""
    from rayllm_kernels.moe import ExpertWeights, choose_experts, mix_experts, reference

    num_experts, top_k = bench.size(128, 6), bench.size(8, 2)
    width, inner = bench.size(2048, 32), bench.size(768, 16)
    gate_up, down = bench.random(num_experts, 2 * inner, width), bench.random(num_experts, width, inner, seed=1)
    weights = ExpertWeights(gate_up / width**0.5, None, down / inner**0.5, None, "silu")

    def inputs(num_tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = bench.random(num_tokens, num_experts, seed=seed, dtype=torch.float32)
        chosen = choose_experts(logits_TE, None, top_k, "softmax", renormalize=True)
        return bench.random(num_tokens, width, seed=seed + 1), *chosen

    x_TD, experts_TK, scores_TK = inputs(9)
    wide = replace(weights, gate_up_E2ID=weights.gate_up_E2ID.double(), down_EDI=weights.down_EDI.double())
    expected = reference.mix_experts(x_TD.double(), experts_TK, scores_TK.double(), wide)
    yield bench.error("mix_experts", mix_experts(x_TD, experts_TK, scores_TK, weights), expected, _EXPERT_TOLERANCES)

    def make(num_tokens: int) -> Callable[[int], Callable[[], Any]]:
        def of_set(seed: int) -> Callable[[], Any]:
            given = inputs(num_tokens, seed)
            return lambda: mix_experts(*given, weights)

        return of_set

    few, many = bench.size(64, 2), bench.size(4096, 4)
    weight_bytes = gate_up.nbytes + down.nbytes
    yield from bench.bandwidth(f"mix_experts, {few} tokens", make(few), weight_bytes, None)
    us = bench.microseconds([make(many)(0)])
    num_flops = 6 * many * top_k * width * inner
    yield Row(f"mix_experts, {many} tokens", num_flops / us / 1e6, "TFLOP/s", note=f"{us:.0f} µs")


def int4_products(bench: Bench) -> Iterator[Row]:
    """Weights of four bits in groups of 128 inputs, against torch's product with weights of sixteen."""
    from rayllm_kernels.w4a16 import from_gptq, int4_linear, reference

    num_inputs, num_outputs = bench.size(4096, 256), bench.size(14336, 64)
    dtype = torch.float16 if bench.is_smoke else torch.bfloat16

    def weight(seed: int) -> Any:
        generator = torch.Generator(bench.device).manual_seed(seed)

        def words(*shape: int) -> Tensor:
            bits = torch.randint(-(2**31), 2**31, shape, generator=generator, device=bench.device)
            return bits.to(torch.int32)

        scales_GO = bench.random(num_inputs // 128, num_outputs, dtype=torch.float32).abs().to(dtype) / num_inputs**0.5
        packed = words(num_inputs // 8, num_outputs), words(num_inputs // 128, num_outputs // 8), scales_GO
        return from_gptq(*packed, None, group_size=128, zeros_are_less_one=False)

    x_TI, first = bench.random(5, num_inputs, dtype=dtype), weight(0)
    expected = x_TI.double() @ reference.dequantized(first).double().T
    yield bench.error("int4_linear", int4_linear(x_TI, first), expected, dict.fromkeys(_EXPERT_TOLERANCES, 3e-3))

    def make(num_tokens: int, bits: int) -> Callable[[int], Callable[[], Any]]:
        def of_set(seed: int) -> Callable[[], Any]:
            x_TI = bench.random(num_tokens, num_inputs, seed=seed, dtype=dtype)
            if bits == 4:
                narrow = weight(seed)
                return lambda: int4_linear(x_TI, narrow)
            wide_OI = bench.random(num_outputs, num_inputs, seed=seed, dtype=dtype)
            return lambda: x_TI @ wide_OI.T

        return of_set

    for num_tokens, target in ((1, 2.5), (16, 2.5), (64, 1.5)):
        us, wide_us = (
            bench.microseconds(bench.sets(make(num_tokens, bits), num_inputs * num_outputs * bits // 8))
            for bits in (4, 16)
        )
        name = f"int4_linear, {num_tokens} tokens, against 16 bits"
        yield Row(name, wide_us / us, "times", at_least=None if bench.is_smoke else target, note=f"{us:.1f} µs")


def float8_products(bench: Bench) -> Iterator[Row]:
    """Weights of eight bits in blocks of 128 x 128, activations rounded to eight bits on the way, against torch's
    product in sixteen."""
    from rayllm_kernels.fp8 import fp8_linear, fp8_weight, reference

    num_inputs, num_outputs = bench.size(4096, 256), bench.size(14336, 128)
    dtype = torch.float16 if bench.is_smoke else torch.bfloat16

    def weight(seed: int) -> Any:
        values_OI = (8 * bench.random(num_outputs, num_inputs, seed=seed, dtype=dtype)).to(torch.float8_e4m3fn)
        scales = bench.random(num_outputs // 128, num_inputs // 128, seed=seed, dtype=torch.float32).abs()
        return fp8_weight(values_OI, scales / num_inputs**0.5)

    x_TI, first = bench.random(5, num_inputs, dtype=dtype), weight(0)
    expected = reference.fp8_linear(x_TI.float(), first)
    tolerances = {torch.bfloat16: 5e-3, torch.float32: 5e-2}  # the interpreter rounds to float8 in another way
    yield bench.error("fp8_linear", fp8_linear(x_TI, first), expected, tolerances)
    for num_tokens in (bench.size(16, 1), bench.size(4096, 2)):

        def make(seed: int, num_tokens: int = num_tokens) -> Callable[[], Any]:
            x_TI, narrow = bench.random(num_tokens, num_inputs, seed=seed, dtype=dtype), weight(seed)
            return lambda: fp8_linear(x_TI, narrow)

        def make_wide(seed: int, num_tokens: int = num_tokens) -> Callable[[], Any]:
            x_TI = bench.random(num_tokens, num_inputs, seed=seed, dtype=dtype)
            wide_OI = bench.random(num_outputs, num_inputs, seed=seed, dtype=dtype)
            return lambda: x_TI @ wide_OI.T

        us, wide_us = (bench.microseconds(bench.sets(each, num_inputs * num_outputs)) for each in (make, make_wide))
        yield Row(f"fp8_linear, {num_tokens} tokens, against 16 bits", wide_us / us, "times", note=f"{us:.1f} µs")


def sampling(bench: Bench) -> Iterator[Row]:
    """A step's draws, with all that the sampler does on the device."""
    from rayllm.messages import RowParams
    from rayllm.sampling.sampler import Sampler
    from rayllm.transfer.upload import Upload

    num_rows, vocab_size = bench.size(64, 1), bench.size(151936, 100)

    def prepared(device: torch.device, params: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        sizes = {"max_rows": num_rows, "vocab_size": vocab_size, "max_model_len": 64, "eos_token_ids": (2,)}
        sampler, upload = Sampler(**sizes, device=device), Upload(device)
        for row in range(num_rows):
            sampler.set_row(row, RowParams(**params), 7 + row, 0, [1, 2, 3], 3)
        draws = sampler.prepare(upload, list(range(num_rows)))
        upload.send()
        last_token_M = torch.zeros(num_rows, dtype=torch.int64, device=device)
        return lambda logits_NV: sampler.sample(logits_NV, draws, last_token_M).token_ids_N

    logits_NV = 3 * bench.random(num_rows, vocab_size, dtype=torch.float32)
    for name, params, target in (
        ("greedy", {"temperature": 0.0}, 25),
        ("temperature", {"temperature": 0.8}, 25),
        ("top-k and top-p", {"temperature": 0.8, "top_k": 50, "top_p": 0.9}, 80),
        ("top-p of a flat row", {"temperature": 2.0, "top_p": 0.95}, 80),
    ):
        draw = prepared(bench.device, params)
        with mock.patch("rayllm_kernels.device._interpreted", False):  # the CPU's own path
            expected = prepared(torch.device("cpu"), params)(logits_NV.cpu())
        num_others = int((draw(logits_NV).cpu() != expected).sum())
        yield Row(f"sample, {name}: tokens other than the CPU's", num_others, "", at_most=0)

        def make(seed: int, draw: Callable[[Tensor], Tensor] = draw) -> Callable[[], Any]:
            logits_NV = 3 * bench.random(num_rows, vocab_size, seed=seed, dtype=torch.float32)
            return lambda: draw(logits_NV)

        yield from bench.latency(f"sample, {name}, {num_rows} rows", make, logits_NV.nbytes, target)


KERNELS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "ceilings of this device": ceilings,
    "kernels: norm": norm,
    "kernels: activation": activation,
    "kernels: rotation and KV write": rope,
    "kernels: decode attention": decode_attention,
    "kernels: latent attention": latent_attention,
    "kernels: prefill attention": prefill_attention,
    "kernels: experts": experts,
    "kernels: products with four bits": int4_products,
    "kernels: products with eight bits": float8_products,
    "kernels: sampling": sampling,
}
