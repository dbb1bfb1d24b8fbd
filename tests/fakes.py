"""Fakes that stand where processes would: workers that compute tokens by a formula, and a config without a model."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np

from rayllm.config import EngineConfig, ModelShape, ResolvedConfig
from rayllm.errors import WorkerDiedError
from rayllm.messages import StepPlan, StepResult
from rayllm.request import Request, SamplingParams, pack_ids, unpack_ids
from rayllm.spec import DecoderSpec, GroupedAttentionSpec, LayerSpec, MlpSpec, NormSpec

VOCAB_SIZE = 1000
EOS_ID = 999


def fake_spec(
    vocab_size: int = VOCAB_SIZE, num_layers: int = 1, windows: Iterable[int | None] | None = None
) -> DecoderSpec:
    """A small model of no architecture, with a layer for each of `windows` where those are given."""
    norm = NormSpec("rms", 1e-6)
    windows = [None] * num_layers if windows is None else windows
    attentions = [GroupedAttentionSpec(num_heads=4, num_kv_heads=2, head_dim=16, scale=0.25, window=w) for w in windows]
    mlp = MlpSpec(128, "silu", gated=True)
    return DecoderSpec(
        architecture="FakeForCausalLM",
        dtype="float32",
        vocab_size=vocab_size,
        hidden_size=64,
        layers=tuple(LayerSpec(attention, mlp, norm) for attention in attentions),
        final_norm=norm,
        tied_embeddings=False,
        max_model_len=4096,
    )


def fake_config(**changes: Any) -> ResolvedConfig:
    """A resolved config of a model that is nowhere: vocabulary 1000, end of sequence 999."""
    fields: dict[str, Any] = {
        "engine": EngineConfig(**changes.pop("engine", {})),
        "model_path": "/nowhere",
        "tokenizer_path": "/nowhere",
        "served_model_name": "fake",
        "dtype": "float32",
        "device": "cpu",
        "backend": "inproc",
        "max_model_len": 128,
        "block_size": 4,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "shape": ModelShape(vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_ID,), num_layers=1),
        "spec": fake_spec(),
        "num_threads": 1,
    }
    return ResolvedConfig(**{**fields, **changes})


def make_request(
    prompt: list[int], *, request_id: str = "r", max_tokens: int = 4, seed: int = 0, **params: Any
) -> Request:
    """A request with resolved seed and max_tokens; other arguments are `SamplingParams`."""
    return Request(
        request_id=request_id,
        prompt=pack_ids(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        seed=seed,
        max_tokens=max_tokens,
    )


def next_token(tokens: list[int], seed: int, choice: int) -> int:
    """The token that the fake model gives after `tokens`: a pure function, never the end of sequence."""
    digest = hashlib.sha256(repr((tokens, seed, choice)).encode()).digest()
    return int.from_bytes(digest[:4], "little") % EOS_ID


def expected_tokens(request: Request, choice: int = 0) -> list[int]:
    """What the fake model emits for a request that runs to `max_tokens`."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        tokens.append(next_token(tokens, request.seed, choice))
    return tokens[len(request.prompt_token_ids) :]


class OneStepAtATime:
    """The part of a runner that computes a plan when it is finished: `execute` does."""

    max_launched_steps = 1

    def may_launch_ahead(self, plan: StepPlan) -> bool:
        return False

    def launch(self, plan: StepPlan) -> StepPlan:
        return plan

    def is_done(self, launched: StepPlan) -> bool:
        return True

    def finish(self, launched: StepPlan) -> StepResult:
        return self.execute(launched)

    def execute(self, plan: StepPlan) -> StepResult:
        raise NotImplementedError


