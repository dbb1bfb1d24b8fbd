"""The forward pass of a step as CUDA graphs: a step is padded to one of a few sizes, and each size is recorded once.

A decode step (one token a row) is one graph. Any other step of few tokens is several: it is broken at each layer's
attention, which runs eagerly between them, because its grid follows from the lengths of the step's rows. What comes
after the last layer (logits of as many positions as there are, sampling) is not recorded: logits of every size would
take gigabytes.

Shape letters: see `layers/batch.py`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rayllm.config import ResolvedConfig
from rayllm.errors import ConfigError
from rayllm.layers.attention import AttentionBackend, LatentLayerAttention, LayerAttention
from rayllm.layers.batch import Batch
from rayllm.layers.kv_cache import KVPool, LayerKV
from rayllm.models import Model
from rayllm.runner.batch import StepShape
from rayllm.runner.graph_recorder import CudaRecorder, Graph, GraphRecorder

log = logging.getLogger(__name__)

MAX_MIXED_TOKENS = 1024
"""Above it a step computes longer than the host takes to launch it: a graph would save nothing, and padding costs."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Steps that one recording serves: all are padded to these sizes."""

    num_tokens: int
    num_logits: int
    is_decode: bool
    """Every line has one token, or is padding."""


@dataclass(frozen=True, slots=True)
class Break:
    """One layer's attention between two graphs. Tensors are at the addresses that the graphs have."""

    backend: AttentionBackend
    inputs: tuple[Tensor, ...]
    """The queries, and the step's own keys and values or latents."""
    kv: LayerKV
    kv_group: int
    layer: LayerAttention | LatentLayerAttention
    out: Tensor

    def run(self, metadata: list[Any], num_tokens: int) -> None:
        """Of the step's own tokens: the backend does not see padding."""
        attend: Any = self.backend.forward
        if isinstance(self.layer, LatentLayerAttention):
            attend = self.backend.forward_latent
        inputs = (tensor[:num_tokens] for tensor in self.inputs)
        self.out[:num_tokens].copy_(attend(*inputs, self.kv, metadata[self.kv_group], self.layer))


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """The graphs of one bucket, with a break between each two."""

    graphs: list[Graph]
    breaks: list[Break]
    addresses: tuple[int, ...]
    hidden_ND: Tensor

    def replay(self, metadata: list[Any], num_tokens: int) -> Tensor:
        for graph, attention in zip(self.graphs, self.breaks):
            graph.replay()
            attention.run(metadata, num_tokens)
        self.graphs[-1].replay()
        return self.hidden_ND


