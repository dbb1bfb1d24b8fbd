"""The only decoder. What distinguishes one model from another is in its spec; no model's name is known here.

Shape letters: T tokens of the step, N positions whose logits are wanted, D hidden width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.layers.attention import Attention, AttentionPlan, Workspace
from rayllm.layers.batch import Batch, LayerKV
from rayllm.layers.embedding import LearnedPositions, OutputHead, VocabEmbedding, vocab_part
from rayllm.layers.mlp import Mlp
from rayllm.layers.norm import NORMS, Norm
from rayllm.layers.rope import RotaryEmbedding
from rayllm.layers.spec import NormSpec, RopeSpec
from rayllm.models.spec import DecoderSpec, LayerSpec
from rayllm.weights.source import WeightSource


def check_split(spec: DecoderSpec, tp_size: int) -> None:
    """`ConfigError` where the model's heads or feed-forward width cannot be split over `tp_size` ranks."""
    for layer in spec.layers:
        heads, kv_heads = layer.attention.num_heads, layer.attention.num_kv_heads
        inner = layer.mlp.intermediate_size
        if heads % tp_size or inner % tp_size or (kv_heads % tp_size and tp_size % kv_heads):
            raise ConfigError(
                f"tensor_parallel_size={tp_size} cannot split a model with num_attention_heads={heads}, "
                f"num_key_value_heads={kv_heads}, intermediate_size={inner}; it must divide the first and the last, "
                f"and divide the second or be a multiple of it"
            )


def kv_bytes_per_block(spec: DecoderSpec, tp_size: int, block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one KV block takes on one rank, all layers together."""
    check_split(spec, tp_size)
    return sum(
        2 * max(1, layer.attention.num_kv_heads // tp_size) * block_size * layer.attention.head_dim * dtype.itemsize
        for layer in spec.layers
    )


class DecoderLayer:
    """Attention and feed-forward, each with its norm (before, or after the residual sum) and residual."""

    def __init__(self, weights: WeightSource, index: int, spec: LayerSpec, width: int, tp: TensorParallel):
        prefix = f"layers.{index}"
        self.attention = Attention(weights, prefix, spec.attention, width, tp)
        self._attention_norm = make_norm(weights, f"{prefix}.attention_norm", spec.norm, width)
        self._mlp_norm = make_norm(weights, f"{prefix}.mlp_norm", spec.norm, width)
        self._mlp = Mlp(weights, prefix, spec.mlp, width, tp)
        self._norm_first = spec.norm_first

    def __call__(
        self,
        hidden_TD: Tensor,
        kv: LayerKV,
        plan: AttentionPlan,
        rotation: tuple[Tensor, Tensor] | None,
        keep_N: Tensor | None,
    ) -> Tensor:
        if self._norm_first:
            normed_TD = self._attention_norm(hidden_TD)
            hidden_TD = self.attention(normed_TD, hidden_TD, kv, plan, rotation, keep_N)
            return self._mlp(self._mlp_norm(hidden_TD), hidden_TD)
        hidden_TD = self._attention_norm(self.attention(hidden_TD, hidden_TD, kv, plan, rotation, keep_N))
        return self._mlp_norm(self._mlp(hidden_TD, hidden_TD))


def make_norm(weights: WeightSource, name: str, spec: NormSpec, width: int) -> Norm:
    return NORMS[spec.kind](weights, name, width, spec.eps)


class Decoder:
    """One rank's share of a model. Use it under `torch.inference_mode()`."""

    def __init__(
        self,
        spec: DecoderSpec,
        weights: WeightSource,
        tp: TensorParallel,
        dtype: torch.dtype,
        device: torch.device,
    ):
        check_split(spec, tp.size)
        width = spec.hidden_size
        self.spec = spec
        self.head_dim = spec.head_dim
        self._dtype = dtype
        self._tp = tp
        self._embedding = VocabEmbedding(weights, "embedding", spec.vocab_size, width, tp)
        self._positions = None
        if spec.positions is not None:
            table = spec.positions
            self._positions = LearnedPositions(weights, "positions", table.num_positions, table.offset, width)
        self._layers = [DecoderLayer(weights, i, layer, width, tp) for i, layer in enumerate(spec.layers)]
        self._final_norm = None
        if spec.final_norm is not None:
            self._final_norm = make_norm(weights, "final_norm", spec.final_norm, width)
        if spec.tied_embeddings:
            head_VD = self._embedding.weight_VD
        else:
            part = vocab_part(spec.vocab_size, tp)
            head_VD = weights.tensor("lm_head.weight", (spec.vocab_size, width), part=part)
        self._head = OutputHead(head_VD, spec.vocab_size, tp)
        ropes = {layer.attention.rope for layer in spec.layers}
        self._ropes = {rope: RotaryEmbedding(rope, dtype, device) for rope in ropes if rope is not None}
        self._windows = {layer.attention.window for layer in spec.layers}
        self._workspaces = {window: Workspace(dtype, device) for window in self._windows}

    @property
    def num_local_kv_heads(self) -> int:
        """Key/value heads that this rank holds: what a layer's KV pool has."""
        return self._layers[0].attention.num_kv_heads

    @property
    def widest(self) -> int:
        """Elements of a token's widest activation on this rank: what a step needs beside weights and KV, roughly."""
        tp_size = self._tp.size
        inner = max(layer.mlp.intermediate_size * (2 if layer.mlp.gated else 1) for layer in self.spec.layers)
        heads = self.spec.num_heads + 2 * self.spec.num_kv_heads
        return max(self.spec.hidden_size, inner // tp_size, heads * self.head_dim // tp_size)

    def forward(self, batch: Batch, kv: list[LayerKV]) -> Tensor:
        """Hidden states after the final norm, `[N, D]`: for `batch.logits_indices_N` only.

        Keys and values of every token of the batch are written to `kv`, one pool a layer.
        """
        hidden = self._embedding(batch.token_ids_T)
        if self._positions is not None:
            hidden = hidden.add_(self._positions(batch.positions_T))
        rotations: dict[RopeSpec | None, tuple[Tensor, Tensor] | None] = {None: None}
        for spec, rope in self._ropes.items():
            rotations[spec] = rope(batch.positions_T)
        plans = {window: self._plan(batch, window) for window in self._windows}
        last = len(self._layers) - 1
        for index, layer in enumerate(self._layers):
            attention = layer.attention.spec
            keep_N = batch.logits_indices_N if index == last else None
            hidden = layer(hidden, kv[index], plans[attention.window], rotations[attention.rope], keep_N)
        return hidden if self._final_norm is None else self._final_norm(hidden)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """`[N, V]` float32, the same bits on every rank."""
        return self._head(hidden_ND)

    def _plan(self, batch: Batch, window: int | None) -> AttentionPlan:
        return AttentionPlan.build(
            batch, self.num_local_kv_heads, self.head_dim, self._dtype, self._workspaces[window], window
        )
