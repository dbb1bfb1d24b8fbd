"""The only decoder. What distinguishes one model from another is in its spec; no model's name is known here.

Shape letters: T tokens of the step, N positions whose logits are wanted, D hidden width, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.kv_layout import group_and_part, kv_groups, kv_parts
from rayllm.layers.attention import AttentionBackend, AttentionGroup, AttentionNeeds
from rayllm.layers.batch import Batch
from rayllm.layers.embedding import LearnedPositions, OutputHead, VocabEmbedding, vocab_part
from rayllm.layers.kv_cache import KVSpec, LayerKV
from rayllm.layers.rope import RotaryEmbedding
from rayllm.linear import Linear, dense_linear
from rayllm.models.layer import ATTENTION_LAYERS, DecoderLayer, make_norm
from rayllm.spec import DecoderSpec
from rayllm.weights.parallel import make_in_parallel
from rayllm.weights.source import Outputs, WeightSource


def kv_specs(spec: DecoderSpec, tp_size: int) -> list[KVSpec]:
    """What each part of a KV block keeps of a token on one rank."""
    return [KVSpec(*spec.layers[layer].attention.kv_shape(tp_size)) for layer in kv_parts(kv_groups(spec))]


def attention_groups(spec: DecoderSpec, rank: int, tp_size: int) -> list[list[AttentionGroup]]:
    """For each KV group, the groups of layers for which a rank's attention backend prepares a step."""
    groups = []
    for kv_group in kv_groups(spec):
        attentions = [spec.layers[layer].attention for layer in kv_group.layers]
        found = (ATTENTION_LAYERS[type(each)].group(each, rank, tp_size) for each in attentions)
        groups.append(list(dict.fromkeys(found)))
    return groups


def attention_needs(
    spec: DecoderSpec, tp_size: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> AttentionNeeds:
    """What a rank's attention backend is chosen by."""
    return AttentionNeeds(tuple(dict.fromkeys(spec.attentions())), tp_size, block_size, dtype, device)


class Decoder:
    """One rank's share of a model. Use it under `torch.inference_mode()`."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: WeightSource,
        tp: TensorParallel,
        backend: AttentionBackend,
        dtype: torch.dtype,
        device: torch.device,
    ):
        width = spec.hidden_size
        outer = spec.embedding_size or width
        self.spec = spec
        self._embedding = VocabEmbedding(weights, "embedding", spec.vocab_size, outer, tp)
        self._project_in = self._project_out = None
        if outer != width:
            self._project_in = weights.linear([Outputs("project_in", width)], outer)
            self._project_out = weights.linear([Outputs("project_out", outer)], width)
        self._embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype).item()
        self._positions = None
        if spec.positions is not None:
            table = spec.positions
            self._positions = LearnedPositions(weights, "positions", table.num_positions, table.offset, width)
        self._layers = make_in_parallel(
            partial(DecoderLayer, weights, i, layer, width, tp, backend) for i, layer in enumerate(spec.layers)
        )
        self._kv_group_of = [group for group, _ in group_and_part(kv_groups(spec))]
        self._final_norm = None
        if spec.final_norm is not None:
            self._final_norm = make_norm(weights, "final_norm", spec.final_norm, width)
        head = self._head_linear(weights, tp)
        self._head = OutputHead(head, spec.vocab_size, tp, spec.logits_scale, spec.logits_soft_cap)
        ropes = list(dict.fromkeys(attention.rope for attention in spec.attentions()))
        self._ropes = [None if rope is None else RotaryEmbedding(rope, dtype, device) for rope in ropes]
        self._rope_of_layer = [ropes.index(attention.rope) for attention in spec.attentions()]

    def _head_linear(self, weights: WeightSource, tp: TensorParallel) -> Linear:
        spec = self.spec
        if spec.tied_embeddings:
            return dense_linear(self._embedding.weight_VD)
        part = vocab_part(spec.vocab_size, tp)
        return weights.linear([Outputs("lm_head", spec.vocab_size, part)], spec.embedding_size or spec.hidden_size)

    def forward(self, batch: Batch, kv: list[LayerKV], metadata: list[Any]) -> Tensor:
        """Hidden states after the final norm, `[N, D]`: for `batch.logits_indices_N` only.

        Keys and values of every token of the batch are written to `kv`, one cache a layer; `metadata` is what the
        attention backend prepared for the batch, for each KV group.
        """
        hidden = self._embedding(batch.token_ids_T)
        if self._embedding_scale != 1.0:
            hidden = hidden * self._embedding_scale
        if self._project_in is not None:
            hidden = self._project_in(hidden)
        if self._positions is not None:
            hidden = hidden.add_(self._positions(batch.positions_T))
        rotations = [None if rope is None else rope(batch.positions_T, batch.beyond_T) for rope in self._ropes]
        last = len(self._layers) - 1
        for index, (layer, rope_index) in enumerate(zip(self._layers, self._rope_of_layer, strict=True)):
            keep_N = batch.logits_indices_N if index == last else None
            hidden = layer(hidden, kv[index], metadata[self._kv_group_of[index]], rotations[rope_index], keep_N)
        return hidden if self._final_norm is None else self._final_norm(hidden)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """`[N, V]` float32, the same bits on every rank."""
        return self._head(hidden_ND if self._project_out is None else self._project_out(hidden_ND))
