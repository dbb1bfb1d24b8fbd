"""Command lines for vLLM's servers are `rayllm serve`'s, but for what cannot be served."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rayllm.cli.flags import UsageError
from rayllm.cli.serve import parse_serve, parser
from rayllm.cli.vllm_flags import _ONE_VALUE, _REFUSED, _WITH_VALUE, _WITHOUT_VALUE, translate
from rayllm.config import EngineConfig, ServerConfig


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
        ("--rope-scaling {}", "--rope-scaling is not supported: set rope_scaling in the model's config.json"),
        ("--response-role tool", "--response-role tool is not supported: answers are always the assistant's"),
        ("--max-log-len", "argument --max-log-len: expected one argument"),
        ("--allowed-origins [1]", r"--allowed-origins \[1\]: give an origin, or a JSON list"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        translate(line.split())


@pytest.mark.parametrize("module", ["rayllm.entrypoints.openai.api_server", "rayllm.entrypoints.api_server"])
def test_vllms_module_names_are_rayllm_serve(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--swap-space", "4"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "rayllm serve: swap_space='4': RayLLM keeps no KV blocks in CPU memory, it computes them again: give 0"
    ]
