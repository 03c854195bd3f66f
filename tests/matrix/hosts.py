"""A whole cluster on hosts of its own: each process in its own network namespace, with its own disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec

from controlplane.contract.config import ClusterConfig, EmulationConfig, EngineConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.etcd.server import etcd_command, etcd_version, find_etcd_binary
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.loadgen import LoadGenerator
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.supervise import SupervisorThread
from controlplane.kfadmin.up import demo_model
from tests.matrix.namespaces import Network

CLIENT = "client"
ETCD = ("etcd0", "etcd1", "etcd2")
CONTROLLERS = ("c1", "c2")
GATEWAYS = ("g1", "g2")
NODES = ("n0", "n1", "n2", "n3")  # p0 is n0 and n1, p1 is n2 and n3
SERVERS = (*ETCD, *CONTROLLERS, *GATEWAYS, *NODES)
GATEWAY_PORT, ADMIN_PORT, ETCD_PORT, ETCD_PEER_PORT = 8000, 8100, 2379, 2380

START_LIMIT_S = 60.0
END_GRACE_S = 0.5
POLL_S = 0.05
DISK_MB = {"etcd": 256, "database": 4, "other": 8}
CLIENT_PATIENCE_S = (
    8.0  # without a byte from its gateway, which sends a comment every 5 s: then it asks the other one
)

# Oracle: no tensors, a token is a hash of what the KV blocks hold, and a step of a stage takes about 10 ms.
ENGINE = EngineConfig(executor="oracle", pool_blocks=1024)
EMULATION = EmulationConfig(profile="a10-llama-8b-quarter", time_scale=4.0)


class HostCluster:
    """Two pipelines of two stages, two controllers, two gateways, three etcd members and a client's host.

    Use as a context manager. What runs where is named after its host: `n0`, `g1`, `c2`, `etcd1`. Everything that
    talks to the cluster has to be `network.inside(CLIENT)`.
    """

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self.network = Network((CLIENT, *SERVERS))
        self._supervisors: dict[str, SupervisorThread] = {}

    def __enter__(self) -> HostCluster:
        try:
            self._start()
        except BaseException:  # Ctrl-C as well
            self._stack.close()
            raise
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    # ---- starting

    def _start(self) -> None:
        for stale in Path(tempfile.gettempdir()).glob("kf-matrix-*"):  # of a test run that was killed
            if not Path("/proc", stale.name.split("-")[2]).exists():
                remove_folder(stale)
        self.folder = Path(tempfile.mkdtemp(prefix=f"kf-matrix-{os.getpid()}-"))
        self._stack.callback(remove_folder, self.folder)
        for name in SERVERS:
            self._mount(name, DISK_MB["etcd" if name in ETCD else "other"])
        self._mount("database", DISK_MB["database"])
        self._stack.enter_context(self.network)
        self._stack.callback(self._end)
        address = self.network.address
        self.config = ClusterConfig(
            run_dir=str(self.folder / SERVERS[0]), model=str(demo_model()),
            etcd=tuple(f"{address(name)}:{ETCD_PORT}" for name in ETCD),
            instances=2, stages=2, gateway_port=GATEWAY_PORT, admin_port=ADMIN_PORT, engine=ENGINE,
            emulation=EMULATION, database_url=f"sqlite+aiosqlite:///{self.folder}/database/history.db",
        )  # fmt: skip
        direct = {"no_proxy": ",".join(map(address, SERVERS)), "NO_PROXY": ",".join(map(address, SERVERS))}
        for name in SERVERS:
            self._prepare(name)
            self._supervisors[name] = SupervisorThread(self.run_dir(name), env=direct)
        with self.network.inside(CLIENT):
            self._run()
            self._wait_ready()

    def _prepare(self, name: str) -> None:
        """A host's settings, and the cluster's secret and API key, which every host has from its operator."""
        run_dir, first = self.run_dir(name), self.run_dir(SERVERS[0])
        if name != SERVERS[0]:
            for file in ("secret", "api-keys"):
                (run_dir.path / file).touch(mode=0o600)
                (run_dir.path / file).write_bytes((first.path / file).read_bytes())
        run_dir.prepare()
        own = msgspec.structs.replace(self.config, run_dir=str(run_dir.path), host=self.network.address(name))
        run_dir.write("cluster.json", own)

    def _run(self) -> None:
        binary = find_etcd_binary(os.environ)
        peers, hosts = (
            dict.fromkeys(ETCD, ETCD_PEER_PORT),
            {name: self.network.address(name) for name in ETCD},
        )
        etcd = partial(etcd_command, binary, members=peers, hosts=hosts, version=etcd_version(binary))
        for name in ETCD:
            self._spawn(name, etcd(name, self.run_dir(name).path / "etcd", ETCD_PORT, ETCD_PEER_PORT))
        for name in CONTROLLERS:
            self._spawn(name, self._python(name, "controlplane.main", "--id", name))
        for name in NODES:
            self._spawn(name, self._python(name, "dataplane.launcher", "--nodes", name))
        for name in GATEWAYS:
            self._spawn(name, self._python(name, "web.gateway.main", "--id", name))

    def _python(self, name: str, module: str, *arguments: str) -> list[str]:
        return [sys.executable, "-m", module, "--config", str(self.run_dir(name).config_file), *arguments]

    def _spawn(self, name: str, command: list[str]) -> None:
        child = (
            "launcher" if name in NODES else name
        )  # the launcher starts the node, whose file is called so, too
        self._supervisors[name].start(child, [*self.network.command(name), *command])

    def _wait_ready(self) -> None:
        deadline, last = time.monotonic() + START_LIMIT_S, ""
        while time.monotonic() < deadline:
            try:
                status = self.status()
            except KevlarFlowError as error:
                last = str(error)
            else:
                nodes = {node.node for node in status.nodes if node.state is NodeState.GREEN}
                up = [p for p in status.pipelines if p.state is PipelineState.UP]
                if nodes == set(NODES) and len(up) == 2 and len(status.gateways) == len(GATEWAYS):
                    return
                last = f"green: {sorted(nodes)}, up: {len(up)}, gateways: {len(status.gateways)}"
            time.sleep(POLL_S)
        raise KevlarFlowError(f"the cluster was not ready in {START_LIMIT_S} s: {last}\n{self.logs()}")

    # ---- talking to it

    @property
    def generator(self) -> LoadGenerator:
        """A client that knows every gateway."""
        first, *others = [f"http://{self.network.address(name)}:{GATEWAY_PORT}" for name in GATEWAYS]
        key = self.run_dir(GATEWAYS[0]).api_key()
        return LoadGenerator(first, key, self.config.model_name, tuple(others), CLIENT_PATIENCE_S)

    def admin(self) -> AdminClient:
        urls = [f"http://{self.network.address(name)}:{ADMIN_PORT}" for name in CONTROLLERS]
        return AdminClient(urls, self.run_dir(CONTROLLERS[0]).admin_token())

    def status(self) -> ClusterStatus:
        with self.admin() as admin:
            return admin.status()

    def run_dir(self, name: str) -> RunDir:
        return RunDir(self.folder / name)

    def logs(self, lines: int = 8) -> str:
        """The end of every log."""
        files = [
            (name, path.stem)
            for name in SERVERS
            for path in sorted((self.folder / name / "logs").glob("*.log"))
        ]
        return "\n".join(
            f"--- {name}: {stem}\n{self.run_dir(name).tail(stem, lines)}" for name, stem in files
        )

    # ---- processes

    def pid(self, name: str) -> int:
        """Raises ProcessLookupError when it does not run."""
        files = self.run_dir(name).processes("nodes" if name in NODES else "pids")
        if name not in files or not files[name].alive:
            raise ProcessLookupError(f"{name} is not running")
        return files[name].pid

    def signal(self, name: str, number: int) -> None:
        os.kill(self.pid(name), number)

    # ---- disks

    def _mount(self, name: str, size_mb: int) -> None:
        path = self.folder / name
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=0700", "kf-matrix", str(path)]
        subprocess.run(command, check=True, timeout=10.0)

    def fill_disk(self, name: str) -> None:
        """Not a byte more can be written on that host's disk, or on "database"."""
        with (self.folder / name / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:  # until there is no space
                file.write(bytes(4096))

    def free_disk(self, name: str) -> None:
        (self.folder / name / "filler").unlink()

    # ---- stopping

    def _end(self) -> None:
        with ThreadPoolExecutor(len(SERVERS)) as pool:
            list(pool.map(self._end_one, self._supervisors))

    def _end_one(self, name: str) -> None:
        supervisor = self._supervisors[name]
        supervisor.end(["launcher" if name in NODES else name], END_GRACE_S)
        supervisor.close()


def remove_folder(folder: Path) -> None:
    """With the disks that are mounted in it."""
    for path in folder.iterdir():
        if path.is_mount():
            subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=10.0)
    shutil.rmtree(folder, ignore_errors=True)  # the last process may be writing a line to its log
