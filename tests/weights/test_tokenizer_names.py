from __future__ import annotations

import pytest

from rayllm.weights.tokenizer_names import has_vocabulary_files


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["tokenizer.json"], True),
        (["vocab.json", "merges.txt", "config.json"], True),
        (["vocab.json"], False),
        (["glm.tiktoken"], True),
        (["tokenizer_config.json", "special_tokens_map.json"], False),
        ([], False),
    ],
)
def test_a_folder_has_a_vocabulary_only_with_all_files_of_one_kind(names: list[str], expected: bool) -> None:
    assert has_vocabulary_files(iter(names)) == expected
