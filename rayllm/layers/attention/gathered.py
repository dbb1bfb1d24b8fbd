"""The attention backend that gathers pages and multiplies with torch: the CPU's, and the portable one on a GPU.

Shape letters: T tokens of the step, B rows (sequences), H query heads, K key/value heads of this rank, G = H / K heads
that share one, P block size, L key length, D head width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from rayllm.layers.attention import gathered_latent
from rayllm.layers.attention.backend import AttentionBackend, AttentionGroup, LatentLayerAttention, LayerAttention
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import LayerKV
from rayllm_kernels.attention import gather_pages, gathered_chunk, gathered_decode, prompt_attention
from rayllm_kernels.kv_cache import page_rows, write_kv, write_latent

_GROUP_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Keys and values gathered at once for decode rows: what stays in the cache of a CPU; on a GPU few launches matter."""


class Workspace:
    """A flat buffer for each cache, where pages are gathered; it grows when needed and serves all layers and steps."""

    def __init__(self, num_caches: int, dtype: torch.dtype, device: torch.device):
        self._buffer = torch.empty(num_caches, 0, dtype=dtype, device=device)

    def of_size(self, num_elements: int) -> Tensor:
        """`[caches, n]` with n at least `num_elements`; what it held before is lost."""
        if self._buffer.shape[1] < num_elements:
            self._buffer = self._buffer.new_empty(len(self._buffer), num_elements)
        return self._buffer


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows with one query token each, of similar key length. `tokens` are their places in T; N = rows * K."""

    tokens: slice | Tensor
    pages: Tensor
    mask_NGL: Tensor
    """G is 1 where the heads of a key/value head see the same mask."""


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
class GroupPlan:
    """Which tokens attend to what in a step, for all layers of one `AttentionGroup`."""

    decode: list[DecodeGroup]
    chunks: list[Chunk]
    prompts: list[Prompts]
    slots_T: Tensor
    write_rows: Tensor
    workspace: Tensor

    @property
    def has_one_part(self) -> bool:
        return len(self.decode) + len(self.chunks) + len(self.prompts) == 1

    def parts(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, layer: LayerAttention
    ) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """The attention of each part of the step, with the places of its tokens in T."""
        k_cache, v_cache = kv
        scale, extras = layer.scale, (layer.soft_cap, layer.sinks_H)
        for group in self.decode:
            q = q_THD[group.tokens]
            out = gathered_decode(q, k_cache, v_cache, group.pages, group.mask_NGL, scale, self.workspace, *extras)
            yield group.tokens, out
        for chunk in self.chunks:
            q = q_THD[chunk.tokens]
            out = gathered_chunk(
                q, k_cache, v_cache, chunk.pages, chunk.kv_len, chunk.mask_TL, scale, self.workspace, *extras
            )
            yield chunk.tokens, out
        for prompts in self.prompts:
            q, k, v = q_THD[prompts.tokens], k_TKD[prompts.tokens], v_TKD[prompts.tokens]
            yield prompts.tokens, prompt_attention(q, k, v, prompts.num_rows, prompts.mask_TT, scale, *extras)

    def latent_parts(
        self, q_THD: Tensor, latent_TW: Tensor, kv: LayerKV, layer: LatentLayerAttention
    ) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """`parts` of latent attention."""
        (cache,) = kv
        for group in self.decode:
            q, pages, mask = q_THD[group.tokens], group.pages, group.mask_NGL
            yield group.tokens, gathered_latent.decode(q, cache, pages, mask, self.workspace[0], layer)
        for chunk in self.chunks:
            latents = gather_pages(cache, chunk.pages, self.workspace[0]).view(-1, cache.shape[-1])[: chunk.kv_len]
            yield chunk.tokens, gathered_latent.chunk(q_THD[chunk.tokens], latents, chunk.mask_TL, layer)
        for prompts in self.prompts:
            q, latents = (x[prompts.tokens].unflatten(0, (prompts.num_rows, -1)) for x in (q_THD, latent_TW))
            yield prompts.tokens, gathered_latent.expanded(q, latents, prompts.mask_TT, layer)


class GatheredBackend(AttentionBackend):
    """Keys and values of a few rows at a time are gathered from their pages, so that plain products can be used."""

    name = "gathered"

    def __init__(self, groups: Sequence[Iterable[AttentionGroup]], dtype: torch.dtype, device: torch.device):
        """`dtype` is that of queries, keys and values."""
        self._dtype = dtype
        self._groups = [list(dict.fromkeys(of_kv_group)) for of_kv_group in groups]
        self._workspaces = {group: Workspace(group.num_caches, dtype, device) for group in chain(*self._groups)}

    def prepare(self, batch: Batch) -> list[dict[AttentionGroup, GroupPlan]]:
        return [
            {group: self.plan(batch, group, number) for group in groups} for number, groups in enumerate(self._groups)
        ]

    def plan(self, batch: Batch, group: AttentionGroup, kv_group: int = 0) -> GroupPlan:
        """The part of a step's metadata that layers of `group` in a KV group use."""
        builder = _Builder(batch, group, kv_group, self._dtype)
        decode = list(builder.decode_groups())
        chunks, prompts = builder.chunks_and_prompts()
        pages = [part.pages for part in decode] + [part.pages for part in chunks]
        num_pages = max(map(torch.Tensor.numel, pages), default=0)
        slots_T = batch.slots_ST[kv_group]
        return GroupPlan(
            decode=decode,
            chunks=chunks,
            prompts=prompts,
            slots_T=slots_T,
            write_rows=page_rows(slots_T, group.num_kv_heads, batch.block_size),
            workspace=self._workspaces[group].of_size(num_pages * batch.block_size * group.head_dim),
        )

    def write(
        self,
        k_TKD: Tensor,
        v_TKD: Tensor,
        kv: LayerKV,
        metadata: dict[AttentionGroup, GroupPlan],
        layer: LayerAttention,
    ) -> None:
        plan = metadata[layer.group]
        k_cache, v_cache = kv
        write_kv(k_TKD, v_TKD, k_cache, v_cache, plan.slots_T, plan.write_rows)

    def forward(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        kv: LayerKV,
        metadata: dict[AttentionGroup, GroupPlan],
        layer: LayerAttention,
    ) -> Tensor:
        plan = metadata[layer.group]
        return _joined(plan, plan.parts(q_THD, k_TKD, v_TKD, kv, layer), q_THD, q_THD.shape[-1])

    def write_latent(
        self,
        latent_TW: Tensor,
        kv: LayerKV,
        metadata: dict[AttentionGroup, GroupPlan],
        layer: LatentLayerAttention,
    ) -> None:
        write_latent(latent_TW, kv[0], metadata[layer.group].slots_T)

    def forward_latent(
        self,
        q_THD: Tensor,
        latent_TW: Tensor,
        kv: LayerKV,
        metadata: dict[AttentionGroup, GroupPlan],
        layer: LatentLayerAttention,
    ) -> Tensor:
        plan = metadata[layer.group]
        return _joined(plan, plan.latent_parts(q_THD, latent_TW, kv, layer), q_THD, layer.spec.value_dim)


