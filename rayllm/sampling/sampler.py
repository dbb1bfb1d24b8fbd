"""From logits to tokens: a pure function of (logits, params, history, seed, choice, position).

Shapes: N lines of a batch (one row each), G lines of a group that draw the same way, V vocabulary ids.
Order: masks, bad words, allowed ids, bias, min_tokens; penalties; temperature; min-p; top-k; top-p; draw. What min-p,
top-k and top-p keep, ties included, is defined in `rayllm_kernels.sampling.reference`. With top_k=1 a row is greedy.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch
from torch import Tensor

from rayllm.errors import RequestError
from rayllm.messages import RowParams, TokenLogprobs
from rayllm.sampling.bad_words import BadWordTable
from rayllm.sampling.logprobs import LogprobTensors, compute_logprobs
from rayllm.sampling.penalties import PenaltyTable, upload, wants_penalty
from rayllm_kernels.sampling import reference

LOWEST_TEMPERATURE = 1e-5
"""Below it a row is greedy: logits / temperature would overflow, and the result would be the same."""
_NUM_NUCLEUS_CANDIDATES = 256
_CANDIDATE_STEPS = (64, 256, 1024)


class Draw(Enum):
    """How a row's token is drawn; rows of one kind are drawn together."""

    GREEDY = auto()
    ALL = auto()
    TOP_P = auto()
    TOP_K = auto()


@dataclass(slots=True)
class _Row:
    """What is known of a row between steps. `position` counts emitted tokens and numbers the next draw."""

    params: RowParams
    draw: Draw
    seed: int
    choice: int
    position: int
    allowed_ids: Tensor | None
    bias: tuple[Tensor, Tensor] | None
    banned_ids: Tensor | None
    """End tokens, masked until `min_tokens` are emitted."""

    @property
    def is_edited(self) -> bool:
        return self.allowed_ids is not None or self.bias is not None or self.ends_banned

    @property
    def ends_banned(self) -> bool:
        return self.banned_ids is not None and self.position < self.params.min_tokens


@dataclass(slots=True)
class Sampled:
    """One step's tokens, on the device: `token_ids_N[i]` (int64) was drawn for `rows[i]`."""

    token_ids_N: Tensor
    rows: list[int]
    is_usable_N: Tensor
    logprob_rows: list[int]
    logprobs: LogprobTensors | None
    is_stuck_N: Tensor | None = None
    """Lines for which a mask or bad words, with what else the row forbids, left no token; None where there were
    neither."""

    def stuck_rows(self) -> list[int]:
        """Rows that got an id without meaning because nothing was allowed. Waits for the device."""
        if self.is_stuck_N is None:
            return []
        return [row for row, is_stuck in zip(self.rows, self.is_stuck_N.tolist()) if is_stuck]

    def invalid_rows(self) -> set[int]:
        """Rows whose logits held NaN or +infinity, or nothing else than -infinity: they got valid ids without meaning.
        Waits for the device."""
        if bool(self.is_usable_N.all()):
            return set()
        return {row for row, usable in zip(self.rows, self.is_usable_N.tolist()) if not usable}

    def by_row(self) -> dict[int, TokenLogprobs | None]:
        """Log-probabilities of the rows that asked; None for one whose logits held NaN. Waits for the device."""
        return {} if self.logprobs is None else dict(zip(self.logprob_rows, self.logprobs.to_messages()))