class StepGraphs:
    """Computes the forward pass of steps, by graphs where it has them. The first step of a bucket runs eagerly, which
    compiles kernels and makes libraries ready; the second one is recorded, and from then on the recording is replayed.

    Graphs belong to an epoch, from `begin` to `drop`: they hold the KV pool's addresses and, on several ranks, a
    communicator, whose abort waits until they are gone. `drop` may be called from any thread, beside an abort but not
    before it: it waits for a step that is being launched, which may wait for the abort.
    """

    def __init__(
        self,
        model: Model,
        recorder: GraphRecorder,
        *,
        decode_sizes: Sequence[int],
        mixed_sizes: Sequence[int],
        max_num_seqs: int,
        must_record: bool = False,
    ):
        """`must_record`: a step that cannot be recorded raises; else decode or mixed steps run eagerly for the rest of
        the epoch, and the log says so."""
        self._model = model
        self._recorder = recorder
        self._decode = {size: Bucket(size, size, True) for size in decode_sizes}
        self._mixed = {size: Bucket(size, min(size, max_num_seqs), False) for size in mixed_sizes}
        self._must_record = must_record
        self._records = {True: False, False: False}
        """Whether decode steps, and whether mixed ones, are recorded."""
        self._used: set[Bucket] = set()
        self._recorded: dict[Bucket, RecordedStep] = {}
        self._lock = threading.Lock()

    @property
    def buckets(self) -> list[Bucket]:
        """All, those that need most memory first: recorded in this order, the others fit into what those leave."""
        found = [*self._decode.values(), *self._mixed.values()]
        return sorted(found, key=lambda bucket: bucket.num_tokens, reverse=True)

    def shape(self, num_rows: int, num_tokens: int, num_logits: int) -> StepShape | None:
        """What a step of so many rows, tokens and wanted positions must be padded to; None where it stays as it is. It
        follows from the sizes alone, since ranks sum tensors of one shape, whatever each of them could record."""
        is_decode = num_rows == num_tokens
        buckets = self._decode if is_decode else self._mixed
        sizes = sorted(buckets)
        index = bisect_left(sizes, num_tokens)
        if index == len(sizes) or num_logits > buckets[sizes[index]].num_logits:
            return None
        bucket = buckets[sizes[index]]
        # The lines of a mixed step are read by attention alone, which runs eagerly.
        return StepShape(bucket.num_tokens, bucket.num_tokens if is_decode else num_rows, bucket.num_logits)

    def forward(self, batch: Batch, pool: KVPool) -> Tensor:
        """`Model.forward`, of a batch that has its `shape`. What it returns holds until the next call."""
        bucket = self._bucket_of(batch)
        if bucket is not None:
            with self._lock:
                if recorded := self._recording_of(batch, pool, bucket):
                    # The metadata of a graph without breaks is part of it.
                    metadata = self._model.backend.prepare(batch) if recorded.breaks else []
                    return recorded.replay(metadata, batch.query_starts[-1])
        return self._model.forward(batch, pool)

    def _bucket_of(self, batch: Batch) -> Bucket | None:
        assert batch.device_rows is not None, "graphs need rows on the device"
        num_tokens = len(batch.token_ids_T)
        buckets = self._decode if batch.device_rows.num_decode_lines == num_tokens else self._mixed
        bucket = buckets.get(num_tokens)
        return bucket if bucket is not None and len(batch.logits_indices_N) == bucket.num_logits else None

    def pool_bytes(self, step_bytes: int, num_tokens: int) -> int:
        """About what the graphs' pool takes, where a step of so many tokens takes `step_bytes`: all graphs share what
        the largest of them needs."""
        largest = max((bucket.num_tokens for bucket in self.buckets), default=0)
        return step_bytes * min(largest, num_tokens) // num_tokens

    def begin(self) -> None:
        """An epoch begins: from its second step on, a bucket may be recorded."""
        with self._lock:
            self._free()
            self._records = {True: True, False: True}

    def drop(self) -> None:
        """The epoch ends: frees all graphs and their memory. Steps run eagerly."""
        with self._lock:
            self._free()
            self._records = {True: False, False: False}

    def _free(self) -> None:
        for recorded in self._recorded.values():
            for graph in recorded.graphs:
                graph.reset()
        self._recorded.clear()
        self._used.clear()
        self._recorder.forget_pool()

    def _recording_of(self, batch: Batch, pool: KVPool, bucket: Bucket) -> RecordedStep | None:
        """The recording to replay, made now where this is the bucket's second step; None on its first."""
        addresses = _addresses(batch, bucket)
        recorded = self._recorded.get(bucket)
        if recorded is not None and recorded.addresses != addresses:
            log.info("the inputs of steps have moved in memory: %d buckets are recorded anew", len(self._recorded))
            self._free()
        if bucket not in self._used:
            self._used.add(bucket)
            return None
        if recorded is None and self._records[bucket.is_decode]:
            recorded = self._record(batch, pool, bucket, addresses)
        return recorded

    def _record(self, batch: Batch, pool: KVPool, bucket: Bucket, addresses: tuple[int, ...]) -> RecordedStep | None:
        began_s = time.perf_counter()
        recording = _Recording(self._recorder, self._model)
        try:
            hidden_ND = recording.run(batch, pool, in_pieces=not bucket.is_decode)
        except Exception as error:
            if self._must_record:
                raise
            self._give_up(bucket, error)
            return None
        recorded = self._recorded[bucket] = RecordedStep(recording.graphs, recording.breaks, addresses, hidden_ND)
        elapsed_ms = (time.perf_counter() - began_s) * 1e3
        log.info("recorded %s in %d CUDA graphs in %.0f ms", _in_words(bucket), len(recorded.graphs), elapsed_ms)
        return recorded

    def _give_up(self, bucket: Bucket, error: Exception) -> None:
        self._records[bucket.is_decode] = False
        kind = "decode" if bucket.is_decode else "mixed"
        log.warning("%s steps run without CUDA graphs, as one could not be recorded: %s", kind, error)


