"""Restarting the processes of this machine that the cluster does not see: the launcher and etcd's members.

`kfadmin up` starts each again as soon as it has ended; elsewhere the machine's own supervisor does so.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.identity import ProcessName, ProcessRole
from controlplane.kfadmin.client import Refused
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.secure import etcd_healthy, etcd_tls
from controlplane.supervisor import ProcessFile

POLL_S = 0.05
RESTART_LIMIT_S = 30.0
ETCD_MEMBERS_MIN = 3  # fewer lose their quorum with one


def restart_launcher(run_dir: RunDir, dry_run: bool) -> None:
    """A fresh launcher adopts the nodes that run; they do not notice. It returns when that one looks after them.

    Raises Refused, KevlarFlowError."""
    old, relay = _running(run_dir, "launcher"), run_dir.processes("relay").get("relay")
    if dry_run:
        progress(f"restart the launcher (pid {old.pid}); its nodes run on")
        return
    os.kill(old.pid, signal.SIGHUP)  # SIGTERM would end the nodes as well
    fresh = _wait_fresh(run_dir, "launcher", old)
    if relay is not None and not (run_dir.path / "hold" / "relay").exists():
        # Its pid is there seconds before it can start a node; a relay of its own is the last thing that it waits for.
        _wait_fresh(run_dir, "relay", relay, "relay")
    print(f"launcher restarted: pid {old.pid} -> {fresh.pid}")


def restart_etcd(run_dir: RunDir, dry_run: bool) -> None:
    """One member after the other; each has to be healthy before the next goes. Raises Refused, KevlarFlowError."""
    members = {
        name: address
        for number, address in enumerate(run_dir.config().etcd)
        if (name := f"etcd{number}") in run_dir.processes("pids")
    }
    if len(members) < ETCD_MEMBERS_MIN:
        raise Refused(
            f"etcd has {len(members)} members here: restarting one of fewer than {ETCD_MEMBERS_MIN} stops "
            "reconfiguration meanwhile (`kfadmin up --etcd-members 3`)"
        )
    config = run_dir.config()
    tls = {name: etcd_tls(config, ProcessName(ProcessRole.ETCD, name)) for name in members}
    sick = [name for name, address in members.items() if not etcd_healthy(address, tls[name])]
    if sick:
        raise Refused(f"not healthy: {', '.join(sick)}; mend that first")
    for name, address in members.items():
        old = _running(run_dir, name)
        if dry_run:
            progress(f"restart {name} (pid {old.pid}), wait until it is healthy")
            continue
        os.kill(old.pid, signal.SIGTERM)
        fresh = _wait_fresh(run_dir, name, old)
        _wait(lambda at=address, by=tls[name]: etcd_healthy(at, by), f"{name} is healthy again")  # type: ignore[misc]
        print(f"{name} restarted: pid {old.pid} -> {fresh.pid}")


def _running(run_dir: RunDir, name: str, folder: str = "pids") -> ProcessFile:
    file = run_dir.processes(folder).get(name)
    if file is None or not file.alive:
        raise Refused(f"{name} does not run in {run_dir.path}")
    return file


def _wait_fresh(run_dir: RunDir, name: str, old: ProcessFile, folder: str = "pids") -> ProcessFile:
    def fresh() -> bool:
        file = run_dir.processes(folder).get(name)
        return file is not None and (file.pid, file.start_ticks) != (old.pid, old.start_ticks) and file.alive

    _wait(fresh, f"a fresh {name} runs (the logs in {run_dir.log(name).parent} say what keeps it)")
    return _running(run_dir, name, folder)


def _wait(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + RESTART_LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise KevlarFlowError(f"waited {RESTART_LIMIT_S:g} s until {what}; the rest was left as it is")
        time.sleep(POLL_S)
