"""What a person sees of a command that starts a server: a stage line, then results; all other output is in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from rayllm.config import Environment
from rayllm.errors import ConfigError


def new_log_file(verb: str) -> Path:
    """A path for this run's log, in RLLM_LOG_DIR or the user's cache folder."""
    folder = Path(Environment.log_dir() or Path.home() / ".cache" / "rayllm" / "logs").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"log folder {str(folder)!r} cannot be made ({error.strerror}): set RLLM_LOG_DIR") from None
    return folder / f"{verb}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"


class Screen:
    """The terminal, for us alone: while it is open, whatever else this process and its children print goes to
    `log_path`. `quiet` shows no stages (for --json).
    """

    def __init__(self, log_path: Path, *, quiet: bool = False):
        self.log_path = log_path
        self._quiet = quiet
        self._live: Any = None
        self.out: TextIO = sys.stdout
        self._started = time.monotonic()

    @classmethod
    @contextlib.contextmanager
    def open(cls, log_path: Path, *, quiet: bool = False) -> Iterator[Screen]:
        screen = cls(log_path, quiet=quiet)
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        with log_path.open("ab", buffering=0) as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        screen.out = os.fdopen(os.dup(saved[0]), "w", buffering=1, encoding="utf-8", errors="replace")
        try:
            yield screen
        finally:
            screen.end_stages()
            with contextlib.suppress(BrokenPipeError):
                screen.out.close()
            sys.stdout.flush()
            sys.stderr.flush()
            for number, descriptor in zip((1, 2), saved, strict=True):
                os.dup2(descriptor, number)
                os.close(descriptor)

    def stage(self, text: str) -> None:
        """What is being done now: one live line on a terminal, else a line each."""
        os.write(1, f"[{time.monotonic() - self._started:7.2f} s] {text}\n".encode())  # descriptor 1 is the log file
        if self._quiet:
            return
        if not self.out.isatty():
            self.print(f"{text} ...")
        elif self._live is None:
            self._live = self._start_live(text)
        else:
            self._live.renderable.update(text=f"{text} ...")

    def _start_live(self, text: str) -> Any:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        live = Live(
            Spinner("dots", text=f"{text} ..."),
            console=Console(file=self.out),
            transient=True,
            redirect_stdout=False,  # else what Ray prints would come back to the terminal
            redirect_stderr=False,
        )
        live.start()
        return live

    def end_stages(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def print(self, text: str = "", end: str = "\n") -> None:
        self.out.write(text + end)
        self.out.flush()

    def box(self, title: str, lines: Sequence[tuple[str, str]]) -> None:
        """Names and values: framed on a terminal, plain lines elsewhere."""
        self.end_stages()
        width = max(len(name) for name, _ in lines)
        rows = [f"{name:<{width}}  {value}" for name, value in lines]
        if self.out.isatty():
            from rich.console import Console
            from rich.panel import Panel
            from rich.text import Text

            Console(file=self.out).print(Panel(Text("\n".join(rows)), title=title, expand=False))
        else:
            self.print("\n".join([title, *rows]))


@contextlib.contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `KeyboardInterrupt` once; a second one ends this process and its children
    on the spot."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def end_at_once(number: int, frame: FrameType | None) -> None:
        from rayllm.serve.processes import descendants, end_all

        end_all(descendants(), grace_s=0)
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
