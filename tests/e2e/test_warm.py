"""Clusters of tests begin quicker than others, and are the same: see `tests/e2e/warm.py`."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from controlplane.process import parent_of
from tests.e2e.cluster import Cluster


def program_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()


def test_a_first_start_has_its_place_and_a_second_one_is_the_program(home: Cluster) -> None:
    before = home.local.pids()
    for name in ("c1", "c2", "g1", "launcher"):
        pid = before[name]
        assert parent_of(pid) == os.getpid(), name
        assert os.getpgid(pid) == pid, name
        assert os.getsid(pid) == os.getsid(0), name
        assert os.readlink(f"/proc/{pid}/fd/0") == os.devnull, name
        assert os.readlink(f"/proc/{pid}/fd/1") == str(home.local.run_dir.log(name)), name
        assert Path(f"/proc/{pid}/environ").read_bytes().count(b"NO_PROXY=") == 1, name
    home.kill("g1")
    asyncio.run(
        home.wait_for(lambda s: [g.pid for g in s.gateways] not in ([], [before["g1"]]), "g1 is back", 60.0)
    )
    pid = home.local.pids()["g1"]
    assert pid != before["g1"]
    assert f"-m web.gateway.main --config {home.local.run_dir.config_file}" in program_of(pid)
    assert parent_of(pid) == os.getpid()
