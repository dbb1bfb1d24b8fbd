"""Command lines for vLLM's servers are `rayllm serve`'s, but for what cannot be served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rayllm.cli.dotted_flags import join_dotted
from rayllm.cli.flags import UsageError
from rayllm.cli.serve import parse_serve, parser
from rayllm.cli.vllm_flags import _ONE_VALUE, _REFUSED, _WITH_VALUE, _WITHOUT_VALUE, translate, translate_setting
from rayllm.config import EngineConfig, ServerConfig, parse_settings
from rayllm.errors import ConfigError
from rayllm.layout import ParallelLayout


def _parsed(line: str) -> tuple[EngineConfig, ServerConfig]:
    argv, _ = translate(line.split())
    return parse_serve(argv)


def test_the_documents_servers_are_understood() -> None:
    engine, _ = _parsed("--model DIR --served-model-name glm-4-9b-chat --max-model-len=2048 --trust-remote-code")
    assert (engine.model, engine.max_model_len, engine.trust_remote_code) == ("DIR", 2048, True)
    assert "glm-4-9b-chat" in (engine.served_model_name or "")
    engine, server = _parsed(
        "--model facebook/opt-125m --port 8000 --tensor-parallel-size 2 --gpu-memory-utilization 0.8 "
        "--max-model-len 2048 --host 0.0.0.0"
    )
    assert (engine.tensor_parallel_size, engine.gpu_memory_utilization) == (2, 0.8)
    assert (server.host, server.port) == ("0.0.0.0", 8000)
    engine, _ = _parsed(
        "--model jinaai/jina-embeddings-v4-vllm-retrieval --max-model-len 8768 --trust-remote-code --enforce-eager "
        "--disable-custom-all-reduce --disable-custom-kernels --gpu-memory-utilization 0.9"
    )
    assert engine.enforce_eager
    assert engine.disable_custom_all_reduce
    assert engine.disable_custom_kernels
    engine, _ = _parsed("Qwen/Qwen3-30B-A3B -tp 2 --enable-expert-parallel")
    assert engine.layout == ParallelLayout(tp=2, expert_parallel=True)
    engine, _ = _parsed(
        "Qwen/Qwen2-0.5B-Instruct --chat-template ./template_chatml.jinja --trust-remote-code --tensor-parallel-size 1 "
        "--dtype half -pp 1"
    )
    assert (engine.model, engine.chat_template) == ("Qwen/Qwen2-0.5B-Instruct", "./template_chatml.jinja")
    assert engine.dtype == "float16"


def test_no_setting_of_rayllm_is_taken_for_another_engines() -> None:
    ours = set(parser().option_names())
    assert not ours & {*_WITHOUT_VALUE, *_WITH_VALUE, *_ONE_VALUE, *_REFUSED}


def test_flags_may_have_underscores() -> None:
    engine, _ = _parsed("--max_model_len=64 --max_num_seqs 8 --trust_remote_code")
    assert (engine.max_model_len, engine.max_num_seqs, engine.trust_remote_code) == (64, 8, True)


def test_flags_without_effect_are_named_and_taken_out() -> None:
    argv, notes = translate(
        [
            "a_b",
            "--disable-log-requests",
            "--uvicorn-log-level=warning",
            "--max-log-len",
            "80",
            "--response-role",
            "assistant",
        ]
    )
    assert argv == ["a_b"]
    assert [note.split(" has no effect: ")[0] for note in notes] == [
        "--disable-log-requests",
        "--uvicorn-log-level warning",
        "--max-log-len 80",
    ]


def test_origins_come_as_a_json_list_or_one_by_one() -> None:
    _, server = _parsed('--allowed-origins ["http://a","http://b"] --allowed-origins http://c')
    assert server.allowed_origins == ("http://a", "http://b", "http://c")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--ssl-keyfile k.pem", "--ssl-keyfile is not supported: this server speaks plain HTTP"),
        ("--rope-scaling {}", "--rope-scaling is not supported: change it by --hf-overrides"),
        ("--response-role tool", "--response-role tool is not supported: answers are always the assistant's"),
        (
            "--logprobs-mode processed_logits",
            "--logprobs-mode processed_logits is not supported: .*; give raw_logprobs",
        ),
        ("--tool-server demo", "--tool-server is not supported: tools are called by the client"),
        ('--structured-outputs-config {"reasoning_parser":"x"}', "'reasoning_parser' is not supported"),
        ("--structured-outputs-config x", "give a JSON object"),
        ("--override-generation-config.temperature", "argument --override-generation-config.temperature: expected one"),
        ("--override-generation-config.a 1 --override-generation-config.a.b 2", "'a' already has a value"),
        ("--hf-overrides x --hf-overrides.a 1", "argument --hf-overrides: 'x' is not a JSON object"),
        ("--max-log-len", "argument --max-log-len: expected one argument"),
        ("--allowed-origins [1]", r"--allowed-origins \[1\]: give an origin, or a JSON list"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        translate(line.split())


@pytest.mark.parametrize(
    "line",
    [
        "-O3",
        "-O 3",
        "-O.mode 3",
        "--compilation-config.mode 3",
        '--compilation-config {"level":3}',
        "--max-seq-len-to-capture 4096",
        "--no-enable-eplb",
        "--no-async-scheduling",
        '--limit-mm-per-prompt {"image":0}',
        "--limit-mm-per-prompt.image 0",
        '--structured-outputs-config.backend "xgrammar"',
        "--distributed-executor-backend mp",
        "--scheduling-policy=priority",
    ],
)
def test_what_changes_nothing_is_noted_once(line: str) -> None:
    argv, notes = translate(["MODEL", *line.split(), "--seed", "1"])
    assert argv == ["MODEL", "--seed", "1"]
    [note] = notes
    assert " has no effect: " in note


@pytest.mark.parametrize(
    "sizes", ["--cuda-graph-sizes 1 4 2", "--cudagraph-capture-sizes=[1,4,2]", "--cuda-graph-sizes 4"]
)
def test_of_vllms_sizes_of_graphs_the_largest_counts(sizes: str) -> None:
    engine, _ = _parsed(f"MODEL {sizes} --seed 1")
    assert (engine.max_cudagraph_capture_size, engine.seed) == (4, 1)
    assert translate_setting("cudagraph_capture_sizes", [1, 4, 2]) == ("max_cudagraph_capture_size", "")


def test_flags_that_have_another_name_here_are_translated() -> None:
    engine, server = _parsed("--num-gpu-blocks-override 100 --kv-cache-memory=1G -asc 2")
    assert (engine.num_kv_blocks, engine.kv_cache_memory_bytes, server.num_ingress_replicas) == (100, 2**30, 2)


@pytest.mark.parametrize(
    ("line", "overrides"),
    [
        ("--override-generation-config.temperature 0.5", {"temperature": 0.5}),
        (
            "--override-generation-config.top_k=5 --override_generation_config.temperature 1",
            {"top_k": 5, "temperature": 1},
        ),
        (
            '--override-generation-config {"top_p":0.5,"top_k":1} --override-generation-config.top_k 9',
            {"top_p": 0.5, "top_k": 9},
        ),
    ],
)
def test_entries_of_json_values_may_be_flags(line: str, overrides: dict[str, float]) -> None:
    engine, _ = _parsed(line)
    assert json.loads(engine.override_generation_config or "") == overrides


def test_only_names_with_dots_are_entries() -> None:
    words = ["model.v1", "--chat-template", "./a.jinja", "--config=a.b", "-tp", "2", "--a.b.c", "x", "--a.b.d", "[1]"]
    assert join_dotted(words) == [*words[:6], "--a", '{"b": {"c": "x", "d": [1]}}']


def test_a_misspelt_flag_with_dots_names_the_near_one() -> None:
    with pytest.raises(UsageError, match="unknown option --override-generation-confg; did you mean"):
        _parsed("--override-generation-confg.top_k 1")


@pytest.mark.parametrize(
    ("text", "number"), [("2k", 2000), ("2K", 2048), ("1.5k", 1500), ("4096", 4096), ("auto", None), ("-1", None)]
)
def test_sizes_may_have_a_unit(text: str, number: int | None) -> None:
    assert EngineConfig(max_model_len=text).max_model_len == number  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["2x", "k", "-2k", "1.0001k", "0k", "1e3"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens="):
        parse_settings({"max_num_batched_tokens": text})


def test_empty_objects_of_what_is_not_supported_ask_for_nothing() -> None:
    engine, _ = _parsed("--hf-overrides {} --speculative-config={} --pooler-config {}")
    assert (engine.config_overrides, engine.speculative_config, engine.pooler_config) == ({}, {}, {})


def test_fields_of_config_json_may_be_flags() -> None:
    engine, _ = _parsed("--hf-overrides.rope_theta 1e6 --hf-overrides.rope_scaling.factor 2 --hf-overrides.x auto")
    assert engine.config_overrides == {"rope_theta": 1e6, "rope_scaling": {"factor": 2}, "x": "auto"}


def test_a_yaml_file_for_vllm_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(
        "max-model-len: 2k\ndisable-log-requests: true\nenable-eplb: false\nuvicorn_log_level: info\n"
        'limit-mm-per-prompt: {"image": 0}\nnum-gpu-blocks-override: 100\n'
        "override-generation-config: {temperature: 0.5}\nstream-interval: 1\n"
    )
    engine, _ = _parsed(f"--config {file}")
    assert (engine.max_model_len, engine.num_kv_blocks) == (2000, 100)
    assert engine.override_generation_config == '{"temperature": 0.5}'
    assert [line.partition(" has no effect")[0] for line in capsys.readouterr().err.splitlines()] == [
        "--disable-log-requests",
        "--uvicorn-log-level info",
        '--limit-mm-per-prompt {"image": 0}',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nssl-keyfile: k.pem\n", "2: --ssl-keyfile is not supported: this server speaks plain HTTP"),
        ("stream-interval: 5\n", "1: --stream-interval 5 is not supported"),
        ("tool-server: demo\n", "1: --tool-server is not supported"),
        ("max-modle-len: 5\n", "1: unknown setting 'max_modle_len'; did you mean 'max_model_len'"),
    ],
)
def test_what_a_yaml_file_for_vllm_asks_in_vain_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "vllm.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"{file}:{message}"):
        _parsed(f"--config {file}")


@pytest.mark.parametrize("module", ["rayllm.entrypoints.openai.api_server", "rayllm.entrypoints.api_server"])
def test_vllms_module_names_are_rayllm_serve(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--swap-space", "4"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "rayllm serve: swap_space='4': RayLLM keeps no KV blocks in CPU memory, it computes them again: give 0"
    ]
