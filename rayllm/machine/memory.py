"""Memory of this machine and of its GPUs, found without torch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_NVIDIA_SMI_TIMEOUT_S = 10.0


def gpu_bytes() -> int | None:
    """Memory of the smallest NVIDIA GPU here, in bytes; None where `nvidia-smi` does not tell."""
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(
            command, capture_output=True, text=True, timeout=_NVIDIA_SMI_TIMEOUT_S, check=True
        ).stdout
        return min(int(line) for line in printed.splitlines() if line.strip()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def available_host_bytes() -> int:
    """Memory that can still be taken here without swapping, in bytes: what the host has (`MemAvailable`), but no more
    than the container may."""
    host = _lines_of(Path("/proc/meminfo")).get("MemAvailable:")
    if host is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    container = container_bytes()
    return host * 1024 if container is None else min(host * 1024, container)


def container_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What this container's limit leaves, in bytes; None without a limit. Files in memory that the kernel may drop do
    not count as used, as with Kubernetes (https://docs.kernel.org/admin-guide/cgroup-v2.html, and v1 before it)."""
    for limit, used, folder, droppable in (
        ("memory.max", "memory.current", root, "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", root / "memory", "total_inactive_file"),
    ):
        try:
            limit_bytes, used_bytes = int((folder / limit).read_text()), int((folder / used).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        dropped_bytes = _lines_of(folder / "memory.stat").get(droppable, 0)
        return max(0, limit_bytes - used_bytes + dropped_bytes)
    return None


def _lines_of(file: Path) -> dict[str, int]:
    """Each line's name and number."""
    try:
        lines = [line.split() for line in file.read_text("ascii").splitlines()]
    except OSError:
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
