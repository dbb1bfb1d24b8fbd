"""The count by spec is what a decoder asks its weights for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import transformers
from tiny import ARCHITECTURES, make_config

from rayllm.distributed.groups import TensorParallel
from rayllm.layout import ParallelLayout
from rayllm.models import build_model
from rayllm.models.parameters import num_parameters
from rayllm.models.registry import spec_of
from rayllm.spec import DecoderSpec
from rayllm.weights.source import DummyWeights

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 291, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
           "moe_intermediate_size": 32}  # fmt: skip
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
}
CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "GPT-NeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "OPT, narrow embeddings": (
        "OPTConfig", "OPTForCausalLM", {"ffn_dim": 96, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    ),
    "GLM-4": ("Glm4Config", "Glm4ForCausalLM", {"attention_bias": True}),
    "Gemma 3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {}),
    "Llama 4": ("Llama4TextConfig", "Llama4ForCausalLM", {**EXPERTS, "num_hidden_layers": 4, "moe_layers": [1, 3]}),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", EXPERTS),
    "Qwen2-MoE": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", {**EXPERTS, "shared_expert_intermediate_size": 48}),
    "DeepSeek-V2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**EXPERTS, **LATENT, "q_lora_rank": None}),
    "DeepSeek-V3": (
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {**EXPERTS, **LATENT, "n_group": 2, "topk_group": 2, "first_k_dense_replace": 1, "attention_bias": True},
    ),
    "GLM-4.5": ("Glm4MoeConfig", "Glm4MoeForCausalLM", {**EXPERTS, "n_group": 1, "use_qk_norm": True}),
}  # fmt: skip


def _specs() -> dict[str, DecoderSpec]:
    found = {}
    for name in ARCHITECTURES:
        config = json.loads(make_config(name).to_json_string(use_diff=False))
        class_name = transformers.AutoModelForCausalLM._model_mapping[type(make_config(name))].__name__
        found[name] = spec_of({**config, "architectures": [class_name]})
    for name, (config_class, architecture, fields) in CONFIGS.items():
        config = json.loads(getattr(transformers, config_class)(**{**COMMON, **fields}).to_json_string(use_diff=False))
        found[name] = spec_of({**config, "architectures": [architecture]})
    return found


class _Counting(DummyWeights):
    num_elements = 0

    def tensor(self, *arguments: Any, **settings: Any) -> torch.Tensor:
        found = super().tensor(*arguments, **settings)
        self.num_elements += found.numel()
        return found


@pytest.mark.parametrize(("name", "spec"), _specs().items(), ids=lambda value: value if isinstance(value, str) else "")
@pytest.mark.parametrize("layout", [ParallelLayout(), ParallelLayout(tp=2), ParallelLayout(tp=2, expert_parallel=True)])
def test_the_count_is_what_the_largest_rank_holds(name: str, spec: DecoderSpec, layout: ParallelLayout) -> None:
    weights = _Counting(0, torch.bfloat16, CPU)
    tp = TensorParallel(0, layout.tp, expert_parallel=layout.expert_parallel)
    build_model(spec, weights, tp, torch.bfloat16, CPU)
    assert num_parameters(spec, layout) == weights.num_elements
