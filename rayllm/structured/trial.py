"""Grammars are tried before they may run: in a child process, which can be ended, with little time and memory.

The child (`python -m rayllm.structured.trial`) reads one `StructuredOutputsParams` at a time and answers with the
grammar's Lark text where it had to be converted, or with the reason why it cannot be followed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import msgspec

from rayllm.errors import ConfigError, OverloadedError, RequestError
from rayllm.machine.processes import end_child
from rayllm.request import StructuredOutputsParams
from rayllm.structured.grammar import lark_of, refusal
from rayllm.structured.matcher import new_matcher, no_token_reason
from rayllm.structured.vocabulary import Vocabulary

log = logging.getLogger(__name__)

TIMEOUT_S = 2.0
MAX_COMPILE_S = 0.15
"""CPU time; a worker compiles again, beside its step but on the same cores."""
MAX_MEMORY_BYTES = 512 * 2**20
"""Beyond what the child holds when it is ready."""
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 1.0
_NUM_TRIES = 2
_SIGNALS_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
"""The first is also what the kernel sends where memory is short. Beyond its own limit the child aborts."""
_MAX_KNOWN = 4096
_MAX_QUEUED = 64
_LENGTH = struct.Struct("<I")


class TrialSetup(msgspec.Struct, frozen=True, array_like=True):
    """What the child needs to load the model's tokens."""

    tokenizer_path: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Verdict(msgspec.Struct, frozen=True, array_like=True):
    """`error` is empty for a grammar that can be followed; `lark` holds its text where that is not what was sent."""

    error: str = ""
    lark: str | None = None


class GrammarTrials:
    """Tries grammars in one warm child, one at a time; remembers what came of each.

    `close` ends the child, as does the end of this process.
    """

    def __init__(self, tokenizer_path: str, vocab_size: int, eos_token_ids: tuple[int, ...]):
        self._setup = TrialSetup(tokenizer_path, vocab_size, eos_token_ids)
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammar-trial")
        self._child: _Child | None = None
        self._num_queued = 0
        self._is_closed = False

    def warm_up(self) -> None:
        """Starts the child, in the background."""
        self._thread.submit(self._warm_child)

    async def check(self, params: StructuredOutputsParams) -> StructuredOutputsParams:
        """The same, with a grammar in Lark's form, where it can be followed. Raises `RequestError` with the reason
        where not, `OverloadedError` where that could not be found out."""
        digest = hashlib.blake2b(msgspec.msgpack.encode(params), digest_size=16).digest()
        verdict = self._known.get(digest)
        if verdict is None:
            verdict = await self._try(params)
            self._known[digest] = verdict
            if len(self._known) > _MAX_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(digest)
        if verdict.error:
            raise refusal(verdict.error)
        return params if verdict.lark is None else StructuredOutputsParams(grammar=verdict.lark)

    async def _try(self, params: StructuredOutputsParams) -> Verdict:
        if self._num_queued >= _MAX_QUEUED:
            raise OverloadedError(f"{self._num_queued} grammars wait to be compiled; come back later", TIMEOUT_S)
        self._num_queued += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, params)
        finally:
            self._num_queued -= 1

    def close(self) -> None:
        self._is_closed = True
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._end_child()

    # ------------------------------------------------------------------------------------------ on the thread

    def _warm_child(self) -> _Child:
        if not self._is_closed and (self._child is None or not self._child.is_alive):
            self._child = _Child(self._setup)
        if self._is_closed or self._child is None:
            self._end_child()
            raise _NotTriedError("the server stops")
        return self._child

    def _run(self, params: StructuredOutputsParams) -> Verdict:
        """Raises `OverloadedError` where the grammar could not be tried, which says nothing of it."""
        reason: Exception | None = None
        for _ in range(_NUM_TRIES):
            try:
                return self._warm_child().ask(params)
            except _NotTriedError as error:
                log.warning("a grammar (%s) was not tried: %s", params.kind, error)
                self._end_child()
                reason = error
            except TimeoutError:
                log.warning("a grammar (%s) took longer than %g s to compile", params.kind, TIMEOUT_S)
                self._replace_child()
                return Verdict(f"{params.kind} takes longer than {TIMEOUT_S:g} s to compile; simplify it")
            except OSError:
                log.warning("the process that tries grammars died over one (%s)", params.kind)
                self._replace_child()
                limit = MAX_MEMORY_BYTES // 2**20
                return Verdict(
                    f"{params.kind} takes more than {limit} MiB to compile, or cannot be compiled; simplify it"
                )
        raise OverloadedError(f"the {params.kind} could not be tried ({reason}); come back later", TIMEOUT_S)

    def _replace_child(self) -> None:
        self._end_child()
        if not self._is_closed:
            self.warm_up()

    def _end_child(self) -> None:
        if self._child is not None:
            self._child.end()


