"""Compiles the Triton kernels for GPUs that are not there, and reads what would make them slow there.

    PYTHONPATH=tests:kernels:. python tests/ahead_of_time.py tests/kernels/FAMILY/launches.py ARCH

prints, as JSON, a report for each launch of that file on compute capability ARCH (80, 90, 100). The file defines
`launches(arch)`, which calls the family's functions on meta tensors (`meta`), with the shapes of real models; every
kernel they launch is compiled as it would be there. It may also define `REQUIRED = {kernel name: {arch: instruction}}`:
instructions (`HGMMA`) that the machine code must contain.

It runs in a process of its own, because TRITON_INTERPRET makes other functions of the kernels.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

KERNELS = Path(__file__).parent / "kernels"
ARCHS = (80, 90, 100)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""What one block may have (CUDA C++ Programming Guide, technical specifications per compute capability)."""

_NUM_PROCESSES = 2
_TENSOR_CORE = re.compile(r"\b(UTC[A-Z]+MMA|[HIQO]G?MMA)\b")
_NARROW_DOT = re.compile(r"tt\.dot[ _].*: tensor<[\dx]+x(?:f16|bf16|f8\w+|i8)\b")


@dataclass(frozen=True)
class Report:
    """What one kernel became."""

    kernel: str
    launch: str
    """Types of its arguments, and its constants."""
    arch: int
    error: str = ""
    """Why it did not compile."""
    registers: int = 0
    local_bytes: int = 0
    """Of a thread: spilled registers, and arrays that are not in registers."""
    shared_bytes: int = 0
    has_narrow_dot: bool = False
    """Whether it multiplies matrices of less than 32 bits an element."""
    instructions: dict[str, int] = field(default_factory=dict)
    """Tensor-core instructions in the machine code."""

    def faults(self, required: str | None = None) -> list[str]:
        """What is wrong with it, in words."""
        if self.error:
            return [f"does not compile: {self.error}"]
        found = []
        if self.local_bytes:
            found.append(f"spills {self.local_bytes} bytes with {self.registers} registers")
        if self.shared_bytes > SHARED_BYTES[self.arch]:
            found.append(f"takes {self.shared_bytes} bytes of shared memory, of {SHARED_BYTES[self.arch]}")
        if self.has_narrow_dot and not self.instructions:
            found.append("multiplies without tensor cores")
        if required and required not in self.instructions:
            found.append(f"contains no {required}, but {self.instructions}")
        return found


def launch_files() -> list[Path]:
    """Of all kernel families, and of whole steps."""
    return [*sorted(KERNELS.glob("*/launches.py")), Path(__file__).parent / "fake_cuda" / "launches.py"]


def reports(path: Path, arch: int) -> list[tuple[Report, list[str]]]:
    """Each distinct kernel that the launches of a file need, with its faults. RuntimeError with the
    output of the process where that fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"  # as Triton 3.6 to 3.9 do where nothing is said
    paths = [str(Path(__file__).parents[1] / folder) for folder in ("tests", "kernels", ".")]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, str(path), str(arch)], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{path} for {arch}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    required = json.loads(done.stdout)["required"]
    found = [Report(**entry) for entry in json.loads(done.stdout)["reports"]]
    return [(report, report.faults(required.get(report.kernel))) for report in found]


def meta(*shape: int, dtype: Any = None) -> Any:
    """A tensor without values. The compiler takes its address to be a multiple of 16."""
    import torch

    return torch.empty(shape, dtype=dtype or torch.bfloat16, device="meta")


# ------------------------------------------------------------------------------------------- in the compiling process


class _AbsentGpu:
    """What Triton asks of a driver in order to compile. The device's index is its compute capability."""

    def __init__(self, arch: int):
        self._arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return self._arch

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class _Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: Sequence[Any]
    constants: dict[str, Any]

    def __str__(self) -> str:
        types = [_type(arg) for arg in self.args]
        return ", ".join([*types, *(f"{name}={value}" for name, value in self.constants.items())])


def _type(arg: Any) -> str:
    return str(arg.dtype).removeprefix("torch.") if hasattr(arg, "dtype") else repr(arg)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("launches", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _recorded(module: ModuleType, arch: int) -> list[_Launch]:
    """The launches, each kind once."""
    from rayllm_kernels.device import interpreted
    from rayllm_kernels.launch import observed

    found: dict[tuple[str, str], _Launch] = {}

    def observe(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict[str, Any]) -> None:
        launch = _Launch(kernel, grid, tuple(args), dict(constants))
        found.setdefault((kernel.__name__, str(launch)), launch)

    with interpreted(), observed(observe):
        module.launches(arch)
    return list(found.values())


def _compiled(launch: _Launch, arch: int) -> Report:
    name = launch.kernel.__name__
    try:
        kernel = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.constants)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Report(name, str(launch), arch, error="\n".join([type(error).__name__, *lines[-6:]]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        code = _cuobjdump("--dump-sass", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions: dict[str, int] = {}
    for instruction in _TENSOR_CORE.findall(code):
        instructions[instruction] = instructions.get(instruction, 0) + 1
    return Report(
        kernel=name,
        launch=str(launch),
        arch=arch,
        registers=numbers["REG"],
        local_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=kernel.metadata.shared,
        has_narrow_dot=bool(_NARROW_DOT.search(kernel.asm["ttir"])),
        instructions=instructions,
    )


def _cuobjdump(what: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), what, path], capture_output=True, text=True, check=True).stdout


_launches: list[_Launch] = []


def _compile_numbered(number_and_arch: tuple[int, int]) -> Report:
    number, arch = number_and_arch
    return _compiled(_launches[number], arch)


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """What the compiler prints does not mix with the reports."""
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _main(path: Path, arch: int) -> None:
    from triton.runtime.driver import driver

    driver.set_active(_AbsentGpu(arch))  # type: ignore[arg-type]
    module = _module(path)
    _launches.extend(_recorded(module, arch))
    with _stdout_is_stderr(), multiprocessing.get_context("fork").Pool(_NUM_PROCESSES) as pool:
        found = pool.map(_compile_numbered, [(number, arch) for number in range(len(_launches))], chunksize=1)
    required = {kernel: by_arch.get(arch) for kernel, by_arch in getattr(module, "REQUIRED", {}).items()}
    print(json.dumps({"required": required, "reports": [asdict(report) for report in found]}))


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit() or not Path(sys.argv[1]).is_file():
        sys.exit("usage: python tests/ahead_of_time.py tests/kernels/FAMILY/launches.py 80|90|100")
    _main(Path(sys.argv[1]), int(sys.argv[2]))
