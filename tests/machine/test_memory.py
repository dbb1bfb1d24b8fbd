from __future__ import annotations

from pathlib import Path

import pytest

from rayllm.machine import memory


def test_the_smallest_gpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 24576\necho 81559\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memory.gpu_bytes() == 24 * 2**30
    program.write_text("#!/bin/sh\nexit 9\n")
    assert memory.gpu_bytes() is None
    program.unlink()
    assert memory.gpu_bytes() is None


def test_this_host_has_memory() -> None:
    assert memory.available_host_bytes() > 2**20


@pytest.mark.parametrize(
    ("folder", "limit", "used", "droppable"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
    ids=["v2", "v1"],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, folder: str, limit: str, used: str, droppable: str
) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    assert memory.container_bytes(tmp_path) is None
    (tmp_path / folder / limit).write_text("1000000\n")
    (tmp_path / folder / used).write_text("700000\n")
    assert memory.container_bytes(tmp_path) == 300_000
    (tmp_path / folder / "memory.stat").write_text(f"anon 500000\n{droppable} 200000\n")
    assert memory.container_bytes(tmp_path) == 500_000


def test_a_container_without_a_limit_has_all(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    assert memory.container_bytes(tmp_path) is None


def test_the_lesser_of_host_and_container_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available_host_bytes()
    monkeypatch.setattr(memory, "container_bytes", lambda: 12345)
    assert memory.available_host_bytes() == 12345
    monkeypatch.setattr(memory, "container_bytes", lambda: 2 * whole + 2**40)
    assert memory.available_host_bytes() < 2 * whole
