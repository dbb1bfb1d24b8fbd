"""Private names of Ray, Serve and torch stand in one module each, so that an upgrade has three files to read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WRAPPERS = {
    "rayllm/executor/ray_private.py": "ray",
    "rayllm/serve/serve_private.py": "ray",
    "rayllm/torch_private.py": "torch",
}
LIBRARIES = ("ray", "torch")


def _is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(text: str) -> Iterator[str]:
    """The private names of the libraries that a module's text imports, or reaches by attributes of what it imports."""
    tree = ast.parse(text)
    bound = set(LIBRARIES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in LIBRARIES:
                    bound.add(alias.asname or alias.name.partition(".")[0])
                    yield from (alias.name for part in alias.name.split(".") if _is_private(part))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            bound.update(alias.asname or alias.name for alias in node.names)
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names for part in name.split(".") if _is_private(part))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and _root(node.value) in bound:
            yield ast.unparse(node)


def _root(node: ast.expr) -> str:
    """The name that a chain of attributes begins with; for `sys.modules["ray"]`, the module."""
    while isinstance(node, (ast.Attribute, ast.Call)):
        node = node.value if isinstance(node, ast.Attribute) else node.func
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "sys.modules":
        return str(ast.literal_eval(node.slice)) if isinstance(node.slice, ast.Constant) else ""
    return node.id if isinstance(node, ast.Name) else ""


def _modules() -> list[str]:
    folders = [ROOT / package for package in ("rayllm", "kernels", "serve_apps")]
    return [str(path.relative_to(ROOT)) for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_no_other_module_names_them() -> None:
    found = {name: list(private_names((ROOT / name).read_text(encoding="utf-8"))) for name in _modules()}
    assert {name for name, names in found.items() if names} == set(WRAPPERS), {
        name: names for name, names in found.items() if names and name not in WRAPPERS
    }


@pytest.mark.parametrize("name", sorted(WRAPPERS))
def test_a_wrapper_says_in_which_version_it_read_them(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))) or ""
    assert "read in Ray 2." in docstring or "read in torch 2." in docstring


@pytest.mark.parametrize(
    "text",
    [
        "import ray\nray._private.worker",
        "import ray._private.worker as worker",
        "from ray._private import worker",
        "from ray.serve.context import _get_global_client",
        "from ray.serve import context\ncontext._get_global_client()",
        "import sys\nsys.modules['ray']._raylet.Config",
        "import torch\ntorch.ops.mkldnn._linear_pointwise.binary(1)",
        "import torch.distributed.distributed_c10d as c10d\nc10d._abort_process_group()",
        "from ray.experimental import internal_kv as kv\nkv._internal_kv_get(b'')",
    ],
)
def test_each_way_to_name_one_is_seen(text: str) -> None:
    assert list(private_names(text))


@pytest.mark.parametrize("text", ["import ray\nray.init()", "self._ray = 1", "import torch\ntorch.__version__"])
def test_what_is_public_or_our_own_is_not(text: str) -> None:
    assert not list(private_names(text))
