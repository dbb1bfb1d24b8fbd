from pathlib import Path

import pytest

from rayllm.cli.flags import UsageError
from rayllm.cli.serve import parse_serve
from rayllm.cli.serve import parser as serve_parser
from rayllm.config import EngineConfig, ServerConfig, parse_settings
from rayllm.errors import ConfigError
from rayllm.settings_file import read_settings_file

FLAGS = [
    "--allowed-hosts",
    "--allowed-origins",
    "--api-key",
    "--attention-backend",
    "--block-size",
    "--chat-template",
    "--chat-template-content-format",
    "--config",
    "--cpu-offload-gb",
    "--cuda-graphs",
    "--data-parallel-size",
    "--device",
    "--disable-custom-all-reduce",
    "--disable-custom-kernels",
    "--disable-log-stats",
    "--distributed-executor-backend",
    "--download-dir",
    "--driver-wait-s",
    "--dtype",
    "--enable-auto-tool-choice",
    "--enable-chunked-prefill",
    "--enable-expert-parallel",
    "--enable-fault-injection",
    "--enable-force-include-usage",
    "--enable-lora",
    "--enable-per-request-metrics",
    "--enable-prefix-caching",
    "--enable-tokenizer-info-endpoint",
    "--enforce-eager",
    "--generation-config",
    "--gpu-memory-utilization",
    "--help",
    "--hf-overrides",
    "--host",
    "--http-proxy",
    "--kv-cache-dtype",
    "--kv-cache-memory-bytes",
    "--load-format",
    "--log-file",
    "--log-format",
    "--lora-modules",
    "--max-cudagraph-capture-size",
    "--max-logprobs",
    "--max-model-len",
    "--max-num-batched-tokens",
    "--max-num-seqs",
    "--max-queued-requests",
    "--max-queued-tokens",
    "--model",
    "--model-impl",
    "--name",
    "--no-disable-custom-all-reduce",
    "--no-disable-custom-kernels",
    "--no-disable-log-stats",
    "--no-enable-auto-tool-choice",
    "--no-enable-chunked-prefill",
    "--no-enable-expert-parallel",
    "--no-enable-fault-injection",
    "--no-enable-force-include-usage",
    "--no-enable-lora",
    "--no-enable-per-request-metrics",
    "--no-enable-prefix-caching",
    "--no-enable-tokenizer-info-endpoint",
    "--no-enforce-eager",
    "--no-return-tokens-as-token-ids",
    "--no-skip-tokenizer-init",
    "--no-trust-remote-code",
    "--no-trust-request-chat-template",
    "--num-ingress-replicas",
    "--num-kv-blocks",
    "--otlp-traces-endpoint",
    "--override-generation-config",
    "--pipeline-parallel-size",
    "--pooler-config",
    "--port",
    "--quantization",
    "--read-timeout-s",
    "--reasoning-parser",
    "--return-tokens-as-token-ids",
    "--revision",
    "--runner",
    "--seed",
    "--served-model-name",
    "--shutdown-timeout",
    "--shutdown-timeout-s",
    "--skip-tokenizer-init",
    "--speculative-config",
    "--standby",
    "--swap-space",
    "--task",
    "--tensor-parallel-size",
    "--tokenizer",
    "--tokenizer-mode",
    "--tool-call-parser",
    "--trust-remote-code",
    "--trust-request-chat-template",
    "-dp",
    "-ep",
    "-h",
    "-pp",
    "-q",
    "-tp",
]
NOT_FIELDS = {
    "--config",
    "--help",
    "--no-disable-custom-all-reduce",
    "--no-disable-custom-kernels",
    "--no-disable-log-stats",
    "--no-enable-auto-tool-choice",
    "--no-enable-chunked-prefill",
    "--no-enable-expert-parallel",
    "--no-enable-fault-injection",
    "--no-enable-force-include-usage",
    "--no-enable-lora",
    "--no-enable-per-request-metrics",
    "--no-enable-prefix-caching",
    "--no-enable-tokenizer-info-endpoint",
    "--no-enforce-eager",
    "--no-return-tokens-as-token-ids",
    "--no-skip-tokenizer-init",
    "--no-trust-remote-code",
    "--no-trust-request-chat-template",
    "--shutdown-timeout",
}


def test_the_flags_of_serve_are_these() -> None:
    assert serve_parser().option_names() == FLAGS


def test_flags_and_config_fields_are_one() -> None:
    long = {flag for flag in FLAGS if flag.startswith("--")} - NOT_FIELDS
    fields = {*EngineConfig.model_fields, *ServerConfig.model_fields}
    assert long == {"--" + field.replace("_", "-") for field in fields}


def test_values_are_converted_by_the_config() -> None:
    engine, server = parse_serve(
        ["model", "-tp", "2", "--no-enable-prefix-caching", "--port=0", "--api-key", "a", "--api-key", "b"]
    )
    assert (engine.model, engine.tensor_parallel_size, engine.enable_prefix_caching) == ("model", 2, False)
    assert (server.port, server.api_key) == (0, ("a", "b"))


def test_what_is_not_given_keeps_its_default() -> None:
    engine, server = parse_serve([])
    assert engine == EngineConfig.parse({})
    assert server == ServerConfig.parse({})


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("max-num-seqs: 8\nport: 9000\nenable_prefix_caching: false\n")
    engine, server = parse_serve(["--config", str(file), "--max-num-seqs", "16"])
    assert (engine.max_num_seqs, engine.enable_prefix_caching, server.port) == (16, False, 9000)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tensor_paralel_size: 2", "did you mean 'tensor_parallel_size'?"),
        ("prt: 2", "did you mean 'port'?"),
        ("port: [1", "is not YAML"),
        ("- port", "must hold lines of 'setting: value'"),
        ("port: eight", "port='eight'"),
    ],
)
def test_a_bad_config_file_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_settings(read_settings_file(str(file)))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flag_without_its_value_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--port"):
        parse_serve(["--port"])


def test_keys_come_from_files_too(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    server: ServerConfig = ServerConfig.parse({"api_key": [f"@{file}", "three"]})
    assert server.read_api_keys() == ("one", "two", "three")


def test_an_empty_key_is_refused() -> None:
    server: ServerConfig = ServerConfig.parse({"api_key": ""})
    with pytest.raises(ConfigError, match="api_key is empty"):
        server.read_api_keys()


def test_several_names_may_follow_one_flag() -> None:
    for argv, names in (
        (["--served-model-name", "a"], ("a",)),
        (["model", "--served-model-name", "a", "b", "org/c", "--port", "1"], ("a", "b", "org/c")),
        ([], ()),
    ):
        engine, _ = parse_serve(argv)
        assert engine.served_model_names == names


def test_a_folder_behind_the_names_was_meant_as_the_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give MODEL before"):
        parse_serve(["--served-model-name", "a", str(tmp_path)])


@pytest.mark.parametrize("names", [["a", "a"], ["a", ""], [""]])
def test_names_that_say_nothing_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigError, match="served_model_name"):
        parse_serve(["--served-model-name", *names])
