"""Names, types, shapes and places of tensors, from headers alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

from rayllm.errors import ConfigError
from rayllm.weights.safetensors_header import TensorEntry, folder_tensors, read_header


def _write(path: Path, header: object, num_bytes: int) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(num_bytes))
    return path


def _entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F16") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 2] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_header_gives_each_tensors_type_shape_and_place(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).half(), "b": torch.tensor(7), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "x.safetensors")
    assert {name: (entry.dtype, entry.shape, entry.num_bytes) for name, entry in found.items()} == {
        "a": ("F16", (2, 3), 12),
        "b": ("I64", (), 8),
        "c": ("F32", (0, 4), 0),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data[found["a"].begin : found["a"].end] == tensors["a"].numpy().tobytes()


@pytest.mark.parametrize("max_shard_size", ["5GB", "40KB"])
def test_a_folders_tensors_are_those_of_all_its_files(tmp_path: Path, max_shard_size: str) -> None:
    folder = make_checkpoint(tmp_path, tokenizer=False, max_shard_size=max_shard_size)
    expected = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    found = folder_tensors(folder)
    assert {name: (entry.shape, entry.num_bytes) for name, entry in found.items()} == {
        name: (tuple(tensor.shape), tensor.nbytes) for name, tensor in expected.items()
    }
    assert folder_tensors(tmp_path.parent) == {}


FAULTS: dict[str, tuple[object, int, str]] = {
    "list": ([1], 0, "its header is list, not an object"),
    "entry is a number": ({"a": 1}, 0, "tensor 'a' has dtype None"),
    "dtype": ({"a": _entry(0, 4, dtype="F37")}, 4, "tensor 'a' has dtype 'F37', which is not known"),
    "shape": ({"a": {**_entry(0, 4), "shape": [-2]}}, 4, r"tensor 'a' has shape \[-2\]"),
    "offsets": ({"a": {**_entry(0, 4), "data_offsets": [0]}}, 4, r"tensor 'a' has data_offsets \[0\]"),
    "offsets reversed": ({"a": _entry(4, 0, [2])}, 4, r"tensor 'a' has data_offsets \[4, 0\]"),
    "sizes differ": ({"a": _entry(0, 4, [3])}, 4, r"of shape \[3\] in F16 cannot have 4 bytes"),
    "hole": ({"a": _entry(0, 4), "b": _entry(6, 8)}, 8, r"tensor 'b' begins at byte \d+, not \d+"),
    "overlap": ({"a": _entry(0, 4), "b": _entry(2, 6)}, 6, r"tensor 'b' begins at byte \d+, not \d+"),
    "truncated": ({"a": _entry(0, 4)}, 3, r"it has \d+ bytes, but its header describes \d+"),
    "more": ({"a": _entry(0, 4)}, 5, r"it has \d+ bytes, but its header describes \d+"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_header_that_cannot_be_true_is_refused_with_the_file(fault: str, tmp_path: Path) -> None:
    header, num_bytes, message = FAULTS[fault]
    path = _write(tmp_path / "x.safetensors", header, num_bytes)
    with pytest.raises(ConfigError, match=rf"x\.safetensors is not a readable safetensors file: .*{message}"):
        read_header(path)


@pytest.mark.parametrize("content", [b"", b"1234567", (9).to_bytes(8, "little") + b"not json!", b"\xff" * 8 + b"{}"])
def test_what_is_no_header_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.safetensors is not a readable safetensors file: it"):
        read_header(tmp_path / "x.safetensors")


def test_a_number_of_less_than_a_byte_is_counted_in_bits(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", {"a": _entry(0, 3, [6], "F4")}, 3)
    assert read_header(path)["a"] == TensorEntry("F4", (6,), path.stat().st_size - 3, path.stat().st_size)
