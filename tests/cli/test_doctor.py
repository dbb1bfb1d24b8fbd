import json
from pathlib import Path

import pytest

from rayllm.cli import doctor
from rayllm.cli.main import main
from rayllm.distributed.links import Link
from rayllm.errors import EngineError


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


def _fabric(monkeypatch: pytest.MonkeyPatch, num_gpus: int, links: list[Link] | Exception) -> list[doctor.Finding]:
    asked: list[tuple[int, str]] = []

    def check(num_ranks: int, device: str) -> list[Link]:
        asked.append((num_ranks, device))
        if isinstance(links, Exception):
            raise links
        return links

    monkeypatch.setattr("rayllm.config.count_gpus", lambda: num_gpus)
    monkeypatch.setattr("rayllm.executor.local_ranks.check_local_links", check)
    findings = doctor.examine_fabric()
    assert asked == ([] if num_gpus == 1 else [(num_gpus, "cuda")] if num_gpus else [(2, "cpu")])
    return findings


def test_each_two_gpus_have_a_finding_with_the_slower_end(monkeypatch: pytest.MonkeyPatch) -> None:
    links = [Link(0, 1, 10.0, 200.0), Link(1, 0, 12.4, 190.0), Link(1, 2, problem="got no answer within 5 s")]
    good, bad = _fabric(monkeypatch, 3, links)
    assert (good.name, good.ok, good.value) == ("link of gpus 0-1", True, "12 us, 190 GB/s")
    assert (bad.name, bad.ok, bad.value) == ("link of gpus 1-2", False, "1 got no answer within 5 s")
    assert "nvidia-smi topo -m" in bad.fix


def test_one_gpu_has_no_link_and_a_check_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _fabric(monkeypatch, 1, []) == [doctor.Finding("fabric", True, "one GPU: there is no link to check")]
    [failed] = _fabric(monkeypatch, 4, EngineError("rank 2 died"))
    assert (failed.ok, failed.fix) == (False, "rank 2 died")


def test_without_gpus_two_processes_are_checked_where_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [finding] = _fabric(monkeypatch, 0, [Link(0, 1, 90.0, 1.5), Link(1, 0, 80.0, 1.25)])
    assert (finding.name, finding.value) == ("link of processes 0-1", "90 us, 1.25 GB/s")
    main(["doctor", "--fabric"])
    assert "link of processes 0-1" in capsys.readouterr().out


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
