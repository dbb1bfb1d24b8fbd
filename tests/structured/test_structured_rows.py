"""The masks of rows, against a definition that knows nothing of grammars: a token may come next if and only if some
text of the language begins with what was written and the token's bytes. (Where the next byte is certain, llguidance
may allow only the token that the tokenizer itself would write.)"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import END_ID

from rayllm.errors import STRUCTURED_OUTPUTS_FAILED
from rayllm.messages import Finish, RowParams
from rayllm.request import StructuredOutputsParams as Structured
from rayllm.structured import rows as rows_module
from rayllm.structured.rows import StructuredRows
from rayllm.structured.vocabulary import Vocabulary
from rayllm.text.tokenizer import Tokenizer

VOCAB_SIZE = 300
"""More than the tokenizer has, as padded models do."""
_WORDS = ["the", "then", "hello", "he", "tokens, the worker", "ünder", "🎉🎊"]
LANGUAGES: dict[str, tuple[Structured, list[str]]] = {
    "choice": (Structured(choice=_WORDS), _WORDS),
    "regex": (
        Structured(regex=r"(ab|c|the ){1,3}[0-1]?"),
        [
            "".join(parts) + digit
            for n in (1, 2, 3)
            for parts in itertools.product(["ab", "c", "the "], repeat=n)
            for digit in ("", "0", "1")
        ],
    ),
    "json": (
        Structured(
            json={
                "type": "object",
                "properties": {"the": {"enum": ["he", 10, None]}, "ok": {"type": "boolean"}},
                "required": ["the"],
                "additionalProperties": False,
            },
            disable_any_whitespace=True,
        ),
        [f'{{"the":{v}{o}}}' for v in ('"he"', "10", "null") for o in ("", ',"ok":true', ',"ok":false')],
    ),
    "grammar": (
        Structured(grammar='root ::= "(" inner ")"\ninner ::= "the" | "(" "he" ")"'),
        ["(the)", "((he))"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(llama_path: Path) -> Vocabulary:
    return Vocabulary.load(str(llama_path), VOCAB_SIZE, (END_ID,))


@pytest.fixture(scope="module")
def token_bytes(llama_path: Path) -> list[bytes]:
    """By our own reading of the tokenizer; special tokens have none."""
    tokenizer = Tokenizer.from_path(str(llama_path))
    special = tokenizer.special_token_ids
    return [b"" if i in special else tokenizer.token_bytes(i) for i in range(VOCAB_SIZE)]


@pytest.fixture
def rows(vocabulary: Vocabulary) -> StructuredRows:
    return StructuredRows(lambda: vocabulary, VOCAB_SIZE, num_threads=2)


def params(structured: Structured, **fields: Any) -> RowParams:
    return RowParams(structured_outputs=structured, **fields)


def allowed(rows: StructuredRows, row: int) -> set[int]:
    masks = rows.masks([row])
    assert masks is not None
    bits = np.unpackbits(masks[1][0], bitorder="little")
    assert not bits[VOCAB_SIZE:].any()
    return set(bits.nonzero()[0].tolist())


@pytest.mark.parametrize("name", LANGUAGES)
def test_masks_are_exactly_the_tokens_after_which_a_text_of_the_language_remains(
    rows: StructuredRows, token_bytes: list[bytes], name: str
) -> None:
    structured, texts = LANGUAGES[name]
    language = [text.encode() for text in texts]
    draw = random.Random(7)
    for walk in range(12):
        rows.begin(walk, params(structured), [])
        written, finish = b"", None
        while finish is None:
            expected = {
                i
                for i, own in enumerate(token_bytes)
                if own and any(text.startswith(written + own) for text in language)
            }
            found = allowed(rows, walk)
            assert (END_ID in found) == (written in language), written
            if written not in language and len({token_bytes[i][0] for i in expected}) == 1:
                assert found, written
                assert found <= expected, written
            else:
                assert found - {END_ID} == expected, written
            token_id = draw.choice(sorted(found))
            written += b"" if token_id == END_ID else token_bytes[token_id]
            finish = rows.advance([walk], [token_id]).get(walk)
        assert written in language
        assert finish == Finish("stop", is_complete=token_id != END_ID)


def test_a_row_that_begins_again_is_where_it_was(rows: StructuredRows, token_bytes: list[bytes]) -> None:
    structured, _ = LANGUAGES["json"]
    emitted: list[int] = []
    rows.begin(0, params(structured), [])
    while True:
        rows.begin(1, params(structured), emitted)
        assert allowed(rows, 1) == allowed(rows, 0)
        token_id = min(allowed(rows, 0) - {END_ID})
        if 0 in rows.advance([0], [token_id]):
            return
        emitted.append(token_id)


def test_rows_of_one_step_do_not_touch_one_another(rows: StructuredRows) -> None:
    for row, (structured, _) in enumerate(LANGUAGES.values()):
        rows.begin(row, params(structured), [])
        rows.begin(row + 10, params(structured), [])
    rows.begin(5, RowParams(), [])
    for _ in range(2):
        alone = {row: min(allowed(rows, row)) for row in range(4)}
        masks = rows.masks([5, 10, 11, 12, 13])
        assert masks is not None
        assert masks[0] == [1, 2, 3, 4], "row 5 is free to say what it likes"
        assert {row: min(allowed(rows, row + 10)) for row in range(4)} == alone
        rows.advance([5, 10, 11, 12, 13], [7, *alone.values()])
        for row, token_id in alone.items():
            rows.advance([row], [token_id])
    rows.end(0)
    assert rows.masks([0]) is None


def test_after_its_end_a_row_says_nothing(rows: StructuredRows, token_bytes: list[bytes]) -> None:
    rows.begin(0, params(Structured(choice=["a"])), [])
    assert rows.advance([0], [token_bytes.index(b"a")]) == {0: Finish("stop", is_complete=True)}
    assert rows.masks([0]) is None
    assert rows.advance([0], [5]) == {}


def test_rows_that_follow_a_grammar_are_known(rows: StructuredRows) -> None:
    assert not rows.bind_any([0, 1])
    rows.begin(1, params(Structured(regex="a")), [])
    assert rows.bind_any([0, 1])
    assert not rows.bind_any([0, 2])
    rows.end(1)
    assert not rows.bind_any([1])


@pytest.mark.parametrize(
    ("structured", "emitted", "reason"),
    [
        (Structured(regex="((("), [], "unclosed group"),
        (Structured(json={"$ref": "#"}), [], "no end, or allows no text"),
        (Structured(regex="abc"), [50], "what was emitted does not follow"),
    ],
)
def test_what_cannot_be_followed_ends_its_row_alone(
    rows: StructuredRows, structured: Structured, emitted: list[int], reason: str
) -> None:
    rows.begin(0, params(structured), emitted)
    rows.begin(1, params(Structured(choice=["a"])), [])
    masks = rows.masks([0, 1])
    assert masks is not None
    assert masks[0] == [1]
    finish = rows.advance([0], [3])[0]
    assert (finish.reason, finish.code) == ("error", STRUCTURED_OUTPUTS_FAILED)
    assert reason in (finish.message or "")


def test_a_tokenizer_that_cannot_be_read_is_said_by_the_row_that_needs_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    rows = StructuredRows(lambda: Vocabulary.load(str(tmp_path), VOCAB_SIZE, (END_ID,)), VOCAB_SIZE, 1)
    rows.prepare()
    rows.begin(0, params(Structured(regex="a")), [])
    assert rows.masks([0]) is None
    assert "does not allow structured outputs" in (rows.advance([0], [3])[0].message or "")


def test_a_grammar_whose_masks_cost_too_much_is_ended_but_bound_to_the_last(
    rows: StructuredRows, token_bytes: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks differ in what they measure, so only what is told may depend on it, not what is drawn."""
    rows.begin(0, params(Structured(regex="[ab]*")), [])
    assert allowed(rows, 0)
    monkeypatch.setattr(rows_module, "_FREE_S", -1.0)
    letter = token_bytes.index(b"a")
    assert rows.advance([0], [letter]) == {}
    bound = allowed(rows, 0)
    assert letter in bound
    assert len(bound) < 20
    finish = rows.advance([0], [letter])[0]
    assert "computing for each token" in (finish.message or "")
    assert allowed(rows, 0) == bound


