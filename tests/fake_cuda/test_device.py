"""What the fake CUDA device notes, and that nothing which a GPU would wait for escapes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_device import build_guard

pytestmark = pytest.mark.kernels

_NAMES = ("launches", "copies_to_device", "copies_to_host", "blocking_copies", "waits", "mismatches")
_SETUP = """
import json, sys
from pathlib import Path
import numpy as np
import torch
from fake_device import fake_cuda

def note(log, found):
    found.append({name: sum(getattr(log, name).values()) for name in NAMES if getattr(log, name)})
    log.begin()

with fake_cuda(Path(sys.argv[1])) as log:
    on_device, on_host = torch.randn(4, 3, device="cuda"), torch.ones(4)
    pinned, found = torch.empty(4, pin_memory=True), []
    log.begin()
""".replace("NAMES", str(_NAMES))

CASES = {
    "on_device + 1": {"launches": 1},
    "on_device.view(12)[2:].t()": {},
    "torch.empty(9, device='cuda')": {},
    "torch.zeros(9, device='cuda')": {"launches": 1},
    "on_device.double()": {"launches": 1},
    "on_device @ on_device.T": {"launches": 1},
    "on_host.to('cuda')": {"copies_to_device": 1, "blocking_copies": 1},
    "on_host.to('cuda', non_blocking=True)": {"copies_to_device": 1, "blocking_copies": 1},
    "torch.tensor([1, 2], device='cuda')": {"copies_to_device": 1, "blocking_copies": 1},
    "pinned.to('cuda', non_blocking=True)": {"copies_to_device": 1},
    "on_device[0, :2].copy_(pinned[2:], non_blocking=True)": {"copies_to_device": 1},
    "on_device[0, :2].copy_(pinned[2:])": {"copies_to_device": 1, "blocking_copies": 1},
    "pinned[:3].copy_(on_device[0], non_blocking=True)": {"copies_to_host": 1},
    "on_device.cpu()": {"copies_to_host": 1, "waits": 1},
    "on_device.cpu().numpy() + 1": {"copies_to_host": 1, "waits": 1},
    "on_device.tolist()": {"waits": 1},
    "on_device.sum().item()": {"launches": 1, "waits": 1},
    "bool((on_device > 0).all())": {"launches": 2, "waits": 1},
    "float(on_device[0, 0])": {"waits": 1},
    "on_device.nonzero()": {"waits": 1},
    "on_device[on_device > 0] = 0": {"launches": 2, "waits": 1},
    "on_device[torch.tensor([1, 2])]": {"launches": 1, "mismatches": 1},
    "on_device[[1, 2]]": {"launches": 1, "copies_to_device": 1, "blocking_copies": 1},
    "torch.cuda.synchronize()": {"waits": 1},
    "event = torch.cuda.Event(); event.record(); event.synchronize()": {"waits": 1},
    "assert (on_host + 1).tolist() == [2, 2, 2, 2]": {},
    "assert torch.from_numpy(np.arange(3)).sum() == 3": {},
}


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_guard(tmp_path_factory.mktemp("guard"))


def _run(lines: list[str], guard: Path) -> subprocess.CompletedProcess[str]:
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "kernels")]
    code = _SETUP + "".join(f"    {line}\n" for line in lines)
    return subprocess.run(
        [sys.executable, "-c", code, str(guard)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_each_operation_is_noted_for_what_a_gpu_would_do(guard: Path) -> None:
    lines = [line for code in CASES for line in (code, "note(log, found)")]
    done = _run([*lines, "print(json.dumps(found))"], guard)
    assert done.returncode == 0, done.stderr[-3000:]
    assert dict(zip(CASES, json.loads(done.stdout), strict=True)) == CASES


def test_tensors_of_two_devices_do_not_mix(guard: Path) -> None:
    assert "Expected all tensors to be on the same device" in _run(["on_device[:, 0] + on_host"], guard).stderr
