"""Every architecture computes with kernels what it computes without: the same log-probabilities in float32, with chunks
and decode rows in one batch, where each linear layer adds itself to the residual in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from golden import CUTS, TOLERANCE, largest_difference, make_sequences
from mixtures import make_mixture
from models.architectures import test_deepseek_v2, test_gemma2, test_glm, test_gpt2, test_gpt_neox, test_phi3
from models.architectures.test_gpt_oss import _config as gpt_oss_config
from teacher import log_probs_of_folder
from tiny import make_checkpoint, make_config
from triton_interpreter import corrected

from rayllm.distributed.groups import TensorParallel
from rayllm.linear import PackedLinear
from rayllm_kernels.device import interpreted

BLOCK_SIZE = 16
"""The smallest that the kernels read."""
LENGTHS = (30, 6, 9, 1)

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: make_config("llama", attention_bias=True),
    "qwen3": lambda: make_config("qwen3"),
    "opt": lambda: make_config("opt"),
    "opt, norm on the sum": lambda: make_config("opt", do_layer_norm_before=False),
    "glm, pairs": lambda: transformers.GlmConfig(**test_glm.TINY),
    "gemma2": lambda: transformers.Gemma2Config(**test_gemma2.TINY),
    "gpt2": lambda: transformers.GPT2Config(**test_gpt2.TINY),
    "gpt_neox, parallel": lambda: transformers.GPTNeoXConfig(**test_gpt_neox.TINY),
    "phi3, longrope": lambda: transformers.Phi3Config(**test_phi3.TINY, **test_phi3.LONGROPE),
}
QUICK = ("qwen3", "gpt_neox, parallel")
MIXTURES: dict[str, Callable[[], Any]] = {
    "gpt_oss": gpt_oss_config,
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**test_deepseek_v2.TINY),
}


def _check(path: Path, vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (str(path), make_sequences(vocab_size, LENGTHS), [CUTS[-1][: len(LENGTHS)]], BLOCK_SIZE)
    (expected,) = log_probs_of_folder(TensorParallel(), *arguments)
    monkeypatch.setattr(PackedLinear, "supports", lambda weight: False)
    with corrected(), interpreted():
        (found,) = log_probs_of_folder(TensorParallel(), *arguments)
    assert largest_difference(found, expected) < TOLERANCE


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.kernels) for name in CONFIGS]
)
def test_log_probabilities_are_those_of_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS[name]()
    _check(make_checkpoint(tmp_path, config, tokenizer=False), config.vocab_size, monkeypatch)


@pytest.mark.kernels
@pytest.mark.parametrize("name", MIXTURES)
def test_log_probabilities_of_mixtures_are_those_of_the_cpu(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = MIXTURES[name]()
    _check(make_mixture(tmp_path, config), config.vocab_size, monkeypatch)
