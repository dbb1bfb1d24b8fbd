"""How many parameters a rank holds, from a model's spec alone. Plain Python: known before any process starts."""

from __future__ import annotations

from rayllm.layout import ParallelLayout
from rayllm.spec import (
    DecoderSpec,
    GroupedAttentionSpec,
    LatentAttentionSpec,
    LayerSpec,
    MlpSpec,
    NormSpec,
    OpaqueSpec,
    RouterSpec,
    SparseMlpSpec,
)


def num_parameters(spec: DecoderSpec, layout: ParallelLayout) -> int:
    """Numbers in the weights of the model's largest rank, as they stand in its memory."""
    if spec.transformers is not None and spec.transformers.num_parameters:
        return -(-spec.transformers.num_parameters // layout.tp)
    width, outer = spec.hidden_size, spec.embedding_size or spec.hidden_size
    vocab = -(-spec.vocab_size // layout.tp) * outer
    total = vocab if spec.tied_embeddings else 2 * vocab
    if outer != width:
        total += 2 * outer * width
    if spec.positions is not None:
        total += (spec.positions.num_positions + spec.positions.offset) * width
    total += _norm(spec.final_norm, width)
    counted: dict[LayerSpec, int] = {}
    for layer in spec.layers:
        if layer not in counted:
            counted[layer] = _layer(layer, width, layout)
        total += counted[layer]
    return total


def _layer(spec: LayerSpec, width: int, layout: ParallelLayout) -> int:
    num_norms = {"input": 1 if spec.shares_norm else 2, "input_and_output": 4}.get(spec.norm_placement, 2)
    attention, feed_forward = spec.attention, spec.feed_forward
    total = num_norms * _norm(spec.norm, width)
    if isinstance(attention, LatentAttentionSpec):
        total += _latent_attention(attention, width, layout)
    else:
        total += _grouped_attention(attention, width, layout)
    if isinstance(feed_forward, OpaqueSpec):
        return total + 3 * feed_forward.inner_width * width // layout.tp  # as of a gated layer
    if isinstance(feed_forward, SparseMlpSpec):
        return total + _sparse_mlp(feed_forward, width, layout)
    return total + _mlp(feed_forward, width, layout)


def _norm(spec: NormSpec | None, width: int) -> int:
    if spec is None:
        return 0
    return width if spec.kind == "rms" else 2 * width


def _grouped_attention(spec: GroupedAttentionSpec, width: int, layout: ParallelLayout) -> int:
    heads, kv_heads = spec.num_heads // layout.tp, spec.kv_shape(layout.tp)[0]
    qkv = (heads + 2 * kv_heads) * spec.head_dim
    total = qkv * (width + spec.qkv_bias) + (heads * spec.head_dim + spec.out_bias) * width
    if spec.qk_norm is not None:
        total += 2 * _norm(spec.qk_norm, spec.head_dim)
    return total + (heads if spec.has_sinks else 0)


def _latent_attention(spec: LatentAttentionSpec, width: int, layout: ParallelLayout) -> int:
    heads, to_latents = spec.num_heads // layout.tp, spec.kv_dim + (spec.q_latent_dim or 0)
    total = to_latents * (width + spec.latent_bias) + _norm(spec.norm, spec.latent_dim)
    if spec.q_latent_dim is not None:
        total += _norm(spec.norm, spec.q_latent_dim)
    queries = heads * spec.qk_dim * (spec.q_latent_dim or width)
    keys_and_values = heads * (spec.nope_dim + spec.value_dim) * spec.latent_dim
    return total + queries + keys_and_values + (heads * spec.value_dim + spec.out_bias) * width


def _mlp(spec: MlpSpec, width: int, layout: ParallelLayout) -> int:
    inner = spec.intermediate_size // layout.tp
    num_inputs = 2 if spec.gated else 1
    return num_inputs * inner * (width + spec.bias) + (inner + spec.bias) * width


def _sparse_mlp(spec: SparseMlpSpec, width: int, layout: ParallelLayout) -> int:
    num_experts, expert = spec.router.num_experts, spec.expert
    if layout.expert_parallel:
        held, inner = num_experts // layout.tp, expert.intermediate_size
    else:
        held, inner = num_experts, expert.intermediate_size // layout.tp
    total = held * (2 * inner * (width + expert.bias) + (inner + expert.bias) * width)
    total += _router(spec.router, width) + (width if spec.shared_gate else 0)
    return total if spec.shared is None else total + _mlp(spec.shared, width, layout)


def _router(spec: RouterSpec, width: int) -> int:
    return spec.num_experts * (width + spec.bias + spec.has_choice_bias)
