"""An architecture from outside the package: Falcon-7B, with queries, one key head and one value head fused into one
tensor, and attention and feed-forward in parallel behind one norm."""

from rayllm.models.config_fields import ConfigFields, read_activation, read_dtype, read_rope
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec
from rayllm.weights.stored import split_rows

MODEL_TYPES = ("falcon",)
_LAYER = "transformer.h.{}"


def spec(config):
    fields = ConfigFields(config)
    width, heads = fields.integer("hidden_size", 1, 2**20), fields.integer("num_attention_heads", 1, 4096)
    positions = fields.integer("max_position_embeddings", 1, 2**27, default=2048)
    rope = read_rope(fields, width // heads, positions)
    attention = GroupedAttentionSpec(heads, 1, width // heads, (width // heads) ** -0.5, rope=rope)
    inner = fields.integer("ffn_hidden_size", 1, 2**20, default=4 * width)
    mlp = MlpSpec(inner, read_activation(fields, "activation", default="gelu"), gated=False)
    norm = NormSpec("layer", fields.number("layer_norm_epsilon", 0, 1, default=1e-5))
    layer = LayerSpec(attention, mlp, norm, parallel=True, shares_norm=True)
    layers = (layer,) * fields.integer("num_hidden_layers", 1, 1024)
    vocab_size = fields.integer("vocab_size", 1, 2**24)
    return DecoderSpec("FalconForCausalLM", read_dtype(fields), vocab_size, width, layers, norm, True, positions)


def names(spec):
    width, head_dim = spec.hidden_size, spec.layers[0].attention.head_dim
    qkv = split_rows(f"{_LAYER}.self_attention.query_key_value", width, head_dim, head_dim)
    modules = {f"layers.{name}": rows for name, rows in zip("qkv", qkv)}
    modules |= {"embedding": "transformer.word_embeddings", "final_norm": "transformer.ln_f"}
    modules |= {"layers.out": f"{_LAYER}.self_attention.dense", "layers.attention_norm": f"{_LAYER}.input_layernorm"}
    modules |= {"layers.up": f"{_LAYER}.mlp.dense_h_to_4h", "layers.down": f"{_LAYER}.mlp.dense_4h_to_h"}
    return modules
