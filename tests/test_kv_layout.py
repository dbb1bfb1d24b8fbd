from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import fake_spec

from rayllm.errors import ConfigError
from rayllm.kv_layout import (
    KVSpan,
    check_holds,
    group_and_part,
    kv_groups,
    kv_parts,
    kv_spans,
    max_tokens_in,
    num_blocks_for,
    num_sequences_in,
)
from rayllm.spec import DecoderSpec


def _spans(*windows: int | None, **changes: int) -> tuple[KVSpan, ...]:
    settings = {"block_size": 4, "max_model_len": 1000, "max_num_batched_tokens": 16, "max_inflight_steps": 2}
    return kv_spans(windows, **(settings | changes))


def _every(count: int, full: int) -> DecoderSpec:
    """`count` layers, of which each `full`-th has no window."""
    return fake_spec(windows=[None if layer % full == full - 1 else 512 for layer in range(count)])


@pytest.mark.parametrize("window", [None, 512])
def test_layers_of_one_kind_are_one_group_with_a_part_each(window: int | None) -> None:
    [group] = kv_groups(fake_spec(windows=[window] * 5))
    assert (group.layers, group.window) == ((0, 1, 2, 3, 4), window)
    assert kv_parts([group]) == group.layers


def test_alternating_layers_are_two_groups() -> None:
    full, windowed = kv_groups(_every(6, 2))
    assert (full.layers, full.window) == ((1, 3, 5), None)
    assert (windowed.layers, windowed.window) == ((0, 2, 4), 512)
    assert group_and_part([full, windowed]) == [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (0, 2)]


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "num_parts"),
    [(26, 7, 4), (34, 7, 5), (48, 6, 8), (62, 7, 10)],  # Gemma 3
)
def test_five_windows_to_one_full_layer_are_groups_of_the_full_layers_number(
    num_layers: int, num_groups: int, num_parts: int
) -> None:
    groups = kv_groups(_every(num_layers, 6))
    assert (len(groups), len(kv_parts(groups))) == (num_groups, num_parts)
    assert [group.window for group in groups] == [None] + [512] * (num_groups - 1)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(num_layers))


def test_one_odd_layer_does_not_cut_a_model_into_many_groups() -> None:
    assert len(kv_groups(fake_spec(windows=[None] + [512] * 27))) <= 8


def test_layers_that_keep_different_things_are_one_group_as_long_as_any_needs() -> None:
    spec = fake_spec(windows=[4, 9])
    wide = replace(spec.layers[0], attention=replace(spec.layers[0].attention, head_dim=32))
    [group] = kv_groups(replace(spec, layers=(wide, spec.layers[1])))
    assert (group.layers, group.window) == ((0, 1), 9)
    [group] = kv_groups(replace(spec, layers=(wide, *fake_spec().layers)))
    assert group.window is None


def test_a_span_begins_with_the_block_that_the_next_token_sees_first() -> None:
    [span] = _spans(5)
    assert [span.begin(num_computed) for num_computed in (0, 4, 7, 8, 11, 12)] == [0, 0, 0, 1, 1, 2]
    [full] = _spans(None)
    assert full.begin(900) == 0


def test_a_span_ends_where_the_largest_step_may() -> None:
    [short] = _spans(5)
    assert short.max_blocks == (16 + 16) // 4 + 1, "a step whose tokens are not committed, and one more"
    [wide] = _spans(401)
    assert wide.max_blocks == (400 + 16) // 4 + 1
    assert [wide.end(begin, 900) for begin in (0, 100, 200)] == [105, 205, 225]
    assert wide.end(0, 10) == 3


@pytest.mark.parametrize("window", [1, 2, 5, 16, 17, 40])
@pytest.mark.parametrize("chunk", [1, 3, 16])
def test_no_chunk_needs_more_than_a_span_has(window: int, chunk: int) -> None:
    """However it is aligned: from the block that must be kept up to the end of the chunk."""
    [span] = _spans(window, max_num_batched_tokens=chunk)
    for num_computed in range(300):
        committed = max(0, num_computed - chunk)
        begin = min(span.begin(num_computed), committed // 4)
        assert span.end(begin, num_computed + chunk) * 4 >= num_computed + chunk


def test_a_window_as_long_as_the_context_is_none() -> None:
    assert _spans(1000) == _spans(None)


def test_blocks_of_a_sequence_are_those_of_all_groups() -> None:
    spans = _spans(None, 5)
    assert [num_blocks_for(spans, num_tokens) for num_tokens in (1, 36, 40, 1000)] == [2, 18, 19, 259]


def test_the_longest_sequence_that_blocks_hold() -> None:
    assert [max_tokens_in(_spans(None), num_blocks, 102) for num_blocks in (0, 1, 25, 26, 99)] == [0, 4, 100, 102, 102]
    assert [max_tokens_in(_spans(5), num_blocks, 102) for num_blocks in (8, 9)] == [32, 102]
    assert max_tokens_in(_spans(None, 5), 19, 102) == 40


def test_too_few_blocks_are_a_config_error() -> None:
    check_holds(_spans(5), 9, 1000)
    with pytest.raises(ConfigError, match=r"max_model_len=1000 does not fit .* needs 9 blocks, and there are 8"):
        check_holds(_spans(5), 8, 1000)


def test_sequences_at_once_keep_their_windows_and_share_a_steps_tokens() -> None:
    assert num_sequences_in(_spans(None), 100, 40) == 10
    windowed = _spans(5)
    assert windowed[0].kept(1000) == 2
    assert windowed[0].kept(3) == 1
    assert [num_sequences_in(windowed, num_blocks, 1000) for num_blocks in (9, 11, 109)] == [1, 2, 51]
    assert num_sequences_in(windowed, 3, 1000) == 3 / 9
