from __future__ import annotations

from rayllm.vocabulary.cuts import cut_inside


def test_each_text_is_cut_behind_its_first_character_wherever_it_stands() -> None:
    [cut] = cut_inside(["</s>", "<|a|>", "x"])
    assert [part for part, _ in cut.pre_tokenize_str("b</s>c<|a|><|b|>x")] == ["b", "<", "/s>c", "<", "|a|><|b|>x"]


def test_where_nothing_can_be_cut_nothing_is() -> None:
    assert cut_inside([]) == cut_inside(["x"]) == []
