from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from call_in_thread import call_in_thread
from fake_nccl import FakeNccl

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


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNccl]:
    made = FakeNccl(monkeypatch)
    yield made
    made.let_go.set()


def test_the_communicator_forms_in_the_join_on_this_ranks_gpu(nccl: FakeNccl) -> None:
    group = ProcessGroup("cuda", 1)
    group.join(0, group.open_store("127.0.0.1"))
    [formed] = nccl.formed
    assert (formed["backend"], formed["device_id"]) == ("nccl", torch.device("cuda:1"))


def test_a_survivor_on_a_gpu_is_aborted_drops_its_graphs_and_joins_again(nccl: FakeNccl) -> None:
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


def test_a_rank_that_leaves_by_itself_does_not_wait_for_its_peers(nccl: FakeNccl) -> None:
    group = ProcessGroup("cuda", 1, [nccl.drop_graphs])
    group.join(0, group.open_store("127.0.0.1"))
    group.leave()
    assert nccl.events == ["formed", "abort begins", "graphs dropped", "abort ends"]


def test_a_communicator_that_is_never_given_up_is_an_error(nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_group, "ABORT_TIMEOUT_S", 0.05)
    group = ProcessGroup("cuda", 1)
    group.join(0, group.open_store("127.0.0.1"))
    with pytest.raises(RuntimeError, match=r"NCCL did not end its communicator within 0\.05 s"):
        group.leave()


def test_a_join_on_a_gpu_that_has_not_formed_is_ended_at_the_store(
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
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
    nccl: FakeNccl, monkeypatch: pytest.MonkeyPatch
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
