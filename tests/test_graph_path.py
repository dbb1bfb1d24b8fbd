"""`test_device_path.py` with CUDA graphs: what stands in for CUDA records a step's operators and launches, and replays
them into the same memory. Requests get the tokens of the CPU's path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from graph_recording import RecordingDouble
from mixtures import make_mixture
from models.architectures import test_deepseek_v2, test_gemma2
from tiny import make_config
from triton_interpreter import corrected

import rayllm.runner.runner
from rayllm import LLM, SamplingParams
from rayllm.config import EngineConfig
from rayllm.distributed.groups import TensorParallel
from rayllm.engine.owner.resolve import resolve
from rayllm.linear import PackedLinear
from rayllm.runner.graphs import open_graphs
from rayllm.runner.runner import Runner
from rayllm.transfer.upload import Upload
from rayllm_kernels.device import interpreted

PROMPTS = [[5, 6, 7], list(range(10, 43)), [9] * 12]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
    SamplingParams(temperature=1.1, seed=2, top_k=20, max_tokens=4, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=5, repetition_penalty=1.3, ignore_eos=True),
]
SIZES = {"block_size": 16, "num_kv_blocks": 40, "max_num_batched_tokens": 16, "max_model_len": 64, "max_num_seqs": 3}


class UploadToOnePlace(Upload):
    """An upload as a GPU has it: arrays of the same sizes come to the same addresses."""

    def __init__(self, device: torch.device, num_bytes: int):
        super().__init__(torch.device("cuda"), num_bytes)

    def _allocate(self, num_bytes: int) -> None:
        self._on_device = torch.zeros(num_bytes, dtype=torch.uint8)
        self._host = [torch.from_numpy(np.zeros(num_bytes, np.uint8)) for _ in range(3)]


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> RecordingDouble:
    """Runners that are made have graphs by this recorder."""
    found = RecordingDouble()
    monkeypatch.setattr(rayllm.runner.runner, "Upload", UploadToOnePlace)
    monkeypatch.setattr(rayllm.runner.runner, "open_graphs", lambda config, model: open_graphs(config, model, found))
    return found


def _tokens(path: Path, **settings: Any) -> list[list[int]]:
    with LLM(str(path), device="cpu", skip_tokenizer_init=True, **{**SIZES, **settings}) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


def _check(folder: Path, config: Any, recorder: RecordingDouble, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    path = make_mixture(folder, config)
    expected = _tokens(path)
    assert not recorder.graphs
    monkeypatch.setattr(PackedLinear, "supports", lambda weight: False)  # so that layers write their residual in place
    with corrected(), interpreted():
        found = _tokens(path, cuda_graphs=when)
    assert found == expected
    assert len(recorder.replays) > 10


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma2, two KV groups": lambda: transformers.Gemma2Config(**{**test_gemma2.TINY, "sliding_window": 20}),
    "deepseek_v2, latents and experts": lambda: transformers.DeepseekV2Config(**test_deepseek_v2.TINY),
}


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # padding's
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_by_graphs_are_those_of_the_cpu(
    name: str, tmp_path: Path, recorder: RecordingDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(tmp_path, CONFIGS[name](), recorder, monkeypatch, "auto")


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # padding's
def test_graphs_of_all_sizes_are_captured_at_start(
    tmp_path: Path, recorder: RecordingDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    _check(tmp_path, make_config("llama"), recorder, monkeypatch, "full")
    assert len(recorder.graphs) == 3 + 3  # decode steps of 1, 2 and 3 rows; steps of 16 tokens, in three pieces


def test_graphs_belong_to_an_epoch(llama_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    graphs = SimpleNamespace(begin=lambda: calls.append("begin"), drop=lambda: calls.append("drop"))
    monkeypatch.setattr(rayllm.runner.runner, "open_graphs", lambda config, model: graphs)
    tp = TensorParallel()
    runner = Runner(resolve(EngineConfig(model=str(llama_path), device="cpu", num_kv_blocks=40)), tp)
    assert not calls  # no KV pool yet
    runner.start(40)
    for release in tp.before_abort:
        release()
    runner.start(40)
    assert calls == ["begin", "drop", "begin"]
