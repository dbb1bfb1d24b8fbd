"""Models with sliding windows, engine and all, against `transformers`' greedy tokens: sequences many times the window
and more of them than the KV pool holds, so that blocks that a window has passed are other sequences' at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint

from rayllm import LLM, SamplingParams

STEM = [(7 * i) % 280 + 3 for i in range(33)]
PROMPTS = [STEM[: 9 + 4 * n] + [(13 * i + 29 * n) % 280 + 3 for i in range(11 * n % 40)] for n in range(6)]
NUM_TOKENS = 60
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "every layer": ("mistral", {"sliding_window": 7, "num_hidden_layers": 3}),
    "upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "num_hidden_layers": 4},
    ),
    "two of three": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 7,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
BLOCKS = {"every layer": 8, "upper layers": 53, "two of three": 48}
"""Few more than one sequence needs."""


@torch.no_grad()
def _greedy(path: Path) -> list[list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    model.generation_config.eos_token_id = None
    found = [
        model.generate(torch.tensor([prompt]), max_new_tokens=NUM_TOKENS, do_sample=False)[0] for prompt in PROMPTS
    ]
    return [tokens[len(prompt) :].tolist() for tokens, prompt in zip(found, PROMPTS, strict=True)]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_transformers_in_a_pool_that_only_windows_fit(name: str, tmp_path: Path) -> None:
    architecture, overrides = MODELS[name]
    path = make_checkpoint(tmp_path, architecture, **overrides)
    expected = _greedy(path)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    settings: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 8, "max_model_len": 140}
    with LLM(str(path), device="cpu", num_kv_blocks=BLOCKS[name], enable_prefix_caching=True, **settings) as llm:
        for _ in range(2):
            outputs = llm.generate(PROMPTS, params)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        stats = llm.stats()
    assert stats.prefix_hits > 0
    assert stats.num_blocks_used == 0
    if name != "every layer":  # a sequence of nothing but windows does not grow
        assert stats.num_preemptions > 0
