"""One step for the attention kernels that read pages, and its attention in float64: other rows' blocks, and slots
without a token, are NaN."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace

import torch
from kernel_accuracy import Buffers, random_tensor
from torch import Tensor

from rayllm_kernels.attention import PagedLines, Scoring, paged_decode, paged_prefill, reference
from rayllm_kernels.device import interpreted


@dataclass(frozen=True)
class Case:
    lines: tuple[tuple[int, int], ...] = ((37, 1), (0, 0), (1, 1), (16, 1))
    """(keys, queries) of each line: 0 keys is a padding line."""
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    page: int = 16
    scoring: Scoring = field(default_factory=lambda: Scoring(0.3))
    dtype: torch.dtype = torch.float32

    @property
    def num_tokens(self) -> int:
        return sum(queries for _, queries in self.lines)


class Step:
    """A case's keys and values in pages in no order. What stands behind a window belongs to another row by now."""

    def __init__(self, case: Case, buffers: Buffers, cache_dtype: torch.dtype | None = None):
        self.case = case
        shape = (case.num_kv_heads, case.head_dim)
        dtype = cache_dtype or case.dtype
        self.keys, self.values = (
            [random_tensor(keys, *shape, seed=seed + i).to(dtype) for i, (keys, _) in enumerate(case.lines)]
            for seed in (10, 20)
        )
        widest = max(-(-keys // case.page) for keys, _ in case.lines) + 2
        blocks = list(range(widest * len(case.lines) + 3))
        random.Random(1).shuffle(blocks)
        size = (len(blocks), case.num_kv_heads, case.page, case.head_dim)
        caches = [torch.full(size, math.nan).to(dtype) for _ in range(2)]
        table = torch.full((len(case.lines) + 2, widest), 10**6, dtype=torch.int32)  # far outside of the cache
        rows = list(range(len(case.lines) + 2))
        random.Random(2).shuffle(rows)
        self.rows = rows[: len(case.lines)]
        for row, (keys, queries), k, v in zip(self.rows, case.lines, self.keys, self.values):
            window = case.scoring.window
            first = 0 if window is None else max(0, keys - queries - window + 1)
            for page in range(first // case.page, -(-keys // case.page)):
                table[row, page] = block = blocks.pop()
                span = slice(max(first, page * case.page), min(keys, (page + 1) * case.page))
                slots = slice(span.start - page * case.page, span.stop - page * case.page)
                for cache, source in zip(caches, (k, v)):
                    cache[block, :, slots] = source[span].transpose(0, 1)
        self.k_cache, self.v_cache = (buffers.input(cache) for cache in caches)
        starts = torch.tensor([0] + [queries for _, queries in case.lines]).cumsum(0)
        self.lines = PagedLines(
            buffers.input(torch.tensor(self.rows, dtype=torch.int32)),
            buffers.input(torch.tensor([keys for keys, _ in case.lines], dtype=torch.int32)),
            buffers.input(table),
            buffers.input(starts.to(torch.int32)),
        )

    def expected(self, q_THD: Tensor) -> Tensor:
        """Each query and head by itself, in float64."""
        case, scoring, outputs, token = self.case, self.case.scoring, [], 0
        group = case.num_heads // case.num_kv_heads
        for (num_keys, num_queries), keys, values in zip(case.lines, self.keys, self.values):
            for position in range(num_keys - num_queries, num_keys):
                first = 0 if scoring.window is None else max(0, position - scoring.window + 1)
                span = slice(first, position + 1)
                k, v = (x[span].double().repeat_interleave(group, 1) for x in (keys, values))
                scores_HL = torch.einsum("hd,lhd->hl", q_THD[token].double(), k) * scoring.k_scale * scoring.scale
                if scoring.soft_cap is not None:
                    scores_HL = scoring.soft_cap * (scores_HL / scoring.soft_cap).tanh()
                if scoring.slopes_H is not None:
                    distances_L = torch.arange(first, position + 1) - position
                    scores_HL = scores_HL + scoring.slopes_H.double().unsqueeze(1) * distances_L
                mass_H = scores_HL.exp().sum(1)
                if scoring.sinks_H is not None:
                    mass_H = mass_H + scoring.sinks_H.double().exp()
                outputs.append(torch.einsum("hl,lhd->hd", scores_HL.exp() / mass_H.unsqueeze(1), v) * scoring.v_scale)
                token += 1
        return torch.stack(outputs)

    def queries(self, num_tokens: int) -> Tensor:
        """Part of a wider tensor, as queries of a joined projection are."""
        case = self.case
        return random_tensor(num_tokens, case.num_heads + 3, case.head_dim, dtype=case.dtype)[:, : case.num_heads]

    def decode(self, buffers: Buffers, num_arrivals: int = 64, kernels: bool = True) -> tuple[Tensor, Tensor]:
        """What is found for the lines with keys, and what is expected."""
        q_NHD, kept = self.queries(len(self.case.lines)), [keys > 0 for keys, _ in self.case.lines]
        out_NHD = buffers.output(*q_NHD.shape, dtype=q_NHD.dtype)
        arrivals = buffers.inout(torch.zeros(num_arrivals, dtype=torch.int32))
        run = paged_decode if kernels else reference.paged_decode
        with interpreted():
            run(q_NHD, self.k_cache, self.v_cache, self.lines, self.case.scoring, arrivals, out_NHD)
        assert not arrivals.any()
        assert not out_NHD[[not each for each in kept]].any(), "padding lines are zeros"
        return out_NHD[kept], self.expected(q_NHD[kept])

    def prefill(self, buffers: Buffers, kernels: bool = True) -> tuple[Tensor, Tensor]:
        """The step's tokens begin at 5, and two of no line are behind."""
        q_THD = self.queries(self.case.num_tokens + 2)
        out_THD = buffers.output(*q_THD.shape, dtype=q_THD.dtype)
        lines = replace(self.lines, query_starts_N1=self.lines.query_starts_N1 + 5, first_query=5)
        run = paged_prefill if kernels else reference.paged_prefill
        with interpreted():
            run(q_THD, self.k_cache, self.v_cache, lines, self.case.scoring, out_THD)
        assert out_THD[-2:].isnan().all()
        return out_THD[:-2], self.expected(q_THD)


CHUNKS = ((37, 5), (0, 0), (19, 19), (33, 1), (18, 3))
SINKS, SLOPES = torch.linspace(-1, 2, 4), torch.tensor([0.5, 0.25, 0.1, 0.05])
SCORINGS = {
    "plain": Scoring(0.3),
    "window": Scoring(0.3, window=20),
    "narrow window": Scoring(0.3, window=1),
    "soft cap": Scoring(0.3, soft_cap=0.7),
    "sinks": Scoring(0.3, sinks_H=SINKS),
    "alibi": Scoring(0.3, slopes_H=SLOPES),
    "all": Scoring(0.3, window=9, soft_cap=2.0, sinks_H=SINKS, slopes_H=SLOPES),
}


SHAPES = [(1, 1, 64), (5, 1, 80), (14, 2, 16), (16, 1, 96), (8, 8, 16), (71, 1, 16), (2, 1, 256), (3, 3, 24)]
"""(query heads, key/value heads, head width)."""
