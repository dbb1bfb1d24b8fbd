"""One rank of the model: it computes plans. It owns weights, KV pool, rows and sampler, and decides nothing.

The same class runs inside a worker actor and, alone, in a process without Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from rayllm.config import ResolvedConfig, count_cores
from rayllm.distributed.groups import TensorParallel
from rayllm.errors import NO_TOKEN_LEFT
from rayllm.layers.kv_cache import KVPool
from rayllm.messages import Finish, RowParams, StepPlan, StepResult
from rayllm.models import load_model
from rayllm.models.memory_plan import MemoryNeeds
from rayllm.request import pack_ids, unpack_ids
from rayllm.runner.batch import PromptLogprobSpan, StagedStep, stage_step
from rayllm.runner.device_check import check_device, device_name
from rayllm.runner.device_state import DeviceState
from rayllm.runner.graphs import open_graphs
from rayllm.runner.memory import check_weights_fit, leaves_room_to_memory, measure_step_bytes, plan_num_blocks
from rayllm.runner.rows import Rows
from rayllm.runner.trial_steps import EVERY_RULE, GREEDY, end_of, largest_counts, next_token_of, step_of_new_rows
from rayllm.sampling.logprobs import Logprobs, compute_logprobs
from rayllm.sampling.sampler import Draws, SampledOnHost, Sampler
from rayllm.structured.rows import StructuredRows
from rayllm.structured.vocabulary import Vocabulary
from rayllm.transfer.download import Download
from rayllm.transfer.upload import Upload
from rayllm.weights.progress import LoadProgress

log = logging.getLogger(__name__)

_WARM_UP_TOKENS = 16
_MAX_MASK_THREADS = 8
_NO_TOKEN_LEFT = Finish(
    "error", code=NO_TOKEN_LEFT, message="bad_words and the request's other constraints leave no token to sample"
)
_LOGPROB_SLICE = 256
"""Prompt positions whose logits are held at once."""


@dataclass(frozen=True, slots=True)
class InFlight:
    """A step that was launched and whose result was not read back: its tensors may still be computed."""

    plan: StepPlan
    step: StagedStep
    began_s: float
    """By `time.perf_counter`."""
    sampled: SampledOnHost | None
    """None where the step reaches no row's end."""
    prompt_logprobs: list[list[Logprobs]]
    """For each of `step.spans`, one slice of positions after another."""
    download: Download


