"""What a person sees of a command that starts a server: stages, then results; all other output is in a file."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any, TextIO

from rayllm.config import Environment
from rayllm.errors import ConfigError
from rayllm.machine.folders import log_folder, make_private

_LOG = logging.getLogger("rayllm.cli")


def new_log_file(command: str) -> Path:
    """A path for this run's log."""
    folder = log_folder()
    try:
        make_private(folder)
    except OSError as error:
        raise ConfigError(f"log folder {str(folder)!r} cannot be used ({error.strerror}): set RLLM_LOG_DIR") from None
    return folder / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


def _opened_log(path: Path) -> IO[bytes]:
    """For its user alone: it may tell what was asked. `ConfigError` where it cannot be written."""
    try:
        path.touch(mode=0o600)
        return path.open("ab", buffering=0)
    except OSError as error:
        raise ConfigError(f"log file {str(path)!r} cannot be written ({error.strerror}): choose another") from None


STOPPING = "stopping"
"""The stage in which a server ends; whatever was unfinished when it begins has failed or was given up."""


def is_terminal(out: TextIO) -> bool:
    """Whether a person looks at it: lines may be rewritten and coloured."""
    return out.isatty() and not Environment.terminal_is_dumb()


class LiveStages:
    """A line a stage: live with a spinner and its seconds, then with a tick or a cross and how long it took.

    What follows ': ' in a stage's text is progress within it and stays on its line.
    """

    def __init__(self, out: TextIO):
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self._console = Console(file=out, highlight=False)
        self._spinner = Spinner("dots")
        self._text = ""
        self._seen: set[str] = set()
        self._began = time.monotonic()
        self._live = Live(
            get_renderable=self._line,
            console=self._console,
            transient=True,
            redirect_stdout=False,  # else what Ray prints would come back to the terminal
            redirect_stderr=False,
        )
        self._live.start()

    def show(self, text: str) -> None:
        """A stage that was there before begins again only where the one between has failed."""
        stem = _stem(text)
        if stem != _stem(self._text):
            self._tick(ok=stem != STOPPING and stem not in self._seen)
            self._seen.add(stem)
            self._began = time.monotonic()
        self._text = text

    def end(self, *, ok: bool) -> None:
        """The last stage went well or not; stopping does so also after a failure."""
        self._tick(ok or self._text == STOPPING)
        self._text = ""
        self._live.stop()

    def _tick(self, ok: bool) -> None:
        if self._text:
            mark = "[green]✓[/]" if ok else "[red]✗[/]"
            self._console.print(f"{mark} {_stem(self._text):<28} [dim]{self._seconds()}[/]", overflow="ellipsis")

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:5.1f} s"

    def _line(self) -> Any:
        from rich.text import Text

        _, _, progress = self._text.partition(": ")
        self._spinner.update(
            text=f"{_stem(self._text):<28} [dim]{self._seconds()}[/]  {progress}" if self._text else ""
        )
        return self._spinner if self._text else Text()


def _stem(stage: str) -> str:
    return stage.partition(": ")[0]


class Screen:
    """The terminal, for us alone: while it is open, whatever else this process and its children print goes to a file.
    `quiet` shows no stages (for --json).
    """

    def __init__(self, log_path: Path, *, quiet: bool = False):
        self.log_path = log_path
        self._quiet = quiet
        self._live: LiveStages | None = None
        self._stem = ""
        self.out: TextIO = sys.stdout
        self._started = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(cls, log_path: Path, *, quiet: bool = False, chatter_path: Path | None = None) -> Iterator[Screen]:
        """`log_path` is what the user is told of; what others print goes to `chatter_path`, or there too."""
        screen = cls(log_path, quiet=quiet)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        with _opened_log(chatter_path or log_path) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        screen.out = os.fdopen(os.dup(saved[0]), "w", buffering=1, encoding="utf-8", errors="replace")
        try:
            yield screen
        except Exception:
            screen.end_stages(ok=False)
            raise
        finally:
            screen.end_stages()
            with contextlib.suppress(BrokenPipeError):
                screen.out.close()
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)

    @property
    def is_terminal(self) -> bool:
        """As `is_terminal` says of where it is shown."""
        return is_terminal(self.out)

    def stage(self, text: str) -> None:
        """What is being done now: a live line each on a terminal, else a plain one. What follows ': ' is how far it
        is, and makes no line of its own."""
        if self.out.closed:  # a server that outlives its screen goes on saying what it does
            return
        _LOG.info("after %.2f s: %s", time.monotonic() - self._started, text)
        if self._quiet:
            return
        if self.is_terminal:
            if self._live is None:
                self._live = LiveStages(self.out)
            self._live.show(text)
        elif _stem(text) != self._stem:
            self._stem = _stem(text)
            self.print(f"{text} ...")

    def end_stages(self, *, ok: bool = True) -> None:
        """The last stage is over, well or not."""
        if self._live is not None:
            live, self._live = self._live, None
            live.end(ok=ok)

    def print(self, text: str = "", end: str = "\n") -> None:
        self.out.write(text + end)
        self.out.flush()

    def box(self, title: str, lines: Sequence[tuple[str, str]]) -> None:
        """Names and values: framed on a terminal that is wide enough, plain lines elsewhere, so that no value is
        ever cut or broken by us."""
        self.end_stages()
        width = max(len(name) for name, _ in lines)
        rows = [f"{name:<{width}}  {value}" for name, value in lines]
        if self.is_terminal:
            from rich.console import Console
            from rich.panel import Panel
            from rich.text import Text

            console = Console(file=self.out, highlight=False)
            if console.width >= max(map(len, rows)) + 4:
                console.print(Panel(Text("\n".join(rows)), title=f"[bold]{title}[/]", expand=False, padding=(0, 1)))
                return
        self.print("\n".join([title, *rows]))


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `KeyboardInterrupt` once; a second one ends this process and its children
    on the spot."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end_at_once(number: int, frame: FrameType | None) -> None:
        from rayllm.machine.orphan_cleanup import is_orphan_cleanup
        from rayllm.machine.processes import descendants, end_all

        end_all({each for each in descendants() if not is_orphan_cleanup(each)}, grace_s=0)
        os._exit(128 + number)

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, end_at_once)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
