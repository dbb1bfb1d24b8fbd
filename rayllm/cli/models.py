"""`rayllm models`: what can be served, from the registry of architectures and the reader of weight files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from rayllm.cli.flags import Parser


def parser() -> Parser:
    made = Parser(
        prog="rayllm models", description="List the architectures that RayLLM serves, and the files it reads."
    )
    made.add_argument("--json", action="store_true", help="print one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """A line an architecture, then the files of weights and the values of --load-format."""
    given = parser().parse(argv)

    from rayllm.cli.table import table
    from rayllm.config.engine import LoadFormat
    from rayllm.models.catalog import catalog
    from rayllm.weights.files import PICKLED, SAFETENSORS

    entries = catalog()
    files = [(form.whole, form.index) for form in (SAFETENSORS, PICKLED)]
    load_formats = get_args(LoadFormat)
    if given.get("json"):
        weight_files = [{"file": whole, "index": index} for whole, index in files]
        shown = {"architectures": [asdict(entry) for entry in entries], "weight_files": weight_files}
        print(json.dumps({**shown, "load_formats": load_formats}))
        return 0
    rows = [(entry.architecture, ", ".join(entry.model_types), ", ".join(entry.examples)) for entry in entries]
    print(table(("architecture", "model type", "examples"), rows))
    print("\nOther causal language models of transformers run through their own class there (--model-impl).")
    print("Weight files: " + "; ".join(f"{whole}, or shards with {index}" for whole, index in files))
    print(f"--load-format: {', '.join(load_formats)} (bin is pt)")
    for entry in entries:
        if entry.fault:
            print(f"rayllm models: {entry.fault}", file=sys.stderr)
    return 0
