"""What the documents tell a reader to type is what the programs take: each command of README.md and the other documents
goes through the real parser, and each Python snippet runs."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import rayllm
from rayllm.cli.completion import commands
from rayllm.cli.main import VERBS
from rayllm.config import Environment

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for folder in ("", ".github", "kernels", "rayllm", "rayllm/demo", "rayllm/models")
    for path in (ROOT / folder).glob("*.md")
)
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_PLACEHOLDER = re.compile(r"[A-Z]+")
_MENTIONS = ("serve run", "serve deploy", "serve [MODEL]", "ray up")
"""Programs that the text speaks of, and a verb of ours: they are no whole command lines."""
_PROGRAMS = ("rayllm", "python", "pytest", "pip", "serve", "ray")


def _fenced(language: str) -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for found, block in _FENCED.findall((ROOT / document).read_text(encoding="utf-8")):
            if found == language:
                yield str(document), block


def _inline() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        text = _FENCED.sub("", (ROOT / document).read_text(encoding="utf-8"))
        for code in _INLINE.findall(text):
            yield str(document), code.replace("\\|", "|")


def _commands() -> list[tuple[str, str]]:
    """Command lines of all documents: of blocks, and those in the text that begin with a program and an argument."""
    lines = [(document, line) for document, block in _fenced("bash") for line in block.splitlines() if line.strip()]
    lines += [(d, code) for d, code in _inline() if code.split(" ")[0] in _PROGRAMS and " " in code]
    lines += [(d, code) for d, code in _verb_table()]
    lines = [(d, line) for d, line in lines if line not in _MENTIONS]
    return [(document, part.strip()) for document, line in lines for part in line.split("&&")]


def _verb_table() -> Iterator[tuple[str, str]]:
    """The first column of README's table of verbs. What follows `bench` or `config` there are verbs of it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for row in text.partition("| Verb |")[2].partition("\n\n")[0].splitlines()[2:]:
        first, *others = _INLINE.findall(re.split(r"(?<!\\)\|", row)[1].replace("\\|", "|"))
        has_subverbs = hasattr(importlib.import_module(VERBS[first.split(" ")[0]][0]), "SUBVERBS")
        parent = f"{first.split(' ')[0]} " if has_subverbs else ""
        yield "README.md", f"rayllm {first}"
        for other in others:
            yield "README.md", f"rayllm {other if other.startswith(parent) else parent + other}"


def _words(line: str) -> list[str]:
    """A placeholder such as N stands for a value, the first of `a|b` for all, and what follows # is a comment."""
    words = [word.split("|")[0].strip("[]") for word in shlex.split(line, comments=True)]
    return ["1" if _PLACEHOLDER.fullmatch(word) else word for word in words]


@pytest.mark.parametrize(("document", "line"), _commands(), ids=lambda value: str(value)[:60])
def test_a_command_is_one_that_its_program_takes(document: str, line: str) -> None:
    program, *words = _words(line)
    CHECKS[program](words)


def _check_rayllm(words: Sequence[str]) -> None:
    from rayllm.cli.serve import parse_serve

    verb, *rest = words
    module = importlib.import_module(VERBS[verb][0])
    if hasattr(module, "SUBVERBS"):
        subverb, *rest = rest
        module = importlib.import_module(module.SUBVERBS[subverb][0])
    if verb == "serve":
        parse_serve(rest)
    else:
        module.parser().parse(rest)


def _check_python(words: Sequence[str]) -> None:
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]) is not None
        return
    path = ROOT / words[0]
    script = path / "__main__.py" if path.is_dir() else path
    source = "".join(file.read_text(encoding="utf-8") for file in script.parent.glob("*.py"))
    for flag in (word for word in words if word.startswith("--")):
        assert f'"{flag}"' in source, f"{script} has no {flag}"


def _check_pytest(words: Sequence[str]) -> None:
    for word in words:
        assert word.startswith("-") or word.isidentifier() or word.isdigit() or (ROOT / word).exists(), word
        if word.startswith("--"):
            assert f'"{word}"' in (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")


def _check_pip(words: Sequence[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert words[0] == "install"
    for extra in re.findall(r"\[(\w+)\]?", " ".join(words)):
        assert f"\n{extra} = [" in project, f"there is no extra {extra}"


def _check_serve(words: Sequence[str]) -> None:
    verb, target, *_ = words
    if verb == "run":
        module, _, name = target.partition(":")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(def )?{name}\b", source, re.MULTILINE)
    else:
        assert verb == "deploy"
        assert (ROOT / target).is_file()


def _check_ray(words: Sequence[str]) -> None:
    assert words[0] in ("up", "start", "get-auth-token"), words
    assert words[0] != "up" or (ROOT / words[1]).is_file()


CHECKS: dict[str, Any] = {
    "rayllm": _check_rayllm,
    "python": _check_python,
    "pytest": _check_pytest,
    "pip": _check_pip,
    "serve": _check_serve,
    "ray": _check_ray,
}


def test_a_flag_in_the_text_is_one_of_a_verb_or_a_script() -> None:
    known = {name for command in commands() for option in command.options for name in option.names}
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    sources = "".join(path.read_text(encoding="utf-8") for path in scripts)
    flags = {(document, code.split()[0].split("=")[0]) for document, code in _inline() if code.startswith("--")}
    assert flags
    unknown = {(document, flag) for document, flag in flags if flag not in known and f'"{flag}"' not in sources}
    assert not unknown


def test_a_variable_in_the_text_is_one_that_is_read() -> None:
    named = {name for _, code in _inline() for name in re.findall(r"\bRLLM_\w+[A-Z]\b", code)}
    assert named
    assert named <= set(Environment.NAMES)


def test_a_path_in_the_text_is_there() -> None:
    for document, code in _inline():
        if re.fullmatch(r"(rayllm|kernels|benchmarks|tests|serve_apps)/[\w./]*", code):
            assert (ROOT / code).exists(), f"{document} names {code}"


def test_a_python_name_in_the_text_is_public() -> None:
    for document, code in _inline():
        if code.startswith(("await rayllm.", "rayllm.get_engine", "rayllm.connect", "LLM.", "AsyncLLM.")):
            tree = compile(code, document, "eval", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    owner: Any = rayllm if node.value.id == "rayllm" else getattr(rayllm, node.value.id)
                    assert hasattr(owner, node.attr), f"{document}: {code}"


_NOT_RUN_HERE = ("get_engine", "my_package")
"""Of a running server (tests/test_remote.py runs those), and of a reader's own package."""


def _snippets(*, runs_here: bool) -> list[tuple[str, str]]:
    return [(d, block) for d, block in _fenced("python") if runs_here != any(word in block for word in _NOT_RUN_HERE)]


@pytest.mark.parametrize(("document", "block"), _snippets(runs_here=True), ids=lambda value: str(value)[:40])
def test_a_snippet_runs_with_the_built_in_model(
    document: str, block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayllm import llm

    monkeypatch.setattr(llm, "ray_is_initialized", lambda: False)  # other tests may be connected
    exec(compile(block, document, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("document", "block"), _snippets(runs_here=False), ids=lambda value: str(value)[:40])
def test_a_snippet_that_does_not_run_here_uses_public_names(document: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rayllm":
            assert hasattr(rayllm, node.attr), f"{document}: rayllm.{node.attr}"
