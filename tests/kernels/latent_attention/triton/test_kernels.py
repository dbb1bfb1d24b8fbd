"""Latent attention over pages, in the interpreter, against float64: other rows' blocks, and slots without a token, are
NaN."""

from __future__ import annotations

import math
import random

import pytest
import torch
from kernel_accuracy import KERNEL_TOLERANCES, Buffers, random_tensor, relative_error
from torch import Tensor

from rayllm_kernels.attention import PagedLines
from rayllm_kernels.attention.triton import split
from rayllm_kernels.device import interpreted
from rayllm_kernels.latent_attention import paged_latent_decode, paged_latent_prefill, reference

DECODE = [(37, 1), (0, 0), (1, 1), (16, 1)]
CHUNKS = [(37, 5), (0, 0), (19, 19), (33, 1)]
"""(tokens, queries) of each line."""
SCALE = 0.2


class Step:
    def __init__(self, lines: list[tuple[int, int]], widths: tuple[int, int], dtype: torch.dtype, buffers: Buffers):
        self.latent_dim, width = widths[0], sum(widths)
        self.sizes, self.dtype = lines, dtype
        self.rows = [random_tensor(length, width, dtype=dtype, seed=i) for i, (length, _) in enumerate(lines)]
        page, widest = 16, max(-(-length // 16) for length, _ in lines) + 1
        blocks = list(range(len(lines) * widest + 1))
        random.Random(1).shuffle(blocks)
        cache = torch.full((len(blocks), 1, page, width), math.nan, dtype=dtype)
        table = torch.full((len(lines), widest), 10**6, dtype=torch.int32)
        for number, row in enumerate(self.rows):
            for begin in range(0, len(row), page):
                table[number, begin // page] = block = blocks.pop()
                part = row[begin : begin + page]
                cache[block, 0, : len(part)] = part
        self.cache = buffers.input(cache)
        starts = torch.tensor([0] + [queries for _, queries in lines]).cumsum(0)
        ints = (torch.arange(len(lines)), torch.tensor([length for length, _ in lines]), table, starts)
        self.lines = PagedLines(*(buffers.input(each.to(torch.int32)) for each in ints))

    def expected(self, q_THW: Tensor) -> Tensor:
        outputs, token = [], 0
        for row, (length, queries) in zip(self.rows, self.sizes):
            for end in range(length - queries + 1, length + 1):
                latents = row[:end].double()
                weights = (q_THW[token].double() @ latents.T * SCALE).softmax(-1)
                outputs.append(weights @ latents[:, : self.latent_dim])
                token += 1
        return torch.stack(outputs)

    def decode(self, num_heads: int, buffers: Buffers, kernels: bool = True) -> tuple[Tensor, Tensor]:
        q_NHW = random_tensor(len(self.sizes), num_heads, self.cache.shape[3], dtype=self.dtype)
        out_NHC = buffers.output(*q_NHW.shape[:2], self.latent_dim, dtype=self.dtype)
        arrivals = buffers.inout(torch.zeros(64, dtype=torch.int32))
        run = paged_latent_decode if kernels else reference.paged_latent_decode
        with interpreted():
            run(q_NHW, self.cache, self.lines, SCALE, arrivals, out_NHC)
        assert not arrivals.any()
        kept = [length > 0 for length, _ in self.sizes]
        assert not out_NHC[[not each for each in kept]].any(), "padding lines are zeros"
        return out_NHC[kept], self.expected(q_NHW[kept])

    def prefill(self, num_heads: int, buffers: Buffers, kernels: bool = True) -> tuple[Tensor, Tensor]:
        """One token of no line is behind."""
        num_tokens = sum(queries for _, queries in self.sizes) + 1
        q_THW = random_tensor(num_tokens, num_heads, self.cache.shape[3], dtype=self.dtype)
        out_THC = buffers.output(*q_THW.shape[:2], self.latent_dim, dtype=self.dtype)
        run = paged_latent_prefill if kernels else reference.paged_latent_prefill
        with interpreted():
            run(q_THW, self.cache, self.lines, SCALE, out_THC)
        assert out_THC[-1].isnan().all()
        return out_THC[:-1], self.expected(q_THW)


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("num_heads", [1, 6, 20])
def test_decode_and_prefill_equal_float64(num_heads: int, kernels: bool, buffers: Buffers) -> None:
    for found, expected in (
        Step(DECODE, (24, 6), torch.float32, buffers).decode(num_heads, buffers, kernels),
        Step(CHUNKS, (24, 6), torch.float32, buffers).prefill(num_heads, buffers, kernels),
    ):
        assert relative_error(found, expected) < KERNEL_TOLERANCES[torch.float32]


@pytest.mark.kernels
@pytest.mark.parametrize("widths", [(16, 16), (128, 64)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_within_their_tolerance(dtype: torch.dtype, widths: tuple[int, int], buffers: Buffers) -> None:
    for found, expected in (
        Step(DECODE, widths, dtype, buffers).decode(5, buffers),
        Step(CHUNKS, widths, dtype, buffers).prefill(5, buffers),
    ):
        assert relative_error(found, expected) < KERNEL_TOLERANCES[dtype]


def test_parts_of_a_line_join(buffers: Buffers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_MIN_KEYS", 32)
    found, expected = Step([(150, 1), (0, 0), (33, 1)], (24, 6), torch.float32, buffers).decode(17, buffers)
    assert relative_error(found, expected) < KERNEL_TOLERANCES[torch.float32]
