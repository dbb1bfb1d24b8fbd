"""Ports of this machine: whether one is free, and who listens there, as far as this user may know."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from rayllm.errors import ConfigError
from rayllm.machine.processes import Process
from rayllm.machine.registry import find_at

_LISTENS = "0A"
_MAX_COMMAND = 60


def check_port(host: str, port: int) -> None:
    """`ConfigError` when nothing can listen there."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError:
        raise ConfigError(f"host={host!r} is not an address of this machine: use 127.0.0.1 or 0.0.0.0") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise ConfigError(
                f"port={port} needs privileges that this user does not have: use one above 1023"
            ) from None
        except OSError as error:
            holder = port_holder(port)
            by = f" by {holder}" if holder else ""
            in_use = f"port={port} on {host} is in use{by}: choose another with --port, or --port 0 for a free one"
            no_host = f"host={host!r} is not an address of this machine: use 127.0.0.1 or 0.0.0.0"
            raise ConfigError(in_use if error.errno == 98 else no_host) from None


def port_holder(port: int) -> str:
    """The server or the process that listens there, in a few words; empty where that cannot be known."""
    entry = find_at(str(port))
    if entry is not None:
        return f"the rayllm server {entry.name!r} (pid {entry.pid}, model {entry.model})"
    process = _listening_process(port)
    if process is None:
        return ""
    command = process.command_line() or process.command()
    return f"pid {process.pid} ({command if len(command) <= _MAX_COMMAND else command[:_MAX_COMMAND] + '...'})"


def _listening_process(port: int) -> Process | None:
    """Found by its socket; only processes whose files this user may see."""
    wanted = {f"socket:[{inode}]" for inode in _listening_sockets(port)}
    for folder in Path("/proc").glob("[0-9]*") if wanted else ():
        try:
            if any(os.readlink(link) in wanted for link in (folder / "fd").iterdir()):
                return Process(int(folder.name), 0)
        except OSError:  # another user's, or gone
            continue
    return None


def _listening_sockets(port: int) -> list[str]:
    """Inodes of the sockets that listen there."""
    found = []
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTENS and int(fields[1].rpartition(":")[2], 16) == port:
                found.append(fields[9])
    return found
