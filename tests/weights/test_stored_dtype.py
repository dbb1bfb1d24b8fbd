"""A config without a dtype takes that of the weights' files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM

from rayllm.config import EngineConfig
from rayllm.engine.owner.resolve import resolve
from rayllm.models.registry import read_spec
from rayllm.weights.stored_dtype import stored_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _set_dtype(folder: Path, **fields: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps({**config, **fields}))


@pytest.mark.parametrize("shards", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fields", [{}, {"dtype": None}, {"torch_dtype": "auto"}])
def test_a_config_without_a_dtype_takes_the_files(
    tmp_path: Path, dtype: torch.dtype, shards: str, fields: dict[str, object]
) -> None:
    path = make_checkpoint(tmp_path / "model", tokenizer=False, dtype=dtype, max_shard_size=shards)
    _set_dtype(path, **fields)

    assert read_spec(path).dtype == str(dtype).removeprefix("torch.")
    assert resolve(EngineConfig(model=str(path)), num_gpus=0, num_cores=1).dtype == read_spec(path).dtype
    if "torch_dtype" not in fields:  # `transformers` does not read "auto" here
        assert AutoModelForCausalLM.from_pretrained(path, dtype="auto").dtype == dtype


def test_what_a_config_says_counts_more_than_the_files(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tokenizer=False, dtype=torch.float32)
    _set_dtype(path, torch_dtype="bfloat16")

    assert read_spec(path).dtype == "bfloat16"


def test_a_few_wide_tensors_and_integers_do_not_decide(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", tokenizer=False, dtype=torch.bfloat16)
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    tensors["a.position_ids"] = torch.arange(10**6)
    save_file(tensors, path / "model.safetensors")

    assert stored_dtype(path) == "bfloat16"


@pytest.mark.parametrize(
    "content",
    [b"", b"1234", (9).to_bytes(8, "little") + b"not json!", (2**62).to_bytes(8, "little") + b"{}"],
)
def test_files_that_cannot_be_read_say_nothing(tmp_path: Path, content: bytes) -> None:
    assert stored_dtype(tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(content)
    assert stored_dtype(tmp_path) is None


@pytest.mark.parametrize("header", ['{"a": {"dtype": "F16", "shape": "x"}}', '{"a": {"dtype": "F16"}}', "[1]"])
def test_headers_that_make_no_sense_do_not_stop_it(tmp_path: Path, header: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode())
    assert stored_dtype(tmp_path) in (None, "float16")
