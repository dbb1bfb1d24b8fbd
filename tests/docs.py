"""The Markdown documents of the repository, and the parts of them that tests check."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_NOT_OURS = {"build", "dist", "node_modules", "site-packages", "shared", "venv"}


def _is_ours(path: Path) -> bool:
    folders = path.relative_to(ROOT).parts[:-1]
    return not any(name in _NOT_OURS or (name.startswith(".") and name != ".github") for name in folders)


DOCUMENTS = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.md") if _is_ours(path))


def read(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def fenced(*languages: str) -> Iterator[tuple[str, str]]:
    """Document and text of each fenced block in one of these languages."""
    for document in DOCUMENTS:
        for language, block in _FENCED.findall(read(document)):
            if language in languages:
                yield str(document), block


def inline() -> Iterator[tuple[str, str]]:
    """Document and text of each piece of code inside a line of text."""
    for document in DOCUMENTS:
        for code in _INLINE.findall(_FENCED.sub("", read(document))):
            yield str(document), code.replace("\\|", "|")


def shell_lines() -> Iterator[tuple[str, str]]:
    """Document and text of each command line of a `bash` block; a line that ends in a backslash goes on."""
    for document, block in fenced("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip():
                yield document, line


def links() -> Iterator[tuple[str, str]]:
    """Document and target of each link."""
    for document in DOCUMENTS:
        for target in _LINK.findall(_FENCED.sub("", read(document))):
            yield str(document), target


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCED.sub("", read(document)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
