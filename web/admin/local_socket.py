"""The admin API on a Unix socket in the run directory, for kfadmin on the same host.

On a port of loopback another user of the machine could listen while nothing of ours does, and would be sent the
admin token. Nobody but our own user can make, or reach, a socket in the run directory (0700).
"""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import structlog
import uvicorn

from controlplane.contract.address import admin_socket

log = structlog.get_logger()


async def serve_locally(server: uvicorn.Server, run_dir: Path, controller: str, held: asyncio.Event) -> None:
    """Until cancelled: from when `held` is set on, so that a process that waits for its name takes nothing from the one
    that has it. What keeps it from that is told; ports serve on."""
    path = admin_socket(run_dir, controller)
    try:
        await held.wait()
        if path is not None:
            with _bound(path) as made:
                await server.serve(sockets=[made])
                return
        log.info("no admin socket: the run directory's path is too long", run_dir=str(run_dir))
    except OSError as error:
        log.warning("no admin socket: kfadmin asks the port", path=str(path), error=str(error))
    await asyncio.Event().wait()


def _bound(path: Path) -> socket.socket:
    """In place of what a controller of this name has left. Raises OSError."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fresh = path.with_name(f"{os.getpid()}.new")
    fresh.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.bind(str(fresh))
        fresh.chmod(0o600)
        made.listen()
        fresh.replace(path)
    except OSError:
        made.close()
        raise
    return made
