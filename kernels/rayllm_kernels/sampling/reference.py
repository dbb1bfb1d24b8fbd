"""Drawing tokens, in plain torch: exact, and the same for a row whatever else is in the batch.

Shapes: N rows to draw for, V vocabulary ids, K candidates. Logits are float32, per-row numbers float64.

Values alone define which tokens are kept, never an order among equals; ties are kept or dropped whole:
- top-k keeps a token when fewer than k tokens are strictly more likely;
- top-p keeps a token when the mass of the strictly more likely tokens is below top_p of the mass that min-p
  and top-k left; so the most likely token is always kept;
- min-p keeps a token when its probability is at least min_p times the highest.

A probability is a weight: floor(exp((logit - max) / temperature) * 2**34), a whole number. Sums of up to
2**19 of them are exact in float64, so no order of summation, batch shape or thread count can change a sum,
and with it a kept set or a draw. The floor drops less than 2**-34 of the highest probability from each token.
The exponential is 2**x by SLEEF's polynomial in fused float32 operations, which is what torch computes where it has
vectors (AVX2, AVX-512, NEON); `triton.py` does the same, so a seed gives the same tokens on a CPU and on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

WEIGHT_SCALE = 2.0**34
MAX_VOCAB_SIZE = 2**19
_BLOCK = 64
_NUM_BUCKETS = 2**16
_MASK32 = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_PHILOX_ROUNDS = 10
_LOG2_E = 1.4426950408889634
_VECTORS = 32
"""Elements of the widest step of torch's vector loops: two vectors of AVX-512."""
_THREAD_GRAIN = 2**15
"""Elements for which torch starts a further thread (`at::internal::GRAIN_SIZE`)."""


class Draw(IntEnum):
    """How a row's token is drawn; rows of one kind are drawn together."""

    GREEDY = 0
    ALL = 1
    TOP_P = 2
    TOP_K = 3
    """With a top-p or without."""


class Group(NamedTuple):
    """Lines that draw the same way (int64 [G]; None: all of them), and what all or none of them have."""

    draw: Draw
    lines_G: Tensor | None
    num_candidates: int
    """Decides speed, never the result."""
    has_min_p: bool
    has_top_p: bool


