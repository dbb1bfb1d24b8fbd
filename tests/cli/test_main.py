import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rayllm.cli import main as cli


def rayllm(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rayllm", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def one_line(text: str) -> str:
    assert text.endswith("\n")
    assert text.count("\n") == 1, text
    return text.strip()


def test_the_verbs_are_these() -> None:
    assert sorted(cli.COMMANDS) == [
        "bench",
        "chat",
        "complete",
        "completion",
        "config",
        "demo",
        "doctor",
        "logs",
        "models",
        "plan",
        "ps",
        "pull",
        "run",
        "run-batch",
        "serve",
        "status",
        "stop",
        "version",
    ]


FLAGS = {
    "bench latency": "--batch-size --input-len --json --num-iters --num-iters-warmup --output-len --seed",
    "bench serve": "--api-key --input-len --json --max-concurrency --no-ignore-eos --num-prompts --output-len "
    "--request-rate --seed --served-model-name --url",
    "bench startup": "--json --num-iters --timeout",
    "bench throughput": "--backend --dataset --hf-max-batch-size --input-len --json --n --num-prompts --output-len "
    "--repeat --seed",
    "chat": "--api-key --served-model-name --system --url",
    "complete": "--api-key --echo --served-model-name --stats --url",
    "completion": "",
    "config show": "--config --json",
    "config validate": "--json",
    "demo": "--json --kill --question -tp",
    "doctor": "--fabric --json",
    "logs": "--follow --json --lines -f -n",
    "models": "--json",
    "plan": "--gpu --json --memory",
    "ps": "--json",
    "pull": "--download-dir --json --revision",
    "run": "--api-key --port --stop --system",
    "run-batch": "--api-key --input-file --max-concurrency --model --output-file --served-model-name --url -i -o",
    "serve": "--config",
    "status": "--api-key --interval --json",
    "stop": "--all --force --timeout",
    "version": "--json",
}
"""Beside -h, those of the config's fields (see test_cli_flags) and of sampling."""


def test_the_flags_of_every_verb_are_these() -> None:
    from rayllm.cli.completion import commands
    from rayllm.cli.flags import ALIASES
    from rayllm.cli.sampling_flags import PARAMS
    from rayllm.config import EngineConfig, ServerConfig

    fields = {*EngineConfig.model_fields, *ServerConfig.model_fields, *PARAMS}
    common = {"-h", "--help"} | {alias for aliases in ALIASES.values() for alias in aliases}
    for command in commands():
        if command.subcommands:
            continue
        own = set(FLAGS[command.words].split())
        names = {name for option in command.options for name in option.names}
        fields_of = {name: name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in names}
        extra = {name for name in names - common - own if fields_of[name] not in fields}
        assert own <= names, command.words
        assert not extra, command.words


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command} " in text


