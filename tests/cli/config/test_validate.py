import json
from pathlib import Path

import pytest

from rayllm.cli.main import main


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.yaml"
    path.write_text("max-num-seqs: 8\nseed: 3\n")
    return path


def test_validate_accepts_a_file_that_holds(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "validate", str(file)]) == 0
    assert "is valid: 2 settings, model rayllm-demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_num_sequs: 8", "did you mean 'max_num_seqs'?"),
        ("model: /nowhere/at/all", "does not exist"),
        ("tensor_parallel_size: 3\ndevice: cpu", "tensor_parallel_size=3"),
        ("enable_lora: true", "enable_lora=True: RayLLM has no LoRA adapters yet"),
    ],
)
def test_validate_names_what_is_wrong(text: str, expected: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(text)
    assert main(["config", "validate", str(file)]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert main(["config", "validate", str(file), "--json"]) == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["valid"] is False
    assert expected in answer["reason"]
