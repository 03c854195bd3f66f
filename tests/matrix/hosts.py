"""A whole cluster on hosts of its own: each process in its own network namespace, with its own disk."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from controlplane.certs.folder import CertFolder
from controlplane.contract.config import ClusterConfig, EmulationConfig, EngineConfig, TlsConfig
from controlplane.contract.errors import KevlarFlowError
from controlplane.contract.identity import RELAY_NAME, ProcessName, ProcessRole, etcd_name
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.etcd.server import ServerTls, etcd_command, etcd_version, find_etcd_binary
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.loadgen import LoadGenerator
from controlplane.kfadmin.rundir import RunDir
from controlplane.kfadmin.secure import etcd_healthy
from controlplane.kfadmin.supervise import SupervisorThread
from controlplane.kfadmin.up import demo_model
from tests.matrix.cells import Shape
from tests.matrix.namespaces import Network

CLIENT = "client"
ETCD = ("etcd0", "etcd1", "etcd2")
CONTROLLERS = ("c1", "c2")
GATEWAYS = ("g1", "g2")
INSTANCES = 2  # pipelines
SPARE = "spare"  # where nothing runs but what a fault begins
GATEWAY_PORT, ADMIN_PORT, ETCD_PORT, ETCD_PEER_PORT = 8000, 8100, 2379, 2380

START_LIMIT_S = 180.0  # on a machine that is busy with other things
END_GRACE_S = 0.5
TWIN_END_LIMIT_S = 10.0
POLL_S = 0.05
ROOT = Path(__file__).parents[2]
KEPT = Path(".pytest_cache", "matrix")  # of cells that failed
EVENTS_KEPT = 200
DISK_MB = {"etcd": 256, "database": 4, "other": 8}
# Without a byte from its gateway, which sends a comment every 5 s: then it asks the other one.
CLIENT_PATIENCE_S = 8.0

# Oracle: no tensors, a token is a hash of what the KV blocks hold. Computing: the demo model, two threads a node.
ORACLE = EngineConfig(executor="oracle", pool_blocks=1024)
COMPUTING = EngineConfig(pool_blocks=1024, threads=2)
PROFILE = "a10-llama-8b-quarter"
STEP_SCALE = 8.0  # over the stages: a step of all of them takes 20 ms, about, however many they are


class HostCluster:
    """Two pipelines, two controllers, two gateways, three etcd members, a client's host and a spare one.

    Use as a context manager. What runs where is named after its host: `n0`, `g1`, `c2`, `etcd1`. Everything that
    talks to the cluster has to be `network.inside(CLIENT)`.
    """

    def __init__(self, shape: Shape = Shape.FOUR, secure: bool = False) -> None:
        """`secure`: each host has certificates of its own processes, and nothing between hosts is in clear."""
        self._secure = secure
        self._stack = contextlib.ExitStack()
        self._stages = shape.stages
        self._engine = COMPUTING if shape is Shape.COMPUTING else ORACLE
        self.nodes = tuple(f"n{k}" for k in range(INSTANCES * shape.stages))  # p0's, then p1's
        self.servers = (*ETCD, *CONTROLLERS, *GATEWAYS, *self.nodes)
        self.network = Network((CLIENT, SPARE, *self.servers))
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
        for name in (*self.servers, SPARE):
            self._mount(name, DISK_MB["etcd" if name in ETCD else "other"])
        self._mount("database", DISK_MB["database"])
        self._stack.enter_context(self.network)
        self._stack.callback(self._end)
        address = self.network.address
        emulation = EmulationConfig()
        if self._engine is ORACLE:
            emulation = EmulationConfig(profile=PROFILE, time_scale=STEP_SCALE / self._stages)
        self.config = ClusterConfig(
            run_dir=str(self.folder / ETCD[0]), model=str(demo_model()),
            etcd=tuple(f"{address(name)}:{ETCD_PORT}" for name in ETCD),
            insecure=True,  # a network of its own
            instances=INSTANCES, stages=self._stages, gateway_port=GATEWAY_PORT, admin_port=ADMIN_PORT,
            engine=self._engine, emulation=emulation, database_url=f"sqlite+aiosqlite:///{self.folder}/database/history.db",
        )  # fmt: skip
        all_addresses = ",".join(map(address, self.servers))
        self._direct = {"no_proxy": all_addresses, "NO_PROXY": all_addresses}
        self.certs = CertFolder(self.folder / "operator")
        if self._secure:
            self._certify()
        for name in (*self.servers, SPARE):
            self._prepare(name)
        for name in self.servers:
            self._supervisors[name] = SupervisorThread(self.run_dir(name), env=self._direct)
        with self.network.inside(CLIENT):
            self._run()
            self._wait_ready()

    def _prepare(self, name: str) -> None:
        """A host's settings, and the cluster's secret and API key, which every host has from its operator."""
        run_dir, first = self.run_dir(name), self.run_dir(ETCD[0])
        if name != ETCD[0]:
            for file in ("secret", "api-keys"):
                (run_dir.path / file).touch(mode=0o600)
                (run_dir.path / file).write_bytes((first.path / file).read_bytes())
        run_dir.prepare()
        own = msgspec.structs.replace(self.config, run_dir=str(run_dir.path), host=self.network.address(name))
        if self._secure:
            self.deliver(name)
            own = msgspec.structs.replace(own, tls=self._tls(name), insecure=False)
        run_dir.write("cluster.json", own)

    # ---- certificates

    def _certify(self) -> None:
        now = datetime.now(UTC)
        self.certs.create(self.config.cluster, now)
        of_role = {
            ProcessRole.ETCD: ETCD,
            ProcessRole.CONTROLLER: CONTROLLERS,
            ProcessRole.GATEWAY: GATEWAYS,
            ProcessRole.NODE: self.nodes,
        }
        for role, names in of_role.items():
            for name in names:
                self.certs.issue([ProcessName(role, name)], [self.network.address(name)], now)
        self.certs.issue([ProcessName(ProcessRole.RELAY, RELAY_NAME)], (), now)

    def deliver(self, name: str) -> None:
        """Bring a host what it needs of the operator's folder, as it is now: its own processes' files."""
        target = self.run_dir(name).path / "certs"
        target.mkdir(mode=0o700, exist_ok=True)
        host = f"{ProcessRole.RELAY.value}-{RELAY_NAME}"
        for file in (self.certs.ca, *self.certs.path.glob(f"*-{name}.pem"), self.certs.path / f"{host}.pem"):
            fresh = target / f"{file.name}.new"
            fresh.touch(mode=0o600)
            fresh.write_bytes(file.read_bytes())
            fresh.replace(target / file.name)

    def _tls(self, name: str) -> TlsConfig:
        folder = self.run_dir(name).path / "certs"
        etcd = etcd_name(self.config.cluster)
        return TlsConfig(ca=str(folder / "ca.pem"), cert=str(folder / "{process}.pem"), etcd_name=etcd)

    def _etcd_tls(self, name: str) -> ServerTls | None:
        if not self._secure:
            return None
        ca, cert, key = map(Path, self._tls(name).paths(str(ProcessName(ProcessRole.ETCD, name))))
        return ServerTls(ca, cert, key)

    def etcd_healthy(self, name: str) -> bool:
        return etcd_healthy(f"{self.network.address(name)}:{ETCD_PORT}", self._etcd_tls(name))

    def _run(self) -> None:
        binary = find_etcd_binary(os.environ)
        peers, hosts = (
            dict.fromkeys(ETCD, ETCD_PEER_PORT),
            {name: self.network.address(name) for name in ETCD},
        )
        etcd = partial(etcd_command, binary, members=peers, hosts=hosts, version=etcd_version(binary))
        for name in ETCD:
            data, tls = self.run_dir(name).path / "etcd", self._etcd_tls(name)
            self._spawn(name, etcd(name, data, ETCD_PORT, ETCD_PEER_PORT, tls=tls))
        for name in (*CONTROLLERS, *self.nodes, *GATEWAYS):
            self._spawn(name, self._python(name, host=name))

    def _python(self, name: str, host: str) -> list[str]:
        if name in self.nodes:
            started = ("dataplane.launcher", "--nodes", name)
        else:
            started = ("controlplane.main" if name in CONTROLLERS else "web.gateway.main", "--id", name)
        return [sys.executable, "-m", *started, "--config", str(self.run_dir(host).config_file)]

    def _spawn(self, name: str, command: list[str]) -> None:
        # The launcher starts the node, whose file is called so, too.
        child = "launcher" if name in self.nodes else name
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
                if nodes == set(self.nodes) and len(up) == 2 and len(status.gateways) == len(GATEWAYS):
                    return
                last = f"green: {sorted(nodes)}, up: {len(up)}, gateways: {len(status.gateways)}"
            time.sleep(POLL_S)
        raise KevlarFlowError(f"the cluster was not ready in {START_LIMIT_S} s: {last}\n{self.logs()}")

    # ---- talking to it

    @property
    def generator(self) -> LoadGenerator:
        """A client that knows every gateway."""
        first, *others = [self._url(name, GATEWAY_PORT) for name in GATEWAYS]
        key = self.run_dir(GATEWAYS[0]).api_key()
        return LoadGenerator(first, key, self.config.model_name, tuple(others), self._ca, CLIENT_PATIENCE_S)

    def admin(self) -> AdminClient:
        urls = [self._url(name, ADMIN_PORT) for name in CONTROLLERS]
        return AdminClient(urls, self.run_dir(CONTROLLERS[0]).admin_token(), ca=self._ca)

    def _url(self, name: str, port: int) -> str:
        return f"{'https' if self._secure else 'http'}://{self.network.address(name)}:{port}"

    @property
    def _ca(self) -> str:
        return str(self.certs.ca) if self._secure else ""

    def status(self) -> ClusterStatus:
        with self.admin() as admin:
            return admin.status()

    def run_dir(self, name: str) -> RunDir:
        return RunDir(self.folder / name)

    def logs(self, lines: int = 8) -> str:
        """The end of every log."""
        files = [
            (name, path.stem)
            for name in (*self.servers, SPARE)
            for path in sorted((self.folder / name / "logs").glob("*.log"))
        ]
        return "\n".join(
            f"--- {name}: {stem}\n{self.run_dir(name).tail(stem, lines)}" for name, stem in files
        )

    def keep(self) -> Path:
        """What tells why a cell failed, in a folder that stays: the status, the newest events and all logs."""
        kept = ROOT / KEPT / self.folder.name
        with contextlib.suppress(KevlarFlowError), self.admin() as admin:
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "status.json").write_bytes(msgspec.json.encode(admin.status()))
            (kept / "events.json").write_bytes(msgspec.json.encode(admin.events(EVENTS_KEPT)))
        for name in (*self.servers, SPARE):
            if (self.folder / name / "logs").exists():
                shutil.copytree(self.folder / name / "logs", kept / name, dirs_exist_ok=True)
        return kept.relative_to(ROOT)

    # ---- processes

    def pid(self, name: str) -> int:
        """Raises ProcessLookupError when it does not run."""
        files = self.run_dir(name).processes("nodes" if name in self.nodes else "pids")
        if name not in files or not files[name].alive:
            raise ProcessLookupError(f"{name} is not running")
        return files[name].pid

    def signal(self, name: str, number: int) -> None:
        os.kill(self.pid(name), number)

    @contextlib.contextmanager
    def twin(self, name: str) -> Iterator[Path]:
        """A second process of this name on the spare host; yields the folder of its logs. Told to end afterwards."""
        logs = self.run_dir(SPARE).path / "logs"
        command = [*self.network.command(SPARE), *self._python(name, host=SPARE)]
        with (logs / f"twin-of-{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **self._direct}
            )
        try:
            yield logs
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # the next line ends whatever is left
                process.wait(TWIN_END_LIMIT_S)
            self.network.end(SPARE)
            process.wait(TWIN_END_LIMIT_S)

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
        with ThreadPoolExecutor(len(self.servers)) as pool:
            list(pool.map(self._end_one, self._supervisors))

    def _end_one(self, name: str) -> None:
        supervisor = self._supervisors[name]
        supervisor.end(["launcher" if name in self.nodes else name], END_GRACE_S)
        supervisor.close()


def remove_folder(folder: Path) -> None:
    """With the disks that are mounted in it."""
    for path in folder.iterdir():
        if path.is_mount():
            subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=10.0)
    shutil.rmtree(folder, ignore_errors=True)  # the last process may be writing a line to its log
