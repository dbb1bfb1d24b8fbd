"""What a model is made of, as plain data: a difference between models is a field here. A resolved config carries it to
every process of an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class NormSpec:
    """Root-mean-square norm, or layer norm with a bias."""

    kind: Literal["rms", "layer"]
    eps: float
    zero_centered: bool = False
    """The stored weight is the factor minus one; factor and product are in float32 (Gemma)."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` channels of each head."""

    theta: float
    rotary_dim: int
    scaling: Literal["default", "linear", "llama3", "yarn", "longrope", "proportional"] = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    """Context of pretraining (llama3, yarn, longrope)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Multiplies cosine and sine."""
    in_pairs: bool = False
    """Neighbouring channels turn together, else those half the width apart."""
    num_turning_pairs: int = 0
    """Pairs of channels that turn (proportional); the others have frequency 0."""
    pair_factors: tuple[float, ...] = ()
    """What divides each pair's frequency (longrope)."""
    beyond: RopeSpec | None = None
    """The embedding of all tokens of a sequence longer than `original_max_positions` (longrope); `rayllm.layers.rope`
    says what that means for cached keys."""


@dataclass(frozen=True, slots=True)
class PositionsSpec:
    """A learned vector for each position; position p is row p + offset of a table of `num_positions + offset`."""

    num_positions: int
    offset: int


class SplitSize(NamedTuple):
    """A number that tensor parallelism divides."""

    field: str
    """Its name in config.json."""
    size: int
    may_repeat: bool = False
    """Where ranks are a multiple of it, neighbouring ranks hold the same one."""

    def allows(self, tp_size: int) -> bool:
        return self.size % tp_size == 0 or (self.may_repeat and tp_size % self.size == 0)


@dataclass(frozen=True, slots=True)
class GroupedAttentionSpec:
    """Attention with keys and values of their own for each group of query heads; `num_kv_heads` = `num_heads` is
    multi-head attention, 1 is multi-query attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    rope: RopeSpec | None = None
    qk_norm: NormSpec | None = None
    """Applied to each head of queries and keys, before the rotation."""
    window: int | None = None
    """A token attends to itself and the `window - 1` tokens before it; None: to all before it."""
    soft_cap: float | None = None
    """Scores become c * tanh(score / c)."""
    has_sinks: bool = False
    """Each head has one more score in its softmax, a parameter, that takes weight and gives no value."""
    alibi_slopes: tuple[float, ...] = ()
    """One for each head, where positions enter by ALiBi."""
    kind: Literal["grouped"] = "grouped"

    def kv_shape(self, tp_size: int) -> tuple[int, tuple[int, ...]]:
        """What a rank keeps of a token: for each of (first) heads, a vector of each width of (second)."""
        return max(1, self.num_kv_heads // tp_size), (self.head_dim, self.head_dim)

    def activation_width(self, tp_size: int) -> int:
        """Elements of a token's queries, keys and values on a rank, roughly."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim // tp_size

    def split_sizes(self) -> tuple[SplitSize, ...]:
        return (
            SplitSize("num_attention_heads", self.num_heads),
            SplitSize("num_key_value_heads", self.num_kv_heads, may_repeat=True),
        )


