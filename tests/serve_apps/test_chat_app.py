from pathlib import Path

import yaml
from ray.serve.schema import ServeDeploySchema

from rayllm.config import parse_settings
from rayllm.serve.builder import build_app

ROOT = Path(__file__).resolve().parents[2]


def test_the_app_and_its_builder_are_applications(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(ROOT))
    from serve_apps import chat

    assert chat.app._bound_deployment.name == "Ingress"
    assert chat.build({"model": ""})._bound_deployment.name == "Ingress"


def test_the_deploy_file_is_valid_and_stays_on_loopback() -> None:
    content = yaml.safe_load((ROOT / "serve_apps/config/chat.yaml").read_text())
    schema = ServeDeploySchema.model_validate(content)
    assert schema.http_options.host == "127.0.0.1"
    [application] = schema.applications
    assert application.import_path == f"{build_app.__module__}:{build_app.__name__}"
    parse_settings(application.args)  # type: ignore[arg-type]
    build_app(dict(application.args))  # type: ignore[call-overload]
