from __future__ import annotations

import os
import socket

import pytest
from call_in_thread import call_in_thread

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
