"""What one controller costs as the cluster grows: a real process, real gRPC and etcd, and nodes that only report.

The controller has one core to itself; etcd and the simulated nodes (scale_nodes.py) share the others. For each size:
the group forms; calm, in which every node serves; ten nodes die, come back, and get their duties handed back; somebody
asks what a restart of all nodes would do, and half of the instances are to go, until they are wanted back; and then one
node of twenty dies in the same moment.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from bench.contract import Result, percentile, progress
from bench.scale_nodes import NODES_PER_HOST, Fleet, settled
from controlplane.contract.auth import create_secret, derive
from controlplane.contract.config import ClusterConfig, TimingConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.keys import Keys, decode
from controlplane.contract.records import ControllerRecord
from controlplane.contract.status import OperationRequest
from controlplane.contract.topology import Topology
from controlplane.etcd.client import EtcdClient
from controlplane.etcd.server import etcd_command, find_etcd_binary
from controlplane.kfadmin.client import AdminClient

OPTIONS = ("only",)
SIZES = (64, 256, 1000, 4000)
STAGES = 4
HAND_BACKS = 10
STORM_SHARE = 0.05
REST_S = 7.0  # longer than every pause of the planner (policy.Limits), and one lease
FORM_LIMIT_S = 300.0
MOVES_LIMIT_S = 120.0
LEAVING_S = 20.0  # for so long half of the instances leave ...
ASK_EVERY_S = 0.25  # ... and so often the controller is asked something meanwhile
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


class NotReached(KevlarFlowError):
    """The cluster did not get where a measurement begins or ends."""


def run(quick: bool, only: frozenset[str] = frozenset()) -> Result:
    sizes = [size for size in SIZES if not only or str(size) in only]
    calm_s = 10.0 if quick else 60.0
    result = Result(
        "scale",
        settings={"stages": STAGES, "nodes_per_host": NODES_PER_HOST, "calm_s": calm_s, "quick": quick},
    )
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="kf-scale-") as folder:
            asyncio.run(_measure(size, Path(folder), calm_s, result))
    if 64 in sizes and 4000 in sizes:
        each = {n: result.metrics[f"cpu_share_{n}"] / n for n in (64, 4000)}
        result.ratios["cost_per_node_4000_64"] = each[64] / each[4000]
        result.metrics["cost_per_node_growth"] = each[4000] / each[64]
    return result


async def _measure(size: int, folder: Path, calm_s: float, result: Result) -> None:
    port = free_port()
    config = ClusterConfig(
        run_dir=str(folder),
        model=str(folder / "none"),
        etcd=(f"127.0.0.1:{port}",),
        instances=size // STAGES,
        stages=STAGES,
        admin_port=0,
        # Thousands on one core take longer to register than the default grace, after which nobody waits for homes.
        timing=TimingConfig(form_grace_s=FORM_LIMIT_S),
    )
    (folder / "cluster.json").write_bytes(msgspec.json.encode(config))
    secret = create_secret(config.secret_file)
    with _processes(folder, port) as controller:
        async with EtcdClient(config.etcd) as client:
            record = await _controller(client, Keys.of(config))
            fleet = Fleet(config, client, derive(secret, "grpc"), record.rpc_address)
            try:
                with AdminClient([f"http://{record.admin_address}"], derive(secret, "admin")) as admin:
                    await _phases(size, fleet, controller, admin, calm_s, result)
            finally:
                await fleet.stop()
                _show_errors(folder / "controller.log")


async def _phases(
    size: int,
    fleet: Fleet,
    controller: subprocess.Popen[bytes],
    admin: AdminClient,
    calm_s: float,
    result: Result,
) -> None:
    metrics, pid = result.metrics, controller.pid
    began = time.monotonic()
    await fleet.start()
    await _until(lambda: settled(fleet.topology), FORM_LIMIT_S, "the group formed", fleet)
    metrics[f"form_s_{size}"] = time.monotonic() - began
    metrics[f"form_writes_{size}"] = fleet.writes
    _tell(size, "formed", metrics)
    await asyncio.sleep(REST_S)

    fleet.late_s = 0.0
    metrics[f"cpu_share_{size}"] = await _cpu_share(pid, calm_s)
    metrics[f"memory_bytes_{size}"] = _memory_bytes(pid)
    metrics[f"heartbeat_late_max_s_{size}"] = fleet.late_s
    _tell(size, "calm", metrics)

    chosen = random.Random(size)
    # One of an instance, and no two neighbours in the ring: each has somebody to go to.
    places = chosen.sample(range(size // STAGES // 2), min(HAND_BACKS, size // STAGES // 2))
    victims = [f"n{2 * place * STAGES + chosen.randrange(STAGES)}" for place in places]
    fleet.kill(victims)
    await _until(lambda: _written(fleet, victims), 30.0, "ten deaths were written", fleet)
    await asyncio.sleep(REST_S)
    before = fleet.writes
    used, began = _cpu_s(pid), time.monotonic()
    await fleet.restart(victims)
    await _until(lambda: settled(fleet.topology), MOVES_LIMIT_S, "ten hand-backs", fleet)
    took_s = time.monotonic() - began
    metrics[f"move_cpu_share_{size}"] = (_cpu_s(pid) - used) / took_s
    metrics[f"move_s_{size}"] = took_s
    metrics[f"move_writes_{size}"] = fleet.writes - before
    _tell(size, "hand-backs", metrics)
    await asyncio.sleep(REST_S)

    await _operations(size, fleet, controller.pid, admin, metrics)
    _tell(size, "operations", metrics)
    await asyncio.sleep(REST_S)

    storm = chosen.sample(sorted(fleet.nodes), max(1, round(size * STORM_SHARE)))
    before = fleet.writes
    members = [fleet.nodes[name].member for name in storm]
    fleet.kill(storm)
    await _until(
        lambda: all(m in fleet.written for m in members), 60.0, "the storm's deaths were written", fleet
    )
    delays = [fleet.written[m] for m in members]
    metrics[f"kill_to_write_p50_s_{size}"] = percentile(delays, 0.5)
    metrics[f"kill_to_write_p99_s_{size}"] = percentile(delays, 0.99)
    metrics[f"kill_to_write_max_s_{size}"] = max(delays)
    metrics[f"storm_writes_{size}"] = fleet.writes - before
    metrics[f"streams_broken_{size}"] = fleet.broken
    _tell(size, "storm", metrics)


async def _operations(
    size: int, fleet: Fleet, pid: int, admin: AdminClient, metrics: dict[str, float]
) -> None:
    async def submit(name: str, kind: str, **more: Any) -> float:
        """How long the answer takes, seconds."""
        began = time.monotonic()
        request = OperationRequest(name, kind, **more)
        answer = await asyncio.to_thread(admin.submit, request)
        if not (answer.accepted or request.dry_run):
            raise NotReached(f"{kind} was refused: {answer.checks}")
        return time.monotonic() - began

    metrics[f"restart_preflight_s_{size}"] = await submit("try", "restart", node="nodes", dry_run=True)
    instances = size // STAGES
    before, used, began = fleet.writes, _cpu_s(pid), time.monotonic()
    await submit("fewer", "scale", instances=instances // 2)
    answers = []
    while time.monotonic() < began + LEAVING_S:
        await asyncio.sleep(ASK_EVERY_S)
        answers.append(await submit("probe", "pause", dry_run=True))
    metrics[f"scale_in_cpu_share_{size}"] = (_cpu_s(pid) - used) / (time.monotonic() - began)
    metrics[f"scale_in_writes_{size}"] = fleet.writes - before
    metrics[f"scale_in_answer_max_s_{size}"] = max(answers)
    await asyncio.to_thread(admin.cancel, "fewer")
    deadline = time.monotonic() + MOVES_LIMIT_S
    while any(o.open for o in await asyncio.to_thread(admin.operations)):  # its leader hears of it from etcd
        if time.monotonic() > deadline:
            raise NotReached(f"not within {MOVES_LIMIT_S:g} s: the operation was over")
        await asyncio.sleep(ASK_EVERY_S)
    await submit("more", "scale", instances=instances)
    await _until(lambda: _whole(fleet.topology), MOVES_LIMIT_S, "all instances were wanted back", fleet)


def _whole(topology: Topology | None) -> bool:
    """Nobody is to go, and all is as it was."""
    return topology is not None and not topology.leaving and settled(topology)


def _tell(size: int, phase: str, metrics: dict[str, float]) -> None:
    """All that is known after a phase, so that a run which fails later has not been for nothing."""
    known = (f"{k.removesuffix(f'_{size}')} {v:.4g}" for k, v in metrics.items() if k.endswith(f"_{size}"))
    progress(f"{size} nodes, {phase}: {', '.join(known)}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _written(fleet: Fleet, names: list[str]) -> bool:
    return all(fleet.nodes[name].member in fleet.written for name in names)


async def _until(holds: Callable[[], bool], limit_s: float, what: str, fleet: Fleet) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        fleet.check()
        if time.monotonic() > deadline:
            raise NotReached(f"not within {limit_s:g} s: {what}")
        await asyncio.sleep(0.05)


async def _controller(client: EtcdClient, keys: Keys) -> ControllerRecord:
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        for key, item in (await client.get_prefix(keys.controllers, timeout_s=20.0)).items.items():
            return decode(item.value, ControllerRecord, key)
        await asyncio.sleep(0.05)
    raise NotReached("the controller did not register")


async def _cpu_share(pid: int, seconds: float) -> float:
    used, began = _cpu_s(pid), time.monotonic()
    await asyncio.sleep(seconds)
    return (_cpu_s(pid) - used) / (time.monotonic() - began)


def _cpu_s(pid: int) -> float:
    """User and system time of a process, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS


def _memory_bytes(pid: int) -> int:
    """What is resident and nobody else's."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    kinds = ("Private_Clean:", "Private_Dirty:")
    return 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(kinds))


@contextmanager
def _processes(folder: Path, etcd_port: int) -> Iterator[subprocess.Popen[bytes]]:
    """etcd, and a controller on a core of its own (where there are two); this process stays off that core."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[1:] or cores)
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], name: str, core: int | None = None) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        started.append(process)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        return process

    try:
        start(
            etcd_command(find_etcd_binary(os.environ), "e1", folder / "etcd", etcd_port, free_port()), "etcd"
        )
        module = [sys.executable, "-m", "controlplane.main", "--config", str(folder / "cluster.json")]
        yield start([*module, "--id", "c1"], "controller", cores[0])
    finally:
        for process in reversed(started):
            process.kill()
            process.wait(10)
        os.sched_setaffinity(0, cores)


def _show_errors(log: Path) -> None:
    for line in log.read_text(errors="replace").splitlines():
        if '"level": "error"' in line or "Traceback" in line:
            progress(f"the controller said: {line[:300]}")
