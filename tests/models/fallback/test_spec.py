"""What config.json says of a model that `transformers` computes, and why some cannot be served."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from foreign import WINDOW, foreign_config
from transformers import CONFIG_MAPPING

from rayllm.errors import ConfigError
from rayllm.layout import ParallelLayout
from rayllm.models.registry import spec_of
from rayllm.models.split import check_split
from rayllm.spec import GroupedAttentionSpec

OWN_CODE = {
    "architectures": ["AquilaForCausalLM"],
    "model_type": "aquila",
    "auto_map": {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"},
    "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64, "torch_dtype": "bfloat16",
}  # fmt: skip


def config_of(model_type: str, architecture: str, **fields: Any) -> dict[str, Any]:
    return {**foreign_config(model_type, **fields).to_dict(), "architectures": [architecture]}


def test_a_config_is_read_by_its_class_with_the_class_defaults() -> None:
    spec = spec_of({"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "num_hidden_layers": 2})
    assert spec.architecture == "Olmo2ForCausalLM"
    assert (spec.hidden_size, spec.vocab_size, spec.max_model_len, spec.num_layers) == (4096, 50304, 2048, 2)
    assert spec.layers[0].attention == GroupedAttentionSpec(32, 32, 128, 128**-0.5)
    assert spec.transformers is not None
    embeddings, attention, mlp = 2 * 50304 * 4096, 4 * 4096**2, 3 * 4096 * 11008
    assert spec.transformers.num_parameters == embeddings + 2 * (attention + mlp + 4 * 4096) + 4096
    assert spec.notes() == [
        "Olmo2ForCausalLM runs through transformers with RayLLM's attention: slower than a native model"
    ]


def test_windows_are_those_of_the_layers_kinds() -> None:
    spec = spec_of(config_of("cohere2", "Cohere2ForCausalLM", **WINDOW))
    assert [layer.attention.window for layer in spec.layers] == [7, None, 7]
    spec = spec_of(config_of("starcoder2", "Starcoder2ForCausalLM", sliding_window=5))
    assert [layer.attention.window for layer in spec.layers] == [5, 5]


def test_latent_attention_is_planned_as_it_is_computed_expanded() -> None:
    fields = {"kv_lora_rank": 32, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    spec = spec_of(config_of("minicpm3", "MiniCPM3ForCausalLM", num_key_value_heads=4, **fields))
    assert spec.layers[0].attention == GroupedAttentionSpec(4, 4, 24, 24**-0.5)


def test_a_class_whose_layers_differ_is_read_layer_by_layer() -> None:
    fields = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
    config = config_of("gemma4_text", "Gemma4ForCausalLM", global_head_dim=32, **fields)
    assert [layer.attention.head_dim for layer in spec_of(config).layers] == [16, 32]


def test_a_context_ends_where_frequencies_would_depend_on_other_sequences() -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    config = config_of("olmo2", "Olmo2ForCausalLM", rope_parameters=rope)
    assert spec_of(config).max_model_len == 32


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "message"),
    [
        ("mamba", "MambaForCausalLM", {}, "keep a state"),
        ("bamba", "BambaForCausalLM", {"time_step_limit": [0.0, {"__float__": "Infinity"}]}, "keep a state"),
        ("rwkv", "RwkvForCausalLM", {}, "keep a state"),
        ("qwen3_next", "Qwen3NextForCausalLM", {}, "keep a state"),
        ("t5", "T5ForConditionalGeneration", {}, "encoder-decoder"),
        ("bart", "BartForCausalLM", {}, "encoder-decoder"),
        ("bert", "BertLMHeadModel", {}, "is_decoder=false: an encoder"),
        ("bert", "BertModel", {}, "is_decoder=false: an encoder"),
        ("vit", "ViTModel", {}, "model_type='vit' has no causal language model"),
        ("bloom", "BloomForCausalLM", {}, "does not call attention through AttentionInterface"),
        ("lfm2", "Lfm2ForCausalLM", {"layer_types": ["conv", "full_attention"]}, "layer_types has 'conv'"),
        ("emu3", "Emu3ForConditionalGeneration", {}, "reads more than text"),
        ("llama", "LlamaModel", {}, "the causal language model of model_type='llama' is LlamaForCausalLM"),
        ("olmo2", "Olmo2Model", {}, "the causal language model of model_type='olmo2' is Olmo2ForCausalLM"),
    ],
)  # fmt: skip
def test_what_cannot_be_served_is_refused_with_the_reason_and_what_to_do(
    model_type: str, architecture: str, fields: dict[str, Any], message: str
) -> None:
    config = {"architectures": [architecture], "model_type": model_type, "num_hidden_layers": 2, **fields}
    with pytest.raises(ConfigError, match=f"{architecture}' cannot be served: .*{message}.*Serve a decoder") as caught:
        spec_of(config)
    assert "\n" not in str(caught.value)


def test_a_config_that_its_class_refuses_is_one_line() -> None:
    with pytest.raises(ConfigError, match="transformers cannot read the config of Olmo2ForCausalLM: ") as caught:
        spec_of({"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "hidden_size": "wide"})
    assert "\n" not in str(caught.value)


def test_only_a_native_model_is_taken_where_that_is_asked() -> None:
    with pytest.raises(ConfigError, match="no implementation of 'Olmo2ForCausalLM' of its own"):
        spec_of(config_of("olmo2", "Olmo2ForCausalLM"), "native")


def test_a_checkpoints_own_code_needs_leave_and_is_not_run_to_read_its_config() -> None:
    with pytest.raises(ConfigError, match=r"Python code \(configuration_x.py, modeling_x.py\).*trust_remote_code"):
        spec_of(OWN_CODE)
    spec = spec_of(OWN_CODE, trust_remote_code=True)
    assert (spec.hidden_size, spec.num_layers, spec.max_model_len, spec.dtype) == (64, 2, 64, "bfloat16")
    assert spec.layers[0].attention == GroupedAttentionSpec(4, 4, 16, 0.25)
    assert spec.runs_code
    assert "configuration_x.py, modeling_x.py" in spec.notes()[0]
    assert "modeling_x" not in sys.modules


def test_own_code_of_a_model_that_transformers_has_is_not_run() -> None:
    config = {**config_of("olmo2", "Olmo2ForCausalLM"), "auto_map": OWN_CODE["auto_map"]}
    assert not spec_of(config, trust_remote_code=True).runs_code


def test_own_code_with_a_silent_config_is_refused_by_field() -> None:
    config = {name: value for name, value in OWN_CODE.items() if name != "n_embd"}
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        spec_of(config, trust_remote_code=True)
    elsewhere = {**OWN_CODE, "auto_map": {"AutoModelForCausalLM": "other/repo--modeling_x.XForCausalLM"}}
    with pytest.raises(ConfigError, match="code of another repository"):
        spec_of(elsewhere, trust_remote_code=True)


@pytest.mark.parametrize(
    ("model_type", "architecture", "fields", "layout", "message"),
    [
        ("ctrl", "CTRLLMHeadModel", {}, ParallelLayout(tp=2), "no tensor-parallel plan for it.*-tp 1"),
        ("olmo2", "Olmo2ForCausalLM", {"num_key_value_heads": 1}, ParallelLayout(tp=2), "num_key_value_heads=1"),
        ("olmo2", "Olmo2ForCausalLM", {}, ParallelLayout(tp=2, expert_parallel=True), "enable_expert_parallel"),
    ],
)
def test_what_cannot_be_split_is_refused(
    model_type: str, architecture: str, fields: dict[str, Any], layout: ParallelLayout, message: str
) -> None:
    spec = spec_of(config_of(model_type, architecture, **fields))
    check_split(spec, ParallelLayout(tp=1))
    with pytest.raises(ConfigError, match=message):
        check_split(spec, layout)


def test_a_word_that_is_not_known_is_refused_by_name() -> None:
    config = config_of("olmo2", "Olmo2ForCausalLM")
    plan = CONFIG_MAPPING["olmo2"].base_model_tp_plan
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(plan, "layers.*.mlp.down_proj", "sequence_parallel")
        spec = spec_of(config)
    with pytest.raises(ConfigError, match="its tensor-parallel plan has 'sequence_parallel' for layers"):
        check_split(spec, ParallelLayout(tp=2))
