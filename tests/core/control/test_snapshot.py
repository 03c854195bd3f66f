"""A snapshot of etcd goes to folders where others may write, as backups do."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from controlplane.etcd.maintenance import Maintenance

CONTENT = b"all that a member has"


class Member:
    """One that answers with all of its store."""

    address = "127.0.0.1:2379"

    def __init__(self) -> None:
        self.maintenance = SimpleNamespace(Snapshot=self._snapshot)

    async def connected(self, _limit_s: float) -> bool:
        return True

    async def _snapshot(self, *_: Any, **__: Any) -> AsyncIterator[Any]:
        yield SimpleNamespace(blob=CONTENT)
        yield SimpleNamespace(blob=hashlib.sha256(CONTENT).digest())


def test_a_link_that_somebody_has_planted_is_not_followed(tmp_path: Path) -> None:
    mine, member = tmp_path / "mine", Member()
    mine.write_bytes(b"somebody's")
    (tmp_path / f".store.db.{os.getpid()}.part").symlink_to(mine)
    maintenance = Maintenance(cast(Any, SimpleNamespace(members=[member])))
    asyncio.run(maintenance.snapshot(member.address, tmp_path / "store.db"))
    assert mine.read_bytes() == b"somebody's"
    assert (tmp_path / "store.db").read_bytes().startswith(CONTENT)
    assert (tmp_path / "store.db").stat().st_mode & 0o777 == 0o600
