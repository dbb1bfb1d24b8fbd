from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import check_against_transformers, make_sequences
from mixtures import make_mixture
from models.architectures.test_deepseek_v2 import TINY, YARN
from ranks import RankPool
from safetensors.torch import load_file, save_file
from teacher import load
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM, DeepseekV3Config

from rayllm import LLM, SamplingParams
from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models.architectures import deepseek_v3
from rayllm.models.memory_plan import kv_bytes_per_token
from rayllm.models.registry import spec_of
from rayllm.spec import LatentAttentionSpec, MlpSpec, RouterSpec, SparseMlpSpec

VARIANTS: dict[str, dict[str, Any]] = {
    "groups, yarn": {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "n_group": 4, "topk_group": 2},
    "rotary in halves, plain queries, sparse throughout": {
        "rope_interleave": False, "q_lora_rank": None, "first_k_dense_replace": 0, "norm_topk_prob": False,
        "n_group": 1, "topk_group": 1,
    },
}  # fmt: skip
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_log_probabilities_equal_transformers(variant: str, tmp_path: Path, two_ranks: RankPool) -> None:
    config = DeepseekV3Config(**{**TINY, **VARIANTS[variant]})
    check_against_transformers(make_mixture(tmp_path, config), two_ranks, expert_parallel=True)


def test_the_config_of_v3_is_read() -> None:
    """What config.json of the published checkpoint says, without its quantization."""
    spec = deepseek_v3.spec(V3)
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttentionSpec)
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * math.log(40) + 1) ** 2)
    assert (attention.q_latent_dim, attention.kv_dim, attention.rope.in_pairs) == (1536, 576, True)
    sparse = spec.layers[3].feed_forward
    assert isinstance(sparse, SparseMlpSpec)
    assert [layer.feed_forward.kind for layer in spec.layers] == ["dense"] * 3 + ["sparse"] * 58
    assert sparse.router == RouterSpec(
        256, 8, "sigmoid", renormalize=True, scale=2.5, num_groups=8, top_groups=4, group_score="top2_sum",
        has_choice_bias=True, float32=True,
    )  # fmt: skip
    assert sparse.shared == MlpSpec(2048, "silu", gated=True)
    assert kv_bytes_per_token(spec, 8, itemsize=2) == 61 * 576 * 2


def test_kimi_k2_is_read_by_its_own_model_type() -> None:
    fields = {
        "model_type": "kimi_k2",
        "n_group": 1,
        "topk_group": 1,
        "n_routed_experts": 384,
        "num_attention_heads": 64,
    }
    spec = spec_of({**V3, **fields, "num_key_value_heads": 64, "first_k_dense_replace": 1})
    assert spec.architecture == "DeepseekV3ForCausalLM"
    assert spec.layers[0].attention.num_heads == 64
    sparse = spec.layers[1].feed_forward
    assert isinstance(sparse, SparseMlpSpec)
    assert (sparse.router.num_experts, sparse.router.num_groups) == (384, 1)


def test_fp8_checkpoints_are_refused_with_the_reason() -> None:
    config = {**V3, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    with pytest.raises(ConfigError, match="quantization_config"):
        spec_of(config)


@pytest.mark.parametrize("field", ["scoring_func", "topk_method"])
def test_the_router_of_the_version_before_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}='greedy' is not supported"):
        deepseek_v3.spec({**V3, field: "greedy"})


def test_the_layer_that_predicts_further_tokens_is_left_out_with_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_mixture(tmp_path, DeepseekV3Config(**TINY, n_group=1, topk_group=1))
    tensors = load_file(path / "model.safetensors")
    extra = {f"model.layers.2.{name}": torch.ones(2) for name in ("eh_proj.weight", "enorm.weight")}
    save_file({**tensors, **extra}, path / "model.safetensors")
    with caplog.at_level(logging.INFO):
        load(TensorParallel(), path)
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert "2 tensors are left out" in caplog.text
    assert "model.layers.2.*" in caplog.text


@torch.no_grad()
def test_an_engine_writes_what_transformers_writes_in_chunks_and_after_a_prefix_hit(tmp_path: Path) -> None:
    path = make_mixture(tmp_path, DeepseekV3Config(**{**TINY, **VARIANTS["groups, yarn"]}))
    make_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    first, *others = make_sequences(288, (70, 9, 21))
    prompts = [first, *others, first[:50] + others[0], first]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(path), device="cpu", dtype="float32", max_num_batched_tokens=32, max_model_len=256) as llm:
        batch = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts[:3]], params)
        hits = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts[3:]], params)
    for prompt, output in zip(prompts, [*batch, *hits], strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=-1)
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()
    assert [output.metrics.num_cached_tokens for output in batch] == [0, 0, 0]
    assert [output.metrics.num_cached_tokens for output in hits] == [48, 64]
