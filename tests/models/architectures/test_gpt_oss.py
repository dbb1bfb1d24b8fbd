from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import check_against_transformers, check_log_probs, make_sequences, transformers_log_probs
from mixtures import SIZES, make_mixture
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from safetensors.torch import load_file, save_file

from rayllm.errors import ConfigError
from rayllm.models.architectures import gpt_oss
from rayllm.models.registry import read_spec
from rayllm.spec import ClampedSwiglu, ExpertSpec, RouterSpec, SparseMlpSpec

INNER = 96
"""Half of it, a rank's share, is no multiple of MXFP4's blocks of 32."""
NUMBERS = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def _config(**fields: Any) -> Any:
    from transformers import GptOssConfig

    rope = {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "truncate": False,
    }
    sizes = {**SIZES, "head_dim": 16, "intermediate_size": INNER, "num_local_experts": 6, "sliding_window": 9}
    return GptOssConfig(**{**sizes, "rope_parameters": rope, **fields})


@pytest.mark.parametrize("fields", [{}, {"swiglu_limit": 0.5, "swiglu_alpha": 1.2}], ids=["defaults", "a low limit"])
def test_log_probabilities_equal_transformers(fields: dict[str, Any], tmp_path: Path, two_ranks: RankPool) -> None:
    check_against_transformers(make_mixture(tmp_path, _config(**fields)), two_ranks, expert_parallel=True)


def _widened(blocks: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    """MXFP4 `[..., B, 16]` with `[..., B]` as float32 `[..., 32 B]`, by the definition of the format."""
    numbers = np.array([(-1) ** (bits // 8) * NUMBERS[bits % 8] for bits in range(16)], dtype=np.float32)
    wide = np.empty((*blocks.shape[:-1], 32), dtype=np.float32)
    wide[..., 0::2], wide[..., 1::2] = numbers[blocks % 16], numbers[blocks // 16]
    wide *= 2.0 ** (scales[..., None].astype(np.float32) - 127)
    return torch.from_numpy(wide.reshape(*scales.shape[:-1], -1))


def _quantize(folder: Path) -> None:
    """Random experts in MXFP4 in `folder`, the same in float32, as `transformers` has it, in its folder `wide`."""
    tensors = load_file(folder / "model.safetensors")
    packed, draw = dict(tensors), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        num_experts, num_inputs, num_rows = packed.pop(name).shape
        blocks = draw.integers(0, 256, (num_experts, num_rows, num_inputs // 32, 16), dtype=np.uint8)
        scales = draw.integers(121, 125, blocks.shape[:-1], dtype=np.uint8)
        packed |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        tensors[name] = _widened(blocks, scales).transpose(1, 2).contiguous()
    (folder / "wide").mkdir()
    save_file(tensors, folder / "wide" / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.json").read_text()
    (folder / "wide" / "config.json").write_text(config)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    (folder / "config.json").write_text(json.dumps({**json.loads(config), "quantization_config": quantization}))


def test_experts_in_mxfp4_are_widened_as_they_are_read(tmp_path: Path, two_ranks: RankPool) -> None:
    _quantize(make_mixture(tmp_path, _config(num_hidden_layers=2, num_local_experts=4)))
    sequences = make_sequences(SIZES["vocab_size"])
    expected = transformers_log_probs(tmp_path / "wide", sequences)
    check_log_probs(tmp_path, sequences, expected, two_ranks, expert_parallel=True)


def test_another_quantization_is_refused(tmp_path: Path) -> None:
    config = {**json.loads(_config().to_json_string()), "architectures": ["GptOssForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    with pytest.raises(ConfigError, match=r"quant_method='awq': use a checkpoint that is .*quantized by mxfp4"):
        read_spec(tmp_path)


def test_fields_that_the_config_leaves_out_are_those_of_its_class() -> None:
    spec = gpt_oss.spec(CONFIG)
    expert = ExpertSpec(96, ClampedSwiglu(1.702, 7.0), bias=True)
    router = RouterSpec(128, 4, "softmax", renormalize=True, bias=True)
    assert {layer.feed_forward for layer in spec.layers} == {SparseMlpSpec(router, expert)}
    attention = spec.layers[0].attention
    assert (attention.head_dim, attention.qkv_bias, attention.out_bias, attention.has_sinks) == (64, True, True, True)
    assert attention.rope is not None
    assert (attention.rope.scaling, attention.rope.factor, attention.rope.truncate) == ("yarn", 32.0, False)
    assert [layer.attention.window for layer in spec.layers] == [128, None, 128]
    assert spec.max_model_len == 131072
