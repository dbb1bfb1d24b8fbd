"""Attention as a layer, and the plan of a step's attention, built once and shared by all layers.

Shape letters: T tokens of the step, B rows (sequences), H query heads, K key/value heads of this rank, P block size,
L key length, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.batch import Batch, LayerKV
from rayllm.layers.linear import Linear, RowParallelLinear
from rayllm.layers.spec import AttentionSpec
from rayllm.weights.source import WeightSource
from rayllm_kernels.attention import paged_decode, paged_prefill, prompt_attention
from rayllm_kernels.kv_cache import page_rows, write_kv
from rayllm_kernels.norm import rms_norm
from rayllm_kernels.rope import rope

_GROUP_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Keys and values gathered at once for decode rows: what stays in the cache of a CPU; on a GPU few launches matter."""


class Workspace:
    """Two flat buffers that gathered keys and values go to; they grow when needed and serve every layer and step."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._buffer = torch.empty(2, 0, dtype=dtype, device=device)

    def of_size(self, num_elements: int) -> Tensor:
        """`[2, n]` with n at least `num_elements`; what it held before is lost."""
        if self._buffer.shape[1] < num_elements:
            self._buffer = self._buffer.new_empty(2, num_elements)
        return self._buffer


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows with one query token each, of similar key length. `tokens` are their places in T; N = rows * K."""

    tokens: slice | Tensor
    pages: Tensor
    mask_NL: Tensor


@dataclass(frozen=True, slots=True)
class Chunk:
    """Several query tokens of one row whose earlier keys are in its pages."""

    tokens: slice
    pages: Tensor
    kv_len: int
    mask_TL: Tensor


@dataclass(frozen=True, slots=True)
class Prompts:
    """Whole prompts of equal length: nothing is read from pages."""

    tokens: slice
    num_rows: int
    mask_TT: Tensor | None


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Which tokens attend to what, for all layers with the same window."""

    num_tokens: int
    decode: list[DecodeGroup]
    chunks: list[Chunk]
    prompts: list[Prompts]
    slots_T: Tensor
    write_rows: Tensor
    workspace: Tensor
    _covers_all: bool = field(default=False)

    @staticmethod
    def build(
        batch: Batch, num_kv_heads: int, head_dim: int, dtype: torch.dtype, workspace: Workspace, window: int | None
    ) -> AttentionPlan:
        """The plan of one step; `dtype` is that of queries, keys and values."""
        builder = _Builder(batch, num_kv_heads, head_dim, dtype, window)
        decode = list(builder.decode_groups())
        chunks, prompts = builder.chunks_and_prompts()
        num_pages = max(
            [group.pages.numel() for group in decode] + [chunk.pages.numel() for chunk in chunks], default=0
        )
        return AttentionPlan(
            num_tokens=batch.query_starts[-1],
            decode=decode,
            chunks=chunks,
            prompts=prompts,
            slots_T=batch.slots_T,
            write_rows=page_rows(batch.slots_T, num_kv_heads, batch.block_size),
            workspace=workspace.of_size(num_pages * batch.block_size * head_dim),
            _covers_all=len(decode) + len(chunks) + len(prompts) == 1,
        )

    def attend(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, scale: float) -> Tensor:
        """Attention of the step's tokens, `[T, H, D]`; their keys and values are already in `kv`."""
        if self._covers_all:
            return next(self._parts(q_THD, k_TKD, v_TKD, kv, scale))[1]
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for tokens, part in self._parts(q_THD, k_TKD, v_TKD, kv, scale):
            out_THD[tokens] = part
        return out_THD

    def _parts(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, scale: float
    ) -> Iterator[tuple[slice | Tensor, Tensor]]:
        for group in self.decode:
            q = q_THD[group.tokens]
            yield (
                group.tokens,
                paged_decode(q, kv.k, kv.v, group.pages, group.mask_NL, scale, self.workspace),
            )
        for chunk in self.chunks:
            q = q_THD[chunk.tokens]
            yield (
                chunk.tokens,
                paged_prefill(q, kv.k, kv.v, chunk.pages, chunk.kv_len, chunk.mask_TL, scale, self.workspace),
            )
        for prompts in self.prompts:
            q, k, v = q_THD[prompts.tokens], k_TKD[prompts.tokens], v_TKD[prompts.tokens]
            yield prompts.tokens, prompt_attention(q, k, v, prompts.num_rows, prompts.mask_TT, scale)


