"""`test_device_path.py` with CUDA graphs: what stands in for CUDA records a step's operators and launches, and replays
them into the same memory. Requests get the tokens of the CPU's path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from graph_recording import RecordingDouble
from triton_interpreter import corrected

import rayllm.runner.runner
from rayllm import LLM, SamplingParams
from rayllm.runner.graphs import open_graphs
from rayllm.transfer.upload import Upload
from rayllm_kernels.device import interpreted

PROMPTS = [[5, 6, 7], list(range(10, 43)), list(range(60, 81)), [9] * 12]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=1, max_tokens=7, ignore_eos=True),
    SamplingParams(temperature=1.1, seed=2, top_k=20, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=6, repetition_penalty=1.3, ignore_eos=True),
]
SIZES = {"block_size": 16, "num_kv_blocks": 40, "max_num_batched_tokens": 32, "max_model_len": 64, "max_num_seqs": 4}


class UploadToOnePlace(Upload):
    """An upload as a GPU has it: arrays of the same sizes come to the same addresses."""

    def __init__(self, device: torch.device):
        super().__init__(torch.device("cuda"), 2**16)

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
    with LLM(str(path), device="cpu", **{**SIZES, **settings}) as llm:
        return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, PARAMS)]


@pytest.mark.kernels
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")  # padding's
@pytest.mark.parametrize("when", ["auto", "full"])
def test_tokens_by_graphs_are_those_of_the_cpu(llama_path: Path, recorder: RecordingDouble, when: str) -> None:
    expected = _tokens(llama_path)
    assert not recorder.graphs
    with corrected(), interpreted():
        found = _tokens(llama_path, cuda_graphs=when)
    assert found == expected
    assert len(recorder.replays) > 10
    if when == "full":  # decode steps of 1, 2 and 4 rows, mixed steps of 16 and 32 tokens in three pieces each
        assert len(recorder.graphs) == 3 + 2 * 3
