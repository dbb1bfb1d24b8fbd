import pytest

from rayllm.errors import ConfigError
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
    with pytest.raises(ConfigError, match=expected):
        build_app(args)


def test_a_refused_key_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        build_app({"api_key": "sesame"})
    assert "sesame" not in str(caught.value)
