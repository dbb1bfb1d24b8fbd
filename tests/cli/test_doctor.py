import json
from pathlib import Path

import pytest

from rayllm.cli import doctor
from rayllm.cli.main import main


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def found(name: str) -> doctor.Finding:
    return next(finding for finding in doctor.examine() if finding.name == name)


def test_everything_is_looked_at_and_told_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert code == (0 if all(finding["ok"] for finding in findings) else 1)
    names = {finding["name"] for finding in findings}
    assert {"python", "ray", "torch", "gpus", "memory", "/dev/shm", "home", "open files", "ray token", "port"} <= names


def test_one_failure_is_exit_code_1_with_its_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_LEAST_SHM_BYTES", 2**60)
    assert main(["doctor"]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if "/dev/shm" in line]
    assert line.startswith("FAIL")
    assert "--shm-size=1g" in line


def test_a_token_that_others_can_read_is_found(home: Path) -> None:
    assert found("ray token").ok
    (home / ".ray").mkdir()
    token = home / ".ray" / "auth_token"
    token.write_text("x")
    token.chmod(0o644)
    assert not found("ray token").ok
    assert f"chmod 600 {token}" in found("ray token").fix
    token.chmod(0o600)
    assert found("ray token").ok


def test_a_ray_that_is_too_old_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayllm.cli.version.library_versions", lambda: {"ray": "2.9.3", "triton": None})
    ray, triton = doctor._libraries()
    assert (ray.ok, triton.ok) == (False, True)
    assert "2.50" in ray.fix


@pytest.mark.parametrize(
    ("driver", "torch", "ok"),
    [
        ("580.65.06", "2.13.0", True),
        ("570.10", "2.13.0+cu130", False),
        ("570.10", "2.13.0+cu128", True),
        ("580.65.06", "2.13.0+cpu", False),
    ],
)
def test_the_gpu_driver_must_fit_torch(driver: str, torch: str, ok: bool) -> None:
    assert doctor._driver(driver, torch).ok is ok
