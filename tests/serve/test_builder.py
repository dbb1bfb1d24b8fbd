import json
import pickle
import shutil
from pathlib import Path

import pytest
from click import ClickException
from ray.serve.exceptions import RayServeException

from rayllm.errors import ConfigError
from rayllm.serve import builder
from rayllm.serve.builder import build_app


def test_the_application_has_an_ingress_over_an_engine() -> None:
    ingress = build_app({"tensor_parallel_size": "2", "num-ingress-replicas": 3})._bound_deployment
    assert (ingress.name, ingress.num_replicas) == ("Ingress", 3)
    assert ingress.max_ongoing_requests >= 10_000
    [engine] = (bound._bound_deployment for bound in ingress.init_args)
    assert (engine.name, engine.num_replicas) == ("Engine", 1)
    config, shutdown_timeout_s = engine.init_args
    assert config.tensor_parallel_size == 2
    assert engine._deployment_config.graceful_shutdown_timeout_s > shutdown_timeout_s


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"tensor_paralel_size": 2}, "did you mean 'tensor_parallel_size'"),
        ({"dtype": "int3"}, "dtype='int3'"),
        ({"port": 8000}, "http_options.port"),
        ({"api_key": "secret"}, "dashboard"),
    ],
)
def test_settings_that_do_not_belong_in_a_serve_config_are_refused(args: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build_app(args)
    assert isinstance(caught.value, RayServeException)  # of which Serve's status shows the message alone
    assert isinstance(caught.value, ClickException)  # and its command too
    assert str(pickle.loads(pickle.dumps(caught.value))) == caught.value.format_message()


def test_a_refused_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        build_app({"api_key": "sesame"})
    assert "sesame" not in str(caught.value)


def test_a_model_that_cannot_be_served_is_refused_before_serve_deploys_it(llama_path: Path, tmp_path: Path) -> None:
    model = shutil.copytree(llama_path, tmp_path / "model")
    build_app({"model": str(model), "tensor_parallel_size": 2, "device": "cuda"})  # devices are another machine's
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a readable safetensors file"):
        build_app({"model": str(model)})
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        build_app({"model": str(model)})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_attention_heads": "four"}))
    with pytest.raises(ConfigError, match=r"config\.json: num_attention_heads"):
        build_app({"model": str(model)})


def test_a_folder_may_be_on_other_machines_where_there_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="'/no/such/folder' does not exist"):
        build_app({"model": "/no/such/folder"})
    monkeypatch.setattr(builder, "_num_nodes", lambda: 2)
    build_app({"model": "/no/such/folder"})
