"""NCCL as `torch.distributed` shows it, for ranks on GPUs that are not there."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as dist


class FakeNccl:
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
        self.kernels_ended.clear()
        self.let_go.clear()
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
