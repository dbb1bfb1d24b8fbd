import json
from pathlib import Path

import pytest

from rayllm.cli.main import main
from rayllm.config import Environment


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text("max-num-seqs: 8\nseed: 3\n")
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, tuple[object, str]]:
    assert main(["config", "show", "--json", "--device", "cpu", *argv]) == 0
    found = json.loads(capsys.readouterr().out)
    return {setting["name"]: (setting["value"], setting["origin"]) for setting in found}


def test_show_says_where_each_setting_comes_from(
    file: Path, llama_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLLM_LOG_DIR", "/logs")
    monkeypatch.setenv("RLLM_API_KEY", "secret")
    found = shown(capsys, str(llama_path), "--config", str(file), "--seed", "4", "--api-key", "secret")
    assert found["model"] == (str(llama_path), "flag")
    assert found["max_num_seqs"] == (8, "file")
    assert found["seed"] == (4, "flag")
    assert found["max_num_batched_tokens"] == (2048, "machine")
    assert found["dtype"] == ("float32", "model")
    assert found["block_size"] == (8, "machine")
    assert found["RLLM_LOG_DIR"] == ("/logs", "env")
    assert found["api_key"] == ("(hidden)", "flag")
    assert found["RLLM_API_KEY"] == ("(hidden)", "env")


def test_show_is_a_table_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--device", "cpu"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["SETTING", "VALUE", "FROM"]
    assert ["enable_prefix_caching", "on", "default"] in [row.split() for row in rows]


def test_every_variable_that_is_read_is_listed() -> None:
    source = Path(__file__).parents[3].joinpath("rayllm", "config", "environment.py").read_text()
    read = {part.split('"')[0] for part in source.split('os.environ.get("')[1:]}
    assert read - {"TERM"} == set(Environment.NAMES)
