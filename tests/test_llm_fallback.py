"""An engine whose model `transformers` computes does what any engine does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from foreign import WINDOW, foreign_checkpoint
from transformers import AutoModelForCausalLM

from rayllm import LLM, SamplingParams
from rayllm.errors import ConfigError


@torch.no_grad()
def greedy(path: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """What `transformers` writes, computing each sequence anew for each token."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    outputs = []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(max_tokens):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        outputs.append(tokens[len(prompt) :])
    return outputs


def test_batches_chunks_and_prefix_hits_give_the_tokens_of_transformers(tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, "cohere2", tokenizer=True, **{**WINDOW, "vocab_size": 288})
    draw = random.Random(5)
    shared = [draw.randrange(3, 288) for _ in range(33)]
    prompts = [shared + [draw.randrange(3, 288) for _ in range(length)] for length in (1, 9, 20)] + [shared[:5], [7]]
    settings = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(str(path), device="cpu", max_num_seqs=4, max_num_batched_tokens=16) as llm:
        first = llm.generate(prompts, settings)
        again = llm.generate(prompts, settings)
        assert llm.stats().prefix_hits > 0
    expected = greedy(path, prompts, 12)
    assert [output.outputs[0].token_ids for output in first] == expected
    assert [output.outputs[0].token_ids for output in again] == expected


def test_model_impl_chooses_who_computes_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = foreign_checkpoint(tmp_path, "granite", tokenizer=True, vocab_size=288)
    with pytest.raises(
        ConfigError, match=r"no implementation of 'GraniteForCausalLM' of its own.*give model_impl='auto'"
    ):
        LLM(str(path), model_impl="vllm", device="cpu")
    with LLM(str(path), model_impl="transformers", device="cpu", max_num_seqs=2) as llm:
        [output] = llm.generate([[5, 6, 7]], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    assert [output.outputs[0].token_ids] == greedy(path, [[5, 6, 7]], 4)
    assert "runs through transformers with RayLLM's attention" in caplog.text
