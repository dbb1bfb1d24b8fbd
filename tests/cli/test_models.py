from __future__ import annotations

import json
import subprocess
import sys

import pytest

from rayllm.cli.main import main
from rayllm.models import registry
from rayllm.models.catalog import catalog


def test_each_architecture_has_a_line_and_formats_follow(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "ARCHITECTURE"
    rows = lines[: lines.index("")]
    assert [row.split()[0] for row in rows] == [entry.architecture for entry in catalog()]
    [opt] = [row for row in rows if row.startswith("OPTForCausalLM ")]
    assert opt.split()[1:] == ["opt", "facebook/opt-125m,", "facebook/opt-350m"]
    assert "--model-impl" in lines[-3]
    assert "model.safetensors.index.json" in lines[-2]
    assert lines[-1].startswith("--load-format: auto, ")


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [baichuan] = [each for each in found["architectures"] if each["architecture"] == "BaichuanForCausalLM"]
    assert baichuan["model_types"] == ["baichuan"]
    assert {"file": "pytorch_model.bin", "index": "pytorch_model.bin.index.json"} in found["weight_files"]
    assert "dummy" in found["load_formats"]


def test_a_broken_package_is_told_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_modules", {"XForCausalLM": "no_such_module"})
    assert main(["models"]) == 0
    assert "no_such_module" in capsys.readouterr().err


def test_torch_is_not_imported() -> None:
    code = "import sys; from rayllm.cli.main import main; main(['models']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
