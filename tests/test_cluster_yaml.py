"""`cluster.yaml` for `ray up`: valid, careful with what it opens, and made of paths that exist."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def cluster() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "cluster.yaml").read_text()))


def test_ray_accepts_it(cluster: dict[str, Any]) -> None:
    validate_config(prepare_config(cluster))


def test_every_ray_start_asks_for_the_token(cluster: dict[str, Any]) -> None:
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    starts = [command for command in commands if "ray start" in command]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in command for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "RAY_enable_autoscaler_v2=0" in starts[0]


def test_it_serves_an_app_that_exists(cluster: dict[str, Any]) -> None:
    [deploy] = [command for command in cluster["head_start_ray_commands"] if "serve deploy" in command]
    assert (ROOT / deploy.split()[-1]).is_file()
    assert any("pip install" in command for command in cluster["setup_commands"])
