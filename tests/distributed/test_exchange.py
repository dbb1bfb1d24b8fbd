from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from rayllm.distributed.exchange import Exchange


def _by_rank(size: int, method: str, values: list[object]) -> list[object]:
    """What each rank, a thread, gets for its value."""
    store = dist.HashStore()
    with ThreadPoolExecutor(size) as pool:
        return list(
            pool.map(lambda rank: getattr(Exchange(store, rank, size), method)("key", values[rank]), range(size))
        )


def test_every_rank_gathers_all_values_in_order() -> None:
    assert _by_rank(3, "gather", ["a", "", "c d"]) == [["a", "", "c d"]] * 3


def test_every_rank_has_a_descriptor_of_every_others_file() -> None:
    files = [os.memfd_create("file") for _ in range(3)]
    for rank, file in enumerate(files):
        os.write(file, f"of rank {rank}".encode())
    for rank, fds in enumerate(_by_rank(3, "share_fd", [*files])):
        assert isinstance(fds, dict)
        assert sorted(fds) == [peer for peer in range(3) if peer != rank]
        for peer, fd in fds.items():
            assert os.pread(fd, 100, 0) == f"of rank {peer}".encode()
            os.close(fd)
    for file in files:
        os.close(file)


def test_a_rank_without_a_socket_is_named_by_all(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    deep = f"{tmp_path}/{'x' * 120}"
    os.makedirs(deep)
    monkeypatch.setattr(tempfile, "tempdir", deep)
    with pytest.raises(OSError, match="rank 0 cannot listen on a socket"):
        _by_rank(2, "share_fd", [0, 0])
