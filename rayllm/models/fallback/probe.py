"""A trial of a `transformers` model when it is loaded: a short sequence through the paged cache, whole and in two
chunks, against the same by the attention of `transformers` itself. What the checks of `attention` do not see (a layer
that depends on a sequence's earlier tokens in another way than by its keys and values) shows here, before the first
request.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.kv_layout import group_and_part, kv_groups
from rayllm.layers.attention import AttentionBackend
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import KVPool
from rayllm.models.decoder import kv_specs
from rayllm.models.fallback.spec import one_line

if TYPE_CHECKING:
    from rayllm.models.fallback.attention import ModelAttention
    from rayllm.models.fallback.decoder import TransformersDecoder

_LENGTH = 12
_BLOCK_SIZE = 16
_WHOLE, _CHUNKS = (_LENGTH,), (7, 4, 1)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Of the mean difference, relative to the mean size of the logits: far above rounding, far below another
computation."""


@torch.inference_mode()
def probe(
    decoder: TransformersDecoder,
    backend: AttentionBackend,
    calls: ModelAttention,
    modules: Sequence[Any],
    tp: TensorParallel,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """`ConfigError` where the model fails, or computes something else than `transformers`. `modules` have the `tp` that
    they compute with, as `calls` has."""
    spec = decoder.spec
    length = min(_LENGTH, spec.max_model_len)
    ids_T = torch.arange(length, device=device) * max(1, spec.vocab_size // length)  # of every rank's vocabulary
    ids_T = ids_T.clamp_(max=spec.vocab_size - 1)
    with _alone([calls, *modules], tp):
        try:
            whole_TV, cut_TV = (
                decoder.logits(_paged(decoder, backend, ids_T, sizes, tp, dtype)) for sizes in (_WHOLE, _CHUNKS)
            )
            # heads that other ranks attend with are missing here: the parts are compared with each other
            expected_TV = whole_TV if calls.gathers_heads else decoder.reference(ids_T)
        except ConfigError:
            raise
        except Exception as error:
            raise calls.fault(f"a forward pass fails with {type(error).__name__}: {one_line(error)}") from error
    if whole_TV.shape != (length, spec.vocab_size):
        raise calls.fault(f"it gives {whole_TV.shape[-1]} logits where config.json says vocab_size={spec.vocab_size}")
    for found_TV, what in ((whole_TV, "a whole prompt"), (cut_TV, "a prompt in chunks")):
        size = expected_TV.abs().mean().clamp(min=1e-6)
        difference = float((found_TV - expected_TV).abs().mean() / size)
        if not difference < _TOLERANCE[dtype]:
            raise calls.fault(
                f"with RayLLM's KV cache its logits of {what} differ by {difference:.1%} from those of transformers "
                f"(up to {_TOLERANCE[dtype]:.1%} is rounding)"
            )


def _paged(
    decoder: TransformersDecoder,
    backend: AttentionBackend,
    ids_T: Tensor,
    sizes: Sequence[int],
    tp: TensorParallel,
    dtype: torch.dtype,
) -> Tensor:
    """Hidden states of one sequence, `[T, D]`, computed in chunks of these `sizes`."""
    groups = kv_groups(decoder.spec)
    part_of_layer = [part for _, part in group_and_part(groups)]
    pool = KVPool(kv_specs(decoder.spec, tp.size), len(groups), _BLOCK_SIZE, dtype, ids_T.device, part_of_layer)
    blocks_S = torch.arange(len(groups), device=ids_T.device)  # one for each group
    pool.clear(range(len(groups)))
    parts, begin = [], 0
    for size in sizes:
        end = min(begin + size, len(ids_T))
        if begin == end:
            break
        places = torch.arange(begin, end, device=ids_T.device)
        batch = Batch(
            token_ids_T=ids_T[begin:end],
            positions_T=places,
            slots_ST=blocks_S.unsqueeze(1) * _BLOCK_SIZE + places,
            query_starts=[0, end - begin],
            kv_lens=[end],
            block_table_SRB=blocks_S.int().view(-1, 1, 1),
            logits_indices_N=places - begin,
            num_decode_rows=int(end - begin == 1),
            block_size=_BLOCK_SIZE,
        )
        if backend.uses_device_rows:
            batch = batch.with_device_rows()
        parts.append(decoder.forward(batch, pool.layers, backend.prepare(batch)))
        begin = end
    return torch.cat(parts)


@contextlib.contextmanager
def _alone(holders: Sequence[Any], tp: TensorParallel) -> Iterator[None]:
    """Meanwhile collectives give something of the right shape without the other ranks, which may still load."""
    for holder in holders:
        holder.tp = _NoPeers(tp.rank, tp.size)
    try:
        yield
    finally:
        for holder in holders:
            holder.tp = tp


class _NoPeers(TensorParallel):
    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather_last(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.size, dim=-1)