class _Builder:
    """Builds the parts of an `AttentionPlan`."""

    def __init__(self, batch: Batch, num_kv_heads: int, head_dim: int, dtype: torch.dtype, window: int | None):
        self._batch = batch
        self._device = batch.slots_T.device
        self._dtype = dtype
        self._window = window
        self._heads_K = torch.arange(num_kv_heads, device=self._device)
        self._page_bytes = 2 * num_kv_heads * batch.block_size * head_dim * dtype.itemsize

    def decode_groups(self) -> Iterator[DecodeGroup]:
        """Decode rows, sorted by length and cut where a group's keys and values pass the limit."""
        limit = _GROUP_BYTES.get(self._device.type, _GROUP_BYTES["cpu"])
        lens = self._batch.kv_lens[: self._batch.num_decode_rows]
        rows = sorted(range(len(lens)), key=lens.__getitem__)
        group: list[int] = []
        for row in rows:
            num_pages = self._last_page(row) - self._first_page(lens[row] - 1)
            if group and (len(group) + 1) * num_pages * self._page_bytes > limit:
                yield self._decode_group(group)
                group = []
            group.append(row)
        if group:
            yield self._decode_group(sorted(group))

    def chunks_and_prompts(self) -> tuple[list[Chunk], list[Prompts]]:
        """Rows with several tokens: those that start at position 0 need no pages, and equal ones go together."""
        chunks: list[Chunk] = []
        prompts: list[Prompts] = []
        starts, lens = self._batch.query_starts, self._batch.kv_lens
        row = self._batch.num_decode_rows
        while row < len(lens):
            length = starts[row + 1] - starts[row]
            if lens[row] > length:
                chunks.append(self._chunk(row))
                row += 1
                continue
            end = row + 1
            while end < len(lens) and starts[end + 1] - starts[end] == length == lens[end]:
                end += 1
            prompts.append(Prompts(slice(starts[row], starts[end]), end - row, self._prompt_mask(length)))
            row = end
        return chunks, prompts

    def _first_page(self, position: int) -> int:
        """The first page in which the token at `position` sees a key."""
        if self._window is None:
            return 0
        return max(0, position - self._window + 1) // self._batch.block_size

    def _last_page(self, row: int) -> int:
        return -(-self._batch.kv_lens[row] // self._batch.block_size)

    def _decode_group(self, rows: list[int]) -> DecodeGroup:
        block_size = self._batch.block_size
        lens = [self._batch.kv_lens[row] for row in rows]
        first_pages = [self._first_page(length - 1) for length in lens]
        ends = [length - first * block_size for length, first in zip(lens, first_pages)]
        num_pages = -(-max(ends) // block_size)
        tokens: slice | Tensor = slice(rows[0], rows[0] + len(rows))
        if rows != list(range(rows[0], rows[0] + len(rows))):
            tokens = torch.tensor(rows, device=self._device)
        begins = [0 if self._window is None else max(0, end - self._window) for end in ends]
        bounds = torch.tensor([begins, ends], device=self._device).unsqueeze(2)
        keys_L = torch.arange(num_pages * block_size, device=self._device)
        mask_BL = self._added((keys_L >= bounds[0]) & (keys_L < bounds[1]))
        mask_NL = mask_BL.repeat_interleave(len(self._heads_K), dim=0)
        return DecodeGroup(tokens, self._pages(tokens, first_pages, num_pages), mask_NL)

    def _chunk(self, row: int) -> Chunk:
        begin, end = self._batch.query_starts[row : row + 2]
        kv_len = self._batch.kv_lens[row]
        first_position = kv_len - (end - begin)
        first_page = self._first_page(first_position)
        skipped = first_page * self._batch.block_size
        pages = self._pages(slice(row, row + 1), [first_page], self._last_page(row) - first_page)
        mask_TL = self._mask(end - begin, first_position - skipped, kv_len - skipped)
        return Chunk(slice(begin, end), pages, kv_len - skipped, mask_TL)

    def _prompt_mask(self, length: int) -> Tensor | None:
        if self._window is None or self._window >= length:
            return None
        return self._mask(length, 0, length)

    def _mask(self, num_queries: int, first_query: int, num_keys: int) -> Tensor:
        """What is added to the scores of queries at `first_query`... and keys at 0..., `[num_queries, num_keys]`."""
        queries = torch.arange(first_query, first_query + num_queries, device=self._device).unsqueeze(1)
        keys = torch.arange(num_keys, device=self._device)
        allowed = keys <= queries
        if self._window is not None:
            allowed &= keys > queries - self._window
        return self._added(allowed)

    def _added(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=self._dtype, device=self._device).masked_fill_(~allowed, float("-inf"))

    def _pages(self, rows: slice | Tensor, first_pages: list[int], num_pages: int) -> Tensor:
        """block * K + head of each row's pages from its first on, `[rows * K * num_pages]`."""
        table_RB = self._batch.block_table_RB[rows]
        if any(first_pages):
            columns = torch.tensor(first_pages, device=self._device).unsqueeze(1)
            columns = columns + torch.arange(num_pages, device=self._device)
            table_RB = table_RB.gather(1, columns.clamp_(max=table_RB.shape[1] - 1))
        else:
            table_RB = table_RB[:, :num_pages]
        pages = table_RB.unsqueeze(1) * len(self._heads_K) + self._heads_K.view(1, -1, 1)
        return pages.flatten()


def kv_heads_of(num_kv_heads: int, tp: TensorParallel) -> range:
    """This rank's key/value heads; where there are fewer than ranks, neighbouring ranks hold the same one."""
    if num_kv_heads >= tp.size:
        return tp.shard(num_kv_heads, "num_key_value_heads")
    head = tp.rank * num_kv_heads // tp.size
    return range(head, head + 1)


class Attention:
    """Projections, rotation, cache and output of one layer; the residual is added in the output projection."""

    def __init__(self, weights: WeightSource, prefix: str, spec: AttentionSpec, width: int, tp: TensorParallel):
        self.spec = spec
        heads = tp.shard(spec.num_heads, "num_attention_heads")
        kv_heads = kv_heads_of(spec.num_kv_heads, tp)
        self.num_heads, self.num_kv_heads = len(heads), len(kv_heads)
        self._qkv = self._joined_qkv(weights, prefix, width, heads, kv_heads)
        self._qk_norm_HD: Tensor | None = None
        if spec.qk_norm is not None:
            q_norm, k_norm = (
                weights.tensor(f"{prefix}.{name}_norm.weight", (spec.head_dim,)).unsqueeze(0) for name in "qk"
            )
            self._qk_norm_HD = torch.cat((q_norm.expand(len(heads), -1), k_norm.expand(len(kv_heads), -1)))
        self._out = RowParallelLinear(
            weights,
            f"{prefix}.out",
            spec.num_heads * spec.head_dim,
            width,
            tp,
            bias=spec.out_bias,
        )

    def _joined_qkv(self, weights: WeightSource, prefix: str, width: int, heads: range, kv_heads: range) -> Linear:
        dim = self.spec.head_dim
        parts, biases = [], []
        for name, held, num_heads in (
            ("q", heads, self.spec.num_heads),
            ("k", kv_heads, self.spec.num_kv_heads),
            ("v", kv_heads, self.spec.num_kv_heads),
        ):
            part = range(held.start * dim, held.stop * dim)
            parts.append(weights.tensor(f"{prefix}.{name}.weight", (num_heads * dim, width), part=part))
            if self.spec.qkv_bias:
                biases.append(weights.tensor(f"{prefix}.{name}.bias", (num_heads * dim,), part=part))
        return Linear(torch.cat(parts), torch.cat(biases) if biases else None)

    def __call__(
        self,
        x_TD: Tensor,
        residual_TD: Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        rotation: tuple[Tensor, Tensor] | None,
        keep_N: Tensor | None,
    ) -> Tensor:
        """residual + attention(x), for the tokens `keep_N` only if given; keys and values of all go to the cache."""
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv = self._qkv(x_TD).view(-1, heads + 2 * kv_heads, self.spec.head_dim)
        qk, v_TKD = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self._qk_norm_HD is not None and self.spec.qk_norm is not None:
            qk = rms_norm(qk, self._qk_norm_HD, self.spec.qk_norm.eps)
        if rotation is not None:
            qk = rope(qk, *rotation)
        q_THD, k_TKD = qk[:, :heads], qk[:, heads:]
        write_kv(k_TKD, v_TKD, kv.k, kv.v, plan.slots_T, plan.write_rows)
        out = plan.attend(q_THD, k_TKD, v_TKD, kv, self.spec.scale).view(x_TD.shape[0], -1)
        if keep_N is not None:
            out, residual_TD = out[keep_N], residual_TD[keep_N]
        return self._out.plus(out, residual_TD)
