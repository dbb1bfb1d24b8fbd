"""What all kernels do with a row: loads, weights, and the numbers that decide."""

from __future__ import annotations

import triton
import triton.language as tl

from rayllm_kernels.sampling.reference import Draw

GREEDY = tl.constexpr(int(Draw.GREEDY))
ALL = tl.constexpr(int(Draw.ALL))
TOP_P = tl.constexpr(int(Draw.TOP_P))
TOP_K = tl.constexpr(int(Draw.TOP_K))
LOWEST_KEY = tl.constexpr(-0x7F800001)
"""-infinity's."""


@triton.jit
def load_logits(logits_ptr, row, vocab_size, ids, mask):
    """-infinity outside the mask; +infinity for NaN; 0.0 for -0.0."""
    logits = tl.load(logits_ptr + row.to(tl.int64) * vocab_size + ids, mask=mask, other=-float("inf"))
    return tl.where(logits == logits, logits, float("inf")) + 0.0


@triton.jit
def load_max(maxima_ptr, row, num_tiles, TILES: tl.constexpr):
    tiles = tl.arange(0, TILES)
    return tl.max(tl.load(maxima_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=-float("inf")))


@triton.jit
def load_rules(numbers_ptr, row, num_rows):
    """What the logits are multiplied by, and the min-p, as float32."""
    temperature = tl.load(numbers_ptr + row)
    scale = tl.full([], 1.4426950408889634, tl.float64) / temperature
    return scale.to(tl.float32), tl.load(numbers_ptr + num_rows + row).to(tl.float32)


@triton.jit
def weigh(logits, highest, scale, min_p):
    """`reference.token_weights` as int64. Of -64 and less nothing is left by the floor."""
    exponent = tl.maximum((logits - highest) * scale, -64.0)
    whole = (exponent + 12582912.0) - 12582912.0  # rounded to nearest even: the sum has no bits for a fraction
    part = exponent - whole
    power = tl.fma(part, 0.1535920892e-3, 0.1339262701e-2)
    power = tl.fma(power, part, 0.9618384764e-2)
    power = tl.fma(power, part, 0.5550347269e-1)
    power = tl.fma(power, part, 0.2402264476e0)
    power = tl.fma(power, part, 0.6931471825e0)
    power = tl.fma(power, part, 1.0)
    power *= ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return (tl.where(power < min_p, 0.0, power) * 17179869184.0).to(tl.int64)


@triton.jit
def order_of(logits):
    """int32 numbers in the order of the floats."""
    bits = logits.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def draw_uniform(keys_ptr, row, num_rows):
    """`reference.uniform`: float64."""
    seed = tl.load(keys_ptr + num_rows + row)
    choice = tl.load(keys_ptr + 2 * num_rows + row)
    position = tl.load(keys_ptr + 3 * num_rows + row)
    key_0, key_1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    word_0, word_1 = position & 0xFFFFFFFF, (position >> 32) & 0xFFFFFFFF
    word_2, word_3 = choice & 0xFFFFFFFF, choice & 0
    for _ in tl.static_range(10):
        product_0, product_2 = word_0 * 0xD2511F53, word_2 * 0xCD9E8D57
        word_0 = ((product_2 >> 32) & 0xFFFFFFFF) ^ word_1 ^ key_0
        word_2 = ((product_0 >> 32) & 0xFFFFFFFF) ^ word_3 ^ key_1
        word_1, word_3 = product_2 & 0xFFFFFFFF, product_0 & 0xFFFFFFFF
        key_0, key_1 = (key_0 + 0x9E3779B9) & 0xFFFFFFFF, (key_1 + 0xBB67AE85) & 0xFFFFFFFF
    return ((word_0 >> 5) * 67108864 + (word_1 >> 6)).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def target_of(total, uniform):
    """Which of the `total` whole numbers the uniform number falls on."""
    return tl.minimum(tl.floor(uniform * total.to(tl.float64)).to(tl.int64), total - 1)


@triton.jit
def top_p_limit(numbers_ptr, row, num_rows, mass):
    """`reference.top_p_limit`."""
    top_p = tl.load(numbers_ptr + 3 * num_rows + row)
    return tl.ceil(top_p * mass.to(tl.float64)).to(tl.int64)


@triton.jit
def _load_sums(sums_ptr, row, SPLITS: tl.constexpr, PIVOTS: tl.constexpr):
    """[PIVOTS], of all splits."""
    place = tl.arange(0, SPLITS)[:, None] * PIVOTS + tl.arange(0, PIVOTS)[None, :]
    return tl.sum(tl.load(sums_ptr + row * SPLITS * PIVOTS + place), axis=0)


@triton.jit
def find_threshold(numbers_ptr, row, num_rows, kind, pivots_ptr, sums_ptr, SPLITS: tl.constexpr, PIVOTS: tl.constexpr):
    """A logit that is at most the edge of what top-k, or top-p alone, keeps; and the sum of all."""
    pivot = tl.arange(0, PIVOTS)
    sums = _load_sums(sums_ptr, row, SPLITS, PIVOTS)
    total = tl.sum(tl.where(pivot == PIVOTS - 1, sums, 0))
    limit = top_p_limit(numbers_ptr, row, num_rows, total)
    if kind == TOP_K:
        limit = tl.load(numbers_ptr + 2 * num_rows + row).to(tl.int64)
    pivots = tl.load(pivots_ptr + row * PIVOTS + pivot)
    return tl.max(tl.where(sums >= limit, pivots, -float("inf"))), total
