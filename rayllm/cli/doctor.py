"""`rayllm doctor`: what this machine has for RayLLM, and what is missing."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rayllm.cli.flags import Parser
from rayllm.cli.table import amount
from rayllm.errors import ConfigError
from rayllm.machine.folders import home_folder
from rayllm.machine.ray_token import token_file

if TYPE_CHECKING:
    from rayllm.distributed.links import Link

_LEAST_MEMORY_BYTES = 2 * 2**30
_LEAST_SHM_BYTES = 256 * 2**20
_LEAST_DISK_BYTES = 2 * 2**30
_LEAST_FILES = 4096
_LEAST_PROCESSES = 1024
_CPU_RANKS = 2
_LEAST_RAY, _FIRST_RAY_TOO_NEW = (2, 50), (3,)
_LEAST_DRIVER_CUDA_12, _LEAST_DRIVER_CUDA_13 = (525, 60), (580,)


@dataclass(frozen=True)
class Finding:
    """One thing looked at; `fix` says what to do where it is not ok."""

    name: str
    ok: bool
    value: str
    fix: str = ""


def parser() -> Parser:
    made = Parser(prog="rayllm doctor", description="Check this machine and what is installed on it.")
    made.add_argument(
        "--fabric",
        action="store_true",
        help="also check the link between each two GPUs of this machine (without GPUs: between two processes)",
    )
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints the findings; 1 when one of them keeps RayLLM from working."""
    given = parser().parse(argv)
    findings = examine()
    if given.get("fabric"):
        findings += examine_fabric()
    if given.get("json"):
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            fix = f": {finding.fix}" if not finding.ok else ""
            print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.name:<{width}}  {finding.value}{fix}")
    return 0 if all(finding.ok for finding in findings) else 1


def examine() -> list[Finding]:
    """Looks at everything; nothing heavy is imported, nothing is started."""
    from rayllm.config import count_cores
    from rayllm.machine.folders import log_folder
    from rayllm.machine.memory import available_host_bytes

    return [
        Finding("python", sys.version_info >= (3, 10), sys.version.split()[0], "use Python 3.10 or newer"),
        Finding("system", sys.platform.startswith("linux"), sys.platform, "use Linux, or WSL on Windows"),
        *_libraries(),
        Finding("cpu cores", True, str(count_cores())),
        *_gpus(),
        _at_least(
            "memory", available_host_bytes(), _LEAST_MEMORY_BYTES, "RayLLM and Ray need about this much to start"
        ),
        _at_least("/dev/shm", _free_disk("/dev/shm"), _LEAST_SHM_BYTES, "in a container: --shm-size=1g"),
        _at_least("/tmp", _free_disk("/tmp"), _LEAST_DISK_BYTES, "free disk space: Ray keeps its session there"),
        _at_least(
            "home",
            _free_disk(str(home_folder())),
            _LEAST_DISK_BYTES,
            "free disk space: models and logs are stored there",
        ),
        _writable("log folder", log_folder(), "set RLLM_LOG_DIR"),
        _runtime_folder(),
        _limit("open files", "RLIMIT_NOFILE", _LEAST_FILES, "ulimit -n 65536"),
        _limit("processes", "RLIMIT_NPROC", _LEAST_PROCESSES, "ulimit -u 16384"),
        _token(),
        _port(),
    ]


def examine_fabric() -> list[Finding]:
    """Has each two GPUs of this machine exchange messages, from processes that are started for it."""
    from rayllm.config import count_gpus
    from rayllm.errors import EngineError
    from rayllm.executor.local_ranks import check_local_links

    num_gpus = count_gpus()
    if num_gpus == 1:
        return [Finding("fabric", True, "one GPU: there is no link to check")]
    try:
        links = check_local_links(num_gpus or _CPU_RANKS, "cuda" if num_gpus else "cpu")
    except EngineError as error:
        return [Finding("fabric", False, "not checked", str(error))]
    kind = "link of gpus" if num_gpus else "link of processes"
    by_pair: dict[tuple[int, int], list[Link]] = {}
    for link in links:
        by_pair.setdefault((min(link.rank, link.peer), max(link.rank, link.peer)), []).append(link)
    return [_link(f"{kind} {a}-{b}", seen) for (a, b), seen in sorted(by_pair.items())]