class Sampler:
    """Draws the next token of each row. Rows are set and cleared between steps; no more is remembered."""

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
        self._device = torch.device(device)
        self._rows: list[_Row | None] = [None] * max_rows
        # One place more than the context: the last token drawn is appended too.
        self._penalties = PenaltyTable(vocab_size=vocab_size, max_tokens=max_model_len + 1, device=self._device)
        self._bad_words = BadWordTable(self._device)

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
        ends = {*self._eos_token_ids, *params.stop_token_ids} if params.min_tokens else set()
        banned = sorted(token_id for token_id in ends if token_id < self._vocab_size)
        bias = params.logit_bias
        self._rows[row] = _Row(
            params=params,
            draw=_how_to_draw(params, self._vocab_size),
            seed=seed,
            choice=choice,
            position=len(tokens) - num_prompt_tokens,
            allowed_ids=self._ids(params.allowed_token_ids) if params.allowed_token_ids else None,
            bias=(self._ids(bias), upload(torch.tensor(list(bias.values())), self._device)) if bias else None,
            banned_ids=self._ids(banned) if banned else None,
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

    def sample(self, logits_NV: Tensor, rows: list[int], masks: tuple[list[int], np.ndarray] | None = None) -> Sampled:
        """Draws one token for each line, `rows[i]`'s from `logits_NV[i]`, and appends it to the row.

        `masks`: lines that are bound to some tokens, and for each a bit for every id (uint8 [G, bytes], the lowest
        first). Log-probabilities are those before any of that.
        `logits_NV` is float32 on the sampler's device and may be changed. Does not wait for the device, but
        once where a row has top-k or top-p. For NaN see `Sampled.invalid_rows`.
        """
        assert logits_NV.shape == (len(rows), self._vocab_size), (logits_NV.shape, self._vocab_size)
        assert logits_NV.dtype == torch.float32, logits_NV.dtype
        states = [self._state(row) for row in rows]
        asking = [i for i, state in enumerate(states) if state.params.num_logprobs is not None]
        edited = [i for i, state in enumerate(states) if state.is_edited]
        penalised = [i for i, row in enumerate(rows) if row in self._penalties]
        barred = [i for i, row in enumerate(rows) if row in self._bad_words] if self._bad_words else []
        raw_GV = logits_NV
        if asking and (masks or edited or penalised or barred or len(asking) < len(rows)):
            raw_GV = logits_NV.index_select(0, self._ids(asking))
        if masks:
            self._mask(logits_NV, *masks)
        if barred:
            self._bad_words.ban(logits_NV, barred, [rows[i] for i in barred])
        for line in edited:
            _edit_line(logits_NV[line], states[line])
        if penalised:
            self._penalties.apply(logits_NV, penalised, [rows[i] for i in penalised])
        token_ids_N, max_N = self._draw(logits_NV, states)
        for state in states:
            state.position += 1
        if penalised:
            self._penalties.append([rows[i] for i in penalised], token_ids_N[self._ids(penalised)])
        if barred:
            self._bad_words.append([rows[i] for i in barred], token_ids_N[self._ids(barred)])
        logprobs = None
        if asking:
            num_top = [states[i].params.num_logprobs or 0 for i in asking]
            listed = [states[i].params.logprob_token_ids for i in asking]
            logprobs = compute_logprobs(raw_GV, token_ids_N[self._ids(asking)], num_top, listed)
        is_usable_N, is_stuck_N = max_N.isfinite(), None
        if bound := [*(masks[0] if masks else ()), *barred]:
            is_stuck_N = torch.zeros_like(is_usable_N)
            is_stuck_N[self._ids(bound)] = True
            is_stuck_N &= max_N == -torch.inf
            is_usable_N |= is_stuck_N
        return Sampled(token_ids_N, list(rows), is_usable_N, [rows[i] for i in asking], logprobs, is_stuck_N)

    def _mask(self, logits_NV: Tensor, lines: list[int], bits_GB: np.ndarray) -> None:
        bits_GB1 = upload(torch.from_numpy(bits_GB), self._device)[:, :, None]
        is_allowed_GV = (bits_GB1 >> torch.arange(8, dtype=torch.uint8, device=self._device) & 1).bool().flatten(1)
        is_banned_GV = is_allowed_GV[:, : self._vocab_size].logical_not_()
        if len(lines) == len(logits_NV):
            logits_NV.masked_fill_(is_banned_GV, -torch.inf)
        else:
            for line, is_banned_V in zip(lines, is_banned_GV):
                logits_NV[line].masked_fill_(is_banned_V, -torch.inf)

    def _state(self, row: int) -> _Row:
        state = self._rows[row]
        assert state is not None, f"row {row} was sampled before it was set"
        return state

    def _draw(self, logits_NV: Tensor, states: list[_Row]) -> tuple[Tensor, Tensor]:
        lines_of: dict[Draw, list[int]] = {}
        for line, state in enumerate(states):
            lines_of.setdefault(state.draw, []).append(line)
        if len(lines_of) == 1:
            return self._draw_group(next(iter(lines_of)), logits_NV, states)
        token_ids_N = torch.empty(len(states), dtype=torch.int64, device=self._device)
        max_N = torch.empty(len(states), dtype=torch.float32, device=self._device)
        for draw, lines in lines_of.items():
            lines_G = self._ids(lines)
            group = self._draw_group(draw, logits_NV.index_select(0, lines_G), [states[i] for i in lines])
            token_ids_N[lines_G], max_N[lines_G] = group
        return token_ids_N, max_N

    def _draw_group(self, draw: Draw, logits_GV: Tensor, states: list[_Row]) -> tuple[Tensor, Tensor]:
        if draw is Draw.GREEDY:
            return reference.greedy(logits_GV)
        params = [state.params for state in states]
        keys = torch.tensor([[s.seed, s.choice, s.position] for s in states], dtype=torch.int64)
        uniform_G = reference.uniform(*keys.unbind(1))
        numbers = [[p.temperature, p.top_p, p.min_p, float(p.top_k)] for p in params]
        table_5G = torch.cat((torch.tensor(numbers, dtype=torch.float64).T, uniform_G[None]))
        temperature_G, top_p_G, min_p_G, top_k_G, uniform_G = upload(table_5G, self._device)
        rules = reference.Rules(
            temperature_G,
            min_p_N=min_p_G if any(p.min_p for p in params) else None,
            top_k_N=top_k_G if draw is Draw.TOP_K else None,
            top_p_N=top_p_G if any(p.top_p < 1 for p in params) else None,
        )
        if draw is Draw.ALL:
            return reference.sample_all(logits_GV, rules, uniform_G)
        num = _num_candidates(params) if draw is Draw.TOP_K else _NUM_NUCLEUS_CANDIDATES
        return reference.sample_top(logits_GV, rules, uniform_G, num)

    def _check_ids(self, name: str, token_ids: Sequence[int]) -> None:
        beyond = [token_id for token_id in token_ids if token_id >= self._vocab_size]
        if beyond:
            raise RequestError(
                f"{name} holds token id {beyond[0]}, but the model's ids end at {self._vocab_size - 1}",
                param=name,
            )

    def _ids(self, ids: Iterable[int]) -> Tensor:
        return upload(torch.tensor(list(ids), dtype=torch.int64), self._device)


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


def _edit_line(logits_V: Tensor, state: _Row) -> None:
    """Allowed ids, bias, then end tokens masked below `min_tokens`, unless no token would be left."""
    if state.allowed_ids is not None:
        kept = logits_V[state.allowed_ids]
        logits_V.fill_(-torch.inf)
        logits_V[state.allowed_ids] = kept
    if state.bias is not None:
        ids, values = state.bias
        logits_V[ids] += values
    if state.ends_banned:
        assert state.banned_ids is not None
        before = logits_V[state.banned_ids]
        logits_V[state.banned_ids] = -torch.inf
        nothing_left = logits_V.max() == -torch.inf
        logits_V[state.banned_ids] = before.masked_fill(~nothing_left, -torch.inf)
