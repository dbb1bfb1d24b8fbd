import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from weights.fake_hub import COMMIT, FakeHub, served_hub

from rayllm.config import EngineConfig
from rayllm.engine.owner.resolve import resolve, served_name
from rayllm.errors import ConfigError
from rayllm.weights.hub import local_model
from rayllm.weights.hub_model import HubModel, RemoteFile, needed_files


@pytest.fixture
def hub(llama_path: Path) -> Iterator[FakeHub]:
    """The tiny Llama, beside files that nobody needs for serving."""
    files = {path.name: path.read_bytes() for path in llama_path.iterdir()}
    files |= {"README.md": b"hello", "pytorch_model.bin": b"x" * 99, "onnx/model.onnx": b"x", "original/p.json": b"{}"}
    with served_hub(files) as served:
        yield served


def pull(hub: FakeHub, tmp_path: Path, *argv: str, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """As a person does, with a hub's address of our own."""
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path),
    }
    command = [sys.executable, "-m", "rayllm", "pull", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **settings})


@pytest.mark.parametrize(
    ("text", "name", "is_modelscope"),
    [("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", False), ("ms:ZhipuAI/glm-4-9b-chat", "ZhipuAI/glm-4-9b-chat", True)],
)
def test_names_of_hubs_are_known(text: str, name: str, is_modelscope: bool) -> None:
    model = HubModel.parse(text)
    assert model is not None
    assert (model.name, model.is_modelscope) == (name, is_modelscope)
    assert served_name(text) == name


@pytest.mark.parametrize("text", ["", "model", "/models/qwen", "./models/qwen", "../a/b", "~/qwen", "a/b/c", "a/b/"])
def test_paths_are_no_names(text: str) -> None:
    assert HubModel.parse(text) is None


def test_a_folder_that_is_here_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert HubModel.parse("owner/model") is None


