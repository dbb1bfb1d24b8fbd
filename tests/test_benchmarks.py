"""Every benchmark starts: its imports resolve, and the one that needs no model and no Ray runs."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from docs import ROOT

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.moe import Experts
from rayllm.serve.app import create_app
from rayllm.spec import ExpertSpec, RouterSpec, SparseMlpSpec

SCRIPTS = sorted(path.name for path in (ROOT / "benchmarks").glob("*.py"))


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return runpy.run_path(str(ROOT / "benchmarks" / name), run_name="imported")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(name, monkeypatch)["__doc__"]


def test_the_benchmark_of_the_scheduler_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scheduler.py", "--seqs", "4", "--prompt-len", "32", "--steps", "20"])
    load("scheduler.py", monkeypatch)["main"]()
    assert json.loads(capsys.readouterr().out)


def test_all_ways_of_the_benchmark_of_experts_compute_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("moe.py", monkeypatch)
    spec = SparseMlpSpec(RouterSpec(6, 2, "softmax", renormalize=True), ExpertSpec(16, "silu"))
    x, scores = torch.rand(5, 8), torch.rand(5, 2)
    chosen = torch.tensor([[0, 5], [5, 0], [1, 2], [2, 1], [3, 5]])
    one, *others = (
        Experts(benchmark["BenchmarkWeights"](way, torch.float32), "e", spec, 8, TensorParallel())(x, chosen, scores)
        for way in benchmark["WAYS"]
    )
    for other in others:
        torch.testing.assert_close(other, one)
    arguments = "--experts 6 --top-k 2 --width 8 --inner 16 --rows 1 3 --repeat 1"
    monkeypatch.setattr(sys, "argv", ["moe.py", *arguments.split()])
    num_threads = torch.get_num_threads()
    benchmark["main"]()
    torch.set_num_threads(num_threads)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["ms"]["bfloat16"].keys() == {"1", "3"}


def test_the_benchmark_of_sums_over_ranks_measures_gloo_where_there_is_no_gpu(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "all_reduce.py"), "--device", "cpu", "--ranks", "2"]
    command += ["--sizes", "64", "4096", "--repeat", "2"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    times = json.loads(ended.stdout.splitlines()[-1])["microseconds"]
    assert times.keys() == {"gloo"}
    assert times["gloo"].keys() == {"64", "4096"}
    assert min(times["gloo"].values()) > 0


def _run_gpu_benchmark(arguments: str, folder: Path) -> dict[str, Any]:
    """The rows of a run in a process of its own, as a user starts it, from another folder."""
    script = ROOT / "benchmarks" / "gpu.py"
    command = [sys.executable, str(script), "--smoke", *arguments.split(), "--json", str(folder / "found.json")]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "no target was missed" in ended.stdout
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    assert found["failures"] == {}
    return found["rows"]


def test_the_benchmark_of_a_gpu_computes_a_kernel_and_decode_steps(tmp_path: Path) -> None:
    rows = _run_gpu_benchmark("--only norm --only steps", tmp_path)
    assert list(rows) == ["kernels: norm", "decode steps"]
    assert {row["name"] for row in rows["kernels: norm"]} >= {"rms_norm: error", "add_rms_norm: error"}


def test_the_benchmark_of_a_gpu_takes_under_eight_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    sections = load("gpu.py", monkeypatch)["sections"](None)
    assert sum(budget_s for budget_s, _ in sections.values()) < 8 * 60


@pytest.mark.kernels
def test_all_sections_of_the_benchmark_of_a_gpu_run_in_small(tmp_path: Path) -> None:
    rows = _run_gpu_benchmark("", tmp_path)
    assert len(rows) >= 10
    assert all(rows.values())
    [*_, last] = rows["killed worker"]
    assert last["value"] > 0


def test_what_the_benchmark_of_a_gpu_finds_is_judged_and_a_failure_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    reported = load("gpu_report.py", monkeypatch)
    row, report = reported["Row"], reported["Report"]()

    def measured() -> Iterator[Any]:
        yield row("fast enough", 3.0, "µs", at_most=4)
        yield row("too slow", 5.0, "µs", at_most=4)
        yield row("no number", float("nan"), "", at_least=0.5)
        raise ModuleNotFoundError("No module named 'absent'", name="absent")

    def endless() -> Iterator[Any]:
        yield row("first", 1.0, "s")
        while True:
            time.sleep(0.01)

    report.run("kernels", 5.0, measured)
    report.run("hang", 0.05, endless)
    assert report.misses == ["kernels: too slow", "kernels: no number"]
    assert report.failures["kernels"] == "the package 'absent' is not installed: pip install absent"
    assert report.failures["hang"].startswith("OutOfTime: not done within")
    assert len(report.as_json()["rows"]["hang"]) == 1
    assert "missed: kernels: too slow" in report.text()
    capsys.readouterr()


async def test_the_engine_that_computes_nothing_answers_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    service = load("idle_engine.py", monkeypatch)["idle_service"]()
    transport = httpx.ASGITransport(app=create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
        answered = await client.post("/v1/completions", json={"model": "idle", "prompt": "hi", "max_tokens": 7})
    assert answered.json()["usage"]["completion_tokens"] == 7


def test_each_part_of_the_http_benchmark_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in load("http_server.py", monkeypatch)["_parts"]().values():
        part()


def test_the_benchmark_of_loading_counts_what_each_rank_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("loading.py", monkeypatch)
    small = {"_WIDTH": 64, "_INNER": 96, "_VOCAB": 128}
    shapes = {"_LAYER": {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 64), "self_attn.v_proj": (64, 64)}}
    shapes["_LAYER"] |= {"self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)}
    shapes["_LAYER"] |= {"mlp.down_proj": (64, 96), "input_layernorm": (64,), "post_attention_layernorm": (64,)}
    config = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_attention_heads": 4}
    benchmark["_CONFIG"].update(config, num_key_value_heads=4)
    for name, value in {**small, **shapes}.items():
        monkeypatch.setitem(benchmark["make_checkpoint"].__globals__, name, value)
    benchmark["make_checkpoint"](tmp_path, 10**5, "float32")
    whole = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    rows = []
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        imports, loaded = benchmark["load_rank"](tmp_path, rank, size, 1)
        assert imports == {}
        rows.append({"tp": size, "rank": rank, **loaded, "cat_s": 1.0, "cat_cpu_s": 1.0, "ratio_to_cat": 0.5})
        print(benchmark["row_text"](rows[-1]))
    assert whole * 0.9 < rows[0]["bytes_read"] < whole
    assert rows[1]["bytes_read"] == rows[2]["bytes_read"] < rows[0]["bytes_read"] * 0.51
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert min(benchmark["cat_s"](tmp_path)) >= 0


def test_the_readme_lists_every_benchmark() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = [name for name in SCRIPTS if 'if __name__ == "__main__"' in Path(ROOT, "benchmarks", name).read_text()]
    assert len(scripts) > 5
    assert not [name for name in scripts if f"| `{name}` |" not in text]
