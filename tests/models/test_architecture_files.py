"""Architectures are small files of data, and nothing that computes knows a model's name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import rayllm
from rayllm.models.catalog import catalog

PACKAGE = Path(rayllm.__file__).parent
ARCHITECTURES = PACKAGE / "models" / "architectures"
THAT_COMPUTE = ("models", "layers", "linear", "weights", "runner", "sampling", "scheduler", "executor", "engine")


def _texts(file: Path) -> Iterator[str]:
    """The file's string constants."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_median_file_has_at_most_80_lines() -> None:
    sizes = [len(file.read_text().splitlines()) for file in ARCHITECTURES.glob("[!_]*.py")]
    assert median(sizes) <= 80


def test_no_other_file_that_computes_has_a_model_s_name() -> None:
    names = {name for entry in catalog() for name in (entry.architecture, *entry.model_types)}
    files = [file for package in THAT_COMPUTE for file in (PACKAGE / package).rglob("*.py")]
    files += [PACKAGE / "spec.py", *(PACKAGE.parent / "kernels" / "rayllm_kernels").rglob("*.py")]
    others = [file for file in files if file.parent != ARCHITECTURES and file.name != "registry.py"]
    assert len(others) > 100
    found = [f"{file}: {text!r}" for file in others for text in _texts(file) if text in names]
    assert not found
