"""What the documents name exists: files, links, modules, classes and their attributes, environment variables."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from docs import DOCUMENTS, ROOT, anchors, inline, links

from rayllm.cli.completion import commands
from rayllm.config import Environment

_SOURCES = ("rayllm", "kernels/rayllm_kernels", "serve_apps", "tests", "benchmarks")
_FILE = re.compile(r"\.?[\w*-]+(\.[\w*-]+)*\.(py|md|yaml|yml|json|toml|lua|html|css|js|txt|safetensors)")
_PATH = re.compile(r"(\.{1,2}/)?[\w.*-]+(/[\w.*-]+)*/?")
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_OF_OTHERS = {"pytorch_model.bin", "tokenizer.model", "vocab.json", "merges.txt", "*.safetensors"}
_OF_OTHERS |= {"config.json", "benchmark_throughput.py"}
"""Files of a checkpoint, and of vLLM."""
_NO_PATHS = re.compile(r"application/\w+|[A-Z][\w-]*/[A-Z][\w.-]*|owner/\w+|path/to/\w+|serve\.yaml|in\.jsonl")
"""Media types, names of models at a hub, and a reader's own files."""
_KEYS = re.compile(r"(http_options|chat_template_kwargs|stream_options|layers|rayllm\.architectures)\b")
"""Keys of a configuration or a body, names of parameters, and the group of entry points."""


def _paths() -> list[tuple[str, str]]:
    """Code that is one path: it has a slash, or is the name of a file."""
    found = [(d, code) for d, code in inline() if _FILE.fullmatch(code) or ("/" in code and _PATH.fullmatch(code))]
    return sorted({(d, code) for d, code in found if not _NO_PATHS.fullmatch(code) and code not in _OF_OTHERS})


def _exists(document: str, path: str) -> bool:
    """From the root, the document's folder or `rayllm/`; a bare file name anywhere. `NAME` stands for any name."""
    pattern = re.sub(r"\b[A-Z]{3,}\b(?!\.md)", "*", path.removesuffix("/"))
    folders = (ROOT, (ROOT / document).parent, ROOT / "rayllm")
    if any(next(folder.glob(pattern), None) for folder in folders if not pattern.startswith("..")):
        return True
    if pattern.startswith(".."):
        return (ROOT / document).parent.joinpath(pattern).exists()
    return "/" not in path and any(next((ROOT / source).rglob(pattern), None) for source in _SOURCES)


@pytest.mark.parametrize(("document", "path"), _paths())
def test_a_path_exists(document: str, path: str) -> None:
    assert _exists(document, path), f"{document} names {path}, which does not exist"


def test_a_missing_path_is_noticed() -> None:
    assert not _exists("rayllm/ARCHITECTURE.md", "engine/nowhere.py")
    assert not _exists("README.md", "nowhere.py")
    assert _exists("rayllm/ARCHITECTURE.md", "models/architectures/NAME.py")


@pytest.mark.parametrize(("document", "target"), sorted(set(links())))
def test_a_link_resolves(document: str, target: str) -> None:
    if target.startswith(("http://", "https://")):
        return
    path, _, anchor = target.partition("#")
    linked = ((ROOT / document).parent / path).resolve() if path else ROOT / document
    assert linked.exists(), f"{document} links to {path}, which does not exist"
    if anchor:
        assert anchor in anchors(linked.relative_to(ROOT.resolve())), f"{document}: {path} has no heading {anchor!r}"


def test_every_document_can_be_reached_from_the_readme() -> None:
    targets = defaultdict(set)
    for document, target in links():
        path = ((ROOT / document).parent / target.partition("#")[0]).resolve()
        path = path / "README.md" if path.is_dir() else path
        if path.is_relative_to(ROOT.resolve()):
            targets[document].add(str(path.relative_to(ROOT.resolve())))
    seen, left = set(), ["README.md"]
    while left:
        document = left.pop()
        seen.add(document)
        left += targets[document] - seen
    assert {str(document) for document in DOCUMENTS} <= seen


# --------------------------------------------------------------------------------------------------------- names


@cache
def _attributes() -> dict[str, set[str]]:
    """By class of our sources: names of its methods, fields and attributes of `self`, with those of its bases."""
    bases: dict[str, set[str]] = defaultdict(set)
    names: dict[str, set[str]] = defaultdict(set)
    for source in ("rayllm", "kernels/rayllm_kernels", "serve_apps"):
        for path in (ROOT / source).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases[node.name] |= {base.id for base in node.bases if isinstance(base, ast.Name)}
                    names[node.name] |= set(_defined(node))
    for _ in range(4):
        for name, above in bases.items():
            for base in above:
                names[name] |= names.get(base, set())
    return names


