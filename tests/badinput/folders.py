"""A tiny model's folder, spoilt as a case says."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any


class _Touch:
    """A pickle of this runs code when it is loaded."""

    def __init__(self, marker: Path):
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self._marker}",))


def touching_pickle(marker: Path) -> bytes:
    """A pickle whose load makes the file `marker`."""
    return pickle.dumps(_Touch(marker))


def spoil(folder: Path, op: dict[str, Any], marker: Path) -> None:
    """Does one `op` of a case's recipe to the model in `folder`."""
    path = folder / op.get("file", "")
    kind = op["op"]
    if kind == "delete":
        path.unlink()
    elif kind == "write":
        path.write_text(op["text"])
    elif kind == "write_nest":
        path.write_text('{"a":' * op["depth"] + "1" + "}" * op["depth"])
    elif kind == "json_set":
        path.write_text(json.dumps({**json.loads(path.read_text()), **op["set"]}))
    elif kind == "pickle":
        path.write_bytes(touching_pickle(marker))
    elif kind == "index":
        path.write_text(json.dumps({"weight_map": dict.fromkeys(_tensor_names(folder), op["weight_map"]["*"])}))
    elif kind == "mkdir_over":
        path.unlink()
        path.mkdir()
    elif kind == "fifo_over":
        path.unlink()
        os.mkfifo(path)
    elif kind == "safetensors":
        _write_safetensors(path, op)
    elif kind == "st_edit":
        _edit_safetensors(path, op)
    elif kind == "tok_add":
        tokenizer = json.loads(path.read_text())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tokenizer["added_tokens"] += [{"id": i, "content": text, "special": True, **flags} for text, i in op["tokens"]]
        path.write_text(json.dumps(tokenizer))
    elif kind == "tok_pre":
        tokenizer = json.loads(path.read_text())
        split = {"type": "Split", "pattern": {"Regex": op["pattern"]}, "behavior": "Isolated", "invert": False}
        steps = [split, tokenizer["pre_tokenizer"]]
        tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        path.write_text(json.dumps(tokenizer))
    elif kind != "no_network":  # every folder is loaded without network
        raise ValueError(f"unknown op {kind}")


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def _tensor_names(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return list(file.keys())


def _write_safetensors(path: Path, op: dict[str, Any]) -> None:
    header = json.dumps(op["header"]).encode()
    length = op.get("header_len", len(header))
    path.write_bytes(length.to_bytes(8, "little") + header + bytes(op["data_bytes"]))


def _edit_safetensors(path: Path, op: dict[str, Any]) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name, shape in op.get("add", {}).items():
        tensors[name] = torch.zeros(shape)
    for name in op.get("fill_nan", ()):
        tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
