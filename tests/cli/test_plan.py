from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import make_config

from rayllm.cli import plan
from rayllm.cli.flags import UsageError
from rayllm.cli.main import main
from rayllm.config import EngineConfig
from rayllm.engine.owner.resolve import resolve
from rayllm.models.memory_plan import MemoryNeeds

LARGE = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 14336, "max_position_embeddings": 131072,
}  # fmt: skip


@pytest.fixture
def large(tmp_path: Path) -> str:
    """Llama-3-8B's shape with a small vocabulary: a config.json, nothing else."""
    config = {**json.loads(make_config("llama", **LARGE).to_json_string(use_diff=False))}
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"})
    )
    return str(tmp_path)


def found(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, object]]:
    code = main(["plan", *words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_numbers_are_those_of_the_engine(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, shown = found(large, "--gpu", "24GiB", capsys=capsys)
    needs = MemoryNeeds.of_config(resolve(EngineConfig(model=large, device="cuda"), num_gpus=1))
    assert code == 0
    assert shown["weight_bytes"] == needs.weights == 2 * 7_241_732_096
    assert shown["kv_bytes_per_token"] == needs.kv_per_token == 32 * 2 * 8 * 128 * 2
    assert shown["kv_bytes"] == int(24 * 2**30 * 0.92) - needs.weights - needs.activations
    assert shown["model_context"] == 131072
    assert 0 < int(str(shown["max_model_len"])) < 131072
    assert shown["would_fit"] == []


def test_ranks_share_weights_and_kv(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, alone = found(large, "--gpu", "80GiB", capsys=capsys)
    _, both = found(large, "--gpu", "80GiB", "-tp", "2", capsys=capsys)
    assert both["kv_bytes_per_token"] == int(str(alone["kv_bytes_per_token"])) // 2
    assert both["max_model_len"] == 131072


def test_what_does_not_fit_is_told_with_the_commands_that_would(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", large, "--gpu", "24GiB", "--max-model-len", "131072"])
    lines = capsys.readouterr().out.splitlines()
    assert code == 4
    commands = [line.strip() for line in lines if line.startswith("  rayllm serve ")]
    assert any(f"rayllm serve {large} --max-model-len " in command for command in commands)
    assert any("--tensor-parallel-size 2" in command for command in commands)
    for command in commands:  # they are told as they can be pasted: each of them fits
        assert main(["plan", *command.split()[2:], "--gpu", "24GiB"]) == 0
    capsys.readouterr()


def test_what_no_setting_makes_fit_is_told(large: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", large, "--gpu", "100MiB"]) == 4
    assert "No setting" in capsys.readouterr().out


def test_a_table_for_the_built_in_model_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--memory", "4GiB"]) == 0
    shown = capsys.readouterr().out
    for words in ("LlamaForCausalLM", "weights per CPU rank", "KV per token", "requests at once", "of 2048 tokens"):
        assert words in shown


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("24GiB", 24 * 2**30), ("24g", 24 * 2**30), ("1.5 MiB", 3 * 2**19), ("512 KB", 2**19)],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert plan.parse_size("gpu", text) == num_bytes


@pytest.mark.parametrize("text", ["", "big", "-1GiB", "0G", "24", "1 GiBB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--gpu"):
        plan.parse_size("gpu", text)


def test_one_kind_of_device_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "1GiB", "--memory", "1GiB"]) == 2
    assert "not both" in capsys.readouterr().err


def test_torch_is_not_imported() -> None:
    code = "import sys; from rayllm.cli.main import main; main(['plan']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0
