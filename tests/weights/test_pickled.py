"""PyTorch's own weight files are read where there are no safetensors files, and never run code."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_checkpoint

from rayllm.errors import ConfigError
from rayllm.weights.checkpoint import Checkpoint
from rayllm.weights.files import holds_weights
from rayllm.weights.hub_model import HubModel, RemoteFile, needed_files

WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "opt", tokenizer=False)


def _pickle(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Writes the folder's weights as PyTorch's own file, in their place."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / BIN, **options)
    return tensors


def _equals(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> bool:
    assert sorted(checkpoint.names()) == sorted(tensors)
    return all(torch.equal(checkpoint.read(name, [range(n) for n in t.shape]), t) for name, t in tensors.items())


@pytest.mark.parametrize("is_zip", [True, False], ids=["mapped", "old format"])
def test_a_folder_with_only_pytorch_model_bin_is_read(folder: Path, is_zip: bool) -> None:
    assert _equals(Checkpoint(folder, "auto"), load_file(folder / WEIGHTS))
    tensors = _pickle(folder, _use_new_zipfile_serialization=is_zip)
    assert holds_weights(folder)
    assert _equals(Checkpoint(folder), tensors)
    name = max(tensors, key=lambda name: tensors[name].dim())
    rows = range(len(tensors[name]))
    assert torch.equal(Checkpoint(folder).read(name, (rows, range(2, 5))), tensors[name][:, 2:5])
    with pytest.raises(ConfigError, match=r"contains no safetensors files, which load_format='safetensors' requires"):
        Checkpoint(folder, "safetensors")


def test_shards_are_found_by_their_index(folder: Path) -> None:
    tensors = _pickle(folder)
    (folder / BIN).unlink()
    halves = sorted(tensors)[::2], sorted(tensors)[1::2]
    weight_map = {}
    for number, names in enumerate(halves, 1):
        file = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / f"{BIN}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert _equals(Checkpoint(folder), tensors)
    (folder / f"{BIN}.index.json").unlink()
    assert _equals(Checkpoint(folder), tensors)


def test_safetensors_come_first(folder: Path) -> None:
    torch.save({"other": torch.zeros(3)}, folder / BIN)
    assert "other" not in Checkpoint(folder).names()
    assert Checkpoint(folder, "pt").names() == ["other"]


class _Evil:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["torch", "bare"])
def test_a_pickle_that_holds_code_is_refused_and_does_not_run(folder: Path, tmp_path: Path, form: str) -> None:
    _pickle(folder)
    mark = tmp_path / "ran"
    if form == "torch":
        torch.save({"a": torch.zeros(2), "evil": _Evil(mark)}, folder / BIN)
    else:
        (folder / BIN).write_bytes(pickle.dumps({"evil": _Evil(mark)}, protocol=2))
    with pytest.raises(ConfigError, match=r"bin is (refused: it is a pickle that calls (posix|os)\.|not)"):
        Checkpoint(folder)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "not a readable PyTorch file"), (b"PK\x03\x04broken", "not a readable PyTorch file")],
)
def test_a_damaged_file_is_one_line(folder: Path, content: bytes, message: str) -> None:
    _pickle(folder)
    (folder / BIN).write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Checkpoint(folder)
    assert "\n" not in str(caught.value)


def test_a_file_without_tensors_is_refused(folder: Path) -> None:
    _pickle(folder)
    torch.save({"epoch": 3}, folder / BIN)
    with pytest.raises(ConfigError, match="holds no tensors by name"):
        Checkpoint(folder)


def test_names_of_the_bare_model_are_found(folder: Path) -> None:
    """facebook/opt-125m's own file says `decoder.…` where `transformers` now says `model.decoder.…`."""
    tensors = _pickle(folder)
    torch.save({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, folder / BIN)
    checkpoint = Checkpoint(folder)
    for name, tensor in tensors.items():
        checkpoint.check_shape(name, tensor.shape)
        assert torch.equal(checkpoint.read(name, [range(n) for n in tensor.shape]), tensor)
    assert checkpoint.unused() == []


def test_a_hub_model_without_safetensors_brings_its_pytorch_file() -> None:
    model = HubModel("facebook/opt-125m")
    names = ["config.json", "merges.txt", "vocab.json", "pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"]
    found = needed_files(model, [RemoteFile(name, 1) for name in names])
    assert [file.path for file in found] == ["config.json", "merges.txt", "vocab.json", "pytorch_model.bin"]
    both = needed_files(model, [RemoteFile(name, 1) for name in [*names, "model.safetensors"]])
    assert "pytorch_model.bin" not in [file.path for file in both]
    with pytest.raises(ConfigError, match="neither safetensors files nor pytorch_model"):
        needed_files(model, [RemoteFile("config.json", 1), RemoteFile("tf_model.h5", 1)])