def test_help_and_typos_import_nothing_heavy() -> None:
    code = (
        "import sys; from rayllm.cli.main import main; main(['--help']); main(['srve']); main(['serve', '--prt', '1']);"
        "heavy = {'ray', 'torch', 'transformers', 'fastapi', 'httpx', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["srve"], "unknown command 'srve'; did you mean 'serve'?"),
        (["list"], "there is no command 'list': 'rayllm ps' lists the running servers of this machine"),
        (["ls"], "there is no command 'ls': 'rayllm ps' lists the running servers"),
        (
            ["rm", "m"],
            "there is no command 'rm': downloaded models are in the hub's cache, and no command removes them yet",
        ),
        (["download", "m"], "there is no command 'download': 'rayllm pull MODEL' downloads a model"),
        (["--verson"], "unknown option '--verson'; did you mean '--version'?"),
        (["hlep"], "unknown command 'hlep'; did you mean 'help'?"),
        (["serve", "--tensor-paralel-size", "2"], "did you mean '--tensor-parallel-size'?"),
        (["serve", "--no-enable-prefix-cachin"], "did you mean '--no-enable-prefix-caching'?"),
        (["serve", "-pp", "2"], "pipeline_parallel_size='2': RayLLM has no pipeline parallelism yet"),
        (["serve", "--enable-lora"], "enable_lora=True: RayLLM has no LoRA adapters yet"),
        (["pull", "qwen"], "'qwen' is not a model name: give owner/model"),
        (["pull", "/tmp"], "'/tmp' is a folder on this machine"),
        (["stop", "a", "--all"], "give a server or --all, not both"),
        (["logs", "--json", "-f"], "--json cannot be combined with --follow"),
        (["serve", "a", "b"], "unexpected argument 'b'"),
        (["serve", "a", "--model", "b"], "two models are given, MODEL 'a' and --model 'b'"),
        (["serve", "--dtype", "bfloat61"], "dtype='bfloat61'"),
        (["serve", "-tp", "0"], "tensor_parallel_size='0': Input should be greater than or equal to 1"),
        (["serve", "--port", "99999"], "port='99999'"),
        (["serve", "/nowhere/at/all"], "model folder '/nowhere/at/all' does not exist"),
        (["serve", "--config", "/nowhere.yaml"], "config file '/nowhere.yaml' cannot be read"),
        (["bench", "throughputs"], "did you mean 'throughput'?"),
        (["bench", "throughput", "--num-prompts", "0"], "--num-prompts 0 must be at least 1"),
        (["bench", "throughput", "--model", "random:qwen2-0.5"], "did you mean 'qwen2-0.5b'?"),
        (["chat", "--url", "http://127.0.0.1:1", "folder"], "not both"),
        (["chat", "-tp", "2"], "tensor_parallel_size needs a MODEL to start"),
        (["complete", ""], "the prompt is empty"),
    ],
)
def test_usage_mistakes_are_one_line_and_exit_2(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert expected in one_line(captured.err)
    assert captured.out == ""


def test_a_mistake_reaches_the_shell_as_an_exit_code() -> None:
    done = rayllm("serve", "--prot", "1")
    assert done.returncode == 2
    assert "unknown option --prot; did you mean '--port'?" in one_line(done.stderr)


def test_folder_without_config_json_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "config.json" in one_line(capsys.readouterr().err)


def test_folder_without_weights_is_named_before_anything_starts(
    llama_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in llama_path.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "neither model.safetensors" in one_line(capsys.readouterr().err)


def test_unknown_architecture_is_named_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["FooForCausalLM"], "model_type": "foo"}')
    assert cli.main(["serve", str(tmp_path)]) == 2
    assert "Foo" in one_line(capsys.readouterr().err)


def test_more_workers_than_the_machine_has_is_refused_before_ray_starts(
    llama_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", str(llama_path), "--device", "cpu", "-tp", "64"]) == 2
    assert "tensor_parallel_size=64" in one_line(capsys.readouterr().err)


def test_port_in_use_is_refused_before_ray_starts(llama_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", str(llama_path), "--port", str(port)]) == 2
    assert f"port={port} on 127.0.0.1 is in use" in one_line(capsys.readouterr().err)


def test_missing_key_file_is_refused_before_ray_starts(llama_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", str(llama_path), "--api-key", "@/nowhere"]) == 2
    assert "api_key file '/nowhere' cannot be read" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize("command", [["chat"], ["complete", "hello"]])
def test_no_server_exits_3_and_says_how_to_start_one(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "--url", "http://127.0.0.1:1"]) == 3
    assert "start one with 'rayllm serve'" in one_line(capsys.readouterr().err)


def test_out_of_memory_is_told_apart_from_other_failures() -> None:
    assert cli.is_out_of_memory("torch.OutOfMemoryError: CUDA out of memory")
    assert not cli.is_out_of_memory("port in use")


def test_version_reads_metadata_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--json"]) == 0
    assert '"rayllm": "0.1.0"' in capsys.readouterr().out


def test_words_of_other_tools_are_no_verbs_and_name_verbs_that_exist() -> None:
    assert not set(cli.OTHER_WORDS) & set(cli.COMMANDS)
    for text in cli.OTHER_WORDS.values():
        named = re.findall(r"'rayllm ([a-z-]+)", text)
        assert named
        assert set(named) <= set(cli.COMMANDS)


def test_what_the_terminal_cannot_show_is_shown_as_question_marks() -> None:
    code = "import sys; from rayllm.cli.main import main; main(['version']); print('ü ✓ 漢')"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "? ? ?"
