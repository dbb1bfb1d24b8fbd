from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from call_in_thread import call_in_thread

from rayllm.executor import process_group
from rayllm.executor.process_group import ProcessGroup


def test_the_rendezvous_store_listens_on_the_given_host_alone() -> None:
    group = ProcessGroup("cpu", 2)
    host, port = group.open_store("127.0.0.1")
    assert host == "127.0.0.1"
    with open("/proc/net/tcp") as table, open("/proc/net/tcp6") as table6:
        listening = [line.split()[1] for line in [*table, *table6] if f":{port:04X} " in line and " 0A " in line]
    assert listening == [f"0100007F:{port:04X}"]


def test_a_join_that_waits_for_a_peer_that_will_not_come_can_be_ended_and_tried_again() -> None:
    first = ProcessGroup("cpu", 2)
    ours, theirs = socket.socketpair()  # of another family, as Ray's own sockets are
    waiting = call_in_thread(lambda: first.join(0, first.open_store("127.0.0.1")))
    with pytest.raises(TimeoutError):
        waiting.result(0.5)
    num_files = len(os.listdir("/proc/self/fd"))
    first.abort()
    assert waiting.exception(5.0) is not None
    first.leave()
    assert len(os.listdir("/proc/self/fd")) <= num_files
    with ours, theirs:
        ours.send(b"still there")
        assert theirs.recv(20) == b"still there"


class _Nccl:
    """`torch.distributed` over NCCL as far as a group is formed and aborted: an abort ends the kernels at once, and
    itself once no graph holds the communicator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.events: list[str] = []
        self.formed: list[dict[str, object]] = []
        self.kernels_ended, self.let_go = threading.Event(), threading.Event()
        monkeypatch.setattr(dist, "is_initialized", lambda: bool(self.formed))
        monkeypatch.setattr(dist, "init_process_group", self._form)
        monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("it would wait for the peers"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr("rayllm.torch_private.abort_collectives", self._abort)

    def _form(self, backend: str, **arguments: object) -> None:
        self.events.append("formed")
        self.formed.append({"backend": backend, **arguments})

    def _abort(self) -> None:
        self.events.append("abort begins")
        self.kernels_ended.set()
        self.let_go.wait(10.0)
        self.formed.clear()
        self.events.append("abort ends")

    def compute(self) -> None:
        """A step whose kernels wait for a peer that has died."""
        assert self.kernels_ended.wait(10.0)
        self.events.append("step returns")

    def drop_graphs(self) -> None:
        self.events.append("graphs dropped")
        self.let_go.set()


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Nccl]:
    made = _Nccl(monkeypatch)
    yield made
    made.let_go.set()


def test_the_communicator_forms_in_the_join_on_this_ranks_gpu(nccl: _Nccl) -> None:
    group = ProcessGroup("cuda", 1)
    group.join(0, group.open_store("127.0.0.1"))
    [formed] = nccl.formed
    assert (formed["backend"], formed["device_id"]) == ("nccl", torch.device("cuda:1"))


def test_a_survivor_on_a_gpu_is_aborted_drops_its_graphs_and_joins_again(nccl: _Nccl) -> None:
    group = ProcessGroup("cuda", 1, [nccl.drop_graphs])

    def serve() -> None:
        nccl.compute()
        group.leave()

    group.join(0, group.open_store("127.0.0.1"))
    step = call_in_thread(serve)
    group.abort()  # of the thread that answers the driver, which is free again at once
    group.abort()
    step.result(5.0)
    group.join(0, group.open_store("127.0.0.1"))
    assert nccl.events == ["formed", "abort begins", "step returns", "graphs dropped", "abort ends", "formed"]


def test_a_rank_that_leaves_by_itself_does_not_wait_for_its_peers(nccl: _Nccl) -> None:
    group = ProcessGroup("cuda", 1, [nccl.drop_graphs])
    group.join(0, group.open_store("127.0.0.1"))
    group.leave()
    assert nccl.events == ["formed", "abort begins", "graphs dropped", "abort ends"]


def test_a_communicator_that_is_never_given_up_is_an_error(nccl: _Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "ABORT_TIMEOUT_S", 0.05)
    group = ProcessGroup("cuda", 1)
    group.join(0, group.open_store("127.0.0.1"))
    with pytest.raises(RuntimeError, match=r"NCCL did not end its communicator within 0\.05 s"):
        group.leave()


def test_a_join_on_a_gpu_that_has_not_formed_is_ended_at_the_store(
    nccl: _Nccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = ProcessGroup("cuda", 2)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **arguments: arguments["store"].wait(["never set"]))
    waiting = call_in_thread(lambda: group.join(0, group.open_store("127.0.0.1")))
    with pytest.raises(TimeoutError):
        waiting.result(0.3)
    group.abort()
    assert waiting.exception(5.0) is not None
    assert nccl.events == []


def test_nccl_that_does_not_connect_is_an_error_in_time_and_its_process_joins_no_other_group(
    nccl: _Nccl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(process_group.COLLECTIVE_TIMEOUT_S, "cuda", 0.1)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **arguments: nccl.let_go.wait(10.0))
    group = ProcessGroup("cuda", 2)
    with pytest.raises(TimeoutError, match=r"NCCL did not connect 2 ranks within 0\.1 s: look at the links"):
        group.join(0, group.open_store("127.0.0.1"))
    with pytest.raises(RuntimeError, match="cannot join another group"):
        group.open_store("127.0.0.1")
    with pytest.raises(RuntimeError, match="cannot join another group"):
        group.join(1, ("127.0.0.1", 1))
