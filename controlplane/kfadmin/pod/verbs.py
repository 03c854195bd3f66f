"""`kfadmin pod`: becoming the process of a pod, and leaving it without losing a token."""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from controlplane.contract.auth import load_secret
from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError, KevlarFlowError, RequestError, Unavailable
from controlplane.contract.files import replace_file
from controlplane.contract.identity import Identity, ProcessName, ProcessRole
from controlplane.contract.records import OperationKind
from controlplane.contract.status import OperationRequest
from controlplane.etcd.server import etcd_command
from controlplane.kfadmin.client import AdminClient
from controlplane.kfadmin.fleet import bracketed
from controlplane.kfadmin.installed_etcd import installed_etcd
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.pod import release
from controlplane.kfadmin.pod.api import KubernetesApi
from controlplane.kfadmin.pod.place import LETTERS, PLAN_FILE, PodPlace, PodPlan, config_of, read_plan
from controlplane.kfadmin.rundir import Endpoints, RunDir, usable
from controlplane.kfadmin.secure import etcd_tls
from controlplane.kfadmin.target import RunDirOption, connect

ETCD_PORT, ETCD_PEER_PORT, ETCD_METRICS_PORT = 2379, 2380, 2381
CREDENTIALS = Path("/etc/kevlarflow/credentials")
API_KEYS = Path("/etc/kevlarflow/api-keys")
OIDC = Path("/etc/kevlarflow/oidc/oidc.toml")  # of controllers, where the release has a login provider
# In the pod's environment, where files are elsewhere.
PLAN_ENV, CREDENTIALS_ENV, API_KEYS_ENV = "KF_POD_PLAN", "KF_CREDENTIALS", "KF_API_KEYS"
OIDC_ENV = "KF_OIDC"
KEY_FILES = ("api-keys", "keys.json")
PARTS = {role.value: role for role in LETTERS}
LABELS_WAIT_S = 60.0  # for Kubernetes' API, at the start of a pod
REFUSED_WAIT_S = 20.0  # another operation may end, a node may come back
RESTARTS_WAIT_S = 600.0  # for the fresh process of a pod that went
POLL_S = 0.2

app = typer.Typer(no_args_is_help=True, help="What runs in pods of the Helm chart, and the chart's Secrets.")
app.command("secrets")(release.secrets_verb)
app.command()(release.autoscale)


@app.command()
def run(
    part: Annotated[str, typer.Argument(help=f"{', '.join(PARTS)}.")],
) -> None:
    """Become one process of the cluster, in the foreground, as process 1 of a container.

    What all pods share is in $KF_POD_PLAN (default: /etc/kevlarflow/plan.json), what is this pod's own in KF_POD_NAME,
    KF_POD_UID, KF_POD_IP and KF_NODE_NAME, and everything that is written goes to $KF_RUN_DIR.
    """
    if part not in PARTS:
        raise RequestError(f"{part!r}: {', '.join(PARTS)}")
    role, place = PARTS[part], PodPlace.of(os.environ)
    plan = read_plan(_path(PLAN_ENV, PLAN_FILE))
    run_dir = _run_dir()
    name = place.process(role)
    domains = _domains(plan, place) if role is ProcessRole.NODE else None
    config = config_of(plan, place, role, run_dir.path, domains)
    prepare(run_dir, plan, config, ProcessName(role, name))
    command = command_of(run_dir, plan, place, config, ProcessName(role, name))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)


def _run_dir() -> RunDir:
    given = os.environ.get("KF_RUN_DIR")
    if not given:
        raise ConfigError(
            "KF_RUN_DIR has to be set: a folder of a volume that may be written, such as an emptyDir"
        )
    return RunDir(Path(given))


def _path(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default)


def _domains(plan: PodPlan, place: PodPlace) -> dict[str, str]:
    """Raises ConfigError, Unavailable, PeerError."""
    if not plan.fault_domains:
        return {}
    deadline = time.monotonic() + LABELS_WAIT_S
    with KubernetesApi() as api:
        while True:
            try:
                labels = api.node_labels(place.machine)
                break
            except Unavailable as error:
                if time.monotonic() > deadline:
                    raise
                progress(f"{error}; asking again")
                time.sleep(1.0)
    return {ours: labels[theirs] for ours, theirs in plan.fault_domains.items() if theirs in labels}


def prepare(run_dir: RunDir, plan: PodPlan, config: ClusterConfig, me: ProcessName) -> None:
    """Everything in the run directory that the process, and kfadmin in the same pod, have to find.

    Raises ConfigError."""
    with usable(run_dir.path):
        run_dir.make_folders()
        if me.role is not ProcessRole.ETCD:
            _take_secret(run_dir)
        if me.role is ProcessRole.GATEWAY:
            _link_keys(run_dir)
        if me.role is ProcessRole.NODE:
            for process in (me.name, "relay"):
                _log_here(run_dir.log(process))
        run_dir.write("cluster.json", config)
        run_dir.write("endpoints.json", Endpoints(plan.gateways, plan.admin, ca=config.tls.ca))
    Identity(config.tls, config.cluster, me)  # raises ConfigError where key and certificate do not fit


