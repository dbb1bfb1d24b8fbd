import json
import re
from pathlib import Path

import pytest

from rayllm.cli.bench.throughput import Stats, throughput
from rayllm.cli.bench.workload import Workload, random_workload, read_sharegpt
from rayllm.cli.flags import UsageError
from rayllm.cli.main import main
from rayllm.cli.random_model import random_model
from rayllm.errors import ConfigError


def test_the_same_seed_gives_the_same_prompts() -> None:
    settings = {"num_prompts": 3, "input_len": 5, "output_len": 2, "vocab_size": 50}
    first, again = random_workload(**settings, seed=1), random_workload(**settings, seed=1)
    assert first == again != random_workload(**settings, seed=2)
    assert all(4 <= token < 50 for prompt in first.prompts for token in prompt)
    assert first.num_tokens == 3 * (5 + 2)


def test_figures_tell_medians_and_spread() -> None:
    summary = Stats(Workload([[5] * 6] * 10, [4] * 10), [1.0, 2.0, 4.0]).summary()
    assert summary["elapsed_time"] == 2.0
    assert summary["requests_per_second"] == 5.0
    assert summary["tokens_per_second"] == 50.0
    assert summary["output_tokens_per_second"] == 20.0
    assert summary["spread"] == 1.5


def test_random_model_is_made_once_and_can_lack_weights(tmp_path: Path) -> None:
    folder = random_model("random:tiny", with_weights=False, cache=tmp_path)
    assert not list(folder.glob("*.safetensors"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    marker = folder / "marker"
    marker.touch()
    assert random_model("random:tiny", with_weights=False, cache=tmp_path) == folder
    assert marker.exists()


@pytest.mark.parametrize("backend", ["rayllm", "vllm", "hf"])
def test_both_backends_time_the_same_weights(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["throughput", "--backend", backend, "--model", "random:tiny", "--device", "cpu", "--dtype", "float32"]
    argv += ["--num-prompts", "3", "--input-len", "6", "--output-len", "5", "--repeat", "1", "--json"]
    assert main(["bench", *argv]) == 0
    first, *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"Throughput: \d+\.\d\d requests/s, \d+\.\d\d tokens/s", first)
    figures = json.loads(last)
    assert figures["backend"] == backend
    assert figures["total_num_tokens"] == 3 * (6 + 5)
    if backend != "hf":
        assert figures["num_steps"] >= 5


def test_dummy_weights_need_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--model", "random:tiny", "--load-format", "dummy", "--device", "cpu", "--num-prompts", "1"]
    figures = throughput([*argv, "--input-len", "4", "--output-len", "2", "--repeat", "1"])
    assert figures["num_requests"] == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_latency_of_a_batch_is_told_in_vllms_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--model", "random:tiny", "--load-format", "dummy", "--device", "cpu", "--batch-size", "2"]
    argv += ["--input-len", "4", "--output-len", "2", "--num-iters-warmup", "1", "--num-iters", "2", "--json"]
    assert main(["bench", "latency", *argv]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Avg latency: ")
    assert lines[1].startswith("10% percentile latency: ")
    assert len(json.loads(last)["latencies"]) == 2


def _sharegpt(folder: Path, entries: object) -> str:
    file = folder / "sharegpt.json"
    file.write_text(json.dumps(entries))
    return str(file)


def _talk(question: str, answer: str) -> dict[str, object]:
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}, {"value": "more"}]
    }


def _read(file: str, **changes: object) -> Workload:
    settings = {"num_prompts": 10, "output_len": None, "seed": 1, "max_model_len": 100, **changes}
    return read_sharegpt(file, lambda text: [ord(c) for c in text], **settings)  # type: ignore[arg-type]


def test_a_dataset_gives_prompts_and_the_lengths_of_their_answers(tmp_path: Path) -> None:
    fits = {"abcdef": 5, "ghijklm": 8, "nopqrs": 6}
    entries = [_talk(prompt, "x" * length) for prompt, length in fits.items()]
    left_out = [
        _talk("abc", "long enough"),
        _talk("long enough", "abc"),
        _talk("y" * 90, "z" * 20),
        {"conversations": []},
    ]
    file = _sharegpt(tmp_path, [*left_out, *entries, {"conversations": []}, {"other": 1}, "text"])
    workload = _read(file)
    found = {"".join(map(chr, prompt)): n for prompt, n in zip(workload.prompts, workload.output_lens, strict=True)}
    assert found == fits
    assert workload.num_tokens == sum(len(prompt) + n for prompt, n in fits.items())
    assert _read(file) == workload
    assert len(_read(file, num_prompts=2).prompts) == 2
    assert set(_read(file, output_len=7).output_lens) == {7}


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("{}", "holds a dict: give a JSON list of"), ("[]", "has no conversation of 4 to 1024")],
)
def test_a_bad_dataset_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        _read(str(file))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        _read(str(tmp_path / "nowhere.json"))


def test_the_documents_command_runs_on_a_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _sharegpt(tmp_path, [_talk("What is RayLLM, and what is it for?", "It is an engine for language models.")])
    argv = ["throughput", "--backend", "vllm", "--dataset", file, "--num-prompts", "25", "--seed", "2024", "--n", "2"]
    argv += ["--dtype", "float", "--max-model-len", "256", "--trust-remote-code", "--device", "cpu", "--repeat", "1"]
    assert main(["bench", *argv]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("Throughput: ")
    assert "--backend vllm measures RayLLM's engine; vLLM itself is not used" in said.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--backend", "mii"],
            "--backend mii is DeepSpeed-MII, which RayLLM does not include: give rayllm, vllm or hf",
        ),
        (["--hf-max-batch-size", "4"], "--hf-max-batch-size is for --backend hf"),
        (["--n", "0"], "--n 0 must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        throughput(argv)
