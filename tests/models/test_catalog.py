from __future__ import annotations

import re

import pytest

from rayllm.models import registry
from rayllm.models.catalog import catalog
from rayllm.models.registry import known_architectures


def test_every_architecture_is_there_with_what_its_file_says() -> None:
    entries = {entry.architecture: entry for entry in catalog()}
    assert sorted(entries) == sorted(known_architectures())
    assert entries["InternLM2ForCausalLM"].model_types == ("internlm2", "internlm")
    assert entries["LlamaForCausalLM"].module == "rayllm.models.architectures.llama"
    assert "facebook/opt-350m" in entries["OPTForCausalLM"].examples
    assert not any(entry.fault for entry in entries.values())


def test_examples_are_names_on_a_hub() -> None:
    for entry in catalog():
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in entry.examples), entry


def test_a_module_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_modules", {"XForCausalLM": "no_such_module"})
    [entry] = catalog()
    assert "module 'no_such_module' cannot be imported" in entry.fault
    assert (entry.model_types, entry.examples) == ((), ())
