"""Steps computed by recorded graphs, against the same steps computed eagerly. See `graph_recording.py` for what stands
in for CUDA."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_backend import DenseBackend
from graph_recording import RecordingDouble
from tiny import make_config
from torch import Tensor

from rayllm.config import EngineConfig, ResolvedConfig
from rayllm.distributed.groups import TensorParallel
from rayllm.engine.owner.resolve import resolve
from rayllm.errors import ConfigError
from rayllm.layers.batch import Batch, DeviceRows
from rayllm.models import Model
from rayllm.models.decoder import Decoder, kv_specs
from rayllm.models.registry import read_spec
from rayllm.runner.batch import StepShape
from rayllm.runner.graphs import StepGraphs, decode_sizes, mixed_sizes, open_graphs
from rayllm.weights.source import DummyWeights

BLOCK_SIZE, MAX_ROWS, BLOCKS_A_ROW = 4, 5, 6
NUM_BLOCKS = MAX_ROWS * BLOCKS_A_ROW
PROMPTS = [[5, 9, 30, 31, 77, 100, 12], [3], [17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28], [200, 201, 202]]
"""In rows 0, 1, ... Steps give each row its next tokens, as `counts` of `Steps.run` says."""


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    make_config(request.param, architectures=[f"{request.param.capitalize()}ForCausalLM"]).save_pretrained(folder)
    spec, device, dtype, backend = read_spec(str(folder)), torch.device("cpu"), torch.float32, DenseBackend()
    decoder = Decoder(spec, DummyWeights(0, dtype, device), TensorParallel(), backend, dtype, device)
    return Model(decoder, backend, kv_specs(spec, 1), dtype, device)


def _graphs(model: Model, recorder: RecordingDouble, *, must_record: bool = True) -> StepGraphs:
    graphs = StepGraphs(
        model,
        recorder,
        decode_sizes=(1, 2, 4),
        mixed_sizes=(8, 16),
        max_num_seqs=MAX_ROWS,
        must_record=must_record,
    )
    graphs.begin()
    return graphs


@dataclass
class Steps:
    """Greedy decoding of `PROMPTS`, one step at a time; inputs of steps padded alike are at the same addresses."""

    model: Model
    graphs: StepGraphs | None = None
    tokens: dict[int, list[int]] = field(default_factory=dict)
    num_computed: dict[int, int] = field(default_factory=dict)
    hidden: list[Tensor] = field(default_factory=list)
    """Of each step's rows."""
    held: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = self.model.allocate_kv(NUM_BLOCKS + 1, BLOCK_SIZE)
        self.pool.clear(range(NUM_BLOCKS + 1))
        self.tokens = {row: list(prompt) for row, prompt in enumerate(PROMPTS)}
        self.num_computed = dict.fromkeys(self.tokens, 0)
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0))
        self.table_SMB = order.view(1, MAX_ROWS, BLOCKS_A_ROW).int()

    def run(self, *steps: dict[int, int]) -> Steps:
        """Each step computes so many tokens of each of its rows, those with one token first."""
        for counts in steps:
            shape = self.graphs and self.graphs.shape(len(counts), sum(counts.values()), len(counts))
            with torch.inference_mode():
                batch = self._batch(counts, shape)
                hidden_ND = (
                    self.model.forward(batch, self.pool)
                    if self.graphs is None
                    else self.graphs.forward(batch, self.pool)
                )[: len(counts)].clone()
                sampled = self.model.logits(hidden_ND).argmax(-1).tolist()
            self.hidden.append(hidden_ND)
            for row, token in zip(counts, sampled, strict=True):
                self.num_computed[row] += counts[row]
                if self.num_computed[row] == len(self.tokens[row]):
                    self.tokens[row].append(token)
        return self

    def _batch(self, counts: dict[int, int], shape: StepShape | None) -> Batch:
        begins = {row: self.num_computed[row] for row in counts}
        places = [(row, begins[row] + i) for row, count in counts.items() for i in range(count)]
        starts = [0]
        for count in counts.values():
            starts.append(starts[-1] + count)
        kv_lens = [begins[row] + count for row, count in counts.items()]
        blocks = self.table_SMB[0].tolist()
        slots = [blocks[row][at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for row, at in places]
        num_decode = sum(count == 1 for count in counts.values())
        shape = shape or StepShape(len(places), len(counts), len(counts))
        num_tokens, num_lines = shape.num_tokens, shape.num_lines

        def held(name: str, values: list[int], size: int, padding: int, dtype: torch.dtype = torch.int64) -> Tensor:
            tensor = self.held.setdefault((name, size), torch.empty(size, dtype=dtype))
            return tensor.copy_(torch.tensor(values + [padding] * (size - len(values))))

        rows = DeviceRows(
            rows_R=held("rows", list(counts), num_lines, 0, torch.int32),
            query_starts_R1=held("starts", starts, num_lines + 1, starts[-1], torch.int32),
            kv_lens_R=held("lens", kv_lens, num_lines, 0, torch.int32),
            block_table_SMB=self.table_SMB,
            num_decode_lines=num_lines if num_decode == len(counts) else num_decode,
            max_query_len=max(counts.values()),
        )
        return Batch(
            token_ids_T=held("tokens", [self.tokens[row][at] for row, at in places], num_tokens, 0),
            positions_T=held("positions", [at for _, at in places], num_tokens, 0),
            slots_ST=held("slots", slots, num_tokens, -1).view(1, -1),
            query_starts=starts,
            kv_lens=kv_lens,
            block_table_SRB=self.table_SMB[:, list(counts)],
            logits_indices_N=held("logits", [end - 1 for end in starts[1:]], shape.num_logits, 0),
            num_decode_rows=num_decode,
            block_size=BLOCK_SIZE,
            device_rows=rows,
        )


SCHEDULE: list[dict[int, int]] = [
    {0: 7, 3: 3},  # 10 of 16 tokens: eager
    {0: 1, 3: 1, 2: 9},  # 11 of 16: recorded
    {0: 1, 3: 1},  # 2 rows of 2: eager
    {0: 1, 3: 1, 2: 3},  # 5 of 8: eager
    {3: 1, 2: 1},  # recorded
    {1: 1, 0: 1, 2: 1},  # 3 of 4: eager
    {0: 1, 1: 1, 2: 1, 3: 1},  # recorded
    {1: 1, 3: 1, 2: 1},  # replayed with one line of padding
    {2: 1},  # 1 of 1: eager
    {0: 1, 2: 1},  # replayed
    {2: 1},  # recorded
    {2: 1},  # replayed
]


def test_steps_by_graphs_have_the_hidden_states_of_eager_steps(model: Model) -> None:
    eager = Steps(model).run(*SCHEDULE)
    recorder = RecordingDouble()
    steps = Steps(model, _graphs(model, recorder)).run(*SCHEDULE)
    assert steps.tokens == eager.tokens
    for found_ND, expected_ND in zip(steps.hidden, eager.hidden, strict=True):
        torch.testing.assert_close(found_ND, expected_ND, atol=1e-5, rtol=1e-5)
    num_layers = len(model.decoder.spec.layers)
    assert len(recorder.graphs) == 3 + (num_layers + 1)  # decode steps of 2, 4 and 1 rows; one mixed step in pieces
    assert len(recorder.replays) == 6 + (num_layers + 1)
    assert recorder.num_pools == 1


def test_a_recorded_mixed_step_is_broken_at_each_layers_attention(model: Model) -> None:
    recorder = RecordingDouble()
    steps = Steps(model, _graphs(model, recorder)).run({0: 4}, {0: 1, 2: 4}, {0: 2, 2: 3})
    eager = Steps(model).run({0: 4}, {0: 1, 2: 4}, {0: 2, 2: 3})
    for found_ND, expected_ND in zip(steps.hidden, eager.hidden, strict=True):
        torch.testing.assert_close(found_ND, expected_ND, atol=1e-5, rtol=1e-5)
    pieces = len(model.decoder.spec.layers) + 1
    assert recorder.graphs[:pieces] == recorder.replays[:pieces] == recorder.replays[pieces:]
    assert "forward" not in vars(model.backend)


def test_after_a_drop_steps_are_eager_until_they_are_recorded_again(model: Model) -> None:
    recorder = RecordingDouble()
    graphs = _graphs(model, recorder)
    steps = Steps(model, graphs).run({0: 7, 3: 3}, *[{0: 1, 3: 1}] * 3)
    assert len(recorder.graphs) == 1
    graphs.drop()
    assert recorder.graphs[0].was_reset
    steps.run(*[{0: 1, 3: 1}] * 3)
    assert len(recorder.replays) == 2  # none is recorded between the epochs
    graphs.begin()
    steps.run(*[{0: 1, 3: 1}] * 2)
    assert (len(recorder.graphs), recorder.num_pools, len(recorder.replays)) == (1 + 1, 2, 2 + 1)
    assert steps.tokens == Steps(model).run({0: 7, 3: 3}, *[{0: 1, 3: 1}] * 8).tokens


def test_inputs_that_have_moved_are_recorded_anew(model: Model) -> None:
    recorder = RecordingDouble()
    steps = Steps(model, _graphs(model, recorder)).run({0: 7, 3: 3}, *[{0: 1, 3: 1}] * 3)
    kept = dict(steps.held)  # alive, so that nothing new is where it was
    steps.held.clear()
    steps.run(*[{0: 1, 3: 1}] * 3)
    assert len(recorder.graphs) == 2
    assert len(recorder.replays) == 2 + 2
    assert steps.tokens == Steps(model).run({0: 7, 3: 3}, *[{0: 1, 3: 1}] * 6).tokens
    assert kept


@pytest.mark.parametrize("must_record", [False, True])
def test_a_step_that_waits_for_the_device_cannot_be_recorded(
    model: Model, must_record: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prepare = model.backend.prepare

    def waiting(batch: Batch) -> list[object]:
        assert batch.token_ids_T.sum().item() >= 0
        return prepare(batch)

    monkeypatch.setattr(model.backend, "prepare", waiting)
    recorder = RecordingDouble()
    steps = Steps(model, _graphs(model, recorder, must_record=must_record)).run({0: 7, 3: 3}, {0: 1, 3: 1})
    if must_record:
        with pytest.raises(RuntimeError, match="not permitted while a graph is recorded"):
            steps.run({0: 1, 3: 1})
        return
    with caplog.at_level(logging.WARNING):
        steps.run({0: 1, 3: 1}, {0: 1, 3: 1})
    [record] = caplog.records
    assert "decode steps run without CUDA graphs" in record.getMessage()
    assert not recorder.replays
    assert steps.graphs is not None
    assert steps.graphs.shape(3, 3, 3) == StepShape(4, 4, 4)  # as on a rank that could record it
    assert steps.tokens == Steps(model).run({0: 7, 3: 3}, *[{0: 1, 3: 1}] * 3).tokens


def test_a_step_is_padded_to_the_next_size_or_not_at_all(model: Model) -> None:
    graphs = _graphs(model, RecordingDouble())
    assert graphs.shape(3, 3, 3) == StepShape(4, 4, 4)
    assert graphs.shape(5, 5, 5) is None
    assert graphs.shape(2, 3, 2) == StepShape(8, 2, MAX_ROWS)
    assert graphs.shape(2, 9, 2) == StepShape(16, 2, MAX_ROWS)
    assert graphs.shape(2, 17, 2) is None
    assert graphs.shape(1, 9, 9) is None  # log-probabilities of a prompt
    assert [bucket.num_tokens for bucket in graphs.buckets] == [16, 8, 4, 2, 1]


def _config(folder: Path, **settings: Any) -> ResolvedConfig:
    given = {"device": "cpu", "num_kv_blocks": 50, "max_num_seqs": 20, "load_format": "dummy", **settings}
    return resolve(EngineConfig(model=str(folder), **given))


def test_graphs_are_opened_as_the_config_asks(model: Model, llama_path: Path) -> None:
    assert open_graphs(_config(llama_path), model) is None  # a CPU has none
    recorder = RecordingDouble()
    assert open_graphs(_config(llama_path, cuda_graphs="off"), model, recorder) is None
    graphs = open_graphs(_config(llama_path, max_num_batched_tokens=40), model, recorder)
    assert graphs is not None
    assert [bucket.num_tokens for bucket in graphs.buckets if bucket.is_decode] == [20, 16, 8, 4, 2, 1]
    assert [bucket.num_tokens for bucket in graphs.buckets if not bucket.is_decode] == [32, 16]
    graphs = open_graphs(_config(llama_path, max_cudagraph_capture_size=4), model, recorder)
    assert graphs is not None
    assert graphs.shape(5, 5, 5) is None


def test_where_graphs_are_impossible_the_reason_is_told(
    model: Model, llama_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(DenseBackend, "uses_device_rows", False)
    with caplog.at_level(logging.INFO):
        assert open_graphs(_config(llama_path), model, RecordingDouble()) is None
    assert "the attention backend 'dense' reads the lengths of rows on the host" in caplog.text
    with pytest.raises(ConfigError, match="cuda_graphs='full' cannot be honoured: the attention backend 'dense'"):
        open_graphs(_config(llama_path, cuda_graphs="full"), model, RecordingDouble())


def test_graphs_take_memory_as_their_largest_step_does(model: Model) -> None:
    graphs = _graphs(model, RecordingDouble())
    assert graphs.pool_bytes(1000, 64) == 250
    assert graphs.pool_bytes(1000, 12) == 1000


def test_sizes_end_at_the_largest_step() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert len(decode_sizes(256)) == 3 + 32
    assert mixed_sizes(15) == []
    assert mixed_sizes(200) == [*range(16, 129, 16), 160, 192]
    assert mixed_sizes(8192)[-5:] == [512, 640, 768, 896, 1024]
