"""From logits to tokens: a pure function of (logits, params, history, seed, choice, position).

Shapes: N lines of a batch (one row each), G lines of a group that draw the same way, V vocabulary ids.
Order: masks, bad words, allowed ids, bias, min_tokens; penalties; temperature; min-p; top-k; top-p; draw. What min-p,
top-k and top-p keep, ties included, is defined in `rayllm_kernels.sampling.reference`. With top_k=1 a row is greedy.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayllm.errors import RequestError
from rayllm.messages import RowParams, TokenLogprobs
from rayllm.sampling.bad_words import BadWordTable, Barred
from rayllm.sampling.edits import Edits, RowEdits
from rayllm.sampling.logprobs import Logprobs, LogprobTensors, compute_logprobs, padded_lists
from rayllm.sampling.penalties import Penalised, PenaltyTable, wants_penalty
from rayllm.transfer.download import Download, Downloaded
from rayllm.transfer.upload import Upload, Uploaded, int64_array
from rayllm_kernels.sampling import Draw, Group, mask, reference, sample

LOWEST_TEMPERATURE = 1e-5
"""Below it a row is greedy: logits / temperature would overflow, and the result would be the same."""
_NUM_NUCLEUS_CANDIDATES = 256
_CANDIDATE_STEPS = (64, 256, 1024)


@dataclass(slots=True)
class _Row:
    """What is known of a row between steps. `position` counts emitted tokens and numbers the next draw."""

    params: RowParams
    draw: Draw
    seed: int
    choice: int
    position: int
    edits: RowEdits


@dataclass(frozen=True, slots=True)
class _Group:
    """Lines that draw the same way; all of the step's where there are no `lines`."""

    draw: Draw
    lines: Uploaded | None
    num_candidates: int
    has_min_p: bool
    has_top_p: bool

    def on_device(self) -> Group:
        lines = None if self.lines is None else self.lines.tensor
        return Group(self.draw, lines, self.num_candidates, self.has_min_p, self.has_top_p)


@dataclass(frozen=True, slots=True)
class _Asking:
    """Lines that want log-probabilities."""

    rows: list[int]
    lines: Uploaded
    num_top: list[int]
    listed: Uploaded | None


@dataclass(frozen=True, slots=True)
class Draws:
    """What one step draws, on its way to the device with the step's upload."""

    rows: list[int]
    rows_N: Uploaded
    keys_4N: Uploaded
    """int64: how it is drawn, seed, choice, position."""
    numbers_4N: Uploaded
    """float64: temperature, min-p, top-k, top-p."""
    groups: list[_Group]
    asking: _Asking | None
    masks: tuple[Uploaded, Uploaded] | None
    """Lines, int64, and for each the bits of what it may draw."""
    barred: Barred | None
    barred_lines: Uploaded | None
    edits: Edits | None
    penalised: Penalised | None
    is_bound_N: Uploaded
    """uint8: whether a mask or bad words bind the line."""

    @property
    def changes_logits(self) -> bool:
        return any(edit is not None for edit in (self.masks, self.barred, self.edits, self.penalised))


@dataclass(frozen=True, slots=True)
class SampledOnHost:
    """One step's tokens, on their way to the host. All that it gives waits for the device."""

    rows: list[int]
    token_ids_N: Downloaded
    """int64."""
    is_usable_N: Downloaded
    logprob_rows: list[int]
    logprobs: Logprobs | None
    is_stuck_N: Downloaded

    def stuck_rows(self) -> list[int]:
        """Rows that got an id without meaning because nothing was allowed."""
        is_stuck = self.is_stuck_N.array
        return [self.rows[line] for line in is_stuck.nonzero()[0].tolist()]

    def invalid_rows(self) -> set[int]:
        """Rows whose logits held NaN or +infinity, or nothing else than -infinity: they got valid ids without
        meaning."""
        is_invalid = ~self.is_usable_N.array
        return {self.rows[line] for line in is_invalid.nonzero()[0].tolist()}

    def by_row(self) -> dict[int, TokenLogprobs | None]:
        """Log-probabilities of the rows that asked; None for one whose logits held NaN."""
        return {} if self.logprobs is None else dict(zip(self.logprob_rows, self.logprobs.to_messages()))


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step's tokens, on the device: `token_ids_N[i]` (int64) was drawn for `rows[i]`."""

    token_ids_N: Tensor
    rows: list[int]
    is_usable_N: Tensor
    logprob_rows: list[int]
    logprobs: LogprobTensors | None
    is_stuck_N: Tensor
    """Lines for which a mask or bad words, with what else the row forbids, left no token."""

    def to_host(self, download: Download) -> SampledOnHost:
        """They come with the download."""
        return SampledOnHost(
            self.rows,
            download.add(self.token_ids_N),
            download.add(self.is_usable_N),
            self.logprob_rows,
            None if self.logprobs is None else self.logprobs.to_host(download),
            download.add(self.is_stuck_N),
        )


