"""Words that RayLLM once used for what vLLM, Ray and OpenAI call otherwise do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rayllm", "kernels", "serve_apps", "benchmarks")

WORDS = {
    "acquit": "release from quarantine",
    "acquitted": "released from quarantine",
    "distrust": "invalidate",
    "former": "previous",
    "mend": "fix, hint; of a rank: recover",
    "mended": "fixed; of a rank: recovered",
    "mending": "recovering",
    "mends": "fixes; of a rank: recovers",
    "pardon": "extend the time limit",
    "pardoned": "with an extended time limit",
    "stranger": "unauthenticated client",
    "strangers": "unauthenticated clients",
    "came damaged": "is corrupt",
    "did not stop in order": "did not shut down cleanly",
    "stands twice": "is given twice",
    "steps go on": "recovered",
    "the ranks live": "the ranks are alive",
    "is not tried again": "is not retried",
}
"""In code, comments and documents: what is said now. Whole words, in any case."""

NAMES = {
    "be_modest": "lower_priority",
    "bring_here": "ensure_downloaded",
    "continuity": "resume",
    "death_watch": "orphan_cleanup",
    "draft": "plan_builder (a draft is speculative decoding's)",
    "figures": "stats",
    "flight": "in_flight_step",
    "flights": "in_flight_steps",
    "former": "previous",
    "land": "complete",
    "let_go": "unpin, drop",
    "meanwhile": "poll",
    "mend": "fix, hint, recover",
    "mirror": "retained_requests",
    "notation": "format",
    "obey": "run_commands",
    "pipeline_depth": "max_inflight_steps",
    "recipe": "response_context",
    "subverb": "subcommand",
    "suspects": "quarantined",
    "tell": "send, report",
    "told": "sent, reported",
    "verb": "command",
    "verbs": "commands",
    "widest": "max_activation_width",
}
"""Of modules, classes, functions, attributes, variables and arguments: what they are called now. Without leading and
trailing underscores, in any case."""

CLASSES = ("Draft", "Flight", "Flights", "Kept", "Mirror", "Pace", "Places", "Recent", "Figures", "Continuity")
"""Classes of these names, whose words are ordinary ones elsewhere."""

NAME_PIECES = (
    "former",
    "mend",
    "mending",
    "tell",
    "told",
    "acquit",
    "pardon",
    "distrust",
    "strangers",
    "verb",
    "figures",
)
"""No name has one of these as a part between underscores."""

ALLOWED_NAMES = {("draft", "rayllm/structured/schema.py")}
"""JSON Schema has drafts."""


def _sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _documents() -> list[Path]:
    own = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")]
    return sorted([*own, *ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.md")])


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def words_of(text: str) -> set[str]:
    """The old words and phrases in a text; spaces may be line breaks."""
    flat = " ".join(text.split())
    return {word for word in WORDS if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", flat, re.IGNORECASE)}


def _identifiers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from node.module.split(".")


def names_of(source: str) -> set[str]:
    """The old names in Python source."""
    names = set(_identifiers(ast.parse(source)))
    snake = {re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_") for name in names}
    found = {name for name in snake if name in NAMES or not {*name.split("_")}.isdisjoint(NAME_PIECES)}
    return found | {name for name in names if name.strip("_") in CLASSES}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Each error names the fix.", set()),
        ("It Mends\nthe file, which came\n    damaged.", {"mends", "came damaged"}),
        ("amend, recommend, formerly, transformer", set()),
    ],
)
def test_old_words_are_found_as_whole_words(text: str, expected: set[str]) -> None:
    assert words_of(text) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("former_failure = self._tell(figures=1)", {"former_failure", "tell", "figures"}),
        ("class Flights:\n    def land(self, recipe): ...", {"flights", "Flights", "land", "recipe"}),
        ("transformer = landing.intelligence(recommend)", set()),
        ("from rayllm.engine.mirror import x", {"mirror"}),
    ],
)
def test_old_names_are_found_as_whole_names_or_parts(source: str, expected: set[str]) -> None:
    assert names_of(source) == expected


def test_no_old_word_in_code_and_documents() -> None:
    found = {_relative(path): words_of(path.read_text(encoding="utf-8")) for path in [*_sources(), *_documents()]}
    assert {path: {word: WORDS[word] for word in words} for path, words in found.items() if words} == {}


def test_no_old_name_in_code() -> None:
    found = {
        (name, _relative(path))
        for path in _sources()
        for name in names_of(path.read_text(encoding="utf-8")) | ({path.stem} & NAMES.keys())
    }
    assert sorted(found - ALLOWED_NAMES) == []
