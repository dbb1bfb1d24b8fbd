"""`rayllm pull`: brings a model from Hugging Face or ModelScope to this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rayllm.cli.flags import Parser, UsageError
from rayllm.weights.hub import download
from rayllm.weights.hub_model import HubModel

_SHARE_OF_LINE = 10
"""Where lines cannot be rewritten, one is printed each 10 %."""


def parser() -> Parser:
    made = Parser(
        prog="rayllm pull",
        description="Download the files that serving needs. Files that are complete are not downloaded again.",
    )
    made.add_argument("model", metavar="MODEL", help="owner/model at Hugging Face, or ms:owner/model at ModelScope")
    made.add_argument("--revision", help="branch, tag or commit (default: the newest)")
    made.add_argument("--download-dir", metavar="DIR", help="default: the hub's own cache folder")
    made.add_argument("--json", action="store_true", help="print model and folder as one line of JSON")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints the folder on stdout; progress goes to stderr."""
    given = parser().parse(argv)
    name = given["model"]
    model = HubModel.parse(name, revision=given.get("revision"), download_dir=given.get("download_dir"))
    if model is None:
        if Path(name).expanduser().is_dir():
            raise UsageError(f"{name!r} is a folder on this machine: serve it without downloading")
        raise UsageError(f"{name!r} is not a model name: give owner/model, or ms:owner/model for ModelScope")
    folder = download_shown(model, quiet=bool(given.get("json")))
    print(json.dumps({"model": model.name, "folder": str(folder)}) if given.get("json") else folder)
    return 0


def download_shown(model: HubModel, *, quiet: bool = False) -> Path:
    """Downloads with progress on stderr; raises as `hub.download`."""
    from rayllm.cli.terminal import LiveStages, is_terminal

    progress = _Progress(model.name)
    if quiet:
        return download(model)
    if not is_terminal(sys.stderr):
        return download(model, progress.print_line)
    stages = LiveStages(sys.stderr)
    stages.show(f"downloading {model.name}")
    ok = False
    try:
        folder = download(model, lambda done, total: stages.show(progress.text(done, total)))
        ok = True
    finally:
        stages.end(ok=ok)
    return folder


class _Progress:
    """How far a download is, in words."""

    def __init__(self, name: str):
        self._name = name
        self._began: tuple[float, int] | None = None
        self._printed = -1

    def text(self, done: int, total: int) -> str:
        from rayllm.cli.table import amount

        now = time.monotonic()
        if self._began is None:
            self._began = now, done
        elapsed_s = now - self._began[0]
        pace = f", {amount((done - self._began[1]) / elapsed_s)}/s" if elapsed_s > 1 else ""
        return f"downloading {self._name}: {amount(done)} of {amount(total)}{pace}"

    def print_line(self, done: int, total: int) -> None:
        share = 100 if not total else 100 * done // total // _SHARE_OF_LINE * _SHARE_OF_LINE
        if share > self._printed:
            self._printed = share
            print(self.text(done, total), file=sys.stderr, flush=True)
