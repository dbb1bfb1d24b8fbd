"""How many devices this process may use, found without importing torch."""

from __future__ import annotations

import glob
import os

from rayllm.config.environment import Environment


def count_gpus() -> int:
    """CUDA devices that this process may use, without importing torch."""
    devices = [path for path in glob.glob("/dev/nvidia[0-9]*") if path.removeprefix("/dev/nvidia").isdigit()]
    visible = Environment.cuda_visible_devices()
    if visible is None:
        return len(devices)
    return min(len(devices), len([part for part in visible.split(",") if part.strip() not in ("", "-1")]))


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