class _Recording:
    """Runs a model's forward pass once, recording it."""

    def __init__(self, recorder: GraphRecorder, model: Model):
        self._recorder = recorder
        self._model = model
        self.graphs: list[Graph] = []
        self.breaks: list[Break] = []

    def run(self, batch: Batch, pool: KVPool, *, in_pieces: bool) -> Tensor:
        """The hidden states that the graphs write."""
        model = self._model
        metadata = model.backend.prepare(batch) if in_pieces else []
        with self._recorder.session():
            try:
                with self._broken_at_attention(metadata) if in_pieces else contextlib.nullcontext():
                    self._recorder.begin()
                    if not in_pieces:
                        metadata = model.backend.prepare(batch)
                    hidden_ND = model.decoder.forward(batch, pool.layers, metadata)
                    self.graphs.append(self._recorder.end())
            except BaseException:
                self._recorder.abandon()
                raise
        return hidden_ND

    @contextlib.contextmanager
    def _broken_at_attention(self, metadata: list[Any]) -> Iterator[None]:
        """While this lasts, the backend's attention ends one graph and begins the next. Layers hold the backend itself,
        so its methods are hidden by attributes of the same name."""
        backend = self._model.backend

        def forward(
            q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, kv: LayerKV, of_group: Any, layer: LayerAttention
        ) -> Tensor:
            out_THD = torch.empty((*q_THD.shape[:2], v_TKD.shape[-1]), dtype=q_THD.dtype, device=q_THD.device)
            self._break((q_THD, k_TKD, v_TKD), kv, _place(metadata, of_group), layer, out_THD)
            return out_THD

        def forward_latent(
            q_THD: Tensor, latent_TW: Tensor, kv: LayerKV, of_group: Any, layer: LatentLayerAttention
        ) -> Tensor:
            out_THV = torch.empty((*q_THD.shape[:2], layer.spec.value_dim), dtype=q_THD.dtype, device=q_THD.device)
            self._break((q_THD, latent_TW), kv, _place(metadata, of_group), layer, out_THV)
            return out_THV

        hidden: dict[str, Any] = {"forward": forward, "forward_latent": forward_latent}
        vars(backend).update(hidden)
        try:
            yield
        finally:
            for name in hidden:
                del vars(backend)[name]

    def _break(
        self,
        inputs: tuple[Tensor, ...],
        kv: LayerKV,
        kv_group: int,
        layer: LayerAttention | LatentLayerAttention,
        out: Tensor,
    ) -> None:
        self.graphs.append(self._recorder.end())
        alias = self._recorder.alias
        aliased = tuple(alias(tensor) for tensor in inputs)
        self.breaks.append(Break(self._model.backend, aliased, kv, kv_group, layer, alias(out)))
        self._recorder.begin()


def open_graphs(config: ResolvedConfig, model: Model, recorder: GraphRecorder | None = None) -> StepGraphs | None:
    """The graphs of a model's steps, as `config.engine.cuda_graphs` asks; None where there are none, for a reason that
    the log names, or that is a `ConfigError` where they must be. Without a `recorder` they are CUDA's, and a CPU has
    none."""
    engine = config.engine
    if recorder is None and model.device.type == "cpu":
        return None
    if engine.cuda_graphs == "off":
        log.info("steps run without CUDA graphs, as configured")
        return None
    if reason := _why_none(model):
        if engine.cuda_graphs == "full":
            raise ConfigError(f"cuda_graphs='full' cannot be honoured: {reason}; give auto or off")
        log.info("steps run without CUDA graphs: %s", reason)
        return None
    largest = min(config.max_num_seqs, engine.max_cudagraph_capture_size or config.max_num_seqs)
    graphs = StepGraphs(
        model,
        recorder or CudaRecorder(model.device),
        decode_sizes=decode_sizes(largest),
        mixed_sizes=mixed_sizes(config.max_num_batched_tokens),
        max_num_seqs=config.max_num_seqs,
        must_record=engine.cuda_graphs == "full",
    )
    when = "at start" if engine.cuda_graphs == "full" else "when a size comes the second time"
    log.info("CUDA graphs of decode steps of up to %d rows and of mixed steps are captured %s", largest, when)
    return graphs


def _why_none(model: Model) -> str:
    """Why steps of a model cannot be recorded; empty where they can."""
    if model.decoder.spec.transformers is not None:
        return "transformers computes the model, and its code may wait for the GPU"
    if not model.backend.uses_device_rows:
        return f"the attention backend {model.backend.name!r} reads the lengths of rows on the host"
    return ""


def decode_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, then multiples of 8, and `max_num_seqs` itself."""
    return sorted({size for size in (1, 2, 4, *range(8, max_num_seqs, 8)) if size < max_num_seqs} | {max_num_seqs})


def mixed_sizes(max_num_tokens: int) -> list[int]:
    """Multiples of 16 up to 128 tokens, then four sizes for each doubling: at most a fifth is padding."""
    sizes = [*range(16, 129, 16)]
    while sizes[-1] < MAX_MIXED_TOKENS:
        sizes.append(sizes[-1] + 2 ** (sizes[-1].bit_length() - 3))
    return [size for size in sizes if size <= max_num_tokens]


def _addresses(batch: Batch, bucket: Bucket) -> tuple[int, ...]:
    """Those that the graphs of a batch read."""
    tensors = [batch.token_ids_T, batch.positions_T, batch.slots_ST, batch.logits_indices_N]
    if batch.beyond_T is not None:
        tensors.append(batch.beyond_T)
    if bucket.is_decode:
        rows = batch.device_rows
        assert rows is not None
        tensors += [rows.rows_R, rows.query_starts_R1, rows.kv_lens_R, rows.block_table_SMB]
    return tuple(tensor.data_ptr() for tensor in tensors)


def _place(metadata: list[Any], of_group: Any) -> int:
    return next(place for place, each in enumerate(metadata) if each is of_group)


def _in_words(bucket: Bucket) -> str:
    return f"decode steps of {bucket.num_tokens} rows" if bucket.is_decode else f"steps of {bucket.num_tokens} tokens"