class Sampler:
    """Draws the next token of each row. Rows are set and cleared between steps, which the device learns of with the
    next step. A step is prepared on the host, then sampled on the device."""

    def __init__(
        self,
        *,
        max_rows: int,
        vocab_size: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
    ):
        if vocab_size > reference.MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size={vocab_size} is above {reference.MAX_VOCAB_SIZE}, up to which sums are exact; "
                "for more, lower WEIGHT_SCALE in rayllm_kernels.sampling.reference in step"
            )
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._rows: list[_Row | None] = [None] * max_rows
        # One place more than the context: the last token drawn is appended too.
        self._penalties = PenaltyTable(vocab_size=vocab_size, max_tokens=max_model_len + 1, device=device)
        self._bad_words = BadWordTable(device)

    def set_row(
        self,
        row: int,
        params: RowParams,
        seed: int,
        choice: int,
        tokens: array[int] | list[int],
        num_prompt_tokens: int,
    ) -> None:
        """A sequence takes the row. `tokens` are the prompt and, when it is replayed, what it has emitted.

        Raises `RequestError` for ids in `allowed_token_ids`, `logit_bias`, `logprob_token_ids` or
        `bad_words_token_ids` that the model does not have.
        """
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", tuple(params.logit_bias))
        self._check_ids("logprob_token_ids", params.logprob_token_ids or ())
        for word in params.bad_words_token_ids:
            self._check_ids("bad_words_token_ids", word)
        self.clear_row(row)
        self._rows[row] = _Row(
            params=params,
            draw=_how_to_draw(params, self._vocab_size),
            seed=seed,
            choice=choice,
            position=len(tokens) - num_prompt_tokens,
            edits=RowEdits.of(params, self._eos_token_ids, self._vocab_size),
        )
        if wants_penalty(params):
            self._penalties.add(row, params, tokens, num_prompt_tokens)
        if params.bad_words_token_ids:
            self._bad_words.add(row, params.bad_words_token_ids, tokens[num_prompt_tokens:])

    def clear_row(self, row: int) -> None:
        """The row is free. Clearing a free row does nothing."""
        self._rows[row] = None
        self._penalties.remove(row)
        self._bad_words.remove(row)

    def prepare(self, upload: Upload, rows: list[int], masks: tuple[list[int], np.ndarray] | None = None) -> Draws:
        """What draws one token for each of `rows`. Steps are prepared in order, and each is sampled once.

        `masks`: lines that are bound to some tokens, and for each a bit for every id (uint8 [G, bytes], the lowest
        first).
        """
        states = [self._state(row) for row in rows]
        edits = Edits.prepare(upload, [(i, s.edits, s.position) for i, s in enumerate(states)])
        penalised = [i for i, row in enumerate(rows) if row in self._penalties]
        barred = [i for i, row in enumerate(rows) if row in self._bad_words] if self._bad_words else []
        is_bound_N = np.zeros(len(rows), np.uint8)
        is_bound_N[[*(masks[0] if masks else ()), *barred]] = 1
        numbers = [(p.temperature, p.min_p, float(p.top_k), p.top_p) for p in (state.params for state in states)]
        draws = Draws(
            rows=list(rows),
            rows_N=upload.add(int64_array(rows)),
            keys_4N=upload.add(np.array([(s.draw, s.seed, s.choice, s.position) for s in states], np.int64).T),
            numbers_4N=upload.add(np.array(numbers, np.float64).T),
            groups=self._groups(upload, states),
            asking=self._asking(upload, rows, states),
            masks=None if masks is None else (upload.add(int64_array(masks[0])), upload.add(masks[1])),
            barred=self._bad_words.prepare(upload, barred, [rows[i] for i in barred]) if barred else None,
            barred_lines=upload.add(int64_array(barred)) if barred else None,
            edits=edits,
            penalised=self._penalties.prepare(upload, penalised, [rows[i] for i in penalised]) if penalised else None,
            is_bound_N=upload.add(is_bound_N),
        )
        for state in states:
            state.position += 1
        return draws

    def sample(self, logits_NV: Tensor, draws: Draws, last_token_M: Tensor) -> Sampled:
        """Draws one token for each line, `draws.rows[i]`'s from `logits_NV[i]`, once the upload was sent; appends it to
        the row, and writes it to `last_token_M` (int64) at the row's place.

        `logits_NV` is float32 on the sampler's device and may be changed; log-probabilities are those before that. Does
        not wait for the device. For NaN see `SampledOnHost.invalid_rows`.
        """
        assert logits_NV.shape == (len(draws.rows), self._vocab_size), (logits_NV.shape, self._vocab_size)
        assert logits_NV.dtype == torch.float32, logits_NV.dtype
        asking, raw_GV = draws.asking, logits_NV
        if asking and (draws.changes_logits or len(asking.rows) < len(draws.rows)):
            raw_GV = logits_NV.index_select(0, asking.lines.tensor)
        self._edit(logits_NV, draws)
        groups = [group.on_device() for group in draws.groups]
        keys_4N, numbers_4N, rows_N = draws.keys_4N.tensor, draws.numbers_4N.tensor, draws.rows_N.tensor
        token_ids_N, is_usable_N, is_stuck_N = sample(
            logits_NV, keys_4N, numbers_4N, groups, rows_N, last_token_M, draws.is_bound_N.tensor
        )
        if draws.penalised:
            self._penalties.append(draws.penalised, token_ids_N)
        if draws.barred and draws.barred_lines:
            self._bad_words.append(draws.barred, token_ids_N[draws.barred_lines.tensor])
        logprobs = None
        if asking:
            listed_GK = None if asking.listed is None else asking.listed.tensor
            logprobs = compute_logprobs(raw_GV, token_ids_N[asking.lines.tensor], asking.num_top, listed_GK)
        return Sampled(token_ids_N, draws.rows, is_usable_N, asking.rows if asking else [], logprobs, is_stuck_N)

    def _edit(self, logits_NV: Tensor, draws: Draws) -> None:
        if draws.masks:
            mask(logits_NV, draws.masks[0].tensor, draws.masks[1].tensor)
        if draws.barred:
            self._bad_words.ban(logits_NV, draws.barred)
        if draws.edits:
            draws.edits.apply(logits_NV)
        if draws.penalised:
            self._penalties.apply(logits_NV, draws.penalised)

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        assert state is not None, f"row {row} was sampled before it was set"
        return state

    def _groups(self, upload: Upload, states: list[_Row]) -> list[_Group]:
        lines_of: dict[Draw, list[int]] = {}
        for line, state in enumerate(states):
            lines_of.setdefault(state.draw, []).append(line)
        groups = []
        for draw, lines in lines_of.items():
            params = [states[i].params for i in lines]
            num = _num_candidates(params) if draw is Draw.TOP_K else _NUM_NUCLEUS_CANDIDATES
            uploaded = None if len(lines_of) == 1 else upload.add(int64_array(lines))
            has_min_p, has_top_p = any(p.min_p for p in params), any(p.top_p < 1 for p in params)
            groups.append(_Group(draw, uploaded, num, has_min_p, has_top_p))
        return groups

    def _asking(self, upload: Upload, rows: list[int], states: list[_Row]) -> _Asking | None:
        asking = [i for i, state in enumerate(states) if state.params.num_logprobs is not None]
        if not asking:
            return None
        num_top = [states[i].params.num_logprobs or 0 for i in asking]
        listed = padded_lists(num_top, [states[i].params.logprob_token_ids for i in asking])
        uploaded = None if listed is None else upload.add(listed)
        return _Asking([rows[i] for i in asking], upload.add(int64_array(asking)), num_top, uploaded)

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        beyond = [token_id for token_id in token_ids if token_id >= self._vocab_size]
        if beyond:
            raise RequestError(
                f"{name} holds token id {beyond[0]}, but the model's ids end at {self._vocab_size - 1}",
                param=name,
            )


def _how_to_draw(params: RowParams, vocab_size: int) -> Draw:
    if params.temperature < LOWEST_TEMPERATURE or params.top_k == 1:
        return Draw.GREEDY
    if 0 < params.top_k < vocab_size:
        return Draw.TOP_K
    return Draw.TOP_P if params.top_p < 1 else Draw.ALL


def _num_candidates(params: list[RowParams]) -> int:
    """More than the largest top-k, so that ties at its edge are seen; rows with a huge top-k go the slow way."""
    largest = max((p.top_k for p in params if p.top_k < _CANDIDATE_STEPS[-1]), default=0)
    return next(step for step in _CANDIDATE_STEPS if largest < step)
