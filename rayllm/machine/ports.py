"""Who listens at a port of this machine, as far as this user may know."""

from __future__ import annotations

import os
from pathlib import Path

from rayllm.machine.processes import Process
from rayllm.machine.registry import find_at

_LISTENS = "0A"
_MAX_COMMAND = 60


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
