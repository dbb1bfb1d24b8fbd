"""How a step's attention is cut into groups, chunks and prompts, and that the cut never shows in the result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from teacher import PagedRun, load, log_probs
from tiny import make_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayllm.distributed.groups import TensorParallel
from rayllm.layers.attention import AttentionGroup, GatheredBackend, gathered, kv_heads_of
from rayllm.layers.attention.gathered import GroupPlan

CPU = torch.device("cpu")
BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plan"), tokenizer=False)


def _plan(
    folder: Path, done: list[int], counts: dict[int, int], window: int | None = None
) -> tuple[GroupPlan, PagedRun]:
    """The plan of the step that computes `counts` after `done` tokens of each sequence."""
    run = PagedRun(load(TensorParallel(), folder), [[1] * 40 for _ in done], BLOCK_SIZE)
    run.done = list(done)
    batch, _ = run.batch(counts)
    group = AttentionGroup(num_kv_heads=2, head_dim=16, window=window)
    return GatheredBackend([[group]], torch.float32, CPU).prepare(batch)[0][group], run


def test_rows_of_equal_length_are_one_group(folder: Path) -> None:
    plan, _ = _plan(folder, [9, 9, 9], {0: 1, 1: 1, 2: 1})
    (group,) = plan.decode
    assert group.tokens == slice(0, 3)
    assert group.pages.numel() == 3 * 2 * 3


def test_ragged_rows_are_masked_past_their_own_length(folder: Path) -> None:
    plan, _ = _plan(folder, [9, 2], {0: 1, 1: 1})
    (group,) = plan.decode
    assert (group.mask_NGL == 0).sum(dim=2).flatten().tolist() == [10, 10, 3, 3]


def test_rows_are_cut_into_groups_of_similar_length(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = 2 * 2 * BLOCK_SIZE * 16 * 4
    monkeypatch.setitem(gathered._GROUP_BYTES, "cpu", 6 * page_bytes)
    plan, _ = _plan(folder, [39, 3, 20, 3], dict.fromkeys(range(4), 1))
    rows = [group.tokens.tolist() if isinstance(group.tokens, torch.Tensor) else group.tokens for group in plan.decode]
    assert rows == [[1, 3], slice(2, 3), slice(0, 1)]
    assert [group.mask_NGL.shape[2] for group in plan.decode] == [4, 24, 40]


def test_whole_prompts_of_equal_length_go_together_and_read_no_pages(folder: Path) -> None:
    plan, _ = _plan(folder, [0, 0, 0, 8], {0: 6, 1: 6, 2: 5, 3: 4})
    assert [(part.tokens, part.num_rows, part.mask_TT) for part in plan.prompts] == [
        (slice(0, 12), 2, None),
        (slice(12, 17), 1, None),
    ]
    (chunk,) = plan.chunks
    assert (chunk.tokens, chunk.kv_len) == (slice(17, 21), 12)


def test_a_window_gathers_only_the_pages_it_reaches(folder: Path) -> None:
    plan, _ = _plan(folder, [30, 30], {0: 1, 1: 4}, window=5)
    (group,), (chunk,) = plan.decode, plan.chunks
    assert group.pages.numel() == 2 * 2
    assert [(row == 0).nonzero().flatten().tolist() for row in group.mask_NGL[:, 0]] == [[2, 3, 4, 5, 6]] * 2
    assert chunk.pages.numel() == 2 * 3
    assert (chunk.mask_TL == 0).sum(dim=1).tolist() == [5] * 4


def test_the_group_limit_never_shows_in_the_result(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = [[7 * i % 200 for i in range(n)] for n in (23, 4, 11, 30)]
    decoder = load(TensorParallel(), folder)
    whole = log_probs(decoder, sequences, [1] * 4, BLOCK_SIZE)
    monkeypatch.setitem(gathered._GROUP_BYTES, "cpu", 1)
    apart = log_probs(decoder, sequences, [1] * 4, BLOCK_SIZE)
    for one, other in zip(whole, apart, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=0)


def test_torchs_plain_attention_gives_a_lone_prompt_and_a_lone_chunk_the_same(folder: Path) -> None:
    """What it gives has other strides than that of the fused kernels: a GPU without them takes it."""
    sequences, decoder = [[7 * i % 200 for i in range(23)]], load(TensorParallel(), folder)
    for chunk in (23, 9):
        fused = log_probs(decoder, sequences, [chunk], BLOCK_SIZE)
        with sdpa_kernel(SDPBackend.MATH):
            plain = log_probs(decoder, sequences, [chunk], BLOCK_SIZE)
        torch.testing.assert_close(plain[0], fused[0], atol=2e-5, rtol=0)


def test_a_step_touches_no_slot_but_its_own(folder: Path) -> None:
    run = PagedRun(load(TensorParallel(), folder), [[3] * 10, [5] * 10], BLOCK_SIZE)
    run.step({0: 6, 1: 7})
    before = [k_cache.clone() for k_cache, _ in run.kv]
    batch, _ = run.batch({0: 1, 1: 2})
    run.step({0: 1, 1: 2})
    for old, (k_cache, _) in zip(before, run.kv, strict=True):
        changed = (old != k_cache).any(-1).any(1).nonzero().tolist()
        assert sorted(block * BLOCK_SIZE + offset for block, offset in changed) == sorted(batch.slots_ST[0].tolist())


def test_only_wanted_positions_come_back(folder: Path) -> None:
    from dataclasses import replace

    model = load(TensorParallel(), folder)
    run = PagedRun(model, [[3, 8, 1, 90, 4], [5, 6, 7]], BLOCK_SIZE)
    batch, _ = run.batch({0: 5, 1: 3})
    with torch.inference_mode():
        every = run.forward(batch)
        some = run.forward(replace(batch, logits_indices_N=torch.tensor([4, 7])))
        none = run.forward(replace(batch, logits_indices_N=torch.tensor([], dtype=torch.long)))
    torch.testing.assert_close(some, every[[4, 7]], atol=1e-5, rtol=0)
    assert none.shape == (0, 64)
    assert model.logits(none).shape == (0, 288)


def test_key_heads_are_shared_by_neighbours_where_ranks_are_more() -> None:
    assert [kv_heads_of(2, rank, 4) for rank in range(4)] == [range(1)] * 2 + [range(1, 2)] * 2
    assert [kv_heads_of(4, rank, 2) for rank in range(2)] == [range(2), range(2, 4)]
