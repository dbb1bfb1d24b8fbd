"""What the documents tell a reader to type works: each command goes through the real parser, each Python snippet runs,
and each request is answered by a server with the built-in model."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from api.inproc_engine import InprocClient
from docs import ROOT, fenced, inline, shell_lines
from serve.served import Served

import rayllm
from rayllm.cli.main import COMMANDS
from rayllm.config import Environment
from rayllm.demo import DEMO_MODEL_NAME
from rayllm.engine.driver.fault_injection import KilledWorker
from rayllm.executor.worker_process import WorkerPlace
from rayllm.text.tokenizer import Tokenizer

_PLACEHOLDER = re.compile(r"[A-Z]+")
_MENTIONS = ("serve run", "serve deploy", "serve [MODEL]", "ray up", "ray start")
"""Not whole command lines."""
_PROGRAMS = ("rayllm", "python", "pytest", "pip", "serve", "ray")


def _commands() -> list[tuple[str, str]]:
    """Command lines of all documents: of blocks, and those in the text that begin with a program and an argument."""
    lines = list(shell_lines())
    lines += [(d, code) for d, code in inline() if code.split(" ")[0] in _PROGRAMS and " " in code]
    lines += [(d, code) for d, code in _command_table()]
    lines = [(d, line) for d, line in lines if line not in _MENTIONS]
    parts = [(document, part.strip()) for document, line in lines for part in line.split("&&")]
    return [(document, part) for document, part in parts if part.split(" ")[0] not in ("curl", "chmod")]


def _command_table() -> Iterator[tuple[str, str]]:
    """The first column of the table of commands. What follows `bench` or `config` there are commands of it."""
    document = "rayllm/cli/README.md"
    text = (ROOT / document).read_text(encoding="utf-8")
    for row in text.partition("| Command |")[2].partition("\n\n")[0].splitlines()[2:]:
        first, *others = re.findall(r"`([^`]+)`", re.split(r"(?<!\\)\|", row)[1].replace("\\|", "|"))
        has_subcommands = hasattr(importlib.import_module(COMMANDS[first.split(" ")[0]][0]), "SUBCOMMANDS")
        parent = f"{first.split(' ')[0]} " if has_subcommands else ""
        yield document, f"rayllm {first}"
        for other in others:
            yield document, f"rayllm {other if other.startswith(parent) else parent + other}"


def _files(document: str) -> list[tuple[str, str]]:
    """The settings files that a document shows: YAML whose first line is a comment with the file's name."""
    blocks = [block for found, block in fenced("yaml") if found == document]
    return [(named[1], block) for block in blocks if (named := re.match(r"# (\w+\.yaml)\n", block))]


def _words(line: str) -> list[str]:
    """A placeholder such as N stands for a value, the first of `a|b` for all, and what follows # is a comment."""
    words = [word.split("|")[0].strip("[]") for word in shlex.split(line, comments=True)]
    return ["1" if _PLACEHOLDER.fullmatch(word) else word for word in words]


@pytest.mark.parametrize(("document", "line"), _commands(), ids=lambda value: str(value)[:60])
def test_a_command_is_one_that_its_program_takes(
    document: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in _files(document):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    words = _words(line)
    while "=" in words[0]:
        assert words.pop(0).split("=")[0] in ("RAY_ADDRESS", *Environment.NAMES)
    CHECKS[words[0]](words[1:])


def _check_rayllm(words: Sequence[str]) -> None:
    from rayllm.cli.serve import parse_serve

    command, *rest = words
    module = importlib.import_module(COMMANDS[command][0])
    if hasattr(module, "SUBCOMMANDS"):
        subcommand, *rest = rest
        module = importlib.import_module(module.SUBCOMMANDS[subcommand][0])
    if command == "serve":
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
    command, target, *_ = words
    if command == "run":
        module, _, name = target.partition(":")
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(def )?{name}\b", source, re.MULTILINE)
    else:
        assert command == "deploy"
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


_URL = "http://127.0.0.1:8000"
_NOT_RUN_HERE = ("get_engine", "rayllm.connect", "my_package", _URL)
"""Snippets of a running engine (tests/test_remote.py runs those), of a reader's own package, and of a server."""


def _snippets(*, runs_here: bool) -> list[tuple[str, str]]:
    return [(d, block) for d, block in fenced("python") if runs_here != any(word in block for word in _NOT_RUN_HERE)]


@pytest.mark.parametrize(("document", "block"), _snippets(runs_here=True), ids=lambda value: str(value)[:40])
def test_a_snippet_runs_with_the_built_in_model(
    document: str, block: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayllm.engine.owner import program

    monkeypatch.setattr(program, "ray_is_initialized", lambda: False)  # other tests may be connected
    exec(compile(block, document, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("document", "block"), _snippets(runs_here=False), ids=lambda value: str(value)[:40])
def test_a_snippet_that_does_not_run_here_uses_public_names(document: str, block: str) -> None:
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rayllm":
            assert hasattr(rayllm, node.attr), f"{document}: rayllm.{node.attr}"


# ---------------------------------------------------------------------------------------- requests to a server


@pytest.fixture(scope="module")
def server_url() -> Iterator[str]:
    """A server of the built-in model in this process, with two ranks as far as fault injection asks."""
    client = InprocClient("")
    config = client.config.model_copy(update={"served_model_name": DEMO_MODEL_NAME})
    served = Served(ready=False, kill_worker=_killed)
    served.service.set_ready(config, Tokenizer.from_config(config), client)
    with served.port() as port:
        yield f"http://127.0.0.1:{port}"


async def _killed(rank: int) -> KilledWorker:
    return KilledWorker(rank, WorkerPlace(4700 + rank, "n" * 56, "127.0.0.1", ("cpu",), "worker.err"))


@pytest.mark.parametrize(
    ("document", "line"),
    [(d, line) for d, line in shell_lines() if line.startswith("curl ")],
    ids=lambda v: str(v)[:60],
)
def test_a_curl_command_is_answered(document: str, line: str, server_url: str) -> None:
    method, url, headers, body = "", "", {}, None
    words = iter(shlex.split(line)[1:])
    for word in words:
        if word in ("-H", "--header"):
            name, _, value = next(words).partition(": ")
            headers[name] = value
        elif word in ("-d", "--data", "--json"):
            body = next(words)
        elif word in ("-X", "--request"):
            method = next(words)
        elif not word.startswith("-"):
            url = word
    assert url.startswith(_URL), f"{document}: {line}"
    url = url.replace(_URL, server_url)
    answered = httpx.request(method or ("POST" if body else "GET"), url, headers=headers, content=body, timeout=60)
    assert answered.status_code == 200, answered.text
    assert answered.text.strip()


@pytest.mark.parametrize(
    ("document", "block"), [(d, block) for d, block in fenced("python") if _URL in block], ids=lambda v: str(v)[:40]
)
def test_a_snippet_with_a_client_of_the_server_runs(
    document: str, block: str, server_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    block = block.replace(_URL, server_url)
    exec(compile(block, document, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()
