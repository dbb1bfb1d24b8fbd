from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayllm.errors import ConfigError
from rayllm.machine import folders, registry
from rayllm.machine.folders import check_working_folder, home_folder, log_folder, temporary_folders


def test_logs_go_to_the_named_folder_else_to_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "a home with spaces and ü"))
    monkeypatch.setenv("RLLM_LOG_DIR", str(tmp_path / "given"))
    assert log_folder() == tmp_path / "given"
    monkeypatch.delenv("RLLM_LOG_DIR")
    assert log_folder() == tmp_path / "a home with spaces and ü" / ".cache" / "rayllm" / "logs"


@pytest.mark.parametrize("home", ["/proc/no-such-home", "/dev/null"])
def test_where_the_home_folder_cannot_be_written_logs_go_to_a_temporary_folder(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", home)
    monkeypatch.delenv("RLLM_LOG_DIR", raising=False)
    assert log_folder() == Path(temporary_folders()[-1]) / f"rayllm-{os.getuid()}-logs"


def test_a_user_without_a_home_folder_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", none)
    monkeypatch.delenv("RLLM_LOG_DIR", raising=False)
    assert home_folder() is None
    assert log_folder().name.endswith("-logs")


def test_without_any_folder_for_temporary_files_tmp_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(folders.tempfile, "gettempdir", none)
    assert temporary_folders() == ["/tmp"]
    monkeypatch.setattr(registry, "_fault_of", lambda folder: "cannot be written")
    with pytest.raises(ConfigError, match=r"no usable runtime folder: .*'/tmp/rayllm-.*Set XDG_RUNTIME_DIR"):
        registry.runtime_folder()


def test_a_tmpdir_that_is_not_there_is_passed_over(tmp_path: Path) -> None:
    code = "from rayllm.machine.folders import temporary_folders; print(temporary_folders())"
    environment = {**os.environ, "TMPDIR": str(tmp_path / "missing")}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "['/tmp']"


def test_a_deleted_working_folder_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    check_working_folder()
    (tmp_path / "gone").rmdir()
    with pytest.raises(ConfigError, match="the working folder of this process was deleted: change to a folder that"):
        check_working_folder()


def test_serving_and_connecting_in_a_deleted_working_folder_say_so_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayllm.cli.main import main
    from rayllm.executor import ray_cluster
    from rayllm.executor.ray_cluster import connected_ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray_cluster, "ray_is_initialized", lambda: False)  # other tests may be connected
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["serve", "--port", "0"]) == 2
    assert capsys.readouterr().err.startswith("rayllm serve: the working folder of this process was deleted")
    with pytest.raises(ConfigError, match="was deleted"), connected_ray(num_cpus=1):
        pass
