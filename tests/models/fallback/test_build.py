"""A model of `transformers` is made without memory and filled with a rank's share."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import EXPERTS, VOCAB_SIZE, foreign_checkpoint
from golden import check_log_probs, largest_difference, make_sequences, transformers_log_probs
from safetensors.torch import load_file, save_file
from teacher import log_probs
from transformers import AutoModelForCausalLM
from transformers.models.granite import modeling_granite

from rayllm.distributed.groups import TensorParallel
from rayllm.errors import ConfigError
from rayllm.models import load_model
from rayllm.models.fallback.build import ModelParts, empty_model, load_decoder
from rayllm.models.fallback.names import stored_parameters
from rayllm.models.registry import read_spec
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.checkpoint_weights import CheckpointWeights

CPU = torch.device("cpu")


def fill(path: Path, tp: TensorParallel, dtype: torch.dtype = torch.float32) -> tuple[Any, Checkpoint]:
    model, checkpoint = empty_model(read_spec(path), str(path), dtype), Checkpoint(path)
    weights = CheckpointWeights(checkpoint, stored_parameters(model, checkpoint), dtype, CPU)
    ModelParts(model, weights, tp, CPU).fill()
    return model, checkpoint


def load(path: Path, **arguments: Any) -> Any:
    return load_decoder(str(path), read_spec(path), TensorParallel(), torch.float32, CPU, "auto", 0, **arguments)


def test_nothing_is_left_empty_and_every_tensor_is_used(tmp_path: Path) -> None:
    model, checkpoint = fill(foreign_checkpoint(tmp_path, "dots1", **EXPERTS), TensorParallel())
    assert {each.device.type for each in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert checkpoint.unused() == []


@torch.no_grad()
def test_experts_whose_rows_are_no_multiple_of_16_bytes_are_served(tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, "dots1", **{**EXPERTS, "moe_intermediate_size": 26})
    sequences = make_sequences(VOCAB_SIZE, (13, 4))
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    reference.set_experts_implementation("eager")
    expected = [reference(torch.tensor([tokens])).logits[0].log_softmax(-1).numpy() for tokens in sequences]
    check_log_probs(path, sequences, expected, None)


def test_a_rank_reads_its_own_bytes_only(tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, "dots1", **EXPERTS)
    _, alone = fill(path, TensorParallel())
    read = [fill(path, TensorParallel(rank, 2))[1].bytes_read for rank in (0, 1)]
    shared = sum(read) - alone.bytes_read  # norms, routers and what the plan leaves whole
    assert 0 < shared < 0.1 * alone.bytes_read


def test_parameters_that_a_class_keeps_in_float32_are_read_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_granite.GraniteForCausalLM, "_keep_in_fp32_modules_strict", ["norm", "up_proj"])
    model, _ = fill(foreign_checkpoint(tmp_path, "granite"), TensorParallel(), torch.bfloat16)
    found = {name: each.dtype for name, each in model.named_parameters()}
    assert found["model.embed_tokens.weight"] == found["model.layers.0.input_layernorm.weight"] == torch.bfloat16
    assert found["model.norm.weight"] == found["model.layers.0.mlp.up_proj.weight"] == torch.float32
    stored = load_file(tmp_path / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, stored)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, "granite")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no tensor 'model.layers.1.mlp.up_proj.weight'"):
        load(path)


def test_a_tensor_that_nothing_takes_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = foreign_checkpoint(tmp_path, "granite")
    save_file({**load_file(path / "model.safetensors"), "model.extra": torch.zeros(2)}, path / "model.safetensors")
    load(path)
    assert any("1 tensors of the checkpoint are not used: model.extra" in each.getMessage() for each in caplog.records)


def test_a_buffer_that_nobody_computes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = foreign_checkpoint(tmp_path, "granite")
    monkeypatch.setattr(modeling_granite.GraniteModel, "_init_weights", lambda self, module: None)
    with pytest.raises(ConfigError, match=r"_init_weights does not compute the buffer '.*inv_freq' of GraniteRotary"):
        load(path)


def test_random_weights_need_no_file(tmp_path: Path) -> None:
    path = foreign_checkpoint(tmp_path, "granite")
    (path / "model.safetensors").unlink()
    decoder, _ = load_decoder(str(path), read_spec(path), TensorParallel(), torch.float32, CPU, "dummy", 7)
    assert decoder.spec.architecture == "GraniteForCausalLM"


CONFIGURATION = """
from transformers import GraniteConfig

class OwnConfig(GraniteConfig):
    model_type = "own_model"
"""
MODELING = """
from transformers import GraniteForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(GraniteForCausalLM):
    config_class = OwnConfig
"""


def test_a_checkpoints_own_code_runs_where_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = foreign_checkpoint(tmp_path / "model", "granite", num_key_value_heads=2)
    sequences = make_sequences(VOCAB_SIZE, (9, 5))
    expected = transformers_log_probs(path, sequences)
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": ["OwnForCausalLM"], "model_type": "own_model", "auto_map": names}
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_own.py").write_text(CONFIGURATION)
    (path / "modeling_own.py").write_text(MODELING)
    spec = read_spec(path, trust_remote_code=True)
    model = load_model(str(path), spec, TensorParallel(), dtype=torch.float32, device=CPU)
    found = [part.numpy() for part in log_probs(model, sequences, (4, 4), 4)]
    assert largest_difference(found, expected) < 1e-4