def sample(
    logits_NV: Tensor,
    keys_4N: Tensor,
    numbers_4N: Tensor,
    groups: Sequence[Group],
    rows_N: Tensor,
    last_token_M: Tensor,
    is_bound_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one id (int64) for each line, and writes it to `last_token_M` at the line's row as well.

    `keys_4N`, int64: how the line draws (`Draw`), seed, choice and position. `numbers_4N`, float64: temperature, min-p,
    top-k and top-p. Each line is in one of `groups`. Also says, as bools, which lines are usable and which are stuck. A
    line that holds NaN or +infinity, or nothing else than -infinity, gets an id of the vocabulary without meaning; in
    the last case it is stuck if it is bound (by something that may have ruled all out: `is_bound_N`, uint8), and else
    not usable, as in the others.
    """
    if len(groups) == 1:
        token_ids_N, max_N = _sample_group(logits_NV, keys_4N, numbers_4N, groups[0])
    else:
        token_ids_N = torch.empty(len(logits_NV), dtype=torch.int64, device=logits_NV.device)
        max_N = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
        for group in groups:
            lines_G = group.lines_G
            assert lines_G is not None, "several groups name their lines"
            logits_GV = logits_NV.index_select(0, lines_G)
            drawn = _sample_group(logits_GV, keys_4N[:, lines_G], numbers_4N[:, lines_G], group)
            token_ids_N[lines_G], max_N[lines_G] = drawn
    last_token_M.index_copy_(0, rows_N, token_ids_N)
    is_stuck_N = is_bound_N.bool() & (max_N == -torch.inf)
    return token_ids_N, max_N.isfinite() | is_stuck_N, is_stuck_N


def _sample_group(logits_GV: Tensor, keys_4G: Tensor, numbers_4G: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    if group.draw is Draw.GREEDY:
        return greedy(logits_GV)
    uniform_G = uniform(*keys_4G[1:])
    temperature_G, min_p_G, top_k_G, top_p_G = numbers_4G
    rules = Rules(
        temperature_G,
        min_p_N=min_p_G if group.has_min_p else None,
        top_k_N=top_k_G if group.draw is Draw.TOP_K else None,
        top_p_N=top_p_G if group.has_top_p else None,
    )
    if group.draw is Draw.ALL:
        return sample_all(logits_GV, rules, uniform_G)
    return sample_top(logits_GV, rules, uniform_G, group.num_candidates)


def mask(logits_NV: Tensor, lines_G: Tensor, bits_GB: Tensor) -> None:
    """Leaves `logits_NV[lines_G[i]]` the ids whose bit in `bits_GB[i]` (uint8, the lowest first) is set; others become
    -infinity. A line comes once."""
    shifts = torch.arange(8, dtype=torch.uint8, device=logits_NV.device)
    is_allowed_GV = (bits_GB[:, :, None] >> shifts & 1).bool().flatten(1)
    is_banned_GV = is_allowed_GV[:, : logits_NV.shape[1]].logical_not_()
    for line, is_banned_V in zip(lines_G.tolist(), is_banned_GV):
        logits_NV[line].masked_fill_(is_banned_V, -torch.inf)


def philox(counter_4N: Tensor, key_2N: Tensor) -> Tensor:
    """Philox-4x32-10: four 32-bit words for each of N counters and keys.

    Words are unsigned, in int64 tensors. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    device = counter_4N.device
    multipliers_21 = torch.tensor(_PHILOX_MULTIPLIERS, device=device)[:, None]
    weyl_21 = torch.tensor(_PHILOX_WEYL, device=device)[:, None]
    rounds = torch.arange(_PHILOX_ROUNDS, device=device)[:, None, None]
    keys = (key_2N + rounds * weyl_21) & _MASK32
    even_2N, odd_2N = counter_4N[0::2], counter_4N[1::2]
    for key_of_round in keys:
        # int64 wraps modulo 2**64, so the bits are those of the unsigned product.
        product_2N = even_2N * multipliers_21
        even_2N = ((product_2N >> 32) & _MASK32).flip(0) ^ odd_2N ^ key_of_round
        odd_2N = (product_2N & _MASK32).flip(0)
    return torch.stack((even_2N[0], odd_2N[0], even_2N[1], odd_2N[1]))


def uniform(seed_N: Tensor, choice_N: Tensor, position_N: Tensor) -> Tensor:
    """One float64 in [0, 1) with 53 random bits for each (seed, choice, position), which are any int64."""
    key_2N = torch.stack((seed_N & _MASK32, (seed_N >> 32) & _MASK32))
    counter_4N = torch.stack((position_N & _MASK32, (position_N >> 32) & _MASK32, choice_N & _MASK32, 0 * choice_N))
    words_4N = philox(counter_4N, key_2N)
    return ((words_4N[0] >> 5) * 2**26 + (words_4N[1] >> 6)).double() * 2.0**-53


def greedy(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The most likely id of each row (the lowest of equals) and its logit: NaN where any logit is NaN."""
    vocab_size = logits_NV.shape[1]
    main = vocab_size - vocab_size % _BLOCK
    if logits_NV.is_cuda or main == 0:
        ids_N = logits_NV.argmax(1)
        return ids_N, logits_NV.gather(1, ids_N[:, None])[:, 0]
    # On a CPU argmax is ten times slower than amax: find the first block with the highest value, look inside.
    blocks_NMB = logits_NV[:, :main].unflatten(1, (-1, _BLOCK))
    max_NM = blocks_NMB.amax(2)
    block_N = max_NM.argmax(1)
    rows_N = torch.arange(len(logits_NV), device=logits_NV.device)
    best_N = max_NM[rows_N, block_N]
    ids_N = block_N * _BLOCK + blocks_NMB[rows_N, block_N].argmax(1)
    if main == vocab_size:
        return ids_N, best_N
    tail_ids_N = logits_NV[:, main:].argmax(1)
    tail_best_N = logits_NV[rows_N, main + tail_ids_N]
    better_N = (tail_best_N > best_N) | (tail_best_N.isnan() & ~best_N.isnan())
    return torch.where(better_N, tail_ids_N + main, ids_N), torch.where(better_N, tail_best_N, best_N)


class Rules(NamedTuple):
    """What filters each row, float64; None where no row has that filter. A top-k is 1 or more, a top-p above 0."""

    temperature_N: Tensor
    min_p_N: Tensor | None = None
    top_k_N: Tensor | None = None
    top_p_N: Tensor | None = None

    def of(self, rows: slice) -> Rules:
        """The rules of some of the rows."""
        temperature_N, *others = (None if per_row_N is None else per_row_N[rows] for per_row_N in self)
        assert temperature_N is not None
        return Rules(temperature_N, *others)


def token_weights(logits_NK: Tensor, max_N: Tensor, rules: Rules) -> Tensor:
    """Whole float32 numbers like probabilities, 0 for what min-p drops. `max_N`: the highest logits."""
    num = logits_NK.numel()
    flat = torch.empty(_whole_vectors(num), device=logits_NK.device)
    weights_NK = flat[:num].view(logits_NK.shape)
    torch.sub(logits_NK, max_N[:, None], out=weights_NK)
    weights_NK.mul_((_LOG2_E / rules.temperature_N).float()[:, None])
    flat.exp2_()
    if rules.min_p_N is not None:
        weights_NK.masked_fill_(weights_NK < rules.min_p_N.float()[:, None], 0)
    return weights_NK.mul_(WEIGHT_SCALE).floor_()


def _whole_vectors(num: int) -> int:
    """At least `num` elements, such that each thread that torch gives a part of them computes whole vectors: exp2 of
    what is left over is the C library's, whose last bit may differ."""
    num_threads = 0
    while (needed := min(torch.get_num_threads(), -(-num // _THREAD_GRAIN))) > num_threads:
        num_threads = needed
        num = -(-num // (_VECTORS * num_threads)) * _VECTORS * num_threads
    return num


def _first_above(cumulative_NK: Tensor, target_N: Tensor) -> Tensor:
    """The first index whose running sum is above the target: never one of weight 0."""
    return (cumulative_NK <= target_N[:, None]).sum(1).clamp_(max=cumulative_NK.shape[1] - 1)


def draw(weights_NK: Tensor, uniform_N: Tensor) -> Tensor:
    """The index that the uniform number falls on, when weights are laid end to end (inverse CDF)."""
    num = weights_NK.shape[1]
    if num <= 1024:
        cumulative_NK = weights_NK.double().cumsum(1)
        return _first_above(cumulative_NK, _target(cumulative_NK[:, -1], uniform_N))
    if num % _BLOCK:
        weights_NK = torch.nn.functional.pad(weights_NK, (0, _BLOCK - num % _BLOCK))
    blocks_NMB = weights_NK.unflatten(1, (-1, _BLOCK))
    cumulative_NM = blocks_NMB.sum(2, dtype=torch.float64).cumsum(1)
    target_N = _target(cumulative_NM[:, -1], uniform_N)
    block_N = _first_above(cumulative_NM, target_N)
    rows_N = torch.arange(len(weights_NK), device=weights_NK.device)
    inside_NB = blocks_NMB[rows_N, block_N].double()
    before_N = cumulative_NM[rows_N, block_N] - inside_NB.sum(1)
    return block_N * _BLOCK + _first_above(inside_NB.cumsum(1), target_N - before_N)


def _target(total_N: Tensor, uniform_N: Tensor) -> Tensor:
    return torch.minimum((uniform_N * total_N).floor_(), total_N - 1)


def candidates(logits_NV: Tensor, num: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `num` most likely tokens: values in falling order (equal ones in order of ids), ids, and `floor_N`.

    Every token with a value above the floor is among them; of those at the floor some may be missing. So a floor
    of -inf says that all tokens above -inf are there.
    """
    vocab_size = logits_NV.shape[1]
    if num >= vocab_size:
        values_NK, ids_NK = logits_NV.sort(dim=1, descending=True, stable=True)
        return values_NK, ids_NK, torch.full_like(values_NK[:, 0], -torch.inf)
    num_blocks = vocab_size // _BLOCK
    if num_blocks <= 4 * num:
        values_NK, ids_NK = logits_NV.topk(num, sorted=False)
    else:
        values_NK, ids_NK = _candidates_of_best_blocks(logits_NV, num)
    by_id_NK = ids_NK.argsort(1)
    values_NK, order_NK = values_NK.gather(1, by_id_NK).sort(dim=1, descending=True, stable=True)
    return values_NK, ids_NK.gather(1, by_id_NK).gather(1, order_NK), values_NK[:, -1]


def _candidates_of_best_blocks(logits_NV: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The `num` highest values can only lie in the `num` blocks with the highest maxima: look only there."""
    num_rows, vocab_size = logits_NV.shape
    main = vocab_size - vocab_size % _BLOCK
    blocks_NMB = logits_NV[:, :main].unflatten(1, (-1, _BLOCK))
    block_NM = blocks_NMB.amax(2).topk(num, sorted=False).indices
    rows_N1 = torch.arange(num_rows, device=logits_NV.device)[:, None]
    inside_NC = torch.cat((blocks_NMB[rows_N1, block_NM].flatten(1), logits_NV[:, main:]), dim=1)
    values_NK, place_NK = inside_NC.topk(num, sorted=False)
    in_block_NK = block_NM.gather(1, (place_NK // _BLOCK).clamp(max=num - 1)) * _BLOCK + place_NK % _BLOCK
    ids_NK = torch.where(place_NK < num * _BLOCK, in_block_NK, place_NK - num * _BLOCK + main)
    return values_NK, ids_NK


def top_k_edge(values_NK: Tensor, top_k_N: Tensor) -> Tensor:
    """The lowest value that top-k keeps. `values_NK` fall along K; a top-k beyond K gives the last of them."""
    place_N = top_k_N.long().clamp(1, values_NK.shape[1]) - 1
    return values_NK.gather(1, place_N[:, None])[:, 0]


def top_p_limit(top_p_N: Tensor, mass_N: Tensor) -> Tensor:
    """The mass, a whole number, that the tokens more likely than a kept one stay below."""
    return (top_p_N * mass_N).ceil_()


def top_p_edge(values_NK: Tensor, weights_NK: Tensor, limit_N: Tensor) -> Tensor:
    """The lowest value that top-p keeps. Values and float64 weights fall along K; limits are above 0."""
    before_NK = weights_NK.cumsum(1) - weights_NK
    num_inside_N = (before_NK < limit_N[:, None]).sum(1).clamp_(min=1)
    return values_NK.gather(1, num_inside_N[:, None] - 1)[:, 0]


def row_slices(logits_NV: Tensor) -> list[slice]:
    """Rows whose temporaries fit a CPU's cache together, or, on a GPU, take a modest part of its memory."""
    num_rows = max(1, (2**27 if logits_NV.is_cuda else 2**19) // logits_NV.shape[1])
    return [slice(begin, begin + num_rows) for begin in range(0, len(logits_NV), num_rows)]


def sample_all(logits_NV: Tensor, rules: Rules, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """Ids drawn from all tokens that min-p keeps, and the rows' highest logits."""
    max_N = logits_NV.amax(1)
    drawn = [
        draw(token_weights(logits_NV[some], max_N[some], rules.of(some)), uniform_N[some])
        for some in row_slices(logits_NV)
    ]
    return torch.cat(drawn), max_N


def sample_top(logits_NV: Tensor, rules: Rules, uniform_N: Tensor, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Ids drawn from the tokens that min-p, then top-k, then top-p keep, and the rows' highest logits.

    All rows have a top-k, or none has and all have a top-p below 1. `num_candidates` decides speed, never the
    result: rows whose kept set does not fit look at all tokens.
    """
    values_NK, ids_NK, floor_N = candidates(logits_NV, num_candidates)
    max_N = values_NK[:, 0]
    weights_NK = token_weights(values_NK, max_N, rules).double()
    if rules.top_k_N is not None:
        top_k_edge_N = top_k_edge(values_NK, rules.top_k_N)
        weights_NK.masked_fill_(values_NK < top_k_edge_N[:, None], 0)
    if rules.top_p_N is not None:
        mass_N = weights_NK.sum(1) if rules.top_k_N is not None else _mass(logits_NV, max_N, rules)
        top_p_edge_N = top_p_edge(values_NK, weights_NK, top_p_limit(rules.top_p_N, mass_N))
        weights_NK.masked_fill_(values_NK < top_p_edge_N[:, None], 0)
    # With top-k all that it keeps must be among the candidates, else the mass that top-p takes a part of is wrong.
    needed_N = top_p_edge_N if rules.top_k_N is None else top_k_edge_N
    incomplete_N = (needed_N <= floor_N) & (floor_N > -torch.inf) & max_N.isfinite()
    # Drawn in order of ids, so that the draw does not depend on how many candidates were looked at.
    by_id_NK = ids_NK.argsort(1)
    place_N = draw(weights_NK.gather(1, by_id_NK), uniform_N)
    token_ids_N = ids_NK.gather(1, by_id_NK).gather(1, place_N[:, None])[:, 0]
    for line in incomplete_N.nonzero()[:, 0].tolist():  # one row at a time bounds the memory
        one = slice(line, line + 1)
        token_ids_N[one] = _sample_top_of_all(logits_NV[one], max_N[one], rules.of(one), uniform_N[one])
    return token_ids_N, max_N


def _mass(logits_NV: Tensor, max_N: Tensor, rules: Rules) -> Tensor:
    masses = [
        token_weights(logits_NV[some], max_N[some], rules.of(some)).sum(1, dtype=torch.float64)
        for some in row_slices(logits_NV)
    ]
    return torch.cat(masses)


def _sample_top_of_all(logits_1V: Tensor, max_1: Tensor, rules: Rules, uniform_1: Tensor) -> Tensor:
    """`sample_top` for one row and any kept set. A histogram finds the edges: a sort takes ten times as long."""
    logits_V = logits_1V[0]
    weights_V = token_weights(logits_1V, max_1, rules)[0]
    bucket_V = _buckets(logits_V)
    if rules.top_k_N is not None:
        sizes = torch.bincount(bucket_V, minlength=_NUM_BUCKETS)
        rank = rules.top_k_N[0].long().clamp(max=len(logits_V))
        before = sizes.cumsum(0) - sizes
        last = (before < rank).sum() - 1
        values = logits_V[bucket_V == last].sort(descending=True).values
        weights_V.masked_fill_(logits_V < values[rank - before[last] - 1], 0)
    if rules.top_p_N is not None:
        masses = torch.bincount(bucket_V, weights=weights_V.double(), minlength=_NUM_BUCKETS)
        limit_1 = top_p_limit(rules.top_p_N, masses.sum()[None])
        before = masses.cumsum(0) - masses
        last = (before < limit_1).sum() - 1
        inside_V = bucket_V == last
        values, order = logits_V[inside_V].sort(descending=True)
        weights = weights_V[inside_V][order].double()
        weights_V.masked_fill_(logits_V < top_p_edge(values[None], weights[None], limit_1 - before[last]), 0)
    return draw(weights_V[None], uniform_1)


def _buckets(logits_V: Tensor) -> Tensor:
    """Numbers that rise as logits fall: the upper half of a float's bits, in the order of the floats.

    -0.0 comes behind 0.0, which does no harm: an edge found at either is the same value.
    """
    bits_V = logits_V.view(torch.int32)
    in_order_V = bits_V ^ ((bits_V >> 31) & 0x7FFFFFFF)
    return (_NUM_BUCKETS // 2 - 1 - (in_order_V >> 16)).long()


def begin_histories(
    counts_SV: Tensor, history_SL: Tensor, tokens_T: Tensor, histories_B4: Tensor, max_length: int
) -> None:
    """Slots are taken by new rows: what was there is forgotten, and each row's tokens are there instead.

    `tokens_T` (int32) holds the rows' tokens one after the other; `histories_B4` (int64) for each its slot, which comes
    once, where its tokens begin and end in `tokens_T`, and how many of them are the prompt's. None has more than
    `max_length`. Slots are otherwise zeros at first: int32, `counts_SV` as wide as the vocabulary, `history_SL` as
    long as a row gets. What they hold is each implementation's own, so a slot stays with the one that began it.
    """
    for slot, begin, end, num_prompt_tokens in histories_B4.tolist():
        tokens_L = tokens_T[begin:end]
        history_SL[slot, : len(tokens_L)] = tokens_L
        emitted = tokens_L[num_prompt_tokens:]
        counts_SV[slot].zero_().index_add_(0, emitted.long(), torch.ones_like(emitted))


def penalise(
    logits_NV: Tensor,
    counts_SV: Tensor,
    history_SL: Tensor,
    lines_slots_lengths_3P: Tensor,
    numbers_P3: Tensor,
    max_length: int,
) -> None:
    """Changes the logits of what P lines' slots hold: repetition, then frequency, then presence penalty.

    Repetition covers prompt and output, divides positive logits and multiplies others (Keskar et al., 2019). Frequency
    and presence cover the output only and are subtracted (OpenAI's definition). `lines_slots_lengths_3P` (int64) says
    how many tokens each slot holds, at most `max_length`; a line and a slot come once. `numbers_P3` (float32):
    repetition, frequency, presence.
    """
    line_P1, slot_P1, length_P1 = lines_slots_lengths_3P[:, :, None]
    repetition_P1, frequency_P1, presence_P1 = numbers_P3.T[:, :, None]
    history_PL = history_SL[slot_P1[:, 0], :max_length].long()
    past_end_PL = torch.arange(max_length, device=logits_NV.device) >= length_P1
    # Padding repeats the first token; a token met twice is written twice with the same value: no harm.
    history_PL = torch.where(past_end_PL, history_PL[:, :1], history_PL)
    counts_PL = counts_SV[slot_P1, history_PL]
    logits_PL = logits_NV[line_P1, history_PL]
    logits_PL = torch.where(logits_PL > 0, logits_PL / repetition_P1, logits_PL * repetition_P1)
    logits_PL -= frequency_P1 * counts_PL
    logits_PL -= presence_P1 * (counts_PL > 0)
    logits_NV[line_P1, history_PL] = logits_PL


def append_to_histories(
    counts_SV: Tensor, history_SL: Tensor, lines_slots_lengths_3P: Tensor, token_ids_N: Tensor
) -> None:
    """P lines have emitted their tokens of `token_ids_N` (int64), which their slots get. For the rest see `penalise`;
    lengths are those before."""
    line_P, slot_P, length_P = lines_slots_lengths_3P
    token_ids_P = token_ids_N[line_P]
    history_SL[slot_P, length_P] = token_ids_P.to(torch.int32)
    counts_SV[slot_P, token_ids_P] += 1