@dataclass(frozen=True, slots=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-V2, 2024): the keys and values of all heads are products of one latent
    vector a token, which is what the cache holds, beside one rotated key that all heads share."""

    num_heads: int
    nope_dim: int
    """Channels of a head's queries and keys that are not rotated; keys get theirs from the latent."""
    value_dim: int
    latent_dim: int
    """Width of the latent."""
    scale: float
    norm: NormSpec
    """Of the latent, and of the queries' latent."""
    rope: RopeSpec
    """Of the channels that are rotated, `rope.rotary_dim` of them: of each head's queries, and the shared key."""
    q_latent_dim: int | None = None
    """Queries, too, are products of a latent of this width; None: of the layer's input."""
    latent_bias: bool = False
    """Of the projections to latents."""
    out_bias: bool = False
    kind: Literal["latent"] = "latent"

    @property
    def window(self) -> None:
        """A token attends to all before it."""

    @property
    def qk_dim(self) -> int:
        """Channels of a head's queries and keys."""
        return self.nope_dim + self.rope.rotary_dim

    @property
    def kv_dim(self) -> int:
        """What is kept of a token: its latent and the shared key."""
        return self.latent_dim + self.rope.rotary_dim

    def kv_shape(self, tp_size: int) -> tuple[int, tuple[int, ...]]:
        """See `GroupedAttentionSpec.kv_shape`; every rank keeps the same."""
        return 1, (self.kv_dim,)

    def activation_width(self, tp_size: int) -> int:
        """Elements of a token's queries, as projected and in the latent space, and its sums of latents, on a rank."""
        return self.num_heads * (self.qk_dim + self.kv_dim + self.latent_dim) // tp_size

    def split_sizes(self) -> tuple[SplitSize, ...]:
        return (SplitSize("num_attention_heads", self.num_heads),)


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """A dense feed-forward layer."""

    intermediate_size: int
    activation: Activation
    gated: bool
    """activation(gate) * up, else activation(up)."""
    bias: bool = False
    kind: Literal["dense"] = "dense"

    def activation_width(self, hidden_size: int, tp_size: int) -> int:
        """Elements of a token's inner activations on a rank, roughly."""
        return self.intermediate_size * (2 if self.gated else 1) // tp_size

    def split_sizes(self, expert_parallel: bool) -> tuple[SplitSize, ...]:
        return (SplitSize("intermediate_size", self.intermediate_size),)


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """Chooses `top_k` of `num_experts` for each token, by a product with the layer's input.

    The order of its steps: logits, scores, groups, choice, renormalization, scale. Softmax over the chosen experts
    alone is the same as softmax over all of them, renormalized.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"]
    renormalize: bool
    """The chosen experts' scores are divided by their sum."""
    scale: float = 1.0
    """Multiplies them after that."""
    num_groups: int = 1
    """Experts form groups of neighbours, of which the best `top_groups` take part in the choice."""
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    """What ranks the groups: the largest score of one (DeepSeek-V2), or the sum of its two largest (DeepSeek-V3)."""
    bias: bool = False
    """Added to the logits."""
    has_choice_bias: bool = False
    """A parameter added to the scores for the choice of groups and experts, not to the scores that weigh them."""
    float32: bool = False
    """The product is computed in float32, whatever the model's dtype."""


@dataclass(frozen=True, slots=True)
class ClampedSwiglu:
    """(up + 1) * gate * sigmoid(alpha * gate); gate is at most `limit` before that, up within +-`limit` (gpt-oss)."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """One of a sparse layer's experts: down(activation(gate(x)) * up(x))."""

    intermediate_size: int
    activation: Activation | ClampedSwiglu
    bias: bool = False


@dataclass(frozen=True, slots=True)
class SparseMlpSpec:
    """A mixture of experts: each token's sum over the experts that the router chooses, weighed by their scores."""

    router: RouterSpec
    expert: ExpertSpec
    shared: MlpSpec | None = None
    """A dense layer that every token takes as well; several shared experts are one of their joint width."""
    shared_gate: bool = False
    """The shared layer's output is multiplied by sigmoid(w @ x)."""
    scores_weigh_inputs: bool = False
    """A score multiplies the expert's input instead of its output (Llama 4)."""
    kind: Literal["sparse"] = "sparse"

    def activation_width(self, hidden_size: int, tp_size: int) -> int:
        """Elements of a token's widest activation on a rank: a row for each expert that it takes. They may all be on
        one rank, and whole (expert parallelism), so the number of ranks does not matter."""
        return self.router.top_k * max(2 * self.expert.intermediate_size, hidden_size)

    def split_sizes(self, expert_parallel: bool) -> tuple[SplitSize, ...]:
        split = SplitSize("intermediate_size of an expert", self.expert.intermediate_size)
        whole = SplitSize("number of experts", self.router.num_experts)
        shared = self.shared.split_sizes(expert_parallel) if self.shared is not None else ()
        return (whole if expert_parallel else split, *shared)


@dataclass(frozen=True, slots=True)
class OpaqueSpec:
    """A feed-forward layer of which only the width is known: `transformers` computes it."""

    inner_width: int
    kind: Literal["opaque"] = "opaque"

    def activation_width(self, hidden_size: int, tp_size: int) -> int:
        """Elements of a token's inner activations on a rank, at most."""
        return 2 * self.inner_width

    def split_sizes(self, expert_parallel: bool) -> tuple[SplitSize, ...]:
        """None: the model's own plan says what is split, and its modules whether that can be done."""
        return ()


