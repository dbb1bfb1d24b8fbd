"""The trial of a model when it is loaded finds what would be served wrong."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import foreign_checkpoint
from transformers.models.granite import modeling_granite

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models import Model, load_model
from rayllm.models.fallback.build import load_decoder
from rayllm.models.registry import read_spec


def load(path: Path) -> Model:
    spec = read_spec(path)
    return load_model(str(path), spec, TensorParallel(), dtype=torch.float32, device=torch.device("cpu"))


def test_a_model_that_is_served_right_passes_and_the_log_says_what_computes_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        load(foreign_checkpoint(tmp_path, "granite"))
    assert [record.getMessage() for record in caplog.records if record.name.startswith("rayllm.models.fallback")] == [
        "GraniteForCausalLM runs through transformers with RayLLM's attention: slower than a native model"
    ]


def test_a_layer_that_looks_at_other_tokens_by_itself_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = modeling_granite.GraniteMLP.forward

    def mixing(self: Any, x: torch.Tensor) -> torch.Tensor:
        return plain(self, x + x.cumsum(1))  # a chunk does not see the tokens of the chunks before

    monkeypatch.setattr(modeling_granite.GraniteMLP, "forward", mixing)
    with pytest.raises(ConfigError, match=r"its logits of a prompt in chunks differ by .* from those of transformers"):
        load(foreign_checkpoint(tmp_path, "granite"))


def test_attention_that_does_not_use_the_interface_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def own(self: Any, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return hidden_states, None

    monkeypatch.setattr(modeling_granite.GraniteAttention, "forward", own)
    with pytest.raises(ConfigError, match="2 of its 2 layers compute attention by themselves, not through"):
        load(foreign_checkpoint(tmp_path, "granite"))


def test_a_forward_pass_that_fails_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no\nkernel")

    monkeypatch.setattr(modeling_granite.GraniteMLP, "forward", failing)
    with pytest.raises(ConfigError, match="a forward pass fails with RuntimeError: no kernel"):
        load(foreign_checkpoint(tmp_path, "granite"))


@pytest.mark.parametrize("model_type", ["granite", "olmo2"])  # the second gathers heads
def test_each_rank_is_tried_without_the_others(model_type: str, tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, model_type, vocab_size=288)
    for rank in (0, 1):  # the second rank's part of the vocabulary is not empty of tokens
        tp = TensorParallel(rank, 2)
        load_decoder(str(path), read_spec(path), tp, torch.float32, torch.device("cpu"), "auto", 0)
