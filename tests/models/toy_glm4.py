"""GLM-4-0414: norms on the inputs and the outputs of attention and feed-forward, rotary positions of neighbouring
channels, gate and up fused."""

from dataclasses import replace

from rayllm.models.architectures import llama
from rayllm.weights.stored import split_rows

MODEL_TYPES = ("glm4",)


def spec(config):
    base = llama.spec(config, default_head_dim=128)
    rope = replace(base.layers[0].attention.rope, in_pairs=True)
    layer = llama.with_attention(base.layers[0], rope=rope, out_bias=False)
    layers = (replace(layer, norm_placement="input_and_output"),) * base.num_layers
    return replace(base, architecture="Glm4ForCausalLM", layers=layers)


def names(spec):
    width = spec.layers[0].feed_forward.intermediate_size
    gate, up = split_rows("model.layers.{}.mlp.gate_up_proj", width, width)
    norms = {
        "layers.attention_output_norm": "model.layers.{}.post_self_attn_layernorm",
        "layers.mlp_output_norm": "model.layers.{}.post_mlp_layernorm",
    }
    return {**llama.names(spec), "layers.gate": gate, "layers.up": up, **norms}
