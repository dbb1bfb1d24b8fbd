"""config.json is read into a spec, and every value that cannot be served is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ARCHITECTURES, make_config

from rayllm.errors import ConfigError
from rayllm.layout import ParallelLayout
from rayllm.models.registry import known_architectures, read_spec
from rayllm.models.split import check_split

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "OPTForCausalLM")


def _folder(path: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A folder with only a config.json; a change to `...` removes the field."""
    names = dict(zip(("llama", "mistral", "qwen2", "qwen3", "opt"), CLASSES, strict=True))
    config = json.loads(make_config(architecture).to_json_string(use_diff=False))
    config = {**config, "architectures": [names[architecture]], **changes}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_of_transformers_is_read(architecture: str, tmp_path: Path) -> None:
    spec = read_spec(_folder(tmp_path, architecture))
    assert spec.architecture in known_architectures()
    assert (spec.num_layers, spec.hidden_size, spec.vocab_size, spec.max_model_len) == (2, 64, 288, 512)
    assert spec.layers[0].attention.head_dim == (32 if architecture == "qwen3" else 16)


BAD_FIELDS: list[tuple[str, Any, str]] = [
    ("num_hidden_layers", 1_000_000_000, r"num_hidden_layers=1000000000 is outside \[1, 1024\]"),
    ("num_hidden_layers", -1, r"num_hidden_layers=-1 is outside"),
    ("num_hidden_layers", ..., r"num_hidden_layers is missing"),
    ("num_hidden_layers", None, r"num_hidden_layers is null"),
    ("num_hidden_layers", True, r"num_hidden_layers=True must be an integer"),
    ("hidden_size", 1.5, r"hidden_size=1\.5 must be an integer"),
    ("hidden_size", 2**40, r"hidden_size=1099511627776 is outside"),
    ("hidden_size", "64", r"hidden_size='64' must be an integer"),
    ("num_attention_heads", 0, r"num_attention_heads=0 is outside"),
    ("num_attention_heads", 7, r"num_attention_heads=7 is not a multiple of num_key_value_heads=2"),
    ("num_key_value_heads", 3, r"num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ("head_dim", 15, r"head_dim=15 .*even"),
    ("intermediate_size", 0, r"intermediate_size=0 is outside"),
    ("vocab_size", -5, r"vocab_size=-5 is outside"),
    ("vocab_size", 0, r"vocab_size=0 is outside"),
    ("max_position_embeddings", 10**15, r"max_position_embeddings=1000000000000000 is outside"),
    ("rms_norm_eps", "x", r"rms_norm_eps='x' must be a number"),
    ("rms_norm_eps", float("nan"), r"rms_norm_eps=nan is outside"),
    ("hidden_act", "os.system", r"hidden_act='os.system' is not supported; known are silu"),
    ("hidden_act", None, r"hidden_act is missing or null"),
    ("tie_word_embeddings", "maybe", r"tie_word_embeddings='maybe' must be true or false"),
    ("dtype", "complex64", r"dtype='complex64' is not supported"),
    ("dtype", "floot32", r"dtype='floot32' is not supported; did you mean 'float32'"),
    ("torch_dtype", "float3", r"torch_dtype='float3' is not supported"),
    ("sliding_window", -1, r"sliding_window=-1 is outside"),
    ("quantization_config", {"quant_method": "no_such"}, r"quantization_config is not supported"),
    ("model_type", "no_such_model", r"model_type='no_such_model' does not fit architecture 'LlamaForCausalLM'"),
    ("architectures", ["__import__"], r"architecture '__import__' is not supported; known are .*LlamaForCausalLM"),
    ("architectures", ["LlamaForCausalLn"], r"did you mean 'LlamaForCausalLM'"),
    ("architectures", [], r"architectures='\[\]' must be a list"),
    ("architectures", ..., r"architectures='None' must be a list"),
    ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}, r"rope_type='spiral' is not supported"),
    ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}, r"rope_parameters\.factor is missing"),
    ("rope_parameters", {"rope_theta": -1}, r"rope_parameters\.rope_theta=-1 is outside"),
    ("rope_parameters", [], r"rope_parameters=\[\] must be an object"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_FIELDS)