AttentionSpec = GroupedAttentionSpec | LatentAttentionSpec
"""The union of all kinds of attention; `rayllm.layers.attention` has the layer of each. By their `kind` they are told
apart when a resolved config comes as JSON."""
FeedForwardSpec = MlpSpec | SparseMlpSpec | OpaqueSpec
"""The union of all kinds of feed-forward layers; `rayllm.models.layer` has the layer of each."""

NormPlacement = Literal["input", "sum", "output", "input_and_output"]
"""Where norms stand for both attention and feed-forward: on the input of each (Llama), on the residual sum after each
(the original Transformer), on the output of each before it is added (OLMo 2), or on input and output (Gemma 2)."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    attention: AttentionSpec
    feed_forward: FeedForwardSpec
    norm: NormSpec
    norm_placement: NormPlacement = "input"
    parallel: bool = False
    """Attention and feed-forward both read the layer's input, and both are added to it (GPT-J, GPT-NeoX)."""
    shares_norm: bool = False
    """Of a parallel layer: one norm serves both."""
    residual_scale: float = 1.0
    """Outputs of attention and feed-forward are multiplied by it before they are added."""


@dataclass(frozen=True, slots=True)
class TransformersSpec:
    """What makes a model that RayLLM has no decoder for: its class in `transformers`."""

    config: str
    """config.json, as text."""
    code_files: tuple[str, ...] = ()
    """Python files of the checkpoint that workers run as the model, where the user trusts them."""
    unsplittable: str = ""
    """Why tensor parallelism cannot split it; empty where it can."""
    num_parameters: int = 0
    """Numbers in its weights; 0 where its code would have to run to tell."""


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A whole model."""

    architecture: str
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the checkpoint."""
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    tied_embeddings: bool
    max_model_len: int
    """Tokens of context the model is made for."""
    embedding_size: int | None = None
    """Width of token embeddings and of what the output head reads; where it is not `hidden_size` (None), a projection
    stands before the first layer and one after the last."""
    positions: PositionsSpec | None = None
    embedding_scale: float = 1.0
    """Token embeddings are multiplied by it, rounded to their dtype."""
    logits_scale: float = 1.0
    logits_soft_cap: float | None = None
    """Logits become c * tanh(logit / c)."""
    transformers: TransformersSpec | None = None
    """Where `transformers` computes the model; of the layers' specs, heads, widths and windows then hold."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def runs_code(self) -> bool:
        """Whether the model is Python code of its checkpoint."""
        return self.transformers is not None and bool(self.transformers.code_files)

    def notes(self) -> list[str]:
        """What a user should know of how the model is computed, a line each."""
        if self.transformers is None:
            return []
        if self.runs_code:
            files = ", ".join(self.transformers.code_files)
            return [f"{self.architecture}: the workers run Python files of the checkpoint (trust_remote_code): {files}"]
        return [f"{self.architecture} runs through transformers with RayLLM's attention: slower than a native model"]

    def attentions(self) -> Iterator[AttentionSpec]:
        """Each layer's."""
        return (layer.attention for layer in self.layers)

    @property
    def rope_boundary(self) -> int | None:
        """Tokens up to which a sequence's keys are rotated by the layers' `RopeSpec`s, and beyond which by what these
        name as `beyond`; None where the length of a sequence changes nothing. One for all layers."""
        return next(iter(self.rope_boundaries()), None)

    def rope_boundaries(self) -> set[int]:
        """`rope_boundary` of each layer that has one."""
        ropes = (attention.rope for attention in self.attentions())
        return {rope.original_max_positions for rope in ropes if rope is not None and rope.beyond is not None}

    def max_activation_width(self, tp_size: int) -> int:
        """Elements of a token's widest activation on a rank: what a step needs beside weights and KV, roughly."""
        layers = (
            max(
                layer.attention.activation_width(tp_size),
                layer.feed_forward.activation_width(self.hidden_size, tp_size),
            )
            for layer in self.layers
        )
        return max(self.hidden_size, *layers)
