from __future__ import annotations

from dataclasses import replace

from fakes import fake_config, fake_spec

from rayllm.config import ResolvedConfig
from rayllm.models.fit import Fit, remedies
from rayllm.spec import GroupedAttentionSpec, MlpSpec

MIB = 2**20
LAYER = replace(
    fake_spec().layers[0],
    attention=GroupedAttentionSpec(8, 8, 64, 0.125),
    feed_forward=MlpSpec(2048, "silu", gated=True),
)
SPEC = replace(fake_spec(), hidden_size=512, layers=(LAYER,) * 4, max_model_len=4096)
"""16 MiB of weights in float32 a layer and 16 KiB of KV a token in all."""


def _config(**changes: object) -> ResolvedConfig:
    return fake_config(spec=SPEC, max_model_len=4096, device="cuda", max_num_seqs=32, **changes)


def test_memory_is_shared_out_and_the_context_is_the_longest_that_fits() -> None:
    roomy, narrow = (Fit.of(_config(), size * MIB) for size in (1024, 100))
    assert roomy.is_enough
    assert roomy.max_model_len == 4096
    assert narrow.is_enough
    assert 256 <= narrow.max_model_len < 4096
    assert narrow.max_model_len == narrow.num_kv_tokens == narrow.kv_bytes // narrow.needs.kv_per_block * 4
    asked = Fit.of(_config(engine={"max_model_len": 4096}), 100 * MIB)
    assert not asked.is_enough


def test_requests_at_once_count_whole_blocks_and_no_more_than_the_engine_runs() -> None:
    fit = replace(Fit.of(_config(), 1024 * MIB), kv_bytes=40 * 16 * 1024 * 4)
    assert fit.num_requests(8) == 20
    assert fit.num_requests(5) == 20
    assert fit.num_requests(1) == 32


def test_each_remedy_fits_by_itself() -> None:
    config = _config(engine={"max_model_len": 4096})
    size = 110 * MIB
    found = list(remedies(config, size))
    assert found[0] == {"max_model_len": Fit.of(config, size).max_model_len}
    assert {"dtype": "bfloat16"} in found
    assert {"tensor_parallel_size": 2} in found


def test_ranks_that_cannot_split_the_model_are_no_remedy() -> None:
    layer = replace(LAYER, attention=GroupedAttentionSpec(7, 7, 64, 0.125))
    config = fake_config(spec=replace(SPEC, layers=(layer,) * 4), max_model_len=4096, device="cuda", dtype="bfloat16")
    assert not any("tensor_parallel_size" in changes for changes in remedies(config, 20 * MIB))


def test_what_is_too_large_for_everything_has_no_remedy() -> None:
    assert list(remedies(_config(), 1000)) == []
