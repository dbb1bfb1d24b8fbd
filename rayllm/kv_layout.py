"""Which layers of a model share a block table, and how many KV blocks a sequence has. Plain Python, importable by all.

Layers that see all tokens keep their keys and values as long as a sequence runs; layers with a window let go of what no
later token sees. Layers that let go together form a *KV group*, and a sequence has a block table for each. All groups
take their blocks from one pool: a block is divided into as many *parts* as the largest group has layers, and a layer
uses one part of its group's blocks. So memory moves between groups as sequences need it, and a model of one kind of
layer has one group, whose blocks hold all layers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from rayllm.errors import ConfigError
from rayllm.spec import DecoderSpec

MAX_GROUPS = 8
"""Each group costs a step on the host what a block table costs."""


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share a block table."""

    layers: tuple[int, ...]
    """In their order: the first uses part 0 of each of the group's blocks, the second part 1, ..."""
    window: int | None
    """What a token sees of its sequence, itself included; None: all before it."""


def kv_groups(spec: DecoderSpec) -> tuple[KVGroup, ...]:
    """The groups of a model's layers, those without a window first.

    Groups can share a pool only where all layers keep the same of a token; else there is one group, which keeps what
    its layer of the widest window needs.
    """
    attentions = list(spec.attentions())
    layers_of: dict[int | None, list[int]] = {}
    for layer, attention in enumerate(attentions):
        layers_of.setdefault(attention.window, []).append(layer)
    windows = sorted(layers_of, key=lambda window: (window is not None, -(window or 0)))
    if len({attention.kv_shape(1) for attention in attentions}) > 1:
        return (KVGroup(tuple(range(len(attentions))), windows[0]),)
    num_parts = _num_parts([len(layers) for layers in layers_of.values()])
    return tuple(
        KVGroup(tuple(layers_of[window][begin : begin + num_parts]), window)
        for window in windows
        for begin in range(0, len(layers_of[window]), num_parts)
    )


def group_and_part(groups: Sequence[KVGroup]) -> list[tuple[int, int]]:
    """For each layer, the number of its group, and its part of the group's blocks."""
    places = {layer: (number, part) for number, group in enumerate(groups) for part, layer in enumerate(group.layers)}
    return [places[layer] for layer in range(len(places))]


def kv_parts(groups: Sequence[KVGroup]) -> tuple[int, ...]:
    """For each part of a block a layer that uses it: all that do keep the same there."""
    return max((group.layers for group in groups), key=len)


def _num_parts(counts: Sequence[int]) -> int:
    """Parts of a block, for kinds of so many layers: the number that leaves the least of the kinds' blocks unused, each
    kind as important as another, since with short contexts windows fill most blocks and with long ones few."""

    def num_groups(num_parts: int) -> int:
        return sum(-(-count // num_parts) for count in counts)

    def unused(num_parts: int) -> float:
        return sum(-count % num_parts / count for count in counts)

    limit = max(MAX_GROUPS, len(counts))
    allowed = [num_parts for num_parts in range(1, max(counts) + 1) if num_groups(num_parts) <= limit]
    return min(allowed, key=lambda num_parts: (unused(num_parts), num_groups(num_parts)))


@dataclass(frozen=True, slots=True)
class KVSpan:
    """Which blocks of a sequence one KV group holds at a time: from `begin` up to `end`, counted in the sequence."""

    block_size: int
    window: int | None
    """None where it never lets go of any."""
    max_blocks: int = 0
    """With a window: as many as a sequence ever holds."""

    def begin(self, num_computed: int) -> int:
        """The first block that a token from position `num_computed` on sees."""
        return 0 if self.window is None else max(0, num_computed - self.window + 1) // self.block_size

    def end(self, begin: int, num_tokens: int) -> int:
        """The end of the blocks that a sequence of `num_tokens` known tokens is given, where it holds those from
        `begin` on: all, or what the largest step can need."""
        end = -(-num_tokens // self.block_size)
        return end if self.window is None else min(end, begin + self.max_blocks)

    def kept(self, num_tokens: int) -> int:
        """Blocks that a sequence of so many tokens holds while one token at a time is computed."""
        end = -(-num_tokens // self.block_size)
        return end if self.window is None else min(end, -(-(self.window - 1) // self.block_size) + 1)


def kv_spans(
    windows: Sequence[int | None],
    *,
    block_size: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    max_inflight_steps: int,
) -> tuple[KVSpan, ...]:
    """The spans of groups with these windows.

    A block is let go of when no later token sees it and the step that filled it is committed, so that the prefix cache
    knows it: what a step is planned with are the `window - 1` tokens before it, or those of the uncommitted steps if
    they are more, and its own.
    """
    spans = []
    for window in windows:
        if window is None or window >= max_model_len:
            spans.append(KVSpan(block_size, None))
            continue
        before = max(window - 1, (max_inflight_steps - 1) * max_num_batched_tokens)
        spans.append(KVSpan(block_size, window, -(-(before + max_num_batched_tokens) // block_size) + 1))
    return tuple(spans)


def num_blocks_for(spans: Sequence[KVSpan], num_tokens: int) -> int:
    """Blocks that a sequence of so many tokens holds at most at a time."""
    return sum(span.end(0, num_tokens) for span in spans)


def num_sequences_in(spans: Sequence[KVSpan], num_blocks: int, num_tokens: int) -> float:
    """Sequences of so many tokens that run at once: each with what it keeps, and one of them with what a step needs,
    since the sequences of a step share its tokens."""
    largest, kept = num_blocks_for(spans, num_tokens), sum(span.kept(num_tokens) for span in spans)
    return max(num_blocks / largest, 1 + (num_blocks - largest) / kept)


def check_holds(spans: Sequence[KVSpan], num_blocks: int, max_model_len: int) -> None:
    """Raises `ConfigError` where so many blocks do not hold a sequence of `max_model_len` tokens."""
    num_needed = num_blocks_for(spans, max_model_len)
    if num_blocks < num_needed:
        raise ConfigError(
            f"max_model_len={max_model_len} does not fit the KV cache: a sequence of that length needs {num_needed} "
            f"blocks, and there are {num_blocks}. Lower max_model_len, or give the KV cache more memory"
        )


def max_tokens_in(spans: Sequence[KVSpan], num_blocks: int, max_tokens: int) -> int:
    """Tokens of the longest sequence, up to `max_tokens`, that `num_blocks` blocks can hold."""
    size = spans[0].block_size
    lengths = range(0, max_tokens + size, size)
    fitting = bisect_right(lengths, num_blocks, key=lambda num_tokens: num_blocks_for(spans, num_tokens))
    return min(lengths[max(0, fitting - 1)], max_tokens)
