"""Real clients against a real server: `python tests/conformance [--quick] [NAME ...]`.

Each client gets an environment of its own (made once, under `--environments`) and runs its file of `clients/`. Ends
with the README's table, and with status 1 where a client failed. Needs the package registries, the first time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent)]  # as pytest's `pythonpath` does for tests

import vllm_tests.source  # noqa: E402
from served_process import running_serve  # noqa: E402
from suites import SUITES, Suite  # noqa: E402

_KEY = "conformance-key"
_MODEL = "conformance"
_SUITE_TIMEOUT_S = 900
_SERVERS_TIMEOUT_S = 3600
"""For a client that starts servers of its own, one after the other."""
_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rayllm-conformance"
_COUNTS = re.compile(r"(\d+) (passed|failed|skipped|xfailed|error)")
_NODE_COUNTS = re.compile(r"^# (pass|fail|skipped) (\d+)", re.MULTILINE)
_LEFT_OUT = re.compile(r"^(?:SKIPPED \[(\d+)\] \S+: |XFAIL \S+ - )(.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What one client's tests came to. `counts`: by pytest's words."""

    suite: Suite
    version: str
    counts: dict[str, int]
    seconds: float
    output: str

    @property
    def num_failed(self) -> int:
        return self.counts.get("failed", 0) + self.counts.get("error", 0)

    @property
    def ok(self) -> bool:
        return bool(self.counts.get("passed")) and not self.num_failed

    @property
    def left_out(self) -> str:
        """How many tests were skipped or are expected to fail, and why, as the client's own suite says."""
        reasons: Counter[str] = Counter()
        for number, reason in _LEFT_OUT.findall(self.output):
            reasons[reason.removesuffix(".")] += int(number or 1)
        return "; ".join(f"{number}: {reason}" for reason, number in reasons.most_common())


def main() -> int:
    options = _options()
    outcomes: list[Outcome] = []
    for suite in options.suites:
        if suite.starts_servers:
            outcomes.append(_noted(_run(suite, "", options.environments)))
    for model in dict.fromkeys(suite.model for suite in options.suites if not suite.starts_servers):
        with tempfile.TemporaryDirectory(prefix="rlconf-") as folder:
            checkpoint = _make_model(model, Path(folder), options.environments)
            flags = (str(checkpoint), "--served-model-name", _MODEL, "--api-key", _KEY)
            with running_serve(*flags) as server:
                for suite in options.suites:
                    if suite.model == model:
                        outcomes.append(_noted(_run(suite, server.url, options.environments)))
    for outcome in outcomes:
        if not outcome.ok:
            print(f"\n== {outcome.suite.name}\n{outcome.output[-6000:]}")
    print("\n".join(["", *_table(outcomes)]))
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests/conformance", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *(suite.name for suite in SUITES)], help="all, if none")
    parser.add_argument("--quick", action="store_true", help="only what CI runs")
    parser.add_argument("--environments", type=Path, default=_CACHE, help="folder of what is made once")
    options = parser.parse_args()
    options.suites = [
        suite
        for suite in SUITES
        if (not options.names or suite.name in options.names) and (suite.quick or not options.quick)
    ]
    return options


def _make_model(name: str, folder: Path, environments: Path) -> Path:
    if name == "closer":
        from closer import make_closer

        return make_closer(folder)
    from memoriser import make_memoriser

    [pupil] = [suite for suite in SUITES if suite.model == name]
    return make_memoriser(environments, lambda url: _print_failures(_run(pupil, url, environments)), _MODEL, _KEY)


def _noted(outcome: Outcome) -> Outcome:
    print(f"{outcome.suite.name}: {outcome.counts}, {outcome.seconds:.1f} s", flush=True)
    if outcome.suite.starts_servers:
        print("\n".join(line for line in outcome.output.splitlines() if line.startswith("| ")))
    return outcome


