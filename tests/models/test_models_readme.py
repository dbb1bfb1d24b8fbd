"""The table of models in the README is the catalog, which `rayllm models` prints."""

from __future__ import annotations

from pathlib import Path

import rayllm.models
from rayllm.models.catalog import Entry, catalog

README = Path(rayllm.models.__file__).with_name("README.md")
HEAD = "| Architecture in `config.json` | `model_type` | Examples | File |\n|---|---|---|---|\n"


def _row(entry: Entry) -> str:
    types = ", ".join(f"`{model_type}`" for model_type in entry.model_types)
    file = "/".join(entry.module.split(".")[-2:])
    return f"| `{entry.architecture}` | {types} | {', '.join(entry.examples)} | `{file}.py` |"


def test_the_table_has_a_row_for_each_architecture_of_the_catalog() -> None:
    table = README.read_text().partition(HEAD)[2].partition("\n\n")[0]
    expected = [_row(entry) for entry in catalog()]
    assert table.splitlines() == expected, "the table must be:\n" + HEAD + "\n".join(expected)


def test_every_file_names_an_example() -> None:
    assert [entry.module for entry in catalog() if not entry.examples] == []
