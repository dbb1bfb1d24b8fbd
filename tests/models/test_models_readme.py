"""The table of models in the README is the registry's."""

from __future__ import annotations

import re
from pathlib import Path

import rayllm.models
from rayllm.models.registry import architecture_module, known_architectures

README = Path(rayllm.models.__file__).with_name("README.md")


def test_the_table_lists_every_architecture_with_its_file() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| `architectures/(\w+)\.py` \|$", README.read_text(), re.MULTILINE))
    modules = {name: str(architecture_module(name)).rpartition(".")[2] for name in known_architectures()}
    assert rows == modules
