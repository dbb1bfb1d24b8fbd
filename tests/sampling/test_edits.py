"""What a row's parameters do to its logits."""

from __future__ import annotations

import torch

from rayllm.messages import RowParams
from rayllm.sampling.edits import Edits, RowEdits
from rayllm.transfer.upload import Upload

V = 21


def edited(logits_NV: torch.Tensor, *rows: tuple[int, RowParams, int]) -> torch.Tensor:
    """Each row: its line, what was asked, and how much it has emitted. 0 is the end token."""
    upload = Upload(torch.device("cpu"))
    edits = Edits.prepare(upload, [(line, RowEdits.of(params, (0,), V), position) for line, params, position in rows])
    upload.send()
    edited_NV = logits_NV.clone()
    if edits is not None:
        edits.apply(edited_NV)
    return edited_NV


def test_rows_without_edits_are_left_alone() -> None:
    logits_NV = torch.randn(2, V)
    params = RowParams(min_tokens=3)
    assert torch.equal(edited(logits_NV, (0, RowParams(), 0), (1, params, 3)), logits_NV)


def test_each_line_is_edited_as_its_row_asked() -> None:
    logits_NV = torch.randn(3, V)
    asked = [RowParams(allowed_token_ids=(5, 0)), RowParams(logit_bias={7: 2.5, 8: -1.0}), RowParams(min_tokens=1)]
    found_NV = edited(logits_NV, *((line, params, 0) for line, params in enumerate(asked)))
    expected_NV = logits_NV.clone()
    expected_NV[0] = -torch.inf
    expected_NV[0, [5, 0]] = logits_NV[0, [5, 0]]
    expected_NV[1, 7] += 2.5
    expected_NV[1, 8] -= 1.0
    expected_NV[2, 0] = -torch.inf
    assert torch.equal(found_NV, expected_NV)


def test_ends_come_early_only_where_nothing_else_is_left() -> None:
    logits_NV = torch.randn(2, V)
    alone, beside = RowParams(min_tokens=9, allowed_token_ids=(0,)), RowParams(min_tokens=9, allowed_token_ids=(0, 4))
    found_NV = edited(logits_NV, (0, alone, 2), (1, beside, 2))
    assert found_NV.isfinite().nonzero().tolist() == [[0, 0], [1, 4]]
