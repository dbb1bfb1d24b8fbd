"""The shape of the source: no module cycles, short functions, short files, a test beside each module."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for folder in ("rayllm", "kernels/rayllm_kernels", "serve_apps") for path in (ROOT / folder).rglob("*.py")
)
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60
MAX_P95_FUNCTION_LINES = 25
MIN_TESTED_SHARE = 0.85
"""Of each package."""

LONG_FILES_PENDING: tuple[str, ...] = ()
"""Folders with files that are still to be parted: never add one."""


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions() -> Iterator[tuple[str, int]]:
    """Each function with its number of lines, decorators not counted."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                yield f"{_name(path)}:{node.name}", node.end_lineno - node.lineno + 1


def cycles(imports: dict[str, set[str]]) -> list[set[str]]:
    """Strongly connected components of more than one module (Tarjan), by an explicit stack."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(root: str) -> None:
        work = [(root, iter(sorted(imports.get(root, ()))))]
        index[root] = low[root] = len(index)
        stack.append(root)
        while work:
            node, targets = work[-1]
            for target in targets:
                if target not in index:
                    index[target] = low[target] = len(index)
                    stack.append(target)
                    work.append((target, iter(sorted(imports.get(target, ())))))
                    break
                if target in stack:
                    low[node] = min(low[node], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = set(stack[stack.index(node) :])
                    del stack[stack.index(node) :]
                    if len(component) > 1:
                        found.append(component)

    for module in sorted(imports):
        if module not in index:
            visit(module)
    return found


@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"a"}, "c": {"a"}}, [{"a", "b"}]),
        ({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}}, [{"d", "e"}, {"a", "b", "c"}]),
    ],
)
def test_cycles_are_found(imports: dict[str, set[str]], expected: list[set[str]]) -> None:
    assert cycles(imports) == expected


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too; those for type checkers alone do not."""
    graph = grimp.build_graph("rayllm", "rayllm_kernels", exclude_type_checking_imports=True, cache_dir=None)
    imports = {module: set(graph.find_modules_directly_imported_by(module)) for module in graph.modules}
    assert cycles(imports) == []


def test_functions_are_short() -> None:
    lengths = dict(_functions())
    too_long = {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
    assert too_long == {}
    in_order = sorted(lengths.values())
    assert in_order[int(0.95 * len(in_order))] <= MAX_P95_FUNCTION_LINES


def test_files_are_short() -> None:
    lengths = {_name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    too_long = {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}
    assert not {name: length for name, length in too_long.items() if not name.startswith(LONG_FILES_PENDING)}


def _package(path: Path) -> str:
    """`engine` for `rayllm/engine/...`, `rayllm` for its own modules, `kernels` for the kernels."""
    folder, *rest = path.relative_to(ROOT).parts
    return "kernels" if folder == "kernels" else rest[0] if len(rest) > 1 else folder


def _untested() -> dict[str, list[str]]:
    """By package: modules without a test of the same name, and which no test of their package imports."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    untested: dict[str, list[str]] = {}
    for path in SOURCES:
        module = path.relative_to(ROOT).with_suffix("").as_posix().removeprefix("kernels/").replace("/", ".")
        package, *rest = module.split(".")
        if path.name == "__init__.py" or package == "serve_apps":
            continue
        has_namesake = any(test.name in (f"test_{path.stem}.py", f"test_{path.stem.strip('_')}.py") for test in texts)
        folder = "kernels" if package == "rayllm_kernels" else rest[0] if len(rest) > 1 else ""
        own = ROOT / "tests" / folder
        is_named = any(
            module in text or f"{module.rpartition('.')[0]} import {path.stem}" in text
            for test, text in texts.items()
            if test.is_relative_to(own)
        )
        if not (has_namesake or is_named):
            untested.setdefault(_package(path), []).append(module)
    return untested


def test_modules_have_a_test_beside_them() -> None:
    untested = _untested()
    num_modules: dict[str, int] = {}
    for path in SOURCES:
        if path.name != "__init__.py" and not _name(path).startswith("serve_apps/"):
            num_modules[_package(path)] = num_modules.get(_package(path), 0) + 1
    shares = {name: 1 - len(untested.get(name, ())) / num for name, num in num_modules.items()}
    low = {name: untested[name] for name, share in shares.items() if share < MIN_TESTED_SHARE}
    assert not low, low
