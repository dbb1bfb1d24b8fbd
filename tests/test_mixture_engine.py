"""A mixture of experts in an engine: the same tokens whatever else is in the batch, however work is cut and split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mixtures import SIZES, make_mixture

from rayllm import LLM, SamplingParams
from rayllm.errors import ConfigError

PROMPTS = [[5], [7, 8, 9], list(range(20, 90)), list(range(30, 46)), list(range(20, 90)), [100, 3, 77, 12, 250]]
PARAMS = [
    SamplingParams(temperature=temperature, seed=seed, max_tokens=24, ignore_eos=True)
    for seed, temperature in enumerate((0.0, 0.9, 0.0, 1.2, 0.7, 0.0))
]
CUTS: dict[str, dict[str, Any]] = {
    "ample": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "a starved pool": {"num_kv_blocks": 16, "enable_prefix_caching": True},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Qwen2MoeConfig

    sizes = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48, "intermediate_size": 96}
    config = Qwen2MoeConfig(**SIZES, **sizes, num_experts=6, eos_token_id=2)
    return make_mixture(tmp_path_factory.mktemp("mixture"), config)


def _llm(path: Path, **settings: Any) -> LLM:
    fixed = {"skip_tokenizer_init": True, "device": "cpu", "max_model_len": 120, "block_size": 8, "num_kv_blocks": 200}
    return LLM(str(path), **{**fixed, **settings})


def _tokens(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(prompts, params)]


@pytest.fixture(scope="module")
def alone(mixture: Path) -> list[list[int]]:
    """Each request by itself."""
    with _llm(mixture) as llm:
        return [_tokens(llm, [prompt], [params])[0] for prompt, params in zip(PROMPTS, PARAMS, strict=True)]


@pytest.mark.parametrize("cut", CUTS)
def test_tokens_are_the_same_however_the_work_is_cut(mixture: Path, alone: list[list[int]], cut: str) -> None:
    assert all(len(set(tokens)) > 3 for tokens in alone)
    with _llm(mixture, **CUTS[cut]) as llm:
        assert _tokens(llm, PROMPTS, PARAMS) == alone
        preemptions = llm.stats().num_preemptions
    assert (preemptions > 0) == ("starved" in cut)


@pytest.mark.cluster
@pytest.mark.parametrize("expert_parallel", [False, True])
def test_tokens_are_the_same_on_two_workers(
    ray_cluster: None, mixture: Path, alone: list[list[int]], expert_parallel: bool
) -> None:
    split = {"tensor_parallel_size": 2, "name": "mixture", "enable_expert_parallel": expert_parallel}
    with _llm(mixture, **split) as llm:
        assert _tokens(llm, PROMPTS, PARAMS) == alone


def test_experts_of_a_model_that_has_none_cannot_be_shared_out(llama_path: Path) -> None:
    with pytest.raises(ConfigError, match="enable_expert_parallel: LlamaForCausalLM has no experts to share out"):
        LLM(str(llama_path), enable_expert_parallel=True)