def test_a_bad_field_is_refused_by_name_in_one_line(field: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_spec(_folder(tmp_path, **{field: value}))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_ELSEWHERE: list[tuple[str, dict[str, Any], str]] = [
    ("mistral", {"sliding_window": -1}, r"sliding_window=-1 is outside"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 0}, r"sliding_window=0 is outside"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["x", "x"]}, r"layer_types holds 'x'"),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": []}, r"layer_types must be a list"),
    ("opt", {"word_embed_proj_dim": 0}, r"word_embed_proj_dim=0 is outside"),
    ("opt", {"layer_norm_elementwise_affine": False}, r"layer_norm_elementwise_affine=False is not supported"),
    ("opt", {"num_attention_heads": 7}, r"hidden_size=64 is not a multiple of num_attention_heads=7"),
]


@pytest.mark.parametrize(("architecture", "changes", "message"), BAD_ELSEWHERE)
def test_fields_of_other_architectures_are_checked_too(
    architecture: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_spec(_folder(tmp_path, architecture, **changes))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: None, r"config\.json cannot be read: No such file"),
    "not JSON": (lambda file: file.write_text("{"), r"config\.json is not valid JSON"),
    "not text": (lambda file: file.write_bytes(b"\xff\xfe{"), r"config\.json is not valid JSON"),
    "a list": (lambda file: file.write_text("[]"), r"config\.json must hold a JSON object, not list"),
    "nested": (lambda file: file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000), r"nested too deeply"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
def test_a_bad_config_file_is_refused(fault: str, tmp_path: Path) -> None:
    damage, message = BAD_FILES[fault]
    damage(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=message):
        read_spec(tmp_path)


def test_the_context_is_what_the_scaling_stretches_it_to(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    assert read_spec(_folder(tmp_path, rope_parameters=yarn)).max_model_len == 2048
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
    assert read_spec(_folder(tmp_path, rope_parameters=linear)).max_model_len == 1536


@pytest.mark.parametrize("tp_size", [3, 8])
def test_heads_that_cannot_be_split_are_refused(tp_size: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"tensor_parallel_size={tp_size} cannot split .*num_attention_heads=4"):
        check_split(read_spec(_folder(tmp_path)), ParallelLayout(tp=tp_size))


def test_ranks_may_be_a_multiple_of_key_value_heads_but_not_of_the_feed_forward_width(tmp_path: Path) -> None:
    check_split(read_spec(_folder(tmp_path)), ParallelLayout(tp=4))
    with pytest.raises(
        ConfigError,
        match="it must divide num_attention_heads and intermediate_size, "
        "and divide num_key_value_heads or be a multiple of it",
    ):
        check_split(read_spec(_folder(tmp_path, intermediate_size=98)), ParallelLayout(tp=4))


def test_experts_are_split_or_shared_out_whole(tmp_path: Path) -> None:
    sizes = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 96}
    changes = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_key_value_heads": 4, **sizes}
    spec = read_spec(_folder(tmp_path, **changes))
    check_split(spec, ParallelLayout(tp=4))
    check_split(spec, ParallelLayout(tp=2, expert_parallel=True))
    with pytest.raises(ConfigError, match=r"number of experts=6; it must divide .*number of experts"):
        check_split(spec, ParallelLayout(tp=4, expert_parallel=True))
    with pytest.raises(ConfigError, match="intermediate_size of an expert=98; it must divide"):
        check_split(read_spec(_folder(tmp_path, **{**changes, "intermediate_size": 98})), ParallelLayout(tp=4))
    with pytest.raises(ConfigError, match="LlamaForCausalLM has no experts to share out"):
        check_split(read_spec(_folder(tmp_path)), ParallelLayout(tp=2, expert_parallel=True))


def test_reading_a_spec_imports_no_torch(tmp_path: Path) -> None:
    _folder(tmp_path)
    code = (
        "import sys; from importlib import import_module; from rayllm.models import registry; "
        "registry.read_spec(sys.argv[1]); "
        "[import_module(registry.architecture_module(name)) for name in registry.known_architectures()]; "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
