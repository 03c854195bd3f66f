"""A whole cluster on this machine: `kfadmin up`, the end-to-end tests and the benches all start it here."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import msgspec

from controlplane.contract.address import admin_socket, join, port_range, too_few
from controlplane.contract.config import RANGES, ClusterConfig
from controlplane.contract.errors import ConfigError, KevlarFlowError, PeerError
from controlplane.contract.hosting import WANTED_FILE, Wanted, all_nodes
from controlplane.contract.identity import RELAY_NAME, ProcessName, ProcessRole
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.etcd.health import unfit_releases
from controlplane.etcd.server import EtcdBinaryError, ServerTls, etcd_command, etcd_version, find_etcd_binary
from controlplane.kfadmin.certs import FOLDER
from controlplane.kfadmin.checkpoint import absolute, check_model
from controlplane.kfadmin.client import AdminClient, Unreachable, trust
from controlplane.kfadmin.rundir import (
    Endpoints,
    RunDir,
    admin_endpoints,
    check_name,
    free_port,
    port_is_free,
    usable,
)
from controlplane.kfadmin.secure import certify, etcd_healthy, etcd_tls, renew
from controlplane.kfadmin.supervise import Program, SupervisorThread, tied
from controlplane.supervisor import ProcessFile
from controlplane.unreadable import UNREADABLE

POLL_S = 0.05
START_LIMIT_S = 120.0
ETCD_LIMIT_S = 20.0
WATCH_S = 1.0
RENEW_LOOK_S = 600.0
STARTS_MAX = 4  # a process that needed more starts before the cluster was ready has something wrong with it
PROBE_TIMEOUT_S = 1.0


class StartFailed(KevlarFlowError):
    """The cluster did not come up; the text has the end of the guilty log."""


def check_text(config: ClusterConfig) -> None:
    """Raises ConfigError where settings cannot be written to a file: a path may be any bytes, JSON is UTF-8."""
    try:
        msgspec.json.encode(config)
    except UnicodeEncodeError as error:
        raise ConfigError(f"{error.object!r} in the settings is not UTF-8") from error


class LocalCluster:
    """One cluster in one run directory.

    Ports that are 0 in `config` are chosen; `config.etcd`, when given, is used and no etcd is started. etcd's
    data are made afresh at each start (the event history is kept). Methods may be called from any thread,
    but `start` and `stop` only from one. `orphans`: see Supervisor.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        controllers: int = 2,
        gateways: int = 1,
        etcd_members: int = 1,
        supervise: bool = True,
        progress: Callable[[str], None] = lambda line: None,
        start_limit_s: float = START_LIMIT_S,
        orphans: bool = False,
        secure: bool = False,
        program: Program = tied,
    ) -> None:
        """`secure`: with certificates of the run directory's own authority, if the settings name none. `program`: how
        processes begin."""
        # Relative paths would mean something else to whoever reads the settings later.
        config = msgspec.structs.replace(
            config,
            run_dir=str(Path(config.run_dir).absolute()),
            model=str(absolute(config.model)),
        )
        check_name(Path(config.run_dir))
        check_text(config)
        check_model(Path(config.model), config.stages if config.engine.executor == "torch" else None)
        self.config = config
        self.run_dir = RunDir(Path(config.run_dir))
        self._draft = config
        self._controllers = [f"c{number + 1}" for number in range(controllers)]
        self._gateways = [f"g{number + 1}" for number in range(gateways)]
        self._etcd_members = 0 if config.etcd else etcd_members
        self._supervise = supervise
        self._progress = progress
        self._start_limit_s = start_limit_s
        self._orphans = orphans
        self._program = program
        self._certs = self.run_dir.path / FOLDER if secure and not config.tls.enabled else None
        self._stack = contextlib.ExitStack()
        self._supervisor: SupervisorThread | None = None
        self._ports: dict[str, int] = {}
        self._uncertified = ""  # why new nodes have no certificates, as it was told

    def __enter__(self) -> LocalCluster:
        self.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop()

    # ---- starting

    def start(self) -> None:
        """Returns when every node serves and the gateway is ready.

        Raises RunDirBusy, RunDirUnusable, ConfigError or StartFailed; nothing runs then.
        """
        with usable(self.run_dir.path):
            self._stack.enter_context(self.run_dir.owned())
            self._start()

    def _start(self) -> None:
        try:
            if leftovers := self.run_dir.end_leftovers():
                self._progress(f"ended processes of an earlier run: {', '.join(leftovers)}")
            self.run_dir.prepare()
            (self.run_dir.path / WANTED_FILE).unlink(missing_ok=True)  # of an earlier topology
            for folder in ("pids", "nodes", "relay"):
                for file in (self.run_dir.path / folder).glob("*.json"):
                    file.unlink()
            self._certify()
            self._choose_ports()
            # Before there is a supervisor: it may reap every child of this process, and so the answer's, too.
            etcd = self._find_etcd() if self._etcd_members else None
            direct = {name: "127.0.0.1,localhost,::1" for name in ("no_proxy", "NO_PROXY")}
            self._supervisor = SupervisorThread(
                self.run_dir,
                restart=self._supervise,
                env=direct,
                orphans=self._orphans,
                program=self._program,
            )
            if etcd is not None:
                self._start_etcd(*etcd)
            self._start_rest()  # at once: what the others import takes longer than etcd does, and they wait for it
            self._wait_etcd(time.monotonic() + ETCD_LIMIT_S)
            self._wait_ready(time.monotonic() + self._start_limit_s)
        except BaseException:  # Ctrl-C as well: leave nothing behind
            self.stop()
            raise

    def _certify(self) -> None:
        if self._certs is None:
            return
        config = self._draft
        members = [f"etcd{number}" for number in range(self._etcd_members)]
        nodes = all_nodes(config)
        of_role = {
            ProcessRole.ETCD: members,
            ProcessRole.CONTROLLER: self._controllers,
            ProcessRole.GATEWAY: self._gateways,
            ProcessRole.NODE: nodes,
            ProcessRole.RELAY: [RELAY_NAME],
        }
        named = [ProcessName(role, name) for role, names in of_role.items() for name in names]
        self._draft = msgspec.structs.replace(config, tls=certify(self._certs, config, named), insecure=False)

    def _choose_ports(self) -> None:
        draft, host = self._draft, self._draft.host
        counts = (len(self._controllers), *[len(all_nodes(draft))] * 2)
        for setting, processes in zip(RANGES, counts, strict=True):
            if fault := too_few(setting, getattr(draft, setting), processes):
                raise fault
        fixed = (port for setting in RANGES for port in port_range(getattr(draft, setting)))
        taken = {draft.gateway_port, draft.admin_port, *fixed}

        def port(wanted: int, what: str) -> int:
            if wanted and not port_is_free(host, wanted):
                raise ConfigError(f"port {wanted} on {host} is taken: give another --{what}-port (0: any)")
            return wanted or free_port(host, taken)

        for number, name in enumerate(self._gateways):
            self._ports[name] = port(0 if number else self._draft.gateway_port, "gateway")
        for number, name in enumerate(self._controllers):
            self._ports[name] = port(0 if number else self._draft.admin_port, "admin")
        members = [f"etcd{number}" for number in range(self._etcd_members)]
        for name in members:
            self._ports[name] = free_port("127.0.0.1", taken)
            self._ports[f"{name} peer"] = free_port("127.0.0.1", taken)
        self.config = msgspec.structs.replace(
            self._draft,
            etcd=self._draft.etcd or tuple(f"127.0.0.1:{self._ports[name]}" for name in members),
            gateway_port=self._ports[self._gateways[0]],
            admin_port=self._ports[self._controllers[0]],
        )
        self.run_dir.write("cluster.json", self.config)
        self.run_dir.write("endpoints.json", self.endpoints)

    def _find_etcd(self) -> tuple[Path, tuple[int, int, int]]:
        try:
            binary = find_etcd_binary(os.environ)
            return binary, etcd_version(binary)
        except EtcdBinaryError as error:
            raise ConfigError(str(error)) from error

    def _start_etcd(self, binary: Path, version: tuple[int, int, int]) -> None:
        release = ".".join(map(str, version))
        self._progress(f"starting etcd {release} ({self._etcd_members} members)")
        for warning in unfit_releases([release], self._etcd_members):
            self._progress(f"WARNING: {warning}")
        shutil.rmtree(self.run_dir.path / "etcd")
        (self.run_dir.path / "etcd").mkdir(mode=0o700)
        names = [f"etcd{number}" for number in range(self._etcd_members)]
        members = {name: self._ports[f"{name} peer"] for name in names}
        for name in names:
            data = self.run_dir.path / "etcd" / name
            command = etcd_command(
                binary, name, data, self._ports[name], members[name], members=members, version=version,
                tls=self._etcd_tls(name),
            )  # fmt: skip
            self._children.start(name, command)

    def _start_rest(self) -> None:
        self._progress("starting controllers, gateway and nodes")
        settings = ["--config", str(self.run_dir.config_file)]
        for name in self._controllers:
            port = ["--admin-port", str(self._ports[name])]
            self._children.start(
                name, [sys.executable, "-m", "controlplane.main", *settings, "--id", name, *port]
            )
        self._children.start("launcher", [sys.executable, "-m", "dataplane.launcher", *settings])
        for name in self._gateways:
            port = ["--port", str(self._ports[name])]
            self._children.start(
                name, [sys.executable, "-m", "web.gateway.main", *settings, "--id", name, *port]
            )

    # ---- waiting until it is ready

    def _wait_etcd(self, deadline: float) -> None:
        for number in range(self._etcd_members):
            name = f"etcd{number}"
            healthy = partial(etcd_healthy, f"127.0.0.1:{self._ports[name]}", self._etcd_tls(name))
            self._wait(healthy, deadline, f"{name} is ready", partial(str, name))

    def _etcd_tls(self, name: str) -> ServerTls | None:
        return etcd_tls(self.config, ProcessName(ProcessRole.ETCD, name))

    def _wait_ready(self, deadline: float) -> None:
        first = self._controllers[0]
        self._wait(self._any_controller, deadline, "a controller answers", lambda: first)
        with self.admin() as admin:
            self._wait_nodes(admin, deadline)

            def all_up() -> bool:
                return all(p.state is PipelineState.UP for p in admin.status().pipelines)

            self._wait(all_up, deadline, "every pipeline serves", lambda: admin.status().leader or first)
            pipelines = len(admin.status().pipelines)
        # At its first answer a gateway may reach one pipeline only, which then gets all requests.
        for name in self._gateways:
            reaches_all = partial(self._reaches, name, pipelines)
            self._wait(reaches_all, deadline, f"{name} reaches every pipeline", partial(str, name))
        self._progress("ready")

    def _wait_nodes(self, admin: AdminClient, deadline: float) -> None:
        missing = set(all_nodes(self.config))
        total = len(missing)

        def all_there() -> bool:
            there = {node.node for node in admin.status().nodes if node.state is NodeState.GREEN}
            if news := missing & there:
                missing.difference_update(news)
                self._progress(f"{total - len(missing)} of {total} nodes have loaded their weights")
            return not missing

        self._wait(all_there, deadline, "every node has joined", lambda: min(missing))

    def _wait(
        self, condition: Callable[[], bool], deadline: float, what: str, guilty: Callable[[], str]
    ) -> None:
        """Poll until `condition`; a controller that does not answer yet is the same as false."""
        while True:
            with contextlib.suppress(Unreachable, PeerError):
                if condition():
                    return
            for name, file in self._processes().items():
                if file.taken:
                    raise StartFailed(file.said)
                if file.restarts >= STARTS_MAX:
                    why = f"{name} keeps dying:\n{self.run_dir.tail(name)}" if file.pid else file.said
                    raise StartFailed(why)
            if time.monotonic() > deadline:
                name = guilty()
                raise StartFailed(
                    f"waited too long until {what}; the end of {self.run_dir.log(name)}:\n{self.run_dir.tail(name)}"
                )
            time.sleep(POLL_S)

    def _processes(self) -> dict[str, ProcessFile]:
        """All but the relay: the cluster can do without it."""
        return {**self._children.processes(), **self.run_dir.processes("nodes")}

    def _any_controller(self) -> bool:
        return any(self._answers(f"{self._url(name)}/readyz") for name in self._controllers)

    def _reaches(self, gateway: str, pipelines: int) -> bool:
        # To who shows no key that is good it says only that it serves: that has to do where the file has none.
        with contextlib.suppress(ConfigError):
            headers = {"authorization": f"Bearer {self.api_key}"}
            answer = self._answer(f"{self._url(gateway)}/readyz", headers)
            return answer is not None and answer.json().get("pipelines", pipelines) >= pipelines
        return self._answers(f"{self._url(gateway)}/readyz")

    def _answers(self, url: str) -> bool:
        return self._answer(url) is not None

    def _answer(self, url: str, headers: dict[str, str] | None = None) -> httpx.Response | None:
        """To a GET, if it is a 200 and comes within a second."""
        try:
            verify = trust(url, self.endpoints.ca)
            answer = httpx.get(url, headers=headers, timeout=PROBE_TIMEOUT_S, trust_env=False, verify=verify)
        except httpx.TransportError:
            return None
        return answer if answer.status_code == 200 else None

    # ---- what runs where

    @property
    def _children(self) -> SupervisorThread:
        if self._supervisor is None:
            raise KevlarFlowError("the cluster is not running")
        return self._supervisor

    def _url(self, name: str) -> str:
        scheme = "http" if self.config.https is None else "https"
        return f"{scheme}://{join(self.config.advertised, self._ports[name])}"

    @property
    def endpoints(self) -> Endpoints:
        sockets = [admin_socket(self.run_dir.path, name) for name in self._controllers]
        return Endpoints(
            gateways=tuple(self._url(name) for name in self._gateways),
            admin=tuple(self._url(name) for name in self._controllers),
            sockets=tuple(str(path) for path in sockets if path is not None) if all(sockets) else (),
            ca=self.config.tls.ca if self.config.https is not None else "",
        )

    @property
    def gateway_url(self) -> str:
        return self._url(self._gateways[0])

    @property
    def api_key(self) -> str:
        return self.run_dir.api_key()

    @property
    def admin_token(self) -> str:
        return self.run_dir.admin_token()

    def admin(self) -> AdminClient:
        """A new client of the admin API; close it (it is a context manager)."""
        known = self.endpoints
        return AdminClient(admin_endpoints(known), self.admin_token, ca=known.ca)

    def status(self) -> ClusterStatus:
        with self.admin() as admin:
            return admin.status()

    def pids(self) -> dict[str, int]:
        """Every process that runs now, by name: etcd0, c1, g1, launcher, relay, n0 ..."""
        return {**self._children.pids(), **self._running("relay"), **self.node_pids()}

    def node_pids(self) -> dict[str, int]:
        """Nodes that run now."""
        return self._running("nodes")

    def _running(self, folder: str) -> dict[str, int]:
        return {name: file.pid for name, file in self.run_dir.processes(folder).items() if file.alive}

    def wait(self) -> None:
        """Returns never while all is well; raises KevlarFlowError when supervision has broken down.

        Why a process failed, or could not be started, is told, and again only if it is something else. Where another
        process has its name that is said while it waits for the name, as it does most of the time."""
        told: dict[str, str] = {}
        look_at = time.monotonic() + RENEW_LOOK_S
        while not self._children.join(WATCH_S):
            if self._certs is not None and time.monotonic() >= look_at:
                look_at = time.monotonic() + RENEW_LOOK_S
                self.renew_certificates()
            self.certify_new_nodes()
            for name, file in {**self._processes(), **self.run_dir.processes("relay")}.items():
                if file.said and told.get(name) != file.said:
                    told[name] = file.said
                    who = "" if file.said.startswith(name) else f"{name} failed: "
                    self._progress(f"{who}{file.said}. It is tried again, ever more rarely")
        raise KevlarFlowError("the supervisor's thread has ended; see the trace above")

    def certify_new_nodes(self) -> None:
        """Certificates of nodes that the group has come to want since it was started. What keeps them from being made
        is told, once."""
        if self._certs is None:
            return
        try:
            wanted = msgspec.json.decode((self.run_dir.path / WANTED_FILE).read_bytes(), type=Wanted)
            new = [n for n in wanted.run if not Path(self.config.tls.paths(f"node-{n}")[1]).exists()]
            if new:
                certify(self._certs, self.config, [ProcessName(ProcessRole.NODE, node) for node in new])
                self._progress(f"made certificates for {', '.join(new)}")
        except FileNotFoundError:
            return  # the relay has not said anything yet
        except (OSError, ConfigError, *UNREADABLE) as error:
            if str(error) != self._uncertified:
                self._uncertified = str(error)
                self._progress(f"WARNING: no certificates for new nodes: {error}")

    def renew_certificates(self) -> None:
        """Those that have lived for half of their time. What keeps it from that is told, and tried again."""
        if self._certs is None:
            return
        try:
            renewed = renew(self._certs)
        except (OSError, ConfigError) as error:
            self._progress(f"WARNING: certificates cannot be renewed: {error}")
        else:
            if renewed:
                self._progress(f"renewed the certificates of {', '.join(renewed)}")

    # ---- doing harm, and mending it

    def kill(self, name: str, number: int = signal.SIGKILL) -> int:
        """Send a signal to a process of the cluster; returns its pid.

        Raises ProcessLookupError when it is not running.
        """
        pid = self.pids().get(name)
        if pid is None:
            raise ProcessLookupError(f"{name} is not running")
        os.kill(pid, number)
        return pid

    def hold(self, name: str) -> None:
        """When it dies, leave it dead."""
        (self.run_dir.path / "hold" / name).touch()

    def release(self, name: str) -> None:
        """End of `hold`."""
        (self.run_dir.path / "hold" / name).unlink(missing_ok=True)

    # ---- stopping

    def stop(self) -> None:
        """End everything within 10 s; safe to call twice."""
        children, self._supervisor = self._supervisor, None
        with self._stack as last:  # the directory is let go of last
            if children is None:
                return
            self._progress("stopping")
            # The stack calls the last one first, and each whatever became of those before: gateways tell their
            # clients; then nothing is left to serve, to lead or to store.
            last.callback(children.close)
            last.callback(children.end, [f"etcd{number}" for number in range(self._etcd_members)], 1.5)
            # If the launcher had to be killed.
            last.callback(self.run_dir.end_leftovers, 1.5, ("nodes", "relay"))
            last.callback(children.end, ["launcher"], 4.0)
            last.callback(children.end, [*self._gateways, *self._controllers], 2.5)
