from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from layers.attention.test_latent import SPEC, Step

from rayllm.layers.attention import gathered_latent
from rayllm.spec import RopeSpec


def test_heads_are_expanded_a_slice_at_a_time_where_all_take_too_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Step(torch.float32)
    q, latents = step.q_THD[:11].unsqueeze(0), step.latents[-1].unsqueeze(0)
    whole = gathered_latent.expanded(q, latents, None, step.layer)
    head_bytes = 11 * 2 * SPEC.qk_dim * 4
    for num_heads in (4, 1, 0):
        monkeypatch.setitem(gathered_latent._EXPANDED_BYTES, "cpu", num_heads * head_bytes)
        torch.testing.assert_close(gathered_latent.expanded(q, latents, None, step.layer), whole)


@pytest.mark.parametrize(
    ("num_queries", "num_keys", "cheaper"),
    [(1, 1000, False), (1000, 1000, True), (64, 4096, False), (160, 4096, False), (180, 4096, True)],
)
def test_chunks_of_deepseeks_widths_are_expanded_from_about_170_tokens_on(
    num_queries: int, num_keys: int, cheaper: bool
) -> None:
    spec = replace(SPEC, nope_dim=128, value_dim=128, latent_dim=512, rope=RopeSpec(1e4, 64))
    assert gathered_latent.expanding_is_cheaper(num_queries, num_keys, spec) is cheaper