@pytest.mark.parametrize(("num_slow", "num_left"), [(15, 15), (100, 20)])
def test_the_slowest_of_many_rows_are_ended_where_all_together_cost_too_much(
    rows: StructuredRows,
    token_bytes: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    num_slow: int,
    num_left: int,
) -> None:
    """Each is below its own limit."""
    slow, quick = Structured(regex="[ab]*"), Structured(regex="[ac]*")
    compute = rows_module._compute_mask

    def timed(state: rows_module._Row) -> float:
        compute(state)
        return 0.0049 if state.params.structured_outputs == slow else 0.0001

    monkeypatch.setattr(rows_module, "_compute_mask", timed)
    monkeypatch.setattr(rows_module, "_SLOW_BATCH_S", 0.0)  # so that rows are timed one by one
    for row in range(num_slow + 5):
        rows.begin(row, params(slow if row < num_slow else quick), [])
    letter, going = token_bytes.index(b"a"), list(range(num_slow + 5))
    for _ in range(40):
        finishes = rows.advance(going, [letter] * len(going))
        assert all(letter in allowed(rows, row) for row in finishes), "they are bound to the last"
        for row, finish in finishes.items():
            assert "the grammars of all requests take" in (finish.message or "")
            rows.end(row)
        going = [row for row in going if row not in finishes]
    assert len([row for row in going if row < num_slow]) == num_left
    assert len(going) == num_left + 5


@pytest.mark.parametrize("end_ids", [(), (END_ID,)])
def test_ignored_and_absent_ends_leave_the_mask_while_text_remains(llama_path: Path, end_ids: tuple[int, ...]) -> None:
    rows = StructuredRows(lambda: Vocabulary.load(str(llama_path), VOCAB_SIZE, end_ids), VOCAB_SIZE, 1)
    rows.begin(0, params(Structured(regex="a*"), ignore_eos=True), [])
    rows.begin(1, params(Structured(regex="a*")), [])
    assert END_ID not in allowed(rows, 0)
    assert (END_ID in allowed(rows, 1)) == bool(end_ids)
    assert max(allowed(rows, 1)) < 288, "nor does an id that stands for the end appear"