def _defined(node: ast.ClassDef) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield part.name
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            yield part.target.id
        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
            yield part.attr
        elif isinstance(part, ast.Assign):
            yield from (target.id for target in part.targets if isinstance(target, ast.Name))


def _dotted_names() -> list[tuple[str, str]]:
    """Dotted names in code, with or without a call's parentheses."""
    found = set()
    for document, code in inline():
        name = re.sub(r"\(.*\)$", "", code.removeprefix("await "))
        if _NAME.fullmatch(name) and not _FILE.fullmatch(name) and not _KEYS.match(name) and name not in _OF_OTHERS:
            found.add((document, name))
    return sorted(found)


def _names_something(name: str) -> bool:
    """`Class.attribute`, or a module or what it holds, with or without `rayllm.` before it."""
    first, *rest = name.split(".")
    if first in _attributes():
        return rest[0] in _attributes()[first]
    for full in (name, f"rayllm.{name}"):
        module, left = full, ""
        while module and not _is_module(module):
            module, _, last = module.rpartition(".")
            left = f"{last}.{left}".strip(".")
        if module and module != "rayllm":
            return not left or hasattr(importlib.import_module(module), left.split(".")[0])
        if module == "rayllm" and left and hasattr(importlib.import_module("rayllm"), left.split(".")[0]):
            return True
    return False


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize(("document", "name"), _dotted_names())
def test_a_dotted_name_exists(document: str, name: str) -> None:
    assert _names_something(name), f"{document} names {name}, which does not exist"


def test_a_missing_name_is_noticed() -> None:
    assert not _names_something("Scheduler.nothing")
    assert not _names_something("rayllm.nothing")
    assert not _names_something("NoClass.plan")
    assert _names_something("Scheduler.plan")
    assert _names_something("rayllm.get_engine")


def test_a_flag_is_one_of_a_command_or_a_script() -> None:
    known = {name for command in commands() for option in command.options for name in option.names}
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    vllm_flags = (ROOT / "rayllm/cli/vllm_flags.py").read_text(encoding="utf-8")
    sources = vllm_flags + "".join(path.read_text(encoding="utf-8") for path in scripts)
    flags = {(document, re.split(r"[ =.]", code)[0]) for document, code in inline() if code.startswith("--")}
    assert flags
    assert not {(document, flag) for document, flag in flags if flag not in known and f'"{flag}"' not in sources}


def test_a_variable_is_one_that_is_read() -> None:
    named = {name for _, code in inline() for name in re.findall(r"\bRLLM_\w+[A-Z]\b", code)}
    assert named
    assert named <= set(Environment.NAMES)


def test_the_table_of_packages_is_the_import_contract() -> None:
    """ARCHITECTURE.md lists the layers of the contract in `pyproject.toml`, from top to bottom."""
    text = (ROOT / "rayllm/ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = text.partition("| Package | Content |")[2].strip().partition("\n\n")[0].splitlines()[1:]
    listed = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in rows]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    layers = re.findall(r'"([^"]+)"', project.partition('type = "layers"')[2].partition("]")[0])
    assert listed == [{name.strip().rpartition(".")[2] for name in re.split(r"[|:]", layer)} for layer in layers]


def test_the_modules_that_all_may_import_are_those_of_the_contract() -> None:
    text = (ROOT / "rayllm/ARCHITECTURE.md").read_text(encoding="utf-8")
    sentence = text.partition("Every package may import ")[2].partition(". ")[0]
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    contract = project.partition("What all may import")[2].partition("source_modules = [")[2].partition("]")[0]
    assert re.findall(r"`(\w+)`", sentence) == re.findall(r'"rayllm\.(\w+)"', contract)


def test_the_glossary_is_short() -> None:
    text = (ROOT / "rayllm/ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = text.partition("| Term | Meaning |")[2].strip().splitlines()[1:]
    assert 10 <= sum(len(row.split("|")[1].split(",")) for row in rows) <= 25


def test_documents_name_no_registry_and_no_home() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert not re.search(r"pypi\.org|pythonhosted|registry\.npmjs|/work/|/root/", text), document


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_lines_of_a_table_have_as_many_cells_as_its_head(document: Path) -> None:
    num_cells = 0
    for line in (ROOT / document).read_text(encoding="utf-8").splitlines():
        number = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not num_cells or not number or number == num_cells, f"{document}: {line}"
        num_cells = number
