"""An architecture from outside the package: GPT-NeoX, with queries, keys and values of each head fused into one tensor,
rotary positions on a part of each head, and attention and feed-forward in parallel."""

from rayllm.models.config_fields import ConfigFields, read_activation, read_dtype, read_rope
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec
from rayllm.weights.stored import interleaved_rows

MODEL_TYPES = ("gpt_neox",)
_LAYER = "gpt_neox.layers.{}"


def spec(config):
    fields = ConfigFields(config)
    width, heads = fields.integer("hidden_size", 1, 2**20), fields.integer("num_attention_heads", 1, 4096)
    positions = fields.integer("max_position_embeddings", 1, 2**27)
    rope = read_rope(fields, width // heads, positions)
    attention = GroupedAttentionSpec(heads, heads, width // heads, (width // heads) ** -0.5, True, True, rope)
    mlp = MlpSpec(fields.integer("intermediate_size", 1, 2**20), read_activation(fields, "hidden_act"), False, True)
    norm = NormSpec("layer", fields.number("layer_norm_eps", 0, 1))
    layer = LayerSpec(attention, mlp, norm, parallel=fields.flag("use_parallel_residual", True))
    layers = (layer,) * fields.integer("num_hidden_layers", 1, 1024)
    vocab_size = fields.integer("vocab_size", 1, 2**24)
    name = "GPTNeoXForCausalLM"
    return DecoderSpec(name, read_dtype(fields), vocab_size, width, layers, norm, False, positions)


def names(spec):
    attention = spec.layers[0].attention
    fused = f"{_LAYER}.attention.query_key_value"
    qkv = interleaved_rows(fused, attention.num_heads, *[attention.head_dim] * 3)
    modules = {f"layers.{name}": rows for name, rows in zip("qkv", qkv)}
    modules |= {"embedding": "gpt_neox.embed_in", "lm_head": "embed_out", "final_norm": "gpt_neox.final_layer_norm"}
    modules |= {"layers.out": f"{_LAYER}.attention.dense", "layers.attention_norm": f"{_LAYER}.input_layernorm"}
    modules |= {"layers.up": f"{_LAYER}.mlp.dense_h_to_4h", "layers.mlp_norm": f"{_LAYER}.post_attention_layernorm"}
    return modules | {"layers.down": f"{_LAYER}.mlp.dense_4h_to_h"}
