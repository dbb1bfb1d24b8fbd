"""An architecture from outside the package is served like a built-in one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import toy_falcon
from ranks import RankPool
from teacher import registered_log_probs
from tiny import make_model, make_tokenizer

import rayllm
from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.distributed.groups import TensorParallel
from rayllm.engine.owner.resolve import resolve
from rayllm.errors import ConfigError
from rayllm.models import registry
from rayllm.models.registry import (
    architecture_module,
    known_architectures,
    read_spec,
    register_architecture,
    weight_names,
)

SEQUENCES = [[(7 * i + 13 * n) % 120 for i in range(n)] for n in (23, 9, 1)]
CUTS = [[23] * 3, [5] * 3, [1] * 3]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_modules", dict(registry._modules))


def _checkpoint(folder: Path, vocab_size: int = 128) -> tuple[Path, Any]:
    from transformers import FalconConfig

    model = make_model(
        FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=vocab_size, bos_token_id=1)
    )
    model.save_pretrained(folder)
    return folder, model


def test_an_architecture_from_outside_gives_the_log_probabilities_of_transformers(
    tmp_path: Path, two_ranks: RankPool
) -> None:
    path, model = _checkpoint(tmp_path)
    with torch.no_grad():
        expected = [model(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy() for tokens in SEQUENCES]
    arguments = ("FalconForCausalLM", toy_falcon.__name__, str(path), SEQUENCES, CUTS, 4)
    alone = registered_log_probs(TensorParallel(), *arguments)
    first, _ = two_ranks.run(registered_log_probs, *arguments)
    for found in (*alone, *first):
        assert max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_the_toy_with_a_fused_tensor_needs_at_most_40_lines() -> None:
    lines = Path(toy_falcon.__file__).read_text().splitlines()
    assert len([line for line in lines if line.strip()]) <= 40


def test_llm_serves_a_registered_architecture(tmp_path: Path) -> None:
    path, model = _checkpoint(tmp_path, vocab_size=288)
    make_tokenizer(path)
    rayllm.register_architecture("FalconForCausalLM", toy_falcon)
    with rayllm.LLM(str(path), device="cpu", max_model_len=64) as llm:
        params = rayllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        [output] = llm.generate([[5, 9, 30, 77]], params, use_tqdm=False)
    tokens = [5, 9, 30, 77]
    with torch.no_grad():
        for _ in range(8):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    assert output.outputs[0].token_ids == tokens[4:]


def test_a_process_that_is_given_the_resolved_config_knows_the_architecture(tmp_path: Path) -> None:
    path, _ = _checkpoint(tmp_path)
    make_tokenizer(path)
    register_architecture("FalconForCausalLM", toy_falcon)
    sent = resolve(EngineConfig(model=str(path), device="cpu")).model_dump_json()
    registry._modules.pop("FalconForCausalLM")  # as in a worker process
    received = ResolvedConfig.model_validate_json(sent)
    assert received == ResolvedConfig.model_validate_json(received.model_dump_json())
    assert received.spec.layers[0].parallel
    assert weight_names(received.spec, received.architecture_module) == toy_falcon.names(received.spec)


def test_a_module_may_stand_in_place_of_a_built_in_one() -> None:
    built_in = architecture_module("LlamaForCausalLM")
    register_architecture("LlamaForCausalLM", toy_falcon)
    assert architecture_module("LlamaForCausalLM") == toy_falcon.__name__ != built_in


def test_an_entry_point_is_found_without_a_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "outside-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[rayllm.architectures]\nFalconForCausalLM = {toy_falcon.__name__}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    path, _ = _checkpoint(tmp_path / "model")
    assert "FalconForCausalLM" in known_architectures()
    assert read_spec(path).layers[0].parallel


def test_a_module_that_lacks_something_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"module 'json' has no MODEL_TYPES and no spec and no names"):
        register_architecture("XForCausalLM", json)
    with pytest.raises(ConfigError, match=r"module 'no_such_module' cannot be imported"):
        register_architecture("XForCausalLM", "no_such_module")
    assert "XForCausalLM" not in known_architectures()
