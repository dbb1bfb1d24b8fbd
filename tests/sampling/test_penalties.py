"""Penalties against transformers' processor and OpenAI's formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from rayllm.messages import RowParams
from rayllm.sampling.penalties import Penalised, PenaltyTable
from rayllm.transfer.upload import Upload

V = 200


@pytest.fixture(params=["reference", "triton"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> None:
    if request.param == "triton":
        request.getfixturevalue("interpreted_kernels")


def make_table(max_tokens: int = 40) -> PenaltyTable:
    return PenaltyTable(vocab_size=V, max_tokens=max_tokens, device=torch.device("cpu"))


def prepared(table: PenaltyTable, lines: list[int], rows: list[int]) -> Penalised:
    upload = Upload(torch.device("cpu"))
    step = table.prepare(upload, lines, rows)
    upload.send()
    return step


def applied(params: RowParams, logits_V: torch.Tensor, prompt: list[int], emitted: list[int]) -> torch.Tensor:
    table = make_table()
    table.add(0, params, prompt + emitted, len(prompt))
    logits_1V = logits_V.clone()[None]
    table.apply(logits_1V, prepared(table, [0], [0]))
    return logits_1V[0]


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_is_that_of_transformers_over_prompt_and_output(penalty: float) -> None:
    logits_V = torch.randn(V)
    prompt, emitted = [3, 3, 9, 150], [9, 199, 0]
    ours = applied(RowParams(repetition_penalty=penalty), logits_V, prompt, emitted)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + emitted]), logits_V[None])
    torch.testing.assert_close(ours, theirs[0], rtol=0, atol=0)


def test_presence_and_frequency_count_the_output_only() -> None:
    logits_V = torch.randn(V)
    prompt, emitted = [1, 1, 1, 5, 6], [5, 5, 5, 80, 80, 7]
    params = RowParams(presence_penalty=0.75, frequency_penalty=-0.5)
    counts = np.bincount(emitted, minlength=V)
    expected = logits_V.double().numpy() + 0.5 * counts - 0.75 * (counts > 0)
    np.testing.assert_allclose(applied(params, logits_V, prompt, emitted).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_repetition_comes_before_frequency_and_presence() -> None:
    logits_V = torch.zeros(V)
    logits_V[4] = 2.0
    params = RowParams(repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    assert applied(params, logits_V, [1], [4, 4])[4] == 2.0 / 2 - 0.5 * 2 - 0.25


def test_only_the_rows_lines_change_whatever_their_order_and_length() -> None:
    generator = np.random.default_rng(0)
    table = make_table()
    tokens = {row: generator.integers(0, V, 5 + row).tolist() for row in range(9)}
    params = {row: RowParams(repetition_penalty=1 + row, frequency_penalty=0.1 * row) for row in range(9)}
    for row in range(9):  # more rows than the first slots
        table.add(row, params[row], tokens[row], 3)
    logits_NV = torch.randn(12, V)
    rows, lines = [8, 0, 5, 3], [2, 3, 11, 7]
    changed_NV = logits_NV.clone()
    table.apply(changed_NV, prepared(table, lines, rows))
    for row, line in zip(rows, lines):
        expected = applied(params[row], logits_NV[line], tokens[row][:3], tokens[row][3:])
        assert torch.equal(changed_NV[line], expected)
    others = [line for line in range(12) if line not in lines]
    assert torch.equal(changed_NV[others], logits_NV[others])


def test_appended_tokens_count_as_if_they_had_been_there() -> None:
    params = RowParams(repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.4)
    table = make_table()
    table.add(7, params, [1, 2, 3], 3)
    table.add(2, params, [8], 1)
    for first, second in [(5, 8), (5, 9), (1, 8)]:
        step = prepared(table, [0, 1], [7, 2])
        table.apply(torch.zeros(2, V), step)
        table.append(step, torch.tensor([first, second]))
    logits_V = torch.randn(V)
    logits_NV = logits_V.repeat(2, 1)
    table.apply(logits_NV, prepared(table, [0, 1], [2, 7]))
    assert torch.equal(logits_NV[0], applied(params, logits_V, [8], [8, 9, 8]))
    assert torch.equal(logits_NV[1], applied(params, logits_V, [1, 2, 3], [5, 5, 1]))


def test_a_slot_is_clean_for_its_next_row() -> None:
    table = make_table()
    for row in range(20):
        table.add(row, RowParams(frequency_penalty=2.0), [row, row, row, row], 1)
        table.remove(row)
        assert row not in table
    table.add(3, RowParams(frequency_penalty=1.0), [10, 11], 1)
    logits_1V = torch.zeros(1, V)
    table.apply(logits_1V, prepared(table, [0], [3]))
    assert logits_1V.nonzero()[:, 1].tolist() == [11]
