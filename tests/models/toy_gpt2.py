"""GPT-2: matrices stored as [inputs, outputs], the fused one cut by columns; learned positions; tied embeddings."""

from rayllm.models.config_fields import ConfigFields
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec, PositionsSpec
from rayllm.weights.stored import Rows, Tensor, Transposed

MODEL_TYPES = ("gpt2",)


def spec(config):
    fields = ConfigFields(config)
    width, heads = fields.integer("n_embd", 1, 2**20), fields.integer("n_head", 1, 4096)
    attention = GroupedAttentionSpec(heads, heads, width // heads, (width // heads) ** -0.5, True, True)
    norm = NormSpec("layer", fields.number("layer_norm_epsilon", 0, 1))
    layer = LayerSpec(attention, MlpSpec(4 * width, "gelu_tanh", gated=False, bias=True), norm)
    positions = PositionsSpec(fields.integer("n_positions", 1, 2**20), offset=0)
    layers = (layer,) * fields.integer("n_layer", 1, 1024)
    vocab_size = fields.integer("vocab_size", 1, 2**24)
    max_len = positions.num_positions
    return DecoderSpec("GPT2LMHeadModel", "float32", vocab_size, width, layers, norm, True, max_len, positions)


def names(spec):
    width, layer = spec.hidden_size, "transformer.h.{}"
    fused = Transposed(Tensor(f"{layer}.attn.c_attn"))
    modules = {
        f"layers.{name}": Rows(fused, (range(i * width, (i + 1) * width),), 3 * width) for i, name in enumerate("qkv")
    }
    for name, stored in {"out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}.items():
        modules[f"layers.{name}"] = Transposed(Tensor(f"{layer}.{stored}"))
    modules |= {"layers.attention_norm": f"{layer}.ln_1", "layers.mlp_norm": f"{layer}.ln_2"}
    return modules | {
        "embedding": "transformer.wte",
        "positions": "transformer.wpe",
        "final_norm": "transformer.ln_f",
    }