def _take_secret(run_dir: RunDir) -> None:
    """A copy: Kubernetes gives a pod its secrets by a group, and this one is nobody's but ours."""
    source, target = _path(CREDENTIALS_ENV, CREDENTIALS) / "secret", run_dir.path / "secret"
    try:
        content = source.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the cluster's secret {source}: {error.strerror}") from error
    replace_file(target, content)
    load_secret(target)  # raises ConfigError if it is too short


def _link_keys(run_dir: RunDir) -> None:
    """Links, since Kubernetes changes what they point to when the Secret changes, and gateways look every second."""
    folder = _path(API_KEYS_ENV, API_KEYS)
    for name in KEY_FILES:
        link = run_dir.path / name
        link.unlink(missing_ok=True)
        link.symlink_to(folder / name)


def _log_here(log: Path) -> None:
    """The launcher's children write into files: here these are the container's own output."""
    log.unlink(missing_ok=True)
    log.symlink_to(f"/proc/{os.getpid()}/fd/2")


def command_of(
    run_dir: RunDir, plan: PodPlan, place: PodPlace, config: ClusterConfig, me: ProcessName
) -> list[str]:
    """What the pod executes. Raises ConfigError."""
    settings = ["--config", str(run_dir.config_file)]
    match me.role:
        case ProcessRole.ETCD:
            return _etcd(run_dir, plan, place, config, me)
        case ProcessRole.CONTROLLER:
            port = ["--admin-port", str(config.admin_port)]  # others know it: no other one will do
            oidc = _path(OIDC_ENV, OIDC)
            login = ["--oidc", str(oidc)] if oidc.exists() else []
            return [sys.executable, "-m", "controlplane.main", *settings, "--id", me.name, *port, *login]
        case ProcessRole.GATEWAY:
            return [sys.executable, "-m", "web.gateway.main", *settings, "--id", me.name]
        case _:
            return [sys.executable, "-m", "dataplane.launcher", *settings, "--nodes", me.name]


def _etcd(
    run_dir: RunDir, plan: PodPlan, place: PodPlace, config: ClusterConfig, me: ProcessName
) -> list[str]:
    """Raises ConfigError."""
    if me.name not in plan.etcd_members:
        raise ConfigError(
            f"{me.name} is no member of etcd, which has {', '.join(plan.etcd_members) or 'none'}: etcd.replicas is"
            " how many the release was installed with"
        )
    binary, version = installed_etcd(len(plan.etcd_members))
    bind = bracketed(place.bind)
    command = etcd_command(
        binary,
        me.name,
        run_dir.path / "etcd" / me.name,
        ETCD_PORT,
        ETCD_PEER_PORT,
        members=dict.fromkeys(plan.etcd_members, ETCD_PEER_PORT),
        hosts=plan.etcd_members,
        listen=bind,
        token=config.cluster,
        version=version,
        tls=etcd_tls(config, me),
    )
    # Probes have no certificate: health and metrics alone are told on a port of their own.
    return [*command, f"--listen-metrics-urls=http://{bind}:{ETCD_METRICS_PORT}"]


@app.command()
def leave(
    run_dir: RunDirOption = None,
    timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds; then the rest is left to the failure of the node.")
    ] = 60.0,
) -> None:
    """Before a node's pod ends: its stages move to other nodes, KV included, and its process retires.

    It is `kfadmin replace`: the fresh process, in the pod that follows, gets its stages back. (After `kfadmin drain` it
    would stay cordoned.) Exit code 0, whether or not it could be done: the pod ends in either case.
    """
    place = PodPlace.of(os.environ)
    node = place.process(ProcessRole.NODE)
    local = RunDir(run_dir) if run_dir is not None else _run_dir()
    try:
        said = retire(local, place, node, time.monotonic() + timeout)
    except KevlarFlowError as error:
        said = f"{node} ends as it is: {error}"
    progress(said)


def retire(local: RunDir, place: PodPlace, node: str, deadline: float) -> str:
    """What came of it, in words. Raises what AdminClient does, but not because nobody answers for a while."""
    if not _runs(local, node):
        return f"{node} does not run"
    (local.path / "hold" / node).touch()  # its launcher starts no fresh process in a pod that ends
    request = OperationRequest(
        f"pod-{place.uid[:8]}-{node}-{secrets.token_hex(2)}",
        OperationKind.REPLACE.value,
        node,
        deadline_s=RESTARTS_WAIT_S,
        reason=f"the pod {place.name} ends",
    )
    with connect(local.path, None, None) as client:
        refused = _submit(client, request, min(deadline, time.monotonic() + REFUSED_WAIT_S))
    if refused:
        return f"{node} ends as it is: {refused}"
    if _wait(lambda: not _runs(local, node), deadline):
        return f"{node} has left"
    return f"{node} ends as it is: what it serves could not be moved in time"


def _submit(client: AdminClient, request: OperationRequest, until: float) -> str:
    """Why it was not accepted by then; "": it was."""
    while True:
        try:
            answer = client.submit(request)
            if answer.accepted:
                return ""
            why = "; ".join(check.message for check in answer.checks if check.level == "fail")
        except Unavailable as error:
            why = str(error)
        if time.monotonic() >= until:
            return why
        time.sleep(POLL_S)


def _runs(local: RunDir, node: str) -> bool:
    file = local.processes("nodes").get(node)
    return file is not None and file.alive


def _wait(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True
