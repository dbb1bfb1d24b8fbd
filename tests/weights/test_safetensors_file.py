"""Tensors of a mapped safetensors file: as the library reads them, without a copy, and given back when unused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rayllm.errors import ConfigError
from rayllm.weights.safetensors_file import SafetensorsFile

TENSORS = {
    "matrix": torch.randn(40, 24).bfloat16(),
    "experts": torch.randn(3, 5, 7),
    "scales": torch.randint(0, 255, (4, 6), dtype=torch.uint8),
    "fp8": torch.randn(8, 8).to(torch.float8_e4m3fn),
    "number": torch.tensor(3.5, dtype=torch.float16),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False, True]),
}
PARTS = {
    "matrix": [(slice(0, 40), slice(0, 24)), (slice(3, 17), slice(0, 24)), (slice(0, 40), slice(5, 9)), (slice(4, 4),)],
    "experts": [(slice(1, 2), slice(0, 5), slice(2, 6)), (slice(2, 3),)],
    "scales": [(slice(1, 3), slice(2, 4))],
    "fp8": [(slice(2, 5), slice(0, 8))],
    "number": [()],
    "empty": [(slice(0, 0), slice(0, 3))],
    "flags": [(slice(1, 3),)],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("name", TENSORS)
def test_parts_of_a_tensor_are_what_the_library_reads(name: str, path: Path) -> None:
    file = SafetensorsFile(path)
    with safe_open(path, framework="pt") as known:
        assert file.get_slice(name).get_dtype() == known.get_slice(name).get_dtype()
        assert file.get_slice(name).get_shape() == list(TENSORS[name].shape)
        for part in PARTS[name]:
            found, expected = file.get_slice(name)[part], TENSORS[name][part]
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found.view(torch.uint8) if name == "fp8" else found,
                               expected.view(torch.uint8) if name == "fp8" else expected)  # fmt: skip


def test_a_tensor_outlives_its_file(path: Path) -> None:
    found = SafetensorsFile(path).get_slice("matrix")[(slice(0, 40),)]
    path.unlink()
    assert torch.equal(found, TENSORS["matrix"])


def test_a_type_that_torch_lacks_is_named(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"12")
    with pytest.raises(ConfigError, match=r"x\.safetensors: tensor 'a' has dtype F4; known are F64, F32"):
        SafetensorsFile(tmp_path / "x.safetensors").get_slice("a")[(slice(0, 4),)]


def _resident_bytes(path: Path) -> int:
    """Of this process's mappings of the file."""
    blocks = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    found = [re.search(r"Rss:\s+(\d+) kB", block) for block in blocks if str(path) in block]
    return sum(int(rss[1]) * 1024 for rss in found if rss)


def test_pages_are_given_back_when_nobody_holds_the_tensor(tmp_path: Path) -> None:
    path, num_bytes = tmp_path / "x.safetensors", 8 * 2**20
    save_file({name: torch.ones(num_bytes // 4) for name in ("a", "b")}, path)
    file = SafetensorsFile(path)
    kept = file.get_slice("a")[(slice(0, num_bytes // 4),)]
    half = file.get_slice("b")[(slice(0, num_bytes // 8),)]
    assert kept.sum() == num_bytes // 4
    assert half.sum() == num_bytes // 8
    assert _resident_bytes(path) >= num_bytes * 3 // 2
    before = _resident_bytes(path)
    del half
    assert before - _resident_bytes(path) >= num_bytes // 2 - 2 * 4096
    assert kept.sum() == num_bytes // 4
