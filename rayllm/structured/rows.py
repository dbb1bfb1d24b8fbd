"""Rows whose text follows a grammar: a matcher for each, and the mask of its next token.

A matcher is a pure fold of the tokens, so every rank has the same, and a row that is begun again (preemption, replay
after a fault) needs only the tokens. Whatever takes time happens on one thread beside the step: compiling when a row
begins, and the next mask as soon as a token is known, which is while the plan travels and the device computes.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from llguidance import LLExecutor, LLMatcher

from rayllm.errors import STRUCTURED_OUTPUTS_FAILED, RayLLMError
from rayllm.messages import Finish, RowParams
from rayllm.request import StructuredOutputsParams
from rayllm.structured.grammar import first_line
from rayllm.structured.matcher import new_matcher, no_token_reason
from rayllm.structured.vocabulary import Vocabulary

_MAX_PROTOTYPES = 64
_SLOW_BATCH_S = 0.02
"""A batch of masks that takes longer is looked at row by row, for a while: one of them may be to blame."""
_NUM_WATCHED = 16
_FREE_S = 0.005
_CREDIT_S = 0.5
"""CPU time that a row's masks may take beyond `_FREE_S` each, over its life."""
_FREE_STEP_S = 0.1
_STEP_CREDIT_S = 2.0
"""CPU time that the masks of all rows may take beyond `_FREE_STEP_S` a step; steps that take less win it back."""


@dataclass(slots=True)
class _Row:
    params: RowParams
    matcher: LLMatcher | None = None
    mask: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))
    """A bit for each token that may come next; valid when `ready` is done."""
    ready: Future[None] | None = None
    failure: str = ""
    ended: bool = False
    """Nothing may follow: what is sampled for it is worth nothing."""
    credit_s: float = _CREDIT_S
    spent_s: float = 0.0
    num_timed: int = 0
    too_costly: str = ""
    """Why it should end. Each rank times its own masks, so this must not change what is drawn: rank 0's word ends the
    row."""

    @property
    def mean_s(self) -> float:
        return self.spent_s / max(1, self.num_timed)