def _link(name: str, seen: Sequence[Link]) -> Finding:
    """A pair, as its two ends saw it."""
    if problems := [f"{link.rank} {link.problem}" for link in seen if link.problem]:
        fix = "see 'nvidia-smi topo -m' and the kernel's log, disable PCIe ACS; pairs not shown were not checked"
        return Finding(name, False, ", ".join(problems), fix)
    latency_us, rate = max(link.latency_us for link in seen), min(link.gigabytes_per_s for link in seen)
    return Finding(name, True, f"{latency_us:.0f} us, {rate:.3g} GB/s")


def _libraries() -> list[Finding]:
    from rayllm.cli.version import library_versions

    found = []
    for name, version in library_versions().items():
        if version is None:
            optional = name == "triton"  # of use on GPUs alone
            found.append(Finding(name, optional, "not installed", "pip install rayllm"))
        elif name == "ray" and not _LEAST_RAY <= _numbers(version) < _FIRST_RAY_TOO_NEW:
            found.append(Finding(name, False, version, "pip install 'ray[serve]>=2.50,<3'"))
        else:
            found.append(Finding(name, True, version))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _gpus() -> list[Finding]:
    """Devices, and the driver where there are any."""
    from rayllm.cli.version import library_versions
    from rayllm.config import count_gpus

    count = count_gpus()
    if not count:
        return [Finding("gpus", True, "none: RayLLM runs on the CPU")]
    try:
        version = Path("/sys/module/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        fix = "GPU devices were found but no driver: install it, or give the container access to it"
        return [Finding("gpus", True, str(count)), Finding("gpu driver", False, "not found", fix)]
    return [Finding("gpus", True, str(count)), _driver(version, library_versions()["torch"] or "")]


def _driver(version: str, torch: str) -> Finding:
    """Whether the driver is new enough for the CUDA that torch was built with."""
    if torch.endswith("+cpu"):
        return Finding("gpu driver", False, version, f"torch {torch} has no CUDA support: install the CUDA build")
    least = _LEAST_DRIVER_CUDA_12 if "+cu12" in torch else _LEAST_DRIVER_CUDA_13
    fix = f"torch {torch} needs {'.'.join(map(str, least))} or newer"
    return Finding("gpu driver", _numbers(version) >= least, version, fix)


def _at_least(name: str, value: int, least: int, fix: str) -> Finding:
    return Finding(name, value >= least, f"{amount(value)} free", f"at least {amount(least)} are needed; {fix}")


def _free_disk(path: str) -> int:
    return shutil.disk_usage(path).free if os.path.isdir(path) else 0


def _writable(name: str, folder: Path, fix: str) -> Finding:
    """Whether the folder, or the nearest one above that is there, takes files."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return Finding(name, os.access(there, os.W_OK), str(folder), f"it cannot be written: {fix}")


def _runtime_folder() -> Finding:
    from rayllm.machine.registry import runtime_folder

    try:
        return Finding("runtime folder", True, str(runtime_folder()))
    except ConfigError as error:
        return Finding("runtime folder", False, "not usable", str(error))


def _limit(name: str, which: str, least: int, fix: str) -> Finding:
    """A limit on this user's processes; Ray takes some for every worker."""
    try:
        import resource

        limit = resource.getrlimit(getattr(resource, which))[1]  # the hard one: Ray raises the soft one to it
    except (ImportError, AttributeError):
        return Finding(name, True, "no limit known")
    if limit == resource.RLIM_INFINITY:
        return Finding(name, True, "no limit")
    return Finding(name, limit >= least, str(limit), f"at least {least} are needed; {fix}")


def _token() -> Finding:
    """Ray's token lets its holder run code: nobody else may read it."""
    path = token_file()
    if path is None:
        return Finding("ray token", True, "no home folder: created at each start")
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return Finding("ray token", True, "none yet: created at the first start")
    return Finding(
        "ray token", not mode & 0o077, f"{path}, mode {mode:o}", f"other users can read it: chmod 600 {path}"
    )


def _port() -> Finding:
    from rayllm.config import ServerConfig
    from rayllm.machine.ports import check_port

    server: ServerConfig = ServerConfig.parse({})
    try:
        check_port(server.host, server.port)
    except ConfigError as error:
        return Finding("port", True, f"{server.port} is in use ({error}); give rayllm serve another --port")
    return Finding("port", True, f"{server.port} is free")
