"""All kernels, compiled for GPUs that are not there: no spills, shared memory in bounds, tensor cores used."""

from __future__ import annotations

from pathlib import Path

import pytest
from ahead_of_time import ARCHS, Report, launch_files, reports

pytestmark = [pytest.mark.kernels, pytest.mark.timeout(600)]

_FAULTY = """
import torch
import triton
import triton.language as tl
from ahead_of_time import meta
from rayllm_kernels.launch import launch

@triton.jit
def product(a_ptr, b_ptr, out_ptr, num_steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    at_M, at_N, at_K = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    sums = tl.zeros((M, N), tl.float32)
    for step in range(num_steps):
        a = tl.load(a_ptr + at_M * 4096 + step * K + at_K[None, :])
        b = tl.load(b_ptr + (step * K + at_K[:, None]) * 4096 + at_N)
        sums += tl.dot(a, b, input_precision="ieee")
    tl.store(out_ptr + at_M * 4096 + at_N, sums)

@triton.jit
def unknown_name(out_ptr):
    tl.store(out_ptr, nothing_of_this_name)

def launches(arch):
    x, y = meta(4096, 4096), meta(4096, 4096, dtype=torch.float32)
    launch(product, (1,), x, x, y, 64, M=64, N=64, K=64, num_warps=4, num_stages=3)
    launch(product, (2,), x, x, y, 64, M=64, N=64, K=64, num_warps=4, num_stages=3)
    launch(product, (1,), x, x, y, 64, M=128, N=256, K=64, num_warps=2, num_stages=1)
    launch(product, (1,), x, x, y, 64, M=128, N=128, K=64, num_warps=8, num_stages=8)
    launch(product, (1,), y, y, y, 64, M=16, N=32, K=16, num_warps=4, num_stages=1)
    launch(unknown_name, (1,), y)

REQUIRED = {"product": {90: "HGMMA", 100: "UTCHMMA"}}
"""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("path", launch_files(), ids=lambda path: path.parent.name)
def test_kernels_fit_the_gpu(path: Path, arch: int) -> None:
    found = reports(path, arch)
    faulty = [f"{report.kernel}({report.launch}): {'; '.join(faults)}" for report, faults in found if faults]
    assert not faulty, "\n".join(faulty)


def test_every_family_of_kernels_names_its_launches() -> None:
    sources = Path(__file__).parents[2] / "kernels" / "rayllm_kernels"
    kernels = [path for path in sources.rglob("*.py") if "@triton.jit" in path.read_text("utf-8")]
    families = {path.relative_to(sources).parts[0] for path in kernels}
    assert families | {"fake_cuda"} == {path.parent.name for path in launch_files()}


@pytest.mark.parametrize(
    ("arch", "instruction", "is_required"), [(80, "HMMA", False), (90, "HGMMA", True), (100, "UTCHMMA", True)]
)
def test_faults_are_found(arch: int, instruction: str, is_required: bool, tmp_path: Path) -> None:
    path = tmp_path / "launches.py"
    path.write_text(_FAULTY)
    good, spilled, large, wide, unknown = reports(path, arch)
    assert [report.kernel for report, _ in (good, unknown)] == ["product", "unknown_name"]
    assert good[1] == []
    assert good[0].has_narrow_dot
    assert good[0].instructions.keys() == {instruction}
    assert 32 <= good[0].registers <= 255
    assert any("spills" in fault for fault in spilled[1])
    assert ["bytes of shared memory" in fault for fault in large[1]] == [True]
    assert not wide[0].has_narrow_dot
    assert [f"contains no {instruction}" in fault for fault in wide[1]] == [True] * is_required
    assert ["nothing_of_this_name is not defined" in fault for fault in unknown[1]] == [True]


def test_a_product_without_tensor_cores_is_a_fault() -> None:
    report = Report("product", "", 90, registers=40, has_narrow_dot=True)
    assert report.faults() == ["multiplies without tensor cores"]


def test_a_file_that_fails_says_how(tmp_path: Path) -> None:
    path = tmp_path / "launches.py"
    path.write_text("def launches(arch):\n    raise ValueError('no such shape')\n")
    with pytest.raises(RuntimeError, match="no such shape"):
        reports(path, 90)


def test_every_family_of_kernels_has_its_errors_in_the_readme() -> None:
    root = Path(__file__).parents[2]
    table = (root / "kernels" / "README.md").read_text("utf-8").partition("### Errors and floors")[2]
    rows = " ".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    families = {path.parent.name for path in launch_files()} - {"fake_cuda"}
    assert {family for family in families if f"`{family}`" not in rows} == set()
