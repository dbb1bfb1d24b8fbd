"""Steps of a whole runner on a CUDA device that is not there: what they launch, copy and wait for.

    python tests/fake_steps.py GUARD TP '[{"model": "llama", "kind": "decode", "sampling": "greedy", "num_layers": 2}]'

prints the counts of each case as JSON. GUARD is what `fake_device.build_guard` made; with TP > 1 the other ranks are
torch's fake process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

if TYPE_CHECKING:
    from rayllm.distributed.all_reduce import CustomAllReduce
    from rayllm.messages import StepPlan
    from rayllm.runner.runner import Runner

ROOT = Path(__file__).parents[1]
NUM_ROWS = 9
"""Odd, so that what stands behind flags of all rows in a download is at an odd place."""
CONTEXT = 100
_BLOCKS_A_ROW = 4
_NUM_BLOCKS = 64

_HEADS = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_HEADS, "intermediate_size": 14336},
    "qwen2": {"model_type": "qwen2", **_HEADS, "intermediate_size": 18944},
    "qwen3": {"model_type": "qwen3", **_HEADS, "intermediate_size": 12288},
    "mixtral": {"model_type": "mixtral", **_HEADS, "intermediate_size": 14336, "num_local_experts": 8},
}
"""Configs of well-known models, but for the number of layers and the vocabulary."""

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top_p": {"temperature": 0.8, "top_p": 0.95},
    "top_k": {"temperature": 0.8, "top_k": 40, "min_p": 0.05},
    "penalties": {"temperature": 0.8, "frequency_penalty": 0.5, "presence_penalty": 0.1, "repetition_penalty": 1.1},
    "edited": {"logit_bias": {5: 1.0}, "allowed_token_ids": tuple(range(3, 400)), "min_tokens": 9},
    "bad_words": {"bad_words_token_ids": ((7, 8), (9,))},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "grammar": {},
}


@dataclass(frozen=True)
class Case:
    """One step of `NUM_ROWS` rows that sample alike. Kinds: `prefill` (whole prompts), `chunk` (second halves of
    prompts), `decode` (the step after the prompts), `mixed` (half of the rows decode, half begin)."""

    model: str = "llama"
    kind: str = "decode"
    sampling: str = "greedy"
    tp: int = 1
    num_layers: int = 2
    graphs: bool = False
    """The step is replayed from CUDA graphs, which steps of its size before it were recorded in."""
    custom: bool = False
    """Ranks sum by kernels of their own."""


@dataclass(frozen=True)
class Counts:
    """Of one step. The places are file and line, with how often."""

    launches: dict[str, int]
    """Kernels by name, copies within the device among them."""
    collectives: dict[str, int]
    copies_to_device: dict[str, int]
    copies_to_host: dict[str, int]
    blocking_copies: dict[str, int]
    """Copies to the device that wait for it, or are not of pinned memory."""
    waits: dict[str, int]
    """What makes `Runner.launch` wait for the device."""
    finish_waits: dict[str, int]
    """What makes `Runner.finish` wait."""
    mismatches: dict[str, int]
    """Operations with a tensor on the host among those on the device."""

    @property
    def num_launches(self) -> int:
        return sum(self.launches.values())

    @property
    def num_gemms(self) -> int:
        from fake_device import GEMMS

        return sum(count for name, count in self.launches.items() if name in GEMMS)


def measure(cases: Sequence[Case], guard: Path) -> dict[Case, Counts]:
    """Runs the cases in a process for each size of the group. Raises RuntimeError with its output where one fails."""
    found: dict[Case, Counts] = {}
    paths = [str(ROOT / folder) for folder in ("tests", "kernels", ".")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    for tp in sorted({case.tp for case in cases}):
        group = [case for case in cases if case.tp == tp]
        arguments = [str(guard), str(tp), json.dumps([asdict(case) for case in group])]
        done = subprocess.run(
            [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"fake steps with {tp} ranks:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        counts = json.loads(done.stdout.splitlines()[-1])
        found |= {case: Counts(**entry) for case, entry in zip(group, counts, strict=True)}
    return found


# -------------------------------------------------------------------------------------------- in the measuring process


class _CountedGraph:
    """Its replay is one launch."""

    def __init__(self, log: Any):
        self._log = log

    def replay(self) -> None:
        if self._log.is_on:
            self._log.launches["graph"] += 1

    def reset(self) -> None:
        pass


class _CountingRecorder:
    """A `GraphRecorder` of work without values. What is recorded counts for nothing; what would wait is refused."""

    def __init__(self, log: Any):
        self._log = log

    def session(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def begin(self) -> None:
        self._log.begin()

    def end(self) -> _CountedGraph:
        assert not self._log.waits, f"waits while a graph is recorded: {self._log.waits}"
        self._log.is_on = False
        return _CountedGraph(self._log)

    def abandon(self) -> None:
        self._log.is_on = False

    def alias(self, tensor: Any) -> Any:
        return tensor

    def forget_pool(self) -> None:
        pass


def _open_graphs(case: Case, log: Any) -> Any:
    """In place of `open_graphs`: graphs that must be, of fake tensors, which are nowhere."""
    from rayllm.runner import graphs

    def opened(config: Any, model: Any) -> Any:
        return graphs.open_graphs(config, model, _CountingRecorder(log)) if case.graphs else None

    return opened


def _runner(case: Case, folder: Path, log: Any) -> Runner:
    """Its weights have no values; its host tensors have."""
    import rayllm.runner.runner as module
    from rayllm.cli import random_model
    from rayllm.config import EngineConfig
    from rayllm.distributed.groups import TensorParallel
    from rayllm.engine.owner.resolve import resolve

    name = f"{case.model}-{case.num_layers}"
    random_model.SHAPES[name] = {**MODELS[case.model], "num_hidden_layers": case.num_layers}
    config = resolve(
        EngineConfig(
            model=str(random_model.random_model(f"random:{name}", with_weights=False, cache=folder)),
            load_format="dummy",
            dtype="bfloat16",
            device="cuda",
            num_kv_blocks=_NUM_BLOCKS,
            max_num_seqs=2 * NUM_ROWS,
            max_num_batched_tokens=2048,
            cuda_graphs="full" if case.graphs else "off",
        ),
        num_gpus=1,
        num_cores=2,
        backend="inproc",
    )
    log.computes_on_host = False
    load_model = module.load_model

    def load(*args: Any, **kwargs: Any) -> Any:
        try:
            return load_model(*args, **kwargs)
        finally:
            log.computes_on_host = True

    import torch

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "check_device"))
        stack.enter_context(mock.patch.object(module, "load_model", load))
        stack.enter_context(mock.patch.object(module, "open_graphs", _open_graphs(case, log)))
        in_turn = mock.patch("rayllm.models.decoder.make_in_parallel", lambda makers: [make() for make in makers])
        stack.enter_context(in_turn)  # fake tensors are a matter of this thread alone
        tp = TensorParallel(0, case.tp, custom=_custom(case.tp) if case.custom else None)
        runner = module.Runner(config, tp, device=torch.device("cuda", 0))
    runner.start(_NUM_BLOCKS)
    return runner


def _custom(size: int) -> CustomAllReduce:
    """One that has met its peers, on a GPU like an H100."""
    import torch

    from rayllm.distributed.all_reduce import SIZE_LIMITS, CustomAllReduce
    from rayllm_kernels.all_reduce import Peers

    device, limits = torch.device("cuda", 0), SIZE_LIMITS[9, size]
    made = CustomAllReduce(0, size, device, limits)
    addresses, calls = (torch.zeros(length, dtype=torch.int64, device=device) for length in (size, 2))
    abort = torch.zeros(1, dtype=torch.int32, device=device)  # pinned memory is no other to a kernel
    made._peers = Peers(0, size, limits.two_shot_bytes, addresses, calls, abort)
    return made


def _plan(step: int, rows: Sequence[int], counts: Sequence[int], new_rows: Sequence[int], sampling: str) -> StepPlan:
    """`new_rows` have prompts of `CONTEXT` tokens and all their blocks."""
    from rayllm.messages import RowParams, RowStart, RowTable, StepPlan
    from rayllm.request import pack_ids

    params = RowParams(**SAMPLING[sampling])
    starts = [
        RowStart(
            row,
            pack_ids([5 + row] * CONTEXT),
            CONTEXT,
            0,
            [RowTable(pack_ids(range(row * _BLOCKS_A_ROW, (row + 1) * _BLOCKS_A_ROW)))],
            params,
            row,
            0,
        )
        for row in new_rows
    ]
    return StepPlan(step, 0, b"", starts, b"", b"", pack_ids(rows), pack_ids(counts), sum(counts))


def _plans(case: Case) -> list[StepPlan]:
    """Of which the last is measured."""
    rows = list(range(NUM_ROWS))
    half = CONTEXT // 2
    if case.kind == "prefill":
        return [_plan(1, rows, [CONTEXT] * NUM_ROWS, rows, case.sampling)]
    if case.kind == "chunk":
        first = _plan(1, rows, [half] * NUM_ROWS, rows, case.sampling)
        return [first, _plan(2, rows, [CONTEXT - half] * NUM_ROWS, [], case.sampling)]
    if case.kind == "decode":
        first = _plan(1, rows, [CONTEXT] * NUM_ROWS, rows, case.sampling)
        return [first, *(_plan(step, rows, [1] * NUM_ROWS, [], case.sampling) for step in (2, 3, 4))]
    assert case.kind == "mixed", case.kind
    old, new = rows[: NUM_ROWS // 2], rows[NUM_ROWS // 2 :]
    first = _plan(1, old, [CONTEXT] * len(old), old, case.sampling)
    counts = [1] * len(old) + [CONTEXT] * len(new)
    return [first, *(_plan(step, rows, counts, new, case.sampling) for step in (2, 3, 4))]


def _masks(case: Case, runner: Runner, rows: Sequence[int]) -> tuple[list[int], np.ndarray] | None:
    """Of rows that a grammar binds, which allows all ids: the model has no tokenizer that a grammar could read."""
    if case.sampling != "grammar":
        return None
    num_bytes = -(-runner._config.spec.vocab_size // 8)
    return list(range(len(rows))), np.full((len(rows), num_bytes), 255, np.uint8)


def run(case: Case, folder: Path, log: Any) -> dict[str, int]:
    """Leaves in `log` (`fake_device.DeviceLog`) what the last step did; what `launch` waited for is returned."""
    runner = _runner(case, folder, log)
    *earlier, last = _plans(case)
    with (
        mock.patch.object(runner._structured, "advance", return_value={}),  # what was drawn has no value
        mock.patch.object(runner._structured, "fail"),
        mock.patch.object(runner._structured, "masks", partial(_masks, case, runner)),
        mock.patch("rayllm.runner.graphs._addresses", return_value=()),
    ):
        for plan in earlier:
            runner.execute(plan)
        log.begin()
        in_flight = runner.launch(last)
        waits = dict(log.waits)
        log.waits.clear()
        runner.finish(in_flight)
    log.is_on = False
    return waits


def _measured(case: Case, folder: Path, log: Any) -> Counts:
    waits = run(case, folder, log)
    return Counts(
        launches=dict(log.launches),
        collectives=dict(log.collectives),
        copies_to_device=dict(log.copies_to_device),
        copies_to_host=dict(log.copies_to_host),
        blocking_copies=dict(log.blocking_copies),
        waits=waits,
        finish_waits=dict(log.waits),
        mismatches=dict(log.mismatches),
    )


@contextlib.contextmanager
def _group(size: int) -> Iterator[None]:
    if size == 1:
        yield
        return
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    yield
    dist.destroy_process_group()


def _main(guard: Path, tp: int, cases: list[Case]) -> None:
    from fake_device import fake_cuda

    with tempfile.TemporaryDirectory() as folder, fake_cuda(guard) as log, _group(tp):
        found = [asdict(_measured(case, Path(folder), log)) for case in cases]
    print(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]), [Case(**entry) for entry in json.loads(sys.argv[3])])