def _print_failures(taught: Outcome) -> None:
    """What fails against the teacher will fail against its pupil."""
    print(f"against the teacher: {taught.counts}")
    if not taught.ok:
        print(taught.output[-4000:])


def _run(suite: Suite, url: str, environments: Path) -> Outcome:
    environment = _environment(suite, environments)
    variables = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ["HOME"],
        "COLUMNS": "200",  # pytest cuts reasons at the width of the terminal
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # it asks the internet otherwise
        "CONFORMANCE_URL": url,
        "CONFORMANCE_KEY": _KEY,
        "CONFORMANCE_MODEL": _MODEL,
    }
    file = _HERE / "clients" / suite.file
    if suite.starts_servers:
        command, more = vllm_tests.source.command(environment)
        variables = {**os.environ, **variables, **more}
    elif suite.is_node:
        copy = environment / suite.file  # node looks for packages beside the file
        copy.write_text(file.read_text())
        command = ["node", "--test", "--test-reporter=tap", str(copy)]
    else:
        python = str(environment / "bin" / "python")
        command = [python, "-m", "pytest", "-q", "-ra", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull]
        command += ["--noconftest", "--rootdir", str(file.parent), "-W", "ignore", "-o", "asyncio_mode=auto"]
        command += ["-o", "asyncio_default_test_loop_scope=session", str(file)]  # clients keep connections
    started_s = time.monotonic()
    done = subprocess.run(
        command,
        env=variables,
        cwd=environment,
        capture_output=True,
        text=True,
        timeout=_SERVERS_TIMEOUT_S if suite.starts_servers else _SUITE_TIMEOUT_S,
    )
    output = done.stdout + done.stderr
    counts = _counts(output, suite.is_node)
    if done.returncode and not any(counts.get(word) for word in ("failed", "error")):
        counts["error"] = 1
    return Outcome(suite, _version(suite, environment), counts, time.monotonic() - started_s, output)


def _counts(output: str, is_node: bool) -> dict[str, int]:
    if is_node:
        words = {"pass": "passed", "fail": "failed", "skipped": "skipped"}
        return {words[word]: int(count) for word, count in _NODE_COUNTS.findall(output)}
    closing = [line for line in output.splitlines() if " in " in line and _COUNTS.search(line)]
    return {word: int(count) for count, word in _COUNTS.findall(closing[-1] if closing else "")}


def _environment(suite: Suite, environments: Path) -> Path:
    """The client's packages, installed once for each list of them."""
    digest = hashlib.sha256(" ".join(suite.packages).encode()).hexdigest()[:8]
    folder = environments / f"{suite.name}-{digest}"
    if (folder / "made").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if suite.is_node:
        (folder / "package.json").write_text('{"private": true, "type": "module"}')
        _check(["npm", "install", "--silent", "--no-audit", "--no-fund", *suite.packages], folder)
    else:
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        _check([*pip, "pytest", "pytest-asyncio", *suite.packages], folder)
    (folder / "made").touch()
    return folder


def _check(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _version(suite: Suite, environment: Path) -> str:
    """Of what the client's tests come from: its first package, where nothing else is said."""
    if suite.version:
        return suite.version
    package, _, _ = suite.packages[0].partition("[")
    if suite.is_node:
        return str(json.loads((environment / "node_modules" / package / "package.json").read_text())["version"])
    code = f"from importlib.metadata import version; print(version({package!r}))"
    python = str(environment / "bin" / "python")
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    """Lines of Markdown."""
    rows = [("Client", "Version", "Passed", "Failed", "Skipped, and why"), ("---",) * 5]
    for outcome in sorted(outcomes, key=lambda outcome: SUITES.index(outcome.suite)):
        counts = str(outcome.counts.get("passed", 0)), str(outcome.num_failed)
        rows.append((outcome.suite.name, outcome.version, *counts, outcome.left_out))
    return [f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows]


if __name__ == "__main__":
    sys.exit(main())