class Runner:
    """Checks its device and loads this rank's shard at construction. `start` allocates the KV pool; then `execute`, or
    `launch` and `finish`, once a plan."""

    def __init__(
        self,
        config: ResolvedConfig,
        tp: TensorParallel,
        device: torch.device | None = None,
        progress: LoadProgress | None = None,
    ):
        self._config = config
        self._tp = tp
        self._device = device or _own_device(config)
        check_device(config, tp.rank, self._device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        spec = config.spec
        self._rope_boundary = spec.rope_boundary
        self._needs = MemoryNeeds.of_config(config)
        check_weights_fit(config, self._needs, self._device)
        progress, began_s = progress or LoadProgress(), time.perf_counter()
        self._model = load_model(
            config.model_path,
            spec,
            tp,
            dtype=self._dtype,
            device=self._device,
            load_format=config.engine.load_format,
            seed=config.engine.seed,
            architecture_module=config.architecture_module,
            attention_backend=config.engine.attention_backend,
            block_size=config.block_size,
            progress=progress,
        )
        log.info("read %.2f GB of weights in %.1f s", progress.bytes_read / 1e9, time.perf_counter() - began_s)
        backend = self._model.backend
        log.info("attention backend %r in %s on %s", backend.name, config.dtype, device_name(self._device))
        self._graphs = open_graphs(config, self._model)
        if self._graphs is not None:
            tp.before_abort.append(self._graphs.drop)
        self._upload = Upload(self._device, _upload_bytes(config))
        self._max_blocks = -(-config.max_model_len // config.block_size)
        on_device = self._max_blocks if backend.uses_device_rows else 0
        self._state = DeviceState(config.max_num_seqs, len(self._model.kv_groups), on_device, self._device)
        self._rows = self._no_rows(0)
        self._sampler = Sampler(
            max_rows=config.max_num_seqs,
            vocab_size=spec.vocab_size,
            max_model_len=config.max_model_len,
            eos_token_ids=config.shape.eos_token_ids,
            device=self._device,
        )
        self._structured = StructuredRows(
            partial(Vocabulary.load, config.tokenizer_path, spec.vocab_size, config.shape.eos_token_ids),
            spec.vocab_size,
            num_threads=max(1, min(_MAX_MASK_THREADS, count_cores() // (2 * tp.size))),
        )
        self._kv: KVPool | None = None
        self._has_windows = any(span.window is not None for span in config.kv_spans())
        self._unclean: set[int] = set()
        self._finished_s = 0.0

    def _no_rows(self, num_blocks: int) -> Rows:
        return Rows(
            self._config.max_num_seqs,
            self._max_blocks,
            num_blocks,
            num_kv_groups=len(self._model.kv_groups),
            notes_changes=self._model.backend.uses_device_rows,
        )

    def num_blocks_available(self) -> int:
        """KV blocks this rank could hold; the engine takes the least of all ranks, which call this together, once they
        have joined: on a GPU they compute the largest step, to see what it takes."""
        step_bytes = 0
        if self._device.type == "cuda" and leaves_room_to_memory(self._config):
            step_bytes = measure_step_bytes(self._config, self._device, self.compute_largest_step)
            if self._graphs is not None:
                step_bytes += self._graphs.pool_bytes(step_bytes, self._config.max_num_batched_tokens)
        return plan_num_blocks(self._config, self._needs, self._device, step_bytes)

    def compute_largest_step(self) -> None:
        """As many tokens and rows as a step may have, by every rule of the sampler, in a KV pool that is gone after it.
        Before `start`."""
        config, backend = self._config, self._model.backend
        counts = largest_counts(config.max_num_batched_tokens, config.max_num_seqs, config.max_model_len)
        # Only what the host prepares grows with the context.
        num_computed = 0 if backend.uses_device_rows else config.max_model_len - max(counts)
        self._rows = self._no_rows(1)
        self._kv = self._model.allocate_kv(2, config.block_size)
        self._kv.clear_all()
        try:
            self._compute_new_rows(counts, EVERY_RULE, num_computed)
        finally:
            self._kv = None

    def start(self, num_blocks: int) -> None:
        """Allocates the KV pool, once, and one block that no row is given; begins with no rows, every time. What the
        pool held is worth nothing then, and may be anything: a step may have been cut short."""
        self._rows = self._no_rows(num_blocks)
        for row in range(self._config.max_num_seqs):
            self._sampler.clear_row(row)
            self._structured.end(row)
        self._structured.prepare()
        if self._kv is None:
            self._kv = self._model.allocate_kv(num_blocks + 1, self._config.block_size)
        if self._graphs is not None:
            self._graphs.begin()
        self._unclean = set()
        if not self._model.backend.reads_unwritten_slots:
            return
        if self._device.type == "cpu" or self._has_windows:  # a CPU's system gives memory to what is used alone
            self._kv.clear([num_blocks])
            self._unclean = set(range(num_blocks))
        else:
            self._kv.clear_all()

    def warm_up(self) -> None:
        """One short prompt and one decode step, so that the first request does not pay for first uses (allocators,
        library handles, collectives, on a GPU the compiler); with `cuda_graphs="full"` also what makes all graphs be
        captured. Leaves no row behind; all ranks must call it."""
        num_tokens = min(_WARM_UP_TOKENS, self._config.max_model_len, self._config.max_num_batched_tokens)
        for params in (GREEDY,) if self._device.type == "cpu" else (GREEDY, EVERY_RULE):
            self._compute_new_rows([num_tokens], params, and_next=num_tokens < self._config.max_model_len)
        if self._graphs is not None and self._config.engine.cuda_graphs == "full":
            for bucket in self._graphs.buckets:
                counts = [1] * bucket.num_tokens
                if not bucket.is_decode:
                    num_whole, rest = divmod(bucket.num_tokens, self._config.max_model_len)
                    counts = [rest] * (rest > 0) + [self._config.max_model_len] * num_whole
                for _ in range(2):  # the second one is captured
                    self._compute_new_rows(counts)

    def _compute_new_rows(
        self, counts: Sequence[int], params: RowParams = GREEDY, num_computed: int = 0, *, and_next: bool = False
    ) -> None:
        """A trial step, and with `and_next` one more token of each row; leaves no row behind."""
        num_groups, num_rows = len(self._model.kv_groups), len(counts)
        plan = step_of_new_rows(counts, self._config.block_size, num_groups, params, num_computed, room=int(and_next))
        self.execute(plan)
        if and_next:
            self.execute(next_token_of(num_rows))
        self._rows.apply(end_of(num_rows))
        for row in range(num_rows):
            self._sampler.clear_row(row)

    @property
    def max_launched_steps(self) -> int:
        """Steps that may be launched and not finished."""
        return 2 if self._model.backend.uses_device_rows else 1

    def may_launch_ahead(self, plan: StepPlan) -> bool:
        """Whether the plan may be launched while the one before it is not finished: not with rows that a grammar binds,
        whose masks follow from the tokens of that one."""
        return not (
            any(new.params.structured_outputs is not None for new in plan.new_rows)
            or self._structured.bind_any(unpack_ids(plan.rows))
        )

    def execute(self, plan: StepPlan) -> StepResult:
        """Does one step: `launch`, then `finish`."""
        return self.finish(self.launch(plan))

    def launch(self, plan: StepPlan) -> InFlight:
        """Begins a step: everything that the device is to compute is on its way. Plans come in order, none left out;
        step n + 1 may be launched before n is finished where `may_launch_ahead` says so."""
        began_s = time.perf_counter()
        with torch.inference_mode():
            self._apply(plan)
            row_ids, counts = np.frombuffer(plan.rows, np.int32), np.frombuffer(plan.counts, np.int32)
            step = stage_step(
                self._rows,
                row_ids,
                counts,
                self._config.block_size,
                self._upload,
                rope_boundary=self._rope_boundary,
                uses_device_rows=self._model.backend.uses_device_rows,
                padded=None if self._graphs is None else self._graphs.shape,
            )
            rows = step.sampled_rows.tolist()
            is_cpu = self._device.type == "cpu"
            draws = None if is_cpu else self._prepare_draws(rows)
            self._upload.send()
            forward = self._model.forward if self._graphs is None else self._graphs.forward
            hidden_ND = forward(step.batch(self._state), self._pool())
            if is_cpu:  # where uploads are free, threads fill masks while the model computes
                draws = self._prepare_draws(rows)
                self._upload.send()
            download, sampled = Download(self._device), None
            if draws is not None:
                logits_NV = self._model.logits(hidden_ND[: len(rows)])
                sampled = self._sampler.sample(logits_NV, draws, self._state.last_token_M).to_host(download)
            prompt_logprobs = self._prompt_logprobs(step, hidden_ND[len(rows) :], download)
            download.start()
            self._rows.advance(row_ids, counts, step.sampled_rows)
        return InFlight(plan, step, began_s, sampled, prompt_logprobs, download)

    def is_done(self, in_flight: InFlight) -> bool:
        """Whether `finish` would not wait for the device."""
        return in_flight.download.is_done

    def finish(self, in_flight: InFlight) -> StepResult:
        """Waits for a launched step and reads it back, in the order of launching. The result is the same on every
        rank."""
        in_flight.download.wait()
        plan, sampled = in_flight.plan, in_flight.sampled
        prompt_logprobs = {
            span.row: [entry for part in parts for entry in part.to_messages()]
            for span, parts in zip(in_flight.step.spans, in_flight.prompt_logprobs, strict=True)
        }
        logprobs = {} if sampled is None else sampled.by_row()
        invalid_rows = set() if sampled is None else sampled.invalid_rows()
        invalid_rows |= {row for row, entry in logprobs.items() if entry is None}
        invalid_rows |= {row for row, entries in prompt_logprobs.items() if None in entries}
        if self._model.backend.reads_unwritten_slots:
            for row in invalid_rows:
                self._unclean.update(self._rows.blocks(row))
        token_ids = np.empty(0, np.int32) if sampled is None else sampled.token_ids_N.array.astype(np.int32)
        began_s = max(in_flight.began_s, self._finished_s)  # before that, the device was at the step before
        self._finished_s = time.perf_counter()
        return StepResult(
            step=plan.step,
            epoch=plan.epoch,
            rows=in_flight.step.sampled_rows.astype(np.int32).tobytes(),
            token_ids=token_ids.tobytes(),
            logprobs={row: [entry] for row, entry in logprobs.items() if entry is not None},
            prompt_logprobs={
                row: [entry for entry in entries if entry is not None] for row, entries in prompt_logprobs.items()
            },
            ends={} if sampled is None else self._ends(sampled, token_ids.tolist()),
            invalid_rows=pack_ids(sorted(invalid_rows)),
            elapsed_s=self._finished_s - began_s,
        )

    def _apply(self, plan: StepPlan) -> None:
        """Takes over the plan's differences: rows that end and begin, blocks that are given away."""
        self._rows.apply(plan)
        if self._unclean:
            self._clean(plan)
        for row in unpack_ids(plan.finished_rows):
            self._sampler.clear_row(row)
            self._structured.end(row)
        for new in plan.new_rows:
            if new.task != "generate" or new.adapter is not None:
                raise ValueError(
                    f"row {new.row}: this worker cannot compute task={new.task!r}, adapter={new.adapter!r}"
                )
            tokens = unpack_ids(new.tokens)
            self._sampler.set_row(new.row, new.params, new.seed, new.choice, tokens, new.num_prompt_tokens)
            self._structured.begin(new.row, new.params, tokens[new.num_prompt_tokens :])

    def _clean(self, plan: StepPlan) -> None:
        """Zeroes those of the plan's new blocks whose contents are unknown: not used since the start, or a row's with
        invalid logits. NaN in a slot that is masked, because its new row has not come to it,
        would poison the product. Where windows leave blocks behind, another row has them before the first one's logits
        are known: all contents are unknown then."""
        given = {*unpack_ids(plan.grown_blocks)}
        for new in plan.new_rows:  # those of a prefix hit hold what they should
            num_hits = new.num_computed_tokens // self._config.block_size
            for table in new.tables:
                given.update(unpack_ids(table.blocks)[num_hits - table.first :])
        if blocks := sorted(given & self._unclean):
            if not self._has_windows:
                self._unclean.difference_update(blocks)
            self._pool().clear(blocks)

    def _pool(self) -> KVPool:
        assert self._kv is not None, "start() comes first"
        return self._kv

    def _prepare_draws(self, rows: list[int]) -> Draws | None:
        return self._sampler.prepare(self._upload, rows, self._structured.masks(rows)) if rows else None

    def _ends(self, sampled: SampledOnHost, token_ids: list[int]) -> dict[int, Finish]:
        """The rows that a grammar ends, or that have no token left to draw."""
        stuck_rows = sampled.stuck_rows()
        for row in stuck_rows:
            self._structured.fail(row, "the grammar and the request's other constraints leave no token to sample")
        ends = self._structured.advance(sampled.rows, token_ids)
        for row in stuck_rows:
            ends.setdefault(row, _NO_TOKEN_LEFT)
        return ends

    def _prompt_logprobs(self, step: StagedStep, hidden_ND: torch.Tensor, download: Download) -> list[list[Logprobs]]:
        found: list[list[Logprobs]] = []
        begin = 0
        for span in step.spans:
            end = begin + len(span.next_ids.array)
            found.append(self._span_logprobs(span, hidden_ND[begin:end], download))
            begin = end
        return found

    def _span_logprobs(self, span: PromptLogprobSpan, hidden_ND: torch.Tensor, download: Download) -> list[Logprobs]:
        next_ids_N = span.next_ids.tensor
        found: list[Logprobs] = []
        for begin in range(0, len(next_ids_N), _LOGPROB_SLICE):
            part = slice(begin, begin + _LOGPROB_SLICE)
            ids_N = next_ids_N[part]
            logits_NV = self._model.logits(hidden_ND[part])
            tensors = compute_logprobs(logits_NV, ids_N, [span.num_top] * len(ids_N))
            found.append(tensors.to_host(download))
        return found


def _upload_bytes(config: ResolvedConfig) -> int:
    """What a large step uploads: CUDA graphs are recorded anew where the upload's buffer must grow. Prompts of rows
    with penalties may need more."""
    masks = config.max_num_seqs * config.spec.vocab_size // 8
    return 2**20 + masks + 64 * config.max_num_batched_tokens


def _own_device(config: ResolvedConfig) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if config.device == "cuda" else torch.device("cpu")
