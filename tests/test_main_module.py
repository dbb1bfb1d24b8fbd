"""`python -m rayllm`, and Ray's workers, in a working folder that holds modules by the names of installed ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHADOWS = ("tokenizers", "ray", "torch", "numpy", "httpx", "yaml", "json", "logging", "pydantic")


@pytest.fixture
def hostile_folder(tmp_path: Path) -> Path:
    """A working folder in which each import of those would fail."""
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('the working folder was searched for {name}')\n")
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise ImportError('the working folder was searched')\n")
    return tmp_path


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}


@pytest.mark.parametrize(
    "argv", [["version"], ["config", "show", "--json"], ["status", "http://127.0.0.1:1"], ["serve", "--prot", "1"]]
)
def test_the_command_takes_no_module_from_the_working_folder(argv: list[str], hostile_folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rayllm", *argv], cwd=hostile_folder, env=_environment(), capture_output=True, text=True
    )
    assert "the working folder was searched" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == {"version": 0, "config": 0, "status": 3, "serve": 2}[argv[0]], done.stderr


@pytest.mark.parametrize(
    ("path", "added"),
    [(["/usr/lib/none"], []), (["", "/usr/lib/none"], ["cwd"]), (["script"], ["script"])],
    ids=["installed command", "interactive", "script"],
)
def test_workers_take_modules_from_where_the_program_does(
    path: list[str], added: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.job_config  # noqa: F401  # while the path is what it was

    from rayllm.executor.ray_cluster import job_config

    script, cwd = str(tmp_path / "script"), str(tmp_path / "cwd")
    os.mkdir(cwd)
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", [script if folder == "script" else folder for folder in path])
    config = job_config()
    config._py_driver_sys_path.extend([script, cwd])  # what Ray adds when a program connects
    sent = list(config._get_proto_job_config().py_driver_sys_path)
    assert sent == [{"script": script, "cwd": cwd}[name] for name in added]
