"""The driver's end of the sockets to its workers: one plan to all of them, one rank's result back. No Ray in here."""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from rayllm.errors import WorkerDiedError
from rayllm.executor.channel import Channel, FrameTooLargeError, FrameWriter, PeerGoneError
from rayllm.executor.executor import Selectable
from rayllm.messages import StepPlan, StepResult, WorkerFailure

_CAUSE_GRACE_S = 0.1
"""After the first sign of a loss: how long to wait for a better one. One worker's death makes the others'
collectives fail, and Ray names the cause of a death a little after the socket's end.
"""


class _Loss:
    """What is known of one worker's end. A death explains its peers' failures; a stated cause is better
    than none.
    """

    def __init__(self, rank: int, reason: str, *, died: bool, certain: bool):
        self.rank = rank
        self.reason = reason
        self.died = died
        self.certain = certain


class WorkerLinks:
    """Channels to all ranks, in order of rank, of which one answers. Never blocks on a worker that does not
    read: what does not fit its socket is kept, and goes out while results are awaited.

    One thread uses it; `report_loss` alone may be called from any thread.
    """

    def __init__(self, channels: Sequence[Channel], answering_rank: int = 0):
        self._channels = list(channels)
        self._answering_rank = answering_rank
        self._writer = FrameWriter()
        self._result_decoder = msgspec.msgpack.Decoder(StepResult)
        self._failure_decoder = msgspec.msgpack.Decoder(WorkerFailure)
        self._results: deque[StepResult] = deque()
        self._backlogs = [bytearray() for _ in channels]
        self._losses: dict[int, _Loss] = {}
        self._failure: WorkerDiedError | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._selector.register(self._wake_out, selectors.EVENT_READ, None)
        for rank, channel in enumerate(self._channels):
            self._selector.register(channel, selectors.EVENT_READ, rank)

    def result_socket(self) -> Selectable:
        """Readable while a result or a sign of loss waits to be taken."""
        return self._selector  # those of epoll and kqueue have a fileno

    def send(self, plan: StepPlan) -> None:
        """One frame to every worker; returns at once."""
        frame = self._writer.frame(plan)
        for rank, channel in enumerate(self._channels):
            if rank in self._losses:
                continue
            backlog = self._backlogs[rank]
            if backlog:
                backlog += frame
                continue
            try:
                sent = channel.send_some(frame)
            except PeerGoneError as error:
                self._lose(rank, str(error), died=True)
                continue
            if sent < len(frame):
                backlog += memoryview(frame)[sent:]
                self._selector.modify(channel, selectors.EVENT_READ | selectors.EVENT_WRITE, rank)

    def receive(self, timeout_s: float | None) -> StepResult:
        """The next result. Raises `WorkerDiedError`, the same one ever after, and `TimeoutError`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._losses:
                self._raise_loss()
            if self._results:
                return self._results.popleft()
            if not self._wait(deadline):
                raise TimeoutError(f"no result of the step within {timeout_s} s")

    def check(self) -> None:
        """Raises `WorkerDiedError` when a worker is lost; does not wait."""
        self._wait(time.monotonic())
        if self._losses:
            self._raise_loss()

    @property
    def is_closed(self) -> bool:
        return self._closed

    def dead_ranks(self) -> set[int]:
        """Ranks that are known to have died, rather than to have failed in a step."""
        with self._lock:
            return {rank for rank, loss in self._losses.items() if loss.died}

    def report_loss(self, rank: int, reason: str, *, died: bool = True) -> None:
        """Ray says that the worker's process has ended, or has stopped serving, and why. From any thread."""
        with self._lock:
            known = self._losses.get(rank)
            if known is None or (known.died and died):
                self._losses[rank] = _Loss(rank, reason, died=died, certain=True)
            if not self._closed:
                with contextlib.suppress(OSError):
                    self._wake_in.send(b"\0")

    def close(self) -> None:
        """Workers read the end of the stream and leave."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._selector.close()
        for channel in self._channels:
            channel.close()
        self._wake_in.close()
        self._wake_out.close()

    def _wait(self, deadline: float | None) -> bool:
        """Waits until something came, and takes it; False when the time is up."""
        ready = self._selector.select(None if deadline is None else max(0.0, deadline - time.monotonic()))
        for key, events in ready:
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    self._wake_out.recv(4096)
                continue
            if events & selectors.EVENT_WRITE:
                self._flush(key.data)
            if events & selectors.EVENT_READ:
                self._read(key.data)
        return bool(ready)

    def _read(self, rank: int) -> None:
        try:
            for frame in self._channels[rank].read_some():
                self._take(rank, frame)
        except (PeerGoneError, FrameTooLargeError) as error:
            self._lose(rank, str(error), died=True)

    def _take(self, rank: int, frame: memoryview) -> None:
        if rank == self._answering_rank:
            with contextlib.suppress(msgspec.DecodeError):
                self._results.append(self._result_decoder.decode(frame))
                return
        try:
            self._lose(rank, self._failure_decoder.decode(frame).reason, died=False)
        except msgspec.MsgspecError as error:
            self._lose(rank, f"it sent a frame that is neither a result nor a failure: {error}", died=True)

    def _flush(self, rank: int) -> None:
        backlog = self._backlogs[rank]
        try:
            del backlog[: self._channels[rank].send_some(backlog)]
        except PeerGoneError as error:
            self._lose(rank, str(error), died=True)
        if not backlog and rank not in self._losses:
            self._selector.modify(self._channels[rank], selectors.EVENT_READ, rank)

    def _lose(self, rank: int, reason: str, *, died: bool) -> None:
        with self._lock:
            self._losses.setdefault(rank, _Loss(rank, reason, died=died, certain=not died))
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(self._channels[rank])

    def _raise_loss(self) -> None:
        if self._failure is None:
            deadline = time.monotonic() + _CAUSE_GRACE_S
            while self._best_loss() is None and self._wait(deadline):
                pass
            with self._lock:
                losses = list(self._losses.values())
            # Dead ranks first (their peers only suffered), then whoever spoke first.
            loss = next((loss for loss in losses if loss.died), losses[0])
            self._failure = WorkerDiedError(loss.rank, loss.reason)
        raise self._failure

    def _best_loss(self) -> _Loss | None:
        with self._lock:
            return next((loss for loss in self._losses.values() if loss.died and loss.certain), None)
