"""From a plan's rows and counts to the tensors of one step. Shape letters: see `layers/batch.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rayllm.layers.batch import Batch, DeviceRows
from rayllm.runner.device_state import DeviceState
from rayllm.runner.rows import Rows
from rayllm.transfer.upload import Upload, Uploaded
from rayllm_kernels.apply_plan import apply_plan


@dataclass(frozen=True, slots=True)
class PromptLogprobSpan:
    """Positions of one row's chunk whose next prompt token's log-probability was asked for."""

    row: int
    num_top: int
    next_ids: Uploaded
    """int64: the prompt token that follows each position."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Sizes that a step's tensors are padded to, so that they are where those of other steps were. A padding token has
    slot -1 and stands behind the others; a padding line has no tokens; a padding index of `logits_indices_N` is 0.
    What is computed for padding tokens means nothing, and may be NaN."""

    num_tokens: int
    num_lines: int
    num_logits: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """Where the tokens of a step's rows begin and end, on the host."""

    row_ids: np.ndarray
    counts: np.ndarray
    begins: np.ndarray
    """Position of each row's first token."""
    ends: np.ndarray
    starts: np.ndarray
    """R + 1 offsets into T."""
    num_decode: int

    @classmethod
    def of(cls, rows: Rows, row_ids: np.ndarray, counts: np.ndarray) -> _Layout:
        begins = rows.num_computed[row_ids]
        starts = np.zeros(len(row_ids) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        num_decode = int(np.count_nonzero(counts == 1))
        assert (counts[:num_decode] == 1).all(), "rows with one token must come first"
        return cls(row_ids, counts, begins, begins + counts, starts, num_decode)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """What a step needs of each token."""

    token_ids: Uploaded
    sources: Uploaded
    """int32: for a token that was sampled here its row; else -1."""
    positions: Uploaded
    slots: Uploaded
    beyond: Uploaded | None

    @classmethod
    def stage(
        cls, rows: Rows, layout: _Layout, size: int, block_size: int, rope_boundary: int | None, upload: Upload
    ) -> _Tokens:
        """`size` tokens with the padding ones."""
        starts, counts = layout.starts, layout.counts
        positions = np.arange(starts[-1]) - np.repeat(starts[:-1] - layout.begins, counts)
        blocks = rows.block_table[:, np.repeat(layout.row_ids, counts), positions // block_size]
        slots = blocks.astype(np.int64) * block_size + positions % block_size
        token_ids, sources = _token_ids(rows, layout)
        is_beyond = None
        if rope_boundary is not None:
            is_beyond = np.repeat(rows.num_tokens[layout.row_ids] > rope_boundary, counts)
        return cls(
            upload.add(_padded(token_ids, size, 0)),
            upload.add(_padded(sources, size, -1)),
            upload.add(_padded(positions, size, 0)),
            upload.add(_padded(slots, size, -1)),
            None if is_beyond is None else upload.add(_padded(is_beyond, size, 0)),
        )


@dataclass(frozen=True, slots=True)
class _Lines:
    """What a backend that reads rows on the device needs of each."""

    rows: Uploaded
    query_starts: Uploaded
    kv_lens: Uploaded
    num_decode: int
    max_query_len: int

    @classmethod
    def stage(cls, layout: _Layout, size: int, upload: Upload) -> _Lines:
        """`size` lines with the padding ones, which are decode lines where all others are."""
        only_decodes = layout.num_decode == len(layout.row_ids)
        return cls(
            upload.add(_padded(layout.row_ids.astype(np.int32), size, 0)),  # a plan's own cannot be written
            upload.add(_padded(layout.starts.astype(np.int32), size + 1, int(layout.starts[-1]))),
            upload.add(_padded(layout.ends.astype(np.int32), size, 0)),
            size if only_decodes else layout.num_decode,
            int(layout.counts.max()),
        )

    def on_device(self, state: DeviceState) -> DeviceRows:
        return DeviceRows(
            rows_R=self.rows.tensor,
            query_starts_R1=self.query_starts.tensor,
            kv_lens_R=self.kv_lens.tensor,
            block_table_SMB=state.block_table_SMB,
            num_decode_lines=self.num_decode,
            max_query_len=self.max_query_len,
        )


@dataclass(frozen=True, slots=True)
class StagedStep:
    """A step whose arrays wait in an `Upload`. What its N hidden states are for: first one for each of `sampled_rows`,
    then the spans' positions in order."""

    sampled_rows: np.ndarray
    spans: list[PromptLogprobSpan]
    layout: _Layout
    block_size: int
    tokens: _Tokens
    logits_indices: Uploaded
    lines: _Lines | None
    block_table: Uploaded | None
    """Where there are no `lines`."""
    table_changes: tuple[Uploaded, Uploaded]
    """Where the tables on the device change, and to what."""

    def batch(self, state: DeviceState) -> Batch:
        """The step's tensors, once the upload was sent. Brings the tables of `state` up to date."""
        layout, tokens, (indices, blocks) = self.layout, self.tokens, self.table_changes
        token_ids_T, sources_T = tokens.token_ids.tensor, tokens.sources.tensor
        apply_plan(state.block_table_SMB, indices.tensor, blocks.tensor, token_ids_T, sources_T, state.last_token_M)
        return Batch(
            token_ids_T=token_ids_T,
            positions_T=tokens.positions.tensor,
            slots_ST=tokens.slots.tensor,
            query_starts=layout.starts.tolist(),
            kv_lens=layout.ends.tolist(),
            block_table_SRB=None if self.block_table is None else self.block_table.tensor,
            logits_indices_N=self.logits_indices.tensor,
            num_decode_rows=layout.num_decode,
            block_size=self.block_size,
            beyond_T=None if tokens.beyond is None else tokens.beyond.tensor,
            device_rows=None if self.lines is None else self.lines.on_device(state),
        )


def stage_step(
    rows: Rows,
    row_ids: np.ndarray,
    counts: np.ndarray,
    block_size: int,
    upload: Upload,
    *,
    rope_boundary: int | None = None,
    uses_device_rows: bool = False,
    padded: Callable[[int, int, int], StepShape | None] | None = None,
) -> StagedStep:
    """The step that computes `counts` tokens of `row_ids` (rows with count 1 first), given what `rows` holds.

    `padded` gives the shape for so many rows, tokens and wanted positions, or None to leave them as they are; it needs
    `uses_device_rows`. Arrays whose sizes follow from the shape are added to the upload before all others, in the same
    order always. A row's rotary embedding follows from all tokens that the row has, so the first chunk of a
    long prompt is computed as its last one; a row that grows past `rope_boundary` is started anew by the scheduler
    before it is computed again.
    """
    layout = _Layout.of(rows, row_ids, counts)
    samples = layout.ends == rows.num_tokens[row_ids]
    wanted = _prompt_logprobs_wanted(rows, layout)
    logits_indices = np.concatenate([layout.starts[1:][samples] - 1, *(indices for _, _, _, indices in wanted)])
    sizes = len(row_ids), int(layout.starts[-1]), len(logits_indices)
    shape = (padded and padded(*sizes)) or StepShape(sizes[1], sizes[0], sizes[2])
    sampled_rows = row_ids[samples]

    tokens = _Tokens.stage(rows, layout, shape.num_tokens, block_size, rope_boundary, upload)
    staged_indices = upload.add(_padded(logits_indices, shape.num_logits, 0))
    lines = _Lines.stage(layout, shape.num_lines, upload) if uses_device_rows else None
    indices, blocks = rows.take_changes()
    return StagedStep(
        sampled_rows=sampled_rows,
        spans=[PromptLogprobSpan(row, num_top, upload.add(next_ids)) for row, num_top, next_ids, _ in wanted],
        layout=layout,
        block_size=block_size,
        tokens=tokens,
        logits_indices=staged_indices,
        lines=lines,
        block_table=None if uses_device_rows else upload.add(_host_table(rows, layout, block_size)),
        table_changes=(upload.add(indices), upload.add(blocks)),
    )


def _token_ids(rows: Rows, layout: _Layout) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that a row began with come from the host; for one that was sampled here, which may be on the device
    alone, its row (int32, else -1)."""
    token_ids, sources = np.zeros(layout.starts[-1], np.int64), np.full(layout.starts[-1], -1, np.int32)
    on_device: list[int] = []
    for i, (row, start, begin, end) in enumerate(
        zip(layout.row_ids.tolist(), layout.starts.tolist(), layout.begins.tolist(), layout.ends.tolist())
    ):
        if end <= rows.num_start_tokens(row):
            token_ids[start : start + end - begin] = rows.start_tokens(row, begin, end)
        else:
            assert begin == end - 1 == rows.num_tokens[row] - 1, "only a row's newest token may be on the device alone"
            on_device.append(i)
    sources[layout.starts[on_device]] = layout.row_ids[on_device]
    return token_ids, sources


def _host_table(rows: Rows, layout: _Layout, block_size: int) -> np.ndarray:
    max_blocks = int((layout.ends.max() + block_size - 1) // block_size)
    return rows.block_table[:, layout.row_ids, :max_blocks]


def _prompt_logprobs_wanted(rows: Rows, layout: _Layout) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Row, number of candidates, the next prompt tokens (int64) and the places in T after which they come."""
    found = []
    for i, row in enumerate(layout.row_ids.tolist()):
        wanted = rows.prompt_logprobs_wanted(row)
        if wanted is None:
            continue
        num_top, num_prompt = wanted
        begin, end = int(layout.begins[i]), min(int(layout.ends[i]), num_prompt - 1)
        if begin < end:
            next_ids = rows.start_tokens(row, begin + 1, end + 1).astype(np.int64)
            found.append((row, num_top, next_ids, np.arange(layout.starts[i], layout.starts[i] + end - begin)))
    return found


def _padded(x: np.ndarray, size: int, fill: int) -> np.ndarray:
    """`x` with its last dimension filled up."""
    missing = size - x.shape[-1]
    assert missing >= 0, f"{x.shape[-1]} do not fit a shape of {size}"
    if missing == 0:
        return x
    return np.concatenate([x, np.full((*x.shape[:-1], missing), fill, x.dtype)], axis=-1)