def _joined(plan: GroupPlan, parts: Iterator[tuple[slice | Tensor, Tensor]], q_THD: Tensor, width: int) -> Tensor:
    """The parts' attention in the order of the step's tokens, `[T, H, width]`."""
    if plan.has_one_part:
        return next(parts)[1]
    out = torch.empty((*q_THD.shape[:2], width), dtype=q_THD.dtype, device=q_THD.device)
    for tokens, part in parts:
        out[tokens] = part
    return out


class _Builder:
    """Builds the parts of a `GroupPlan`."""

    def __init__(self, batch: Batch, group: AttentionGroup, kv_group: int, dtype: torch.dtype):
        self._batch = batch
        assert batch.block_table_SRB is not None, "the runner gives tables to a backend that does not use device rows"
        self._table_RB = batch.block_table_SRB[kv_group]
        self._device = self._table_RB.device
        self._dtype = dtype
        self._window = group.window
        self._heads_K = torch.arange(group.num_kv_heads, device=self._device)
        self._page_bytes = group.num_caches * group.num_kv_heads * batch.block_size * group.head_dim * dtype.itemsize
        self._slopes_KG: Tensor | None = None
        if group.alibi_slopes:
            slopes = torch.tensor(group.alibi_slopes, dtype=torch.float32, device=self._device)
            self._slopes_KG = slopes.view(group.num_kv_heads, -1)

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
        mask_NGL = mask_BL.repeat_interleave(len(self._heads_K), dim=0).unsqueeze(1)
        if self._slopes_KG is not None:
            distances_BL = keys_L - (bounds[1] - 1)
            alibi_BKGL = self._slopes_KG.unsqueeze(2) * distances_BL[:, None, None]
            mask_NGL = mask_NGL + alibi_BKGL.flatten(0, 1).to(self._dtype)
        return DecodeGroup(tokens, self._pages(tokens, first_pages, num_pages), mask_NGL)

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
        if self._slopes_KG is None and (self._window is None or self._window >= length):
            return None
        return self._mask(length, 0, length)

    def _mask(self, num_queries: int, first_query: int, num_keys: int) -> Tensor:
        """What is added to the scores of queries at `first_query`... and keys at 0..., `[num_queries, num_keys]`, or
        `[K, G, num_queries, num_keys]` where heads differ."""
        queries = torch.arange(first_query, first_query + num_queries, device=self._device).unsqueeze(1)
        keys = torch.arange(num_keys, device=self._device)
        allowed = keys <= queries
        if self._window is not None:
            allowed &= keys > queries - self._window
        mask_TL = self._added(allowed)
        if self._slopes_KG is None:
            return mask_TL
        return mask_TL + (self._slopes_KG[:, :, None, None] * (keys - queries)).to(self._dtype)

    def _added(self, allowed: Tensor) -> Tensor:
        return torch.zeros(allowed.shape, dtype=self._dtype, device=self._device).masked_fill_(~allowed, float("-inf"))

    def _pages(self, rows: slice | Tensor, first_pages: list[int], num_pages: int) -> Tensor:
        """block * K + head of each row's pages from its first on, `[rows * K * num_pages]`."""
        table_RB = self._table_RB[rows]
        if any(first_pages):
            columns = torch.tensor(first_pages, device=self._device).unsqueeze(1)
            columns = columns + torch.arange(num_pages, device=self._device)
            table_RB = table_RB.gather(1, columns.clamp_(max=table_RB.shape[1] - 1))
        else:
            table_RB = table_RB[:, :num_pages]
        pages = table_RB.unsqueeze(1) * len(self._heads_K) + self._heads_K.view(1, -1, 1)
        return pages.flatten()