class StructuredRows:
    """The structured ones among a worker's rows. All calls come from one thread."""

    def __init__(self, load: Callable[[], Vocabulary], vocab_size: int, num_threads: int):
        self._load = load
        self._vocab_size = vocab_size
        self._num_threads = num_threads
        self._rows: dict[int, _Row] = {}
        self._thread: ThreadPoolExecutor | None = None
        # Below: touched on that thread alone, but for the matchers' `consume` while it is idle.
        self._vocabulary: Vocabulary | None = None
        self._executor: LLExecutor | None = None
        self._prototypes: OrderedDict[StructuredOutputsParams, LLMatcher] = OrderedDict()
        self._num_watched = 0
        self._credit_s = _STEP_CREDIT_S

    def prepare(self) -> None:
        """Begins to load what the first row will need. A failure is reported for that row."""
        self._submit(self._try_load)

    def begin(self, row: int, params: RowParams, emitted: array[int] | Sequence[int]) -> None:
        """A sequence takes the row, with the tokens it has emitted; nothing where it may write what it likes."""
        self.end(row)
        if params.structured_outputs is not None:
            state = self._rows[row] = _Row(params)
            state.ready = self._submit(self._begin, state, list(emitted))

    def end(self, row: int) -> None:
        """The row is free. Ending a free row does nothing."""
        self._rows.pop(row, None)

    def bind_any(self, rows: Sequence[int]) -> bool:
        """Whether any of `rows` follows a grammar."""
        return any(row in self._rows for row in rows) if self._rows else False

    def masks(self, rows: Sequence[int]) -> tuple[list[int], np.ndarray] | None:
        """Which of `rows` are bound, as indices, and for each the bits of its next tokens: uint8 [G, bytes], the
        lowest bit first. Waits for the thread. None where none is bound."""
        if not self._rows:
            return None
        found: list[tuple[int, np.ndarray]] = []
        for line, row in enumerate(rows):
            state = self._rows.get(row)
            if state is not None and not state.ended:
                assert state.ready is not None
                state.ready.result()
                if not state.failure:
                    found.append((line, state.mask))
        if not found:
            return None
        num_bytes = -(-self._vocab_size // 8)
        return [line for line, _ in found], np.stack([mask.view(np.uint8)[:num_bytes] for _, mask in found])

    def fail(self, row: int, reason: str) -> None:
        """Ends the row with an error at the next `advance`, unless it has ended."""
        if row in self._rows:
            self._rows[row].failure = self._rows[row].failure or reason

    def advance(self, rows: Sequence[int], token_ids: Sequence[int]) -> dict[int, Finish]:
        """Each row has a token more; says which of them end with it, and begins with the others' next masks. Where
        the reason is an error, the token is not one."""
        if not self._rows:
            return {}
        finishes: dict[int, Finish] = {}
        going: list[_Row] = []
        for row, token_id in zip(rows, token_ids):
            state = self._rows.get(row)
            if state is None or state.ended:
                continue
            finish = self._finish_with(state, token_id)
            if finish is None:
                going.append(state)
                if state.too_costly:
                    finishes[row] = _error(state.too_costly)
            else:
                state.ended = True
                finishes[row] = finish
        if going:
            ready = self._submit(self._fill, going)
            for state in going:
                state.ready = ready
        return finishes

    def _finish_with(self, state: _Row, token_id: int) -> Finish | None:
        assert state.ready is not None
        state.ready.result()
        matcher = state.matcher
        if not state.failure:
            assert matcher is not None
            if not matcher.consume_token(token_id):
                state.failure = f"token {token_id} does not follow: {first_line(matcher.get_error())}"
        if state.failure:
            return _error(state.failure)
        assert matcher is not None
        assert self._vocabulary is not None
        if not matcher.is_stopped():
            return None
        return Finish("stop", is_complete=token_id not in self._vocabulary.end_ids)

    # ------------------------------------------------------------------------------------------ on the thread

    def _submit(self, work: Callable[..., None], *arguments: object) -> Future[None]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "structured")
        return self._thread.submit(work, *arguments)

    def _try_load(self) -> None:
        try:
            self._vocabulary = self._vocabulary or self._load()
        except (RayLLMError, OSError):
            return  # tried again, and reported, when a row needs it

    def _begin(self, state: _Row, emitted: list[int]) -> None:
        try:
            if self._vocabulary is None:
                self._vocabulary = self._load()
            state.matcher = self._new_matcher(state.params)
        except (RayLLMError, OSError) as error:
            state.failure = str(error)
            return
        state.mask = np.zeros(self._vocabulary.num_words, np.int32)
        if not state.matcher.consume_tokens(emitted):
            state.failure = f"what was emitted does not follow the grammar: {first_line(state.matcher.get_error())}"
        else:
            _fill_alone(state)
            self._check_mask(state)

    def _new_matcher(self, params: RowParams) -> LLMatcher:
        """A copy of one that was made before, where there is one. Raises `RequestError`."""
        assert params.structured_outputs is not None
        assert self._vocabulary is not None
        prototype = self._prototypes.get(params.structured_outputs)
        if prototype is None:
            prototype = new_matcher(params.structured_outputs, self._vocabulary)
            self._prototypes[params.structured_outputs] = prototype
            if len(self._prototypes) > _MAX_PROTOTYPES:
                self._prototypes.popitem(last=False)
        self._prototypes.move_to_end(params.structured_outputs)
        return prototype.deep_copy()

    def _fill(self, states: list[_Row]) -> None:
        """The masks of the rows' next tokens, in parallel but for a time after a slow batch."""
        if self._executor is None:
            self._executor = LLExecutor(self._num_threads)
        began = time.perf_counter()
        if is_timed := self._num_watched > 0 or len(states) == 1:
            self._num_watched = max(0, self._num_watched - 1)
            spent_s = sum(map(_fill_alone, states))
        else:
            _fill_together(self._executor, states)
        elapsed_s = time.perf_counter() - began
        if elapsed_s > _SLOW_BATCH_S and len(states) > 1:
            self._num_watched = _NUM_WATCHED
        self._charge(states, spent_s if is_timed else elapsed_s)
        for state in states:
            self._check_mask(state)

    def _charge(self, states: list[_Row], spent_s: float) -> None:
        """Where the rows together take too much for too long, the slowest must go, until the others fit."""
        self._credit_s = min(_STEP_CREDIT_S, self._credit_s + _FREE_STEP_S - spent_s)
        if self._credit_s >= 0:
            return
        self._credit_s = _STEP_CREDIT_S / 2  # those that go need a step or two
        left_s = sum(state.mean_s for state in states)
        for state in sorted(states, key=lambda state: state.mean_s, reverse=True):
            if left_s <= _FREE_STEP_S:
                return
            left_s -= state.mean_s
            state.too_costly = state.too_costly or (
                f"the grammars of all requests take {spent_s * 1000:.0f} ms of computing for each token, at most "
                f"{_FREE_STEP_S * 1000:g} are allowed, and this is one of the slowest; simplify it"
            )

    def _check_mask(self, state: _Row) -> None:
        """Ends of text leave the mask where the sequence ignores them, unless nothing else is left."""
        matcher, vocabulary = state.matcher, self._vocabulary
        assert matcher is not None
        assert vocabulary is not None
        if matcher.is_error():
            state.failure = state.failure or no_token_reason(matcher)
            return
        mask = state.mask
        if vocabulary.phantom_id is not None:
            _clear_bits(mask, (vocabulary.phantom_id,))
        if state.params.ignore_eos and not matcher.is_stopped():
            before = mask.copy()
            _clear_bits(mask, vocabulary.end_ids)
            if not mask.any():
                state.mask = mask = before
        if not mask.any():
            state.failure = "the grammar leaves no token of this model"


def _error(reason: str) -> Finish:
    return Finish("error", code=STRUCTURED_OUTPUTS_FAILED, message=f"structured output: {reason}")


def _fill_alone(state: _Row) -> float:
    """The mask of one row; returns its CPU time in seconds."""
    spent_s = _compute_mask(state)
    state.spent_s += spent_s
    state.num_timed += 1
    state.credit_s -= max(0.0, spent_s - _FREE_S)
    if state.credit_s < 0:
        state.too_costly = f"the grammar takes more than {_FREE_S * 1000:g} ms of computing for each token; simplify it"
    return spent_s


def _compute_mask(state: _Row) -> float:
    assert state.matcher is not None
    began = time.thread_time()
    state.matcher.unsafe_compute_mask_ptr(state.mask.ctypes.data, state.mask.nbytes)
    return time.thread_time() - began


def _fill_together(executor: LLExecutor, states: list[_Row]) -> None:
    num_words = len(states[0].mask)
    masks = np.empty((len(states), num_words), np.int32)
    matchers = [(state.matcher, i) for i, state in enumerate(states) if state.matcher is not None]
    executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, num_words * 4, len(states))
    for state, mask in zip(states, masks):
        state.mask = mask


def _clear_bits(mask: np.ndarray, token_ids: Iterable[int]) -> None:
    bits = mask.view(np.uint32)
    for token_id in token_ids:
        bits[token_id // 32] &= np.uint32(0xFFFFFFFF ^ (1 << (token_id % 32)))
