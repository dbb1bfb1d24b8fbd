from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import check_against_transformers, largest_difference, make_sequences, transformers_log_probs
from models.architectures.test_llama import CONFIG
from ranks import RankPool
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM, Phi3Config

from rayllm import LLM, SamplingParams
from rayllm.models.architectures import phi3

TINY: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BOUNDARY = 24
LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": BOUNDARY,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
        "partial_rotary_factor": 0.75,
    },
}


@pytest.mark.parametrize("fields", [{"sliding_window": 7}, LONGROPE], ids=["window", "longrope"])
def test_log_probabilities_equal_transformers(fields: dict[str, Any], tmp_path: Path, two_ranks: RankPool) -> None:
    """With longrope, sequences of 37 and 25 tokens are beyond the boundary and share batches with ones that are not."""
    check_against_transformers(make_checkpoint(tmp_path, Phi3Config(**TINY, **fields), tokenizer=False), two_ranks)


def test_the_two_sets_of_frequencies_differ_in_what_they_give(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, Phi3Config(**TINY, **LONGROPE), tokenizer=False)
    [sequence] = make_sequences(288, (BOUNDARY + 1,))
    short, long = transformers_log_probs(path, [sequence[:-1], sequence])
    assert largest_difference([short], [long[:-1]]) > 0.1


@torch.no_grad()
def test_a_generation_that_crosses_the_boundary_has_the_greedy_tokens_of_transformers(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, Phi3Config(**TINY, **LONGROPE), tokenizer=True)
    [tokens] = make_sequences(288, (40,))
    prompts = [tokens[:20], tokens[:30], tokens[:BOUNDARY], tokens[:5], tokens[: BOUNDARY - 1], tokens, tokens[:20]]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    expected = []
    for prompt in prompts:
        found = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)
        expected.append(found[0, len(prompt) :].tolist())
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    with LLM(
        str(path), distributed_executor_backend="inproc", dtype="float32", block_size=4, num_kv_blocks=60,
        max_num_batched_tokens=16,
    ) as llm:  # fmt: skip
        for outputs in (
            llm.generate(prompts, params),
            llm.generate(prompts[::-1], params)[::-1],
        ):  # then from the cache
            assert [list(output.outputs[0].token_ids) for output in outputs] == expected


def test_defaults_are_those_of_the_config_class() -> None:
    config = {name: value for name, value in CONFIG.items() if name not in ("rms_norm_eps", "hidden_act")}
    scaling = {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    spec = phi3.spec({**config, "max_position_embeddings": 131_072, "rope_scaling": scaling})
    assert (spec.rope_boundary, spec.max_model_len, spec.layers[0].norm.eps) == (4096, 131_072, 1e-5)
    assert spec.layers[0].attention.rope is not None
    assert spec.layers[0].attention.rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)
    assert phi3.spec(config).rope_boundary is None