class LaunchingRunner:
    """A runner whose device computes beside the host: `calls` has what was launched and finished, in order. A step is
    done once it is in `done`; those in `bound` may not be launched ahead, `fails_at_launch` and `fails_at_finish` fail.
    """

    max_launched_steps = 2

    def __init__(
        self, bound: Iterable[int] = (), fails_at_launch: Iterable[int] = (), fails_at_finish: Iterable[int] = ()
    ):
        self.calls: list[str] = []
        self.done: set[int] = set()
        self._bound, self._fails_at_launch, self._fails_at_finish = set(bound), {*fails_at_launch}, {*fails_at_finish}

    def num_blocks_available(self) -> int:
        return 33

    def start(self, num_blocks: int) -> None:
        self.calls.append(f"start {num_blocks}")

    def warm_up(self) -> None:
        self.calls.append("warm_up")

    def may_launch_ahead(self, plan: StepPlan) -> bool:
        return plan.step not in self._bound

    def launch(self, plan: StepPlan) -> StepPlan:
        self.calls.append(f"launch {plan.step}")
        if plan.step in self._fails_at_launch:
            raise RuntimeError(f"no memory to launch {plan.step}")
        return plan

    def is_done(self, launched: StepPlan) -> bool:
        return launched.step in self.done

    def finish(self, launched: StepPlan) -> StepResult:
        self.calls.append(f"finish {launched.step}")
        if launched.step in self._fails_at_finish:
            raise RuntimeError(f"step {launched.step} was not computed")
        return StepResult(launched.step, launched.epoch, b"", b"", {}, {}, 0.5)


def empty_plan(step: int, epoch: int = 0) -> StepPlan:
    """A plan of no rows."""
    return StepPlan(step, epoch, b"", [], b"", b"", b"", b"", 0)


class FakeExecutor:
    """Workers with no tensors: keeps rows as a real one does and answers with `next_token`.

    `dies` and `hangs` are numbers of steps at which `receive` says, once each, that rank 1 is gone or that no result
    came in time. Where `recovers` is False, a lost worker is lost for good.
    """

    ranks = (0, 1)

    def __init__(
        self,
        num_blocks: int = 64,
        max_inflight_steps: int = 2,
        dies: Iterable[int] = (),
        hangs: Iterable[int] = (),
        silent: Iterable[int] = (1,),
        recovers: bool = True,
    ):
        self.num_blocks = num_blocks
        self.max_inflight_steps = max_inflight_steps
        self.sent: list[StepPlan] = []
        self.recovered: list[list[int]] = []
        self.closed = False
        self._dies = set(dies)
        self._hangs = set(hangs)
        self._silent = list(silent)
        self._recovers = recovers
        self._plans: deque[StepPlan] = deque()
        self._rows: dict[int, dict[str, Any]] = {}

    def send(self, plan: StepPlan) -> None:
        assert len(self._plans) < self.max_inflight_steps, "more steps in flight than max_inflight_steps"
        self.sent.append(plan)
        self._plans.append(plan)

    def receive(self, timeout_s: float | None) -> StepResult:
        step = self._plans[0].step
        if step in self._dies:
            self._dies.remove(step)
            raise WorkerDiedError(1, "killed by the test")
        if step in self._hangs:
            raise TimeoutError("stopped by the test")
        plan = self._plans.popleft()
        for row in unpack_ids(plan.finished_rows):
            self._rows.pop(row, None)
        for new in plan.new_rows:
            self._rows[new.row] = {
                "tokens": list(unpack_ids(new.tokens)),
                "computed": new.num_computed_tokens,
                "seed": new.seed,
                "choice": new.choice,
            }
        sampled: list[int] = []
        token_ids: list[int] = []
        for row, count in zip(unpack_ids(plan.rows), unpack_ids(plan.counts), strict=True):
            state = self._rows[row]
            state["computed"] += count
            if state["computed"] == len(state["tokens"]):
                token = next_token(state["tokens"], state["seed"], state["choice"])
                state["tokens"].append(token)
                sampled.append(row)
                token_ids.append(token)
        return StepResult(plan.step, plan.epoch, pack_ids(sampled), pack_ids(token_ids), {}, {}, elapsed_s=0.0)

    def silent_ranks(self) -> list[int]:
        self._hangs.discard(self._plans[0].step)
        return self._silent

    def stopped_ranks(self) -> list[int]:
        return []

    def recover(self, lost: Iterable[int]) -> dict[str, float]:
        if not self._recovers:
            raise WorkerDiedError(min(lost), "killed by the test")
        self.recovered.append(list(lost))
        self._plans.clear()
        self._rows.clear()
        return {"all": 0.0}

    def describe_rank(self, rank: int) -> str:
        return f"rank {rank}'s log is empty"

    def check(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def packed_floats(values: list[float]) -> bytes:
    """float32 as messages carry them."""
    return np.asarray(values, np.float32).tobytes()
