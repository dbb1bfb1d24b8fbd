"""The configurations in serve_apps/README.md are ones that Serve and RayLLM take."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from docs import ROOT, fenced
from ray.serve.schema import ServeDeploySchema

from rayllm.serve.builder import _parse, build_app

_SERVICES = [block for document, block in fenced("yaml") if document == "serve_apps/README.md" and "kind:" in block]


@pytest.fixture(params=_SERVICES)
def service(request: pytest.FixtureRequest) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(request.param)
    return loaded


def test_there_is_a_ray_service() -> None:
    assert len(_SERVICES) == 1


def test_the_serve_configuration_of_the_ray_service_is_rayllms(service: dict[str, Any]) -> None:
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = schema.applications
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    engine, server = _parse(dict(application.args))  # type: ignore[call-overload]
    workers = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert sum(group["replicas"] for group in workers) == engine.tensor_parallel_size
    assert server.api_key, "it listens on all interfaces"


def test_the_pods_mount_what_the_configuration_names(service: dict[str, Any]) -> None:
    cluster = service["spec"]["rayClusterConfig"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    for pod in (head, *(group["template"]["spec"] for group in cluster["workerGroupSpecs"])):
        [container] = pod["containers"]
        mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
        assert mounted["models"] == "/models"
    assert "/etc/rayllm" in {mount["mountPath"] for mount in head["containers"][0]["volumeMounts"]}


def test_the_variables_of_the_table_are_those_of_cluster_yaml() -> None:
    text = (ROOT / "serve_apps/README.md").read_text(encoding="utf-8")
    table = set(re.findall(r"`(RAY_\w+=[\w.]+)`", text)) - {"RAY_ADDRESS=auto"}
    commands = " ".join(yaml.safe_load((ROOT / "cluster.yaml").read_text())["head_start_ray_commands"])
    assert table
    assert table <= set(commands.split())