class _NotTriedError(Exception):
    """The child ended, or came to nothing, and the grammar is not to blame."""


class _Child:
    """The process, from its start until `end`. Where it is killed from outside or gets no time, `_NotTriedError`; where
    it dies of a grammar or takes too long over one, `OSError` and `TimeoutError`."""

    def __init__(self, setup: TrialSetup):
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, end_child, self._process)
        try:
            self._send(msgspec.msgpack.encode(setup))
            self._fault = self._receive(_START_TIMEOUT_S).error
        except OSError as error:  # a TimeoutError is one
            self.end()
            raise _NotTriedError(f"the process that tries grammars did not start: {error}") from None

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def ask(self, params: StructuredOutputsParams) -> Verdict:
        if self._fault:
            return Verdict(self._fault)
        cpu_s = self._cpu_s()
        try:
            self._send(msgspec.msgpack.encode(params))
            return self._receive(TIMEOUT_S)
        except TimeoutError:
            if self._cpu_s() - cpu_s < TIMEOUT_S / 2:
                raise _NotTriedError(f"too little time was left for it within {TIMEOUT_S:g} s") from None
            raise
        except OSError:
            if self._was_killed():
                raise _NotTriedError("the process that tries grammars was killed, for want of memory perhaps") from None
            raise
        except ValueError:  # `end` has closed the pipes
            raise _NotTriedError("the process that tries grammars was ended") from None

    def _cpu_s(self) -> float:
        """CPU time that the child has taken."""
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _was_killed(self) -> bool:
        """By somebody else: what a grammar does to the child ends it in other ways."""
        try:
            return -self._process.wait(_END_TIMEOUT_S) in _SIGNALS_FROM_OUTSIDE
        except subprocess.TimeoutExpired:
            return False

    def end(self) -> None:
        self._end()

    def _send(self, frame: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(_LENGTH.pack(len(frame)) + frame)
        self._process.stdin.flush()

    def _receive(self, timeout_s: float) -> Verdict:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        found = b""
        while len(found) < _LENGTH.size or len(found) < _LENGTH.size + _LENGTH.unpack_from(found)[0]:
            if not select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), 2**16)
            if not part:
                raise BrokenPipeError("the child is gone")
            found += part
        return msgspec.msgpack.decode(found[_LENGTH.size :], type=Verdict)


# ---------------------------------------------------------------------------------------------- in the child


def judge(params: StructuredOutputsParams, vocabulary: Vocabulary) -> Verdict:
    """Compiles the grammar and computes its first mask, as a worker will."""
    try:
        lark = lark_of(params) if params.kind in ("grammar", "structural_tag") else None
        began = time.process_time()
        matcher = new_matcher(params if lark is None else StructuredOutputsParams(grammar=lark), vocabulary)
        compile_s = time.process_time() - began
        if compile_s > MAX_COMPILE_S:
            return Verdict(
                f"{params.kind} takes {compile_s:.2f} s to compile, at most {MAX_COMPILE_S:g} s may be taken"
            )
        matcher.compute_bitmask()
        if matcher.is_error():
            return Verdict(f"{params.kind}: {no_token_reason(matcher)}")
    except RequestError as error:
        return Verdict(error.message)
    return Verdict(lark=None if lark == params.grammar else lark)


def main(requests: BinaryIO, answers: BinaryIO) -> None:
    """Judges what comes until nothing more does."""

    def answer(verdict: Verdict) -> None:
        frame = msgspec.msgpack.encode(verdict)
        answers.write(_LENGTH.pack(len(frame)) + frame)
        answers.flush()

    setup = msgspec.msgpack.decode(_read_frame(requests), type=TrialSetup)
    try:
        vocabulary = Vocabulary.load(setup.tokenizer_path, setup.vocab_size, setup.eos_token_ids)
        answer(Verdict())
    except (ConfigError, OSError) as error:
        answer(Verdict(str(error)))
        return
    _limit_memory()
    while frame := _read_frame(requests):
        answer(judge(msgspec.msgpack.decode(frame, type=StructuredOutputsParams), vocabulary))


def _read_frame(requests: BinaryIO) -> bytes:
    header = requests.read(_LENGTH.size)
    return requests.read(_LENGTH.unpack(header)[0]) if len(header) == _LENGTH.size else b""


def _limit_memory() -> None:
    with open("/proc/self/statm", encoding="ascii") as sizes:
        held = int(sizes.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MAX_MEMORY_BYTES, resource.RLIM_INFINITY))


if __name__ == "__main__":
    main(sys.stdin.buffer, sys.stdout.buffer)
