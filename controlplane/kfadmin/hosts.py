"""`kfadmin host`: a cluster over several hosts, from one file of its operator (`fleet.py`) to units of systemd."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from controlplane.contract.config import ClusterConfig
from controlplane.contract.errors import ConfigError, RequestError
from controlplane.contract.files import replace_file
from controlplane.contract.identity import ProcessName, ProcessRole
from controlplane.contract.status import ClusterStatus, NodeState, PipelineState
from controlplane.contract.topology import Mode
from controlplane.etcd.server import etcd_command
from controlplane.kfadmin.client import Unreachable
from controlplane.kfadmin.exits import Exit
from controlplane.kfadmin.fleet import HostPlan, bracketed, read_fleet, warnings
from controlplane.kfadmin.installed_etcd import installed_etcd
from controlplane.kfadmin.join import give, join, pack, parts_of, read_bundle, read_plan
from controlplane.kfadmin.output import progress
from controlplane.kfadmin.rundir import HOST_RUN_DIR, RunDir
from controlplane.kfadmin.secure import etcd_tls
from controlplane.kfadmin.target import AdminOption, RunDirOption, TokenFileOption, connect
from controlplane.kfadmin.tokens import seconds_of
from controlplane.kfadmin.units import TARGET, WORDS, render, verify

UNITS = Path("/etc/systemd/system")
# From `install` to the units.
PASSED_ON = ("KF_ETCD_BIN", "PGPASSFILE", "OMP_NUM_THREADS", "UCX_NET_DEVICES", "UCX_TLS")
POLL_S = 0.3

app = typer.Typer(no_args_is_help=True, help="Hosts of a cluster over several machines.")
HostDirOption = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Directory of this host (default: $KF_RUN_DIR or /var/lib/kevlarflow)."),
]
UnitsOption = Annotated[Path, typer.Option(help="Where systemd looks for units.")]
UserOption = Annotated[
    str, typer.Option(help="Who runs the units; the run directory becomes his (default: root).")
]


def host_run_dir(given: Path | None) -> RunDir:
    return RunDir((given or Path(os.environ.get("KF_RUN_DIR") or HOST_RUN_DIR)).absolute())


@app.command("pack")
def pack_verb(
    fleet: Annotated[Path, typer.Argument(help="The file that says what runs where.")],
    names: Annotated[list[str] | None, typer.Argument(help="Hosts (default: all).")] = None,
    lasts: Annotated[
        str, typer.Option("--for", help="How long new certificates are valid: 12h, 30d.")
    ] = "30d",
) -> None:
    """A bundle for each host, HOST.bundle beside the file: settings, secret, API keys, certificates.

    The authority is in certs/ beside the file (`kfadmin certs init --dir certs`); certificates that are due are issued
    anew. A bundle is a secret: bring it to its host on a way that nobody reads along, and delete it.
    """
    known = read_fleet(fleet)
    for warning in warnings(known):
        progress(f"WARNING: {warning}")
    folder, lifetime = fleet.absolute().parent, timedelta(seconds=seconds_of(lasts))
    for name in names or known.hosts:
        print(pack(folder, known, name, folder / f"{name}.bundle", lifetime))


@app.command("join")
def join_verb(
    bundle: Annotated[Path, typer.Argument(help="As `kfadmin host pack` made it for this host.")],
    run_dir: HostDirOption = None,
    install: Annotated[
        bool, typer.Option("--install", help="Also what `kfadmin host install` does.")
    ] = False,
    units: UnitsOption = UNITS,
    user: UserOption = "",
) -> None:
    """Make this machine a host of the cluster. Again with a newer bundle: processes take its certificates and keys up
    by themselves, and its settings when they are restarted."""
    host, files = read_bundle(bundle)
    local = host_run_dir(run_dir)
    join(local, host, files)
    print(f"{host.name} of {host.cluster}: {', '.join(parts_of(host)) or 'nothing'} in {local.path}")
    if install:
        _install(local, units, user)


@app.command("install")
def install_verb(run_dir: HostDirOption = None, units: UnitsOption = UNITS, user: UserOption = "") -> None:
    """Write systemd units of what runs on this host; nothing is started. They do not change while the host's parts
    stay the same: a newer bundle, package or etcd needs no other."""
    _install(host_run_dir(run_dir), units, user)


def _install(local: RunDir, units: Path, user: str) -> None:
    host = read_plan(local)
    if not units.is_dir():
        raise ConfigError(
            f"there is no {units}: give --units, or run the parts otherwise (kfadmin host run PART)"
        )
    parts = parts_of(host)
    if host.etcd:
        _etcd(local, host)  # raises ConfigError where none is installed
    command = [sys.executable, "-m", "controlplane.kfadmin.main", "host", "run"]
    env = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    texts = render(parts, local.path, command, user, env)
    if user:
        give(local, user)
    for name, text in texts.items():
        replace_file(units / name, text.encode(), 0o644)
        print(units / name)
    for stale in sorted(set(WORDS) - set(parts)):
        if (path := units / f"kevlarflow-{stale}.service").exists():
            progress(
                f"{path} is no part of {host.name} any more: systemctl disable --now {path.name}, then remove it"
            )
    if said := verify([units / name for name in texts]):
        raise ConfigError(f"systemd does not take the units as they are: {said}")
    progress(f"to start: systemctl daemon-reload && systemctl enable --now {TARGET}")


@app.command()
def run(
    part: Annotated[str, typer.Argument(help=f"{', '.join(WORDS)}.")],
    run_dir: HostDirOption = None,
) -> None:
    """Become one part of this host, in the foreground: what its unit does."""
    local = host_run_dir(run_dir)
    host = read_plan(local)
    if part not in parts_of(host):
        raise RequestError(f"{part} does not run on {host.name}: it has {', '.join(parts_of(host))}")
    settings = ["--config", str(local.config_file)]
    match part:
        case "etcd":
            command = _etcd(local, host)
        case "controller":
            command = [sys.executable, "-m", "controlplane.main", *settings, "--id", host.name]
            command += [
                "--admin-port",
                str(local.config().admin_port),
            ]  # others know it: no other one will do
        case "nodes":
            command = [sys.executable, "-m", "dataplane.launcher", *settings, "--nodes", ",".join(host.nodes)]
        case _:
            command = [sys.executable, "-m", "web.gateway.main", *settings, "--id", host.name]
    os.execv(command[0], command)


@app.command()
def wait(
    run_dir: RunDirOption = None,
    admin: AdminOption = None,
    token_file: TokenFileOption = None,
    timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds; then exit code 4 with what is missing.")
    ] = 300.0,
) -> None:
    """Until every node of the cluster is there, every pipeline serves at home, and every copy is under way."""
    deadline, missing = time.monotonic() + timeout, "no controller answers"
    while True:
        try:
            with connect(run_dir, admin, token_file, POLL_S) as client:
                missing = _missing(client.current())
        except Unreachable as error:
            missing = str(error)
        if not missing:
            print("every pipeline serves")
            return
        if time.monotonic() > deadline:
            progress(f"waited {timeout:g} s: {missing}")
            raise typer.Exit(Exit.GOES_ON)
        time.sleep(POLL_S)


def _missing(status: ClusterStatus) -> str:
    """Why a cluster is not whole; "": it is."""
    if not status.pipelines:
        return "there is no topology yet"
    green = {node.node for node in status.nodes if node.state is NodeState.GREEN}
    homes = {home for pipeline in status.pipelines for stage in pipeline.stages for home in stage.homes}
    if absent := sorted(homes - green):
        return f"nodes that are not there: {', '.join(absent)}"
    if down := [pipeline.id for pipeline in status.pipelines if pipeline.state is not PipelineState.UP]:
        return f"pipelines that do not serve at home: {', '.join(down)}"
    copied = status.mode is not Mode.REPLICATE or len(status.pipelines) == 1
    bare = [p.id for p in status.pipelines if not copied and not all(stage.replicas for stage in p.stages)]
    return f"stages without a copy: of {', '.join(bare)}" if bare else ""


def _etcd(local: RunDir, host: HostPlan) -> list[str]:
    """The command line of this host's member. Raises ConfigError."""
    config: ClusterConfig = local.config()
    addresses = host.etcd_bracketed()
    binary, version = installed_etcd(len(addresses))
    return etcd_command(
        binary,
        host.name,
        local.path / "etcd" / host.name,
        host.etcd_port,
        host.etcd_peer_port,
        members=dict.fromkeys(addresses, host.etcd_peer_port),
        hosts=addresses,
        listen=bracketed(config.host),
        token=host.cluster,
        version=version,
        tls=etcd_tls(config, ProcessName(ProcessRole.ETCD, host.name)),
    )
