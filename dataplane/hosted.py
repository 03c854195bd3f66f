"""What a host's launcher is to run: the relay reads it off the topology and leaves it in a file.

The launcher forks, and so it has no connection of its own to anything.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NoReturn

import msgspec
import structlog

from controlplane.backoff import Backoff
from controlplane.contract.config import ClusterConfig
from controlplane.contract.files import replace_file
from controlplane.contract.hosting import WANTED_FILE, Wanted, wanted_here
from controlplane.contract.keys import Keys
from controlplane.etcd.client import EtcdClient
from controlplane.keyspace.view import View

log = structlog.get_logger()

BACKOFF_FIRST_S = 0.2
BACKOFF_MAX_S = 10.0


async def tell_launcher(client: EtcdClient, config: ClusterConfig) -> NoReturn:
    """Until cancelled: the file says what the newest topology asks for. While it cannot be written that is logged, once
    for each cause, and tried again."""
    keys = Keys.of(config)
    view = View(keys, config.group)
    backoff = Backoff(BACKOFF_FIRST_S, BACKOFF_MAX_S)
    written: Wanted | None = None
    async for batch in client.watch_prefix(keys.topology(config.group)):
        view.apply(batch)
        if view.topology is None:
            continue
        wanted, told = wanted_here(view.topology, config), ""
        while wanted != written:
            try:
                write_wanted(Path(config.run_dir), wanted)
                written = wanted
                backoff.succeeded()
            except OSError as error:
                if str(error) != told:
                    told = str(error)
                    log.error("the launcher cannot be told which nodes to run", error=told)
                await asyncio.sleep(backoff.next_s())
    raise AssertionError("a watch never ends by itself")


def write_wanted(run_dir: Path, wanted: Wanted) -> None:
    """Replaced at once. Raises OSError."""
    replace_file(run_dir / WANTED_FILE, msgspec.json.encode(wanted), durable=False)


class WantedFile:
    """The launcher's side."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / WANTED_FILE
        self._seen: tuple[int, int, int] = (0, 0, 0)

    def news(self) -> Wanted | None:
        """What the file says, if it is another one than at the last call; None: nothing new, or nothing to read. Raises
        OSError, or one of UNREADABLE; not again for the same file."""
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return None
        seen = stat.st_ino, stat.st_mtime_ns, stat.st_size
        if seen == self._seen:
            return None
        self._seen = seen
        return msgspec.json.decode(self._path.read_bytes(), type=Wanted)