@pytest.mark.parametrize(
    ("variables", "is_modelscope"),
    [
        ({"RLLM_USE_MODELSCOPE": "1"}, True),
        ({"VLLM_USE_MODELSCOPE": "True"}, True),
        ({"VLLM_USE_MODELSCOPE": "True", "RLLM_USE_MODELSCOPE": "0"}, False),
        ({}, False),
    ],
)
def test_modelscope_can_be_the_hub_for_names_without_a_prefix(
    variables: dict[str, str], is_modelscope: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    model = HubModel.parse("owner/model")
    assert model is not None
    assert model.is_modelscope == is_modelscope


@pytest.mark.parametrize(
    ("weights", "chosen"),
    [
        (["model-00001-of-00002.safetensors", "consolidated.safetensors"], ["model-00001-of-00002.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["weights.safetensors", "adapter_model.safetensors"], ["weights.safetensors"]),
    ],
)
def test_weights_are_brought_once(weights: list[str], chosen: list[str]) -> None:
    texts = ["config.json", "tokenizer.json"]
    files = [RemoteFile(name, 1) for name in [*texts, "README.md", "onnx/config.json", *weights]]
    model = HubModel("owner/model")
    assert [file.path for file in needed_files(model, files)] == [*texts, *chosen]


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match="neither safetensors files nor"):
        needed_files(HubModel("owner/model"), [RemoteFile("tf_model.h5", 1)])


@pytest.mark.parametrize("vocabulary", [["vocab.json"], ["tokenizer_config.json", "special_tokens_map.json"], []])
def test_a_model_without_a_tokenizer_is_refused_unless_none_is_needed(vocabulary: list[str]) -> None:
    files = [RemoteFile(name, 1) for name in ["config.json", "model.safetensors", *vocabulary]]
    with pytest.raises(ConfigError, match=r"no tokenizer.*--tokenizer FOLDER.*--skip-tokenizer-init"):
        needed_files(HubModel("owner/model"), files)
    assert len(needed_files(HubModel("owner/model", needs_tokenizer=False), files)) == len(files)


def test_a_snapshot_without_a_tokenizer_is_not_whole(hub: FakeHub, tmp_path: Path) -> None:
    pull(hub, tmp_path / "home", "owner/model", "--download-dir", str(tmp_path / "here"))
    fields = {"model": "owner/model", "download_dir": str(tmp_path / "here"), "device": "cpu"}
    folder = local_model(EngineConfig.parse(fields))
    assert folder is not None
    (folder / "tokenizer.json").unlink()

    with pytest.raises(ConfigError, match="nor downloaded: run 'rayllm pull owner/model"):
        local_model(EngineConfig.parse(fields))
    for other in ({"tokenizer": str(tmp_path)}, {"skip_tokenizer_init": True}):
        assert local_model(EngineConfig.parse({**fields, **other})) == folder
    hub.asked.clear()
    pull(hub, tmp_path / "home", "owner/model", "--download-dir", str(tmp_path / "here"))
    assert {name for name, _ in hub.asked} <= {"tokenizer.json"}
    assert local_model(EngineConfig.parse(fields)) == folder


def test_pull_brings_what_serving_needs_and_only_what_is_missing(hub: FakeHub, tmp_path: Path) -> None:
    done = pull(hub, tmp_path / "home", "owner/model", "--download-dir", str(tmp_path / "here"))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == COMMIT
    assert {path.name for path in folder.iterdir()} == set(hub.files) - {
        "README.md",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "original/p.json",
    }
    assert (folder / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert done.stderr.splitlines()[-1].startswith("downloading owner/model: ")

    config = EngineConfig.parse({"model": "owner/model", "download_dir": str(tmp_path / "here"), "device": "cpu"})
    resolved = resolve(config)
    assert (resolved.model_path, resolved.served_model_name) == (str(folder), "owner/model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"nor downloaded: run 'rayllm pull owner/model --download-dir .*here'"):
        local_model(config)
    hub.asked.clear()
    assert pull(hub, tmp_path / "home", "owner/model", "--download-dir", str(tmp_path / "here")).returncode == 0
    assert {name for name, _ in hub.asked} <= {"model.safetensors"}
    assert local_model(config) == folder


def test_a_revision_is_brought_by_its_name_and_served_without_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    place = ("--download-dir", str(tmp_path / "here"))
    brought = pull(hub, tmp_path / "home", "owner/model", "--revision", "v1", *place)
    assert brought.returncode == 0, brought.stderr
    fields = {"model": "owner/model", "download_dir": str(tmp_path / "here"), "device": "cpu"}
    assert local_model(EngineConfig.parse({**fields, "revision": "v1"})) == Path(brought.stdout.strip())
    with pytest.raises(ConfigError, match="nor downloaded: run 'rayllm pull owner/model --revision v2 --download-dir"):
        local_model(EngineConfig.parse({**fields, "revision": "v2"}))
    unknown = pull(hub, tmp_path / "home", "owner/model", "--revision", "v2", *place)
    assert unknown.returncode == 2
    assert "owner/model has no revision 'v2': give a branch, tag or commit" in unknown.stderr
    hub.asked.clear()
    offline = pull(hub, tmp_path / "other", "owner/model", offline=True)
    assert (offline.returncode, hub.asked) == (3, [])
    assert "owner/model is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub: unset it" in offline.stderr


def test_an_unknown_model_and_a_hub_that_does_not_answer_are_one_line(hub: FakeHub, tmp_path: Path) -> None:
    unknown = pull(hub, tmp_path, "owner/other")
    assert unknown.returncode == 2
    assert "'owner/other' is no folder here, and no model at the Hugging Face hub" in unknown.stderr
    hub.url = "http://127.0.0.1:1"
    unreachable = pull(hub, tmp_path, "owner/model")
    assert unreachable.returncode == 3
    assert "the Hugging Face hub does not answer for owner/model" in unreachable.stderr
    assert unknown.stderr.count("\n") == unreachable.stderr.count("\n") == 1


def test_a_plan_brings_the_config_alone(hub: FakeHub, tmp_path: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "rayllm", "plan", "owner/model", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **settings})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["architecture"] == "LlamaForCausalLM"
    assert {name for name, _ in hub.asked} == {"config.json"}
